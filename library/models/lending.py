"""A whole pipeline on a device for a while: all of it at once, or what has its turn, as its memory allows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from diffusers import DiffusionPipeline
from torch import nn

_SHARE = 0.8  # of the free memory that weights may take; the rest is for what is computed


@contextlib.contextmanager
def on_device(pipeline: DiffusionPipeline, device: torch.device) -> Iterator[None]:
    """To draw pictures with, without gradients; on the CPU again behind it. Where a GPU does not hold all parts, each
    comes when it is called, and where it does not hold one of them, each layer."""
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    sizes = [sum(one.nbytes for one in part.parameters()) for part in parts]
    room = _SHARE * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")
    if sum(sizes) <= room:
        pipeline.to(device)
    elif max(sizes) <= room:
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.enable_sequential_cpu_offload(device=device)
    try:
        yield
    finally:
        pipeline.remove_all_hooks()
        pipeline.to("cpu")
