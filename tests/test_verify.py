"""Every saved file is compared with what was trained: what differs is found, and nothing else is."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.models.family import Family
from library.training import saves
from library.training.adapter import DeftAdapter
from networks import deft, deft_io
from networks.deft_config import DeftError
from tests.conftest import network_of

QUERY, KEY = (f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_{one}" for one in "qk")


def adapter_on(model: Family, **options: str) -> DeftAdapter:
    """After something has been learnt."""
    made = DeftAdapter.__new__(DeftAdapter)
    made.module = network_of(model, **options)
    return made


@pytest.mark.parametrize("dtype", list(saves.TOLERANCES))
@pytest.mark.parametrize(
    "options", [{"removal": "0"}, {}, {"conv_dim": "2"}, {"pad": "false"}, {"save_format": "deft"}]
)
def test_what_is_saved_is_what_was_trained(model, tmp_path, dtype, options):
    adapter = adapter_on(model, **options)
    adapter.save(tmp_path / "a.safetensors", dtype, {})
    _, apart = adapter.apart(tmp_path / "a.safetensors")
    exact = dtype == torch.float32 or "save_format" in options
    assert (0 if exact else 1e-5) <= apart < saves.TOLERANCES[torch.float32 if exact else dtype] / 2


def swapped(tensors):
    for part in ("lora_up.weight", "lora_down.weight"):
        tensors[f"{QUERY}.{part}"], tensors[f"{KEY}.{part}"] = tensors[f"{KEY}.{part}"], tensors[f"{QUERY}.{part}"]


def rescaled(tensors):
    tensors[f"{QUERY}.alpha"] = tensors[f"{QUERY}.alpha"] * 1.01


def flipped(tensors):
    up = tensors[f"{QUERY}.lora_up.weight"]
    up.view(-1)[int(up.abs().argmax())] *= -1


@pytest.mark.parametrize("damage", [swapped, rescaled, flipped])
def test_what_differs_is_found_and_named(model, tmp_path, damage):
    adapter, file = adapter_on(model), tmp_path / "a.safetensors"
    adapter.save(file, torch.float16, {})
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file)
    layer, apart = adapter.apart(file)
    assert layer in (QUERY, KEY)
    assert apart > saves.TOLERANCES[torch.float16]


def test_what_is_not_finite_is_found(model, tmp_path):
    adapter, file = adapter_on(model), tmp_path / "a.safetensors"
    adapter.save(file, torch.float16, {})
    tensors = load_file(file)
    tensors[f"{QUERY}.lora_up.weight"][0, 0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(DeftError, match=QUERY):
        adapter.apart(file)


def test_a_layer_that_is_missing_is_named(model, tmp_path):
    adapter, file = adapter_on(model), tmp_path / "a.safetensors"
    adapter.save(file, torch.float16, {})
    save_file({name: tensor for name, tensor in load_file(file).items() if not name.startswith(QUERY)}, file)
    with pytest.raises(DeftError, match=f"lacks {QUERY}"):
        adapter.apart(file)


def test_a_network_that_has_learnt_nothing_is_equal_to_its_file(model, tmp_path):
    network = deft.create_network(1.0, 4, 2.0, None, model.text_encoders, model.denoiser)
    adapter = DeftAdapter.__new__(DeftAdapter)
    adapter.module = network
    adapter.save(tmp_path / "a.safetensors", torch.float16, {})
    assert adapter.apart(tmp_path / "a.safetensors")[1] == 0


def damaging(monkeypatch, from_the: int) -> None:
    """A disk that changes a number in every file from the n-th on."""
    write, written = deft_io.write_hashed, []

    def damaged(tensors, *rest, **more):
        written.append(0)
        if len(written) >= from_the:
            name = next(name for name in tensors if name.endswith("lora_up.weight"))
            tensors = {**tensors, name: tensors[name] * 1.1}
        write(tensors, *rest, **more)

    monkeypatch.setattr(deft_io, "write_hashed", damaged)


def test_a_file_that_is_damaged_ends_the_training_loudly(run, tmp_path, monkeypatch, capsys, caplog):
    damaging(monkeypatch, from_the=2)
    with caplog.at_level(logging.ERROR):
        assert run(max_train_steps=4, save_every_n_steps=1, learning_rate=1e-2) == 1
    errors = [record.message for record in caplog.records if "is NOT what was trained" in record.message]
    assert [error[:7] for error in errors] == ["step 2:", "step 3:"]  # the last one ends it
    printed = capsys.readouterr().err
    assert "cat.safetensors: is NOT what was trained" in printed
    assert f"last good save: {tmp_path / 'out' / 'cat-step00000001.safetensors'}" in printed


def test_what_takes_long_is_done_once_unless_it_is_asked_for(monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(saves, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    for asked in (False, True):
        made = saves.Saves.__new__(saves.Saves)
        made.verifies, made.dtype = True, torch.float16
        made.options = SimpleNamespace(verify_saves=asked)
        made.adapter = SimpleNamespace(apart=lambda path: ("a", 0.0))
        made._verify(SimpleNamespace(name="a"))
        assert made.verifies is asked
