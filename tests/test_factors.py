"""Algebra on factors, against the dense product in float64."""

from __future__ import annotations

import math

import pytest
import torch

from networks import deft_factors
from networks.deft_factors import Factors
from tests.conftest import relative_error

M, N, RANK = 24, 40, 6


def random_factors(rank: int = RANK, m: int = M, kernel: tuple[int, ...] = (N,)) -> Factors:
    return Factors(torch.randn(m, rank), torch.randn(rank, math.prod(kernel)), kernel)


def dense(factors: Factors) -> torch.Tensor:
    return factors.up.double() @ factors.down.double()


def test_a_concatenation_is_the_sum():
    parts = [random_factors(3), random_factors(7).scaled(-0.4), random_factors(1)]
    whole = deft_factors.concatenated(parts)
    assert whole.rank == 11
    assert relative_error(dense(whole), sum(dense(part) for part in parts)) < 1e-6
    with pytest.raises(ValueError, match="cannot be added"):
        deft_factors.concatenated([random_factors(), random_factors(kernel=(4, 3, 3))])


def test_parts_of_a_weight_are_stacked_and_taken_apart_again():
    parts = [random_factors(3, 5), random_factors(4, 9), random_factors(2, 10)]
    placed = list(zip(parts, (0, 5, 14), strict=True))
    whole = deft_factors.stacked(placed, 24)
    assert relative_error(dense(whole), torch.cat([dense(part) for part in parts])) < 1e-6
    for part, first in placed:
        again = deft_factors.rows_of(whole, first, part.up.shape[0])
        assert torch.equal(again.up, part.up)
        assert torch.equal(again.down, part.down)


def test_truncation_is_the_best_approximation():
    whole = random_factors(9)
    cut, error = deft_factors.truncated(whole, 5)
    S = torch.linalg.svdvals(dense(whole))
    best = float(S[5:].norm() / S.norm())
    assert cut.rank == 5
    assert error == pytest.approx(best, rel=1e-4)
    assert relative_error(dense(cut), dense(whole)) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("rank", [1, 9, 30, 60])
def test_a_decomposition_is_the_products(rank):
    """Of ranks above the weight's smaller side too."""
    whole = random_factors(rank)
    found = deft_factors.decomposed(whole)
    S = torch.linalg.svdvals(dense(whole))[: len(found.values)]
    assert len(found.values) == min(rank, M, N)
    assert relative_error(found.values, S) < 1e-5
    assert relative_error(deft_factors.spectrum(whole), S) < 1e-5
    assert relative_error((found.left * found.values) @ found.right, dense(whole)) < 1e-5
    assert (found.left.T @ found.left - torch.eye(len(S))).norm() < 1e-4
    assert (found.right @ found.right.T - torch.eye(len(S))).norm() < 1e-4


def test_padding_changes_nothing_and_comes_off():
    factors = random_factors(kernel=(5, 2, 4))
    wide = deft_factors.padded(factors, 10)
    assert wide.rank == 10
    assert wide.shape == (M, 5, 2, 4)
    assert torch.equal(deft_factors.stripped(wide).up, factors.up)
    assert torch.equal(deft_factors.stripped(wide).down, factors.down)


def test_only_indices_that_are_zero_on_both_sides_are_padding():
    factors = random_factors(5)
    factors.up[:, [1, 3]], factors.down[[1, 2]] = 0, 0
    stripped = deft_factors.stripped(factors)
    assert stripped.rank == 4
    assert torch.equal(stripped.delta(), factors.up[:, [0, 2, 3, 4]] @ factors.down[[0, 2, 3, 4]])


def test_norm():
    factors = random_factors()
    assert float(deft_factors.norm(factors.up, factors.down)) == pytest.approx(float(dense(factors).norm()), rel=1e-5)


def test_balancing_keeps_small_factors_in_half_precision():
    up, down = torch.linalg.qr(torch.randn(300, 4))[0], torch.randn(4, 300) * 3e-6
    k = deft_factors.balancing_exponent(up, down)
    balanced = (up * 2.0**-k).half().float() @ (down * 2.0**k).half().float()
    assert relative_error(balanced, up @ down) < 1e-3
    assert relative_error(up.half().float() @ down.half().float(), up @ down) > 5e-3  # why it is done


@pytest.mark.parametrize("shape", [(), (7,), (300, 400), (8, 4, 3, 3), (0, 4)])
def test_the_norm_of_a_dense_matrix_is_that_in_float64(shape):
    D = torch.randn(shape) * 1e-3 + 5
    assert deft_factors.frobenius(D) == pytest.approx(float(D.double().norm()), rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int64])
def test_what_is_finite(dtype):
    whole = torch.arange(12).reshape(3, 4).to(dtype)
    assert deft_factors.is_finite(whole)
    assert deft_factors.is_finite(whole[:0])
    for value in (math.nan, math.inf, -math.inf) if dtype.is_floating_point else ():
        broken = whole.float()
        broken[1, 2] = value
        if not broken.to(dtype).float().isfinite().all():  # that form of fp8 has no infinity
            assert not deft_factors.is_finite(broken.to(dtype))
