"""deft_math against the paper's formulas in float64, written out here with m x m projectors and LAPACK's QR."""

from __future__ import annotations

import pytest
import torch

from networks import deft_math
from networks.deft_config import parse_options
from tests.conftest import relative_error

M, N, RANK, SCALE = 40, 56, 6, 0.7


def lapack_basis(P):
    Q, T = torch.linalg.qr(P)
    return Q * torch.sign(T.diagonal())


def signed_singular_vectors(P):
    U = torch.linalg.svd(P, full_matrices=False)[0]
    return U * torch.sign((lapack_basis(P).T @ U).diagonal())


def paper(P, R, W, basis, scale):
    """W' of the paper; R None is PaRa."""
    L, E = {
        "qr": (lapack_basis(P),) * 2,
        "svd": (signed_singular_vectors(P),) * 2,
        "relu": (P, P.clamp(min=0)),
        "none": (P, P),
    }[basis]
    kept = (torch.eye(len(W), dtype=W.dtype) - L @ E.T) @ W
    return kept if R is None else kept + scale * L @ R


def random_case(dtype=torch.float64):
    return (torch.randn(s, dtype=dtype) for s in ((M, RANK), (RANK, N), (M, N)))


@pytest.mark.parametrize("basis", ["qr", "svd", "relu", "none"])
@pytest.mark.parametrize("start", ["identity", "zero"])
def test_deviation_form_is_the_papers_formula(basis, start):
    P, R, W = random_case()
    P0 = P + torch.randn_like(P)
    E0 = deft_math.left_and_eraser(P0, basis)[1] if start == "identity" else torch.zeros_like(P)
    up, down = deft_math.lora_factors(P, R, E0, SCALE, basis, lambda: W)
    assert relative_error(W + up @ down, paper(P, R + E0.T @ W / SCALE, W, basis, SCALE)) < 1e-13


def test_para_is_the_papers_formula():
    P, _, W = random_case()
    up, down = deft_math.lora_factors(P, None, torch.zeros_like(P), SCALE, "qr", lambda: W)
    assert relative_error(W + up @ down, paper(P, None, W, "qr", SCALE)) < 1e-13


@pytest.mark.parametrize("method", ["qr", "tsvd", "lrmf", "eigen", "nmf"])
def test_removal_only_forms_are_the_authors(method):
    """Written out from deft/genpara.py of github.com/MAXNORM8650/DEFT (commit 79bbdfa1): W' x = W x - M W x."""
    P, _, W = random_case()
    U, S, _ = torch.linalg.svd(P, full_matrices=False)
    if method == "qr":
        M = lapack_basis(P) @ lapack_basis(P).T
    elif method == "tsvd":
        M = U @ torch.diag(S) @ U.T
    elif method == "nmf":
        P = torch.randn(len(W), 2 * RANK, dtype=W.dtype)  # the authors' H^T and their own W
        M = (torch.relu(P[:, RANK:]) @ torch.relu(P[:, :RANK].T)).T  # their x W^T M', transposed
    elif method == "lrmf":
        M = (U * S.sqrt()) @ (U * S.sqrt()).T
    else:
        values, vectors = torch.linalg.eigh(P @ P.T)
        M = vectors[:, -RANK:] @ torch.diag(values[-RANK:]) @ vectors[:, -RANK:].T
    basis = parse_options({"basis": method, "para": True}).basis
    up, down = deft_math.lora_factors(P, None, torch.zeros(len(W), RANK).double(), SCALE, basis, lambda: W)
    assert relative_error(W + up @ down, W - M @ W) < 1e-12


@pytest.mark.parametrize("basis", ["qr", "svd", "relu", "none"])
def test_gradients_are_those_of_the_papers_formula(basis):
    P, R, W = random_case()
    target, s = torch.randn_like(W), torch.tensor(SCALE, dtype=torch.float64)
    E0 = deft_math.left_and_eraser(P, basis)[1]
    ours = [t.clone().requires_grad_() for t in (P, R, s)]
    up, down = deft_math.lora_factors(ours[0], ours[1], E0, ours[2], basis, lambda: W)
    ((W + up @ down - target) ** 2).sum().backward()
    plain = [t.clone().requires_grad_() for t in (P, R, s)]
    # the paper's R moves with s where E0 is not zero; its constant part is held here
    reference = paper(plain[0], plain[1], W, basis, plain[2]) + deft_math.left_and_eraser(plain[0], basis)[0] @ E0.T @ W
    ((reference - target) ** 2).sum().backward()
    for a, b in zip(ours, plain, strict=True):
        assert relative_error(a.grad, b.grad) < 1e-10


@pytest.mark.parametrize(("m", "r"), [(320, 4), (320, 128), (64, 63), (32, 32)])
def test_basis_is_orthonormal_and_lapacks(m, r):
    P = torch.randn(m, r)
    Q = deft_math.orthonormal_basis(P)
    assert (Q.T @ Q - torch.eye(r)).norm() < 1e-5
    assert relative_error(Q.double(), lapack_basis(P.double())) < (1e-5 if r < m // 2 else 1e-2)  # condition of P


def test_basis_survives_nearly_dependent_columns():
    P = torch.randn(32, 4)
    P[:, 3] = P[:, 2] * (1 + 1e-7)
    Q = deft_math.orthonormal_basis(P)
    assert (Q.T @ Q - torch.eye(4)).norm() < 1e-5


def test_basis_of_itself():
    Q = deft_math.orthonormal_basis(torch.randn(50, 8))
    assert (deft_math.orthonormal_basis(3.7 * Q) - Q).abs().max() < 1e-6


def lora_cases():
    up, down = torch.randn(M, 4), torch.randn(4, N)
    repeated, gap = up.clone(), up.clone()
    repeated[:, 2], gap[:, 1] = repeated[:, 0], 0
    return {
        "full": (up, down),
        "fresh, up = 0": (torch.zeros(M, 4), down),
        "a repeated column": (repeated, down),
        "a zero column": (gap, down),
        "tiny": (up * 1e-6, down * 1e-6),
        "empty": (torch.zeros(M, 0), torch.zeros(0, N)),
    }


@pytest.mark.parametrize("case", list(lora_cases()))
@pytest.mark.parametrize("basis", ["qr", "relu"])
@pytest.mark.parametrize("rank", [4, 7])
def test_any_lora_becomes_a_deft_exactly_and_can_learn(case, basis, rank):
    up, down = lora_cases()[case]
    W = torch.randn(M, N)
    P, R = deft_math.from_lora(up, down, rank, SCALE, basis)
    E0 = deft_math.left_and_eraser(P, basis)[1]
    assert P.shape == (M, rank)
    assert R.shape == (rank, N)
    P, R = P.requires_grad_(), R.requires_grad_()
    new_up, new_down = deft_math.lora_factors(P, R, E0, SCALE, basis, lambda: W)
    delta, wanted = new_up @ new_down, up @ down
    assert (delta - wanted).norm() <= 1e-6 * wanted.norm()
    ((W + delta - torch.randn(M, N)) ** 2).sum().backward()
    for gradient in (P.grad, R.grad):
        assert gradient.isfinite().all()
        assert gradient.abs().max() < 1e4
    assert (R.grad.norm(dim=1) > 0).all() or (P.grad.norm(dim=0) > 0).all()


def test_reading_keeps_the_function_of_later_training():
    """A DEFT read back from its own LoRA is the same function of later P and R, not only the same point."""
    P, R, W = random_case(torch.float32)
    E0 = deft_math.orthonormal_basis(P + 0.3 * torch.randn_like(P))
    up, down = deft_math.lora_factors(P, R, E0, SCALE, "qr", lambda: W)
    Q2, R2 = deft_math.from_lora(up, down, RANK, SCALE, "qr")
    E02 = deft_math.orthonormal_basis(Q2)
    P_later, step = P + 0.2 * torch.randn_like(P), torch.randn_like(R)
    one = torch.matmul(*deft_math.lora_factors(P_later, R + step, E0, SCALE, "qr", lambda: W))
    two = torch.matmul(*deft_math.lora_factors(P_later, R2 + step, E02, SCALE, "qr", lambda: W))
    assert relative_error(two, one) < 1e-5


@pytest.mark.parametrize("basis", ["qr", "relu"])
def test_scaled_start_scales_the_delta(basis):
    P, R, W = random_case()
    E0 = torch.randn(M, RANK, dtype=torch.float64) * 0.1
    _, E = deft_math.left_and_eraser(P, basis)
    before = torch.matmul(*deft_math.lora_factors(P, R, E0, SCALE, basis, lambda: W))
    start = deft_math.scaled_start(E, E0, 0.3)
    after = torch.matmul(*deft_math.lora_factors(P, 0.3 * R, start, SCALE, basis, lambda: W))
    assert relative_error(after, 0.3 * before) < 1e-12


@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
def test_leading_directions_are_the_left_singular_vectors(shape):
    W = torch.randn(shape)
    U = torch.linalg.svd(W)[0][:, :5]
    assert (deft_math.leading_directions(W, 5).T @ U).abs().diagonal().min() > 1 - 1e-4


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (50, 44)])
def test_minor_directions_are_the_last_left_singular_vectors(shape):
    W = torch.randn(shape)
    U = torch.linalg.svd(W)[0][:, -5:]
    found = deft_math.minor_directions(W, 5)
    assert (found.T @ found - torch.eye(5)).norm() < 1e-5
    smallest = torch.linalg.svdvals(W)[-5:].norm() if shape[0] <= shape[1] else 1.1 * (U.T @ W).norm()
    assert (found.T @ W).norm() < smallest + 1e-4


@pytest.mark.parametrize("shape", [(600, 700), (700, 600)])
def test_leading_directions_of_a_large_weight(shape):
    """Found without a full decomposition, where singular values fall off as slowly as k^-1/2."""
    size = torch.arange(1, 601) ** -0.5
    U, V = (torch.linalg.qr(torch.randn(side, 600))[0] for side in shape)
    found = deft_math.leading_directions((U * size) @ V.T, 5)
    assert (found.T @ found - torch.eye(5)).norm() < 1e-5
    assert torch.linalg.svdvals(found.T @ U[:, :5]).min() > 0.999


@pytest.mark.parametrize("shape", [(320, 320), (320, 1280), (1280, 320), (320, 2880)])
@pytest.mark.parametrize("alpha", [1, 16])
def test_first_step_moves_the_weight_about_as_far_as_a_loras(shape, alpha):
    """DESIGN's requirement of a factor of 4; `benchmarks/rates.py` has all shapes and 100 steps."""
    from benchmarks.rates import movement

    lora, ours = (movement(kind, *shape, rank=16, alpha=alpha, steps=(1,))[0] for kind in ("lora", "deft"))
    assert 1 / 4 < ours / lora < 4
