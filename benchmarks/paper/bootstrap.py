"""Means over subjects with intervals: a bootstrap that draws subjects, since pictures of one subject are alike."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

SAMPLES = 10_000
COVERED = 0.95


class Interval(NamedTuple):
    """A mean over subjects and its interval, whose ends are None for fewer than two subjects.

    :param better: of a difference: in how many subjects it is above zero
    """

    mean: float
    low: float | None
    high: float | None
    subjects: int
    better: int = 0


def interval(means: Mapping[str, float], seed: int = 0) -> Interval:
    """The mean over subjects, each counted once, and its percentile interval.

    The subjects are taken in the order of their names and the draws depend on nothing but their number and the seed:
    two methods with the same subjects meet the same draws.

    :param means: each subject's mean
    :raises ValueError: without subjects
    """
    if not means:
        raise ValueError("a mean over no subjects")
    values = np.array([means[name] for name in sorted(means)], dtype=np.float64)
    better = int((values > 0).sum())
    if len(values) < 2:
        return Interval(float(values[0]), None, None, 1, better)
    low, high = np.quantile(_draws(len(values), seed) @ values / len(values), [(1 - COVERED) / 2, (1 + COVERED) / 2])
    return Interval(float(values.mean()), float(low), float(high), len(values), better)


@functools.lru_cache(maxsize=4)
def _draws(number: int, seed: int) -> np.ndarray:
    """How often each of so many subjects is in each sample: (SAMPLES, number)."""
    return np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), SAMPLES).astype(np.float64)


def paired(ours: Mapping[str, float], theirs: Mapping[str, float], seed: int = 0) -> Interval | None:
    """How much one method differs from another on the same subject, over the subjects that both have; None for none.

    What makes a subject easy for both falls out: the interval is narrower than that of two independent means.
    """
    both = ours.keys() & theirs.keys()
    return interval({name: ours[name] - theirs[name] for name in both}, seed) if both else None
