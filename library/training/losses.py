"""The loss of a batch: what the model is asked, what it answers, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from library.data.latents import Batch
from library.models.family import Family
from library.training.objective import Objective
from library.training.randoms import Randoms
from library.training.texts import Texts


@dataclass(frozen=True)
class Losses:
    """Of a model with its adapter, as they are."""

    model: Family
    texts: Texts
    objective: Objective
    accelerator: Accelerator

    def __call__(self, batch: Batch, randoms: Randoms, timestep: int | None = None) -> Tensor:
        """(b,), float32, with gradients.

        :param randoms: of the batch's pictures
        :param timestep: of all of them; None to draw them
        """
        latents = batch.latents.to(self.accelerator.device)
        timesteps = None if timestep is None else torch.full((len(latents),), timestep)
        noised = self.objective.draw(randoms, latents, timesteps)
        randoms.seed_torch()  # for dropout
        with self.accelerator.autocast():
            text = self.texts(batch.captions)
            sizes = batch.sizes.to(self.accelerator.device)
            prediction = self.model.predict(noised.noisy, noised.timesteps, text, sizes)
        return self.objective.loss(noised, prediction)
