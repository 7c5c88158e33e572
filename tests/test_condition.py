"""benchmarks/condition.py: its OmniGen is asked as the trainer asks, what it measures, its path from end to end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks import condition, condition_model
from library.models import loading
from library.options.rooms import ModelOptions
from library.world import draw, judge, measure

SMALL: dict[str, Any] = {
    "hidden_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 48, "num_layers": 2,
    "time_step_dim": 16, "rope_scaling": {"long_factor": [1.0] * 12, "short_factor": [1.0] * 12},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has been trained for a step."""
    to = tmp_path_factory.mktemp("condition") / "model"
    with pytest.MonkeyPatch.context() as patched, torch.random.fork_rng([]):
        patched.setattr(condition_model, "TRANSFORMER", condition_model.TRANSFORMER | SMALL)
        patched.setattr(condition_model, "BATCH", 8)
        condition_model.write(to, 1e-6, 4, torch.device("cpu"))
    return to


def test_it_is_trained_on_what_the_trainer_asks(folder: Path) -> None:
    """Prompts of different lengths in one batch, padded, answer as the family answers each alone."""
    model = loading.load(ModelOptions(str(folder)))
    torch.manual_seed(0)
    torch.nn.init.normal_(model.denoiser.proj_out.weight, std=0.1)  # type: ignore[arg-type,union-attr]
    noisy, pictures = torch.randn(2, 4, 16, 16), torch.randn(3, 2, 4, 16, 16)
    prompts = [condition_model.BEHIND_EXAMPLE, f"a red circle {condition_model.BEHIND_EXAMPLE}"]
    times = torch.tensor([0.3, 0.8])
    alone = [
        -model.predict(noisy[i : i + 1], 1000 * (1 - times[i : i + 1]),
                       model.encode_text([prompts[i]], [list(pictures[:, i])]), torch.zeros(1, 6))
        for i in range(2)
    ]  # fmt: skip
    tokenizer = model.tokenizers[0]
    rows = [condition_model.prompt_ids(tokenizer, prompt) for prompt in prompts]
    ids = condition_model.left_padded([row for row, _ in rows])
    first = tuple(ids.shape[1] - end for end in rows[0][1])
    loss = condition_model.Loss(model.denoiser)  # type: ignore[arg-type]
    loss.first = first
    length = ids.shape[1] + 1 + condition_model.TOKENS
    together = model.denoiser(
        hidden_states=noisy, timestep=times, input_ids=ids, input_img_latents=list(pictures), input_image_sizes={},
        attention_mask=condition_model.visible(ids, first, condition_model.TOKENS),
        position_ids=torch.arange(length).expand(2, -1), return_dict=False,
    )[0]  # fmt: skip
    assert ids[0, 0] == -1
    assert ids[1, 0] != -1
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_no_word_of_the_world_is_unknown(tmp_path: Path) -> None:
    tokenizer = condition_model.build_tokenizer(tmp_path)
    said = [condition_model.ALONE, condition_model.BEHIND_EXAMPLE, *(text for _, text in measure.known_scenes(50))]
    for text in said:
        ids, _ = condition_model.prompt_ids(tokenizer, text)
        places = text.count("<|image_") * condition_model.TOKENS
        assert ids.count(0) == places, text  # <unk> is 0 as well


def test_edges_are_where_colours_change() -> None:
    pixels = -torch.ones(1, 3, 64, 64)
    assert (condition_model.edges(pixels) == -1).all()
    pixels[:, 1, :, 32:] = 1  # in one channel
    found = condition_model.edges(pixels)[0, 0]
    assert (found[:, 31:33] > 0).all()
    assert (found[:, :31] == -1).all()
    assert (found[:, 33:] == -1).all()


def test_a_scene_shows_itself_and_no_other() -> None:
    net = judge.load()
    given = [pair.scene for pair in condition.pairs(24, "test", held_out=True)]
    readings = judge.read(net, draw.render([scene.picture() for scene in given]))
    own = [condition._shows(reading, scene) for reading, scene in zip(readings, given, strict=True)]
    other = [condition._shows(reading, scene) for reading, scene in zip(readings, given[1:], strict=False)]
    assert sum(own) >= 0.9 * len(own)
    assert sum(other) <= 2
    assert all(scene.is_held_out() for scene in given)


def test_edges_of_a_scene_are_its_own(folder: Path) -> None:
    model = loading.load(ModelOptions(str(folder)))
    asked = condition.Asked(model, condition.pairs(4, "test", held_out=True), condition.HELD_OUT)
    assert max(condition._edge_error(asked, asked.pictures)) == 0
    assert min(condition._edge_error(asked, asked.pictures.roll(1, 0))) > 0.01


@torch.no_grad()
def test_the_loss_is_the_objectives(folder: Path) -> None:
    """Of a model that answers with its own velocity it is 0, of one that answers nothing the mean square of that."""
    model = loading.load(ModelOptions(str(folder)))
    bench = condition.Bench(model, 2)
    model.predict = lambda noisy, t, text, sizes: torch.zeros_like(noisy)  # type: ignore[method-assign]
    noise = torch.randn(bench.new.latents.shape, generator=torch.Generator().manual_seed(0))
    wanted = F.mse_loss(noise, bench.new.latents, reduction="none").flatten(1).mean(1)
    torch.testing.assert_close(torch.tensor(bench.loss(bench.new)), wanted)
    model.predict = lambda noisy, t, text, sizes: noise - bench.new.latents  # type: ignore[method-assign]
    assert max(bench.loss(bench.new)) == 0


def test_from_end_to_end(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(condition, "STEPS", 2)
    monkeypatch.setattr(condition, "LEVELS", 1)
    argv = ["condition.py", "--model", str(folder), "--output", str(tmp_path), "--rates", "1e-3", "--seeds", "1",
            "--steps", "2", "--batch", "2", "--pairs", "4", "--number", "8", "--rank", "2"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", argv)
    condition.main()
    found = json.loads((tmp_path / "results.json").read_text())
    names = {"loss", "right", "edges", "known", "captions"}
    assert found["base"].keys() == names
    assert all(found[adapter].keys() == {"rate", *names} for adapter in ("lora", "deft"))
    assert len(found["runs"]) == 4  # a rate tried, and a seed measured, each
    assert (tmp_path / "sheet.png").is_file()
