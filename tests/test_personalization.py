"""The bench of `benchmarks/personalization.py`: its code path, its loss, and that a rerun repeats nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import loaded

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

from library.options.rooms import ObjectiveOptions  # noqa: E402
from library.training.objective import Diffusion  # noqa: E402
from library.world import measure  # noqa: E402

ROOT = Path(__file__).parent.parent
FIGURES = ("likeness", "likeness_share", "background", "count", "known", "relation", "style", "follow",
           "old", "old_pair", "drift", "parameters")  # fmt: skip


@pytest.fixture
def bench(monkeypatch, tmp_path, capsys):
    """Runs the bench in this process, its trainings in one of their own; returns what it printed."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import personalization

    def run(*options: str) -> str:
        argv = ["personalization.py", "--quick", "--output", str(tmp_path / "results.json"), "--jobs", "1"]
        argv += ["--pictures_file", str(tmp_path / "pictures.safetensors"), "--figures", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", [*argv, "--device", "cpu", *options])
        assert personalization.main() == 0
        return capsys.readouterr().out

    return run


def test_quick_writes_what_is_promised_and_repeats_nothing(bench, tmp_path):
    printed = bench("--deft", "ratio=0.5")
    data = json.loads((tmp_path / "results.json").read_text())
    names = ("lora", "deft", "deft ratio=0.5")
    concepts = data["concepts"]["test"]
    assert len(concepts) == 2
    assert {data["adapters"][name]["parameters"] for name in names} == {data["adapters"]["lora"]["parameters"]}
    for name, rate in [("none", 0), *((name, 0.0025) for name in names)]:
        for concept in concepts:
            run = data["runs"][f"{name}|{rate:g}|{concept}|0"]
            assert all(isinstance(run[figure], (int, float)) for figure in FIGURES)
            assert run["merge_error"] < 1e-5
            assert (run["drift"] > 0) == (name != "none")
        pair = data["runs"][f"{name}|{rate:g}|{concepts[0]}+{concepts[1]}|0"]
        assert {"compose", "compose_both", "compose_mixed"} <= pair.keys()
    assert data["best"].keys() == set(names)
    assert data["machines"][0].keys() >= {"device", "torch", "diffusers", "peft"}
    assert "| deft ratio=0.5 |" in printed
    assert (tmp_path / "personalization_sheet.png").is_file()
    assert "trainings in" not in bench("--deft", "ratio=0.5"), "all runs are there"


def test_figures_beside_loras_at_the_same_likeness(monkeypatch):
    """An adapter on LoRA's curve differs by nothing, whatever creatures are drawn; of two files as of one."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import personalization_plot as plot

    def runs_of(adapter, rate, likeness):
        for concept in (1, 2, 3, 4):
            share = likeness + 0.01 * concept
            run = {"adapter": adapter, "rate": rate, "seed": 0}
            yield f"{adapter}|{rate}|{concept}", run | {"concept": concept, "likeness_share": share, "old": 1 - share}
        for pair in ([1, 2], [3, 4]):
            share = likeness + 0.01 * sum(pair) / 2
            yield f"{adapter}|{rate}|{pair}", run | {"concepts": pair, "compose": share / 2}

    points = [("none", 0.0, 0.0), ("lora", 0.1, 0.4), ("lora", 0.2, 0.8), ("deft", 0.1, 0.6), ("deft", 0.2, 0.9)]
    data = {"runs": {key: run for point in points for key, run in runs_of(*point)}, "best": {"lora": 0.1, "deft": 0.1}}
    for name, mean in (("old", "0.375"), ("compose", "0.312")):
        text = plot.beside(data, "deft", 0.1, name, [1, 2, 3, 4]).replace("-", "+")
        assert text == f"{mean} (+0.000 [+0.000, +0.000])"
    assert plot.beside(data, "deft", 0.2, "old", [1, 2]).endswith("*"), "LoRA is nowhere so like"
    assert plot.beside(data, "lora", 0.1, "old", [3, 4]) == "0.565"


def test_loss_is_the_trainers(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import personalization_train as training

    model = loaded(measure.MODEL)
    data = training.data_set(model, concept=100, word="sks", seed=0, steps=3)
    loss = training.Loss(model.denoiser, data.text, None, lambda: None)
    noise, timesteps = data.target[1], data.timesteps[1]
    clean = model.noise_scheduler()
    alphas = clean.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    latents = (data.noisy[1] - (1 - alphas).sqrt() * noise) / alphas.sqrt()
    objective = Diffusion(ObjectiveOptions(min_snr_gamma=training.GAMMA), clean)
    with torch.no_grad():
        noised = objective.at(latents, noise, timesteps)
        prediction = model.predict(noised.noisy, timesteps, {"hidden": data.text}, torch.zeros(0))
        expected = objective.loss(noised, prediction).mean()
        found = loss(data.noisy[1], timesteps, noise, data.weights[1])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("label", ["lora", "dora", "oft", "peft-deft", "deft", "deft init=paper", "para", "full"])
def test_a_training_started_anew_is_a_fresh_one(monkeypatch, label):
    """Nothing of the rate and the seed before is left: neither in the adapter, nor in weights, nor in the optimizer."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import personalization_train as training

    model = loaded(measure.MODEL)
    sets = [[training.data_set(model, 100, "sks", seed, steps=3)] for seed in (0, 1, 1)]
    group = training.Group(label, 8, model.denoiser)
    first = group.train(1e-3, sets[0])[0]
    again = group.train(1e-2, sets[1])[0]
    fresh = training.train(label, 8, 1e-2, model.denoiser, sets[2])[0]
    assert again.loss == fresh.loss
    assert fresh.deltas
    assert all(torch.equal(again.deltas[name], delta) for name, delta in fresh.deltas.items())
    assert any(not torch.equal(first.deltas[name], delta) for name, delta in fresh.deltas.items())
