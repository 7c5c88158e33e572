"""Sums of adapters, and adapters in checkpoints: against float64 sums of products, and beside what others' tools do."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from networks import deft_blocks, deft_formats, deft_tools, merge_deft
from networks.deft_formats import Adapter, Dense, OnBase
from tests.conftest import relative_error

ATTENTION, CONV = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "lora_unet_input_blocks_4_0_in_layers_2"
MIDDLE, OUT = "lora_unet_middle_block_1_proj_in", "lora_unet_output_blocks_3_1_proj_out"
TEXT, TEXT_G = "lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_te2_text_model_encoder_layers_0_self_attn_k_proj"
SHAPES = {ATTENTION: (24, 16), CONV: (24, 12, 3, 3), MIDDLE: (24, 24), OUT: (12, 24), TEXT: (20, 10), TEXT_G: (16, 16)}


def adapter(
    path: Path,
    rank: int = 4,
    alpha: float | None = None,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    dtype: torch.dtype = torch.float32,
    **metadata: str,
) -> Path:
    """A file as sd-scripts writes it, of random values."""
    tensors = {}
    for name, (m, *kernel) in shapes.items():
        ones = [1] * (len(kernel) - 1)
        tensors[f"{name}.lora_up.weight"] = torch.randn(m, rank, *ones).to(dtype)
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, *kernel).to(dtype)
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha or rank)).to(dtype)
    save_file(tensors, path, metadata)
    return path


def deltas(path: Path) -> dict[str, Tensor]:
    """What a kohya file changes, float64, by the format's definition alone."""
    tensors = {key: tensor.double() for key, tensor in load_file(path).items()}
    found = {}
    for key in tensors:
        name, _, part = key.partition(".")
        if part == "lora_up.weight":
            up, down = tensors[key].flatten(1), tensors[f"{name}.lora_down.weight"].flatten(1)
            found[name] = up @ down * tensors[f"{name}.alpha"] / len(down)
    return found


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def merge(*arguments: object) -> int:
    return merge_deft.main([str(argument) for argument in arguments])


def sum_of(tmp_path: Path, *arguments: object) -> Path:
    output = tmp_path / "sum.safetensors"
    assert merge(*arguments, "--save_to", output) == 0
    return output


def test_a_sum_is_the_sum_of_the_deltas(tmp_path):
    """Of different ranks, alphas and strengths, each layer where it is, those of one file alone too."""
    fewer = {name: shape for name, shape in SHAPES.items() if name not in (OUT, TEXT)}
    a, b = adapter(tmp_path / "a.safetensors", 3, 1.5), adapter(tmp_path / "b.safetensors", 5, shapes=fewer)
    found = deltas(sum_of(tmp_path, "--models", a, b, "--ratios", 0.7, -1.25))
    theirs = deltas(a), deltas(b)
    assert found.keys() == theirs[0].keys()
    for name, delta in found.items():
        assert relative_error(delta, 0.7 * theirs[0][name] - 1.25 * theirs[1].get(name, 0)) < 1e-6


def test_a_sum_has_one_rank_and_what_clients_need(tmp_path):
    """One rank and alpha in the whole file, four dimensions where the weight has them, the dtype of the first."""
    a = adapter(
        tmp_path / "a.safetensors", 3, dtype=torch.float16, ss_network_dim="3", ss_base_model_version="sdxl_base_v1-0"
    )
    b = adapter(tmp_path / "b.safetensors", 5)
    output = sum_of(tmp_path, "--models", a, b)
    tensors = load_file(output)
    assert {float(tensors[key]) for key in tensors if key.endswith("alpha")} == {8.0}
    assert tensors[f"{CONV}.lora_down.weight"].shape == (8, 12, 3, 3)
    assert tensors[f"{CONV}.lora_up.weight"].shape == (24, 8, 1, 1)
    assert tensors[f"{CONV}.lora_up.weight"].dtype == torch.float16
    found = metadata_of(output)
    assert found["ss_network_dim"] == "8"
    assert found["ss_base_model_version"] == "sdxl_base_v1-0"
    assert found["modelspec.merged_from"] == "a, b"
    assert json.loads(found["deft_history"])[-1]["tool"] == "merge_deft"


def test_a_sum_of_ranks_above_the_weights_own_stays_exact(tmp_path):
    a, b = adapter(tmp_path / "a.safetensors", 9), adapter(tmp_path / "b.safetensors", 11)
    output = sum_of(tmp_path, "--models", a, b)
    found, theirs = deltas(output), (deltas(a), deltas(b))
    assert all(relative_error(found[name], theirs[0][name] + theirs[1][name]) < 1e-6 for name in SHAPES)
    used = (load_file(output)[f"{TEXT}.lora_up.weight"] != 0).any(0).sum()
    assert used == 10  # inputs of that weight; 20 directions would be half of them nothing


@pytest.mark.parametrize("precision", ["fp16", "bf16", "float"])
def test_precisions(tmp_path, precision):
    a, b = adapter(tmp_path / "a.safetensors"), adapter(tmp_path / "b.safetensors")
    output = sum_of(tmp_path, "--models", a, b, "--save_precision", precision)
    assert load_file(output)[f"{OUT}.lora_up.weight"].dtype == deft_tools.PRECISIONS[precision]
    error = relative_error(deltas(output)[OUT], deltas(a)[OUT] + deltas(b)[OUT])
    assert error < {"fp16": 2e-3, "bf16": 1e-2, "float": 1e-6}[precision]


def test_a_cut_sum_is_the_best_approximation(tmp_path, capsys):
    """And the error that is said is the file's."""
    a, b = adapter(tmp_path / "a.safetensors", 4), adapter(tmp_path / "b.safetensors", 6)
    output = sum_of(tmp_path, "--models", a, b, "--new_rank", 5, "--new_conv_rank", 2)
    found, theirs = deltas(output), (deltas(a), deltas(b))
    said = json.loads(metadata_of(output)["deft_history"])[-1]["errors"]
    for name, delta in found.items():
        whole = theirs[0][name] + theirs[1][name]
        S = torch.linalg.svdvals(whole)
        best = float(S[2 if name == CONV else 5 :].norm() / S.norm())
        assert relative_error(delta, whole) == pytest.approx(best, rel=1e-4)
        assert said[name] == pytest.approx(best, rel=1e-2)
    assert "relative error" in capsys.readouterr().out


def test_an_energy_keeps_as_few_directions_as_that_takes(tmp_path):
    a, b = adapter(tmp_path / "a.safetensors", 4), adapter(tmp_path / "b.safetensors", 6)
    output = sum_of(tmp_path, "--models", a, b, "--energy", 0.8)
    theirs = deltas(a), deltas(b)
    for name, delta in deltas(output).items():
        shares = torch.linalg.svdvals(theirs[0][name] + theirs[1][name]).square().cumsum(0)
        least = int((shares / shares[-1] < 0.8).sum()) + 1
        assert torch.linalg.matrix_rank(delta, rtol=1e-5) == least
        assert relative_error(delta, theirs[0][name] + theirs[1][name]) <= math.sqrt(0.2) * (1 + 1e-5)


def test_text_encoders_have_a_strength_of_their_own(tmp_path):
    a, b = adapter(tmp_path / "a.safetensors"), adapter(tmp_path / "b.safetensors")
    found = deltas(sum_of(tmp_path, "--models", a, b, "--ratios", 1, 2, "--te_ratios", 0.5, 0))
    theirs = deltas(a), deltas(b)
    assert relative_error(found[ATTENTION], theirs[0][ATTENTION] + 2 * theirs[1][ATTENTION]) < 1e-6
    assert relative_error(found[TEXT], 0.5 * theirs[0][TEXT]) < 1e-6


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("[0.5,1,1,1,1,0.25,1,1,1,0,1,1]", {TEXT: 0.5, ATTENTION: 1, MIDDLE: 0.25, OUT: 0}),
        (",".join(["0.5"] + ["1"] * 4 + ["2"] + ["1"] * 14), {TEXT_G: 0.5, ATTENTION: 2, CONV: 2, MIDDLE: 1}),
        (",".join(["0.5"] + ["1"] * 4 + ["2"] + ["1"] * 20), {TEXT_G: 0.5, ATTENTION: 2, CONV: 2, MIDDLE: 1}),
        ("INALL", {TEXT: 1, CONV: 1, MIDDLE: 0, OUT: 0}),
        ("outall", {TEXT: 1, CONV: 0, MIDDLE: 0, OUT: 1}),
        ("IN*=0.5, mid=2, BASE=-1", {TEXT: -1, CONV: 0.5, MIDDLE: 2, OUT: 1}),
    ],
    ids=["12", "20", "26", "INALL", "OUTALL", "names"],
)
def test_block_weights(tmp_path, weights, expected):
    a, b = adapter(tmp_path / "a.safetensors"), adapter(tmp_path / "b.safetensors")
    found = deltas(sum_of(tmp_path, "--models", a, b, "--ratios", 2, 1, "--lbws", weights, "ALL"))
    theirs = deltas(a), deltas(b)
    for name, weight in expected.items():
        assert relative_error(found[name], 2 * weight * theirs[0][name] + theirs[1][name]) < 1e-6


@pytest.mark.parametrize(
    ("layer", "block"),
    [
        ("lora_te_text_model_encoder_layers_3_mlp_fc1", "BASE"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in", "IN01"),
        ("lora_unet_down_blocks_0_downsamplers_0_conv", "IN03"),
        ("lora_unet_down_blocks_2_attentions_1_transformer_blocks_0_attn1_to_q", "IN08"),
        ("lora_unet_down_blocks_3_resnets_1_conv1", "IN11"),
        ("lora_unet_mid_block_attentions_0_proj_in", "MID"),
        ("lora_unet_up_blocks_0_resnets_0_conv1", "OUT00"),
        ("lora_unet_up_blocks_1_attentions_0_proj_in", "OUT03"),
        ("lora_unet_up_blocks_1_upsamplers_0_conv", "OUT05"),
        ("lora_unet_up_blocks_3_attentions_2_proj_out", "OUT11"),
        ("lora_unet_label_emb_0_0", "IN00"),
        ("lora_unet_input_blocks_8_1_proj_in", "IN08"),
        ("lora_unet_middle_block_2_in_layers_2", "MID"),
        ("lora_unet_output_blocks_0_1_proj_in", "OUT00"),
        ("lora_unet_output_blocks_8_0_in_layers_2", "OUT08"),
        ("lora_unet_double_blocks_7_img_attn_qkv", "D07"),
        ("lora_unet_single_blocks_30_linear1", "S30"),
        ("lora_unet_img_in", ""),
    ],
)
def test_names_of_blocks(layer, block):
    assert deft_blocks.block_of(layer) == block


SD = "lora_unet_down_blocks_0_attentions_0_proj_in"


def refused(capsys, *arguments: object) -> str:
    """The one line that the tool says, with exit code 2."""
    assert merge(*arguments) == 2
    said = capsys.readouterr()
    lines = said.err.strip().splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ratios", 1, 2, 3], "--ratios: 3 for 2 files"),
        (["--ratios", "nan", 1], "--ratios: give finite numbers"),
        (["--te_ratios", 1], "--te_ratios: 1 for 2 files"),
        (["--lbws", "ALL"], "--lbws: 1 for 2 files"),
        (["--lbws", "1,2,3", "ALL"], "--lbws 1,2,3: 3 numbers"),
        (["--lbws", "ALLES", "ALL"], "INALL"),
        (["--lbws", "IN4=1", "ALL"], "IN4 is no block of the adapter; it has BASE, IN04, MID, OUT03"),
        (["--lbws", "IN04=x", "ALL"], "x is no number"),
        (["--ratios", 0, 0], "leave no layer"),
        (["--new_rank", 0], "--new_rank 0: give 1 or more"),
        (["--new_conv_rank", 4], "--new_conv_rank: give --new_rank too"),
        (["--energy", 1.5], "--energy 1.5"),
        (["--stochastic_rounding", 1], "--stochastic_rounding is for merging into a checkpoint"),
        (["--ignore_unmatched"], "--ignore_unmatched is for merging into a checkpoint"),
    ],
)
def test_wrong_options_are_refused_in_one_line(tmp_path, capsys, options, words):
    a, b = adapter(tmp_path / "a.safetensors"), adapter(tmp_path / "b.safetensors")
    output = tmp_path / "sum.safetensors"
    assert words in refused(capsys, "--models", a, b, *options, "--save_to", output)
    assert not output.exists()


def test_wrong_files_are_refused_in_one_line(tmp_path, capsys):
    a = adapter(tmp_path / "a.safetensors")
    before = a.read_bytes()
    output = tmp_path / "sum.safetensors"
    assert "missing.safetensors" in refused(
        capsys, "--models", a, tmp_path / "missing.safetensors", "--save_to", output
    )
    (tmp_path / "cut.safetensors").write_bytes(before[: len(before) // 2])
    assert "not a whole" in refused(capsys, "--models", a, tmp_path / "cut.safetensors", "--save_to", output)
    other = adapter(tmp_path / "other.safetensors", shapes={**SHAPES, OUT: (12, 20)})
    line = refused(capsys, "--models", a, other, "--save_to", output)
    assert OUT in line
    assert str(a) in line
    assert str(other) in line
    assert "this is an input" in refused(capsys, "--models", a, other, "--save_to", a)
    assert a.read_bytes() == before
    assert not output.exists()


def test_lists_for_another_architecture_are_refused(tmp_path, capsys):
    sd = {SD: (12, 12), "lora_te_text_model_encoder_layers_0_mlp_fc1": (8, 8)}
    for shapes, weights, words in (
        (SHAPES, ",".join("1" * 17), "for SDXL give a list of 12 or 20 or 26"),
        (SHAPES, "OUTD", "Stable Diffusion 1.x"),
        (sd, ",".join("1" * 12), "17 or 26"),
    ):
        a = adapter(tmp_path / "a.safetensors", shapes=shapes)
        assert words in refused(capsys, "--models", a, "--lbws", weights, "--save_to", tmp_path / "sum.safetensors")


def test_adapters_for_different_models_are_refused(tmp_path, capsys):
    a, b = adapter(tmp_path / "a.safetensors"), adapter(tmp_path / "b.safetensors", shapes={SD: (12, 12)})
    line = refused(capsys, "--models", a, b, "--save_to", tmp_path / "sum.safetensors")
    assert "a.safetensors is for SDXL" in line
    assert "b.safetensors for Stable Diffusion 1.x" in line


def added_by_sd_scripts(files: list[Path], ratios: list[float], concat: bool = False) -> dict[str, Tensor]:
    """The deltas of what sd-scripts' networks/merge_lora.py (commit 48d368fa, lines 157 to 205) writes, float64."""
    whole: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for file, ratio in zip(files, ratios, strict=True):
        tensors = {key: tensor.double().flatten(1) for key, tensor in load_file(file).items() if tensor.dim() > 1}
        for key, tensor in tensors.items():
            name, _, part = key.partition(".")
            alpha = float(load_file(file)[f"{name}.alpha"])
            scale = math.sqrt(alpha / alphas.setdefault(name, alpha)) * ratio
            scaled = tensor * (abs(scale) if "lora_up" in part else scale)
            if key not in whole:
                whole[key] = scaled
            elif concat:
                whole[key] = torch.cat([whole[key], scaled], 1 if "lora_up" in part else 0)
            else:
                whole[key] = whole[key] + scaled
    down = {name: whole[f"{name}.lora_down.weight"] for name in alphas}
    return {name: whole[f"{name}.lora_up.weight"] @ down[name] * alphas[name] / len(down[name]) for name in alphas}


def test_adding_ups_and_downs_is_no_sum(tmp_path):
    """As sd-scripts' merge_lora.py does: (u1 + u2)(d1 + d2) has cross terms as large as the sum."""
    files = [adapter(tmp_path / "a.safetensors"), adapter(tmp_path / "b.safetensors")]
    ours, theirs = deltas(sum_of(tmp_path, "--models", *files)), added_by_sd_scripts(files, [1, 1])
    parts = [deltas(file) for file in files]
    for name in SHAPES:
        exact = parts[0][name] + parts[1][name]
        assert relative_error(ours[name], exact) < 1e-6
        assert relative_error(theirs[name], exact) > 0.5


def test_concatenating_without_alpha_is_no_sum(tmp_path):
    """With --concat its alpha stays that of one file under twice the rank, which halves the sum; and its ratio, which
    goes to up and to down, is squared."""
    files = [adapter(tmp_path / "a.safetensors"), adapter(tmp_path / "b.safetensors")]
    ours, theirs = deltas(sum_of(tmp_path, "--models", *files)), added_by_sd_scripts(files, [1, 1], concat=True)
    weaker = added_by_sd_scripts(files[:1], [0.5])
    parts = [deltas(file) for file in files]
    for name in SHAPES:
        exact = parts[0][name] + parts[1][name]
        assert relative_error(ours[name], exact) < 1e-6
        assert relative_error(theirs[name], exact / 2) < 1e-6
        assert relative_error(weaker[name], parts[0][name] / 4) < 1e-6


def clamped(D: Tensor, rank: int) -> Tensor:
    """The rule of sd-scripts' networks/svd_merge_lora.py (commit 48d368fa, lines 356 to 378), in float64."""
    U, S, Vh = torch.linalg.svd(D)
    up, down = U[:, :rank] @ S[:rank].diag(), Vh[:rank]
    most = torch.quantile(torch.cat([up.flatten(), down.flatten()]), 0.99)
    return up.clamp(-most, most) @ down.clamp(-most, most)


def test_a_clamped_truncation_is_not_the_best(tmp_path):
    """sd-scripts' svd_merge_lora.py clamps both factors at one quantile, though `up` carries the singular values."""
    files = [adapter(tmp_path / "a.safetensors"), adapter(tmp_path / "b.safetensors")]
    ours = deltas(sum_of(tmp_path, "--models", *files, "--new_rank", 4))
    parts = [deltas(file) for file in files]
    for name in (ATTENTION, CONV, MIDDLE):
        exact = parts[0][name] + parts[1][name]
        S = torch.linalg.svdvals(exact)
        best = float(S[4:].norm() / S.norm())
        assert relative_error(ours[name], exact) < best * 1.0001
        assert relative_error(clamped(exact, 4), exact) > best * 1.01


UNET, TEXT_PART, TEXT_G_PART = (
    "model.diffusion_model.",
    "conditioner.embedders.0.transformer.text_model.",
    "conditioner.embedders.1.model.",
)
# where SHAPES' layers stand in an SGM file, by its makers' names: key, first row
SGM = {
    ATTENTION: (f"{UNET}input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight", 0),
    CONV: (f"{UNET}input_blocks.4.0.in_layers.2.weight", 0),
    MIDDLE: (f"{UNET}middle_block.1.proj_in.weight", 0),
    OUT: (f"{UNET}output_blocks.3.1.proj_out.weight", 0),
    TEXT: (f"{TEXT_PART}encoder.layers.0.mlp.fc1.weight", 0),
    TEXT_G: (f"{TEXT_G_PART}transformer.resblocks.0.attn.in_proj_weight", 16),
}


def sgm(path: Path, dtype: torch.dtype = torch.float32, text: bool = True, **metadata: str) -> Path:
    """A checkpoint in SDXL's layout with few and small layers."""
    tensors = {key: torch.randn(SHAPES[name]) for name, (key, _) in SGM.items() if name != TEXT_G}
    tensors |= {
        f"{TEXT_G_PART}transformer.resblocks.0.attn.in_proj_weight": torch.randn(48, 16),
        f"{UNET}output_blocks.8.0.in_layers.2.weight": torch.randn(8, 8, 3, 3),
        f"{UNET}label_emb.0.0.weight": torch.randn(16, 8),
        f"{UNET}input_blocks.4.0.in_layers.2.bias": torch.randn(24),
        "first_stage_model.decoder.conv_in.weight": torch.randn(8, 4, 3, 3),
    }
    kept = {key: tensor.to(dtype) for key, tensor in tensors.items() if text or not key.startswith("conditioner.")}
    save_file(kept, path, metadata)
    return path


def expected(base: Path, parts: list[tuple[Path, float]], places: Mapping[str, tuple[str, int]]) -> dict[str, Tensor]:
    """A checkpoint's tensors with the sum of adapters' deltas added, float64."""
    tensors = {key: tensor.double() for key, tensor in load_file(base).items()}
    for path, ratio in parts:
        for name, delta in deltas(path).items():
            key, first = places[name]
            tensors[key].flatten(1)[first : first + len(delta)] += ratio * delta
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_adapters_go_into_a_checkpoint(tmp_path, dtype):
    """Several at once: their float64 sum, in the file's own dtype and order, the rest byte for byte."""
    base = sgm(tmp_path / "base.safetensors", dtype, **{"modelspec.title": "Base", "modelspec.hash_sha256": "0x12"})
    a, b = adapter(tmp_path / "a.safetensors", 3, 2.0), adapter(tmp_path / "b.safetensors", 5)
    output = sum_of(tmp_path, "--sd_model", base, "--models", a, b, "--ratios", 0.8, -0.5)
    exact, before, found = expected(base, [(a, 0.8), (b, -0.5)], SGM), load_file(base), load_file(output)
    assert found.keys() == exact.keys()
    changed = {key for key, _ in SGM.values()}
    for key, tensor in found.items():
        assert tensor.dtype == dtype
        assert tensor.shape == before[key].shape
        if key in changed:
            assert relative_error(tensor, exact[key]) < {torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps / 2)
            assert relative_error(tensor, exact[key]) <= relative_error(exact[key].to(dtype), exact[key]) + 3e-7
        else:
            assert torch.equal(tensor, before[key])
    kept = metadata_of(output)
    assert kept["modelspec.merged_from"] == "Base, a, b"
    assert "modelspec.hash_sha256" not in kept
    assert json.loads(kept["deft_history"])[-1]["ratios"] == [0.8, -0.5]


def test_block_weights_and_text_encoders_in_a_checkpoint(tmp_path):
    base, a = sgm(tmp_path / "base.safetensors"), adapter(tmp_path / "a.safetensors")
    output = sum_of(tmp_path, "--sd_model", base, "--models", a, "--te_ratios", 0.25, "--lbws", "IN04=0.5,MID=0")
    before, found = load_file(base), load_file(output)
    for name, weight in {ATTENTION: 0.5, MIDDLE: 0, OUT: 1, TEXT: 0.25, TEXT_G: 0.25}.items():
        key, first = SGM[name]
        delta = deltas(a)[name]
        rows = slice(first, first + len(delta))
        assert relative_error(found[key][rows], before[key][rows].double() + weight * delta) < 1e-6


def test_the_precision_of_a_checkpoint_can_be_chosen(tmp_path):
    base, a = sgm(tmp_path / "base.safetensors"), adapter(tmp_path / "a.safetensors")
    output = sum_of(tmp_path, "--sd_model", base, "--models", a, "--save_precision", "bf16")
    exact = expected(base, [(a, 1)], SGM)
    for key, tensor in load_file(output).items():
        assert tensor.dtype == torch.bfloat16
        assert relative_error(tensor, exact[key]) < 4e-3


def test_a_diffusers_folder_stays_one(tmp_path, model_folder):
    """The shipped model; a loader that knows nothing of this reads the result."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    before = UNet2DConditionModel.from_pretrained(model_folder / "unet").state_dict()
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    name = "lora_unet_" + path.replace(".", "_")
    a = adapter(tmp_path / "a.safetensors", shapes={name: tuple(before[f"{path}.weight"].shape)})
    output = tmp_path / "merged"
    assert merge("--sd_model", model_folder, "--models", a, "--ratios", 0.5, "--save_to", output) == 0
    after = StableDiffusionPipeline.from_pretrained(output, safety_checker=None).unet.state_dict()
    for key, tensor in before.items():
        if key == f"{path}.weight":
            assert relative_error(after[key], tensor.double() + 0.5 * deltas(a)[name]) < 1e-6
        else:
            assert torch.equal(after[key], tensor)


def test_changes_that_depend_on_the_base_are_merged_with_it(tmp_path, capsys, monkeypatch):
    """Each of the weight as it was before, whatever else is added; without a base they are refused."""
    base, a = sgm(tmp_path / "base.safetensors"), adapter(tmp_path / "a.safetensors")
    D = torch.randn(24, 24)
    changes = {
        ATTENTION: OnBase("DoRA", (24, 16), lambda W: 0.1 * W.flip(0) + W.square()),
        MIDDLE: Dense("a full difference", (24, 24), lambda: D),
    }
    other = Adapter("b.safetensors", "kohya", "SDXL", changes, {}, {}, torch.float32)
    read = deft_formats.read
    monkeypatch.setattr(deft_formats, "read", lambda path: other if str(path) == "b.safetensors" else read(path))
    output = sum_of(tmp_path, "--sd_model", base, "--models", a, "b.safetensors", "--ratios", 1, 0.5)
    exact, W = expected(base, [(a, 1)], SGM), load_file(base)[SGM[ATTENTION][0]].double()
    exact[SGM[ATTENTION][0]] += 0.5 * (0.1 * W.flip(0) + W.square())
    exact[SGM[MIDDLE][0]] += 0.5 * D.double()
    assert all(relative_error(tensor, exact[key]) < 1e-6 for key, tensor in load_file(output).items())
    line = refused(capsys, "--models", a, "b.safetensors", "--save_to", tmp_path / "no.safetensors")
    assert "DoRA, which depends on the base model's weights" in line
    del changes[ATTENTION]
    line = refused(capsys, "--models", a, "b.safetensors", "--save_to", tmp_path / "no.safetensors")
    assert "give --new_rank or --energy" in line
    output = sum_of(tmp_path, "--models", a, "b.safetensors", "--new_rank", 24)
    assert relative_error(deltas(output)[MIDDLE], deltas(a)[MIDDLE] + D.double()) < 1e-6


def test_what_does_not_fit_a_checkpoint_is_refused(tmp_path, capsys):
    base = sgm(tmp_path / "base.safetensors", text=False)
    output = tmp_path / "merged.safetensors"
    a = adapter(tmp_path / "a.safetensors")
    line = refused(capsys, "--sd_model", base, "--models", a, "--save_to", output)
    assert "2 of its 6 layers, such as lora_te1_" in line
    assert "--te_ratios 0 leaves the text encoders out" in line
    odd = adapter(tmp_path / "odd.safetensors", shapes={ATTENTION: (24, 16), f"{MIDDLE}_x": (24, 24)})
    line = refused(capsys, "--sd_model", base, "--models", odd, "--save_to", output)
    assert f"{MIDDLE}_x" in line
    assert "--ignore_unmatched" in line
    small = adapter(tmp_path / "small.safetensors", shapes={ATTENTION: (24, 12)})
    assert ATTENTION in refused(capsys, "--sd_model", base, "--models", small, "--save_to", output)
    sd = adapter(tmp_path / "sd.safetensors", shapes={"lora_unet_down_blocks_0_attentions_0_proj_in": (12, 12)})
    line = refused(capsys, "--sd_model", base, "--models", sd, "--ignore_unmatched", "--save_to", output)
    assert "looks made for SDXL" in line
    assert "an adapter" in refused(capsys, "--sd_model", a, "--models", a, "--save_to", output)
    assert "this is an input" in refused(capsys, "--sd_model", base, "--models", a, "--save_to", base)
    assert "--new_rank" in refused(capsys, "--sd_model", base, "--models", a, "--new_rank", 4, "--save_to", output)
    assert not output.exists()


def test_layers_that_are_not_there_can_be_left_out(tmp_path, capsys):
    base, a = sgm(tmp_path / "base.safetensors", text=False), adapter(tmp_path / "a.safetensors")
    for options in (["--te_ratios", 0], ["--ignore_unmatched"]):
        output = sum_of(tmp_path, "--sd_model", base, "--models", a, *options)
        key = SGM[MIDDLE][0]
        assert relative_error(load_file(output)[key], load_file(base)[key].double() + deltas(a)[MIDDLE]) < 1e-6
    assert "left out: 2 layers" in capsys.readouterr().out


FLUX_QKV, FLUX_LINEAR = "double_blocks.0.img_attn.qkv", "single_blocks.0.linear1"
FLUX_NAMES = {f"lora_unet_{path.replace('.', '_')}": (f"{path}.weight", 0) for path in (FLUX_QKV, FLUX_LINEAR)}


def scaled_fp8(path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A FLUX.1 file as ComfyUI's scaled fp8 ones are, and its weights as ComfyUI reads them: codes times scale."""
    tensors, read = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, {}
    for layer, shape in ((FLUX_QKV, (48, 16)), (FLUX_LINEAR, (112, 16))):
        weight = torch.randn(shape) * 0.02
        scale = weight.abs().max() / 448
        tensors[f"{layer}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
        tensors[f"{layer}.scale_weight"] = scale
        read[f"{layer}.weight"] = tensors[f"{layer}.weight"].double() * scale.double()
    save_file(tensors, path)
    return path, read


def test_scaled_fp8_is_merged_as_what_it_stands_for(tmp_path):
    """sd-scripts' flux_merge_lora.py (commit 48d368fa, lines 143 to 181) adds a delta to the codes, scale or not."""
    base, W = scaled_fp8(tmp_path / "base.safetensors")
    shapes = {name: tuple(W[key].shape) for name, (key, _) in FLUX_NAMES.items()}
    a = adapter(tmp_path / "a.safetensors", 4, alpha=0.02, shapes=shapes)
    output = sum_of(tmp_path, "--flux_model", base, "--models", a)
    found, codes = load_file(output), load_file(base)
    for name, (key, _) in FLUX_NAMES.items():
        delta, scale_key = deltas(a)[name], key.replace(".weight", ".scale_weight")
        assert found[key].dtype == torch.float8_e4m3fn
        ours = found[key].double() * found[scale_key].double() - W[key]
        theirs = (codes[key].float() + delta.float()).to(torch.float8_e4m3fn).double() * codes[scale_key] - W[key]
        assert delta.norm() > 0.3 * W[key].norm()  # so that rounding to three bits does not hide it
        assert relative_error(ours, delta) < 0.1
        assert relative_error(theirs, delta) > 0.9  # next to nothing of it is left


def test_stochastic_rounding_is_the_seeds(tmp_path):
    base, a = sgm(tmp_path / "base.safetensors", torch.bfloat16), adapter(tmp_path / "a.safetensors")
    content = []
    for seed in (1, 1, 2):
        options = ["--sd_model", base, "--models", a, "--stochastic_rounding", seed]
        content.append(load_file(sum_of(tmp_path, *options))[SGM[MIDDLE][0]].clone())
    assert torch.equal(content[0], content[1])
    assert not torch.equal(content[0], content[2])
