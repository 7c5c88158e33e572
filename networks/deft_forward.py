"""The forward pass of one adapted layer, which takes the place of the layer's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.deft_autograd import AdaptedLinear, Batch, FrozenLayer, Handover, adapted_linear
from networks.deft_config import DeftConfig
from networks.deft_targets import Layer, Target, weight_shape
from networks.deft_weights import is_quantised


class AdaptedForward:
    """What a module and its shares have in common: `forward`, put into a layer and taken out again."""

    P: nn.Parameter
    R: nn.Parameter | None
    g: nn.Parameter | None
    target: Target
    config: DeftConfig
    batch: Batch | None
    multiplier: float
    enabled: bool
    training: bool
    org_forward: Callable[[Tensor], Tensor]
    _is_plain_linear = False
    given: tuple[Tensor, Tensor] | None = None  # up and down for this pass, formed before it; see `deft_compiled`

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which are given their own."""
        return self.__dict__ | {"given": None}

    @property
    def org_module(self) -> Layer:
        """The adapted layer."""
        return self.target.layer

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """This layer as a LoRA of scale 1: up (m, r) and down (r, n), float32, differentiable."""
        raise NotImplementedError

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """W (m, n) in the dtype that the layer computes in."""
        raise NotImplementedError

    def gain(self, dtype: torch.dtype) -> float:
        """What a layer's update takes from up and gives to down when it computes in `dtype`."""
        raise NotImplementedError

    def apply_to(self) -> None:
        """Puts this forward in the place of the layer's."""
        self.org_forward = self.org_module.forward
        is_linear = getattr(self.org_forward, "__func__", None) is nn.Linear.forward
        self._is_plain_linear = is_linear and self.target.rows is None  # does nothing but W x + b
        self.org_module.__dict__["forward"] = self.forward

    def restore(self) -> None:
        """Gives the layer its own forward back, or what stands before it in line what stands behind."""
        layer = self.org_module.__dict__
        before = getattr(layer.get("forward"), "__self__", None)
        while isinstance(before, AdaptedForward) and before is not self:
            if getattr(before.org_forward, "__self__", None) is self:
                before.org_forward = self.org_forward
                return
            before = getattr(before.org_forward, "__self__", None)
        layer["forward"] = self.org_forward

    def forward(self, x: Tensor) -> Tensor:
        """The layer's own output plus multiplier * up(down(x)); at multiplier 0 the layer's own output itself."""
        if not self.enabled or self.multiplier == 0:
            return self._own_output(x)
        dtype = _compute_dtype(x)
        given = self.given if self.given is None or self.given[0].dtype == dtype else None
        factors = None if given is not None or self.batch is None else self.batch.enter(self, dtype)
        if given is None and self.is_left_out():
            return self._own_output(x)
        layer, in_graph = self.org_module, torch.is_grad_enabled()
        if given is not None:
            up, down = given
        elif factors is None:
            up, down = self.lora_factors()
            gain = self.gain(dtype)
            up, down = (up / gain).to(dtype), (down * gain).to(dtype)
        fused = self._is_plain_linear and not is_quantised(layer) and not self._has_inner_dropout
        if fused and (given is not None or not torch.compiler.is_compiling()):
            x, weight = x.to(dtype), self.weight_in(dtype)
            if factors is not None:
                up, down = factors.form(self, weight)
            if not in_graph or torch.compiler.is_compiling():
                return adapted_linear(x, up, down, weight, layer.bias, self.multiplier)[0]
            if factors is None:
                return AdaptedLinear.apply(x, self, weight, self.multiplier, None, up, down)
            return AdaptedLinear.apply(x, self, weight, self.multiplier, factors, None, None, *factors.trained)
        if factors is not None:
            up, down = factors.form(self, None)
            if in_graph and factors.is_trained:
                up, down = Handover.apply(factors, self, *factors.trained)
        if isinstance(layer, nn.Conv2d):
            kernel = down.unflatten(1, weight_shape(layer)[1:])
            z = F.conv2d(x, kernel, None, layer.stride, layer.padding, layer.dilation)
            update = F.conv2d(self._dropout(z, rank_dim=1), up[:, :, None, None])
        else:
            update = F.linear(self._dropout(F.linear(x, down), rank_dim=-1), up)
            if self.target.rows is not None:
                first, end = self.target.rows
                update = F.pad(update, (first, layer.out_features - end))
        return self._own_output(x) + update * self.multiplier

    def _own_output(self, x: Tensor) -> Tensor:
        """The layer's own. That of a quantised one, which may not know of autocast, in the dtype of its neighbours, and
        with no more to keep for the backward pass."""
        last_in_line = not isinstance(getattr(self.org_forward, "__self__", None), AdaptedForward)
        if not last_in_line or not isinstance(self.org_module, nn.Linear) or not is_quantised(self.org_module):
            return self.org_forward(x)
        x = x.to(_compute_dtype(x))
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.org_forward(x)
        return FrozenLayer.apply(x, self.org_forward, self.org_module)

    @property
    def _has_inner_dropout(self) -> bool:
        """Whether something happens between down and up."""
        return self.training and (self.config.neuron_dropout > 0 or self.config.rank_dropout > 0)

    def is_left_out(self) -> bool:
        """Whether module dropout leaves this layer out, drawn anew."""
        p = self.config.module_dropout
        return self.training and p > 0 and torch.rand(()).item() < p

    def _dropout(self, z: Tensor, rank_dim: int) -> Tensor:
        """Neuron dropout and rank dropout of the r values between down and up, as sd-scripts' networks.lora does."""
        if not self.training:
            return z
        if self.config.neuron_dropout > 0:
            z = F.dropout(z, self.config.neuron_dropout)
        if self.config.rank_dropout > 0:
            shape = [1] * z.dim()
            shape[0], shape[rank_dim] = z.shape[0], z.shape[rank_dim]
            kept = torch.rand(shape, device=z.device) >= self.config.rank_dropout
            z = z * kept / (1 - self.config.rank_dropout)
        return z


def _compute_dtype(x: Tensor) -> torch.dtype:
    """In which a layer computes that is given x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
