"""Models with compiled blocks: all layers' factors are formed before a pass, and are plain tensors to the graphs.

In a graph each layer would form its own basis: dozens of small operations, which the compiler takes longer over than
over the block itself. Here a graph holds a layer's two products with up and down. Those of all layers are the outputs
of one autograd function, whose backward pass makes the gradients of P, R and g for all of them at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from networks.deft_autograd import LayerFactors, without_autocast
from networks.deft_config import DeftError
from networks.deft_module import DeftModule, Share

Pair = tuple[Tensor, Tensor]  # up and down


class Computing(Protocol):
    """What is asked of a batch; see `deft_batch`."""

    modules: list[DeftModule]

    @property
    def is_possible(self) -> bool: ...

    def versions(self) -> list[int]: ...

    def compute(self, dtype: torch.dtype) -> dict[DeftModule | Share, LayerFactors]: ...

    def gradients(
        self, collected: Mapping[DeftModule, list[Tensor]], known: Mapping[DeftModule, Tensor], dtype: torch.dtype
    ) -> dict[Tensor, Tensor]: ...


class GivenFactors:
    """Gives a batch's layers their factors (`given`) before each pass of `root`, where parts of it have been compiled
    by the time of its first pass. In one that is compiled as a whole, layers form their own.

    :param root: the model that is called; the batch calls `end` behind its pass
    """

    def __init__(self, batch: Computing, root: nn.Module):
        self._batch = batch
        self._sizes = [[place.shape[0] for place in module.target.places] for module in batch.modules]
        self._holders = [holder for module in batch.modules for holder in (module.shares or (module,))]
        self._is_asked: bool | None = None
        self._trained: list[Pair] | None = None  # of the step that is under way, which checkpoints ask for again
        self._taking_part: list[bool] | None = None  # modules in that step, after module dropout
        self._fixed: tuple[Any, list[Pair]] | None = None  # without history, and what they were formed of
        self._hook = root.register_forward_pre_hook(self._begin, with_kwargs=True)

    def __getstate__(self) -> dict[str, Any]:
        """For copies of an adapted model, between passes."""
        return self.__dict__ | {"_trained": None, "_fixed": None}

    def remove(self) -> None:
        """Leaves the modules to themselves."""
        self._hook.remove()
        self._hand(None)

    def forget(self) -> None:
        """Those without history: parameters may have changed."""
        self._fixed = None

    def start_step(self) -> None:
        """Forgets all."""
        if self._is_asked:
            self._trained = self._fixed = self._taking_part = None
            self._hand(None)

    def end(self) -> None:
        """Behind a pass. One without gradients may have come between a forward pass and its backward pass."""
        if self._trained is not None and not torch.is_grad_enabled():
            self._hand(self._trained)

    def _begin(self, root: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """A forward pre-hook."""
        if torch.compiler.is_compiling():
            return
        if self._is_asked is None:
            self._is_asked = _has_compiled(root)
        if not self._is_asked:
            return
        batch = self._batch
        if not batch.is_possible:
            self._trained = self._fixed = None
            self._hand(None)
            return
        dtype = self._dtype(args, kwargs)
        formed_of = None
        if not torch.is_grad_enabled() and not batch.modules[0].training:
            formed_of = dtype, batch.versions()
            if self._fixed is not None and self._fixed[0] == formed_of:
                self._hand(self._fixed[1])
                return
        if self._taking_part is None or not torch.is_grad_enabled():
            taking_part = [not module.is_left_out() for module in batch.modules]
            if torch.is_grad_enabled():
                self._taking_part = taking_part
        else:  # another pass of the step: checkpoints of the first one may ask for its factors again
            taking_part = self._taking_part
        parameters = [p for module in batch.modules for p in (module.P, module.R, module.g) if p is not None]
        outputs = iter(_Factors.apply(batch, self._sizes, dtype, taking_part, *parameters))
        given: list[Pair] = []
        for sizes in self._sizes:
            parts, down = [next(outputs) for _ in sizes], next(outputs)
            given += [(part, down) for part in parts]
        if torch.is_grad_enabled():
            self._trained = given
        elif formed_of is not None:
            self._fixed = formed_of, given
        self._hand(given)

    def _dtype(self, args: Any, kwargs: Mapping[str, Any]) -> torch.dtype:
        """In which the layers will compute, most likely: a layer that does not forms its own."""
        layer = self._batch.modules[0].target.places[0].layer
        device = self._batch.modules[0].P.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        given = (tensor for tensor in (*args, *kwargs.values()) if isinstance(tensor, Tensor))
        return next((tensor.dtype for tensor in given if tensor.is_floating_point()), layer.weight.dtype)

    def _hand(self, given: Sequence[Pair] | None) -> None:
        for i, holder in enumerate(self._holders):
            holder.__dict__["given"] = None if given is None else given[i]


class _Factors(torch.autograd.Function):
    """Inputs: the batch; the sizes of each module's layers' outputs; the compute dtype; which modules take part; and
    every module's P, R and g. Outputs: every module's up, a part for each layer, and its down, in the compute dtype,
    scaled by its gain."""

    @staticmethod
    def forward(
        ctx: Any,
        batch: Computing,
        sizes: list[list[int]],
        dtype: torch.dtype,
        taking_part: list[bool],
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.batch = weakref.ref(batch)  # which keeps the outputs, and those this
        ctx.sizes, ctx.dtype, ctx.taking_part, ctx.parameters = sizes, dtype, taking_part, parameters
        ctx.set_materialize_grads(False)
        factors, outputs, fixed = batch.compute(dtype), [], []
        for module, of_layers, takes_part in zip(batch.modules, sizes, taking_part, strict=True):
            found_later = factors[module].down is None
            up, down = factors[module].form(module, _weight(module, dtype) if found_later else None)
            if not takes_part:
                up = torch.zeros_like(up)
            found = [part.data for part in (*up.split(of_layers), down)]  # not as views, which graphs would look behind
            fixed += [] if module.P.requires_grad else found[:-1]
            outputs += found
        ctx.mark_non_differentiable(*fixed)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise DeftError("second derivatives (create_graph=True): not of a model with compiled blocks")
        batch: Computing = ctx.batch()
        collected: dict[DeftModule, list[Tensor]] = {}
        found = iter(grads)
        for module, sizes, takes_part in zip(batch.modules, ctx.sizes, ctx.taking_part, strict=True):
            parts, d_down = [next(found) for _ in sizes], next(found)
            if d_down is None and all(part is None for part in parts):  # the adapter was turned off, or is elsewhere
                continue
            if not takes_part or d_down is None:  # as if it had not been: up is 0
                parts, d_down = [None for _ in parts], module.P.new_zeros(module.rank, module.target.shape[1])
            collected[module] = [d_down.detach()]
            if module.P.requires_grad:
                collected[module].insert(0, _of_up(module, parts, sizes, d_down, ctx.dtype))
        gradients = batch.gradients(collected, {}, ctx.dtype)
        return None, None, None, None, *(gradients.get(parameter) for parameter in ctx.parameters)


@torch.no_grad()
def _of_up(
    module: DeftModule, parts: Sequence[Tensor | None], sizes: list[int], d_down: Tensor, dtype: torch.dtype
) -> Tensor:
    """The gradient of up (m, r), with what comes through -E^T W where something is removed."""
    whole = [d_down.new_zeros(size, module.rank) if part is None else part
             for part, size in zip(parts, sizes, strict=True)]  # fmt: skip
    d_up = whole[0] if len(whole) == 1 else torch.cat(whole)
    removal = module.config.removal
    if not removal:
        return d_up
    with without_autocast(d_up):
        alpha = -removal * module.gain(dtype) ** 2
        return torch.addmm(d_up, _weight(module, dtype).to(d_up.dtype), d_down.t(), alpha=alpha)


def _weight(module: DeftModule, dtype: torch.dtype) -> Tensor:
    """W (m, n), which block swap may have elsewhere."""
    return module.weight_in(dtype).to(module.P.device)


def _has_compiled(root: nn.Module) -> bool:
    """Whether `Module.compile` or `torch.compile` has been called for parts of a model."""
    return any(part._compiled_call_impl is not None or type(part).__name__ == "OptimizedModule"
               for part in root.modules() if part is not root)  # fmt: skip
