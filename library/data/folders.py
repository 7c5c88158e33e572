"""kohya's image folders: `REPEATS_NAME/` with pictures and captions beside them; and what of them is not used."""

from __future__ import annotations

import itertools
import logging
import math
import os
import random
import re
from collections.abc import Container
from dataclasses import dataclass, field, replace
from pathlib import Path

from library.data.pixels import PLUGINS, readable_formats
from networks.deft_config import DeftError, read_text

logger = logging.getLogger(__name__)

CAPTIONS = (".txt", ".caption", ".cap")  # extensions that captions are looked for under, to say that they are not read
MANY = 1000  # repeats, of which more are rather a year or a date
_SYSTEM = {"__macosx", "thumbs.db", "desktop.ini"}  # and all dot files: what systems leave behind, not the user


@dataclass(frozen=True)
class TrainImage:
    """One picture: its file, caption, repeats, and its folder's name."""

    path: Path
    caption: str
    repeats: int
    folder: str


@dataclass
class Remarks:
    """What a user should know of several files, told in one line a kind."""

    files: dict[str, list[Path]] = field(default_factory=dict)  # by kind

    def add(self, kind: str, file: Path) -> None:
        """:param kind: the line: `{n}` becomes the number of files, `{s}` the plural's, `{one}` the first of them"""
        self.files.setdefault(kind, []).append(file)

    def lines(self) -> list[str]:
        """In the order in which the kinds came up."""
        return [
            kind.replace("{n}", str(len(files)))  # not format: prompts and names stand in it too
            .replace("{s}", "s" * (len(files) > 1))
            .replace("{one}", f"{files[0]}{', ...' * (len(files) > 1)}")
            for kind, files in self.files.items()
        ]


def find_images(train_data_dir: str, caption_extension: str) -> list[TrainImage]:
    """All pictures of a kohya image folder, in the order of their names; what is not used is told.

    :raises DeftError: when there is no such folder or no picture in it, or a caption cannot be read or is empty
    """
    root = Path(train_data_dir)
    if not os.path.isdir(root):
        raise DeftError(f"--train_data_dir: no such folder: {root}")
    formats = readable_formats()
    images: list[TrainImage] = []
    remarks = Remarks()
    for folder in _listed(root):
        match = re.fullmatch(r"(\d+)_(.*)", folder.name)
        if not folder.is_dir():
            what = "picture" if folder.suffix.lower() in formats else "file"
            remarks.add(
                f"{{n}} {what}{{s}} ({{one}}) left out: pictures belong into a folder such as 10_sks cat", folder
            )
        elif not match:
            remarks.add("{n} folder{s} ({one}) left out: the name has to begin with repeats, as in 10_sks cat", folder)
        elif int(match[1]) == 0:
            remarks.add("{n} folder{s} ({one}) left out: its name asks for 0 repeats", folder)
        else:
            found = _images_of(folder, int(match[1]), match[2].strip(), caption_extension, formats, remarks)
            images += found
            if not found:
                remarks.add("{n} folder{s} ({one}) without a picture that can be read", folder)
            elif int(match[1]) > MANY:
                remarks.add(
                    f"{{n}} folder{{s}} ({{one}}) with {match[1]} repeats of every picture: is that meant?", folder
                )
    told = remarks.lines()
    if not images:
        raise DeftError("; ".join([f"--train_data_dir {root}: no images; they belong into folders named as in "
                                   f"{root / '10_sks cat'}", *told]))  # fmt: skip
    for line in told:
        logger.warning(line)
    return images


def _listed(folder: Path) -> list[Path]:
    """In the order of names, without what systems leave behind."""
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.name.lower() not in _SYSTEM)


def _images_of(
    folder: Path, repeats: int, prompt: str, extension: str, formats: Container[str], remarks: Remarks
) -> list[TrainImage]:
    """The pictures of one folder.

    :param prompt: the caption of those that have none
    """
    files = _listed(folder)
    by_name = {path.name.lower(): path for path in files}  # as Windows and macOS find them
    images, captions = [], set()
    for path in files:
        if path.suffix.lower() in formats and not path.is_dir():
            caption = by_name.get(f"{path.stem}{extension}".lower())
            captions.add(caption)
            text = prompt if caption is None else _first_line(caption, remarks)
            if caption is None:
                if not prompt.isprintable():  # bytes of another encoding, as unpacked archives have them
                    raise DeftError(f"{folder.name!a}: the folder's name is no text; rename it, or write captions")
                if not prompt:
                    raise DeftError(f"{path}: no caption {path.stem}{extension}, and {folder.name} names no prompt")
                remarks.add(f"{{n}} picture{{s}} ({{one}}) without a caption: trained as '{prompt}'", path)
            images.append(TrainImage(path, text, repeats, folder.name))
    for path in files:
        if path.suffix.lower() not in formats and path not in captions:
            remarks.add(_unused(path, extension.lower()), path)
    return images


def split(images: list[TrainImage], share: float, seed: int) -> tuple[list[TrainImage], list[TrainImage]]:
    """What is trained on, and of each folder a share to validate on, chosen by the seed as sd-scripts chooses it.

    :raises DeftError: when none is left to train on
    """
    if not share:
        return images, []
    trained: list[TrainImage] = []
    kept: list[TrainImage] = []
    for _, group in itertools.groupby(images, lambda image: image.path.parent):
        shuffled = list(group)
        random.Random(seed).shuffle(shuffled)
        number = math.ceil(len(shuffled) * (1 - share))
        trained += shuffled[:number]
        kept += [replace(image, repeats=1) for image in shuffled[number:]]
    if not kept:
        logger.warning(f"--validation_split {share}: less than a picture of every folder; nothing is validated")
    if not trained:
        raise DeftError(f"--validation_split {share}: leaves no picture to train on")
    return trained, kept


def _first_line(caption: Path, remarks: Remarks) -> str:
    lines = [line.strip() for line in read_text(caption, f"{caption}:").split("\n") if line.strip()]
    if not lines:
        raise DeftError(f"{caption}: the caption is empty; write one, or delete the file to use the folder's name")
    if len(lines) > 1:
        remarks.add("{n} caption{s} ({one}) of several lines: only the first is used; join them", caption)
    return lines[0]


def _unused(path: Path, extension: str) -> str:
    """Why a file is not used, as a kind of `Remarks`."""
    suffix = path.suffix.lower()
    if path.is_dir():
        return "{n} folder{s} within others ({one}) not searched: move the pictures up"
    if suffix in PLUGINS:
        return f"{{n}} {suffix} file{{s}} ({{one}}) left out: pip install {PLUGINS[suffix][1]}, or save as PNG"
    if suffix == extension:
        return "{n} caption{s} ({one}) without a picture of that name"
    if suffix in CAPTIONS:
        return f"{{n}} {suffix} file{{s}} ({{one}}) not read: --caption_extension {suffix} takes them for the captions"
    return f"{{n}} {suffix or 'other'} file{{s}} ({{one}}) left out: no picture that can be read, and no caption"
