"""--torch_compile: the blocks that a denoiser repeats, compiled once for each kind of them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from networks.deft_config import DeftError, reason_of

logger = logging.getLogger(__name__)

# blocks of all kinds share it, each trained, drawn with, and without the adapter, in several sizes
GRAPHS = 64


def check(denoiser: Any, backend: str, device: torch.device) -> None:
    """:param denoiser: of diffusers
    :param backend: of torch.compile
    :raises DeftError: where it does not work here, which a small function shows, or the model repeats no blocks
    """
    if not getattr(denoiser, "_repeated_blocks", None):
        raise DeftError(f"--torch_compile: nothing of {type(denoiser).__name__} is compiled; leave it out")

    def small(x: Tensor) -> Tensor:
        return (x * 2).sin().sum()

    try:
        torch.compile(small, backend=backend)(torch.ones(8, device=device, requires_grad=True)).backward()
    except Exception as error:  # of many kinds: no C++ compiler, no Triton, a device that it does not know
        raise DeftError(
            f"--torch_compile: {backend} does not work here ({_reason(error)}); it needs a C++ compiler on a CPU, "
            f"Triton on a GPU; install it, or leave --torch_compile out"
        ) from None


def compile_blocks(denoiser: Any, backend: str) -> None:
    """Has them compiled as they are first called; the adapter is on the model by now."""
    torch._dynamo.config.recompile_limit = GRAPHS
    denoiser.compile_repeated_blocks(backend=backend)
    denoiser.register_forward_pre_hook(_Passes())
    logger.info(
        f"--torch_compile: {backend} compiles the model's blocks as they are first called; the first step waits for "
        f"it, a minute or more, and so do the first picture and each new size"
    )


@contextlib.contextmanager
def told(described: Callable[[], str]) -> Iterator[None]:
    """Around the training.

    :param described: what has been saved
    :raises DeftError: for what the compiler cannot do, in the first step, or with a size that is new
    """
    try:
        yield
    except TorchDynamoException as error:
        raise DeftError(
            f"--torch_compile: it fails on this model ({_reason(error)}); leave it out; {described()}"
        ) from None


def _reason(error: BaseException) -> str:
    """Of what dynamo wraps, the compiler's own."""
    return reason_of(getattr(error, "inner_exception", error))


class _Passes:
    """A forward pre-hook. A block that cannot be compiled ends the training in its first step. Later, with another size
    for one, it is run as it is, and dynamo says so: what costs speed alone is not worth the hours before."""

    def __init__(self) -> None:
        self.trained = 0

    def __call__(self, denoiser: nn.Module, args: Any) -> None:
        self.trained += torch.is_grad_enabled()
        torch._dynamo.config.suppress_errors = self.trained > 1
