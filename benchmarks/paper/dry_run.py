"""What a run needs and how long it will take, told before it starts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from benchmarks.paper import training
from benchmarks.paper.metrics import MODELS, models_of
from benchmarks.paper.plan import Benchmark, Subject
from benchmarks.paper.processes import Alone
from benchmarks.paper.settings import Settings
from benchmarks.paper.stages import Room
from networks.deft_config import DeftError


def told(benchmark: Benchmark, settings: Settings) -> str:
    """In lines."""
    lines = [f"{benchmark.name}: what is needed", *_needed(benchmark, settings)]
    try:
        room = Room(benchmark, settings, Alone())
        return "\n".join([*lines, "", *_to_do(room)])
    except DeftError as error:
        return "\n".join([*lines, "", f"how much there is to do cannot be told: {error}"])


def _needed(benchmark: Benchmark, settings: Settings) -> Iterator[str]:
    data = benchmark.data
    state = "there"
    try:
        benchmark.subjects(settings.data)
    except DeftError as error:
        state = f"MISSING ({error})"
    yield f"  data: {data.what}, {data.published}, {data.licence}: {state}"
    try:
        training.check(settings)
        state = "there"
    except DeftError as error:
        state = f"MISSING ({error})"
    yield f"  base model: --model {settings.model}: {state}"
    for model in models_of(benchmark.metrics):
        path = settings.models.get(model.option)
        state = "MISSING: its metrics are left out"
        if path is not None:
            try:
                MODELS[model.option].check(path)
                state = f"there, {path}"
            except DeftError as error:
                state = f"MISSING ({error})"
        source = model.source
        yield f"  --{model.option}: {source.what}, {source.published}, {source.licence}: {state}"


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
