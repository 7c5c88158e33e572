"""A training that runs out of memory: one message, what is saved stays, exit code 1."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file

from library.estimate import page, relief
from library.models.family import Family
from library.training.losses import Losses
from tests import small_flux
from tests.conftest import reset_accelerator


@pytest.fixture
def _without_figures(monkeypatch):
    def fail(*_):
        raise ValueError("no estimate here")

    monkeypatch.setattr(relief, "_needed", fail)


@pytest.mark.usefixtures("_without_figures")
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_step_that_finds_no_memory(run, tmp_path, monkeypatch, capsys, error):
    real, calls = Losses.__call__, []

    def at_the_third(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Losses, "__call__", at_the_third)
    assert run(save_every_n_steps=1, train_batch_size=2) == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    saved = tmp_path / "out" / "cat-step00000002.safetensors"
    assert "out of memory while training" in told
    assert f"last good save: {saved}" in told
    assert all(
        option in told for option in ("--gradient_checkpointing", "--mixed_precision bf16", "--train_batch_size 1")
    )
    assert load_file(saved)
    assert not (tmp_path / "out" / "cat.safetensors").exists()


@pytest.mark.usefixtures("_without_figures")
@pytest.mark.parametrize("of_card", [True, False])
def test_the_hosts_memory_is_not_relieved_by_what_goes_there(run, monkeypatch, capsys, of_card):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory") if of_card else MemoryError("cannot allocate")

    monkeypatch.setattr(Losses, "__call__", fail)
    monkeypatch.setattr(relief, "MOST", 99)
    assert run(gradient_checkpointing=True, mixed_precision="bf16") == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    for option in ("--blocks_to_swap", "--cpu_offload_checkpointing"):
        assert (option in told) == of_card


def test_pictures_that_find_no_memory(run, monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Family, "encode_image", fail)
    assert run(gradient_checkpointing=True) == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "out of memory while caching latents" in told
    assert "--gradient_checkpointing" not in told


def test_other_errors_stay_what_they_are(run, monkeypatch):
    def fail(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Losses, "__call__", fail)
    with pytest.raises(RuntimeError, match="mat1"):
        run()


def test_figures_are_what_the_settings_save(run, tmp_path, monkeypatch, capsys):
    """Each as far apart as --dry_run says of a training with and without it, and none that saves nothing; of a model of
    few layers, since each is gone through for every figure."""
    options = {"pretrained_model_name_or_path": small_flux.build(tmp_path / "model").folder, "train_batch_size": 2,
               "network_dim": 4, "network_train_unet_only": True, "resolution": 128}  # fmt: skip
    monkeypatch.setattr(relief, "_told_size", lambda size: f"{size} B")
    monkeypatch.setattr(relief, "LEAST", 1)
    with monkeypatch.context() as patched:
        patched.setattr(Losses, "__call__", fail_in_training(Losses.__call__))
        assert run(**options) == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    whole = int(re.search(r"It needs about (\d+) B", told)[1])
    saved = {what: int(size) for what, size in re.findall(r"(--[\w ]+?) \(saves (\d+) B\)", told)}
    assert {"--gradient_checkpointing", "--train_batch_size 1"} <= saved.keys()
    assert len(saved) <= relief.MOST
    assert list(saved.values()) == sorted(saved.values(), reverse=True)
    monkeypatch.setattr(page, "_size", lambda size: f"{size} B")
    reset_accelerator()
    assert run(**options | {"train_batch_size": 1}, dry_run=True) == 0
    shown = capsys.readouterr().out
    assert whole - int(re.search(r"training +(\d+) B", shown)[1]) == saved["--train_batch_size 1"]


def fail_in_training(real):
    """Out of memory, but not on the card that is not there."""

    def call(self, *args, **kwargs):
        if self.accelerator.device.type == "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *args, **kwargs)

    return call


@pytest.mark.usefixtures("_without_figures")
@pytest.mark.parametrize(
    ("place", "phase"),
    [
        ("library.keep.directions_to_keep", "making the adapter"),
        ("library.training.meters.Drift", "measuring the base"),
    ],
)
def test_what_is_drawn_and_measured_at_first_finds_no_memory(run, tmp_path, monkeypatch, capsys, place, phase):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(place, fail)
    (tmp_path / "keep.txt").write_text("a cat --w 64 --h 64 --s 1\n")
    assert run(network_args=[f"keep={tmp_path / 'keep.txt'}"], meter_every_n_steps=1) == 1
    assert f"out of memory while {phase}" in capsys.readouterr().err
