"""Graph200K, VisualCloze's data (arXiv 2504.07960), as tasks for OmniGen: pictures that are given -> one that is drawn.

Reads what `processing.py` of lzyhha/VisualCloze writes: SPLIT/data.json and its pictures. A subject is a task: one
adapter is trained on the rows of `train`, and draws those of `test`. FLUX Fill, on which VisualCloze itself stands, is
trained by nothing here.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any

from benchmarks.paper.cuts import Cuts
from benchmarks.paper.plan import Asked, Row, Subject
from networks.deft_config import DeftError, nearest

PUBLISHED = "https://huggingface.co/datasets/VisualCloze/Graph200K"
MAKE = "python processing.py --split {split} --target_path FOLDER, of https://github.com/lzyhha/VisualCloze, makes it"
CONSISTENT = 3  # the least objectConsistency with which VisualCloze uses a reference
TUNING_ROWS = 20  # of `test`, behind those that are drawn: rates are chosen on them, for the first task
STYLES = ("InstantStyle", "ReduxStyle")
# what is asked of the model: ours, since the authors' own are not published. {text} is the row's description, which is
# left out where something else than the picture itself is to be drawn
PLAIN = "{text} Follow the {conditions}."
OTHER = "Show the {target} of {given}."
IN_CONTEXT = "Examples: {examples}. Now do the same to {given}. {text}"
FIELDS = {"text", "conditions", "given", "examples", "target"}
_PLACEHOLDER = re.compile(r"</?img>|<\|image_\d+\|>")  # of pictures, in a description

CHUNK = 1 << 20  # characters that are read at once
LONGEST = 1 << 24  # of a row


@dataclass(frozen=True)
class Task:
    """Pictures of a row that are given, and one that is to be drawn, by their names in data.json."""

    given: tuple[str, ...]
    target: str

    @property
    def name(self) -> str:
        """As in file names and results."""
        given = "+".join(self.given)
        return given if self.target == "target" else f"{given}-to-{self.target}"


@dataclass(frozen=True)
class Protocol:
    """What of Graph200K is made into subjects.

    :param context: rows that are shown solved before the one that is asked
    :param train_rows: of each task, the first ones
    :param rows: that are drawn for each task, the first ones of `test`
    :param instruction: a template as `PLAIN`, `OTHER` and `IN_CONTEXT`, of which None chooses
    """

    tasks: tuple[str, ...] = ("canny", "depth")
    context: int = 0
    train_rows: int = 2000
    rows: int = 200
    instruction: str | None = None


def task_of(text: str) -> Task:
    """`canny`, `reference+depth` or, with another target, `target:depth`.

    :raises DeftError: for anything else
    """
    given, _, target = text.partition(":")
    names = tuple(given.split("+"))
    if not all(names) or text.endswith(":"):
        raise DeftError(f"--tasks {text}: give a condition, as in canny, reference+depth, or target:depth")
    return Task(names, target or "target")


def subjects(data: Path, cuts: Cuts, protocol: Protocol) -> list[Subject]:
    """One for each task, and where `test` has rows to spare one more, to choose rates on.

    :param cuts: makes what is shown in context
    :raises DeftError: when the data or a task's rows are not there
    """
    check_instruction(protocol)
    for option, number in (("train_rows", protocol.train_rows), ("rows", protocol.rows)):
        if number < 1:
            raise DeftError(f"--{option} {number}: give at least 1")
    tasks = [task_of(text) for text in protocol.tasks]
    train = _with_all(tasks, data, "train", protocol.train_rows)
    test = _with_all(tasks, data, "test", protocol.rows + TUNING_ROWS)
    found = [_subject(task, train[task], test[task][: protocol.rows], cuts, protocol) for task in tasks]
    first, spare = tasks[0], test[tasks[0]][protocol.rows :]
    if spare:
        tuning = _subject(first, train[first], spare, cuts, protocol)
        found.append(replace(tuning, name=f"{first.name}-tuning", tuning=True))
    return found


@dataclass(frozen=True)
class Found:
    """A row that a task can use."""

    index: int
    text: str
    given: tuple[Path, ...]
    target: Path


def _subject(task: Task, train: Sequence[Found], test: Sequence[Found], cuts: Cuts, protocol: Protocol) -> Subject:
    if len(train) <= protocol.context:
        raise DeftError(f"--context {protocol.context}: {len(train)} rows to train {task.name} on are too few")
    rows, asked = [], []
    for found in train:
        inputs = (*_shown(task, found, train, cuts, protocol.context), *found.given)
        rows.append(Row(found.target, instruction_of(task, found.text, protocol), inputs))
    for found in test:
        inputs = (*_shown(task, found, train, cuts, protocol.context), *found.given)
        prompt = instruction_of(task, found.text, protocol)
        asked.append(Asked(found.index, prompt, found.text, inputs=inputs, references=(found.target,)))
    return Subject(task.name, tuple(rows), tuple(asked), tuple(one.target for one in test), group=task.name)


def _shown(task: Task, found: Found, train: Sequence[Found], cuts: Cuts, context: int) -> list[Path]:
    """Pictures of other rows of `train`, solved, always the same for a row."""
    chance = random.Random(f"{task.name} {found.index}")
    examples = [one for one in chance.sample(train, context + 1) if one != found][:context]
    return [cuts.add("context", picture) for one in examples for picture in (*one.given, one.target)]


# --- what is asked ---------------------------------------------------------------------------------------------------


def instruction_of(task: Task, text: str, protocol: Protocol) -> str:
    """A template filled in, with `<img><|image_k|></img>` for the k-th picture that is given."""
    each = len(task.given)
    first = protocol.context * (each + 1) + 1  # number of the picture that is asked about
    its_own = task.target == "target"
    template = protocol.instruction or (IN_CONTEXT if protocol.context else PLAIN if its_own else OTHER)
    values = {
        "conditions": _and(f"{name} of {_image(first + i)}" for i, name in enumerate(task.given)),
        "given": _and(_image(first + i) for i in range(each)),
        "examples": ", ".join(_example(i * (each + 1) + 1, each) for i in range(protocol.context)),
        "target": task.target,
        "text": text if its_own else "",
    }
    return re.sub(r"\{(\w+)\}", lambda field: values[field[1]], template).strip()


def check_instruction(protocol: Protocol) -> None:
    """:raises DeftError: when a template asks for what there is not, or does not show all pictures"""
    template = protocol.instruction
    if template is None:
        return
    fields = set(re.findall(r"\{(\w+)\}", template))
    if unknown := fields - FIELDS:
        name = min(unknown)
        raise DeftError(f"--instruction: {{{name}}}: allowed are {', '.join(sorted(FIELDS))}{nearest(name, FIELDS)}")
    if len(fields & {"conditions", "given"}) != 1:
        raise DeftError("--instruction: either {given} or {conditions} has to be in it")
    if (protocol.context > 0) != ("examples" in fields):
        raise DeftError(
            f"--instruction: {{examples}} belongs to --context 1 and 2; this is --context {protocol.context}"
        )


def _example(first: int, each: int) -> str:
    return f"{_and(_image(first + i) for i in range(each))} becomes {_image(first + each)}"


def _image(number: int) -> str:
    return f"<img><|image_{number}|></img>"


def _and(words: Iterable[str]) -> str:
    return " and ".join(words)


# --- data.json -------------------------------------------------------------------------------------------------------


def _with_all(tasks: Sequence[Task], data: Path, split: str, number: int) -> dict[Task, list[Found]]:
    """The first rows of each task, read until there are enough.

    :raises DeftError: when the split is not there, or has no row for a task
    """
    folder = data / split
    found: dict[Task, list[Found]] = {task: [] for task in tasks}
    names: set[str] = set()
    for index, row in enumerate(rows_of(folder / "data.json", split)):
        names.update(_pictures(row, index, folder))
        wanting = [task for task in tasks if len(found[task]) < number]
        if not wanting:
            break
        for task in wanting:
            if one := _found(task, row, index, folder):
                found[task].append(one)
    for task in tasks:
        if not found[task]:
            missing = [name for name in (*task.given, task.target) if name not in names]
            raise DeftError(f"--tasks {task.name}: no row of {folder / 'data.json'} has {_missing(missing, names)}")
    return found


def _missing(missing: Sequence[str], names: set[str]) -> str:
    if not missing:
        return f"all of its pictures, a description, and an objectConsistency of {CONSISTENT}, if there is a reference"
    return f"a picture {missing[0]}{nearest(missing[0], names)}; there are {', '.join(sorted(names))}"


def rows_of(file: Path, split: str) -> Iterator[dict[str, Any]]:
    """Rows of a list in JSON, one by one: that of `train` has hundreds of megabytes, of which the first are used.

    :raises DeftError: when there is no such file, or it is damaged
    """
    damaged = DeftError(f"{file}: no list of rows, or cut off; {MAKE.format(split=split)}")
    decoder = json.JSONDecoder()
    try:
        with open(file, encoding="utf-8-sig") as stream:
            text, at = stream.read(CHUNK).lstrip(), 1
            if not text.startswith("["):
                raise damaged
            while True:
                while at < len(text) and text[at] in " \t\r\n,":
                    at += 1
                if text.startswith("]", at):
                    return
                try:
                    row, at = decoder.raw_decode(text, at)
                except json.JSONDecodeError:
                    more = stream.read(CHUNK)
                    if not more or len(text) - at > LONGEST:
                        raise damaged from None
                    text, at = text[at:] + more, 0
                    continue
                if not isinstance(row, dict):
                    raise damaged
                yield row
    except (OSError, UnicodeDecodeError) as error:
        raise DeftError(f"{file}: cannot be read; {MAKE.format(split=split)} from {PUBLISHED}") from error


def _found(task: Task, row: dict[str, Any], index: int, folder: Path) -> Found | None:
    """What a task uses of a row; None when something is missing, or its reference shows another object."""
    pictures, text = _pictures(row, index, folder), _text(row)
    wanted = (*task.given, task.target)
    if not text or any(name not in pictures for name in wanted):
        return None
    if "reference" in wanted and not _consistent(row):
        return None
    for name in wanted:
        if not pictures[name].is_file():
            raise DeftError(f"{pictures[name]}: missing, but row {index} of {folder / 'data.json'} names it")
    return Found(index, text, tuple(pictures[name] for name in task.given), pictures[task.target])


def _text(row: dict[str, Any]) -> str:
    description = row.get("description")
    text = description.get("description_0") if isinstance(description, dict) else None
    return " ".join(_PLACEHOLDER.sub(" ", text).split()) if isinstance(text, str) else ""


def _consistent(row: dict[str, Any]) -> bool:
    quality = row.get("quality_assessment")
    score = quality.get("objectConsistency") if isinstance(quality, dict) else None
    return isinstance(score, (int, float)) and score >= CONSISTENT


def _pictures(row: dict[str, Any], index: int, folder: Path) -> dict[str, Path]:
    """By their names in data.json; of an edit's or a style's several the first, and `…_ref` for the style itself."""
    condition = row.get("condition")
    if not isinstance(condition, dict):
        raise DeftError(f"{folder / 'data.json'}: row {index} has no condition")
    found: dict[str, Path] = {}
    for name, value in condition.items():
        if isinstance(value, str):
            found[name] = rerooted(value, folder, index)
        elif isinstance(value, dict) and _first(value, "image_path"):
            found[name] = rerooted(_first(value, "image_path"), folder, index)
            if name in STYLES and _first(value, "style_path"):
                found[f"{name}_ref"] = rerooted(_first(value, "style_path"), folder, index)
    return found


def _first(value: dict[str, Any], key: str) -> str:
    paths = value.get(key)
    return paths[0] if isinstance(paths, list) and paths and isinstance(paths[0], str) else ""


def rerooted(path: str, folder: Path, index: int) -> Path:
    """What lies behind `SPLIT/` of a path on the machine that made the data, of any system, in this split's folder.

    :raises DeftError: when the path does not hold the split's name
    """
    parts = PureWindowsPath(path).parts  # both kinds of slashes
    behind = [i for i, part in enumerate(parts) if part == folder.name]
    if not behind or ".." in parts:
        raise DeftError(f"{folder / 'data.json'}: row {index} names {path}, which is not in a folder {folder.name}")
    return folder.joinpath(*parts[behind[-1] + 1 :])
