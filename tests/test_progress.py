"""Work of more than a few seconds shows a bar; short work and other processes show none."""

from __future__ import annotations

import time

import pytest

from networks import deft_progress
from networks.deft_progress import Bar, progress
from tests.conftest import network_of
from tests.test_files import save


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(deft_progress, "DELAY", 0.0)


def test_only_long_work_shows_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(deft_progress, "DELAY", 0.2)
    for pause, shown in ((0.0, False), (0.15, True)):
        for _ in progress([1, 2, 3, 4], "working"):
            time.sleep(pause)
        assert ("working" in capsys.readouterr().err) == shown


def test_without_tqdm_the_work_is_done(monkeypatch):
    monkeypatch.setattr(deft_progress, "tqdm", None)
    assert list(progress([1, 2], "x")) == [1, 2]
    with Bar(3, "x") as bar:
        bar.add(3)


@pytest.mark.usefixtures("at_once", "fresh_accelerator")
def test_what_takes_long_in_a_training_has_a_bar(run, photos, tmp_path, capsys):
    prompts, keep = tmp_path / "p.txt", tmp_path / "keep.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2")
    keep.write_text("a dog --s 2\na red car --s 2")
    assert run(output_name="first", max_train_steps=1) == 0
    capsys.readouterr()
    first = str(tmp_path / "out" / "first.safetensors")
    assert run(max_train_steps=1, sample_prompts=prompts, sample_at_first=True, base_weights=[first],
               network_args=[f"keep={keep}"]) == 0  # fmt: skip
    shown = capsys.readouterr().err
    for what in (
        "caching latents:",
        "drawing what to keep:",
        "/4",
        "merging:",
        "drawing:",
        "hashing the base weights:",
    ):
        assert what in shown, what


@pytest.mark.usefixtures("at_once")
def test_a_checkpoint_is_hashed_with_a_bar(tmp_path, capsys):
    import hashlib

    from library.training.metadata import sha256_of

    (tmp_path / "m.safetensors").write_bytes(b"x" * 3_000_000)
    assert sha256_of(tmp_path / "m.safetensors") == hashlib.sha256(b"x" * 3_000_000).hexdigest()
    assert "hashing m.safetensors:" in capsys.readouterr().err


@pytest.mark.usefixtures("at_once")
def test_other_processes_show_none(model, tmp_path, capsys, monkeypatch):
    network = network_of(model)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    save(network, tmp_path)
    assert "hashing" not in capsys.readouterr().err
