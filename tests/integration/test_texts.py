"""What our families make of captions, sizes and single files, against sd-scripts' own strategies and converters on the
same small models, each side in its own Python.

SD_SCRIPTS_DIR=... SD_SCRIPTS_PYTHON=... pytest tests/integration/test_texts.py -s
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.models import sd, sdxl
from tests import small_models
from tests.conftest import loaded, relative_error
from tests.integration.conftest import needs_sd_scripts, run_script

pytestmark = needs_sd_scripts

LENGTHS = (None, 75, 150, 225)
OPTIONS = {
    **{f"{kind} {skip} {length}": (kind, skip, length)
       for kind in ("sd15", "sd2") for skip in (None, 1, 2) for length in LENGTHS},
    **{f"sdxl {length}": ("sdxl", None, length) for length in LENGTHS},
}  # fmt: skip
# a letter of the small tokenizer's is a token
CAPTIONS = ["", "a cat", "hello! no humans!", *("x" * n for n in (74, 75, 76, 149, 150, 151, 224, 225, 226, 300))]
SIZES = [[512.0, 768.0, 0.0, 0.0, 512.0, 768.0], [1500.0, 1000.0, 13.0, 250.0, 1024.0, 960.0]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Our small models, with text encoders that sd-scripts' side made, and what it made of them."""
    folder = tmp_path_factory.mktemp("texts")
    for kind in small_models.UNETS:
        small_models.build(kind, folder / kind)
    names = {"openai_clip-vit-large-patch14": {}, "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k": {},
             "stabilityai_stable-diffusion-2": {"pad_token": "!"}}  # fmt: skip
    for name, changes in names.items():
        small_models.tokenizer(folder / "tokenizers" / name, **changes)
    rows = {"options": OPTIONS, "captions": CAPTIONS, "sizes": SIZES}
    (folder / "rows.json").write_text(json.dumps(rows))
    run_script(Path(__file__).with_name("texts_side.py"), folder, with_deft=False)
    return folder


@pytest.mark.parametrize("name", list(OPTIONS))
def test_captions(folder, name):
    kind, clip_skip, length = OPTIONS[name]
    model = loaded(folder / kind, clip_skip=clip_skip, max_token_length=length)
    theirs = load_file(folder / "found.safetensors")
    with torch.no_grad():
        ours = model.encode_text(CAPTIONS)
    for part, value in ours.items():
        wanted = theirs[f"{name}/{part}"]
        assert value.shape == wanted.shape
        errors = [relative_error(a, b) for a, b in zip(value, wanted, strict=True)]
        print(f"--- {name} {part}: largest relative error {max(errors):.1e}")
        assert max(errors) < 1e-5
    assert ours["hidden"].std(0).mean() > 1e-3  # captions differ


def test_the_conditions_of_sdxl(folder):
    """The vector behind the timestep's, from sizes and the pooled text."""
    model = loaded(folder / "sdxl")
    theirs = load_file(folder / "found.safetensors")
    seen = []
    model.denoiser.add_embedding.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        text = model.encode_text(CAPTIONS[:2])
        model.predict(torch.zeros(2, 4, 8, 8), torch.tensor([1, 2]), text, torch.tensor(SIZES))
    wanted = torch.cat([theirs["sdxl None/pooled"][:2], theirs["sizes"]], 1)
    assert seen[0].shape == wanted.shape
    assert float((seen[0] - wanted).abs().max()) < 1e-5


@pytest.mark.parametrize("kind", ["sd15", "sd2", "sdxl"])
def test_single_files_of_sd_scripts(folder, kind, monkeypatch):
    """Its converters write what we read. SDXL's file has the second encoder's projection the other way round than the
    published files (sd-scripts reads those without turning it, too), so that it is turned here first."""
    monkeypatch.setattr(sd, "CONFIGS", folder)
    monkeypatch.setattr(sdxl, "CONFIGS", folder)
    file = folder / f"{kind}.safetensors"
    tensors = load_file(file)
    if kind == "sdxl":
        turned = "conditioner.embedders.1.model.text_projection"
        tensors[turned] = tensors[turned].T.contiguous()
        save_file(tensors, file)
    ours, whole = (loaded(path, tokenizer_cache_dir=str(folder / "tokenizers")) for path in (file, folder / kind))
    for part, other in zip((ours.denoiser, ours.vae, *ours.text_encoders),
                           (whole.denoiser, whole.vae, *whole.text_encoders), strict=True):  # fmt: skip
        a, b = dict(part.named_parameters()), dict(other.named_parameters())
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    text = [model.encode_text(CAPTIONS) for model in (ours, whole)]
    if kind != "sd2":  # whose tokenizer in a folder takes "!" for its padding
        assert all(torch.equal(text[0][part], text[1][part]) for part in text[0])
