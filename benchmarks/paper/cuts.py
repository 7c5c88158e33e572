"""Squares cut out of a benchmark's pictures and scaled, each made once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from library.data.pixels import read_picture
from library.data.resizing import resize
from networks.deft_config import DeftError, reason_of
from networks.deft_progress import Bar

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Cut:
    """One square.

    :param source: the picture that it is cut out of
    :param mask: a picture that is 0 outside of the object; None: the square is the source's middle
    :param margin: on every side, in parts of the longer side of the mask's box
    """

    source: Path
    mask: Path | None
    margin: float


class Cuts:
    """A folder of squares of size x size pixels. `add` names them, `make` makes those that are not there.

    A file's name says what it was made of, with size and time: what has changed is made anew.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self.size = size
        self._wanted: dict[Path, Cut] = {}

    def add(self, name: str, source: Path, mask: Path | None = None, margin: float = 0.0) -> Path:
        """The file of that square, which `make` makes; in a folder of that name."""
        files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in (source, mask) if path]
        made_of = hashlib.sha256(repr((files, margin, self.size)).encode("utf-8", "surrogateescape")).hexdigest()
        file = self.folder / name / f"{source.stem}_{made_of[:16]}.png"
        self._wanted[file] = Cut(source, mask, margin)
        return file

    def missing(self) -> int:
        """How many `make` would make."""
        return sum(not file.is_file() for file in self._wanted)

    def make(self) -> None:
        """Makes what is not there, with a bar.

        :raises DeftError: when a picture cannot be read, its mask does not fit it, or the folder cannot be written
        """
        missing = {file: cut for file, cut in self._wanted.items() if not file.is_file()}
        if not missing:
            return
        with Bar(len(missing), "pictures are cut and scaled") as bar:
            for file, cut in missing.items():
                _write(square_of(cut, self.size), file)
                bar.add(1)


def _write(picture: Image.Image, file: Path) -> None:
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(partial, "PNG")
        os.replace(partial, file)
    except OSError as error:
        raise DeftError(f"{file}: cannot be written: {reason_of(error)}") from error
    finally:
        partial.unlink(missing_ok=True)


def square_of(cut: Cut, size: int) -> Image.Image:
    """size x size, RGB.

    :raises DeftError: when a file cannot be read, or the mask is another picture's
    """
    image = _read(cut.source, lambda path: read_picture(path).image)
    box = (0, 0, *image.size)
    if cut.mask is not None:
        mask = _read(cut.mask, _opened)
        box = within(mask.getbbox() or (0, 0, *mask.size), mask.size, image.size, cut.mask)
    pixels = np.asarray(image.crop(around(box, image.size, cut.margin)))
    return Image.fromarray(resize(pixels, (size, size)))


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as mask:  # indices of a palette are as good as grey values: 0 is outside
        return mask.copy() if mask.mode in ("1", "L", "P") else mask.convert("L")


def _read(path: Path, reader: Callable[[Path], Image.Image]) -> Image.Image:
    try:
        return reader(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DeftError(f"{path}: cannot be read as a picture: {reason_of(error)}") from error


def within(box: Box, of: tuple[int, int], size: tuple[int, int], mask: Path) -> Box:
    """A box in a mask of size `of` as one in its picture, which may be larger or smaller.

    :raises DeftError: when the picture has another aspect ratio
    """
    across, down = size[0] / of[0], size[1] / of[1]
    if abs(across / down - 1) > 0.01:
        raise DeftError(f"{mask}: {of[0]}x{of[1]} pixels do not fit its picture of {size[0]}x{size[1]}")
    return int(box[0] * across), int(box[1] * down), round(box[2] * across), round(box[3] * down)


def around(box: Box, size: tuple[int, int], margin: float) -> Box:
    """The square around a box with its margin, moved into the picture, no larger than the picture's shorter side."""
    longer = max(box[2] - box[0], box[3] - box[1])
    side = max(1, min(round(longer * (1 + 2 * margin)), *size))
    left, top = ((box[i] + box[i + 2] - side) // 2 for i in (0, 1))
    left, top = (min(max(0, at), whole - side) for at, whole in zip((left, top), size, strict=True))
    return left, top, left + side, top + side
