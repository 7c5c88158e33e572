"""Which of a training's files to take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.training.record import Record, Saved
from library.training.watch import NOTHING

ENOUGH = 0.95  # of the most that was learnt


@dataclass(frozen=True)
class Best:
    """:param file: the earliest that is still there and has learnt enough
    :param last: the last one, which has learnt longest
    :param earlier: the step at which as much was learnt clearly before the first save; None where there is none
    """

    file: Saved
    last: Saved
    earlier: int | None

    def line(self) -> str:
        """For the log."""
        file, last = self.file, self.last
        found = f"{file.name} (step {file.step}) is the earliest file that has learnt enough: {_told(file)}"
        if file != last:
            found += f"; the last, {last.name} (step {last.step}): {_told(last)}"
        if self.earlier is not None:
            step = self.earlier
            found += f". As much was learnt at step {step}: --save_every_n_steps {step} would have saved it"
        return found


def best(record: Record, folder: Path) -> Best | None:
    """The earliest file with `ENOUGH` of the most that any of them has learnt; None where nothing was measured or
    learnt.

    :param folder: of the files, --output_dir
    """
    measured = [(one, one.learnt) for one in record.files if one.learnt is not None and one.drift is not None]
    most = max((learnt for _, learnt in measured), default=0.0)
    there = [one for one, learnt in measured if learnt >= ENOUGH * most and (folder / one.name).is_file()]
    if most < NOTHING or not there:
        return None
    file = min(there, key=lambda one: one.step)
    first, curve = min(one.step for one, _ in measured), record.curves.get("meter/learnt")
    points = zip(curve.steps, curve.values, strict=True) if curve else ()
    earlier = next((step for step, learnt in points if learnt >= ENOUGH * most), None)
    clearly = earlier is not None and earlier <= 0.75 * first
    return Best(file, max((one for one, _ in measured), key=lambda one: one.step), earlier if clearly else None)


def _told(file: Saved) -> str:
    return f"learnt {file.learnt:.3f}, drift {file.drift:.3g}"
