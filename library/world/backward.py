"""Forward and backward pass of a small model as one step, on a GPU as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def autocast(device: torch.device) -> torch.autocast:
    """To bfloat16 on a GPU; not on a CPU, most of which only imitate it, which takes many times as long.

    Without a cache of weights, of which a CUDA graph can keep none.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu", cache_enabled=False)


def backward_of(loss: nn.Module, example: Sequence[Tensor]) -> Callable[..., Tensor]:
    """A function that computes `loss` of tensors like those in the example, leaves its gradients in the parameters'
    `.grad` in the place of older ones, and returns it.

    On a GPU it replays one CUDA graph: a model this small would wait for the launches of its kernels (on an H100
    machine where a launch takes about 50 us, the U-Net's step of 256 took 122 ms without a graph).

    :param loss: returns a scalar tensor; never synchronises with the CPU; autocasts without a cache of weights
    """
    if example[0].device.type != "cuda":

        def plain(*inputs: Tensor) -> Tensor:
            loss.zero_grad()
            value = loss(*inputs)
            value.backward()
            return value.detach()

        return plain

    static = [tensor.clone() for tensor in example]
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):  # libraries set themselves up in the first calls, which a graph must not record
            loss(*static).backward()
            loss.zero_grad()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = loss(*static)
        value.backward()

    def replayed(*inputs: Tensor) -> Tensor:
        for kept, tensor in zip(static, inputs, strict=True):
            kept.copy_(tensor)
        graph.replay()
        return value.detach()

    return replayed
