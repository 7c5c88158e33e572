"""A file's metadata edited and the files beside it, as the programs that read them do."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import struct
import sys

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from networks import deft_sharing
from networks.deft_config import DeftError


@pytest.fixture
def lora(tmp_path):
    """A file whose header's length is no multiple of 8 by itself, as other programs write too."""
    path = tmp_path / "cat.safetensors"
    tensors = {f"lora_unet_a.{part}": torch.randn(4, 4, dtype=torch.float16) for part in ("x", "y")}
    save_file(
        tensors | {"lora_unet_a.alpha": torch.tensor(4.0)}, str(path), {"ss_output_name": "cat", "ss_v2": "False"}
    )
    return path


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "shot.png"
    noise = torch.randint(0, 255, (700, 900, 3), dtype=torch.uint8).numpy()  # the worst for a JPEG
    Image.fromarray(noise).save(path)
    return path


def metadata_of(path) -> dict[str, str]:
    with safe_open(str(path), "pt") as file:
        return file.metadata()


def addnet_hash(path) -> str:
    """Forge's `addnet_hash_safetensors` (modules/hashes.py) and Civitai's AutoV3: of what stands behind the header."""
    content = path.read_bytes()
    return hashlib.sha256(content[8 + struct.unpack("<Q", content[:8])[0] :]).hexdigest()


def test_metadata_alone_leaves_the_tensors_bytes_and_the_hash(lora, picture, tmp_path):
    new = deft_sharing.edited(
        metadata_of(lora), ["trigger=sks cat, ñandú", f"preview={picture}", "my.key=a=b"], ["ss_v2"]
    )
    out = tmp_path / "out.safetensors"
    deft_sharing.write_with_metadata(lora, out, new)
    assert addnet_hash(out) == addnet_hash(lora)
    found = metadata_of(out)
    assert found["modelspec.trigger_phrase"] == "sks cat, ñandú"
    assert found["my.key"] == "a=b"
    assert found["ss_output_name"] == "cat"
    assert "ss_v2" not in found
    before, after = load_file(lora), load_file(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_picture_fits_into_the_header_and_is_read_as_the_programs_do(lora, picture, tmp_path):
    crowded = metadata_of(lora) | {"ss_tag_frequency": "x" * 500_000}
    new = deft_sharing.edited(crowded, [f"preview={picture}"], [])
    out = tmp_path / "out.safetensors"
    deft_sharing.write_with_metadata(lora, out, new)
    assert struct.unpack("<Q", out.read_bytes()[:8])[0] < 2**20
    metadata = metadata_of(out)
    cover = Image.open(io.BytesIO(base64.b64decode(json.loads(metadata["ssmd_cover_images"])[0])))
    assert cover.format == "JPEG"
    assert cover.size[0] / cover.size[1] == pytest.approx(900 / 700, rel=0.02)
    kind, _, content = metadata["modelspec.thumbnail"].partition(",")
    assert kind == "data:image/jpeg;base64"
    assert max(Image.open(io.BytesIO(base64.b64decode(content))).size) <= 256
    with pytest.raises(DeftError, match=r"no room for a picture.*--unset ss_tag_frequency"):
        deft_sharing.edited(crowded | {"ss_tag_frequency": "x" * 1_048_000}, [f"preview={picture}"], [])


@pytest.mark.parametrize(
    ("settings", "unset", "told"),
    [
        (["trigger"], [], "--set trigger: write key=value"),
        (["trigger= "], [], "--unset trigger"),
        (["triger=x"], [], "did you mean 'trigger'"),
        (["weight=much"], [], "give a number"),
        (["sshs_model_hash=x"], [], "made of the tensors"),
        (["deft_layers={}"], [], "made of the tensors"),
        (["preview=nothing.png"], [], "cannot be read as a picture"),
        ([f"preview={__file__}"], [], "cannot be read as a picture"),
        ([], ["title"], "the file has no modelspec.title"),
    ],
)
def test_mistakes_are_told_in_one_line(lora, settings, unset, told):
    with pytest.raises(DeftError, match=told) as raised:
        deft_sharing.edited(metadata_of(lora), settings, unset)
    assert "\n" not in str(raised.value)


def test_without_pillow_a_picture_is_refused_in_words(lora, picture, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DeftError, match="needs Pillow; pip install pillow"):
        deft_sharing.edited(metadata_of(lora), [f"preview={picture}"], [])
    assert deft_sharing.edited(metadata_of(lora), ["trigger=x"], [])["modelspec.trigger_phrase"] == "x"


def test_a_model_that_is_not_named_is_left_to_what_the_ui_sees(lora):
    """Forge and A1111 take any "sd version" that they know the word of, Unknown too, before their own look."""
    for version, expected in (("", None), ("chroma", "Unknown"), ("sd_v1", "SD1")):
        deft_sharing.write_sidecars(lora, {"ss_base_model_version": version}, None)
        webui = json.loads(lora.with_suffix(".json").read_text(encoding="utf-8"))
        assert webui.get("sd version") == expected
        lora.with_suffix(".json").unlink()


# what ComfyUI-Lora-Manager's LoraMetadata has no default for (py/utils/models.py, commit 003ee55)
NEEDED = {"file_name", "model_name", "file_path", "size", "modified", "sha256", "base_model", "preview_url"}


def test_the_files_beside_it_have_what_their_readers_need(lora, picture):
    settings = [
        "trigger=sks cat, fluffy",
        "description=A cat",
        "weight=0.8",
        "usage_hint=short prompts",
        f"preview={picture}",
    ]
    metadata = deft_sharing.edited(metadata_of(lora) | {"ss_base_model_version": "sdxl_base_v1-0"}, settings, [])
    deft_sharing.write_sidecars(lora, metadata, picture)
    webui = json.loads(lora.with_suffix(".json").read_text(encoding="utf-8"))
    assert webui == {
        "description": "A cat", "sd version": "SDXL", "activation text": "sks cat, fluffy", "preferred weight": 0.8,
        "negative text": "", "notes": "short prompts",
    }  # fmt: skip
    manager = json.loads(lora.with_suffix(".metadata.json").read_text(encoding="utf-8"))
    assert manager.keys() >= NEEDED
    assert manager["sha256"] == hashlib.sha256(lora.read_bytes()).hexdigest()
    assert manager["size"] == lora.stat().st_size
    assert manager["civitai"]["trainedWords"] == ["sks cat", "fluffy"]
    assert json.loads(manager["usage_tips"]) == {"strength": 0.8}
    assert manager["base_model"] == "SDXL 1.0"
    assert lora.with_suffix(".png").read_bytes() == picture.read_bytes()  # its generation parameters are in it
    assert manager["preview_url"] == "cat.png"
    assert str(lora.parent) not in lora.with_suffix(".metadata.json").read_text(encoding="utf-8")


def test_the_embedded_picture_is_written_where_none_is_given(lora, picture):
    metadata = deft_sharing.edited(metadata_of(lora), [f"preview={picture}"], [])
    deft_sharing.write_sidecars(lora, metadata, None)
    assert Image.open(lora.with_suffix(".jpg")).format == "JPEG"


def test_what_people_have_written_beside_it_stays(lora):
    theirs = {"activation text": "my words", "notes": "", "favourite": True, "preferred weight": 0}
    lora.with_suffix(".json").write_text(json.dumps(theirs))
    lora.with_suffix(".metadata.json").write_text(
        json.dumps({"from_civitai": False, "favorite": True, "sha256": "old"})
    )
    metadata = deft_sharing.edited(metadata_of(lora), ["trigger=sks", "weight=0.7", "usage_hint=hint"], [])
    deft_sharing.write_sidecars(lora, metadata, None)
    webui = json.loads(lora.with_suffix(".json").read_text())
    assert webui["activation text"] == "my words"
    assert webui["favourite"] is True
    assert (webui["notes"], webui["preferred weight"]) == ("hint", 0.7)
    manager = json.loads(lora.with_suffix(".metadata.json").read_text())
    assert (manager["from_civitai"], manager["favorite"]) == (False, True)
    assert manager["sha256"] == hashlib.sha256(lora.read_bytes()).hexdigest()
    deft_sharing.write_sidecars(lora, metadata, None, given={"modelspec.trigger_phrase"})
    assert json.loads(lora.with_suffix(".json").read_text())["activation text"] == "sks"
    lora.with_suffix(".json").write_text("{")
    with pytest.raises(DeftError, match="is there and cannot be read"):
        deft_sharing.write_sidecars(lora, metadata, None)


@pytest.mark.parametrize(
    ("metadata", "webui"),
    [
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "SDXL"),
        ({"ss_base_model_version": "sd_v1"}, "SD1"),
        ({"modelspec.architecture": "flux-1-dev/lora"}, "Flux"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "SD2"),
        ({}, "Unknown"),
    ],
)
def test_the_base_model_has_the_name_that_readers_know(metadata, webui):
    assert deft_sharing.base_of(metadata).webui == webui
