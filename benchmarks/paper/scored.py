"""What a run has scored, from `results.json` and the lines beside it: each subject's means, and what is missing."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.paper.metrics import METRICS, PRIOR
from benchmarks.paper.plan import REAL
from benchmarks.paper.records import lines_of, read_json
from networks.deft_config import DeftError

RECORDS, SCORES = "records.jsonl", "scores.jsonl"


class Method(NamedTuple):
    """A row of the tables.

    :param key: in the records: adapter|rank|rate|steps, or an anchor's
    :param chosen: whether its rate is its adapter's best on the tuning subjects; anchors always are
    """

    key: str
    adapter: str
    rank: int | None = None
    rate: float | None = None
    steps: int | None = None
    parameters: int | None = None
    chosen: bool = True


class Told(NamedTuple):
    """What the results say of a subject.

    :param pictures: how many are expected of each method: prompts' category -> number
    :param references: its real pictures, for the contact sheet
    """

    group: str
    tuning: bool
    pictures: Mapping[str, int]
    references: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Scored:
    """A run's results.

    :param records: a drawn picture's path, relative to the results' folder -> its record
    :param scores: lines of scores, one a picture; of real pictures several a subject
    :param sets: lines of scores of a subject's pictures together, or of all where the subject is ""
    :param sets_of: category of prompts that those are of; "" for all
    """

    folder: Path
    settings: Mapping[str, Any]
    methods: Mapping[str, Method]
    subjects: Mapping[str, Told]
    notes: tuple[str, ...]
    records: Mapping[str, Mapping[str, Any]]
    scores: tuple[Mapping[str, Any], ...]
    sets: tuple[Mapping[str, Any], ...]
    sets_of: str = ""

    @functools.cached_property
    def _by_method(self) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        found: dict[str, list[Mapping[str, Any]]] = {}
        for row in (*self.scores, *self.sets):
            found.setdefault(row["method"], []).append(row)
        return found

    def counted(self, tuning: bool = False) -> list[str]:
        """The subjects that results are means over, or those that rates were chosen on."""
        return [name for name, told in self.subjects.items() if told.tuning == tuning]

    def of_subjects(self, method: str, metric: str, of: str = "", tuning: bool = False) -> dict[str, float]:
        """Each subject's mean over its pictures and seeds; of `of` alone, which is a category of prompts or a group of
        subjects. Subjects without a score are left out: `missing` counts them."""
        wanted = set(self.counted(tuning))
        found: dict[str, list[float]] = {}
        for row in self._by_method.get(method, ()):
            name, value = row["subject"], _number(row.get(metric))
            if name in wanted and value is not None and self._is_of(row, of):
                found.setdefault(name, []).append(value)
        return {name: math.fsum(values) / len(values) for name, values in found.items()}

    def of_all(self, method: str, metric: str) -> tuple[float, Mapping[str, Any]] | None:
        """A score that all of a method's pictures have together, and its line: with how many of them, `drawn`, and
        beside how many real ones, `real`."""
        rows = [row for row in self.sets if row["method"] == method and not row["subject"]]
        return next(((value, row) for row in rows if (value := _number(row.get(metric))) is not None), None)

    def missing(self, method: str, metric: str, of: str = "", tuning: bool = False) -> dict[str, int]:
        """How many pictures that were asked for have no score of this metric: subject -> number, where there are any.

        Of real pictures, and of a score that a subject's pictures have together, it is the subject, as 1; of a score of
        all pictures it is "all".
        """
        if METRICS[metric].of_sets and self.sets_of:
            of = self.sets_of
        expected = {name: _expected(self.subjects[name], metric, of) for name in self.counted(tuning)}
        if (whole := self.of_all(method, metric)) is not None:
            lacking = sum(expected.values()) - whole[1].get("drawn", 0) if method != REAL else 0
            return {"all": lacking} if lacking > 0 else {}
        if method == REAL or METRICS[metric].of_sets:
            there = self.of_subjects(method, metric, of, tuning)
            return {name: 1 for name, asked in expected.items() if asked and name not in there}
        scored = self._of_pictures(method, metric, of)
        return {name: asked - scored[name] for name, asked in expected.items() if asked > scored[name]}

    def _of_pictures(self, method: str, metric: str, of: str) -> Counter[str]:
        return Counter(
            row["subject"]
            for row in self._by_method.get(method, ())
            if _number(row.get(metric)) is not None and self._is_of(row, of)
        )

    def _is_of(self, row: Mapping[str, Any], of: str) -> bool:
        told = self.subjects.get(row["subject"])
        return not of or of == row.get("category") or (told is not None and of == told.group)


def _expected(told: Told, metric: str, of: str) -> int:
    """How many of a subject's pictures have a score of a metric when none is missing."""
    asked = {name: number for name, number in told.pictures.items() if (name == PRIOR) == METRICS[metric].prior}
    return sum(asked.values()) if of in ("", told.group) else asked.get(of, 0)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def read(results: Path) -> Scored:
    """A run's `results.json`, and the records and scores in its folder.

    :raises DeftError: where there is none, or it is no run's
    """
    told = read_json(results)
    if not told:
        raise DeftError(f"{results}: there are no results yet")
    try:
        methods = {key: _method(key, said) for key, said in told["methods"].items()}
        subjects = {name: _subject(said) for name, said in told["subjects"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise DeftError(f"{results}: holds no results of a benchmark ({type(error).__name__}: {error})") from None
    folder = results.parent
    records = {record["picture"]: record for record in lines_of(folder / RECORDS)}
    subjects = {name: _with_all(said, name, records.values()) for name, said in subjects.items()}
    pictures: dict[Any, dict[str, Any]] = {}
    sets: dict[Any, dict[str, Any]] = {}
    for number, line in enumerate(lines_of(folder / SCORES)):
        row = {"subject": "", **records.get(line.get("picture", ""), {}), **line}
        if "method" not in row:  # a picture that no record names any more
            continue
        if "picture" in line:  # once more scored: the last line counts
            pictures[row["method"], row["picture"]] = row
        elif row["method"] == REAL and row["subject"]:
            pictures[REAL, number] = row
        else:
            key = row["method"], row["subject"]
            sets[key] = sets.get(key, {}) | row
    return Scored(folder, told.get("settings", {}), methods, subjects, tuple(told.get("notes", ())), records,
                  tuple(pictures.values()), tuple(sets.values()), told.get("sets_of", ""))  # fmt: skip


def _with_all(told: Told, name: str, records: Iterable[Mapping[str, Any]]) -> Told:
    """Of every method what any has drawn: another command line may have asked for more prompts, and means of other
    prompts cannot be compared."""
    asked: dict[str, set[tuple[Any, ...]]] = {}
    for one in records:
        if one["subject"] == name:
            asked.setdefault(one.get("category", ""), set()).add((one["index"], one["k"], one["seed"]))
    most = {kind: max(len(found), told.pictures.get(kind, 0)) for kind, found in asked.items()}
    return told._replace(pictures={**told.pictures, **most})


def _method(key: str, said: Mapping[str, Any]) -> Method:
    return Method(
        key, said.get("adapter", key), said.get("rank"), said.get("rate"), said.get("steps"), said.get("parameters"),
        said.get("rate_chosen", True),
    )  # fmt: skip


def _subject(said: Mapping[str, Any]) -> Told:
    return Told(
        said.get("group", ""), bool(said.get("tuning")), said["pictures"],
        tuple(Path(path) for path in said.get("references", ())),
    )  # fmt: skip
