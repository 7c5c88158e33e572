"""What the text encoders make of captions and prompts: in every step, or once, where it is kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from accelerate import Accelerator

from library.models.family import Family, Text
from networks.deft_progress import progress


class Texts:
    """Encodes texts with the model as it is, or gives what `keep` has encoded before."""

    def __init__(self, model: Family, accelerator: Accelerator):
        self.model, self.accelerator = model, accelerator
        self._kept: dict[str, Text] = {}

    def __call__(self, captions: Sequence[str]) -> Text:
        """Of texts, in their order, on the training's device."""
        if not self._kept:
            return self.model.encode_text(list(captions))
        found = [self._kept[caption] for caption in captions]
        return {name: torch.cat([text[name] for text in found]).to(self.accelerator.device) for name in found[0]}

    @torch.no_grad()
    def keep(self, captions: Iterable[str], dtype: torch.dtype, at_once: int) -> None:
        """Encodes all that will ever be asked for, and frees the text encoders.

        :param dtype: of the encoders meanwhile
        :param at_once: captions of a batch
        """
        device, different = self.accelerator.device, list(dict.fromkeys(captions))
        for encoder in self.model.text_encoders:
            torch.nn.Module.to(encoder, device, dtype)
        kept: dict[str, Text] = {}
        batches = [different[i : i + at_once] for i in range(0, len(different), at_once)]
        for batch in progress(batches, "encoding texts"):
            with self.accelerator.autocast():
                text = self.model.encode_text(batch)
            for i, caption in enumerate(batch):
                kept[caption] = {name: value[i : i + 1].cpu() for name, value in text.items()}
        self._kept = kept
        self.model.free_text_encoders()
