"""What a run needs and how long it will take, told before it starts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.paper import training
from benchmarks.paper.metrics import models_of
from benchmarks.paper.plan import Benchmark, Source, Subject
from benchmarks.paper.processes import Alone
from benchmarks.paper.settings import Settings
from benchmarks.paper.stages import Room
from networks.deft_config import DeftError

BASES = (
    Source("Stable Diffusion 1.5", "https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5",
           "CreativeML OpenRAIL-M"),
    Source("SDXL", "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0", "CreativeML OpenRAIL++-M"),
    Source("FLUX.1 dev", "https://huggingface.co/black-forest-labs/FLUX.1-dev", "FLUX.1 [dev] non-commercial"),
    Source("OmniGen", "https://huggingface.co/Shitao/OmniGen-v1-diffusers", "MIT"),
)  # fmt: skip


def told(benchmark: Benchmark, settings: Settings) -> str:
    """In lines."""
    lines, usable = [], {}
    for model in models_of(benchmark.metrics):
        path = settings.models.get(model.option)
        lacking = "not given: its metrics are left out" if path is None else _lacking(partial(model.check, path))
        usable[model.option] = None if lacking else path
        lines.append(_line(f"--{model.option}", model.source, lacking, path))
    subjects: list[Subject] = []
    lacking = _lacking(lambda: subjects.extend(benchmark.subjects(settings.data)))
    lines.insert(0, _line("--data", benchmark.data, lacking, settings.data))
    lines.insert(1, _base(settings, subjects))
    try:
        to_do = list(_to_do(Room(benchmark, replace(settings, models=usable), Alone())))
    except DeftError:  # which the lines before have told
        to_do = ["how much there is to do shows once the data and the base model are there"]
    return "\n".join([f"{benchmark.name}: what is needed", *lines, "", *to_do])


def _lacking(look: Callable[[], object]) -> str:
    """What is wrong with something; nothing, where it is right."""
    try:
        look()
    except DeftError as error:
        return str(error)
    return ""


def _line(option: str, source: Source, lacking: str, path: Path | None) -> str:
    state = f"MISSING ({lacking})" if lacking else f"there, {path}"
    return f"  {option}: {source.what}; {source.published}; {source.licence}\n    {state}"


def _base(settings: Settings, subjects: Sequence[Subject]) -> str:
    lacking = _lacking(lambda: training.check(settings, subjects))
    if not lacking:
        return f"  --model: the base model\n    there, {settings.model}"
    known = [f"\n    {one.what}; {one.published}; {one.licence}" for one in BASES]
    return f"  --model: the base model, for one of these{''.join(known)}\n    MISSING ({lacking})"


def _to_do(room: Room) -> Iterator[str]:
    settings, known = room.settings, room.finished()
    tuning, chosen = room.to_train(True), room.to_train(False)
    number = len(settings.adapters) * len(room.counted) * settings.seeds  # whatever their rates will be
    trainings = len(tuning) + number - sum(one.key in known for one in (*tuning, *chosen))
    pictures = _pictures(room.tuning, len(room.methods()) + 1) + settings.seeds * _pictures(
        room.counted, len(settings.adapters) + 1
    )
    planned, missing = 0, 0
    for some in (True, False):
        planned += sum(len(list(drawing.pictures())) for drawing in room.to_draw(some))
        missing += sum(len(left) for _, left in room.missing(some))
    yield "what there is to do"
    yield f"  {len(room.counted)} subjects are counted, {len(room.tuning)} more serve to choose rates"
    yield f"  trainings of {settings.steps} steps: {len(tuning) + number}, of which {trainings} are missing"
    left = pictures - planned + missing
    yield f"  pictures of {settings.size} x {settings.size}: {pictures}, of which {left} are missing"
    yield from _cost(room, trainings, left)


def _pictures(subjects: Sequence[Subject], methods: int) -> int:
    return methods * sum(asked.number for subject in subjects for asked in subject.asked)


def _cost(room: Room, trainings: int, pictures: int) -> Iterator[str]:
    """What is measured on what is there, for one process; scoring is not counted."""
    trained = [one for one in room.trainings.read() if "file" in one]
    drawn = [one for one in room.drawn.read() if (room.settings.output / one["picture"]).is_file()]
    if not trained or not drawn:
        yield "  time: not measured yet; it is once a training and a picture are there (--limit_subjects 1)"
    else:
        # the median: a first training may have drawn what `keep` is to keep
        a_step = statistics.median(one["seconds"] / int(one["method"].rsplit("|", 1)[1]) for one in trained)
        a_picture = statistics.median(one["seconds"] for one in drawn)
        hours = (trainings * room.settings.steps * a_step + pictures * a_picture) / 3600
        yield (
            f"  time of one process, without scoring: {hours:.1f} hours ({a_step:.3f} s a step, {a_picture:.2f} s a "
            f"picture, measured on {len(trained)} trainings and {len(drawn)} pictures here)"
        )
    a_file = sum(one["bytes"] for one in trained) / len(trained) if trained else math.nan
    a_png = sum((room.settings.output / one["picture"]).stat().st_size for one in drawn) / max(len(drawn), 1)
    adapters = f"{trainings * a_file / 2**30:.2f} GB of adapters" if trained else "adapters not measured yet"
    most = "" if drawn else "at most "
    a_png = a_png or 3 * room.settings.size**2
    yield f"  room on the disk: {adapters}, {most}{pictures * a_png / 2**30:.2f} GB of pictures"
