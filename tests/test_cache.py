"""Caches: keys that say everything, and files that are checked."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from library.data import cache
from library.data.cache import Memory, Store, fingerprint, generator_of, key_of, latents_key, text_key
from networks.deft_config import DeftError


def tensors() -> dict[str, Tensor]:
    return {
        "latents": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "none": torch.ones(0, 4),
        "one": torch.tensor(5),
        "mask": torch.tensor([True, False]),
    }


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "cache")


@pytest.fixture
def written(store) -> tuple[Store, str, Path]:
    key = key_of(number=1)
    store.write(key, tensors())
    (file,) = store.folder.glob("??/*")
    return store, key, file


def warnings_in(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


# keys

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=4)
    | st.binary(max_size=4)
    | st.sampled_from([torch.float32, torch.float16])
)
parts = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def typed(part):
    """What two parts have to share to be the same."""
    if isinstance(part, dict):
        return ("dict", tuple(sorted((name, typed(value)) for name, value in part.items())))
    if isinstance(part, list):
        return ("list", tuple(map(typed, part)))
    return (type(part).__name__, repr(part))


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "b", "ab"]), parts), st.dictionaries(st.sampled_from(["a", "b"]), parts))
def test_keys_are_equal_exactly_where_all_parts_are(one, other):
    assert (key_of(**one) == key_of(**other)) == (typed(one) == typed(other))


def test_keys_that_look_alike():
    alike = [
        {"a": ("ab", "c")}, {"a": ("a", "bc")}, {"a": "abc"}, {"a": b"abc"}, {"a": ("abc",)}, {"a": (("abc",),)},
        {"a": 1}, {"a": 1.0}, {"a": True}, {"a": "1"}, {"a": "True"}, {"a": None}, {"a": "None"}, {},
        {"a": 0.0}, {"a": -0.0}, {"a": 0}, {"a": False}, {"a": ""}, {"a": ()}, {"a": {}}, {"a": [None]},
        {"a": "i1:1"}, {"a": ("a", "b")}, {"a": ("as:b",)}, {"a": ("as1:b",)}, {"a": "\ud800"},
        {"a": "a", "b": "b"}, {"b": "a", "a": "b"}, {"ab": ""},
        {"a": torch.float16}, {"a": "torch.float16"}, {"a": {"x": 1, "y": 2}}, {"a": {"x": {"y": 2}}},
    ]  # fmt: skip
    assert len({key_of(**part) for part in alike}) == len(alike)
    assert key_of(a=1, b=2) == key_of(b=2, a=1)
    assert key_of(a=(1, 2)) == key_of(a=[1, 2])
    assert key_of(a={"x": 1, "y": 2}) == key_of(a={"y": 2, "x": 1})


def test_a_key_is_the_same_in_every_run():
    """It names files on disks: whoever changes how it is made raises FORMAT."""
    assert key_of(a=1, b=["c", 0.5, None], d={"e": torch.bfloat16}) == KEY_OF_FORMAT_1
    assert cache.FORMAT == 1


KEY_OF_FORMAT_1 = "f65049e99d46275eb55a03e66910e8b479ea6459"


@pytest.mark.parametrize("part", [object(), np.int64(1), torch.ones(1), {1: 2}, {1, 2}, Path("a")])
def test_what_has_no_one_spelling_is_no_part_of_a_key(part):
    with pytest.raises(TypeError):
        key_of(a=part)


def test_another_format_is_another_key(monkeypatch):
    before = key_of(a=1)
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    assert key_of(a=1) != before


def test_every_part_of_latents_is_part_of_their_key():
    same = {
        "content": "c", "vae": "v", "dtype": torch.float32, "resized": (64, 96), "crop": (0, 16, 64, 64),
        "interpolation": None, "flipped": False, "background": (255, 255, 255), "alpha_mask": False,
    }  # fmt: skip
    others = {
        "content": ["d", "v"], "vae": ["c", "w"], "dtype": [torch.float16, torch.bfloat16],
        "resized": [(96, 64), (64, 97)], "crop": [(16, 0, 64, 64), (0, 15, 64, 64), (0, 16, 64, 65)],
        "interpolation": ["lanczos", "None", "area"], "flipped": [True], "background": [(255, 255, 254), (0, 0, 0)],
        "alpha_mask": [True],
    }  # fmt: skip
    changed = [same | {name: value} for name, values in others.items() for value in values]
    assert others.keys() == same.keys()
    keys = {latents_key(**values) for values in [same, *changed]}
    assert len(keys) == 1 + len(changed)


def test_every_part_of_a_text_is_part_of_its_key():
    given = [
        ("a cat", ["e"], ["t"], torch.float32, {"max_token_length": 75}),
        ("a cat ", ["e"], ["t"], torch.float32, {"max_token_length": 75}),
        ("a cat", ["e", "e"], ["t"], torch.float32, {"max_token_length": 75}),
        ("a cat", ["f"], ["t"], torch.float32, {"max_token_length": 75}),
        ("a cat", ["e"], ["u"], torch.float32, {"max_token_length": 75}),
        ("a cat", ["e", "t"], [], torch.float32, {"max_token_length": 75}),
        ("a cat", ["e"], ["t"], torch.float16, {"max_token_length": 75}),
        ("a cat", ["e"], ["t"], torch.float32, {"max_token_length": 150}),
        ("a cat", ["e"], ["t"], torch.float32, {"max_token_length": 75, "clip_skip": 2}),
        ("a cat", ["e"], ["t"], torch.float32, {"clip_skip": 75}),
        ("a cat", ["e"], ["t"], torch.float32, {}),
    ]
    assert len({text_key(*most, **reading) for *most, reading in given}) == len(given)


class Part(nn.Module):
    """A model with weights of two dtypes, a buffer, one weight under two names, and a configuration."""

    def __init__(self, **config):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Conv2d(2, 2, 3).to(torch.bfloat16)
        self.register_buffer("scale", torch.arange(3))
        self.config = {"width": 4, "_name_or_path": "here", "transformers_version": "5"} | config


class Other(Part):
    pass


def part_of(kind: type[Part] = Part, **config) -> Part:
    torch.manual_seed(0)
    return kind(**config)


def test_a_fingerprint_changes_with_every_bit_of_a_weight():
    module = part_of()
    first, found = fingerprint(module), []
    for name, tensor in module.state_dict().items():
        flat = tensor.view(-1).view(torch.uint8)
        for i, bit in itertools.product(range(len(flat)), (0, 7)):
            flat[i] ^= 1 << bit
            found.append(fingerprint(module))
            flat[i] ^= 1 << bit
        assert fingerprint(module) == first, name
    assert len({first, *found}) == 1 + len(found)


def test_a_fingerprint_is_the_models_and_not_its_place_in_memory():
    first = fingerprint(part_of())
    assert fingerprint(part_of(_name_or_path="elsewhere", transformers_version="6")) == first
    strided = part_of()
    strided.first.weight = nn.Parameter(strided.first.weight.detach().T.contiguous().T)
    strided.second.to(memory_format=torch.channels_last)
    assert not strided.first.weight.is_contiguous()
    assert fingerprint(strided) == first


def test_a_fingerprint_changes_with_names_shapes_dtypes_class_and_configuration():
    renamed, reshaped, cast = part_of(), part_of(), part_of()
    renamed.third = renamed.first
    del renamed.first
    reshaped.scale = reshaped.scale.reshape(3, 1)
    cast.scale = cast.scale.to(torch.int32)
    alike = torch.ones(4, dtype=torch.float16)
    same_bytes = part_of(), part_of()
    same_bytes[0].scale, same_bytes[1].scale = alike, alike.view(torch.bfloat16)
    modules = [part_of(), part_of(Other), part_of(width=5), part_of(more=1), renamed, reshaped, cast, *same_bytes]
    assert len({fingerprint(module) for module in modules}) == len(modules)


def test_weights_without_values_have_no_fingerprint():
    with pytest.raises(DeftError, match="scale has no values"):
        fingerprint(part_of().to("meta"))


def test_fingerprints_of_a_loaded_model(model_folder):
    from tests.conftest import loaded

    one, other = loaded(model_folder), loaded(model_folder)
    pairs = [(one.vae, other.vae), *zip(one.text_encoders, other.text_encoders, strict=True)]
    assert all(fingerprint(a) == fingerprint(b) for a, b in pairs)
    assert len({fingerprint(a) for a, _ in pairs}) == len(pairs)
    tokenizer, again = one.pipeline.tokenizer, other.pipeline.tokenizer
    first = cache.tokenizer_fingerprint(tokenizer)
    tokenizer(["a cat", "b"], padding="max_length", max_length=8, truncation=True)  # leaves its mark on the tokenizer
    assert cache.tokenizer_fingerprint(tokenizer) == first == cache.tokenizer_fingerprint(again)
    again.add_tokens(["sks"])
    assert cache.tokenizer_fingerprint(again) != first


def test_noise_is_the_keys_alone():
    keys = [key_of(a=i) for i in range(50)]
    first = [torch.randn(4, 8, 8, generator=generator_of(key)) for key in keys]
    before = torch.get_rng_state()
    assert all(
        torch.equal(torch.randn(4, 8, 8, generator=generator_of(key)), noise)
        for key, noise in zip(keys, first, strict=True)
    )
    assert torch.equal(torch.get_rng_state(), before)
    values = torch.stack(first)
    assert len({tuple(noise.flatten().tolist()) for noise in first}) == 50
    assert abs(float(values.mean())) < 0.05
    assert abs(float(values.std()) - 1) < 0.05


# files


def test_what_is_written_is_read(written):
    store, key, file = written
    assert equal(store.read(key), tensors())
    assert equal(Store(store.folder).read(key, check=False), tensors())
    assert store.has(key)
    assert store.has(key, check=False)
    assert file == store.folder / key[:2] / f"{key}.safetensors"
    assert not store.has(key_of(number=2))
    assert store.read(key_of(number=2)) is None


def test_the_same_tensors_are_the_same_file(written):
    store, key, file = written
    first = file.read_bytes()
    store.write(key, dict(reversed(tensors().items())))
    assert file.read_bytes() == first


def test_entries_share_no_memory(store):
    """A part of a batch would keep all of it, and safetensors refuses two names for one tensor."""
    batch = torch.ones(4, 3).T
    for entries in (store, Memory()):
        entries.write("ab", {"a": batch[1:2], "b": batch[1:2]})
        found = entries.read("ab")
        assert torch.equal(found["a"], batch[1:2])
        assert found["a"].untyped_storage().nbytes() == 16
        assert found["a"].is_contiguous()


def test_a_flipped_byte_gives_what_was_written_or_nothing(written):
    """Every byte; a blank behind the header may become another, which changes no tensor."""
    store, key, file = written
    content = file.read_bytes()
    survived = 0
    for i, flip in itertools.product(range(len(content)), (1, 0x80, 0xFF)):
        file.write_bytes(content[:i] + bytes([content[i] ^ flip]) + content[i + 1 :])
        found = store.read(key)
        assert found is None or equal(found, tensors()), i
        assert store.has(key) == (found is not None)
        survived += found is not None
    assert survived <= 24


@pytest.mark.parametrize("check", [True, False])
def test_a_file_cut_off_or_grown_is_none(written, check):
    store, key, file = written
    content = file.read_bytes()
    for end in range(len(content)):
        file.write_bytes(content[:end])
        assert not store.has(key, check)
        assert store.read(key, check) is None
    file.write_bytes(content + b"\0")
    assert not store.has(key, check)
    assert store.read(key, check) is None


@pytest.mark.parametrize("check", [True, False])
def test_foreign_files_are_none(written, check):
    store, key, file = written
    another = key_of(number=2)
    store.write(another, {"latents": torch.zeros(2, 3)})
    shutil.copy(store._file(another), file)  # a whole entry, under another's name
    assert store.read(key, check) is None
    assert not store.has(key, check)

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(store.folder / "unpickled"),)

    contents = [
        b"", b"\0" * 500, b"\xff" * 500, pickle.dumps(Trap()), os.urandom(500),
        (2**63).to_bytes(8, "little") + b"{}", (4).to_bytes(8, "little") + b"[[[[", (2).to_bytes(8, "little") + b"{}",
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
    ]  # fmt: skip
    for content in contents:
        file.write_bytes(content)
        assert store.read(key, check) is None
        assert not store.has(key, check)
    save_file({"latents": torch.zeros(2, 3)}, file)
    assert store.read(key, check) is None
    assert not store.has(key, check)
    torch.save(tensors(), file)
    assert store.read(key, check) is None
    assert not store.has(key, check)
    assert not (store.folder / "unpickled").exists()


def test_an_entry_of_another_format_is_none(written, monkeypatch):
    store, key, _ = written
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    assert store.read(key) is None
    assert not store.has(key, check=False)


def test_without_the_check_only_the_checksum_is_left_out(written):
    store, key, file = written
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    assert store.read(key) is None
    assert store.read(key, check=False) is not None
    assert store.has(key, check=False)


def test_a_folder_in_an_entrys_place(written, caplog):
    store, key, file = written
    file.unlink()
    (file / "theirs").mkdir(parents=True)
    assert store.read(key) is None
    assert not store.has(key)
    store.write(key, tensors())
    assert equal(store.read(key), tensors())
    assert (file / "theirs").is_dir()
    (line,) = warnings_in(caplog)
    assert str(store.folder) in line
    assert not list((store.folder / "unfinished").iterdir())


def check_kept_in_memory(store: Store, caplog, reason: str) -> None:
    keys = [key_of(number=i) for i in range(3)]
    for key in keys:
        store.write(key, tensors())
    assert all(store.has(key) and equal(store.read(key), tensors()) for key in keys)
    assert not any(Store(store.folder).has(key) for key in keys)
    (line,) = warnings_in(caplog)
    assert "--cache_dir" in line
    assert reason in line
    assert "\n" not in line


def test_a_full_disk_is_told_once_and_memory_serves(store, caplog, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache.os, "replace", full)
    check_kept_in_memory(store, caplog, "No space left on device")
    assert not list((store.folder / "unfinished").iterdir())


def test_a_file_in_the_folders_place(store, caplog):
    store.folder.write_text("mine")
    check_kept_in_memory(store, caplog, "")
    assert store.folder.read_text() == "mine"


def test_a_folder_that_only_others_may_write_to(store, caplog, monkeypatch):
    def refused(file, *mode):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(cache, "open", refused, raising=False)
    check_kept_in_memory(store, caplog, "Permission denied")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_to(store, caplog):
    store.folder.mkdir()
    store.folder.chmod(0o500)
    check_kept_in_memory(store, caplog, "Permission denied")


def test_a_file_that_another_process_has_open_on_windows(written, caplog, monkeypatch):
    """It holds the same; a damaged one is kept in memory instead."""
    store, key, file = written

    def held(*args):
        raise PermissionError(errno.EACCES, "in use")

    monkeypatch.setattr(cache.os, "replace", held)
    store.write(key, tensors())
    assert not warnings_in(caplog)
    file.write_bytes(b"damaged")
    store.write(key, tensors())
    assert len(warnings_in(caplog)) == 1
    assert equal(store.read(key), tensors())


def test_unfinished_files_of_killed_runs_are_removed_by_age(store):
    unfinished = store.folder / "unfinished"
    unfinished.mkdir(parents=True)
    old, new = unfinished / "old", unfinished / "new"
    for file, age in ((old, cache.ABANDONED + 60), (new, 60)):
        file.write_text("x")
        os.utime(file, (time.time() - age,) * 2)
    store.write(key_of(number=1), tensors())
    assert list(unfinished.iterdir()) == [new]


@pytest.mark.parametrize(
    ("platform", "environment", "folder"),
    [
        ("linux", {}, "/home/me/.cache/deft"),
        ("linux", {"XDG_CACHE_HOME": "/fast"}, "/fast/deft"),
        ("linux", {"XDG_CACHE_HOME": "not/absolute"}, None),
        ("darwin", {}, "/home/me/Library/Caches/deft"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/deft"),
        ("win32", {}, "/home/me/AppData/Local/deft"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="paths of Linux")
def test_the_users_own_folder(monkeypatch, platform, environment, folder):
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cache.sys, "platform", platform)
    if folder is None:
        with pytest.raises(DeftError, match="name a folder"):
            cache.default_folder()
    else:
        assert cache.default_folder() == Path(folder)
