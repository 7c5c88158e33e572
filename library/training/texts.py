"""What the text encoders make of captions and prompts: in every step, or once, where it is kept."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from library.data import building, cache
from library.data.batches import Gone
from library.data.cache import Entries, Memory, Store
from library.models.family import Family, Text
from library.models.lending import lend
from library.options.rooms import CacheOptions
from library.transfer import sent
from networks.deft_config import DeftError


class Texts:
    """Encodes texts with the model as it is, or gives what `keep` has encoded before."""

    def __init__(self, model: Family, accelerator: Accelerator):
        self.model, self.accelerator = model, accelerator
        self._keys: dict[str, str] = {}  # of captions that are kept
        self._entries: Entries = Memory()

    def __call__(self, captions: Sequence[str], inputs: Sequence[Sequence[Tensor]] = ()) -> Text:
        """Of texts, in their order, on the training's device.

        :param inputs: each text's pictures, as `Family.encode_text` takes them
        """
        if not self._keys:
            device = self.accelerator.device
            placed = [[sent(one, device) for one in row] for row in inputs]
            return self.model.encode_text(list(captions), *([placed] if any(placed) else []))
        found = [self._kept(caption) for caption in captions]
        return {name: sent(torch.cat([t[name] for t in found]), self.accelerator.device) for name in found[0]}

    def _kept(self, caption: str) -> Text:
        """:raises Gone: when the entry is gone, which the disk's is when somebody deletes it"""
        entry = self._entries.read(self._keys[caption], check=False)
        if entry is None:
            raise Gone(f"'{caption}' is gone from the cache of texts")
        return entry

    @torch.no_grad()
    def keep(self, captions: Iterable[str], dtype: torch.dtype, caches: CacheOptions) -> None:
        """Encodes all that will ever be asked for, or reads it from the disk, and frees the text encoders.

        :param dtype: of the encoders meanwhile
        """
        device, different = self.accelerator.device, list(dict.fromkeys(captions))
        encoders = self.model.text_encoders
        for encoder in encoders:
            torch.nn.Module.to(encoder, dtype=dtype)
        keys = {caption: caption for caption in different}
        if caches.cache_text_encoder_outputs_to_disk:
            self._entries = Store(caches.folder)
            models = [cache.fingerprint(encoder) for encoder in encoders]
            tokenizers = [cache.tokenizer_fingerprint(one) for one in self.model.tokenizers]
            reading = dict(self.model.reading()) | {"autocast": self.accelerator.mixed_precision}
            keys = {one: cache.text_key(one, models, tokenizers, dtype, **reading) for one in different}

        lent = functools.cache(lambda: lend(encoders, device))  # where there is a text to encode

        def encode(_: list[str], batch: list[str]) -> list[Text]:
            lent()
            with self.accelerator.autocast():
                text = self.model.encode_text(batch)
            return [{name: value[i : i + 1] for name, value in text.items()} for i in range(len(batch))]

        failed = building.build(
            self._entries, {key: caption for caption, key in keys.items()}, lambda caption: caption, encode,
            caches.text_encoder_batch_size or 1, what="encoding texts", unit="texts",
            check=not caches.skip_cache_check, process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes if caches.cache_text_encoder_outputs_to_disk else 1,
        )  # fmt: skip
        if failed:
            error = next(iter(failed.values()))
            raise DeftError(f"--cache_text_encoder_outputs: {len(failed)} texts could not be encoded ({error})")
        if isinstance(self._entries, Memory):
            self._entries.place(device)
        self._keys = keys
        for one in lent() if lent.cache_info().currsize else ():
            one.close()
        self.model.free_text_encoders()
