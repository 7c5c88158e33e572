"""The real flux_train_network.py on a FLUX.1 of real widths with two blocks of each kind and random weights, on a CPU.

    SD_SCRIPTS_LARGE=/folder SD_SCRIPTS_DIR=... SD_SCRIPTS_PYTHON=... pytest tests/integration/test_flux.py -s

About a quarter of an hour and 20 GB of memory. The model is made once and kept in that folder.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration import conftest
from tests.integration.conftest import SIDE, STATES, check_moved, metadata, needs_large, run_script, tensors

pytestmark = needs_large


def train(world: Path, name: str, *options: str, fails: bool = False) -> str:
    models = ["--pretrained_model_name_or_path", str(world / "flux.safetensors"), "--ae", str(world / "ae.safetensors")]
    models += ["--clip_l", str(world / "clip.safetensors"), "--t5xxl", str(world / "t5.safetensors")]
    usual = ["--cache_latents", "--cache_text_encoder_outputs_to_disk", "--t5xxl_max_token_length", "32"]
    usual += ["--timestep_sampling", "shift", "--model_prediction_type", "raw", "--guidance_scale", "1"]
    usual += ["--gradient_checkpointing", "--full_bf16"]
    return conftest.train(
        world, name, *models, *usual, *options, fails=fails, script="flux_train_network.py", precision="bf16"
    )


@pytest.fixture(scope="session")
def world() -> Path:
    return conftest.large_world("flux")


@pytest.fixture(scope="session")
def trained(world) -> str:
    return train(world, "base", *STATES)


def test_trains_and_saves(world, trained):
    found = tensors(world, "base")
    names = {key.split(".")[0] for key in found}
    assert len(names) == 2 * 10 + 2 * 3 + 72
    assert "lora_unet_single_blocks_1_linear1" in names
    check_moved(world, "base")
    assert metadata(world, "base")["modelspec.architecture"].startswith("flux-1-dev")


def test_continues_from_weights(world, trained):
    output = train(world, "continued", "--network_weights", str(world / "out" / "base.safetensors"))
    assert "98 modules loaded" in " ".join(output.split())


def test_splits_queries_keys_and_values_and_merges_base_weights(world, trained):
    """In sd-scripts' own LoRA, split_qkv ends the run with an error."""
    own = ("--network_module", "networks.lora_flux", "--network_train_unet_only", "--network_args", "split_qkv=True")
    assert "too many values to unpack" in train(world, "own", *own, fails=True)
    base = str(world / "out" / "base.safetensors")
    output = train(world, "split", "--base_weights", base, "--network_train_unet_only",
                   "--network_args", "split_qkv=true", "train_double_block_indices=0")  # fmt: skip
    assert "weights are merged" in output
    found = tensors(world, "split")
    assert found["lora_unet_single_blocks_0_linear1.lora_down.weight"].shape == (16, 3072)
    up = found["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"]
    assert not up[:3072, 4:].any()  # block by block
    assert not any("double_blocks_1_" in key for key in found)
    again = train(world, "split_again", "--network_weights", str(world / "out" / "split.safetensors"),
                  "--dim_from_weights", "--network_train_unet_only")  # fmt: skip
    assert "26 modules loaded" in " ".join(again.split())


def test_the_file_is_the_same_in_networks_lora_flux(world, trained):
    run_script(SIDE, "compare", world)
    errors = json.loads((world / "compare.json").read_text())
    print("--- relative distance of the transformer's output from networks.lora_flux applied:", errors)
    assert errors.pop("base") > 1e-4
    assert max(errors.values()) < 1e-5


def test_draws_what_networks_lora_flux_draws(world):
    """flux_minimal_inference.py itself; about six minutes."""
    run_script(SIDE, "generate", world)
    distances = json.loads((world / "generate.json").read_text())
    print("--- largest of 255, and relative in the latents, from the network that was trained:", distances)
    pixels, latents = distances.pop("none")
    assert pixels > 8
    assert latents > 1e-2
    for way, (pixels, latents) in distances.items():
        assert pixels <= 1, way
        assert latents < 1e-5, way


def test_resumes(world, trained):
    conftest.check_resuming(world, train)


def test_samples_before_the_first_step_make_the_file_to_keep(world):
    conftest.check_keeping(world, train)
