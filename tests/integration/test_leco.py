"""The real train_leco.py of sd-scripts (from v0.11.0 on): sliders and erasing by prompts alone, on a CPU.

SD_SCRIPTS_DIR=... SD_SCRIPTS_PYTHON=... pytest tests/integration/test_leco.py -s
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.integration.conftest import (
    SD_SCRIPTS,
    check_kept,
    check_moved,
    draw,
    large_world,
    metadata,
    needs_large,
    needs_sd_scripts,
    tensors,
    train,
)

SCRIPT = "train_leco.py"
pytestmark = [
    needs_sd_scripts,
    pytest.mark.skipif(not os.path.exists(f"{SD_SCRIPTS}/{SCRIPT}"), reason=f"this version has no {SCRIPT}"),
]
PROMPTS = {
    "slider": """
        resolution = 64
        [[targets]]
        target_class = "cat"
        positive = "old cat"
        negative = "young cat"
        """,
    "erasing": """
        [[prompts]]
        target = "van gogh"
        action = "erase"
        resolution = 64
        """,
}


def leco(world: Path, name: str, prompts: str, *options: str, fails: bool = False, sdxl: bool = False) -> str:
    """Trains for a few steps on one of `PROMPTS`; returns what was printed."""
    file = world / f"{prompts}.toml"
    file.write_text(PROMPTS[prompts], encoding="utf-8")
    few = ("--prompts_file", str(file), "--max_denoising_steps", "3", "--gradient_checkpointing", *options)
    if not sdxl:
        return train(world, name, *few, fails=fails, script=SCRIPT, pictures=False)
    return train(world, name, *few, "--full_bf16", script=f"sdxl_{SCRIPT}", precision="bf16", pictures=False)


def test_a_slider_is_a_plain_lora_and_0_is_the_base_model(world):
    leco(world, "slider", "slider", "--max_train_steps", "4", "--learning_rate", "1e-2")
    check_moved(world, "slider")
    found = tensors(world, "slider")
    assert len(found) == 3 * 192  # of the U-Net alone
    assert {key.split(".", 1)[1] for key in found} == {"lora_up.weight", "lora_down.weight", "alpha"}
    known = metadata(world, "slider")
    assert known["ss_leco_prompt_count"] == "4"
    assert (known["ss_base_model_version"], known["ss_v2"]) == ("sd_v1", "False")
    assert known["modelspec.architecture"] == "stable-diffusion-v1/lora"
    ways = [("none",), ("networks.lora",), *(("networks.deft", "--network_mul", m) for m in ("0.7", "0", "-0.7"))]
    none, theirs, ours, off, other_way = draw("gen_img.py", world, ways, "--steps", "4", run="slider").values()
    assert float((ours - theirs).abs().max()) < 3
    assert bool((off == none).all())
    assert float((ours - none).abs().max()) > 3
    assert float((ours - other_way).abs().max()) > 3


def test_erasing_goes_on_from_a_file(world):
    leco(world, "erased", "erasing", "--network_args", "conv_dim=2")
    check_moved(world, "erased")
    output = leco(world, "erased-more", "erasing", "--network_weights", str(world / "out" / "erased.safetensors"),
                  "--dim_from_weights")  # fmt: skip
    assert "278 modules loaded" in " ".join(output.split())


def test_keeping_needs_a_file(world, kept):
    """Nothing is drawn before the first step, so this trainer cannot make it."""
    output = leco(world, "none-kept", "slider", "--network_args", f"keep={world / 'none.safetensors'}", fails=True)
    assert "none.safetensors: no such file; `python -m library.keep`" in output
    assert not (world / "out" / "none-kept.safetensors").exists()
    leco(world, "slider-kept", "slider", "--network_args", f"keep={kept}")
    check_kept(world, "slider-kept", kept)


@needs_large
def test_sdxl_slider():
    world = large_world("sdxl")
    leco(world, "slider", "slider", sdxl=True)
    check_moved(world, "slider")
    assert len(tensors(world, "slider")) == 3 * 722
    known = metadata(world, "slider")
    assert known["ss_base_model_version"] == "sdxl_base_v1-0"
    assert known["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
