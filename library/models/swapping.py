"""A frozen denoiser some of whose blocks wait in the host's memory until their turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from diffusers.hooks.group_offloading import ModuleGroup
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.hooks import RemovableHandle

from networks.deft_config import DeftError, reason_of
from networks.deft_progress import Bar


class Group(Protocol):
    """Moves a block's weights; diffusers' `ModuleGroup` is one."""

    def onload_(self) -> None: ...

    def offload_(self) -> None: ...


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks that a model of diffusers' or transformers' repeats, in their order; not the one with its first
    weight, which is where models see what device they are on."""
    kinds: Any = getattr(model, "_repeated_blocks", ()) or getattr(model, "_no_split_modules", ()) or ()
    found = [block for block in model.modules() if type(block).__name__ in kinds]
    first = next(model.parameters())
    return [block for block in found if all(one is not first for one in block.parameters())]


def spread(units: Sequence[Sequence[nn.Module]], number: int) -> list[nn.Module]:
    """The blocks of so many units, evenly between the others, so that these compute while the next one comes.

    :raises DeftError: where there are not so many
    """
    if number > len(units):
        raise DeftError(f"--blocks_to_swap {number}: this model has {len(units)}; give at most that")
    return [block for i in range(number) for block in units[i * len(units) // number]]


class Swapping:
    """Blocks that are on the device for their own forward and backward pass, and the next one already beside them.

    Which comes next is what came next the last time. Without gradients a block leaves behind its forward pass. With
    them, `checkpointed` computes it in both passes: no weight has to stay for the backward pass.

    :param model: whose other parts go to the device, and stay
    :param blocks: in the order of their use
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], device: torch.device):
        inside = {module for block in blocks for module in block.modules()}
        for module in model.modules():
            if module not in inside:
                module._apply(lambda one: one.to(device), recurse=False)
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" and torch.cuda.is_available() else None
        self._groups: dict[nn.Module, Group] = {}
        self._hooks: list[RemovableHandle] = []
        with Bar(len(blocks), "blocks to swap", "blocks") as bar:
            for block in blocks:
                self._groups[block] = group_of(block, device, self._stream)
                self._hooks += [
                    block.register_forward_pre_hook(lambda block, _: self.load(block)),
                    block.register_forward_hook(lambda block, *_: self._behind(block)),
                ]
                bar.add(1)
        self._loaded: set[nn.Module] = set()
        self._ahead: nn.Module | None = None  # that is loaded before its turn
        self._last: tuple[nn.Module, bool] | None = None
        back = list(reversed(blocks))
        self._next = {(a, False): b for a, b in zip(blocks, [*blocks[1:], back[0]], strict=True)}
        self._next |= {(a, True): b for a, b in zip(back, [*back[1:], blocks[0]], strict=True)}

    def close(self) -> None:
        """All blocks wait, and for nothing any more."""
        for hook in self._hooks:
            hook.remove()
        for block in list(self._loaded):
            self._offload(block)

    def load(self, block: nn.Module, backward: bool = False) -> None:
        """Before a block's turn."""
        turn = block, backward or torch.is_grad_enabled()
        if turn == self._last and block in self._loaded:  # computed again for its backward pass
            return
        if self._last is not None:
            self._next[self._last] = block
        self._last = turn
        if self._ahead is not None and self._ahead is not block:
            self._offload(self._ahead)
        self._ahead = None
        self._onload(block)
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        following = self._next[turn]
        if following not in self._loaded:
            self._ahead = following
            self._onload(following)

    def leave(self, block: nn.Module) -> None:
        """Behind a block's turn; it stays where the next turn is its own."""
        if self._last is not None and self._next[self._last] is block:
            self._ahead = block
        else:
            self._offload(block)

    def _behind(self, block: nn.Module) -> None:
        if not torch.is_grad_enabled():
            self.leave(block)

    def checkpointed(self, block: nn.Module, *given: Any) -> Any:
        """A block's outputs, of whose inputs alone are kept for the backward pass. An input gets a gradient where none
        has: without, the block's adapters would have none either."""
        if not any(isinstance(one, Tensor) and one.requires_grad for one in given):
            first = next(i for i, one in enumerate(given) if isinstance(one, Tensor) and one.is_floating_point())
            given = (*given[:first], given[first].detach().requires_grad_(), *given[first + 1 :])
        return _Checkpointed.apply(self, block, *given)

    def __contains__(self, block: nn.Module) -> bool:
        return block in self._groups

    def _onload(self, block: nn.Module) -> None:
        if block not in self._loaded:
            self._groups[block].onload_()
            self._loaded.add(block)

    def _offload(self, block: nn.Module) -> None:
        if block in self._loaded:
            self._groups[block].offload_()
            self._loaded.remove(block)


class _Checkpointed(CheckpointFunction):
    """torch's reentrant checkpoint of a block that is loaded for the backward pass as well."""

    @staticmethod
    def forward(ctx: Any, swapping: Swapping, block: nn.Module, *given: Any) -> Any:
        ctx.swapping, ctx.block = swapping, block
        return CheckpointFunction.forward(ctx, block, True, *given)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.swapping.load(ctx.block, backward=True)
        found = CheckpointFunction.backward(ctx, *gradients)
        ctx.swapping.leave(ctx.block)
        return found


class _Group(ModuleGroup):
    """diffusers', whose tensors of torchao come back whole: what 0.42 puts back still says that it is on the GPU."""

    def offload_(self) -> None:
        super().offload_()
        for parameter, kept in self.cpu_param_dict.items():
            if parameter.device != kept.device:
                torch.utils.swap_tensors(parameter, kept.detach())


def group_of(block: nn.Module, device: torch.device, stream: Any) -> Group:
    """What moves a block's weights to a GPU while it computes something else. They are copied there and forgotten, not
    copied back.

    :raises DeftError: where the system does not give memory that a GPU reads by itself
    """
    for parameter in block.parameters():
        if hasattr(parameter, "quant_state"):  # bitsandbytes' scales, which are few, stay on the device
            parameter.quant_state.to(device)
    leader: Any = block
    try:
        group = _Group(
            [block], torch.device("cpu"), device, offload_leader=leader, onload_leader=leader, stream=stream,
            record_stream=stream is not None,
        )  # fmt: skip
    except RuntimeError as error:
        raise DeftError(
            f"not enough of the host's memory can be locked for blocks that wait for their turn ({reason_of(error)}); "
            f"give fewer --blocks_to_swap, or --fp8_base"
        ) from error
    group.offload_()
    return group
