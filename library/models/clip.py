"""CLIP's text encoders as sd-scripts reads them (commit 48d368fa, strategy_base.py, strategy_sd.py, strategy_sdxl.py):
a caption of up to 75 tokens, or 150 or 225 in windows of 75, each with a start and an end of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ftfy
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from library.models import weighted
from library.models.outline import Encoder
from library.models.reading import CLIP_L, find_tokenizer
from library.options.rooms import ModelOptions
from library.transfer import sent
from networks.deft_config import DeftError


@dataclass(frozen=True)
class Place:
    """A tokenizer's name at the hub, and its folder there."""

    name: str
    subfolder: str = ""


SD2 = Place("stabilityai/stable-diffusion-2", "tokenizer")
BIG_G = Place("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k")

WINDOW = 75  # tokens without start and end, that --max_token_length counts in
OPEN_CLIP_PADDING = 0  # OpenCLIP's encoders were trained with token 0 behind the end, OpenAI's with the end again


class Reader:
    """Captions as a text encoder's tokens.

    :param padding: the token behind the end
    :param positions: of the encoder, 77
    :param max_token_length: of --max_token_length
    :param weighted: whether captions have weights, --weighted_captions
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        padding: int,
        positions: int,
        max_token_length: int | None = None,
        weighted: bool = False,
    ):
        self.tokenizer, self.padding, self.weighted = tokenizer, padding, weighted
        self.window = positions - 2
        self.windows = 1 if max_token_length is None else max_token_length // WINDOW

    @property
    def length(self) -> int:
        """Tokens that are read, without start and end."""
        return self.windows * self.window

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """(captions, windows, positions), int64."""
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        rows = []
        for caption in captions:
            found = [*self.ids(caption)[: self.length], end]
            found += [self.padding] * (self.length + 1 - len(found))
            last = found.pop()
            windows = [found[i : i + self.window] for i in range(0, self.length, self.window)]
            rows.append([[start, *self._closed(window, last, end)] for window in windows])
        return torch.tensor(rows)

    def _closed(self, window: list[int], last: int, end: int) -> list[int]:
        """A window with its last token; without text, it begins with an end."""
        if self.windows > 1:
            if window[-1] not in (end, self.padding):
                last = end
            if window[0] == self.padding:
                window = [end, *window[1:]]
        return [*window, last]

    def weights(self, captions: Sequence[str]) -> Tensor | None:
        """(captions, length + 2), float32, of all tokens with one start and one end; None where captions have none."""
        if not self.weighted:
            return None
        rows = torch.ones(len(captions), self.length + 2)
        for row, caption in zip(rows, captions, strict=True):
            found = self._read(caption)[1][: self.length]
            row[1 : len(found) + 1] = torch.tensor(found)
        return rows

    def _read(self, caption: str) -> tuple[list[int], list[float]]:
        """All of its tokens and their weights; texts of different weights are read one by one."""
        tokens: list[int] = []
        weights: list[float] = []
        for text, weight in weighted.parse(caption) if self.weighted else [(caption, 1.0)]:
            found = self.tokenizer(cleaned(text), verbose=False).input_ids[1:-1]
            tokens += found
            weights += [weight] * len(found)
        return tokens, weights

    def ids(self, caption: str) -> list[int]:
        """All of its tokens, without start and end."""
        return self._read(caption)[0]

    def beyond(self, caption: str) -> tuple[str, int]:
        """See `Family.beyond`."""
        return self.outline("").beyond(caption), self.length

    def outline(self, name: str) -> Encoder:
        """How many tokens it reads.

        :param name: of the text encoder
        """
        return Encoder(name, self.tokenizer, self.ids, self.length)


def cleaned(text: str) -> str:
    """What CLIP was trained on, and sd-scripts' older transformers makes of a text itself: curly quotes made straight,
    ligatures and full-width letters plain, entities of HTML and doubly encoded letters undone; in lower case."""
    return " ".join(ftfy.fix_text(text).split()).lower()


def states(encoder: nn.Module, tokens: Tensor) -> Any:
    """What the encoder makes of tokens (captions, windows, positions): `hidden_states`, of each layer, and
    `last_hidden_state`, behind the last norm; all (captions * windows, positions, width)."""
    device: Any = encoder.device
    return encoder(sent(tokens.flatten(0, 1), device), output_hidden_states=True)


def last_norm(encoder: nn.Module) -> nn.Module:
    """The norm behind the last layer."""
    inner: Any = getattr(encoder, "text_model", encoder)  # transformers before 5.6 wraps it
    return inner.final_layer_norm


def joined(hidden: Tensor, windows: int) -> Tensor:
    """One start, the insides of all windows, one end: (captions * windows, positions, width) -> (captions, tokens + 2,
    width)."""
    if windows == 1:
        return hidden
    parts = hidden.unflatten(0, (-1, windows))
    return torch.cat([parts[:, 0, :1], parts[:, :, 1:-1].flatten(1, 2), parts[:, -1, -1:]], 1)


def weighed(hidden: Tensor, weights: Tensor | None) -> Tensor:
    """Each token's state times its weight, as sd-scripts has it: the mean is not brought back to what it was.

    :param hidden: of `joined`
    :param weights: of `Reader.weights`
    """
    return hidden if weights is None else (hidden * sent(weights[..., None], hidden.device)).to(hidden.dtype)


def pooled(encoder: nn.Module, last: Tensor, tokens: Tensor, end: int) -> Tensor:
    """The projected state at the first end of each caption's first window, (captions, width).

    :param last: `last_hidden_state`
    :param tokens: (captions, windows, positions)
    """
    captions, windows, _ = tokens.shape
    places = sent((tokens[:, 0] == end).int().argmax(-1), last.device)
    at_end = last[::windows][torch.arange(captions, device=last.device), places]
    projection: nn.Linear = encoder.text_projection  # type: ignore[assignment]
    return projection(at_end.to(projection.weight.dtype)).to(last.dtype)


def find(options: ModelOptions, others: Sequence[Place]) -> PreTrainedTokenizerBase:
    """CLIP's tokenizer, of --tokenizer, or for a single file: its vocabulary is the same wherever it comes from.

    :param others: where sd-scripts keeps it too for this family
    :raises DeftError: when there is none in any place
    """
    for place in others if not options.tokenizer else ():
        try:
            return find_tokenizer(None, options.tokenizer_cache_dir, place.name, subfolder=place.subfolder)
        except DeftError:
            continue
    return find_tokenizer(options.tokenizer, options.tokenizer_cache_dir, CLIP_L)
