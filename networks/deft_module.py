"""One adapted layer: its parameters, its forward pass, and merging into the base weight."""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor, nn

from networks import deft_factors, deft_math, deft_weights
from networks.deft_autograd import Batch
from networks.deft_config import DeftConfig, DeftError
from networks.deft_forward import AdaptedForward
from networks.deft_renewal import forget_moments
from networks.deft_targets import Target
from networks.deft_weights import add_to_weight, check_readable, is_quantised, read_weight

logger = logging.getLogger(__name__)

OUTSIDE = 0.02  # of R's norm: so much may a file's rounding put into directions that its training stayed out of


class DeftModule(AdaptedForward, nn.Module):
    """DEFT on one Linear or Conv2d layer, on some of its outputs, or on several layers' outputs together, as if they
    were one; it replaces the layer's `forward`, or each layer's by that of one of its `shares`.

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
        check_readable(target)
        self.target = target  # holds the layer without registering it as a submodule
        self.lora_name = target.name
        self.shares = _shares(self)
        self.org_forward: Callable[[Tensor], Tensor] = target.layer.forward  # replaced in apply_to
        self.multiplier = multiplier
        self.enabled = True
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
            P = directions(deft_weights.base_weight(target).float(), rank).cpu()
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
        return deft_weights.base_weight(self.target, self.P.device)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """`base_weight` in the dtype that the layer computes in."""
        if self.shares:
            return torch.cat([share.weight_in(dtype) for share in self.shares])
        weight = self.org_module.weight
        plain = weight.dim() == 2 and self.target.rows is None and not is_quantised(self.org_module)
        if weight.dtype == dtype and plain:  # nothing to be done
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
    def delta_norm(self) -> Tensor:
        """The Frobenius norm of the delta, (), float32; of Q times something, that of the something."""
        R = self.effective_R
        if R is not None and self.E0 is None and self.config.basis in deft_math.ORTHONORMAL:
            return (self.effective_scale * R).norm()
        return deft_factors.norm(*self.lora_factors())

    @torch.no_grad()
    def scale_delta(self, rho: Tensor | float) -> None:
        """Makes the delta rho, a (), times as large, P untouched. PaRa has nothing to scale."""
        assert self.R is not None, "refused by the network before training"
        self.R.mul_(rho)
        if self.E0 is not None and bool(rho != 1):
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

    # --- in a model ------------------------------------------------------------------------------------------------

    def apply_to(self) -> None:
        """Puts this module's forward, or those of its shares, in the place of the layer's."""
        if not self.shares:
            super().apply_to()
        for share in self.shares:
            share.apply_to()

    def restore(self) -> None:
        """Gives the layer, or each, its own forward back."""
        if not self.shares:
            super().restore()
        for share in self.shares:
            share.restore()

    # --- merging ---------------------------------------------------------------------------------------------------

    def pre_calculate(self) -> None:
        """Adds the delta to the layer's own weight, which `backup` has kept, and steps aside."""
        with torch.no_grad():
            up, down = self.lora_factors()
        add_to_weight(self.target, up, down, self.multiplier)
        for place in self.target.places:
            place.layer.__dict__["_lora_restored"] = False
        self.enabled = False

    def backup(self) -> None:
        """See `deft_weights.backup`."""
        deft_weights.backup(self.target)

    def restore_weight(self) -> None:
        """See `deft_weights.restore`."""
        deft_weights.restore(self.target)


class Share(AdaptedForward):
    """One of several layers that a module adapts together: some rows of its up, and all of its down.

    :param module: whose `target` has several `places`
    :param target: the one of them that this is
    :param first: its first row in the module's P
    """

    def __init__(self, module: DeftModule, target: Target, first: int) -> None:
        self.module, self.target = module, target
        self.rows = slice(first, first + target.shape[0])
        self.org_forward = target.layer.forward
        self._is_plain_linear = False

    @property
    def P(self) -> nn.Parameter:  # type: ignore[override]
        """The module's, and so is what follows."""
        return self.module.P

    @property
    def R(self) -> nn.Parameter | None:  # type: ignore[override]
        return self.module.R

    @property
    def g(self) -> nn.Parameter | None:  # type: ignore[override]
        return self.module.g

    @property
    def config(self) -> DeftConfig:  # type: ignore[override]
        return self.module.config

    @property
    def batch(self) -> Batch | None:  # type: ignore[override]
        return self.module.batch

    @property
    def multiplier(self) -> float:  # type: ignore[override]
        return self.module.multiplier

    @property
    def enabled(self) -> bool:  # type: ignore[override]
        return self.module.enabled

    @property
    def training(self) -> bool:  # type: ignore[override]
        return self.module.training

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """See `AdaptedForward`; all of the module's factors are formed for it."""
        up, down = self.module.lora_factors()
        return up[self.rows], down

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """See `AdaptedForward`; of this layer."""
        return read_weight(self.org_module, self.target.rows, self.module.P.device).to(dtype)

    def gain(self, dtype: torch.dtype) -> float:
        """See `AdaptedForward`."""
        return self.module.gain(dtype)


def _shares(module: DeftModule) -> tuple[Share, ...]:
    """Of a module on several layers; none where it is on one."""
    places = module.target.places
    ends = list(accumulate(place.shape[0] for place in places))
    return tuple(Share(module, place, end - place.shape[0]) for place, end in zip(places, ends, strict=True)
                 if len(places) > 1)  # fmt: skip
