"""The real sdxl_train_network.py on a full-size SDXL with random weights, on a CPU with 24 GB of memory.

    SD_SCRIPTS_LARGE=/folder SD_SCRIPTS_DIR=... SD_SCRIPTS_PYTHON=... pytest tests/integration/test_sdxl.py -s

About twenty minutes. The model is made once and kept in that folder.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration import conftest
from tests.integration.conftest import STATES, check_moved, metadata, needs_large, tensors

pytestmark = needs_large


def train(world: Path, name: str, *options: str) -> str:
    options = ("--full_bf16", "--no_half_vae", "--gradient_checkpointing", *options)
    return conftest.train(world, name, *options, script="sdxl_train_network.py", precision="bf16")


@pytest.fixture(scope="session")
def world() -> Path:
    return conftest.large_world("sdxl")


@pytest.fixture(scope="session")
def trained(world) -> str:
    return train(world, "base", "--text_encoder_lr", "1e-3", "5e-4", *STATES)


def test_trains_and_saves(world, trained):
    found = tensors(world, "base")
    assert len(found) == 3 * (722 + 264)
    prefixes = {key.split("_")[1] for key in found}
    assert prefixes == {"unet", "te1", "te2"}
    check_moved(world, "base")
    assert metadata(world, "base")["ss_base_model_version"].startswith("sdxl_")


@pytest.mark.parametrize("options", [(), ("--dim_from_weights",)], ids=["network_weights", "dim_from_weights"])
def test_continues_from_weights(world, trained, options):
    file = str(world / "out" / "base.safetensors")
    output = train(world, f"continued{len(options)}", "--network_weights", file, *options)
    assert "986 modules loaded" in " ".join(output.split())


def test_merges_base_weights(world, trained):
    output = train(world, "merged", "--base_weights", str(world / "out" / "base.safetensors"))
    assert "weights are merged" in output
    assert metadata(world, "merged")["deft_base_hash"] != metadata(world, "base")["deft_base_hash"]


def test_blocks_and_convolutions(world):
    blocks = ",".join(["0"] * 7 + ["4"] * 9 + ["0"] * 7)
    train(world, "blocks", "--network_train_unet_only", "--network_args", f"block_dims={blocks}", "conv_dim=2",
          "conv_block_dims=" + blocks, "down_lr_weight=linear", "loraplus_unet_lr_ratio=4")  # fmt: skip
    found = {key.split(".")[0] for key in tensors(world, "blocks")}
    assert not any(key.startswith("lora_unet_output_blocks_8") for key in found)
    assert "lora_unet_middle_block_0_in_layers_2" in found


def test_draws_what_networks_lora_draws(world, trained):
    images = conftest.draw("sdxl_gen_img.py", world, [("networks.lora",), ("networks.deft",)], "--steps", "4")
    assert float((images[("networks.deft",)] - images[("networks.lora",)]).abs().max()) < 2


def test_resumes(world, trained):
    conftest.check_resuming(world, train)


def test_samples_before_the_first_step_make_the_file_to_keep(world):
    conftest.check_keeping(world, train)
