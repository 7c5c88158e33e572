"""The index of picture files: as right as reading them all, and not read where nothing has changed."""

from __future__ import annotations

import builtins
import logging
import multiprocessing
import os
import random
import shutil
import sqlite3
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from library.data import index as indexing
from library.data.cache import content_hash
from library.data.index import Header, Index, hash_of, header_of
from library.data.pixels import read_picture

FORMATS = ("jpg", "png", "webp", "tiff", "gif", "bmp", "ppm", "tga", "avif", "jp2")
TURNABLE = ("jpg", "png", "webp", "tiff", "avif")


@pytest.fixture(autouse=True)
def _settled(monkeypatch):
    """The pictures here are new; what waits for that has tests of its own."""
    monkeypatch.setattr(indexing, "SETTLED", 0)


def noise(width: int = 24, height: int = 16, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


@pytest.fixture
def folder(tmp_path) -> Path:
    """Pictures of many formats, and what is none."""
    found = tmp_path / "pictures"
    found.mkdir()
    for i, extension in enumerate(FORMATS):
        noise(24 + i).save(found / f"plain.{extension}")
    for extension in TURNABLE:
        for orientation in range(1, 9):
            noise().save(found / f"turned{orientation}.{extension}", exif=turned(orientation))
    noise(mode="RGBA").save(found / "alpha.png")
    noise(mode="P").save(found / "key.png", transparency=3)
    noise(mode="LA").save(found / "two.png")
    noise().save(found / "moving.gif", save_all=True, append_images=[noise(24, 17).resize((24, 16))] * 2)
    noise().save(found / "moving.png", save_all=True, append_images=[noise()] * 3)
    noise().save(found / "two.mpo", save_all=True, append_images=[noise()])
    (found / "empty.png").touch()
    (found / "text.jpg").write_text("no picture")
    (found / "cut.png").write_bytes((found / "plain.png").read_bytes()[:20])
    (found / "folder.png").mkdir()
    time.sleep(0.02)  # a tick of the file system's clock
    return found


def pictures(folder: Path) -> list[Path]:
    return [*sorted(folder.iterdir()), folder / "missing.png"]


@pytest.fixture
def index(tmp_path) -> Index:
    return Index(tmp_path / "cache")


def again(index: Index) -> Index:
    """As another run has it."""
    return Index(index.file.parent)


@pytest.fixture
def opened(monkeypatch) -> list[Path]:
    """Files that are opened, by Python or Pillow, in any thread."""
    files: list[Path] = []
    lock, real = threading.Lock(), builtins.open

    def watched(file, *args, **kwargs):
        with lock:
            files.append(Path(os.fspath(file)) if not isinstance(file, int) else Path(str(file)))
        return real(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", watched)
    return files


def warnings_in(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


# headers


def test_a_header_says_what_reading_the_picture_finds(folder):
    readable = 0
    for path in pictures(folder):
        header = header_of(path)
        try:
            picture = read_picture(path)
        except Exception:
            assert header.error
            continue
        readable += 1
        assert (header.width, header.height) == picture.image.size, path
        assert header.frames == picture.frames, path
        assert header.alpha or not picture.transparent, path
        assert not header.error
    assert readable == len(FORMATS) + 8 * len(TURNABLE) + 6


def test_what_cannot_be_read_has_a_reason_in_one_line(folder, monkeypatch):
    assert header_of(folder / "empty.png") == Header(error="the file is empty")
    for name, words in (("text.jpg", "cannot identify"), ("missing.png", "No such file"), ("folder.png", "irectory")):
        header = header_of(folder / name)
        assert words in header.error
        assert "\n" not in header.error
        assert (header.width, header.height) == (0, 0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "decompression bomb" in header_of(folder / "plain.png").error


def png(path: Path, *chunks: tuple[bytes, bytes], late: bool) -> None:
    """A PNG, 24 x 16, with further chunks before or behind its pixels."""
    noise().save(path)
    content = path.read_bytes()
    made = b""
    for kind, data in chunks:
        checksum = indexing.zlib.crc32(kind + data)
        made += len(data).to_bytes(4, "big") + kind + data + checksum.to_bytes(4, "big")
    at = content.index(b"IEND" if late else b"IDAT") - 4
    path.write_bytes(content[:at] + made + content[at:])


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
CHUNKS = {
    "exif": (b"eXIf", turned(6).tobytes()[6:]),
    "xmp": (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
    "raw profile": (
        b"tEXt",
        b"Raw profile type exif\0\nexif\n%8d\n%s\n" % (len(turned(6).tobytes()), turned(6).tobytes().hex().encode()),
    ),
}


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("kind", CHUNKS)
def test_pngs_that_say_how_they_are_turned_before_or_behind_their_pixels(tmp_path, kind, late):
    path = tmp_path / "a.png"
    png(path, (b"tEXt", b"date:create\0today"), CHUNKS[kind], late=late)
    assert read_picture(path).image.size == (16, 24)
    header = header_of(path)
    assert (header.width, header.height) == (16, 24)


def test_no_header_is_read_by_decoding(folder, monkeypatch):
    """But that of a PNG that says behind its pixels how it is turned."""
    from PIL import ImageFile

    decoded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: decoded.append(image.filename) or load(image))
    png(folder / "late.png", CHUNKS["exif"], late=True)
    png(folder / "dated.png", (b"tEXt", b"date:create\0today"), late=True)
    assert header_of(folder / "dated.png").width == 24
    for path in folder.glob("[!m]*"):
        header_of(path)
    assert [Path(name).name for name in decoded] == ["late.png"]


# the index


def test_it_finds_what_reading_finds_and_in_the_order_that_was_asked(index, folder):
    paths = pictures(folder)
    random.Random(0).shuffle(paths)
    direct = {path: header_of(path) for path in paths}
    for one in (index, again(index)):
        found = one.contents([*paths, paths[0]])
        assert found == direct
        assert list(found) == paths
    assert index.contents([]) == {}


def test_hashes_are_the_contents(index, folder):
    paths = pictures(folder)
    for one in (index, again(index)):
        assert one.hashes(paths) == {path: content_hash(path.read_bytes()) for path in paths if path.is_file()}


def test_a_large_file_is_hashed_as_a_whole(tmp_path):
    content = os.urandom(3 * 2**20 + 5)
    (tmp_path / "large").write_bytes(content)
    assert hash_of(tmp_path / "large") == content_hash(content)


def test_the_second_start_opens_nothing(index, folder, opened):
    paths = [path for path in pictures(folder) if not header_of(path).error]
    first, hashes = index.contents(paths), index.hashes(paths)
    assert set(paths) <= set(opened)
    opened.clear()
    assert again(index).contents(paths) == first
    assert again(index).hashes(paths) == hashes
    assert not set(paths) & set(opened)


def test_files_with_an_error_are_tried_again(index, folder, opened):
    """A plugin may have been installed meanwhile, a disk be back."""
    index.contents(pictures(folder))
    opened.clear()
    again(index).contents(pictures(folder))
    tried = {path.name for path in opened if path.parent == folder}
    assert tried == {"text.jpg", "cut.png", "folder.png", "empty.png", "missing.png"}


def assert_only_reads(index: Index, opened: list[Path], paths: list[Path], changed: Path) -> None:
    for asked in (again(index).contents, again(index).hashes):
        opened.clear()
        found = asked(paths)
        assert {path for path in opened if path in paths} == {changed}
        fresh = header_of(changed) if isinstance(found[changed], Header) else content_hash(changed.read_bytes())
        assert found[changed] == fresh


def replace_in_place(path: Path, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.write(content)
        file.truncate()


CHANGES = {
    "size and times": lambda path, stat, other: path.write_bytes(other + b"more"),
    "content and times, not the size": lambda path, stat, other: path.write_bytes(other),
    "times alone": lambda path, stat, other: os.utime(path, ns=(1, stat.st_mtime_ns + 1)),
    "size, not the time": lambda path, stat, other: (
        path.write_bytes(other + b"more"),
        os.utime(path, ns=(1, stat.st_mtime_ns)),
    ),
    "content, neither size nor time": lambda path, stat, other: (
        replace_in_place(path, other),
        os.utime(path, ns=(1, stat.st_mtime_ns)),
    ),
    "another file of its size and time moved there": lambda path, stat, other: (
        path.with_suffix(".new").write_bytes(other),
        os.utime(path.with_suffix(".new"), ns=(1, stat.st_mtime_ns)),
        os.replace(path.with_suffix(".new"), path),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.skipif(os.name == "nt", reason="Windows has no time of a change that cannot be set")
def test_a_file_that_changed_is_read_again(index, folder, opened, change):
    paths = [folder / "plain.bmp", folder / "plain.ppm"]
    index.contents(paths)
    index.hashes(paths)
    before = paths[0].stat()
    content = bytearray(paths[0].read_bytes())
    content[18], content[22] = 16, 24  # of a bitmap: width and height
    time.sleep(0.02)
    CHANGES[change](paths[0], before, bytes(content))
    time.sleep(0.02)
    assert_only_reads(index, opened, paths, paths[0])


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_link_that_leads_elsewhere_is_read_again(index, folder):
    link = folder / "link.png"
    link.symlink_to(folder / "turned1.png")
    index.contents([link])
    link.unlink()
    link.symlink_to(folder / "turned6.png")
    assert (again(index).contents([link])[link].width, header_of(link).width) == (16, 16)


def test_a_file_that_changed_just_now_is_not_remembered(index, folder, monkeypatch, opened):
    """It may change again within one tick of its clock, with the same size."""
    path = folder / "plain.png"
    path.touch()
    monkeypatch.setattr(indexing, "SETTLED", 60)
    index.contents([path])
    opened.clear()
    again(index).contents([path])
    assert path in opened
    monkeypatch.setattr(indexing, "SETTLED", 0)
    time.sleep(0.02)
    again(index).contents([path])
    opened.clear()
    again(index).contents([path])
    assert path not in opened


def test_a_file_that_changes_while_it_is_read_is_not_remembered(index, folder, monkeypatch):
    path = folder / "plain.png"

    def changing(path):
        digest = hash_of(path)
        noise(30, 20).save(path)
        time.sleep(0.02)
        return digest

    monkeypatch.setattr(indexing, "hash_of", changing)
    index.hashes([path])
    monkeypatch.undo()
    assert again(index).hashes([path])[path] == content_hash(path.read_bytes())


def test_another_pillow_reads_headers_again(index, folder, monkeypatch, opened):
    path = folder / "plain.png"
    index.contents([path])
    monkeypatch.setattr(indexing.PIL, "__version__", "999")
    opened.clear()
    again(index).contents([path])
    assert path in opened


def test_duplicates_are_files_of_the_same_content(index, folder, opened):
    shutil.copy(folder / "plain.png", folder / "copy.png")
    shutil.copy(folder / "plain.png", folder / "zopy.png")
    (folder / "same size.bmp").write_bytes(bytes((folder / "plain.bmp").stat().st_size))
    (folder / "empty.jpg").touch()
    opened.clear()
    paths = [path for path in pictures(folder) if not path.name.startswith(("turned", "two", "moving"))]
    assert index.duplicates([*paths, paths[0]]) == [
        [folder / "copy.png", folder / "plain.png", folder / "zopy.png"],
        [folder / "empty.jpg", folder / "empty.png"],
    ]
    assert folder / "plain.jpg" not in opened  # alone with its size


def test_names_in_any_script_and_bytes_that_are_none(index, folder):
    names = ["ünï 猫 🐈.png", "a'b\"c;--.png", "new\nline.png"]
    if sys.platform == "linux":
        names.append(os.fsdecode(b"latin1-\xe9.png"))
    for name in names:
        shutil.copy(folder / "plain.png", folder / name)
    paths = [folder / name for name in names]
    time.sleep(0.02)
    for one in (index, again(index)):
        assert all(header == header_of(folder / "plain.png") for header in one.contents(paths).values())
        assert len(set(one.hashes(paths).values())) == 1


# its file


def kept(index: Index, folder: Path) -> dict[Path, Header]:
    paths = [path for path in pictures(folder) if not header_of(path).error]
    found = index.contents(paths)
    assert index.file.is_file()
    return found


def test_a_damaged_index_never_tells_wrong(index, folder):
    """Bytes flipped and cut at random: what cannot be trusted is read again, or the index begun again."""
    first = kept(index, folder)
    content = index.file.read_bytes()
    moments = random.Random(0)
    for i in range(60):
        damaged = bytearray(content)
        for _ in range(moments.choice((1, 5, 50))):
            damaged[moments.randrange(len(damaged) if i % 2 else 200)] = moments.randrange(256)
        index.file.write_bytes(damaged[: moments.randrange(len(damaged))] if i % 5 == 0 else damaged)
        assert again(index).contents(first) == first
        assert again(index).contents(first) == first


@pytest.mark.parametrize("content", [b"", b"no database", bytes(5000), os.urandom(5000)])
def test_what_is_no_index_is_set_aside_and_begun_again(index, folder, content, opened, caplog):
    index.file.parent.mkdir()
    index.file.write_bytes(content)
    first = kept(index, folder)
    opened.clear()
    assert again(index).contents(first) == first
    assert not set(first) & set(opened)
    assert not warnings_in(caplog)
    if content:
        assert index.file.with_suffix(".damaged").read_bytes() == content


def test_another_programs_database_is_set_aside(index, folder):
    index.file.parent.mkdir()
    with sqlite3.connect(index.file) as database:
        database.execute("CREATE TABLE headers (something TEXT)")
    database.close()
    first = kept(index, folder)
    assert again(index).contents(first) == first


def test_where_it_cannot_be_kept_everything_is_read_and_that_is_told_once(index, folder, caplog):
    index.file.parent.write_text("a file in the folder's place")
    paths = pictures(folder)
    assert index.contents(paths) == {path: header_of(path) for path in paths}
    assert len(index.hashes(paths)) == len([path for path in paths if path.is_file()])
    (line,) = warnings_in(caplog)
    assert str(index.file) in line
    assert "\n" not in line


def test_an_index_that_another_process_holds_is_done_without(index, folder, monkeypatch, caplog):
    first = kept(index, folder)
    monkeypatch.setattr(indexing, "WAIT", 0.05)
    holder = sqlite3.connect(index.file)
    holder.execute("BEGIN EXCLUSIVE")
    assert again(index).contents(first) == first
    holder.rollback()
    holder.close()
    assert len(warnings_in(caplog)) == 1
    assert not index.file.with_suffix(".damaged").exists()


def fill(index: Index, paths: list[Path], wanted: dict[Path, Header] | None) -> None:
    indexing.AT_ONCE = 7
    found = index.contents(paths)
    os._exit(wanted is not None and found != wanted)


@pytest.mark.skipif(sys.platform != "linux", reason="children are forks")
def test_processes_that_fill_it_at_once_and_are_killed(index, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(150):
        noise(8 + i % 40, 9).save(folder / f"{i}.bmp")
    time.sleep(0.02)
    paths = sorted(folder.iterdir())
    direct = {path: header_of(path) for path in paths}
    clean, moments = multiprocessing.get_context("forkserver"), random.Random(0)  # see tests/test_building.py
    clean.set_forkserver_preload(["tests.test_index"])
    for _ in range(11):
        killed = clean.Process(target=fill, args=(again(index), paths, None))
        killed.start()
        time.sleep(moments.uniform(0.005, 0.06))
        killed.kill()
        killed.join()
    together = [clean.Process(target=fill, args=(again(index), paths, direct)) for _ in range(3)]
    for process in together:
        process.start()
    for process in together:
        process.join(300)
        assert process.exitcode == 0
    assert again(index).contents(paths) == direct
    assert not index.file.with_suffix(".damaged").exists()
