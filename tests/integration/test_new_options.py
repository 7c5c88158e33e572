"""Options that sd-scripts got with v0.11, as far as they concern a network: with the real trainer, on a CPU.

SD_SCRIPTS_DIR=... SD_SCRIPTS_PYTHON=... pytest tests/integration/test_new_options.py -s
"""

from __future__ import annotations

import json
import os
import shutil

import pytest
from PIL import Image

from tests.integration.conftest import (
    SD_SCRIPTS,
    SIDE,
    check_moved,
    metadata,
    needs_sd_scripts,
    run_script,
    tensors,
    train,
)

pytestmark = [
    needs_sd_scripts,
    pytest.mark.skipif(not os.path.exists(f"{SD_SCRIPTS}/library/compile_utils.py"), reason="needs v0.11"),
]


def test_inpainting_adapts_the_same_layers(world):
    """The U-Net's first convolution has 9 inputs then; it is not adapted, so the file is a usual one."""
    output = train(world, "inpainting", "--train_inpainting")
    assert "expanding UNet conv_in from 4 to 9 channels" in " ".join(output.split())
    check_moved(world, "inpainting")
    found = tensors(world, "inpainting")
    assert len(found) == 3 * 264
    assert found["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"].shape == (4, 320, 1, 1)


def test_small_pictures_are_skipped(world, tmp_path):
    pictures = tmp_path / "images"
    shutil.copytree(world / "images", pictures)
    Image.new("RGB", (48, 48)).save(pictures / "1_sks thing" / "small.png")
    output = train(world, "skipped", "--train_data_dir", str(pictures), "--skip_image_resolution", "48")
    assert "filtered 1 images by original resolution" in " ".join(output.split())
    assert metadata(world, "skipped")["ss_num_train_images"] == "4"
    check_moved(world, "skipped")


def test_blocks_compiled_one_by_one(tmp_path):
    """`--compile`, which Anima's trainer has: the plain run's losses, and nothing compiled anew as weights move."""
    file = tmp_path / "found.json"
    run_script(SIDE.with_name("compile_side.py"), file)
    found = json.loads(file.read_text())
    print("---", found)
    for plain, compiled in (("plain", "compiled"), ("plain, checkpointed", "compiled, checkpointed")):
        assert found[compiled]["losses"] == pytest.approx(found[plain]["losses"], rel=1e-6)
        assert len(set(found[compiled]["graphs"])) == 1
