"""The loss of a batch: what the model is asked, what it answers, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from library.data.batches import Batch
from library.models.family import Family
from library.options.rooms import PreservationOptions
from library.training.adapter import Adapter
from library.training.objective import Noised, Objective
from library.training.randoms import Purpose, Randoms
from library.training.texts import Texts
from library.transfer import sent


class Asked(NamedTuple):
    """What the model is asked for: captions, and each one's pictures; see `Batch`."""

    captions: Sequence[str]
    inputs: Sequence[Sequence[Tensor]] = ()


@dataclass(frozen=True)
class Losses:
    """Of a model with its adapter, as they are."""

    model: Family
    adapter: Adapter
    texts: Texts
    objective: Objective
    preservation: PreservationOptions
    accelerator: Accelerator

    def __call__(
        self, batch: Batch, randoms: Randoms, at: Sequence[int] | None = None, multiplier: float = 1.0
    ) -> Tensor:
        """(b,), float32, with gradients.

        :param randoms: of the batch's pictures
        :param at: their timesteps, to measure; None to draw them
        :param multiplier: a factor of the adapter's own
        """
        device, strength = self.accelerator.device, batch.multiplier * multiplier
        latents, sizes = self.latents(batch, randoms), sent(batch.sizes, device)
        timesteps = None if at is None else torch.tensor(at)
        noised, asked = self.objective.draw(randoms, latents, timesteps), Asked(batch.captions, batch.inputs)
        if batch.preserved:
            own, preserved = self._own_answer(noised, asked, sizes), torch.zeros(len(batch), 1, 1, 1, dtype=torch.bool)
            preserved[list(batch.preserved)] = True
            noised = replace(noised, target=own.where(sent(preserved, device), noised.target))
        self.adapter.set_multiplier(strength)
        randoms.seed_torch()  # for dropout
        masks = None if batch.masks is None else sent(batch.masks, device)
        losses = self.objective.loss(noised, self.predicted(noised, asked, sizes), masks)
        if batch.weights is not None:
            losses = losses * sent(batch.weights, device)
        if at is None and self.preservation.diff_output_preservation_class is not None:
            losses = losses + self._of_the_class(noised, asked, sizes, strength)
        return losses

    def latents(self, batch: Batch, randoms: Randoms) -> Tensor:
        """(b, c, h, w), float32, on the training's device."""
        device = self.accelerator.device
        if batch.latents is not None:
            return sent(batch.latents, device)
        assert batch.pixels is not None
        return self.model.encode_image(sent(batch.pixels, device), randoms.generators(Purpose.LATENTS)).float()

    def predicted(self, noised: Noised, asked: Asked, sizes: Tensor) -> Tensor:
        """(b, c, h, w), the model's answer, with the adapter as it is.

        :param sizes: (b, 6), see `Batch`
        """
        with self.accelerator.autocast():
            return self.model.predict(noised.noisy, noised.timesteps, self.texts(*asked), sizes)

    @torch.no_grad()
    def _own_answer(self, noised: Noised, asked: Asked, sizes: Tensor) -> Tensor:
        """(b, c, h, w), what the model answers without its adapter, text encoders included."""
        self.adapter.set_multiplier(0.0)
        return self.objective.answer(noised, self.predicted(noised, asked, sizes).float())

    def _of_the_class(self, noised: Noised, asked: Asked, sizes: Tensor, strength: float) -> Tensor:
        """(b,), what it costs that captions with the class's words in place of the trigger's are answered otherwise
        than without the adapter: ai-toolkit's differential output preservation."""
        captions = asked.captions
        found = {i: words for i, caption in enumerate(captions) if (words := self.preservation.of_class(caption))}
        losses, which = torch.zeros(len(captions), device=sizes.device), list(found)
        if which:
            places = sent(torch.tensor(which), sizes.device)
            some, inputs = noised.of(places), [asked.inputs[i] for i in which] if asked.inputs else ()
            of_class = Asked(list(found.values()), inputs)
            own = self._own_answer(some, of_class, sizes[places])
            self.adapter.set_multiplier(strength)
            answered = self.predicted(some, of_class, sizes[places])
            cost = self.objective.loss(replace(some, target=own), answered)
            losses = losses.index_add(0, places, cost)
        return losses * self.preservation.diff_output_preservation_multiplier
