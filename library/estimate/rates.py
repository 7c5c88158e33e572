"""How fast a card is, by a short measurement."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from library.estimate.ledger import Rates

_SECONDS = 0.2  # that a measurement takes at least
_SIDE, _BYTES = 4096, 2**28  # of matrices, and what is copied
_SMALL = 512  # numbers of a tensor whose work is nothing beside its start


def measured(dtype: torch.dtype) -> Rates | None:
    """Of products of matrices in float32 and in this dtype, of copies, and of starting small operations; None where
    there is no CUDA card: a training's time on another machine cannot be told."""
    if not torch.cuda.is_available():
        return None
    device = torch.device("cuda")
    flops = {}
    for kind in dict.fromkeys((torch.float32, dtype)):
        a = torch.randn(_SIDE, _SIDE, device=device).to(kind)
        flops[kind] = 2 * _SIDE**3 / _seconds(functools.partial(torch.matmul, a, a))
    block = torch.zeros(_BYTES, dtype=torch.uint8, device=device)
    other, small = torch.empty_like(block), torch.zeros(_SMALL, device=device)
    copied = 2 * _BYTES / _seconds(lambda: other.copy_(block))
    return Rates(flops, copied, 1 / _seconds(lambda: small + 1))


def _seconds(call: Callable[[], object]) -> float:
    """That a call takes, after the first."""
    call()
    torch.cuda.synchronize()
    number, start = 0, time.perf_counter()
    while time.perf_counter() - start < _SECONDS:
        for _ in range(4):
            call()
        number += 4
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / number
