"""One adapted layer: its parameters, its forward pass, and merging into the base weight."""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import deft_math
from networks.deft_autograd import AdaptedLinear, Batch, Handover, adapted_linear
from networks.deft_config import DeftConfig, DeftError
from networks.deft_renewal import forget_moments
from networks.deft_targets import Layer, Target

logger = logging.getLogger(__name__)

OUTSIDE = 0.02  # of R's norm: so much may a file's rounding put into directions that its training stayed out of


def read_weight(layer: Layer, rows: tuple[int, int] | None = None, device: torch.device | None = None) -> Tensor:
    """The layer's weight as (outputs, inputs * kernel), detached, read where it is at this moment.

    :param rows: (first, behind last) of the outputs that are asked for
    :param device: where it is wanted, if not where it is
    :returns: in its own dtype, scaled fp8 in its scale's
    :raises DeftError: when the weight is on the meta device
    """
    if layer.weight.is_meta:
        raise DeftError(f"the weight of a {type(layer).__name__} layer is not loaded (meta device), but DEFT needs it")
    weight = rows_of(layer.weight.detach(), rows).flatten(1)
    weight = weight if device is None else weight.to(device)
    scale = getattr(layer, "scale_weight", None)
    return weight if scale is None else _dequantised(weight, scale, rows)


def _dequantised(weight: Tensor, scale: Tensor, rows: tuple[int, int] | None) -> Tensor:
    """The weight (m, n) of a scaled fp8 layer, as sd-scripts' library/fp8_optimization_utils.py (commit 48d368fa)
    reads it in the forward pass.

    :param scale: one number, one a row (m, 1), or one for each block of a row's inputs (m, blocks, 1)
    """
    if scale.dim() > 1 and scale.shape[0] > 1:
        scale = rows_of(scale, rows)
    scale, weight = scale.to(weight.device), weight.to(scale.dtype)
    if scale.dim() < 3:
        return weight * scale
    return (weight.unflatten(1, (scale.shape[1], -1)) * scale).flatten(1)


def rows_of(weight: Tensor, rows: tuple[int, int] | None) -> Tensor:
    """The rows (first, behind last) of a weight, or all."""
    return weight if rows is None else weight[slice(*rows)]


class DeftModule(nn.Module):
    """DEFT on one Linear or Conv2d layer, or on some of its outputs; it replaces the layer's `forward`.

    `P` and `R` are what the optimizer sees, `E0` is fixed, and None at `removal=0`; all are float32 whatever the
    network is cast to. The method's own matrices are `P * P_rate` and `R * R_rate` (`effective_P`, `effective_R`): the
    factors fit the optimizer's rate to the layer's shape without changing the model.

    :param target: the layer, neither it nor its weight becomes part of this module; and its name
    :param rank: r, at most min(m, n)
    :param scale: s = alpha / dim
    :param config: for everything else
    """

    E0: Tensor | None
    kept: Tensor | None

    def __init__(self, target: Target, multiplier: float, rank: int, scale: float, config: DeftConfig):
        super().__init__()
        self.target = target  # holds the layer without registering it as a submodule
        self.lora_name = target.name
        self.org_forward: Callable[[Tensor], Tensor] = target.layer.forward  # replaced in apply_to
        self.multiplier = multiplier
        self.enabled = True
        self._is_plain_linear = False
        self.batch: Batch | None = None  # which computes this layer's factors together with others'
        self.rank, self.scale, self.config = rank, scale, config
        m, n = target.shape
        self.P_size = deft_math.direction_size(m, n, scale, config.ratio)
        self.P_rate = 1.0
        self.R_rate = deft_math.injection_rate(m, n)
        if config.basis not in deft_math.ORTHONORMAL:  # P's size counts: the paper's 0.02, turned as fast as under qr
            self.P_rate = 0.02 * m**0.5 / self.P_size
            self.R_rate /= 0.02 * m**0.5
        self.R_factor = scale * self.R_rate
        # down is scale * R_rate times what the optimizer moves: too small for float16 unless up lends it some size
        self.float16_gain = 2.0 ** max(0, round(-math.log2(self.R_factor)))

        self.register_buffer("E0", torch.zeros(m, rank) if config.removal else None)
        self.register_buffer("kept", None, persistent=False)  # input directions (n, k) that R stays out of
        P = torch.randn(m, rank) / m**0.5
        if config.basis in deft_math.ORTHONORMAL:  # only the span counts: no column starts out near the others' span
            P = deft_math.positive_qr(P)[0]
        if config.init in ("svd", "minor"):
            directions = deft_math.leading_directions if config.init == "svd" else deft_math.minor_directions
            P = directions(read_weight(target.layer, target.rows).float(), rank).cpu()
        if config.basis == "nmf":  # the two positive matrices side by side
            P = torch.randn(m, 2 * rank).abs() / m**0.5
        if config.basis == "svd":
            P = deft_math.spread_columns(P)
        self.P = nn.Parameter(P * self.P_size, requires_grad=not config.freeze_basis)
        self.R: nn.Parameter | None = None if config.para else nn.Parameter(torch.zeros(rank, n))
        self.g: nn.Parameter | None = None
        if config.gate:
            self.g = nn.Parameter(torch.tensor(0.5))  # as the authors' deft/injection.py (commit 06805df)
        with torch.no_grad():
            if self.R is not None and config.init == "paper":
                self.R.normal_(std=0.02 * config.init_scale / self.R_rate)
            elif self.R is not None and self.E0 is not None:
                self.E0.copy_(self.left_and_eraser()[1])

    @property
    def org_module(self) -> Layer:
        """The adapted layer."""
        return self.target.layer

    # --- the method's matrices -------------------------------------------------------------------------------------

    @property
    def effective_P(self) -> Tensor:
        """P of the formula, (m, r), or (m, 2r) for `nmf`."""
        return self.P * self.P_rate

    @property
    def effective_R(self) -> Tensor | None:
        """R of the formula, (r, n), as the deviation from the start; None for PaRa."""
        if self.R is None:
            return None
        R = self.R * self.R_rate
        return R if self.kept is None else deft_math.outside(R, self.kept)

    @property
    def effective_scale(self) -> Tensor | float:
        """s, or s * sigmoid(g) with a gate."""
        return self.scale if self.g is None else self.scale * torch.sigmoid(self.g)

    def left_and_eraser(self) -> tuple[Tensor, Tensor]:
        """L and E at this moment, each (m, r) float32."""
        return deft_math.left_and_eraser(self.effective_P, self.config.basis)

    def base_weight(self) -> Tensor:
        """W as (m, n) in its own dtype, where P is; after `pre_calculate`, what it was before."""
        if not getattr(self.org_module, "_lora_restored", True):
            kept = rows_of(self.org_module.__dict__["_lora_org_weight"], self.target.rows)
            return kept.flatten(1).to(self.P.device)
        return read_weight(self.org_module, self.target.rows, self.P.device)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """`base_weight` in the dtype that the layer computes in."""
        weight = self.org_module.weight
        if weight.dtype == dtype and weight.dim() == 2 and self.target.rows is None:  # nothing to be done
            return weight
        return read_weight(self.org_module, self.target.rows, self.P.device).to(dtype)

    def gain(self, dtype: torch.dtype) -> float:
        """What a layer's update takes from up and gives to down when it computes in `dtype`."""
        return self.float16_gain if dtype == torch.float16 else 1.0

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """This layer as a LoRA of scale 1: up (m, r) and down (r, n), float32, differentiable."""
        with torch.autocast(self.P.device.type, enabled=False):
            return deft_math.lora_factors(
                self.effective_P,
                self.effective_R,
                self.E0,
                self.effective_scale,
                self.config.basis,
                self.base_weight,
                self.config.removal,
            )

    def load_lora(self, up: Tensor, down: Tensor) -> None:
        """Becomes the LoRA up (m, k) @ down (k, n), k <= rank, exactly.

        :raises DeftError: under PaRa, for an adapter that is not the removal of a subspace of this base weight
        """
        if self.config.basis == "nmf":
            raise DeftError(
                f"{self.lora_name}: basis=nmf is not continued from a plain LoRA, which does not hold both matrices; "
                f"go on from a file of save_format=deft, or with para=false basis=qr"
            )
        with torch.no_grad():
            scale = float(self.effective_scale)
        # in float64, which not every device has, so that reading and writing again and again does not drift
        seed = zlib.crc32(self.lora_name.encode())
        P, R = deft_math.from_lora(up.cpu().double(), down.cpu().double(), self.rank, scale, self.config.basis, seed)
        P, R = P.to(self.P), R.to(self.P)
        if self.config.para:
            removal = -deft_math.left_and_eraser(P, self.config.basis)[1].mT @ self.base_weight().float()
            if bool((R * self.scale - removal).norm() > 0.05 * removal.norm()):
                raise DeftError(
                    f"{self.lora_name}: the file is no PaRa of this base model and rank; use the base it was made "
                    f"on with --dim_from_weights, or para=false to go on as DEFT"
                )
        self.set_matrices(P * self.P_size if self.config.basis in deft_math.ORTHONORMAL else P, R, None)

    @torch.no_grad()
    def set_matrices(self, P: Tensor, R: Tensor | None, E0: Tensor | None) -> None:
        """Takes over the formula's P (m, r), R (r, n) and E0 (m, r).

        :param E0: None makes this P the start, to the last bit: what is off in E - E0 counts against all of W
        :raises DeftError: for an R that does not stay out of the directions to keep
        """
        if self.kept is not None and R is not None:
            inside = (R.to(self.kept) @ self.kept).norm() / R.norm().clamp(min=1e-30)
            if inside > OUTSIDE:
                raise DeftError(
                    f"{self.lora_name}: {float(inside):.0%} of the adapter lies in the directions of "
                    f"keep={self.config.keep}; go on without keep, or with the file it was trained with"
                )
        self.P.copy_(P / self.P_rate)
        if self.R is None or R is None:  # PaRa, whose E0 is always 0
            return
        self.R.copy_(R / self.R_rate)
        if self.E0 is not None:
            self.E0.copy_(self.left_and_eraser()[1] if E0 is None else E0)

    @torch.no_grad()
    def spread_removal(self) -> None:
        """After matrices of a file, where all of E - E0 is taken out: E0 such that `removal` of it is that much."""
        if self.E0 is not None and self.config.removal != 1:
            E = self.left_and_eraser()[1]
            self.E0.copy_(E - (E - self.E0) / self.config.removal)

    @torch.no_grad()
    def scale_delta(self, rho: float) -> None:
        """Makes the delta rho times as large, P untouched. PaRa has nothing to scale."""
        assert self.R is not None, "refused by the network before training"
        self.R.mul_(rho)
        if self.E0 is not None:
            self.E0.copy_(deft_math.scaled_start(self.left_and_eraser()[1], self.E0, rho))

    @torch.no_grad()
    def mend_basis(self) -> int:
        """Replaces columns of P that have come to depend on those before them, where gradients would explode: basis and
        delta stay, and the optimizer forgets what it has averaged of these columns.

        :returns: how many
        """
        replaced = deft_math.independent_columns(self.P)
        if replaced is None:
            return 0
        P, new = replaced
        self.P.copy_(P)
        forget_moments(self.P, new)
        return int(new.sum())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DeftModule:
        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_float32, recurse)

    # --- forward ---------------------------------------------------------------------------------------------------

    def apply_to(self) -> None:
        """Puts this module's forward in the place of the layer's."""
        self.org_forward = self.org_module.forward
        is_linear = getattr(self.org_forward, "__func__", None) is nn.Linear.forward
        self._is_plain_linear = is_linear and self.target.rows is None  # does nothing but W x + b
        self.org_module.__dict__["forward"] = self.forward

    def restore(self) -> None:
        """Gives the layer its own forward back."""
        self.org_module.__dict__["forward"] = self.org_forward

    def forward(self, x: Tensor) -> Tensor:
        """The layer's own output plus multiplier * up(down(x)); at multiplier 0 the layer's own output itself."""
        if not self.enabled or self.multiplier == 0:
            return self.org_forward(x)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        factors = None if self.batch is None else self.batch.enter(self, dtype)
        if self._skipped_by_dropout():
            return self.org_forward(x)
        layer, in_graph = self.org_module, torch.is_grad_enabled()
        if factors is None:
            up, down = self.lora_factors()
            gain = self.gain(dtype)
            up, down = (up / gain).to(dtype), (down * gain).to(dtype)
        if self._is_plain_linear and not self._has_inner_dropout and not torch.compiler.is_compiling():
            x, weight = x.to(dtype), self.weight_in(dtype)
            if factors is not None:
                up, down = factors.form(self, weight)
            if not in_graph:
                return adapted_linear(x, up, down, weight, layer.bias, self.multiplier)[0]
            if factors is None:
                return AdaptedLinear.apply(x, self, weight, self.multiplier, None, up, down)
            return AdaptedLinear.apply(x, self, weight, self.multiplier, factors, None, None, *factors.trained)
        if factors is not None:
            up, down = factors.form(self, None)
            if in_graph and factors.is_trained:
                up, down = Handover.apply(factors, self, *factors.trained)
        if isinstance(layer, nn.Conv2d):
            kernel = down.unflatten(1, layer.weight.shape[1:])
            z = F.conv2d(x, kernel, None, layer.stride, layer.padding, layer.dilation)
            update = F.conv2d(self._dropout(z, rank_dim=1), up[:, :, None, None])
        else:
            update = F.linear(self._dropout(F.linear(x, down), rank_dim=-1), up)
            if self.target.rows is not None:
                first, end = self.target.rows
                update = F.pad(update, (first, layer.weight.shape[0] - end))
        return self.org_forward(x) + update * self.multiplier

    @property
    def _has_inner_dropout(self) -> bool:
        """Whether something happens between down and up."""
        return self.training and (self.config.neuron_dropout > 0 or self.config.rank_dropout > 0)

    def _skipped_by_dropout(self) -> bool:
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

    # --- merging ---------------------------------------------------------------------------------------------------

    def pre_calculate(self) -> None:
        """Adds the delta to the layer's own weight, which `backup` has kept, and steps aside."""
        with torch.no_grad():
            up, down = self.lora_factors()
        add_to_weight(self.target, up, down, self.multiplier)
        self.org_module.__dict__["_lora_restored"] = False
        self.enabled = False

    def backup(self) -> None:
        """Keeps a copy of the layer's weight on the layer, under the attribute names of sd-scripts' networks."""
        if not hasattr(self.org_module, "_lora_org_weight"):
            self.org_module.__dict__.update(
                _lora_org_weight=self.org_module.weight.detach().clone(), _lora_restored=True
            )

    def restore_weight(self) -> None:
        """Copies the kept weight back, if it was changed."""
        kept = self.org_module.__dict__
        if not kept["_lora_restored"]:
            self.org_module.weight.data.copy_(kept["_lora_org_weight"])
            kept["_lora_restored"] = True


@torch.no_grad()
def add_to_weight(target: Target, up: Tensor, down: Tensor, multiplier: float) -> None:
    """W += multiplier * up @ down, computed in float32 on the weight's device and cast once to its dtype.

    :raises DeftError: for a scaled fp8 weight, which would have to be scaled anew
    """
    if hasattr(target.layer, "scale_weight"):
        raise DeftError(f"{target.name}: cannot be merged into a scaled fp8 weight; merge into the bf16 file first")
    weight = rows_of(target.layer.weight.data, target.rows)
    up, down = up.to(weight.device, torch.float32), down.to(weight.device, torch.float32)
    merged = read_weight(target.layer, target.rows).float() + multiplier * (up @ down)
    weight.copy_(merged.view_as(weight))
