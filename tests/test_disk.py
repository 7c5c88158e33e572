"""Disks that are full, folders that cannot be written to: one line, and the training goes on where it can."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from library.training.loop import TrainingLoop
from library.training.samples import Samples
from tests.test_resume import assert_equal

pytestmark = pytest.mark.skipif(os.name == "nt", reason="no limit of file sizes there")


@pytest.fixture
def full_within(monkeypatch):
    """Files end at some size, as on a full disk, while a method runs."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def arrange(owner, name: str, size: int):
        method = getattr(owner, name)

        def wrapped(*args, **kwargs):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            try:
                return method(*args, **kwargs)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

        monkeypatch.setattr(owner, name, wrapped)

    yield arrange
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def with_samples(tmp_path) -> dict[str, object]:
    (tmp_path / "p.txt").write_text("a cat --w 64 --h 64 --s 1 --d 1\n")
    return {"sample_prompts": tmp_path / "p.txt", "sample_every_n_steps": 1}


def of(caplog, level: str) -> list[str]:
    return [record.message for record in caplog.records if record.levelname == level]


def test_a_sample_on_a_full_disk_is_lost_and_nothing_else(run, tmp_path, with_samples, full_within, caplog):
    assert run(output_name="undisturbed") == 0
    full_within(Samples, "_draw", 1000)
    assert run(**with_samples) == 0
    assert [line.split("(")[1] for line in of(caplog, "ERROR")] == ["File too large)"] * 3
    assert list((tmp_path / "out" / "sample").iterdir()) == []
    out = tmp_path / "out"
    assert_equal(load_file(out / "cat.safetensors"), load_file(out / "undisturbed.safetensors"))


def test_a_card_that_has_no_room_for_drawing_ends_no_training(run, with_samples, monkeypatch, caplog):
    def full(*args):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr("library.training.samples.drawing", full)
    assert run(**with_samples) == 0
    assert [line.split("(")[1] for line in of(caplog, "ERROR")] == ["CUDA out of memory)"] * 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_logs_on_a_full_disk_end_and_the_training_does_not(run, tmp_path, full_within, caplog):
    """TensorBoard writes in a thread of its own, whose error comes up some time later; the bar goes into a file too."""
    full_within(TrainingLoop, "run", 1000)
    assert run(logging_dir=tmp_path / "logs", max_train_steps=30) == 0
    (line,) = of(caplog, "ERROR")
    assert "logs end here, the training goes on" in line
    assert (tmp_path / "out" / "cat.safetensors").is_file()


def test_a_folder_that_vanishes_behind_a_file(run, tmp_path, with_samples, monkeypatch, caplog, capsys):
    """Every save that fails is told, the last in the error that the program ends with."""
    out, after_step = tmp_path / "out", TrainingLoop._after_step

    def vanish(self):
        shutil.rmtree(out, ignore_errors=True)
        if not out.exists():
            out.touch()
        after_step(self)

    monkeypatch.setattr(TrainingLoop, "_after_step", vanish)
    assert run(**with_samples, save_every_n_steps=1, save_state=True) == 1
    told = of(caplog, "ERROR")
    assert len([line for line in told if "not drawn" in line]) == 3
    assert len([line for line in told if "cat-step" in line]) == 4  # adapter and state, at two steps
    assert capsys.readouterr().err.split("\n")[-2].endswith("last good save: none")


@pytest.mark.parametrize("option", ["output_dir", "logging_dir"])
def test_a_folder_that_only_seems_writable_is_told_at_once(run, tmp_path, monkeypatch, capsys, option):
    """As a read-only share, which is not what its permissions say."""

    def refuse(dir: Path, **rest):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert run(**{option: tmp_path / "new"}, pretrained_model_name_or_path="nowhere") == 2
    assert "that can be written to (Read-only file system)" in capsys.readouterr().err
