"""`benchmarks/meters.py` from beginning to end at toy size: its trainings are the trainer's own, as is the save that
is named; what other rules take is worked out by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from library.training import naming
from library.training.record import Record

pytest.importorskip("diffusers")
pytest.importorskip("peft")

ROOT = Path(__file__).parent.parent


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs the bench; returns its results."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import meters

    monkeypatch.setattr(meters.measuring, "DRIFT", 4)

    def run(*options: str) -> dict:
        argv = [
            "meters.py",
            "--creatures",
            "1",
            "--kinds",
            "default",
            "--steps",
            "4",
            "--saves",
            "2",
            "--pictures",
            "2",
        ]
        argv += ["--sampling", "2", "--pairs", "0", "--device", "cpu", "--work", str(tmp_path / "work")]
        argv += ["--output", str(tmp_path / "results.json"), "--figure", str(tmp_path / "figure.png")]
        argv += [
            "--lr_warmup_steps",
            "0",
            "--meter_every_n_steps",
            "4",
            "--max_timestep",
            "400",
        ]  # learnt at once there
        monkeypatch.setattr(sys, "argv", [*argv, *options])
        assert meters.main() == 0
        return json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))

    return run


def test_trains_judges_and_takes_the_trainers_word(bench, tmp_path, capfd):
    found = bench()
    (run,) = found["runs"].values()
    creature = run["creature"]
    folder = tmp_path / "work" / f"default-{creature}"
    best = naming.best(Record.read(folder), folder)
    assert best is not None
    assert run["named"] == best.file.step
    first, last = run["saves"]
    assert (first["step"], last["step"]) == (2, 4)
    assert last["likeness_less"]["share"] == last["old_more"]["share"] == 0
    assert first["likeness_less"]["share"] == pytest.approx(last["likeness"]["share"] - first["likeness"]["share"])
    assert sum(last["losses"]) < sum(run["base"]["losses"])
    assert 0 < first["bench_drift"] < 1
    assert {"device", "torch", "diffusers", "transformers"} <= found.keys()
    assert "| named by the trainer |" in capfd.readouterr().out
    written = (folder / "sks.safetensors").stat().st_mtime_ns
    assert bench() == found
    assert (folder / "sks.safetensors").stat().st_mtime_ns == written


def test_rules(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import meters_plot as plot

    steps, learnt = [10, 20, 30, 40, 50, 60], [0.5, 0.73, 0.78, 0.795, 0.8, 0.79]
    drift = [0.0, 0.02, 0.04, 0.06, 0.1, 0.3]
    less = [0.4, 0.2, 0.04, 0.02, -0.01, 0.0]
    losses = [[2.0, 2.0], [0.3, 1.5], [0.2, 1.0], [0.1, 0.5], [0.1, 0.45], [0.1, 0.44]]
    curves = {plot.LEARNT: (steps, learnt), plot.DRIFT: ([5, *steps], [0.0, *drift])}
    run = {
        "named": 30, "base": {"losses": [18.0, 2.0]},
        "curves": {name: {"steps": steps, "values": values} for name, (steps, values) in curves.items()},
        "saves": [{"step": s, "likeness_less": {"share": one}, "losses": two}
                  for s, one, two in zip(steps, less, losses, strict=True)],
    }  # fmt: skip
    taken = {"named": 30, "90%": 20, "summed": 30, "shares": 40, "97%": 30, "99%": 40, "largest": 50, "a third": 20,
             "drift": 30, "judge": 40, "last": 60}  # fmt: skip
    assert list(plot.rules(run).values()) == list(taken.values())
