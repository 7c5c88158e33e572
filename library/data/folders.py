"""Folders of pictures with captions beside them, and what of them is not used."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from library.data import captions, instructions, metadata_file
from library.data.pixels import PLUGINS, readable_formats
from library.data.remarks import Remarks
from library.options.dataset_config import repeats_and_name
from library.options.rooms import SubsetOptions
from networks.deft_config import DeftError

CAPTIONS = (".txt", ".caption", ".cap")  # extensions that captions are looked for under, to say that they are not read
MANY = 1000  # repeats, of which more are rather a year or a date
_SYSTEM = {"__macosx", "thumbs.db", "desktop.ini"}  # and all dot files: what systems leave behind, not the user


@dataclass(frozen=True)
class Found:
    """A picture's file and caption, see `captions.read`, and the pictures that the caption speaks of, see
    `instructions.read`."""

    path: Path
    caption: str
    inputs: tuple[Path, ...] = ()


def look_into(root: str, option: str, remarks: Remarks) -> None:
    """What of kohya's folder of folders `REPEATS_NAME/` is not used.

    :param option: that names it
    :raises DeftError: when there is no such folder
    """
    if not os.path.isdir(root):
        raise DeftError(f"{option}: no such folder: {root}")
    formats = readable_formats()
    for folder in listed(Path(root)):
        named = repeats_and_name(folder.name)
        if not folder.is_dir():
            what = "picture" if folder.suffix.lower() in formats else "file"
            remarks.add(
                f"{{n}} {what}{{s}} ({{one}}) left out: pictures belong into a folder such as 10_sks cat", folder
            )
        elif not named:
            remarks.add("{n} folder{s} ({one}) left out: the name has to begin with repeats, as in 10_sks cat", folder)
        elif named[0] == 0:
            remarks.add("{n} folder{s} ({one}) left out: its name asks for 0 repeats", folder)


def pictures_of(subset: SubsetOptions, remarks: Remarks) -> list[Found]:
    """The pictures of one folder or metadata file in the order of their names, or of instructions in theirs.

    :raises DeftError: when it is not there, or a caption cannot be read or is missing
    """
    if subset.train_jsonl is not None:
        rows = instructions.read(Path(subset.train_jsonl), subset.image_path)
        return [Found(row.output, row.instruction, row.inputs) for row in rows]
    if subset.metadata_file is not None:
        file = Path(subset.metadata_file)
        entries = metadata_file.read(file, subset.image_dir, subset.captions, remarks)
        return [Found(one.path, one.caption) for one in entries]
    folder = Path(subset.image_dir or "")
    if not folder.is_dir():
        raise DeftError(f"image_dir: no such folder: {folder}")
    found = _with_captions(folder, subset, remarks)
    if not found:
        remarks.add("{n} folder{s} ({one}) without a picture that can be read", folder)
    elif subset.num_repeats > MANY:
        remarks.add(
            f"{{n}} folder{{s}} ({{one}}) with {subset.num_repeats} repeats of every picture: is that meant?", folder
        )
    return found


def picture_files(folder: Path) -> list[Path]:
    """Those that can be read, by their extensions, in the order of their names."""
    return _readable(listed(folder))


def _readable(files: list[Path]) -> list[Path]:
    formats = readable_formats()
    return [path for path in files if path.suffix.lower() in formats and not _is_something_else(path)]


def _is_something_else(path: Path) -> bool:
    """A folder, or a pipe, of which reading would wait for ever; a link to nothing is a picture that cannot be read."""
    return not path.is_file() and path.exists()


def listed(folder: Path) -> list[Path]:
    """What is in it in the order of names, without what systems leave behind."""
    with os.scandir(folder) as entries:
        names = [
            entry.name for entry in entries if not entry.name.startswith(".") and entry.name.lower() not in _SYSTEM
        ]
    return [folder / name for name in sorted(names)]  # to sort paths takes ten times as long


def _with_captions(folder: Path, subset: SubsetOptions, remarks: Remarks) -> list[Found]:
    files, extension = listed(folder), subset.caption_extension
    pictures = _readable(files)
    by_name = {path.name.lower(): path for path in files}  # as Windows and macOS find them
    prompt, found, used = subset.class_tokens, [], set(pictures)
    for path in pictures:
        beside = [by_name[name] for one in captions.beside(path, extension) if (name := one.name.lower()) in by_name]
        used.update(beside[:1])
        if beside:
            if _is_something_else(beside[0]):
                raise DeftError(f"{beside[0]}: no file, but the name of a caption; move it elsewhere, or rename it")
            found.append(Found(path, captions.read(beside[0], subset.captions, remarks)))
            continue
        if prompt is None:
            remarks.add(f"{{n}} picture{{s}} ({{one}}) without a caption {extension}: trained with an empty one", path)
        elif not prompt.isprintable():  # bytes of another encoding, as unpacked archives have them
            raise DeftError(f"{folder.name!a}: the folder's name is no text; rename it, or write captions")
        elif not prompt:
            raise DeftError(f"{path}: no caption {path.stem}{extension}, and {folder.name} names no prompt")
        else:
            remarks.add(f"{{n}} picture{{s}} ({{one}}) without a caption: trained as '{prompt}'", path)
        found.append(Found(path, prompt or ""))
    for path in files:
        if path not in used:
            remarks.add(_unused(path, extension.lower()), path)
    return found


def _unused(path: Path, extension: str) -> str:
    """Why a file is not used, as a kind of `Remarks`."""
    suffix = path.suffix.lower()
    if path.is_dir():
        return "{n} folder{s} within others ({one}) not searched: move the pictures up"
    if _is_something_else(path):
        return "{n} pipe{s} or socket{s} ({one}) left out"
    if suffix in PLUGINS:
        return f"{{n}} {suffix} file{{s}} ({{one}}) left out: pip install {PLUGINS[suffix][1]}, or save as PNG"
    if suffix == extension:
        return "{n} caption{s} ({one}) without a picture of that name"
    if suffix in CAPTIONS:
        return f"{{n}} {suffix} file{{s}} ({{one}}) not read: --caption_extension {suffix} takes them for the captions"
    return f"{{n}} {suffix or 'other'} file{{s}} ({{one}}) left out: no picture that can be read, and no caption"
