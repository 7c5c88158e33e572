"""Disks that are full at any byte, and folders that cannot be written to: every tool that writes ends in one line."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from tests import fuzz
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(os.name == "nt", reason="no limit of file sizes there")

LORA, DEFT, SGM = (fuzz.whole_files()[k] for k in (0, 1, 8))
COMMANDS = {
    "merge into one": "merge --models lora.safetensors lora.safetensors --save_to OUT.safetensors",
    "merge into a model": "merge --sd_model model.safetensors --models lora.safetensors --ignore_unmatched"
    " --save_to OUT.safetensors",
    "merge into a folder": "merge --sd_model folder --models lora.safetensors --ignore_unmatched --save_to OUT",
    "resize": "resize --model lora.safetensors --new_rank 1 --save_to OUT.safetensors",
    "extract": "extract --model_org model.safetensors --model_tuned tuned.safetensors --dim 1"
    " --save_to OUT.safetensors",
    "extract from an adapter": "extract --adapter lora.safetensors --dim 1 --save_to OUT.safetensors",
    "compose": "compose --models lora.safetensors lora.safetensors --save_to OUT.safetensors",
    "convert": "convert lora.safetensors --to diffusers --save_to OUT.safetensors",
    "convert to peft": "convert lora.safetensors --to peft --save_to OUT",
    "repair": "convert lora.safetensors --repair --save_to OUT.safetensors",
    "metadata": "convert lora.safetensors --set title=x --save_to OUT.safetensors",
    "sidecars": "convert lora.safetensors --set title=x --set trigger=sks --sidecars --save_to OUT.safetensors",
    "report": "inspect lora.safetensors --json OUT.json",
}


@pytest.fixture
def inputs(tmp_path, monkeypatch) -> dict[Path, bytes]:
    """Files for the commands, in the current folder; what is in them."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(1)
    tuned = {key: t + torch.randn(t.shape, generator=generator).to(t.dtype) for key, t in SGM[0].items()}
    for name, content in {"lora": save(*LORA), "model": save(*SGM), "tuned": save(tuned)}.items():
        Path(f"{name}.safetensors").write_bytes(content)
    unet = Path("folder/unet")
    unet.mkdir(parents=True)
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    (unet / "diffusion_pytorch_model.safetensors").write_bytes(
        save({layer: torch.ones(8, 8), "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight":
              torch.ones(8, 768), "conv_in.weight": torch.ones(8, 4, 3, 3)}))  # fmt: skip
    (unet / "config.json").write_text("{}")
    Path("folder/model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    Path("there").mkdir()
    return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def run(command: str, output: Path) -> int:
    name, *arguments = command.split()
    tool = importlib.import_module(f"networks.{name}_deft")
    return tool.main([argument.replace("OUT", str(output)) for argument in arguments])


@contextlib.contextmanager
def full_after(size: int) -> Iterator[None]:
    """No file grows beyond so many bytes, as on a disk that is full."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def size_of(folder: Path) -> int:
    return max(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_disk_that_is_full_at_any_byte(command, inputs, tmp_path, capsys):
    there = tmp_path / "there"
    assert run(COMMANDS[command], there / "x") == 0, capsys.readouterr().err
    whole = size_of(there)
    shutil.rmtree(there)
    for size in (0, 1, 100, whole // 2, whole - 1):
        there.mkdir()
        capsys.readouterr()
        with full_after(size):
            code = run(COMMANDS[command], there / "x")
        said = capsys.readouterr().err
        told = [line for line in said.splitlines() if line.startswith("error: ")]
        assert (code, len(told)) == (2, 1), (size, said)
        assert "File too large" in told[0]
        assert str(there / "x") in told[0]
        assert "partial" not in told[0]
        assert "Traceback" not in said
        for path in there.iterdir():  # beside the sidecar that did not fit
            assert command == "sidecars"
            assert path.suffix == ".json" or load_file(path)
        assert {path: path.read_bytes() for path in inputs} == inputs
        shutil.rmtree(there)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="of POSIX")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_cannot_be_written_to(command, inputs, tmp_path, capsys, monkeypatch):
    there = tmp_path / "there"
    there.chmod(0o555)
    if os.geteuid() == 0:  # who may write everywhere: as the disk says it, then
        opened = open

        def refuse(file, mode="r", *rest, **more):
            if "w" in mode and there in Path(str(file)).parents:
                raise PermissionError(13, "Permission denied", str(file))
            return opened(file, mode, *rest, **more)

        monkeypatch.setattr("builtins.open", refuse)
    before = sorted(os.listdir(there))
    code = run(COMMANDS[command], there / "x")
    said = capsys.readouterr().err
    (told,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert told.endswith("(Permission denied)")
    assert str(there / "x") in told
    assert sorted(os.listdir(there)) == before
    assert {path: path.read_bytes() for path in inputs} == inputs


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0 or not shutil.which("setpriv"), reason="of root")
def test_a_folder_of_another_user(inputs, tmp_path):
    """For real, as a user who may not write there."""
    for folder in (tmp_path, *list(tmp_path.parents)[:3]):
        folder.chmod(0o755)
    command = [
        sys.executable,
        str(ROOT / "networks" / "resize_deft.py"),
        "--model",
        "lora.safetensors",
        "--new_rank",
        "1",
    ]
    done = subprocess.run(
        [
            "setpriv",
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            *command,
            "--save_to",
            "there/x.safetensors",
            "--new_rank",
            "1",
        ],
        text=True,
        capture_output=True,
    )
    if "Permission denied" in done.stderr and "error: " not in done.stderr:
        pytest.skip("Python itself is not to be had for that user")
    assert (done.returncode, done.stderr.count("error: ")) == (2, 1), done.stderr
    assert "Permission denied" in done.stderr
    assert not list((tmp_path / "there").iterdir())
