"""Writes NAME.html: after every save and every round of samples, and when a training ends in whatever way."""

from __future__ import annotations

import base64
import functools
import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library import pages
from library.options.rooms import ReportOptions
from library.prompts import Prompt
from library.report import curves, rounds
from library.report.rounds import Pictures
from library.report.told import Told
from library.training import interrupts, naming
from library.training.record import Record, Saved
from library.training.state import Length, Position
from networks import deft_io
from networks.deft_config import reason_of

if TYPE_CHECKING:
    from jinja2 import Template

logger = logging.getLogger(__name__)

TEMPLATE = "page.html"
HERE = Path(__file__).parent
LETTERS = 300  # of a setting or a prompt
FILES = 200  # in the table at most: the last ones, and the named one
LEARNT, DRIFT = "meter/learnt", "meter/drift"


@dataclass(frozen=True)
class File:
    """A row of the table. Meters are None where none was measured at its step, the size where the file is gone."""

    saved: Saved
    size: int | None
    learnt: str | None
    drift: str | None

    @property
    def megabytes(self) -> str:
        return "" if self.size is None else f"{self.size / 1e6:,.1f} MB"


class Report:
    """The page of a training, and what it remembers between two writes.

    A page that cannot be written is reported once, and does not end a training.

    :param folder: --output_dir
    :param name: the adapter's
    :param model: its file or folder
    :param pictures: that are trained on
    :param told: what the training has warned of
    :param writes: whether this process is the main one
    """

    def __init__(
        self,
        options: ReportOptions,
        folder: Path,
        name: str,
        model: str,
        prompts: Sequence[Prompt],
        pictures: Sequence[Path],
        length: Length,
        position: Position,
        record: Record,
        told: Told,
        writes: bool,
    ):
        self.options, self.folder, self.name, self.model = options, folder, name, model
        self.prompts, self.trained_on, self.length = prompts, rounds.spread(pictures), length
        self.position, self.record, self.told = position, record, told
        self.writes = writes and not options.no_report
        self.file, self.pictures, self.failed = folder / f"{name}.html", Pictures(folder), False
        self.first, self.start = position.step, time.monotonic()

    def write(self, ended: str = "") -> None:
        """:param ended: how, for a training that is over"""
        if not self.writes:
            return
        try:
            deft_io.write_whole(self.file, render(self._facts(ended)).encode("utf-8", "replace"))
        except Exception as error:  # a full disk, whatever Pillow raises
            if not self.failed:
                logger.error(f"{self.file}: the report is not written, the training goes on ({reason_of(error)})")
            self.failed = True

    def _facts(self, ended: str) -> dict[str, Any]:
        """What the template shows."""
        record, step = self.record, self.position.step
        steps = curves.steps_of(record.curves, step)
        best = naming.best(record, self.folder)
        named = best.file if best else None
        files = [self._row(one) for one in record.files if one in record.files[-FILES:] or one == named]
        shown = rounds.prompts_of(record.samples)
        trained_on = self.pictures.read(self.trained_on, rounds.SMALL).values() if record.samples else ()
        return {
            "name": self.name,
            "model": self.model,
            "ended": ended,
            "position": self.position,
            "length": self.length,
            "written": time.strftime("%Y-%m-%d %H:%M"),
            "time": self._time(ended),
            "named": next((one for one in files if one.saved == named), None),
            "last_measured": next((one for one in reversed(files) if one.learnt), None),
            "files": files,
            "at_step": {one.saved.step: one.saved.name for one in files},
            "earlier_files": len(record.files) - len(files),
            "measured": any(record.curves.get(name) for name in (LEARNT, DRIFT)),
            "facts": list(_last_values(record)),
            "warnings": self.told.lines(),
            "rounds": self.pictures.rounds(record.samples) if record.samples else [],
            "prompts": [self.prompts[one] if one < len(self.prompts) else None for one in shown],
            "more_prompts": len({one.prompt for one in record.samples}) - len(shown),
            "drawn": len({one.step for one in record.samples}),
            "trained_on": [one for one in trained_on if one],
            "steps": steps,
            "step_ticks": curves.steps_told(steps),
            "panels": curves.panels(record.curves, steps),
            "settings": {name: _words(value) for name, value in self.options.settings.items()},
            "command": interrupts.command(self.options.arguments),
        }

    def _row(self, saved: Saved) -> File:
        try:
            size = (self.folder / saved.name).stat().st_size
        except (OSError, ValueError):
            size = None
        learnt = None if saved.learnt is None else curves.told(saved.learnt, percent=True)
        return File(saved, size, learnt, None if saved.drift is None else curves.told(saved.drift))

    def _time(self, ended: str) -> dict[str, str]:
        """How long it took since it began or went on, and what is left at this speed."""
        passed, done = time.monotonic() - self.start, self.position.step - self.first
        left = passed / done * (self.length.steps - self.position.step) if done and not ended else 0.0
        return {"passed": _duration(passed), "left": _duration(left) if left else ""}


def render(facts: Mapping[str, Any]) -> str:
    """The whole page, everything of the user's in it escaped."""
    return _template().render(facts)


@functools.cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # only by now: --help waits for no template
    from markupsafe import Markup

    def shown(value: object) -> object:
        return value if isinstance(value, Markup) else pages.plain(value)

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, finalize=shown, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    own = {
        "style": pages.style() + (HERE / "style.css").read_text(encoding="utf-8"),
        "script": (HERE / "script.js").read_text(encoding="utf-8"),
    }
    environment.globals |= {name: Markup(content) for name, content in own.items()}
    environment.globals |= {f"{name}_hash": _hash(content) for name, content in own.items()}
    return environment.get_template(TEMPLATE)


def _hash(content: str) -> str:
    """By which a Content-Security-Policy allows a part of the page."""
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def _last_values(record: Record) -> Any:
    """(what, its last value) of the figures that say most."""
    names = {
        LEARNT: "learnt", DRIFT: "drift", "loss/average": "loss, mean of 100",
        "loss/validation/step_average": "validation loss", "loss/validation/epoch_average": "validation loss",
    }  # fmt: skip
    latest: dict[str, tuple[int, str]] = {}
    for name, what in names.items():
        curve = record.curves.get(name)
        if curve and curve.values and curve.steps[-1] >= latest.get(what, (0, ""))[0]:
            latest[what] = curve.steps[-1], curves.told(curve.values[-1], name == LEARNT)
    for what, (_, value) in latest.items():
        yield what, value


def _words(value: object) -> str:
    """A setting's value as it is written in a configuration, cut where it is long."""
    words = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else "on" if value is True else str(value)
    return words if len(words) <= LETTERS else f"{words[:LETTERS]}…"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
