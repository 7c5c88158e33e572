"""Between the CPU and a device, without waiting for what the device has been given to do."""

from __future__ import annotations

import torch
from torch import Tensor

SHARE = 0.01  # of a card's memory, that what is small beside it takes


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, in its own dtype. To a card, a copy out of other than pinned memory waits for all that
    the card has been given to do."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def is_small(size: int, device: torch.device) -> bool:
    """Whether so many bytes may stay on a device for a whole training; only on cards."""
    return device.type == "cuda" and size <= SHARE * torch.cuda.get_device_properties(device).total_memory
