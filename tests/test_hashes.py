"""Files that are hashed and written tensor by tensor, beside safetensors' own writer and sd-scripts' own hashes."""

from __future__ import annotations

import ast
import hashlib
import io
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from networks import deft_io
from tests.hashes import webui_hashes

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.float8_e5m2, torch.float8_e4m3fn, torch.int16, torch.float16,
    torch.bfloat16, torch.int32, torch.float32, torch.float64, torch.int64,
]  # fmt: skip
SHAPES = [(), (3,), (2, 5), (4, 3, 1, 1), (0, 3)]
TENSORS = st.dictionaries(
    st.text("abz_.é", min_size=1, max_size=8), st.tuples(st.sampled_from(DTYPES), st.sampled_from(SHAPES)), min_size=1
)


def metadata_of(path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def written(tensors, metadata, folder) -> Path:
    path = folder / "a.safetensors"
    deft_io.write_hashed(tensors, path, metadata)
    return path


@given(TENSORS, st.dictionaries(st.sampled_from(["ss_a", "ss_é", "other", 'ss_"\n']), st.text('xyé\n"\\', max_size=9)))
def test_a_file_is_laid_out_as_by_safetensors(tmp_path_factory, kinds, metadata):
    tensors = {name: (4 * torch.rand(shape)).to(dtype) for name, (dtype, shape) in kinds.items()}
    path = written(tensors, metadata, tmp_path_factory.getbasetemp())
    content, expected = path.read_bytes(), safetensors.torch.save(dict(tensors), metadata)
    of_file, of_theirs = (8 + int.from_bytes(found[:8], "little") for found in (content, expected))
    assert content[of_file:] == expected[of_theirs:]
    found = load_file(path)
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
    assert metadata_of(path) == {**metadata, **webui_hashes(tensors, metadata)}


@pytest.fixture
def large() -> dict[str, torch.Tensor]:
    """Data on both sides of the 64 KiB that the old hash is of, which begin and end within tensors."""
    return {f"layer_{k}.lora_up.weight": torch.randn(200_000 + k, generator=torch.manual_seed(k)) for k in range(9)}


@pytest.mark.parametrize("more", [{}, {"ss_tag_frequency": "x" * 0x100800}, {"ss_tag_frequency": "x" * 0x120000}])
def test_the_old_hash_is_of_the_same_bytes_wherever_the_header_ends(large, tmp_path, more):
    path = written(large, {"modelspec.title": "a", **more}, tmp_path)
    found = {key: value for key, value in metadata_of(path).items() if key.startswith("sshs_")}
    assert found == webui_hashes(large, more)  # of one field: safetensors writes several in any order


def test_tensors_are_not_copied(large, tmp_path, monkeypatch):
    places = []
    monkeypatch.setattr(deft_io, "write_whole", lambda path, parts: places.extend(list(parts)[1:]))
    written(large, {}, tmp_path)
    assert {torch.frombuffer(part, dtype=torch.uint8).data_ptr() for part in places} == {
        tensor.data_ptr() for tensor in large.values()
    }


@pytest.mark.skipif("SD_SCRIPTS_DIR" not in os.environ, reason="SD_SCRIPTS_DIR: a checkout of sd-scripts")
def test_hashes_are_those_of_sd_scripts(large, tmp_path):
    source = Path(os.environ["SD_SCRIPTS_DIR"], "library", "train_util.py").read_text(encoding="utf-8")
    wanted = {"precalculate_safetensors_hashes", "addnet_hash_legacy", "addnet_hash_safetensors"}
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    names = {"hashlib": hashlib, "BytesIO": io.BytesIO, "safetensors": safetensors}
    exec(compile(tree, "train_util.py", "exec"), names)  # their own functions, without the rest of the file's imports
    metadata = {"ss_steps": "3", "modelspec.title": "a"}
    model_hash, legacy_hash = names["precalculate_safetensors_hashes"](large, metadata)
    found = metadata_of(written(large, metadata, tmp_path))
    assert (found["sshs_model_hash"], found["sshs_legacy_hash"]) == (model_hash, legacy_hash)
