"""The mathematics of DEFT (arXiv 2509.22793): pure functions on tensors; no modules, no files.

W (m x n) is a frozen weight with m outputs and n inputs. P (m x r) spans the subspace that is taken out and R (r x n)
is what is put there. With a left factor L and an eraser E, both m x r,

    basis qr    L = E = Q, the orthonormal basis of span(P)     W' = (I - Q Q^T) W + s Q R
    basis relu  L = P, E = relu(P), the unconstrained form      W' = (I - P relu(P)^T) W + s P R

every form is W' - W = L (s R - E^T W): a LoRA with up = L and down = s R - E^T W. R is kept as the deviation from the
start, whose eraser E0 is fixed:

    down = s R - (E - E0)^T W

The paper's own R is R + E0^T W / s. PaRa, W' = (I - Q Q^T) W, has neither R nor E0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# of a column's norm: where less is independent of the columns before it, Cholesky's result and the gradients degenerate
LEAST_INDEPENDENCE = 1e-2


def orthonormal_basis(P: Tensor, check: bool = True, known: Tensor | None = None) -> Tensor:
    """Q of the QR decomposition of P with a positive diagonal, differentiable, twice as well.

    :param P: (..., m, r) with r <= m, float32 or float64
    :param check: False, as always within a compiled graph, for a P that `cholesky_qr` has found good: a failure is not
        noticed then, and a GPU not waited for
    :param known: Q, where it has been computed already and only its history is wanted
    :returns: (..., m, r), Q^T Q = I
    """
    return _OrthonormalBasis.apply(P, check and not torch.compiler.is_compiling(), known)


class _OrthonormalBasis(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, P: Tensor, check: bool, Q: Tensor | None) -> Tensor:
        if Q is None:
            Q, independence = cholesky_qr(P)
            if check and not bool(independence.all()):  # dependent columns: slower, and always there
                Q = _positive_qr(P)[0]
        ctx.save_for_backward(P, Q)
        return Q

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """QR's derivative for a gradient of Q alone (Walter and Lehmann, arXiv 1001.1654)."""
        P, Q = ctx.saved_tensors
        with torch.autocast(P.device.type, enabled=False):
            M = grads[0].mT @ Q
            inner = grads[0] - Q @ (M.tril() + M.tril(-1).mT)
            return inner @ _inverse(Q.mT @ P, upper=True).mT, None, None


def cholesky_qr(P: Tensor) -> tuple[Tensor, Tensor]:
    """Q of P's QR decomposition by Cholesky, G = P^T P = C C^T and Q = P C^-T, and how well it can be had so.

    In two passes: one alone loses orthogonality as r nears m. Nothing is raised and no GPU is waited for.

    :param P: (..., m, r) with r <= m, float32 or float64
    :returns: Q (..., m, r); and (...), the smallest part of a column's norm that is independent of the columns before
        it, 0 where Q is of no use
    """
    C, failed = torch.linalg.cholesky_ex(P.mT @ P)
    Q = P @ _inverse(C).mT
    independence = (C.diagonal(dim1=-2, dim2=-1) / P.norm(dim=-2)).amin(-1)
    C, failed_again = torch.linalg.cholesky_ex(Q.mT @ Q)
    Q = Q @ _inverse(C).mT
    good = (failed == 0) & (failed_again == 0) & independence.isfinite()
    return Q, torch.where(good, independence, torch.zeros_like(independence))


def _inverse(T: Tensor, upper: bool = False) -> Tensor:
    """Of a triangular matrix (..., r, r); r is small, and a product with it faster than solving with many columns."""
    return torch.linalg.solve_triangular(T, torch.eye(T.shape[-1], dtype=T.dtype, device=T.device), upper=upper)


def independent_columns(P: Tensor) -> tuple[Tensor, Tensor] | None:
    """A matrix with P's basis in which no column depends on those before it: one whose own part is below
    `LEAST_INDEPENDENCE` of its norm is replaced by that part's direction, with the other columns' mean norm.

    :param P: (m, r)
    :returns: that matrix (m, r) in P's dtype and which columns are new (r,), both where P is; None where there is
        nothing to replace, or P is not finite
    """
    if not bool(P.isfinite().all()):
        return None
    Q, T = _positive_qr(P.double().cpu())
    norms = T.norm(dim=0)
    weak = T.diagonal() <= LEAST_INDEPENDENCE * norms
    if not bool(weak.any()):
        return None
    size = norms[~weak].mean() if bool((~weak).any()) else 1.0
    return torch.where(weak.to(P.device), (Q * size).to(P), P), weak.to(P.device)


def _positive_qr(A: Tensor) -> tuple[Tensor, Tensor]:
    """Thin QR with a positive diagonal of the triangular factor: A = Q T."""
    Q, T = torch.linalg.qr(A)
    sign = torch.where(T.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(A.dtype)
    return Q * sign[..., None, :], T * sign[..., None]


def left_and_eraser(P: Tensor, basis: str) -> tuple[Tensor, Tensor]:
    """The left factor L and the eraser E, each (m, r), of basis `qr` or `relu`."""
    if basis == "qr":
        Q = orthonormal_basis(P)
        return Q, Q
    return P, torch.relu(P)


def lora_factors(
    P: Tensor, R: Tensor | None, E0: Tensor, scale: Tensor | float, basis: str, read_weight: Callable[[], Tensor]
) -> tuple[Tensor, Tensor]:
    """The adapter as a LoRA of scale 1: up (m, r) and down (r, n), differentiable in P, R and scale.

    :param P: (m, r)
    :param R: (r, n), or None for PaRa
    :param E0: (m, r), the eraser at the start; zeros for the paper's start and for PaRa
    :param scale: s
    :param basis: `qr` or `relu`
    :param read_weight: returns W (m, n) in any dtype; called in the forward and again in the backward pass, so that no
        converted copy of W is kept in between and W may be moved about (block swap)
    """
    L, E = left_and_eraser(P, basis)
    removed = _TransposedTimesWeight.apply(E - E0, read_weight)
    return L, -removed if R is None else scale * R - removed


class _TransposedTimesWeight(torch.autograd.Function):
    """D^T W for a frozen W that is read anew by each pass, and converted to D's dtype in chunks."""

    @staticmethod
    def forward(ctx: Any, D: Tensor, read_weight: Callable[[], Tensor]) -> Tensor:
        ctx.read_weight = read_weight
        parts = _chunks(read_weight(), D.dtype)
        first, W = next(parts)
        product = D[first].mT @ W
        for rows, W in parts:
            product += D[rows].mT @ W
        return product

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        parts = [W @ grads[0].mT for _, W in _chunks(ctx.read_weight(), grads[0].dtype)]
        return parts[0] if len(parts) == 1 else torch.cat(parts), None


def _chunks(W: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """W by rows in another dtype, so many that a float32 chunk has at most 64 MB; whole if it has that dtype."""
    rows = len(W) if W.dtype == dtype else max(1, 2**24 // W.shape[1])
    for first in range(0, len(W), rows):
        part = slice(first, first + rows)
        yield part, W[part].to(dtype)


def direction_size(m: int, n: int, scale: float, ratio: float) -> float:
    """The norm that columns of P start with: sqrt(1 + m / n) / (scale * ratio).

    Only the span of P counts under qr, and Adam turns it by its rate over P's own size. With columns of this norm,
    `scale` (alpha / rank) slows or speeds the whole adapter as it does a LoRA, and turning P moves a weight of the
    usual size (variance 1 / 3n) about as far as a LoRA's step does on every layer shape: P's gradient lies in the
    columns of W, hence the m / n. `ratio` is P's rate over R's. `docs/method.md` has the table.
    """
    return math.sqrt(1 + m / n) / (scale * ratio)


def injection_rate(m: int, n: int) -> float:
    """The factor c of R = c R', R' being what the optimizer sees: sqrt(m / 3n).

    A LoRA's first step moves W by rate * sqrt(m r / 3) (its down has variance 1 / 3n), a step of R by
    rate * sqrt(r n): c makes them equal.
    """
    return math.sqrt(m / (3 * n))


def leading_directions(W: Tensor, rank: int) -> Tensor:
    """The `rank` leading left singular vectors of W (m, n), as (m, rank).

    Of a large W by torch's randomized SVD with eight power iterations, whose result is exact as far as the singular
    values fall off; it draws from torch's random generator.
    """
    if min(W.shape) > max(512, 8 * rank):
        return torch.svd_lowrank(W, q=rank + 16, niter=8)[0][:, :rank]
    if W.shape[0] <= W.shape[1]:
        return torch.linalg.eigh(W @ W.mT).eigenvectors[:, -rank:].flip(1)
    right = torch.linalg.eigh(W.mT @ W).eigenvectors[:, -rank:].flip(1)
    return _positive_qr(W @ right)[0]


def strip_padding(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Drops the indices whose column of up (m, r) and row of down (r, n) are both zero."""
    used = (up != 0).any(0) | (down != 0).any(1)
    return up[:, used], down[used]


def from_lora(up: Tensor, down: Tensor, rank: int, scale: float, basis: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A LoRA as a DEFT, exactly: P (m, rank) and R (rank, n) with L(P) s R = up @ down, so E0 = E(P).

    Directions that `up` does not span (all of them in a fresh LoRA, dependent columns, a rank below `rank`) are filled
    with random ones that add nothing; for `qr` they are orthogonal to the rest, and P = Q.

    :param up: (m, k), float32 or float64, with k <= rank
    :param down: (k, n), of the same dtype, the LoRA's scale already in it
    :param seed: of the random directions
    """
    m, k = up.shape
    generator = torch.Generator()
    generator.manual_seed(seed)
    if basis == "relu":  # a zero column of up still learns through its row of down, so only missing ones are filled
        P = torch.cat([up, 0.02 * torch.randn(m, rank - k, generator=generator).to(up)], dim=1)
        return P, torch.nn.functional.pad(down / scale, (0, 0, 0, rank - k))
    Q, T = _positive_qr(up)
    if not _well_conditioned(T):
        U, S, Vh = torch.linalg.svd(up, full_matrices=False)
        spanned = S > 1e-6 * S.max() if k else S > 0
        Q, T = U[:, spanned], S[spanned, None] * Vh[spanned]
    R = T @ down / scale
    missing = rank - Q.shape[1]
    if missing:
        noise = torch.randn(m, missing, generator=generator).to(up)
        for _ in range(2):  # twice is enough to be orthogonal to the rest
            noise = orthonormal_basis(noise - Q @ (Q.mT @ noise))
        Q, R = torch.cat([Q, noise], dim=1), torch.nn.functional.pad(R, (0, 0, 0, missing))
    return Q, R


def _well_conditioned(T: Tensor) -> bool:
    """Whether no column of a triangular factor depends on those before it."""
    size = T.diagonal().abs()
    return bool(len(size) and (size > 1e-6 * T.norm(dim=0).clamp(min=torch.finfo(T.dtype).tiny)).all())


def truncate(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best approximation of up (m, k) @ down (k, n) of lower rank, by SVD, and its relative Frobenius error."""
    Q_up, T_up = torch.linalg.qr(up)
    Q_down, T_down = torch.linalg.qr(down.mT)
    U, S, Vh = torch.linalg.svd(T_up @ T_down.mT)
    root = S[:rank].sqrt()
    error = float(S[rank:].norm() / S.norm()) if S.any() else 0.0
    return Q_up @ (U[:, :rank] * root), (root[:, None] * Vh[:rank]) @ Q_down.mT, error


def delta_norm(up: Tensor, down: Tensor) -> Tensor:
    """||up @ down||_F without forming the m x n product."""
    return ((up.mT @ up @ down) * down).sum().clamp(min=0).sqrt()


def scaled_deviation(R: Tensor, E: Tensor, E0: Tensor, rho: float) -> tuple[Tensor, Tensor]:
    """R and E0 of the adapter whose delta is rho times as large; P stays."""
    return rho * R, E + rho * (E0 - E)


def balancing_exponent(up: Tensor, down: Tensor) -> int:
    """k such that up * 2^-k and down * 2^k are about equally large: half precision then loses least, and exactly."""
    sizes = [float(t.abs().max()) for t in (up, down)]
    if min(sizes) == 0 or not all(map(math.isfinite, sizes)):
        return 0
    return round((math.log2(sizes[0]) - math.log2(sizes[1])) / 2)
