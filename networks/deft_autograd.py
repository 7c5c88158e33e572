"""How gradients pass one adapted layer: its factors for a pass, and the derivatives of what it does with them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from networks.deft_config import DeftConfig
from networks.deft_targets import Layer, weight_shape
from networks.deft_weights import read_weight


class Batch(Protocol):
    """What an adapted layer asks of the class that computes many layers' factors together; see `deft_batch`."""

    def enter(self, module: Any, dtype: torch.dtype) -> LayerFactors | None: ...

    def receive(
        self, module: Any, factors: LayerFactors, d_up: Tensor, d_down: Tensor, weight: Tensor | None
    ) -> tuple[Tensor | None, ...]: ...


class AdaptedLayer(Protocol):
    """What is asked of an adapted layer here; see `deft_module`."""

    P: nn.Parameter
    R: nn.Parameter | None
    g: nn.Parameter | None
    config: DeftConfig
    batch: Batch | None

    @property
    def org_module(self) -> Layer: ...

    def weight_in(self, dtype: torch.dtype) -> Tensor: ...


class LayerFactors:
    """One layer's factors for one pass.

    `up` (m, r) and `down` (r, n) are in the compute dtype, without history, and scaled by `gain`. Where something is
    removed, `change` is (E - E0) in the compute dtype until `down` is formed, and `finish` makes `down` of
    (E - E0)^T W (r, n). `trained` holds P, R, g and the batch's probe, which the layer's graph ends in. `whole` forms
    `down` for one of several layers that have it together.
    """

    __slots__ = ("change", "down", "entered", "finish", "gain", "is_trained", "removes", "trained", "up", "whole")

    def __init__(
        self,
        module: AdaptedLayer,
        up: Tensor,
        change: Tensor | None,
        finish: Callable[[Tensor], Tensor],
        gain: float,
        probe: Tensor,
    ) -> None:
        self.up, self.gain, self.finish = up, gain, finish
        self.change: Any = change  # None when `down` is there
        self.down: Any = None
        self.entered = False
        self.whole: Callable[[], Tensor] | None = None
        self.trained = (module.P, module.R, module.g, probe)
        self.removes = module.P.requires_grad and module.config.removal > 0
        self.is_trained = any(p is not None and p.requires_grad for p in self.trained[:3])

    def share(self, module: AdaptedLayer, rows: slice) -> LayerFactors:
        """Those of one of several layers that `module` adapts together: some rows of up, and down, formed once."""
        share = copy.copy(self)
        share.up, share.change, share.entered = self.up[rows], None, False
        share.whole = lambda: self.form(module, None)[1]
        return share

    def form(self, module: AdaptedLayer, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """up and down, which is formed now where it was not with the other layers'.

        :param weight: W (m, n) in the compute dtype, if it is at hand
        """
        if self.down is None and self.whole is not None:
            self.down = self.whole()
        if self.down is None:
            with torch.inference_mode(False), torch.no_grad(), without_autocast(self.up):
                weight = module.weight_in(self.up.dtype) if weight is None else weight
                self.down, self.change = self.finish(torch.mm(self.change.t(), weight)), None
        return self.up, self.down


class Handover(torch.autograd.Function):
    """up and down without history on their way into a layer's own operations, and their gradients on their way back.

    Inputs: the layer's factors, its module, and P, R, g and the probe. Outputs: up and down.
    """

    @staticmethod
    def forward(ctx: Any, factors: LayerFactors, module: AdaptedLayer, *trained: Tensor) -> tuple[Tensor, Tensor]:
        ctx.factors, ctx.module = factors, module
        return factors.up.detach(), factors.down.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (d_up, d_down), module = grads, ctx.module
        with without_autocast(d_up):
            weight = None
            if ctx.factors.removes:
                weight, d_up = module.weight_in(d_down.dtype), d_up.clone()
            return None, None, *module.batch.receive(module, ctx.factors, d_up, d_down, weight), None


def adapted_linear(
    x: Tensor, up: Tensor, down: Tensor, weight: Tensor, bias: Tensor | None, multiplier: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y = W x + b + multiplier * up (down x), the sum within the last product.

    :param x: (..., n), of the dtype of W (m, n), up (m, r) and down (r, n)
    :returns: y (..., m); x as a matrix (k, n); and multiplier * down x as one (k, r)
    """
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    z = torch.mm(flat, down.t())
    if multiplier != 1:
        z *= multiplier
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    y = F.linear(flat, weight, bias).addmm_(z, up.t())
    if x.dim() != 2:  # no view, since a model may change what it gets in place
        y = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])
    return y, flat, z


class AdaptedLinear(torch.autograd.Function):
    """`adapted_linear` with its derivative: x is kept for the backward pass, as a LoRA keeps it, and W read anew.

    Inputs: x; the module; W; the multiplier; then either the module's factors for this pass, None, None, P, R, g and
    the batch's probe; or None, up and down.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        module: AdaptedLayer,
        weight: Tensor,
        multiplier: float,
        factors: LayerFactors | None,
        up: Tensor,
        down: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        ctx.module, ctx.multiplier, ctx.factors, ctx.shape = module, multiplier, factors, x.shape
        if factors is not None:
            up, down = factors.up, factors.down
        y, flat, z = adapted_linear(x, up, down, weight, module.org_module.bias, multiplier)
        ctx.save_for_backward(flat, z, *(() if factors is not None else (up, down)))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, z, *own = ctx.saved_tensors
        module, factors, multiplier = ctx.module, ctx.factors, ctx.multiplier
        up, down = own if factors is None else (factors.up, factors.down)
        g = grads[0]
        if g.dim() != 2:
            g = g.reshape(-1, g.shape[-1])
        in_graph = torch.is_grad_enabled()
        with without_autocast(x):
            weight = module.weight_in(g.dtype)
            gz = torch.mm(g, up)
            if multiplier != 1:
                gz = gz * multiplier
            dx = None
            if ctx.needs_input_grad[0]:
                dx = torch.mm(gz, down)  # first: the large product then hides the reading of this one
                dx = (torch.addmm(dx, g, weight) if in_graph else dx.addmm_(g, weight)).view(ctx.shape)
            if factors is not None:
                found: tuple[Tensor | None, ...] = (None, None, None)
                if factors.is_trained:
                    d_up, d_down = torch.mm(g.t(), z), torch.mm(gz.t(), x)
                    found = module.batch.receive(module, factors, d_up, d_down, weight if factors.removes else None)
                return dx, None, None, None, None, None, None, *found, None
            if in_graph:  # second derivatives go through z
                z = x @ down.t() * multiplier
            return dx, None, None, None, None, g.t() @ z, gz.t() @ x


class FrozenLayer(torch.autograd.Function):
    """A frozen layer's own forward pass, and dx, for which W is read anew: as it is kept, it may be smaller than what
    the forward pass computes with, which would be kept in between (torchao 0.18, a cast layer by layer).

    Inputs: x, (..., n), or (b, n, h, w) of a convolution that pads with zeros; the layer's forward; and the layer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, own: Callable[[Tensor], Tensor], layer: Layer) -> Tensor:
        ctx.layer, ctx.dtype, ctx.shape = layer, x.dtype, x.shape
        return own(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g, layer = grads[0], ctx.layer
        if not ctx.needs_input_grad[0]:
            return None, None, None
        with without_autocast(g):
            weight = read_weight(layer, device=g.device).to(g.dtype)
            if isinstance(layer, nn.Conv2d):
                kernel = weight.view(weight_shape(layer))
                sizes = layer.stride, layer.padding, layer.dilation, layer.groups
                dx = conv2d_input(ctx.shape, kernel, g, *sizes)
            else:
                dx = g @ weight
            return dx.to(ctx.dtype), None, None


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A backward pass that is called within autocast would compute in its dtype."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()
