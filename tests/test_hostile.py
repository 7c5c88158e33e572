"""Damaged files: every reader says in one line what is wrong. `python -m tests.fuzz` reads as many as one likes."""

from __future__ import annotations

import collections
import math
import pickle

import pytest
import torch
from safetensors.torch import load, save

from networks import compose_deft, convert_deft, extract_deft, inspect_deft, merge_deft, resize_deft
from tests import fuzz


@pytest.mark.parametrize("part", range(4))
def test_damaged_files_are_read_or_refused_in_one_line(part, tmp_path):
    counted = collections.Counter(fuzz.outcomes(100 * part, 100, tmp_path))
    assert all(counted[reader, "refused"] for reader in fuzz.readers())
    assert counted["formats", "read"] > 0
    assert counted["checkpoint", "read"] > 0


WHOLE, SGM = (fuzz.whole_files()[k] for k in (0, 8))
LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
HUGE = {f"{LAYER}.lora_up.weight": torch.full((8, 2), 1e38), f"{LAYER}.lora_down.weight": torch.full((2, 8), 1e38)}
BAD = {
    "cut off": save(*WHOLE)[:-9],
    "a lying header": b"\xff" * 8 + save(*WHOLE)[8:],
    "a pickle": pickle.dumps({"a": 1}),
    "nothing in it": b"",
    "not finite": save({key: torch.full_like(tensor, math.nan) for key, tensor in WHOLE[0].items()}),
    "another architecture": save({"lora_unet_double_blocks_0_img_mod_lin.lora_up.weight": torch.ones(48, 2),
                                  "lora_unet_double_blocks_0_img_mod_lin.lora_down.weight": torch.ones(2, 8)}),
    "values too large to be multiplied": save(HUGE),
    "complex numbers": save({key: tensor.to(torch.complex64) for key, tensor in WHOLE[0].items()}),
}  # fmt: skip
# the command of each tool for a bad file, and whether one for another model is a mistake there
COMMANDS = {
    "merge into one": (merge_deft, "--models BAD good --new_rank 1 --save_to out.safetensors", True),
    "merge into a model": (merge_deft, "--sd_model model --models BAD --save_to out.safetensors", True),
    "merge into a bad model": (merge_deft, "--sd_model BAD --models good --save_to out.safetensors", True),
    "resize": (resize_deft, "--model BAD --new_rank 1 --save_to out.safetensors", False),
    "extract from an adapter": (extract_deft, "--adapter BAD --dim 1 --save_to out.safetensors", False),
    "extract": (extract_deft, "--model_org model --model_tuned BAD --dim 1 --save_to out.safetensors", True),
    "compose": (compose_deft, "--models good BAD --save_to out.safetensors", True),
    "convert": (convert_deft, "BAD --save_to out.safetensors --to deft", False),
    "repair": (convert_deft, "BAD --save_to out.safetensors --repair", False),
    "inspect": (inspect_deft, "BAD", False),
}


@pytest.mark.parametrize("fault", BAD)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_tool_ends_in_one_line_and_leaves_everything_as_it_was(command, fault, tmp_path, monkeypatch, capsys):
    """A file's fault, or values that leave no number behind: code 2, one line, nothing written, inputs untouched."""
    tool, arguments, of_one_model = COMMANDS[command]
    files = {"BAD.safetensors": BAD[fault], "good.safetensors": save(*WHOLE), "model.safetensors": save(*SGM)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    names = {name.partition(".")[0]: name for name in files}
    code = tool.main([names.get(argument, argument) for argument in arguments.split()])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name not in files}
    assert {name: (tmp_path / name).read_bytes() for name in files} == files
    if code == 0:  # what is no mistake of this tool's
        assert fault in ("another architecture", "values too large to be multiplied", "not finite")
        assert not (fault == "another architecture" and of_one_model)
        assert not (fault == "not finite" and tool is not inspect_deft)
        assert all(torch.isfinite(t).all() for content in written.values() for t in load(content).values())
    else:
        assert (code, len(errors)) == (2, 1)
        assert not written


MODELS = {
    "LDM": lambda: save(*SGM),
    "FLUX": lambda: save(*fuzz.whole_files()[9]),
    "Diffusers": None,
}
OF_ADAPTERS = {name: command for name, command in COMMANDS.items() if name not in ("merge into a bad model", "extract")}
OF_ADAPTERS["metadata"] = (convert_deft, "BAD --set title=x --save_to out.safetensors", False)
OF_MODELS = {
    "merge": (merge_deft, "--sd_model BAD --models good --save_to out.safetensors"),
    "extract, tuned": (extract_deft, "--model_org model --model_tuned BAD --dim 1 --save_to out.safetensors"),
    "extract, base": (extract_deft, "--model_org BAD --model_tuned model --dim 1 --save_to out.safetensors"),
    "extract of a DoRA": (extract_deft, "--adapter good --model_org BAD --dim 1 --save_to out.safetensors"),
    "convert": (convert_deft, "good --base BAD --save_to out.safetensors"),
    "inspect": (inspect_deft, "good --base BAD"),
}


def told(tool, arguments: str, names: dict[str, str], capsys) -> str:
    """The one line that a tool ends in."""
    assert tool.main([names.get(argument, argument) for argument in arguments.split()]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture
def names(tmp_path, monkeypatch) -> dict[str, str]:
    monkeypatch.chdir(tmp_path)
    for name, content in {"good": save(*WHOLE), "model": save(*SGM)}.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    return {name: f"{name}.safetensors" for name in ("good", "model", "BAD")}


@pytest.mark.parametrize("form", MODELS)
@pytest.mark.parametrize("command", OF_ADAPTERS)
def test_a_model_given_as_an_adapter_is_said_to_be_one(command, form, names, tmp_path, capsys):
    make = MODELS[form]
    if make is None:
        (tmp_path / "BAD" / "unet").mkdir(parents=True)
        (tmp_path / "BAD" / "model_index.json").write_text("{}")
        (tmp_path / "BAD" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
        names["BAD"] = "BAD"
    else:
        (tmp_path / "BAD.safetensors").write_bytes(make())
    tool, arguments, _ = OF_ADAPTERS[command]
    line = told(tool, arguments, names, capsys)
    assert "this is a model" in line or (command == "metadata" and "this is a folder" in line)
    assert names["BAD"] in line
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("number", [0, 1, 2, 3, 4, 5, 7, "peft"])
@pytest.mark.parametrize("command", OF_MODELS)
def test_an_adapter_given_as_a_model_is_said_to_be_one(command, number, names, tmp_path, capsys):
    """LoRA, DEFT, LoHa, LoKr, OFT, full differences; of peft a folder."""
    if number == "peft":
        (tmp_path / "BAD").mkdir()
        (tmp_path / "BAD" / "adapter_config.json").write_text("{}")
        names["BAD"] = "BAD"
    else:
        (tmp_path / "BAD.safetensors").write_bytes(save(*fuzz.whole_files()[number]))
    assert "this is an adapter" in told(*OF_MODELS[command], names, capsys)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("BAD --to deft --save_to out.safetensors", "up @ down, is too large for float32"),
        ("BAD --save_precision fp16 --save_to out.safetensors", "is too large for float16; give --save_precision"),
    ],
)
def test_products_and_values_that_do_not_fit_are_said_to(arguments, said, names, tmp_path, capsys):
    (tmp_path / "BAD.safetensors").write_bytes(save(HUGE))
    assert said in told(convert_deft, arguments, names, capsys)
