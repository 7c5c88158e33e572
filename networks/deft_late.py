"""Numbers of a device that are asked for now and read later, when nobody has to wait for them."""

from __future__ import annotations

import torch
from torch import Tensor


class Late:
    """Numbers of a device's, on their way to the CPU.

    :param numbers: (n,)
    """

    def __init__(self, numbers: Tensor):
        # other devices than cards leave no mark behind a copy, so that these are waited for
        self._numbers = numbers.to("cpu", non_blocking=numbers.is_cuda)
        self._there = torch.cuda.Event() if numbers.is_cuda else None
        if self._there is not None:
            self._there.record(torch.cuda.current_stream(numbers.device))

    def read(self) -> list[float]:
        """Once they are there."""
        if self._there is not None:
            self._there.synchronize()
        return self._numbers.tolist()
