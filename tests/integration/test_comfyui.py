"""ComfyUI's own key maps, loading and patching, with files of musubi-tuner's models.

    COMFYUI_DIR=/path/to/ComfyUI pytest tests/integration/test_comfyui.py

Written for 0.33; comfy/ is all that is needed of it, and COMFYUI_PYTHON a Python with torch, numpy and psutil.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import small_musubi
from tests.test_musubi_files import ALL_LAYERS, IN_COMFYUI, assert_equal, changes, saved, trained

COMFYUI = os.environ.get("COMFYUI_DIR")
pytestmark = pytest.mark.skipif(not COMFYUI, reason="set COMFYUI_DIR to a checkout of ComfyUI")


@pytest.mark.parametrize("options", [{}, {"pad": "false"}, ALL_LAYERS], ids=["default", "unpadded", "all"])
def test_it_finds_every_key_and_patches_what_was_trained(options, tmp_path):
    expected = {}
    for name in IN_COMFYUI:
        network = trained(name, **options)
        saved(network, tmp_path / f"{name}.safetensors")
        shapes = small_musubi.comfy_shapes(name)
        (tmp_path / f"{name}.json").write_text(json.dumps(shapes))
        expected[name] = small_musubi.in_comfyui(name, changes(network))
    side = Path(__file__).with_name("comfyui_side.py")
    command = [os.environ.get("COMFYUI_PYTHON", sys.executable), str(side), str(COMFYUI), str(tmp_path)]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    told = next((line for line in done.stdout.splitlines() if line.startswith("--- ")), "")
    assert done.returncode == 0, done.stdout[-4000:]
    results = json.loads(told.removeprefix("--- "))
    assert results.keys() == expected.keys()
    for name, (unmatched, missing) in results.items():
        assert (unmatched, missing) == ([], []), name
        found = load_file(tmp_path / f"{name}.patched.safetensors")
        by_path = {key.removeprefix("diffusion_model.").removesuffix(".weight"): w.double() for key, w in found.items()}
        assert_equal(by_path, expected[name])
