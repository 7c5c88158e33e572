"""Algebra on a LoRA's factors: a change of a weight as up (m, r) @ down (r, n), whose product is never formed.

What is exact here is exact up to rounding in the factors' own dtype. With thin QR decompositions up = Q_1 T_1 and
down^T = Q_2 T_2, everything about the product is in the r x r matrix T_1 T_2^T: its singular values are the product's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from networks import deft_math


@dataclass(frozen=True)
class Factors:
    """A change of one weight: up (m, r) @ down (r, n), of scale 1.

    :param kernel: the weight's shape behind its m outputs: (in,), or (in, kh, kw) of a convolution; n is its product
    """

    up: Tensor
    down: Tensor
    kernel: tuple[int, ...]

    @property
    def rank(self) -> int:
        """r, padding and dependent directions included."""
        return self.up.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's."""
        return (self.up.shape[0], *self.kernel)

    def scaled(self, strength: float) -> Factors:
        """The change times a number."""
        return Factors(self.up, self.down * strength, self.kernel)

    def double(self) -> Factors:
        """In float64."""
        return replace(self, up=self.up.double(), down=self.down.double())

    def delta(self) -> Tensor:
        """The product (m, n)."""
        return self.up @ self.down


def concatenated(parts: Sequence[Factors]) -> Factors:
    """The exact sum of changes of one weight; its rank is the sum of theirs.

    :raises ValueError: when they are of weights of different shapes
    """
    if len({part.shape for part in parts}) != 1:
        raise ValueError(f"changes of weights of {' and '.join(str(part.shape) for part in parts)} cannot be added")
    up = torch.cat([part.up for part in parts], 1)
    return Factors(up, torch.cat([part.down for part in parts]), parts[0].kernel)


def stacked(parts: Sequence[tuple[Factors, int]], total: int) -> Factors:
    """Changes of some outputs of a weight each, as one change of it, exactly; its rank is the sum of theirs.

    :param parts: a change, and the first of its outputs in the whole weight
    :param total: outputs of the whole weight
    """
    blocks = [
        torch.nn.functional.pad(part.up, (0, 0, first, total - first - part.up.shape[0])) for part, first in parts
    ]
    return Factors(torch.cat(blocks, 1), torch.cat([part.down for part, _ in parts]), parts[0][0].kernel)


def shared(factors: Factors) -> Factors:
    """The same product with each row of down only once: pieces of one weight, stacked, have its rank again."""
    first: dict[bytes, int] = {}
    at = [first.setdefault(row.numpy().tobytes(), len(first)) for row in factors.down.detach().cpu()]
    if len(first) == len(at):
        return factors
    up = factors.up.new_zeros(factors.up.shape[0], len(first))
    up.index_add_(1, torch.tensor(at, device=up.device), factors.up)
    return replace(factors, up=up, down=factors.down[[at.index(k) for k in range(len(first))]])


def rows_of(whole: Factors, first: int, number: int) -> Factors:
    """The change of some outputs, exactly: those rows of up, and of the rank what they use (all of it if nothing)."""
    up = whole.up[first : first + number]
    used = _any_in(up, 0)
    if not used.any():
        used[:] = True
    return Factors(up[:, used], whole.down[used], whole.kernel)


def _any_in(tensor: Tensor, dim: int) -> Tensor:
    """(tensor != 0).any(dim), in a fifth of its time."""
    return tensor.abs().amax(dim) != 0 if tensor.numel() else (tensor != 0).any(dim)


def is_finite(tensor: Tensor) -> bool:
    """torch.isfinite(tensor).all(), in a twentieth of its time; of any dtype."""
    wide = tensor if tensor.element_size() > 1 else tensor.float()
    if not wide.is_floating_point() or not wide.numel():
        return bool(torch.isfinite(wide).all())
    return all(math.isfinite(float(value)) for value in wide.aminmax())


def stripped(factors: Factors) -> Factors:
    """Without padding: the indices whose column of up and row of down are both zero."""
    used = _any_in(factors.up, 0) | _any_in(factors.down, 1)
    if used.all():
        return factors
    return replace(factors, up=factors.up[:, used], down=factors.down[used])


def padded(factors: Factors, rank: int) -> Factors:
    """With zero columns of up and rows of down up to a rank: the same product."""
    missing = rank - factors.rank
    up = torch.nn.functional.pad(factors.up, (0, missing))
    return replace(factors, up=up, down=torch.nn.functional.pad(factors.down, (0, 0, 0, missing)))


def norm(up: Tensor, down: Tensor) -> Tensor:
    """||up @ down||_F, differentiable."""
    return ((up.mT @ up @ down) * down).sum().clamp(min=0).sqrt()


def frobenius(D: Tensor) -> float:
    """||D||_F of a tensor of any shape: rows in its own dtype, together in float64, which is as precise as all of it in
    float64, and ten times as fast."""
    rows = torch.linalg.vector_norm(D.flatten(1) if D.dim() > 1 else D.reshape(1, -1), dim=1)
    return float(torch.linalg.vector_norm(rows, dtype=torch.float64))


@dataclass(frozen=True)
class Decomposed:
    """The thin SVD of a product: left (m, k) diag(values) right (k, n), values (k,) falling, k = min(m, r, n)."""

    left: Tensor
    values: Tensor
    right: Tensor
    kernel: tuple[int, ...]

    def leading_inputs(self, energy: float, most: int | None = None) -> Tensor:
        """Orthonormal input directions (n, k), those of the largest singular values, with a share of the squared norm;
        none where the product is zero.

        :param energy: the share; at 1, of all values that are not rounding
        :param most: k at most
        """
        k = rank_of_energy(self.values, energy) if self.values.any() else 0
        return self.right[: k if most is None else min(k, most)].mT

    def truncated(self, rank: int) -> tuple[Factors, float]:
        """The best approximation of a lower rank, in two factors of equal size, and its relative Frobenius error."""
        root = self.values[:rank].sqrt()
        whole = self.values.norm()
        error = float(self.values[rank:].norm() / whole) if whole > 0 else 0.0
        return Factors(self.left[:, :rank] * root, root[:, None] * self.right[:rank], self.kernel), error


def decomposed(factors: Factors) -> Decomposed:
    """The singular value decomposition of the product, by QR of both factors and an SVD of r x r.

    :raises ValueError: when the product is not finite
    """
    Q_up, T_up = torch.linalg.qr(factors.up)
    Q_down, T_down = torch.linalg.qr(factors.down.mT)
    U, S, Vh = torch.linalg.svd(_finite(T_up @ T_down.mT), full_matrices=False)
    return Decomposed(Q_up @ U, S, Vh @ Q_down.mT, factors.kernel)


def truncated(factors: Factors, rank: int) -> tuple[Factors, float]:
    """The best approximation of a lower rank, and its relative Frobenius error."""
    return decomposed(factors).truncated(rank)


def spectrum(factors: Factors) -> Tensor:
    """The singular values of the product, falling, without its singular vectors.

    :raises ValueError: when the product is not finite
    """
    T_up = torch.linalg.qr(factors.up, mode="r")[1]
    T_down = torch.linalg.qr(factors.down.mT, mode="r")[1]
    return torch.linalg.svdvals(_finite(T_up @ T_down.mT))


def _finite(core: Tensor) -> Tensor:
    """:raises ValueError: for factors that are finite themselves, and too large to be multiplied"""
    if not bool(core.isfinite().all()):
        raise ValueError("its values are not finite, or too large to be multiplied")
    return core


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """Of the principal angles between the column spaces of orthonormal (n, j) and (n, k): (min(j, k),), falling."""
    return torch.linalg.svdvals(first.mT @ second).clamp(max=1.0)


def outside(factors: Factors, U: Tensor) -> Factors:
    """The change of those inputs that are orthogonal to U (n, k), U^T U = I: up @ down (I - U U^T)."""
    return replace(factors, down=deft_math.outside(factors.down, U))


def balancing_exponent(up: Tensor, down: Tensor) -> int:
    """k such that up * 2^-k and down * 2^k are about equally large: half precision then loses least, and exactly."""
    sizes = [float(t.abs().max()) for t in (up, down)]
    if min(sizes) == 0 or not all(map(math.isfinite, sizes)):
        return 0
    return round((math.log2(sizes[0]) - math.log2(sizes[1])) / 2)


DYNAMIC = ("sv_ratio", "sv_fro", "sv_cumulative")


def dynamic_rank(values: Tensor, method: str, target: float) -> int:
    """A rank by the singular values, as `--dynamic_method` of sd-scripts' networks/resize_lora.py (commit 48d368fa)
    has it: one more than the rule needs, at least 2; 1 for a change that is zero.

    :param values: falling, (k,)
    :param method: sv_ratio: values above the largest / target; sv_cumulative: a share of their sum; sv_fro: a share of
        the Frobenius norm
    :returns: at most k
    """
    S = values.double()
    if not float(S[0]) > 0:
        return 1
    if method == "sv_ratio":
        needed = int((S > S[0] / target).sum())
    elif method == "sv_cumulative":
        needed = _share_reached(S, target)
    else:
        needed = _share_reached(S.square(), target**2)
    return min(max(needed, 1) + 1, len(S))


def rank_of_energy(values: Tensor, energy: float, whole: float | None = None) -> int:
    """The lowest rank that keeps a share of the squared Frobenius norm; one more than there are if none does.

    :param values: singular values, falling, (k,)
    :param whole: the squared norm, where the values are not all there are
    """
    squares = values.double().square()
    return _share_reached(squares, energy, whole)


def _share_reached(sizes: Tensor, share: float, whole: float | None = None) -> int:
    """How many of them make up a share of their sum, or of `whole`."""
    whole = float(sizes.sum()) if whole is None else whole
    reached = sizes.cumsum(0) >= share * whole * (1 - 1e-12)  # a share of 1 in spite of rounding
    return int((~reached).sum()) + 1


OVERSAMPLING = 16  # directions of a sketch beyond the rank asked for
TOLERANCE = 1e-3  # of the error, relative: an improvement that is not worth another power iteration
ROUNDING = 1e-6  # an error that no iteration improves
NEGLIGIBLE = 1e-7  # of the largest singular value: rounding in float32
MOST_ITERATIONS = 32  # never seen to be needed: where singular values hardly fall, the error hardly does either


def approximated(
    D: Tensor, kernel: tuple[int, ...], rank: int | None, energy: float | None = None
) -> tuple[Factors, float]:
    """Two factors near a dense change, and the relative Frobenius error of their product, as measured.

    By a randomised range finder (Halko, Martinsson and Tropp, arXiv 0909.4061) with power iterations until the error
    does not improve by more than `TOLERANCE`; where that saves nothing, by an exact decomposition.

    :param D: (m, n), float32 or float64, on any device
    :param kernel: the weight's shape behind its m outputs
    :param rank: wanted, or with `energy` the most; None without a limit
    :param energy: the share of ||D||^2 to keep, in as few directions as that takes
    :raises ValueError: when D is not finite
    """
    whole = frobenius(D)
    if not math.isfinite(whole):
        raise ValueError("non-finite values")
    most = min(D.shape) if rank is None else min(rank, *D.shape)
    width = most if energy in (None, 1) else min(most, OVERSAMPLING)
    while True:
        found = _leading(D, width, whole)
        if energy == 1:  # sums of squares are not precise enough to tell
            needed = max(1, int((found.values > NEGLIGIBLE * found.values[0]).sum()))
        else:
            needed = width if energy is None else rank_of_energy(found.values, energy, whole**2)
        if needed <= width or len(found.values) >= most:
            break
        width = min(most, 2 * width)
    rank = min(needed, most)
    return replace(found.truncated(rank)[0], kernel=kernel), _error(D, _first(found, rank), whole)


def _leading(D: Tensor, width: int, whole: float) -> Decomposed:
    """The leading `width` singular values and vectors, or all that there are."""
    m, n = D.shape
    if 3 * (width + OVERSAMPLING) >= min(m, n):
        U, S, Vh = torch.linalg.svd(D, full_matrices=False)
        return Decomposed(U, S, Vh, (n,))
    sketch = torch.randn(n, width + OVERSAMPLING, generator=torch.Generator().manual_seed(0), dtype=D.dtype)
    Q = torch.linalg.qr(D @ sketch.to(D.device))[0]
    before = math.inf
    for _ in range(MOST_ITERATIONS):
        Q_in, T = torch.linalg.qr(D.mT @ Q)  # Q^T D = T^T Q_in^T: of it the decomposition, and the next iteration
        U, S, Vh = torch.linalg.svd(T.mT)
        found = _first(Decomposed(Q @ U, S, Vh @ Q_in.mT, (n,)), width)
        error = _error(D, found, whole)
        if error < ROUNDING or before - error <= TOLERANCE * error:
            break
        before = error
        Q = torch.linalg.qr(D @ Q_in)[0]
    return found


def _first(found: Decomposed, rank: int) -> Decomposed:
    return replace(found, left=found.left[:, :rank], values=found.values[:rank], right=found.right[:rank])


def _error(D: Tensor, found: Decomposed, whole: float) -> float:
    """||D - left values right|| / ||D||, which is known without the product, since left is orthonormal and values right
    is left^T D: ||D||^2 - ||values||^2. Where that would be rounding alone, by the product."""
    if whole == 0:
        return 0.0
    share = float(found.values.double().square().sum()) / whole**2
    if share < 0.9999:
        return math.sqrt(1 - share)
    left_out = torch.addmm(D, found.left * found.values, found.right, alpha=-1)
    return frobenius(left_out) / whole
