"""How fast a device is, by a short measurement."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from library.estimate.ledger import Rates

_SECONDS = 0.2  # that a measurement takes at least
_CARD = 4096, 2**28  # sides of matrices, and bytes that are copied, on a card
_CPU = 512, 2**24
_SMALL = 512  # numbers of a tensor whose work is nothing beside its start


def measured(dtype: torch.dtype) -> Rates:
    """Of the device that a training would take: products of matrices in float32 and in this dtype, copies, and starts
    of small operations."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    side, size = _CARD if device.type == "cuda" else _CPU
    flops = {}
    for kind in dict.fromkeys((torch.float32, dtype)):
        a = torch.randn(side, side, device=device).to(kind)
        flops[kind] = 2 * side**3 / _seconds(functools.partial(torch.matmul, a, a), device)
    block = torch.zeros(size, dtype=torch.uint8, device=device)
    other, small = torch.empty_like(block), torch.zeros(_SMALL, device=device)
    copied = 2 * size / _seconds(lambda: other.copy_(block), device)
    return Rates(flops, copied, 1 / _seconds(lambda: small + 1, device))


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """That a call takes, after the first."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    call()
    wait()
    number, start = 0, time.perf_counter()
    while time.perf_counter() - start < _SECONDS:
        for _ in range(4):
            call()
        number += 4
        wait()
    return (time.perf_counter() - start) / number
