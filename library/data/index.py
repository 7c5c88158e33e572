"""What picture files are, remembered from run to run: a file that has not changed is not opened again."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import PIL
from PIL import ExifTags, Image

from library.data.cache import DIGEST, default_folder
from library.data.pixels import readable_formats
from networks.deft_config import reason_of
from networks.deft_progress import Bar

logger = logging.getLogger(__name__)

FILE = "pictures-1.sqlite"  # another number for every other layout
SETTLED = 3.0  # seconds; what changed less long ago may change again without its times showing it
AT_ONCE = 500  # files between two commits
A_TURN = 16  # files that a thread reads at once
WORKERS = 8  # threads; most of their time is the disk's
WAIT = 30.0  # seconds for another process that writes

_TABLE = "CREATE TABLE IF NOT EXISTS {} (name BLOB PRIMARY KEY, stamp TEXT, value TEXT, checksum INTEGER)"
_NOT_DAMAGED = ("locked", "readonly", "full", "unable to open")  # what sqlite says of a disk, or of other processes
_LAYERED = ("MPO", "PSD")  # what follows the picture are previews, depths and layers
_SIZED_LATE = ("ICO", "CUR", "ICNS")  # what they contain may have another size than they say
_TURNED = {5, 6, 7, 8}  # EXIF's orientations with width and height exchanged
_LATE = (b"eXIf", b"iTXtXML:com.adobe.xmp\0", b"tEXtRaw profile type exif\0", b"zTXtRaw profile type exif\0")
# how files of the usual formats begin: Pillow would try others first, which takes as long as the header itself
_SIGNS = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG"}

T = TypeVar("T")


@dataclass(frozen=True)
class Header:
    """What a picture's file says of itself before it is decoded.

    :param width: upright, as `height`; 0 where it cannot be read
    :param alpha: whether it has an alpha channel or a transparent colour
    :param error: why it cannot be read, in one line; empty where it can
    """

    width: int = 0
    height: int = 0
    format: str = ""
    frames: int = 1
    alpha: bool = False
    error: str = ""


class Index:
    """Headers and hashes of picture files, by path, in one file that all runs share.

    They count as long as a file's size and times are what they were. Where the index cannot be read or written, all
    files are read; where it is damaged, it is begun again.

    :param folder: of the file; None for `cache.default_folder()`
    """

    def __init__(self, folder: Path | None = None):
        self.file = (default_folder() if folder is None else folder) / FILE
        self._told = False

    def contents(self, paths: Iterable[Path]) -> dict[Path, Header]:
        """The header of each, in their order, without decoding; those with an error are tried again in every run."""

        def read(path: Path) -> dict[str, Any] | None:
            header = headers[path] = header_of(path)
            return None if header.error else asdict(header)

        headers: dict[Path, Header] = {}
        known = self._known("headers", paths, read, f"Pillow {PIL.__version__}", "reading headers")
        return {path: headers[path] if value is None else Header(**value) for path, value in known.items()}

    def hashes(self, paths: Iterable[Path]) -> dict[Path, str]:
        """The `content_hash` of each, in their order; those that cannot be read are left out."""
        known = self._known("hashes", paths, hash_of, "blake2b", "hashing pictures")
        return {path: digest for path, digest in known.items() if digest is not None}

    def duplicates(self, paths: Iterable[Path]) -> list[list[Path]]:
        """Files with the same content, two or more each; only those of one size are read."""
        sized = alike((path, stat.st_size) for path, stat in _stats(paths).items() if stat is not None)
        return alike(self.hashes(itertools.chain.from_iterable(sized)).items())

    def _known(
        self, table: str, paths: Iterable[Path], read: Callable[[Path], T | None], reader: str, what: str
    ) -> dict[Path, T | None]:
        """A value of each file, from the table, or read and put there.

        :param read: a value for JSON, or None, which is not kept; it does not raise
        :param reader: with which a value is no longer what it was
        """
        settled = time.time() - SETTLED
        stats = _stats(paths)
        kept = self._rows(table, stats)
        found: dict[Path, T | None] = {}
        for path, stat in stats.items():
            stamp, content = kept.get(path, ("", ""))
            found[path] = json.loads(content) if stat is not None and stamp == _stamp(stat, reader) else None
        unknown = [path for path, value in found.items() if value is None]
        with ThreadPoolExecutor(WORKERS) as pool, Bar(len(unknown), what, "pictures") as bar:
            for i in range(0, len(unknown), AT_ONCE):
                some = unknown[i : i + AT_ONCE]
                rows: dict[Path, tuple[str, str]] = {}
                for path, value in zip(some, _mapped(read, some, pool), strict=True):
                    found[path] = value
                    stat = stats[path]
                    if value is not None and stat is not None and max(stat.st_mtime, stat.st_ctime) < settled:
                        rows[path] = (_stamp(stat, reader), json.dumps(value))
                self._keep(table, rows)
                bar.add(len(some))
        return found

    def _rows(self, table: str, paths: Iterable[Path]) -> dict[Path, tuple[str, str]]:
        """Stamp and value of those that are there."""

        def select(database: sqlite3.Connection) -> dict[Path, tuple[str, str]]:
            rows = {}
            for path in paths:
                row = database.execute(f"SELECT stamp, value, checksum FROM {table} WHERE name = ?", (_name(path),))
                for stamp, value, checksum in row:  # one at most
                    if checksum == _checksum(path, stamp, value):
                        rows[path] = (stamp, value)
            return rows

        return self._with_database(select) or {}

    def _keep(self, table: str, rows: Mapping[Path, tuple[str, str]]) -> None:
        given = [(_name(path), *row, _checksum(path, *row)) for path, row in rows.items()]
        if given:
            self._with_database(lambda base: base.executemany(f"REPLACE INTO {table} VALUES (?, ?, ?, ?)", given))

    def _with_database(self, action: Callable[[sqlite3.Connection], T]) -> T | None:
        """What comes of it, in one transaction; None where the file cannot be used, which is told once."""
        error: Exception = OSError()
        for _ in range(2):
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.closing(sqlite3.connect(self.file, timeout=WAIT)) as database, database:
                    database.execute("PRAGMA synchronous = OFF")  # what a power failure damages is begun again
                    for table in ("headers", "hashes"):
                        database.execute(_TABLE.format(table))
                    return action(database)
            except (OSError, sqlite3.Error) as raised:
                error = raised
                if isinstance(error, OSError) or any(words in str(error) for words in _NOT_DAMAGED):
                    break
                with contextlib.suppress(OSError):
                    os.replace(self.file, self.file.with_suffix(".damaged"))
        if not self._told:
            logger.warning(f"{self.file}: it cannot be used ({reason_of(error)}); all pictures are read")
        self._told = True
        return None


def header_of(path: Path) -> Header:
    """A picture's header, its size as `pixels.read_picture` turns it; without decoding it."""
    try:
        with open(path, "rb") as file:
            start = file.read(12)
        if not start:
            return Header(error="the file is empty")
        likely = [name for sign, name in _SIGNS.items() if start.startswith(sign)]
        with Image.open(path, formats=likely or _formats()) as image:
            if image.format in _SIZED_LATE:
                image.load()
            width, height = image.size
            if image.format != "TIFF" and _orientation(image, path) in _TURNED:  # Pillow turns TIFFs
                width, height = height, width
            frames = 1
            if image.format not in _LAYERED:
                with contextlib.suppress(Exception):  # further frames may be broken
                    frames = getattr(image, "n_frames", 1)
            return Header(width, height, image.format or "", frames, image.has_transparency_data)
    except Exception as error:  # whatever Pillow raises
        return Header(error=reason_of(error))


def hash_of(path: Path) -> str | None:
    """`cache.content_hash` of a file, read piece by piece; None where it cannot be read."""
    total = hashlib.blake2b(digest_size=DIGEST)
    try:
        with open(path, "rb") as file:
            while piece := file.read(2**20):
                total.update(piece)
    except OSError:
        return None
    return total.hexdigest()


@functools.cache
def _formats() -> list[str]:
    return sorted(set(readable_formats().values()))


def _orientation(image: Image.Image, path: Path) -> int | None:
    with contextlib.suppress(Exception):  # metadata may be anything
        if image.format == "PNG" and _turned_late(path):
            image.load()
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation)  # PNG's own getexif decodes the picture
    return None


def _turned_late(path: Path) -> bool:
    """Whether a PNG says how it is turned behind its pixels only."""
    late = False
    with open(path, "rb", buffering=0) as file:
        file.seek(8)
        while len(start := file.read(40)) >= 8:
            kind = start[4:8]
            if late and any(start[4:].startswith(sign) for sign in _LATE):
                return True
            late = late or kind == b"IDAT"
            file.seek(int.from_bytes(start[:4], "big") + 12 - len(start), os.SEEK_CUR)
    return False


def _stats(paths: Iterable[Path]) -> dict[Path, os.stat_result | None]:
    """Of each file once; None where there is none."""
    asked = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(WORKERS) as pool:
        return dict(zip(asked, _mapped(_stat, asked, pool), strict=True))


def _stat(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (OSError, ValueError):  # ValueError: a name with a zero
        return None


def _mapped(read: Callable[[Path], T], paths: list[Path], pool: ThreadPoolExecutor) -> Iterator[T]:
    """Of each file; threads are of use where files are far away, and cost little with several files a turn."""
    turns = [paths[i : i + A_TURN] for i in range(0, len(paths), A_TURN)]
    return itertools.chain.from_iterable(pool.map(lambda turn: [read(path) for path in turn], turns))


def _stamp(stat: os.stat_result, reader: str) -> str:
    """What differs once a file's content does; the time of its change cannot be set as that of its content can."""
    return f"{reader}, {stat.st_size} bytes, {stat.st_mtime_ns}, {stat.st_ctime_ns}"


def _name(path: Path) -> bytes:
    return os.fsencode(os.path.abspath(path))


def _checksum(path: Path, stamp: Any, value: Any) -> int:
    return zlib.crc32(repr((_name(path), stamp, value)).encode("utf-8", "surrogatepass"))


def alike(pairs: Iterable[tuple[Path, Any]]) -> list[list[Path]]:
    """Files with the same value, two or more each."""
    groups: dict[Any, list[Path]] = {}
    for path, value in pairs:
        groups.setdefault(value, []).append(path)
    return [group for group in groups.values() if len(group) > 1]
