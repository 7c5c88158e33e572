"""kohya's metadata files: what is found in them, what is told, and that none of them ends in a traceback."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from library.data import metadata_file
from library.data.remarks import Remarks
from library.options.rooms import CaptionOptions
from networks.deft_config import DeftError


@pytest.fixture
def images(tmp_path) -> Path:
    """Pictures, and what is none."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "b.JPG", "d.e.webp", "日本.png", "sub/c.png", "twice.jpg", "twice.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    for name in ("a.npz", "a.txt", "alone.npz", "text.txt"):
        (folder / name).write_bytes(b"not read")
    return folder


def read(images: Path, found: Any, remarks: Remarks | None = None, **options: Any) -> list[metadata_file.Entry]:
    file = images.parent / "meta.json"
    file.write_text(found if isinstance(found, str) else json.dumps(found), encoding="utf-8")
    remarks = Remarks() if remarks is None else remarks
    return metadata_file.read(file, str(images), CaptionOptions(**options), remarks)


# --- what is found ----------------------------------------------------------------------------------------------------


def test_keys_are_names_with_or_without_extension_or_paths(images):
    keys = ["a", "a.png", "b", "d.e", "日本", "sub/c", "sub\\c", "twice", str(images / "a"), str(images / "a.png")]
    found = read(images, {key: {"caption": key} for key in keys})
    assert [entry.caption for entry in found] == sorted(keys, key=len, reverse=True)
    names = {"b": "b.JPG", "d.e": "d.e.webp", "日本": "日本.png", "twice": "twice.jpg"}
    names |= dict.fromkeys(("a", "a.png"), "a.png") | dict.fromkeys(("sub/c", "sub\\c"), "sub/c.png")
    for entry in found:
        assert entry.path == images / names.get(entry.caption, "a.png")


def test_the_order_is_sd_scripts(images):
    """Long keys first, and of equal ones the first: the same pictures are in a batch then."""
    found = read(images, {key: {"caption": "x"} for key in ("b", "a", "twice", "日本")})
    assert [entry.path.stem for entry in found] == ["twice", "日本", "b", "a"]


@pytest.mark.parametrize(
    ("about", "plain", "wildcard"),
    [
        ({"caption": "a cat"}, "a cat", "a cat"),
        ({"caption": "a cat", "tags": "1girl, solo"}, "a cat;1girl, solo", "a cat;1girl, solo"),
        ({"tags": "1girl"}, "1girl", ""),
        ({"caption": "a", "tags": ""}, "a", "a;"),
        ({"caption": "a\n\nb", "tags": "c\nd"}, "a\n\nb;c\nd", "a;c;d\nb;c;d"),
        ({"caption": None, "tags": None}, "", ""),
        ({}, "", ""),
    ],
)
def test_tags_stand_behind_captions(images, about, plain, wildcard):
    for wanted, enable_wildcard in ((plain, False), (wildcard, True)):
        (entry,) = read(images, {"a": about}, caption_separator=";", enable_wildcard=enable_wildcard)
        assert entry == metadata_file.Entry(images / "a.png", wanted)


def test_sizes_and_keys_that_are_not_used(images):
    about = {"caption": "x", "image_size": [8, 6], "train_resolution": [64, 64], "anything": {"else": 1}}
    (entry,) = read(images, {"a": about})
    assert entry.size == (8, 6)


def test_lines_of_json(images):
    file = images.parent / "meta.jsonl"
    rows = [{"image_path": str(images / "a.png"), "caption": "x", "tags": "y", "width": 3, "height": 4}, None,
            {"image_path": "b", "image_size": [5, 6]}]  # fmt: skip
    file.write_text("\ufeff" + "\r\n".join(json.dumps(row) if row else "" for row in rows), encoding="utf-8")
    found = metadata_file.read(file, str(images), CaptionOptions(), Remarks())
    assert found == [
        metadata_file.Entry(images / "a.png", "x,y", (3, 4)),
        metadata_file.Entry(images / "b.JPG", "", (5, 6)),
    ]


def test_nothing_is_written_or_read_beside_the_pictures(images):
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in images.rglob("*")}
    read(images, {"a": {"caption": "x"}})
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in images.rglob("*")} == before


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_names_that_are_no_text(images):
    """As Python's own JSON has them."""
    name = os.fsdecode(b"\xff\xfe")
    try:
        Image.new("RGB", (8, 8)).save(images / f"{name}.png")
    except OSError:
        pytest.skip("no such names here")
    (entry,) = read(images, {name: {"caption": "x"}})
    assert entry.path.is_file()


# --- what is told -----------------------------------------------------------------------------------------------------


def test_what_is_left_out_is_told(images):
    remarks = Remarks()
    keys = ("a", "alone", "gone.png", "text.txt", "sub", "\ud83d", "nul\0l")
    assert len(read(images, {key: {"caption": "x"} for key in keys}, remarks)) == 1
    (line,) = remarks.lines()
    assert line.startswith("6 pictures of meta.json (")
    line.encode()
    remarks = Remarks()
    read(images, {"a": {"tags": "x"}, "b": {}}, remarks, enable_wildcard=True)
    first, second = remarks.lines()
    assert "drops the tags" in first
    assert second.startswith("2 pictures")


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ('{"a": {"caption": 1' + "0" * 5000 + "}}", "not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ([], "must be a JSON object"),
        ({}, "names no pictures"),
        ({"a": "a cat"}, "'a': must be an object"),
        ({"a": {"caption": ["a cat"]}}, "'a': caption must be text"),
        ({"a": {"tags": {"cat": 0.9}}}, "'a': tags must be text"),
        ({"a": {"caption": "\ud83d"}}, "'a': caption has half a character"),
        ({"a": {"image_size": [8]}}, "'a': image_size"),
        ({"a": {"image_size": [8, True]}}, "'a': image_size"),
        ({"a": {"image_size": "8x8"}}, "'a': image_size"),
        ({"gone": {"caption": "x"}}, "none of its pictures is there"),
    ],
)
def test_what_is_refused(images, found, told):
    with pytest.raises(DeftError, match=told) as error:
        read(images, found)
    assert str(images.parent / "meta.json") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "line", ["[]", '{"caption": "x"}', '{"image_path": 3}', "{", '{"image_path": "a", "caption": 2}']
)
def test_lines_that_are_refused(images, line):
    file = images.parent / "meta.jsonl"
    file.write_text(json.dumps({"image_path": "a"}) + f"\n{line}\n", encoding="utf-8")
    with pytest.raises(DeftError, match=r"line 2|'a': caption"):
        metadata_file.read(file, str(images), CaptionOptions(), Remarks())


def test_relative_keys_need_a_folder(images):
    file = images.parent / "meta.json"
    file.write_text(json.dumps({str(images / "a"): {}}))
    assert len(metadata_file.read(file, None, CaptionOptions(), Remarks())) == 1
    file.write_text(json.dumps({"a": {}}))
    with pytest.raises(DeftError, match="image_dir"):
        metadata_file.read(file, None, CaptionOptions(), Remarks())


def test_files_that_cannot_be_read(images):
    for file in (images, images / "gone.json"):
        with pytest.raises(DeftError, match="cannot be read"):
            metadata_file.read(file, None, CaptionOptions(), Remarks())


# --- damaged files ----------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
ABOUT = st.dictionaries(st.sampled_from(("caption", "tags", "image_size", "image_path", "width", "height")), VALUES)
WHOLE = json.dumps(
    {"a": {"caption": "a cat\ncat", "tags": "x, y", "image_size": [8, 8]}, "b": {"tags": "日本"}}
).encode()


def check_read(file: Path, images: Path, content: bytes, wildcard: bool) -> None:
    """Pictures that are there, or a line."""
    file.write_bytes(content)
    remarks = Remarks()
    try:
        found = metadata_file.read(file, str(images), CaptionOptions(enable_wildcard=wildcard), remarks)
    except DeftError as error:
        assert str(file) in str(error)  # noqa: PT017  # that is what is tested
        str(error).encode()
        return
    assert found
    for entry in found:
        assert entry.path.is_file()
        entry.caption.encode()
    for line in remarks.lines():
        line.encode()


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(("a", "b", "", ".", "/", "\0", "sub")) | st.text(max_size=4), ABOUT | VALUES),
       st.booleans(), st.sampled_from((".json", ".jsonl")))  # fmt: skip
def test_any_json(images, found, wildcard, extension):
    rows = found.values() if extension == ".jsonl" else [found]
    content = "\n".join(json.dumps(row) for row in rows).encode()
    check_read(images.parent / f"any{extension}", images, content, wildcard)


@settings(deadline=None, max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, len(WHOLE)), st.integers(0, 4), st.binary(max_size=4), st.sampled_from((".json", ".jsonl")))
def test_any_damage(images, place, length, inserted, extension):
    content = WHOLE[:place] + inserted + WHOLE[place + length :]
    check_read(images.parent / f"damaged{extension}", images, content, True)
