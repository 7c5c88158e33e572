"""resize_deft.py: against singular value decompositions of dense products in float64, and sd-scripts' own rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from networks import deft_factors, deft_io, resize_deft
from tests.conftest import relative_error
from tests.hashes import webui_hashes

LINEAR, WIDE, CONV, POINT = (f"lora_unet_down_blocks_0_{name}" for name in ("to_q", "ff", "conv1", "proj_in"))
SHAPES = {LINEAR: (20, 30), WIDE: (12, 50), CONV: (16, 5, 3, 3), POINT: (24, 10, 1, 1)}
RANK, ALPHA = 8, 4.0


def write_lora(path: Path, dtype: torch.dtype = torch.float32, decay: float = 0.7) -> Path:
    tensors = {}
    for name, (m, *kernel) in SHAPES.items():
        ones = [1] * (len(kernel) - 1)
        tensors[f"{name}.lora_up.weight"] = torch.randn(m, RANK, *ones).to(dtype)
        down = torch.randn(RANK, *kernel) * decay ** torch.arange(RANK).reshape(-1, *[1] * len(kernel))
        tensors[f"{name}.lora_down.weight"] = down.to(dtype)
        tensors[f"{name}.alpha"] = torch.tensor(ALPHA).to(dtype)
    metadata = {"ss_network_dim": "8", "ss_network_alpha": "4.0", "ss_output_name": "cat", "sshs_model_hash": "old"}
    save_file(tensors, path, metadata)
    return path


@pytest.fixture
def lora(tmp_path) -> Path:
    return write_lora(tmp_path / "cat.safetensors")


def deltas(path: Path) -> dict[str, torch.Tensor]:
    """Products by alpha / rank in float64, read without the code under test."""
    with safe_open(str(path), framework="pt") as file:
        tensors = {key: file.get_tensor(key).double() for key in file.keys()}
    found = {}
    for name in SHAPES:
        up, down = (tensors[f"{name}.lora_{side}.weight"].flatten(1) for side in ("up", "down"))
        found[name] = up @ down * tensors[f"{name}.alpha"] / len(down)
    return found


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(str(path), framework="pt") as file:
        return file.metadata()


def ranks_of(path: Path) -> list[int]:
    with safe_open(str(path), framework="pt") as file:
        return [file.get_slice(f"{name}.lora_down.weight").get_shape()[0] for name in SHAPES]


def resize(lora: Path, *options: object) -> Path:
    output = lora.with_name("out.safetensors")
    assert resize_deft.main(["--model", str(lora), "--save_to", str(output), *map(str, options)]) == 0
    return output


def test_every_layer_is_the_best_approximation_and_its_error_is_told(lora, capsys):
    before = lora.read_bytes()
    output = resize(lora, "--new_rank", 3, "--verbose")
    printed = capsys.readouterr().out
    errors, lost, norm = [], 0.0, 0.0
    for name, whole in deltas(lora).items():
        S = torch.linalg.svdvals(whole)
        best = float(S[3:].norm() / S.norm())
        assert relative_error(deltas(output)[name], whole) == pytest.approx(best, rel=1e-4)
        assert f"{name}: rank 8 -> 3, relative error {best:.3g}\n" in printed
        errors.append(best)
        lost, norm = lost + float(S[3:].norm() ** 2), norm + float(S.norm() ** 2)
    history = json.loads(metadata_of(output)["deft_history"])
    assert history[-1]["error"]["largest"] == pytest.approx(max(errors), rel=1e-2)
    assert history[-1]["error"]["mean"] == pytest.approx(sum(errors) / 4, rel=1e-2)
    assert history[-1]["error"]["whole"] == pytest.approx((lost / norm) ** 0.5, rel=1e-2)
    assert lora.read_bytes() == before


def test_a_rank_that_the_product_has_anyway_costs_nothing(tmp_path):
    lora = write_lora(tmp_path / "a.safetensors")
    wide = resize(lora, "--new_rank", 64)
    assert ranks_of(wide) == [8] * 4  # no rank is added
    for name, whole in deltas(lora).items():
        assert relative_error(deltas(wide)[name], whole) < 2e-6


@pytest.mark.parametrize("precision", [None, "fp16", "bf16", "float"])
def test_the_precision_is_that_of_the_file_or_of_the_option(tmp_path, precision):
    lora = write_lora(tmp_path / "a.safetensors", torch.bfloat16)
    output = resize(lora, "--new_rank", 8, *(["--save_precision", precision] if precision else []))
    with safe_open(str(output), framework="pt") as file:
        found = file.get_tensor(f"{CONV}.lora_up.weight").dtype
    assert found == {"fp16": torch.float16, "float": torch.float32}.get(precision, torch.bfloat16)
    limit = {torch.float16: 2e-3, torch.float32: 1e-6, torch.bfloat16: 1e-2}[found]
    assert all(relative_error(deltas(output)[name], whole) < limit for name, whole in deltas(lora).items())


def test_convolutions_have_a_rank_of_their_own(lora):
    output = resize(lora, "--new_rank", 5, "--new_conv_rank", 2, "--no_pad")
    assert ranks_of(output) == [5, 5, 2, 5]


def test_what_is_known_of_the_file_is_carried_on_and_its_hash_is_new(lora):
    output = resize(lora, "--new_rank", 3)
    found = metadata_of(output)
    assert found["ss_network_dim"] == found["ss_network_alpha"] == "3"
    assert found["ss_output_name"] == "cat"
    assert found["ss_training_comment"] == "dimension is resized from 8 to 3; "  # sd-scripts' words
    tensors, metadata = deft_io.read_tensors(output)
    assert {k: v for k, v in found.items() if k.startswith("sshs_")} == webui_hashes(tensors, metadata)


# Ranks that sd-scripts' networks/resize_lora.py (commit 48d368fa), `rank_resize`, gave for these singular values
STEEP = [8, 4, 2, 1, 0.5, 0.25, 0.125, 0.0625]
LONG = [10, 9, 8, 3, 2.5, 2, 1.5, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
RATIOS, SHARES = (1.0, 1.5, 2.0, 5.0, 20.0, 1000.0), (0.1, 0.3, 0.5, 0.8, 0.9, 0.99)
SD_SCRIPTS = [
    (STEEP, "sv_ratio", RATIOS, [2, 2, 2, 4, 6, 8]),
    (STEEP, "sv_fro", SHARES, [2, 2, 2, 2, 3, 4]),
    (STEEP, "sv_cumulative", SHARES, [2, 2, 2, 4, 5, 8]),
    ([1] * 6, "sv_ratio", RATIOS, [2, 6, 6, 6, 6, 6]),
    ([1] * 6, "sv_fro", SHARES, [2, 2, 3, 5, 6, 6]),
    ([1] * 6, "sv_cumulative", SHARES, [2, 3, 4, 6, 6, 6]),
    (LONG, "sv_ratio", RATIOS, [2, 4, 4, 6, 13, 16]),
    (LONG, "sv_fro", SHARES, [2, 2, 2, 3, 4, 8]),
    (LONG, "sv_cumulative", SHARES, [2, 3, 4, 7, 10, 16]),
    ([5, 1e-3, 1e-4, 1e-5], "sv_cumulative", SHARES, [2, 2, 2, 2, 2, 2]),
    ([0.0, 0.0, 0.0], "sv_fro", SHARES, [1, 1, 1, 1, 1, 1]),
]


@pytest.mark.parametrize(("values", "method", "targets", "expected"), SD_SCRIPTS)
def test_dynamic_ranks_are_those_of_sd_scripts(values, method, targets, expected):
    S = torch.tensor(values, dtype=torch.float32)
    assert [deft_factors.dynamic_rank(S, method, target) for target in targets] == expected


def test_dynamic_ranks_are_of_each_layers_own_singular_values(lora, capsys):
    options = ("--new_rank", 5, "--dynamic_method", "sv_fro", "--dynamic_param", 0.9)
    output = resize(lora, *options, "--no_pad")
    assert "diffusers reads files of mixed ranks wrongly" in capsys.readouterr().out
    expected = []
    for name, whole in deltas(lora).items():
        S = torch.linalg.svdvals(whole)[:RANK]
        expected.append(min(5, deft_factors.dynamic_rank(S, "sv_fro", 0.9)))
        best = float(S[expected[-1] :].norm() / S.norm())
        assert relative_error(deltas(output)[name], whole) == pytest.approx(best, rel=1e-4)
    assert ranks_of(output) == expected
    assert len(set(expected)) > 1  # else nothing was shown
    assert metadata_of(output)["ss_network_dim"] == "Dynamic"

    padded = resize(lora, *options)
    assert ranks_of(padded) == [max(expected)] * 4  # one rank in the file
    known = json.loads(metadata_of(padded)[deft_io.LAYERS_KEY])
    assert [known[name][0] for name in SHAPES] == expected
    assert metadata_of(padded)["ss_network_dim"] == str(max(expected))
    assert "Dynamic resize with sv_fro: 0.9 from 8" in metadata_of(padded)["ss_training_comment"]


def test_a_layer_that_is_zero_stays_so(tmp_path):
    lora = write_lora(tmp_path / "a.safetensors")
    tensors, metadata = deft_io.read_tensors(lora)
    tensors[f"{WIDE}.lora_up.weight"].zero_()
    save_file(tensors, lora, metadata)
    output = resize(lora, "--new_rank", 6, "--dynamic_method", "sv_ratio", "--dynamic_param", 3)
    assert not deltas(output)[WIDE].any()
    assert all(torch.isfinite(delta).all() for delta in deltas(output).values())


MISTAKES = {
    "--new_rank 0": "--new_rank",
    "--new_rank many": "--new_rank",
    "--new_conv_rank -1": "--new_conv_rank",
    "--dynamic_method sv_fro": "--dynamic_param",
    "--dynamic_param 0.9": "--dynamic_method",
    "--dynamic_method sv_fro --dynamic_param 1.5": "--dynamic_param 1.5",
    "--dynamic_method sv_cumulative --dynamic_param 0": "--dynamic_param 0",
    "--dynamic_method sv_ratio --dynamic_param 0.5": "--dynamic_param 0.5",
    "--dynamic_method sv_ratio --dynamic_param nan": "--dynamic_param nan",
    "--dynamic_method energy --dynamic_param 0.5": "--dynamic_method",
    "--device toaster": "--device toaster",
    "--model nothing.safetensors": "nothing.safetensors",
    "--save_to cat.ckpt": "--save_to cat.ckpt",
    "--save_to {lora}": "never overwritten",
}


@pytest.mark.parametrize(("options", "word"), MISTAKES.items())
def test_mistakes_are_one_line(lora, capsys, options, word):
    given = options.format(lora=lora).split()
    before = lora.read_bytes()
    try:
        code = resize_deft.main(["--model", str(lora), "--save_to", str(lora.with_name("out.safetensors")), *given])
    except SystemExit as stopped:  # argparse's own
        code = stopped.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert word in error
    assert lora.read_bytes() == before
    assert sorted(path.name for path in lora.parent.iterdir()) == ["cat.safetensors"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_values_that_are_no_numbers_or_whose_product_is_none_are_refused(lora, capsys, value):
    tensors, metadata = deft_io.read_tensors(lora)
    tensors[f"{CONV}.lora_up.weight"][0] = value
    tensors[f"{CONV}.lora_down.weight"][:] = min(value, 3e38)
    save_file(tensors, lora, metadata)
    output = lora.with_name("out.safetensors")
    assert resize_deft.main(["--model", str(lora), "--save_to", str(output), "--new_rank", "3"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert CONV in error
    assert not output.exists()


def test_other_kinds_of_adapter_are_sent_to_the_tool_that_makes_loras_of_them(tmp_path, capsys):
    lycoris = Path(__file__).parent / "foreign" / "lycoris.safetensors"
    output = tmp_path / "out.safetensors"
    assert resize_deft.main(["--model", str(lycoris), "--save_to", str(output), "--new_rank", "2"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "extract_deft.py --adapter" in error
    assert not output.exists()
