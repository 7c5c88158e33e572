"""The subjects of a run: what is left of a benchmark's by the limits, and the manifest that says what they were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.paper.metrics import files_of
from benchmarks.paper.plan import Asked, Subject
from benchmarks.paper.records import read_json, write_json
from benchmarks.paper.settings import Settings
from benchmarks.paper.training import write_data
from library.data.index import Index
from networks.deft_config import DeftError, reason_of
from networks.deft_progress import Bar

TUNING_PICTURES = 1  # of each prompt, while rates are chosen


def limited(subjects: Iterable[Subject], settings: Settings) -> list[Subject]:
    """Those that are used, with the prompts that are used.

    :raises DeftError: for names that are there twice
    """
    found, several = list(subjects), Counter(subject.name for subject in subjects)
    if twice := [name for name, number in several.items() if number > 1]:
        raise DeftError(f"--data {settings.data}: two subjects are named {twice[0]}")
    parts = ([one for one in found if one.tuning == tuning][: settings.limit_subjects] for tuning in (True, False))
    kept = {one.name for part in parts for one in part}
    return [replace(one, asked=_asked(one, settings)) for one in found if one.name in kept]


def _asked(subject: Subject, settings: Settings) -> tuple[Asked, ...]:
    kinds: Counter[str] = Counter()
    found = []
    for asked in subject.asked:
        kinds[asked.category] += 1
        if settings.limit_prompts is None or kinds[asked.category] <= settings.limit_prompts:
            number = TUNING_PICTURES if subject.tuning else settings.images_per_prompt or asked.number
            found.append(replace(asked, number=number))
    return tuple(found)


def prepare(subjects: Sequence[Subject], settings: Settings, benchmark: str) -> None:
    """Looks at every picture, writes what the trainer reads, and `manifest.json`, by which a later run in the same
    folder knows that it is of the same data and settings.

    :param benchmark: its name
    :raises DeftError: for a picture that cannot be read, or a folder with other results
    """
    now = _manifest(subjects, settings, benchmark)
    file = settings.output / "manifest.json"
    then = read_json(file)
    if then:
        _compare(then, now, settings)
    _check_pictures(subjects, {Path(p) for p in then.get("pictures", {})})
    for subject in subjects:
        write_data(settings, subject)
    for part in ("subjects", "pictures", "models"):
        now[part] = then.get(part, {}) | now[part]
    write_json(file, now)


def _pictures(subjects: Iterable[Subject]) -> list[Path]:
    found = [
        path
        for subject in subjects
        for path in (
            *(p for row in subject.rows for p in (row.picture, *row.inputs)),
            *subject.references,
            *(p for asked in subject.asked for p in (*asked.inputs, *(asked.references or ()))),
        )
    ]
    return list(dict.fromkeys(found))


def _manifest(subjects: Sequence[Subject], settings: Settings, benchmark: str) -> dict[str, Any]:
    pictures = _pictures(subjects)
    if missing := next((path for path in pictures if not path.is_file()), None):
        raise DeftError(f"--data {settings.data}: {missing} is not there")
    index = Index(settings.output / "cache")
    hashes = index.hashes(pictures)
    return {
        "settings": {
            "benchmark": benchmark, "model": str(settings.model.resolve()), "size": settings.size,
            "guidance": settings.guidance, "drawing_steps": settings.drawing_steps, "precision": settings.precision,
            "config": settings.config and settings.config.read_text(encoding="utf-8-sig"),
        },
        "subjects": {one.name: _described(one) for one in subjects},
        "pictures": {str(path): hashes.get(path, "") for path in pictures},
        "models": {option: _hashes(path, index) for option, path in settings.models.items() if path is not None},
    }  # fmt: skip


def _hashes(model: Path, index: Index) -> dict[str, str]:
    """Of a metric's model: file's name -> hash."""
    return {file.name: found for file, found in index.hashes(files_of(model)).items()}


def _described(subject: Subject) -> dict[str, Any]:
    return {
        "group": subject.group,
        "tuning": subject.tuning,
        "rows": [[str(row.picture), row.caption, *map(str, row.inputs)] for row in subject.rows],
        "prompts": {str(one.index): [one.prompt, *map(str, one.inputs)] for one in subject.asked},
    }


def _compare(then: Mapping[str, Any], now: Mapping[str, Any], settings: Settings) -> None:
    """:raises DeftError: where something is another that trainings or pictures depend on"""
    different = f"--output {settings.output}: its results are of another"
    for name, value in now["settings"].items():
        if then["settings"].get(name) != value:
            raise DeftError(f"{different} {name}, {then['settings'].get(name)} and not {value}; give another --output")
    if (settings.output / "scores.jsonl").is_file():
        for option in then.get("models", {}).keys() & now["models"].keys():
            if then["models"][option] != now["models"][option]:
                raise DeftError(f"--{option} {settings.models[option]}: another has scored {settings.output}; give "
                                f"that one, or remove scores.jsonl there to score all anew")  # fmt: skip
    for path in then["pictures"].keys() & now["pictures"].keys():
        if then["pictures"][path] != now["pictures"][path]:
            raise DeftError(f"{different} {path}, which has changed; give another --output")
    for name in then["subjects"].keys() & now["subjects"].keys():
        old, new = then["subjects"][name], now["subjects"][name]
        same = all(old["prompts"].get(index, told) == told for index, told in new["prompts"].items())
        if not same or any(old[part] != new[part] for part in ("group", "tuning", "rows")):
            raise DeftError(f"{different} {name}: other pictures, captions or prompts, or a part in the choice of "
                            f"rates; give another --output")  # fmt: skip


def _check_pictures(subjects: Sequence[Subject], known: set[Path]) -> None:
    """:param known: that have been looked at
    :raises DeftError: for one that cannot be read, which the trainer would leave out
    """
    pictures = [path for path in _pictures(subjects) if path not in known]
    with Bar(len(pictures), "looking at pictures", "pictures") as bar:
        for path in pictures:
            try:
                with Image.open(path) as image:
                    image.load()
            except Exception as error:  # of many kinds
                raise DeftError(f"{path}: not a readable picture ({reason_of(error)})") from None
            bar.add(1)
