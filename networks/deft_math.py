"""The mathematics of DEFT (arXiv 2509.22793): pure functions on tensors; no modules, no files.

W (m x n) is a frozen weight with m outputs and n inputs. P (m x r) spans the subspace that is taken out and R (r x n)
is what is put there. With a left factor L and an eraser E, both m x r,

    basis qr    L = E = Q, the orthonormal basis of span(P)     W' = (I - Q Q^T) W + s Q R
    basis relu  L = P, E = relu(P), the unconstrained form      W' = (I - P relu(P)^T) W + s P R
    basis svd   L = E = U, the left singular vectors of P       W' = (I - U U^T) W + s U R
    basis none  L = E = P                                       W' = (I - P P^T) W + s P R
    basis tsvd  L = P, E = P (P^T P)^(-1/2), only removal       W' = (I - U S U^T) W,  P = U S V^T
    basis nmf   L, E = the halves of relu(P), only removal      W' = (I - L E^T) W,  P is m x 2r

every form is W' - W = L (s R - E^T W): a LoRA with up = L and down = s R - E^T W. R is kept as the deviation from the
start, whose eraser E0 is fixed:

    down = s R - (E - E0)^T W

The paper's own R is R + E0^T W / s. PaRa, W' = (I - Q Q^T) W, has neither R nor E0.

By default R follows what is taken out: the paper's R is Q^T W / s + R, and W' = (I - Q Q^T) W + Q (Q^T W + s R), or
W + s Q R. `removal` is a factor on the last term above: 0 gives this, 1 the paper's own coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

ORTHONORMAL = ("qr", "svd")  # bases under which only the span of P counts, and not its size

# of a column's norm: where less is independent of the columns before it, Cholesky's result and the gradients degenerate
LEAST_INDEPENDENCE = 1e-2


def orthonormal_basis(P: Tensor) -> Tensor:
    """Q of the QR decomposition of P with a positive diagonal, differentiable, twice as well.

    Within a compiled graph, dependent columns are not noticed: `cholesky_qr` has to have found P good.

    :param P: (..., m, r) with r <= m, float32 or float64
    :returns: (..., m, r), Q^T Q = I
    """
    return _OrthonormalBasis.apply(P)


class _OrthonormalBasis(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, P: Tensor) -> Tensor:
        Q, independence = cholesky_qr(P)
        if not torch.compiler.is_compiling() and not bool(independence.all()):  # slower, and always there
            Q = positive_qr(P)[0]
        ctx.save_for_backward(P, Q)
        return Q

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        P, Q = ctx.saved_tensors
        with torch.autocast(P.device.type, enabled=False):
            return basis_gradient(P, Q, grads[0])


def basis_gradient(P: Tensor, Q: Tensor, d_Q: Tensor) -> Tensor:
    """The gradient of P (..., m, r) from that of its `orthonormal_basis` Q alone (Walter and Lehmann, arXiv
    1001.1654)."""
    Qt, d_Qt = Q.mT.contiguous(), d_Q.mT.contiguous()
    M = Qt @ d_Qt.mT
    inner = d_Qt - (M.triu() + M.triu(1).mT) @ Qt
    return (_inverse(Qt @ P, upper=True) @ inner).mT.contiguous()


def cholesky_qr(P: Tensor) -> tuple[Tensor, Tensor]:
    """Q of P's QR decomposition by Cholesky, G = P^T P = C C^T and Q = P C^-T, and how well it can be had so.

    In two passes: one alone loses orthogonality as r nears m. Nothing is raised and no GPU is waited for. The products
    are those of P^T in memory, which on a CPU take a third of the time.

    :param P: (..., m, r) with r <= m, float32 or float64
    :returns: Q (..., m, r); and (...), the smallest part of a column's norm that is independent of the columns before
        it, 0 where Q is of no use
    """
    Pt = P.mT.contiguous()
    G = Pt @ Pt.mT
    C, failed = torch.linalg.cholesky_ex(G)
    Qt = _inverse(C) @ Pt
    independence = (C.diagonal(dim1=-2, dim2=-1) / G.diagonal(dim1=-2, dim2=-1).sqrt()).amin(-1)
    C, failed_again = torch.linalg.cholesky_ex(Qt @ Qt.mT)
    good = (failed == 0) & (failed_again == 0) & independence.isfinite()
    return (_inverse(C) @ Qt).mT, torch.where(good, independence, torch.zeros_like(independence))


def _inverse(T: Tensor, upper: bool = False) -> Tensor:
    """Of a triangular matrix (..., r, r); r is small, and a product with it faster than solving with many columns."""
    return torch.linalg.solve_triangular(T, torch.eye(T.shape[-1], dtype=T.dtype, device=T.device), upper=upper)


def independent_columns(P: Tensor) -> tuple[Tensor, Tensor] | None:
    """A matrix with P's basis in which no column depends on those before it: one whose own part is below
    `LEAST_INDEPENDENCE` of its norm is replaced by that part's direction, with the other columns' mean norm. Where none
    is, but all together are of no use to `cholesky_qr`, they all are.

    :param P: (m, r)
    :returns: that matrix (m, r) in P's dtype and which columns are new (r,), both where P is; None where there is
        nothing to replace, or P is not finite
    """
    if not bool(P.isfinite().all()):
        return None
    Q, T = positive_qr(P.double().cpu())
    norms = T.norm(dim=0)
    weak = T.diagonal() <= LEAST_INDEPENDENCE * norms
    if not bool(weak.any()):
        if bool(cholesky_qr(P)[1] > LEAST_INDEPENDENCE / 2):
            return None
        weak = torch.ones_like(weak)
    size = norms[~weak].mean() if bool((~weak).any()) else norms.mean().clamp(min=torch.finfo(P.dtype).tiny)
    return torch.where(weak.to(P.device), (Q * size).to(P), P), weak.to(P.device)


def positive_qr(A: Tensor) -> tuple[Tensor, Tensor]:
    """Thin QR with a positive diagonal of the triangular factor: A = Q T."""
    Q, T = torch.linalg.qr(A)
    sign = torch.where(T.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(A.dtype)
    return Q * sign[..., None, :], T * sign[..., None]


def left_and_eraser(P: Tensor, basis: str) -> tuple[Tensor, Tensor]:
    """The left factor L and the eraser E, each (m, r), of P (m, r), or (m, 2r) for `nmf`."""
    if basis == "qr":
        Q = orthonormal_basis(P)
        return Q, Q
    if basis == "svd":
        U = left_singular_vectors(P)
        return U, U
    if basis == "tsvd":
        return P, polar_factor(P)
    if basis == "nmf":
        L, E = torch.relu(P).chunk(2, dim=1)
        return L, E
    return P, P if basis == "none" else torch.relu(P)


def left_singular_vectors(P: Tensor) -> Tensor:
    """U of the SVD P = U S V^T, with those signs that bring it nearest to the Q of P's QR decomposition.

    The subspace is Q's. Its derivative grows without bound as two singular values meet.

    :param P: (m, r) with r <= m, of different singular values
    """
    Q = orthonormal_basis(P)
    T = Q.mT @ P
    exact = T if T.device.type == "mps" else T.double()  # which that device does not have
    U = torch.linalg.svd(exact)[0].to(P.dtype)
    return Q @ (U * torch.where(U.diagonal() < 0, -1.0, 1.0).to(U.dtype))


def spread_columns(Q: Tensor) -> Tensor:
    """A matrix (m, r) whose left singular vectors are the columns of Q, at distances that suit `basis=svd`."""
    return Q * torch.linspace(1.25, 0.75, Q.shape[1], dtype=Q.dtype, device=Q.device)


def polar_factor(P: Tensor) -> Tensor:
    """P (P^T P)^(-1/2), so that P times its transpose is (P P^T)^(1/2) = U S U^T for the SVD P = U S V^T.

    By the coupled Newton iteration of Denman and Beavers (Linear and Multilinear Algebra 4, 1976), whose derivative has
    no difference of singular values in a denominator, as an SVD's has.

    :param P: (m, r) with r <= m and independent columns
    """
    G = P.mT @ P
    size = torch.linalg.matrix_norm(G)
    Y, Z = G / size, torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    for _ in range(12):
        Y, Z = (Y + torch.linalg.inv(Z)) / 2, (Z + torch.linalg.inv(Y)) / 2
    return P @ Z / size.sqrt()


def lora_factors(
    P: Tensor,
    R: Tensor | None,
    E0: Tensor | None,
    scale: Tensor | float,
    basis: str,
    read_weight: Callable[[], Tensor],
    removal: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The adapter as a LoRA of scale 1: up (m, r) and down (r, n), differentiable in P, R and scale.

    :param P: (m, r), or (m, 2r) for `nmf`
    :param R: (r, n), or None for PaRa
    :param E0: (m, r), the eraser at the start; zeros for the paper's start and for PaRa; None at removal 0
    :param scale: s
    :param basis: `qr`, `svd`, `relu`, `none`, `tsvd` or `nmf`
    :param read_weight: returns W (m, n) in any dtype; called in the forward and again in the backward pass, so that no
        converted copy of W is kept in between and W may be moved about (block swap)
    :param removal: from 0 to 1; at 0, W is not read, and R is not None
    """
    L, E = left_and_eraser(P, basis)
    if E0 is None:
        assert R is not None, "an adapter that neither removes nor injects"
        return L, scale * R
    removed = _TransposedTimesWeight.apply(removal * (E - E0), read_weight)
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
    columns of W, hence the m / n. `ratio` is P's rate over R's. `docs/results.md` has the table.
    """
    return math.sqrt(1 + m / n) / (scale * ratio)


def injection_rate(m: int, n: int) -> float:
    """The factor c of R = c R', R' being what the optimizer sees: sqrt(m / 3n).

    A LoRA's first step moves W by rate * sqrt(m r / 3) (its down has variance 1 / 3n), a step of R by
    rate * sqrt(r n): c makes them equal.
    """
    return math.sqrt(m / (3 * n))


def outside(R: Tensor, U: Tensor) -> Tensor:
    """R (..., r, n) without its part in the input directions U (..., n, k), U^T U = I: R (I - U U^T)."""
    return R - (R @ U) @ U.mT


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
    return positive_qr(W @ right)[0]


def minor_directions(W: Tensor, rank: int) -> Tensor:
    """The left singular vectors of W (m, n) of its `rank` smallest singular values, as (m, rank).

    Where m is at least n + rank, these are 0, and the vectors are random ones orthogonal to all columns of W.
    """
    m, n = W.shape
    if m - n >= rank:
        columns = torch.linalg.qr(W)[0]
        noise = torch.randn(m, rank, dtype=W.dtype, device=W.device)
        for _ in range(2):
            noise = orthonormal_basis(noise - columns @ (columns.mT @ noise))
        return noise
    return torch.linalg.eigh(W @ W.mT).eigenvectors[:, :rank]


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
    if basis not in ORTHONORMAL:  # a zero column of up still learns through its row of down: only missing are filled
        P = torch.cat([up, 0.02 * torch.randn(m, rank - k, generator=generator).to(up)], dim=1)
        return P, torch.nn.functional.pad(down / scale, (0, 0, 0, rank - k))
    Q, T = positive_qr(up)
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
    return Q if basis == "qr" else spread_columns(Q), R


def _well_conditioned(T: Tensor) -> bool:
    """Whether no column of a triangular factor depends on those before it."""
    size = T.diagonal().abs()
    return bool(len(size) and (size > 1e-6 * T.norm(dim=0).clamp(min=torch.finfo(T.dtype).tiny)).all())


def scaled_start(E: Tensor, E0: Tensor, rho: Tensor | float) -> Tensor:
    """The E0 from which E is rho times as far: with rho R, that of the adapter whose delta is rho times as large."""
    return E + rho * (E0 - E)
