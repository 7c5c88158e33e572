"""Every tool of networks/: in each of the ways in which it can be started, with the example that its help shows."""

from __future__ import annotations

import importlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import ROOT

TOOLS = sorted(path.stem for path in (ROOT / "networks").glob("*_deft.py"))


def example(help_text: str, tool: str) -> list[str]:
    """The arguments of the first command that a help text shows."""
    joined = re.sub(r"\\\n\s*", " ", help_text)
    found = re.search(rf"^\s+python networks/{tool}\.py (.+)$", joined, re.MULTILINE)
    assert found, f"the help of {tool} shows no command"
    return shlex.split(found[1])


def docstring(tool: str) -> str:
    return (ROOT / "networks" / f"{tool}.py").read_text(encoding="utf-8").split('"""')[1]


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, text=True, capture_output=True)


def says_what_is_missing(code: object, printed: str, errors: str, tool: str) -> None:
    """The example's files are not there: one line that names one of them; of inspect_deft, a line for each."""
    assert code == 2, errors
    lines = errors.strip().splitlines()
    assert len(lines) == (len(example(docstring(tool), tool)) if tool == "inspect_deft" else 1), errors
    assert all(line.startswith("error: ") for line in lines)
    assert "Traceback" not in printed


def test_there_are_tools():
    assert "merge_deft" in TOOLS


@pytest.mark.parametrize("tool", TOOLS)
def test_the_help_shows_an_example(tool, tmp_path):
    """And the tool runs as a file, from any folder."""
    done = run([str(ROOT / "networks" / f"{tool}.py"), "--help"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert example(done.stdout, tool) == example(docstring(tool), tool)


@pytest.mark.parametrize("tool", TOOLS)
def test_it_runs_as_a_module(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [tool, *example(docstring(tool), tool)])
    monkeypatch.delitem(sys.modules, f"networks.{tool}", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"networks.{tool}", run_name="__main__", alter_sys=True)
    said = capsys.readouterr()
    says_what_is_missing(ended.value.code, said.out, said.err, tool)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tool", TOOLS)
def test_it_runs_among_a_trainers_own_networks(tool, tmp_path):
    """Copied there, as README.md has it: the folder is no package, and ours is on no path."""
    (tmp_path / "networks").mkdir()
    for file in (ROOT / "networks").glob("*deft*.py"):
        shutil.copy(file, tmp_path / "networks")
    (tmp_path / "networks" / "lora.py").write_text("raise ImportError('the trainer\\'s own')\n")
    done = run([f"networks/{tool}.py", *example(docstring(tool), tool)], tmp_path)
    says_what_is_missing(done.returncode, done.stdout, done.stderr, tool)
    assert [path.name for path in tmp_path.iterdir()] == ["networks"]


@pytest.mark.skipif(os.name == "nt", reason="of other systems")
@pytest.mark.parametrize("path", [r"C:\loras\new.safetensors", "d:/loras/new.safetensors"])
@pytest.mark.parametrize(
    "command",
    [
        "resize --model a.safetensors --save_to",
        "merge --models a.safetensors --save_to",
        "merge --sd_model folder --models a.safetensors --save_to",
        "extract --adapter a.safetensors --dim 1 --save_to",
        "compose --models a.safetensors a.safetensors --save_to",
        "convert a.safetensors --save_to",
        "convert a.safetensors --to peft --save_to",
        "inspect a.safetensors --json",
    ],
)
def test_a_path_of_windows_makes_no_file_of_that_name(command, path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    layer = "lora_unet_mid_block_attentions_0_proj_in"
    save_file({f"{layer}.lora_up.weight": torch.ones(4, 1), f"{layer}.lora_down.weight": torch.ones(1, 4)},
              "a.safetensors")  # fmt: skip
    name, *arguments = command.split()
    assert importlib.import_module(f"networks.{name}_deft").main([*arguments, path]) == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "a path of Windows" in told
    assert sorted(os.listdir()) == ["a.safetensors", "folder"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["resize", "--model", "a.safetensors", "--save_to", "a" * 300 + ".safetensors"], "cannot be written"),
        (["convert", "a.safetensors", "--set", "title=\udce4", "--save_to", "b.safetensors"], "use UTF-8"),
        (["inspect", "a.safetensors", "--json", "same.safetensors"], "this is an input"),
    ],
)
def test_odd_names_end_in_one_line(arguments, line, tmp_path, monkeypatch, capsys):
    """Names too long for a disk, arguments that are no text, another name of an input."""
    monkeypatch.chdir(tmp_path)
    save_file({"lora_unet_x.lora_up.weight": torch.ones(4, 1), "lora_unet_x.lora_down.weight": torch.ones(1, 4)},
              "a.safetensors")  # fmt: skip
    os.link("a.safetensors", "same.safetensors")
    tool = importlib.import_module(f"networks.{arguments[0]}_deft")
    assert tool.main(arguments[1:]) == 2
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert line in told
    assert sorted(os.listdir()) == ["a.safetensors", "same.safetensors"]
