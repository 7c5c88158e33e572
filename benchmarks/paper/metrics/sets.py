"""Distances between two sets of embeddings."""

from __future__ import annotations

import torch
from torch import Tensor


def frechet(first: Tensor, second: Tensor) -> float:
    """Squared Fréchet distance of the normal distributions with both sets' means and covariances.

    |m1 - m2|² + tr(S1 + S2 - 2 (S1 S2)^½). With S = AᵀA / (n - 1), the trace of that root is the sum of singular values
    of A1 A2ᵀ over √((n1 - 1)(n2 - 1)): never complex, and exact also where there are fewer pictures than dimensions.

    :param first: (n1, d), n1 at least 2
    :param second: (n2, d)
    """
    (mean1, root1), (mean2, root2) = _moments(first), _moments(second)
    cross = torch.linalg.svdvals(root1 @ root2.T).sum()
    distance = (mean1 - mean2).square().sum() + root1.square().sum() + root2.square().sum() - 2 * cross
    return max(distance.item(), 0.0)  # below 0 by rounding alone


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (d,), and a root (at most d rows) of the unbiased covariance."""
    rows = rows.double()
    mean = rows.mean(0)
    centred = (rows - mean) / (len(rows) - 1) ** 0.5
    return mean, torch.linalg.qr(centred, mode="r").R


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """Squared maximum mean discrepancy, unbiased, with the kernel (x·y / d + 1)³: KID (Binkowski 2018), in one subset.

    :param first: (n1, d), n1 at least 2
    :param second: (n2, d)
    """
    first, second = first.double(), second.double()
    crossed = _kernel(first, second).mean()
    return (_among(first) + _among(second) - 2 * crossed).item()


def _among(rows: Tensor) -> Tensor:
    values = _kernel(rows, rows)
    return (values.sum() - values.diagonal().sum()) / (len(rows) * (len(rows) - 1))


def _kernel(first: Tensor, second: Tensor) -> Tensor:
    return (first @ second.T / first.shape[1] + 1) ** 3
