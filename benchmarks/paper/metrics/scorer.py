"""Scores of drawn pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper.metrics.table import Choice, Drawn


class Scorer:
    """Computes metrics of pictures, and of sets of them.

    :param choice: which metrics; `table.choose` makes it
    :param models: option's name -> folder or file
    :param cache: file in which embeddings are kept, under the run's output folder
    :param batch: pictures that a model sees at once
    :raises DeftError: for models that cannot be read
    """

    def __init__(
        self, choice: Choice, models: Mapping[str, Path | None], cache: Path, device: str = "cpu", batch: int = 16
    ) -> None:
        raise NotImplementedError

    def scores(self, pictures: Sequence[Drawn]) -> list[dict[str, float]]:
        """Each picture's scores by name of metric; what a picture lacks something for, is not there."""
        raise NotImplementedError

    def set_scores(self, pictures: Sequence[Drawn]) -> dict[str, float]:
        """Of metrics that compare sets: the drawn pictures with all their references, each of those once.

        Beside them "drawn" and "real", the numbers of pictures; nothing where either is below two.
        """
        raise NotImplementedError

    def described(self) -> dict[str, Any]:
        """What a result has to say of how it was measured: models by hash, processors and their backends, versions."""
        raise NotImplementedError
