"""Each adapter's best rate, by the scores of the tuning subjects."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.paper.metrics import METRICS, Compares
from benchmarks.paper.plan import BASE
from benchmarks.paper.records import Record
from benchmarks.paper.settings import Method

FALL = 0.1  # of the base model's likeness to the text, that a best rate may cost


@dataclass(frozen=True)
class Criterion:
    """What a rate is chosen by: the first of the benchmark's metrics of each kind that can be computed.

    :param likeness: to the references
    :param text: likeness to the text; "" for none
    """

    likeness: str
    text: str

    @staticmethod
    def of(names: Sequence[str]) -> Criterion | None:
        """Of these metrics; None where none compares with references."""

        def first(kind: Compares) -> str:
            fitting = (n for n in names if METRICS[n].compares is kind and not METRICS[n].prior)
            return next(fitting, "")

        return Criterion(first(Compares.REFERENCES), first(Compares.TEXT)) if first(Compares.REFERENCES) else None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the metrics."""
        return (self.likeness, self.text) if self.text else (self.likeness,)

    def described(self) -> str:
        """In a sentence."""
        likeness = METRICS[self.likeness].title
        if not self.text:
            return f"the rate with the best {likeness} on the tuning subjects"
        return (
            f"of the rates whose {METRICS[self.text].title} on the tuning subjects is at most {FALL:.0%} below the "
            f"base model's, the one with the best {likeness}; where there is none, the one with the highest "
            f"{METRICS[self.text].title}"
        )

    def best(self, methods: Iterable[Method], means: Mapping[str, Mapping[str, float]]) -> dict[str, Method]:
        """Adapter -> the method with its best rate; adapters without scores are left out.

        :param means: a method's or the base model's key -> metric -> mean over the tuning subjects
        """
        floor = (1 - FALL) * means.get(BASE, {}).get(self.text, 0.0) if self.text else -math.inf
        sign = 1 if METRICS[self.likeness].higher else -1
        found: dict[str, Method] = {}
        ranked: dict[str, tuple[bool, float]] = {}
        for method in methods:
            mean = means.get(method.key, {})
            if any(name not in mean for name in self.names):
                continue
            follows = not self.text or mean[self.text] >= floor
            rank = follows, sign * mean[self.likeness] if follows else mean[self.text]
            if method.adapter not in ranked or rank > ranked[method.adapter]:
                found[method.adapter], ranked[method.adapter] = method, rank
        return found


def means_of(scores: Iterable[Record], subjects: Iterable[str], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """A method's key -> metric -> the mean over subjects of each one's mean over its pictures.

    :param scores: with "method" and "subject"
    :param subjects: that count
    """
    wanted = set(subjects)
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    for score in scores:
        for name in names:
            if score["subject"] in wanted and name in score:
                by_subject = values.setdefault((score["method"], name), {})
                by_subject.setdefault(score["subject"], []).append(float(score[name]))
    found: dict[str, dict[str, float]] = {}
    for (method, name), by_subject in values.items():
        means = [math.fsum(one) / len(one) for one in by_subject.values()]
        found.setdefault(method, {})[name] = math.fsum(means) / len(means)
    return found
