"""How long a header with a picture is: at most what ComfyUI hands on, whoever writes the file."""

from __future__ import annotations

import base64
import io
import json
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from networks import deft_io, deft_pictures, deft_sharing, deft_tools, resize_deft
from networks.deft_pictures import COVER, HEADER_LIMIT, THUMBNAIL
from tests.test_sharing import addnet_hash, metadata_of

LAYERS = 1315  # of SDXL, whose names and places alone take half of a header


def header_of(path) -> int:
    return int.from_bytes(path.read_bytes()[:8], "little")


def noise(size: int = 512) -> bytes:
    written = io.BytesIO()
    Image.fromarray(torch.randint(0, 255, (size, size, 3), dtype=torch.uint8).numpy()).save(written, "PNG")
    return written.getvalue()


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    found = {}
    for i in range(LAYERS):
        name = f"lora_unet_input_blocks_{i:04d}_1_transformer_blocks_0_attn1_to_out_0"
        found |= {f"{name}.lora_down.weight": torch.randn(1, 2), f"{name}.lora_up.weight": torch.randn(2, 1),
                  f"{name}.alpha": torch.tensor(1.0)}  # fmt: skip
    return found


def tags(number: int) -> str:
    return json.dumps({"10_sks cat": {f"a tag number {i}, é": i for i in range(number)}}, ensure_ascii=False)


WRITERS = {"of networks.deft": deft_io.write_safetensors, "of tools": lambda t, p, m: deft_tools.write_adapter(p, t, m)}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("number", [0, 5000, 12000, 40000])
def test_every_writer_keeps_the_header_short(tensors, tmp_path, caplog, writer, number):
    path, crowded = tmp_path / "x.safetensors", {"ss_tag_frequency": tags(number)}
    metadata = crowded | deft_pictures.fields_of(noise())
    WRITERS[writer](tensors, path, metadata)
    found = metadata_of(path)
    assert found["ss_tag_frequency"] == crowded["ss_tag_frequency"]
    assert (COVER in found) == (THUMBNAIL in found)
    if COVER in found:
        assert header_of(path) < HEADER_LIMIT
        sizes = [max(Image.open(io.BytesIO(content)).size) for content in both(found)]
        assert sizes[1] <= min(sizes[0], 256)
        assert (sizes[0] == 512) == (number < 12000)
        assert not caplog.messages
    else:
        assert number == 40000
        (told,) = caplog.messages
        assert told.startswith(f"{path}: without its picture")
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[key], tensors[key]) for key in tensors)


def both(metadata) -> tuple[bytes, bytes]:
    """The cover and the thumbnail."""
    return (
        base64.b64decode(json.loads(metadata[COVER])[0]),
        base64.b64decode(metadata[THUMBNAIL].removeprefix("data:image/jpeg;base64,")),
    )


def test_a_tool_that_carries_a_cover_on_keeps_the_header_short(tensors, tmp_path):
    """resize_deft.py, whose history of every layer is new in the header."""
    source, path = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    metadata = {"ss_base_model_version": "sdxl_base_v1-0", "ss_tag_frequency": tags(9000)}
    deft_io.write_hashed(tensors, source, metadata | deft_pictures.fields_of(noise()))
    assert header_of(source) > HEADER_LIMIT * 0.9
    assert resize_deft.main(["--model", str(source), "--new_rank", "1", "--save_to", str(path)]) == 0
    assert header_of(path) < HEADER_LIMIT
    assert COVER in metadata_of(path)
    new = deft_sharing.edited(metadata_of(source), ["description=" + "x" * 60_000], [])
    deft_sharing.write_with_metadata(source, tmp_path / "z.safetensors", new)
    assert header_of(tmp_path / "z.safetensors") < HEADER_LIMIT
    assert COVER in metadata_of(tmp_path / "z.safetensors")


PICTURES = deft_pictures.fields_of(noise(64))


@settings(deadline=None, max_examples=30)
@given(st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=5), st.integers(0, HEADER_LIMIT))
def test_what_is_no_picture_stays_as_it_is(metadata, taken):
    for given_ in (metadata, metadata | PICTURES, metadata | {THUMBNAIL: "data:text/plain;base64,AAAA"}):
        found, _ = deft_pictures.fitted(given_, taken)
        assert {key: value for key, value in found.items() if key not in PICTURES} == metadata
        assert found.keys() <= given_.keys()


def test_without_pillow_a_picture_that_is_too_large_goes(tensors, tmp_path, monkeypatch, caplog):
    metadata = {"ss_tag_frequency": tags(9000)} | deft_pictures.fields_of(noise())
    monkeypatch.setitem(sys.modules, "PIL", None)
    deft_io.write_hashed(tensors, tmp_path / "x.safetensors", metadata)
    assert COVER not in metadata_of(tmp_path / "x.safetensors")
    assert "pip install pillow" in caplog.text


def test_hashes_of_the_tensors_do_not_know_of_the_picture(tensors, tmp_path):
    """sshs_model_hash and sshs_legacy_hash as sd-scripts makes them, AutoV3 as Civitai reads it; SHA-256 does know."""
    some = {key: torch.randn(40, 4000) for key in list(tensors)[:2]}  # beyond 1 MiB, which the old hash begins at
    found = []
    for i, more in enumerate(({}, deft_pictures.fields_of(noise()) | {"modelspec.trigger_phrase": "sks cat"})):
        path = tmp_path / f"{i}.safetensors"
        deft_io.write_hashed(some, path, {"ss_v2": "False"} | more)
        metadata, hashes = metadata_of(path), deft_sharing.hashes_of(path)
        assert metadata["sshs_model_hash"] == addnet_hash(path)
        assert hashes["AutoV3"] == addnet_hash(path)[:12]
        found.append((metadata["sshs_model_hash"], metadata["sshs_legacy_hash"], hashes))
    assert found[0][:2] == found[1][:2]
    assert found[0][2]["AutoV3"] == found[1][2]["AutoV3"]
    assert found[0][2]["AutoV2"] != found[1][2]["AutoV2"]
    assert all(one[2]["AutoV2"] == one[2]["SHA256"][:10] for one in found)
