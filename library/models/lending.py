"""Frozen models on a device for a while, without gradients: whole, or by their blocks where its memory is too small."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from library.models.swapping import Swapping, blocks_of

_SHARE = 0.8  # of the free memory that weights may take; the rest is for what is computed
_LARGE = 0.1  # of it: a part that takes more has its blocks swapped


def lend(parts: Sequence[nn.Module], device: torch.device) -> list[Swapping]:
    """All of them together.

    :returns: what is to be closed once they are no longer needed
    """
    room = _SHARE * _free(device)
    sizes = [sum(one.nbytes for one in part.parameters()) for part in parts]
    swapped: list[Swapping] = []
    try:
        for part, size in zip(parts, sizes, strict=True):
            if sum(sizes) > room and size > _LARGE * room and blocks_of(part):
                swapped.append(Swapping(part, blocks_of(part), device))
            else:
                nn.Module.to(part, device)  # transformers hides its signature
    except BaseException:
        for one in swapped:
            one.close()
        raise
    return swapped


@contextlib.contextmanager
def on_device(parts: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """All of them together; they are where they were behind it."""
    before = [next(part.parameters()).device for part in parts]
    swapped: list[Swapping] = []
    try:
        swapped = lend(parts, device)
        yield
    finally:
        for one in swapped:
            one.close()
        for part, place in zip(parts, before, strict=True):
            nn.Module.to(part, place)


def _free(device: torch.device) -> float:
    """Bytes of its memory, with what torch holds of it unused; without an end where it is the host's."""
    if device.type != "cuda":
        return float("inf")
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
