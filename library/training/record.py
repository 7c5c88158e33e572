"""What has happened in a training so far: its curves, its files, its samples. States keep it, so that a training that
goes on has all of it."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from networks.deft_config import DeftError, read_text, reason_of

logger = logging.getLogger(__name__)

FILE = "record.json"
POINTS = 1000  # of a curve at least, where there were so many; at most twice as many are kept


class Reading(NamedTuple):
    """What the meters show at a step."""

    step: int
    drift: float
    learnt: float

    def logged(self) -> dict[str, float]:
        """Under the names of the logs."""
        return {"meter/drift": self.drift, "meter/learnt": self.learnt}

    def fields(self) -> dict[str, str]:
        """Of a file's metadata."""
        return {"ss_meter_drift": f"{self.drift:.5g}", "ss_meter_learnt": f"{self.learnt:.5g}"}


@dataclass(frozen=True)
class Saved:
    """An adapter's file, which may be gone by now.

    :param name: in --output_dir
    :param drift: of `library.training.meters`, as `learnt`; None where it was not measured
    """

    name: str
    step: int
    epoch: int
    drift: float | None = None
    learnt: float | None = None


@dataclass(frozen=True)
class Drawn:
    """A sample.

    :param name: in --output_dir, with slashes
    :param prompt: its number, from 0
    """

    name: str
    step: int
    prompt: int


@dataclass
class Curve:
    """Values at steps, in their order; of long ones every so many steps are kept.

    :param every: steps between those that are kept
    """

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    every: int = 1

    def add(self, step: int, value: float) -> None:
        """Replaces what is there of the same step."""
        if self.steps and self.steps[-1] == step:
            self.values[-1] = value
        elif step % self.every == 0:
            self.steps.append(step)
            self.values.append(value)
            if len(self.steps) >= 2 * POINTS:
                self._thin()

    def _thin(self) -> None:
        self.every *= 2
        kept = [(step, value) for step, value in zip(self.steps, self.values, strict=True) if step % self.every == 0]
        self.steps, self.values = [step for step, _ in kept], [value for _, value in kept]


@dataclass
class Record:
    """:param curves: under the names of the logs"""

    curves: dict[str, Curve] = field(default_factory=dict)
    files: list[Saved] = field(default_factory=list)
    samples: list[Drawn] = field(default_factory=list)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """What is not finite is left out."""
        for name, value in values.items():
            if math.isfinite(value):
                self.curves.setdefault(name, Curve()).add(step, float(value))

    def saved(self, file: Saved) -> None:
        """One that was written, or written again."""
        self.files = [one for one in self.files if one.name != file.name] + [file]

    def write(self, folder: Path) -> None:
        """Into a state's folder.

        :raises OSError: when it cannot be written
        """
        (folder / FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> Record:
        """Of a state; an empty one with a warning where it cannot be read, since a training does not depend on it."""
        file = folder / FILE
        try:
            content = json.loads(read_text(file, f"{file}:"))
            return Record(
                {str(name): Curve(**curve) for name, curve in content["curves"].items()},
                [Saved(**one) for one in content["files"]],
                [Drawn(**one) for one in content["samples"]],
            )
        except (DeftError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            logger.warning(f"{file}: what was measured before cannot be shown ({reason_of(error)})")
            return Record()
