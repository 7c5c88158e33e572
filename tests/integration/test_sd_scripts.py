"""The real train_network.py of sd-scripts on a full-size SD 1.5 with random weights, on a CPU.

    SD_SCRIPTS_DIR=/path/to/sd-scripts SD_SCRIPTS_PYTHON=/path/to/its/venv/bin/python pytest tests/integration

About ten minutes. `-s` shows what the training prints at its end.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from tests.conftest import loaded
from tests.integration.conftest import (
    ROOT,
    SD_SCRIPTS,
    SIDE,
    STATES,
    check_keeping,
    check_kept,
    check_moved,
    check_resuming,
    delta_norms,
    draw,
    metadata,
    needs_sd_scripts,
    run_script,
    tensors,
    train,
)

pytestmark = needs_sd_scripts


@pytest.fixture(scope="session")
def trained(world) -> str:
    return train(world, "base", *STATES)


def test_names_are_those_of_networks_lora(tmp_path):
    run_script(SIDE, "names", tmp_path / "names.json")
    for theirs, ours in json.loads((tmp_path / "names.json").read_text()).values():
        assert ours == theirs
        assert list(ours) == list(theirs)


def test_layers_and_ranks_of_every_architecture(tmp_path):
    """On models of real shapes, for every option that chooses layers: sd-scripts' own classes are the reference."""
    file = tmp_path / "found.json"
    run_script(SIDE.with_name("architectures_side.py"), file)
    found = json.loads(file.read_text())
    assert len(found) > 40
    for what, (theirs, ours) in found.items():
        assert sorted(ours) == sorted(theirs), what
        assert ours == theirs or "refiners" in what, what  # there, sd-scripts has another order


def test_one_step_on_every_transformer(tmp_path):
    """A small model of each real class: a fresh adapter changes nothing, every module gets gradients, and sd-scripts'
    own network computes from the file what was trained."""
    file = tmp_path / "found.json"
    printed = run_script(SIDE.with_name("steps_side.py"), file)
    print("\n".join(line for line in printed.splitlines() if line.startswith("---")))
    for name, found in json.loads(file.read_text()).items():
        assert found["fresh"] == 0, name
        assert found["with gradients"] == found["modules"], name
        assert found["trained"] > 1e-3, name
        assert found["read"] < (2e-2 if name == "hunyuan" else 1e-5), name  # that one in bfloat16
        assert found["unmatched"] == 0, name


def test_trains_and_saves(world, trained):
    found = tensors(world, "base")
    assert len(found) == 3 * 264
    assert all(value.isfinite().all() for value in found.values())
    check_moved(world, "base", 0.99)  # at 64 pixels the mid block has one position: q and k stand still
    known = metadata(world, "base")
    assert known["ss_network_module"] == "networks.deft"
    assert json.loads(known["deft_options"])["alpha"] == 2.0


def test_resumes(world, trained):
    check_resuming(world, train)


@pytest.mark.parametrize("options", [(), ("--dim_from_weights",)], ids=["network_weights", "dim_from_weights"])
def test_continues_from_weights(world, trained, options):
    name = f"continued{len(options)}"
    file = str(world / "out" / "base.safetensors")
    output = train(world, name, "--network_weights", file, *options)
    assert "264 modules loaded" in " ".join(output.split())
    assert tensors(world, name)["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"].shape[0] == 4


def test_merges_base_weights(world, trained):
    file = str(world / "out" / "base.safetensors")
    output = train(world, "merged", "--base_weights", file, "--base_weights_multiplier", "0.5")
    assert "weights are merged" in output
    assert len(tensors(world, "merged")) == 3 * 264
    assert metadata(world, "merged")["deft_base_hash"] != metadata(world, "base")["deft_base_hash"]


@pytest.mark.parametrize(("half", "prefix", "count"), [("unet", "lora_unet", 192), ("text_encoder", "lora_te", 72)])
def test_trains_one_half(world, half, prefix, count):
    train(world, half, f"--network_train_{half}_only")
    found = tensors(world, half)
    assert len(found) == 3 * count
    assert all(key.startswith(prefix) for key in found)


def test_scales_weight_norms(world):
    output = train(world, "norms", "--scale_weight_norms", "0.001")
    assert "Keys Scaled=" in output
    assert max(delta_norms(tensors(world, "norms"))) < 0.001 * (1 + 1e-3)


def test_convolutions_para_and_dropouts(world):
    arguments = ["conv_dim=2", "conv_alpha=2", "rank_dropout=0.1", "module_dropout=0.1", "gate=true", "basis=relu"]
    train(world, "conv", "--network_dropout", "0.1", "--gradient_checkpointing", "--network_args", *arguments)
    assert len(tensors(world, "conv")) == 3 * (72 + 278)
    train(world, "para", "--network_args", "para=true")
    assert min(delta_norms(tensors(world, "para"))) > 0


def test_a_misspelt_option_ends_the_run_before_it_begins(world):
    output = train(world, "wrong", "--network_args", "convdim=4", fails=True)
    assert "unknown network_args key 'convdim' (did you mean 'conv_dim'?)" in output
    assert not (world / "out" / "wrong.safetensors").exists()


def test_gen_img_draws_with_the_file_what_it_draws_with_networks_lora(world, trained):
    """Applied, merged, and pre-calculated; the reference is sd-scripts' own LoRA class on the same file."""
    ways = [("networks.lora",), ("networks.deft",), ("networks.deft", "--network_merge"),
            ("networks.deft", "--network_pre_calc")]  # fmt: skip
    images = draw("gen_img.py", world, ways, "--steps", "4")
    for pixels in images.values():
        assert float((pixels - images[("networks.lora",)]).abs().max()) < 3


def test_stays_out_of_the_directions_that_the_model_draws_with(world, kept):
    """`library.keep` on the full-size model, then a training with its file."""
    train(world, "kept", "--network_args", f"keep={kept}")
    check_kept(world, "kept", kept)


def test_samples_before_the_first_step_make_the_file_to_keep(world):
    check_keeping(world, train)
    output = train(world, "no-samples", "--network_args", f"keep={world / 'none.safetensors'}", fails=True)
    assert "--sample_at_first" in output


def test_single_file_is_the_same_model(world):
    """The checkpoint as sd-scripts' own tool writes it from the Diffusers folder."""
    single = world / "single.safetensors"
    run_script("tools/convert_diffusers20_original_sd.py", world / "model", single, "--v1", "--fp16")
    one = loaded(single, tokenizer_cache_dir=str(world / "tokenizers"))
    two = loaded(world / "model")
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = (getattr(m.pipeline, part).state_dict() for m in (one, two))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(one.encode_text(["sks"])["hidden"], two.encode_text(["sks"])["hidden"])


def test_files_copied_into_the_checkout(world, tmp_path):
    checkout = tmp_path / "sd-scripts"
    shutil.copytree(SD_SCRIPTS or "", checkout, ignore=shutil.ignore_patterns(".git"))
    for file in (ROOT / "networks").glob("deft*.py"):
        shutil.copy(file, checkout / "networks")
    train(world, "copied", checkout=checkout)
    assert len(tensors(world, "copied")) == 3 * 264
