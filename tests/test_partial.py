"""What killed runs leave behind goes when the same output is written again, whichever tool writes it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from networks import deft_io, deft_partial


def ended() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("name", ["a.safetensors", "a [1] *.safetensors", "ä ö.safetensors"])
def test_remains_of_killed_runs_are_removed_and_others_stay(tmp_path, name):
    output = tmp_path / name
    killed, running, other = (
        tmp_path / f".{name}.{ended()}.partial",
        tmp_path / f".{name}.{os.getppid()}.partial",
        tmp_path / f".b{name}.{ended()}.partial",
    )
    for path in (killed, running, other):
        path.write_bytes(b"half")
    deft_io.write_safetensors({"x": torch.ones(2)}, output, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, running.name, other.name])


def test_a_folder_of_a_killed_run_is_removed(tmp_path):
    killed = tmp_path / f".cat.{ended()}.partial"
    (killed / "unet").mkdir(parents=True)
    assert deft_partial.partial_of(tmp_path / "cat").name == f".cat.{os.getpid()}.partial"
    assert not killed.exists()
