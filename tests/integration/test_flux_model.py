"""Our FLUX.1 against sd-scripts': its own small model's files, its text encoding, its transformer's answers.

SD_SCRIPTS_DIR=... SD_SCRIPTS_PYTHON=... pytest tests/integration/test_flux_model.py -s
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.models import flux
from tests import small_flux
from tests.conftest import loaded, relative_error
from tests.integration.conftest import needs_sd_scripts, run_script

pytestmark = needs_sd_scripts

SIDE = Path(__file__).with_name("flux_side.py")
CAPTIONS = ["sks cat", "a longer caption, of which T5 does not read the end", ""]
GUIDANCE, TOKENS = 2.7, 24


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(the small model, the folder with what sd-scripts made of the same)"""
    folder = tmp_path_factory.mktemp("flux")
    ours = small_flux.build(folder)
    ours.files(folder)
    torch.manual_seed(1)
    given = {"noisy": torch.randn(3, 16, 8, 12), "timesteps": torch.tensor([999.0, 503.7, 1.0])}
    save_file(given | {"pixels": torch.rand(2, 3, 64, 96) * 2 - 1}, folder / "given.safetensors")
    ae = {"resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1] * 4, "num_res_blocks": 1,
          "z_channels": 16, "scale_factor": 0.3611, "shift_factor": 0.1159}  # fmt: skip
    asked = {"captions": CAPTIONS, "tokens": TOKENS, "guidance": GUIDANCE, "width": 256, "ae": ae}
    (folder / "asked.json").write_text(json.dumps(asked))
    run_script(SIDE, ours.folder, ours.tokenizers, folder, with_deft=False)
    return ours, folder


def ours(world, kind: str, masked: bool, monkeypatch):
    small, folder = world
    monkeypatch.setattr(flux, "CONFIG", small.folder)
    parts = {name: str(folder / f"{name}.safetensors") for name in ("clip_l", "t5xxl", "ae")}
    options = {"t5xxl_max_token_length": TOKENS, "apply_t5_attn_mask": masked, "guidance_scale": GUIDANCE}
    return loaded(folder / f"{kind}.safetensors", tokenizer_cache_dir=str(small.tokenizers), **parts, **options)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("kind", ["dev", "schnell"])
@torch.no_grad()
def test_predicts_what_sd_scripts_predicts(world, kind, masked, monkeypatch):
    given, found = (load_file(world[1] / f"{name}.safetensors") for name in ("given", "found"))
    model = ours(world, kind, masked, monkeypatch)
    assert model.is_dev == (kind == "dev")
    answer = model.predict(given["noisy"], given["timesteps"], model.encode_text(CAPTIONS), torch.zeros(3, 6))
    expected = found[f"{kind} {masked}"]
    error = relative_error(answer, expected)
    print(f"--- {kind}, masked {masked}: relative error {error:.1e}")
    assert error < 1e-5
    assert relative_error(expected, found[f"{kind} {not masked}"]) > 1e-2


@torch.no_grad()
def test_encodes_and_decodes_what_sd_scripts_does(world, monkeypatch):
    given, found = (load_file(world[1] / f"{name}.safetensors") for name in ("given", "found"))
    model = ours(world, "dev", False, monkeypatch)
    monkeypatch.setattr(torch, "randn", lambda shape, **_: torch.zeros(shape))  # the mode, not a draw
    latents = model.encode_image(given["pixels"], [torch.Generator()] * len(given["pixels"]))
    assert relative_error(latents, found["latents"]) < 1e-5
    config = model.vae.config
    pixels = model.vae.decode(given["noisy"] / config.scaling_factor + config.shift_factor).sample
    assert relative_error(pixels, found["pixels"]) < 1e-5
