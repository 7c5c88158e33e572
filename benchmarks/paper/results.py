"""`results.json`: what a run was, which methods there are and which rates were chosen, for the report."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import diffusers
import peft
import torch
import transformers

from benchmarks.paper.plan import BASE, REAL, Subject
from benchmarks.paper.records import Record, read_json, write_json
from benchmarks.paper.settings import Method

if TYPE_CHECKING:
    from benchmarks.paper.stages import Room

RESULTS = "results.json"


def write(room: Room) -> None:
    """Writes it anew, with what other command lines in the same folder have found.

    :raises DeftError: when it cannot be written
    """
    file = room.settings.output / RESULTS
    then = read_json(file)
    chosen = room.chosen()
    best = then.get("best", {}) | {name: method.rate for name, method in chosen.items()}
    machines = then.get("machines", [])
    if (machine := _machine()) not in machines:
        machines.append(machine)
    write_json(file, {
        "benchmark": room.benchmark.name,
        "settings": _settings(room),
        "best": best,
        "methods": _methods(room, then.get("methods", {}), chosen.values()),
        "subjects": then.get("subjects", {}) | {one.name: _subject(room, one) for one in (*room.tuning, *room.counted)},
        "sets_of": room.benchmark.sets_of,
        "scoring": room.measured if room.measured.get("models") else then.get("scoring", {}),
        "notes": _notes(room),
        "machines": machines,
    })  # fmt: skip


def _settings(room: Room) -> dict[str, Any]:
    settings = room.settings
    return {
        "model": settings.model.name, "size": settings.size, "steps": settings.steps, "rank": settings.rank,
        "rates": list(settings.rates), "seeds": settings.seeds, "drawing_steps": settings.drawing_steps,
        "guidance": _guidance(room),
        "precision": settings.precision or "as in --config",
        "layers": "queries, keys, values and output of the denoiser's attention",
        "chosen_by": "" if room.criterion is None or not room.tuning else room.criterion.described(),
    }  # fmt: skip


def _guidance(room: Room) -> float | str:
    given = room.settings.guidance
    return f"{room.benchmark.guidance:g}; of FLUX.1 and OmniGen the model's own" if given is None else given


def _methods(room: Room, then: Mapping[str, Record], chosen: Iterable[Method]) -> dict[str, Record]:
    """:param then: those of other command lines; of one adapter at several rates, the last choice counts"""
    parameters = {one["method"]: one["parameters"] for one in room.trainings.read()}
    found: dict[str, Record] = {BASE: {"adapter": BASE}, REAL: {"adapter": REAL}} | dict(then)
    for method in room.methods():
        if method.key in parameters:
            found[method.key] = {
                "adapter": method.adapter, "rank": method.rank, "rate": method.rate, "steps": method.steps,
                "parameters": parameters[method.key], "rate_chosen": False,
            }  # fmt: skip
    for best in chosen:
        for key, one in found.items():
            if (one["adapter"], one.get("rank"), one.get("steps")) == (best.adapter, best.rank, best.steps):
                one["rate_chosen"] = key == best.key
    return found


def _subject(room: Room, subject: Subject) -> Record:
    seeds = 1 if subject.tuning else room.settings.seeds
    pictures: dict[str, int] = {}
    for asked in subject.asked:
        pictures[asked.category] = pictures.get(asked.category, 0) + seeds * asked.number
    references = [str(path) for path in subject.references]
    return {"group": subject.group, "tuning": subject.tuning, "pictures": pictures, "references": references}


def _notes(room: Room) -> list[str]:
    failed = [f"{one['key']} could not go on: {one['failed']}" for one in room.trainings.read() if "failed" in one]
    ends = (room.settings.rates[0], room.settings.rates[-1])
    at_edge = [f"{one.adapter}: the best of the rates is at the edge of the grid, {one.rate:g}"
               for one in room.chosen().values() if room.tuning and one.rate in ends]  # fmt: skip
    return [*room.benchmark.notes, *room.choice.left_out.values(), *failed, *at_edge]


def _machine() -> dict[str, str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {one.__name__: one.__version__ for one in (torch, diffusers, transformers, peft)}
    return {"device": device, "python": platform.python_version(), **versions}
