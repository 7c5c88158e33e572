"""What OmniGen reads: an instruction with pictures in it, then the time, then the picture that is to become one.

Words and order are those of the original's OmniGen/processor.py and of diffusers' processor_omnigen.py; a text attends
to what stands before it, a picture in it also to all of itself, and the picture that is made to everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from library.models.family import Text
from library.placeholders import PICTURE, misplaced
from library.transfer import sent
from networks.deft_config import DeftError

AROUND = "<|user|>\nGenerate an image according to the following instructions\n{}<|end|>\n<|assistant|>\n<|diffusion|>"
_PADDING, _PLACE = 2, 0  # ids that stand where nothing is read, and where a picture does


def ids_of(tokenizer: Any, caption: str) -> list[list[int]]:
    """Of what stands before, between and behind the pictures, with all that the model is told around a caption."""
    found: list[list[int]] = []
    for part in PICTURE.split(AROUND.format(caption))[::2]:  # the numbers stand between
        ids = list(tokenizer(part, verbose=False).input_ids)
        begins = bool(found) and ids[:1] == [tokenizer.bos_token_id]  # as if it were a text of its own
        found.append(ids[begins:])
    return found


def encoded(
    tokenizer: Any, patch: int, captions: Sequence[str], inputs: Sequence[Sequence[Tensor]], device: torch.device
) -> Text:
    """Captions with their pictures, for `answer`; rows can be chosen.

    :param patch: latents a side of a token
    :param inputs: each caption's, as latents (c, h, w), or nothing
    :returns: `ids` (b, tokens), int64, padded on the left, and `pictures` (b, n, c, h, w), float32, padded, on the
        device; `lengths` (b,) without padding, and `places` (b, n, 3): how many tokens before the end a picture begins,
        and its height and width in latents, 0 where there is none; both int64, on the CPU
    :raises DeftError: for a caption that does not name its pictures
    """
    rows = [
        _row(tokenizer, patch, caption, pictures)
        for caption, pictures in zip(captions, inputs or [()] * len(captions), strict=True)
    ]
    lengths = torch.tensor([len(ids) for ids, _ in rows])
    ids = torch.full((len(rows), int(lengths.max())), _PADDING)
    found = [picture for _, shown in rows for _, picture in shown]
    most, sizes = max(len(shown) for _, shown in rows), [picture.shape for picture in found] or [torch.Size([0, 0, 0])]
    pictures = torch.zeros(len(rows), most, *(max(size) for size in zip(*sizes, strict=True)), device=device)
    places = torch.zeros(len(rows), most, 3, dtype=torch.int64)
    for i, (row, shown) in enumerate(rows):
        ids[i, ids.shape[1] - len(row) :] = torch.tensor(row)
        for k, (start, picture) in enumerate(shown):
            _, height, width = picture.shape
            pictures[i, k, :, :height, :width] = picture
            places[i, k] = torch.tensor([len(row) - start, height, width])
    return {"ids": sent(ids, device), "pictures": pictures, "lengths": lengths, "places": places}


def _row(
    tokenizer: Any, patch: int, caption: str, pictures: Sequence[Tensor]
) -> tuple[list[int], list[tuple[int, Tensor]]]:
    """A caption's ids, and where each picture of it begins."""
    fault = misplaced(caption, len(pictures))
    if fault is not None:
        raise DeftError(f"caption '{caption}': {fault}")
    first, *others = ids_of(tokenizer, caption)
    ids, shown = first, []
    for number, behind in zip(PICTURE.findall(caption), others, strict=True):
        picture = pictures[int(number) - 1]
        if picture.shape[1] % patch or picture.shape[2] % patch:
            raise DeftError(f"caption '{caption}': latents of {tuple(picture.shape[1:])} are no whole tokens")
        shown.append((len(ids), picture))
        ids = [*ids, *[_PLACE] * (picture[0].numel() // patch**2), *behind]
    return ids, shown


def answer(transformer: Any, noisy: Tensor, times: Tensor, text: Text) -> Tensor:
    """(b, c, h, w): the way from noise to latents, of each row as if it were asked for alone.

    diffusers' transformer takes the positions of a batch's first row for all, and one set of the two of its rotary
    factors, for short and for long sequences, by the longest row. So all rows get the same positions, since only their
    differences count, and a batch of both kinds is asked for in two.

    :param transformer: an OmniGenTransformer2DModel
    :param noisy: (b, c, h, w)
    :param times: (b,) from 0, noise, to 1
    :param text: of `encoded`
    :raises DeftError: for pictures that are too large
    """
    config = transformer.config
    largest, most = max(*noisy.shape[-2:], *text["places"][..., 1:].flatten().tolist()), config.pos_embed_max_size
    if largest > most * config.patch_size:
        raise DeftError(
            f"a picture has {largest} latents a side, OmniGen knows places of {most * config.patch_size}; give a lower "
            f"--resolution"
        )
    tokens = noisy[0, 0].numel() // config.patch_size**2
    long = (text["lengths"] + 1 + tokens > config.original_max_position_embeddings).tolist()
    groups = [rows for kind in (False, True) if (rows := [i for i, is_long in enumerate(long) if is_long == kind])]
    if len(groups) == 1:
        return _answer(transformer, noisy, times, text)
    parts = [
        _answer(
            transformer, _of(noisy, rows), _of(times, rows), {name: _of(value, rows) for name, value in text.items()}
        )
        for rows in map(torch.tensor, groups)
    ]
    return _of(torch.cat(parts), torch.tensor([i for rows in groups for i in rows]).argsort())


def _of(values: Tensor, rows: Tensor) -> Tensor:
    """Some rows, whose numbers are on the CPU."""
    return values[sent(rows, values.device)]


def _answer(transformer: Any, noisy: Tensor, times: Tensor, text: Text) -> Tensor:
    config = transformer.config
    length = int(text["lengths"].max())
    spans: dict[int, list[list[int]]] = {}
    pictures = []
    for i, row in enumerate(text["places"].tolist()):
        for k, (before_end, height, width) in enumerate(row):
            if height:
                start = length - before_end
                spans.setdefault(i, []).append([start, start + height * width // config.patch_size**2])
                pictures.append(text["pictures"][i : i + 1, k, :, :height, :width])
    tokens = noisy[0, 0].numel() // config.patch_size**2
    return transformer(
        hidden_states=noisy.to(transformer.dtype),
        timestep=times,
        input_ids=text["ids"][:, -length:],
        input_img_latents=pictures,
        input_image_sizes=spans,
        attention_mask=_seen(text["lengths"], tokens, spans, noisy.device)[:, None],
        position_ids=torch.arange(length + 1 + tokens, device=noisy.device)[None],
        return_dict=False,
    )[0]


def _seen(lengths: Tensor, tokens: int, spans: dict[int, list[list[int]]], device: torch.device) -> Tensor:
    """(b, s, s), whether a token attends to another. Padding attends to all, so that it is finite.

    :param tokens: of the picture that is made
    :param spans: row -> first and behind last token of each picture in the text
    """
    length = int(lengths.max())
    place = torch.arange(length + 1 + tokens, device=device)
    seen = (place[:, None] >= place) | (place[:, None] > length)  # the time stands at `length`
    padding = place < (length - sent(lengths, device))[:, None]
    mask = seen & ~padding[:, None] | padding[..., None]
    for i, found in spans.items():
        for start, end in found:
            mask[i, start:end, start:end] = True
    return mask
