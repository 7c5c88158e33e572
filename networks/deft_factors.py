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


def rows_of(whole: Factors, first: int, number: int) -> Factors:
    """The change of some outputs, exactly: those rows of up, and of the rank what they use (all of it if nothing)."""
    up = whole.up[first : first + number]
    used = (up != 0).any(0)
    if not used.any():
        used[:] = True
    return Factors(up[:, used], whole.down[used], whole.kernel)


def stripped(factors: Factors) -> Factors:
    """Without padding: the indices whose column of up and row of down are both zero."""
    used = (factors.up != 0).any(0) | (factors.down != 0).any(1)
    return replace(factors, up=factors.up[:, used], down=factors.down[used])


def padded(factors: Factors, rank: int) -> Factors:
    """With zero columns of up and rows of down up to a rank: the same product."""
    missing = rank - factors.rank
    up = torch.nn.functional.pad(factors.up, (0, missing))
    return replace(factors, up=up, down=torch.nn.functional.pad(factors.down, (0, 0, 0, missing)))


def norm(up: Tensor, down: Tensor) -> Tensor:
    """||up @ down||_F, differentiable."""
    return ((up.mT @ up @ down) * down).sum().clamp(min=0).sqrt()


@dataclass(frozen=True)
class Decomposed:
    """The thin SVD of a product: left (m, k) diag(values) right (k, n), values (k,) falling, k = min(m, r, n)."""

    left: Tensor
    values: Tensor
    right: Tensor
    kernel: tuple[int, ...]

    def truncated(self, rank: int) -> tuple[Factors, float]:
        """The best approximation of a lower rank, in two factors of equal size, and its relative Frobenius error."""
        root = self.values[:rank].sqrt()
        whole = self.values.norm()
        error = float(self.values[rank:].norm() / whole) if whole > 0 else 0.0
        return Factors(self.left[:, :rank] * root, root[:, None] * self.right[:rank], self.kernel), error


def decomposed(factors: Factors) -> Decomposed:
    """The singular value decomposition of the product, by QR of both factors and an SVD of r x r."""
    Q_up, T_up = torch.linalg.qr(factors.up)
    Q_down, T_down = torch.linalg.qr(factors.down.mT)
    U, S, Vh = torch.linalg.svd(T_up @ T_down.mT, full_matrices=False)
    return Decomposed(Q_up @ U, S, Vh @ Q_down.mT, factors.kernel)


def truncated(factors: Factors, rank: int) -> tuple[Factors, float]:
    """The best approximation of a lower rank, and its relative Frobenius error."""
    return decomposed(factors).truncated(rank)


def spectrum(factors: Factors) -> Tensor:
    """The singular values of the product, falling, without its singular vectors."""
    T_up = torch.linalg.qr(factors.up, mode="r")[1]
    T_down = torch.linalg.qr(factors.down.mT, mode="r")[1]
    return torch.linalg.svdvals(T_up @ T_down.mT)


def balancing_exponent(up: Tensor, down: Tensor) -> int:
    """k such that up * 2^-k and down * 2^k are about equally large: half precision then loses least, and exactly."""
    sizes = [float(t.abs().max()) for t in (up, down)]
    if min(sizes) == 0 or not all(map(math.isfinite, sizes)):
        return 0
    return round((math.log2(sizes[0]) - math.log2(sizes[1])) / 2)
