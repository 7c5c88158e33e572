"""kohya's metadata files: captions, tags and paths of pictures, as sd-scripts' `finetune/` scripts write them and its
fine-tuning data sets read them (commit 48d368fa, train_util.py; v0.11.1, finetuning_dataset.py)."""

from __future__ import annotations

import json
import os
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.data.pixels import readable_formats
from library.data.remarks import Remarks
from library.options.rooms import CaptionOptions
from networks.deft_config import DeftError, read_text, reason_of


@dataclass(frozen=True)
class Entry:
    """A picture with its caption, and its width and height where the file says them: sd-scripts believes it."""

    path: Path
    caption: str
    size: tuple[int, int] | None = None


def read(file: Path, image_dir: str | None, options: CaptionOptions, remarks: Remarks) -> list[Entry]:
    """The pictures of a JSON file, {key: {"caption", "tags", "image_size"}}, or of JSON lines, with "image_path";
    in sd-scripts' order, long keys first. Latents (.npz) are neither read nor touched.

    :param image_dir: what keys are relative to; they may lack the extension
    :param options: how tags are joined to captions
    :param remarks: learns of what is left out
    :raises DeftError: when the file is damaged, a value is of another kind, or no picture is there
    """
    found = _lines(file) if file.name.lower().endswith(".jsonl") else _object(file)
    for key, about in found.items():
        _check(f"{file}: {_short(key)}", about)
    if not found:
        raise DeftError(f"{file}: names no pictures")
    folders = _Folders(readable_formats())
    entries = []
    for key, about in sorted(found.items(), key=lambda item: len(item[0]), reverse=True):
        if not os.path.isabs(key) and image_dir is None:
            raise DeftError(f"{file}: {_short(key)} is a relative path; give image_dir (--train_data_dir)")
        path = folders.find(os.path.join(image_dir or "", key))
        if path is None:
            remarks.add(
                f"{{n}} picture{{s}} of {file.name} ({{one}}) left out: not there, or not readable", Path(_short(key))
            )
            continue
        caption, tags = about.get("caption") or "", about.get("tags")
        if options.enable_wildcard and tags and not caption.strip():
            remarks.add("{n} picture{s} ({one}) with tags but no caption: enable_wildcard drops the tags, as in "
                        "sd-scripts; write them as captions", path)  # fmt: skip
        caption = _merged(caption, tags, options)
        if not caption.strip():
            remarks.add("{n} picture{s} ({one}) without a caption: trained on an empty one", path)
        size = about.get("image_size")
        entries.append(Entry(path, caption, None if size is None else (size[0], size[1])))
    if not entries:
        raise DeftError(
            "; ".join(
                [f"{file}: none of its pictures is there; latents (.npz) are not read in their place", *remarks.lines()]
            )
        )
    return entries


def _object(file: Path) -> dict[str, Any]:
    found = _parsed(read_text(file, f"{file}:"), f"{file}:")
    if not isinstance(found, dict):
        raise DeftError(f'{file}: must be a JSON object of pictures, {{key: {{"caption": ...}}}}')
    return found


def _lines(file: Path) -> dict[str, Any]:
    found = {}
    for number, line in enumerate(read_text(file, f"{file}:").split("\n"), 1):
        if not line.strip():
            continue
        about = _parsed(line, f"{file}, line {number}:")
        key = about.pop("image_path", None) if isinstance(about, dict) else None
        if not isinstance(key, str):
            raise DeftError(f'{file}, line {number}: must be a JSON object with an "image_path"')
        if about.get("width") is not None and about.get("height") is not None:
            about["image_size"] = [about["width"], about["height"]]
        found[key] = about
    return found


def _parsed(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of too many digits is a ValueError too
        reason = "nested too deeply" if isinstance(error, RecursionError) else reason_of(error)
        raise DeftError(f"{source} not JSON ({reason}); write it anew") from None


def _check(source: str, about: Any) -> None:
    """:raises DeftError: for values of kinds that sd-scripts' scripts do not write"""
    if not isinstance(about, Mapping):
        raise DeftError(f'{source}: must be an object, such as {{"caption": "a cat"}}')
    for name in ("caption", "tags"):
        if not isinstance(about.get(name), (str, type(None))):
            raise DeftError(f"{source}: {name} must be text")
        if about.get(name):
            try:
                about[name].encode()
            except UnicodeEncodeError:  # half a character, "\ud83d"
                raise DeftError(f"{source}: {name} has half a character; write it anew") from None
    size = about.get("image_size")
    if size is not None and not (
        isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
    ):
        raise DeftError(f"{source}: image_size must be the width and height in pixels")


def _short(key: str) -> str:
    return repr(key if len(key) <= 80 else "..." + key[-80:])


def _merged(caption: str, tags: str | None, options: CaptionOptions) -> str:
    """Tags behind the caption or, with wildcards, behind each of its lines."""
    separator = options.caption_separator
    if tags is None:
        return caption
    if options.enable_wildcard:
        tags = tags.replace("\n", separator)
        return "\n".join(f"{line}{separator}{tags}" for line in caption.split("\n") if line.strip())
    return separator.join(part for part in (caption, tags) if part)


class _Folders:
    """Pictures by their names with or without extension; each folder is listed once.

    :param formats: extensions of pictures that can be read
    """

    def __init__(self, formats: Container[str]):
        self.formats = formats
        self._listed: dict[str, dict[str, str]] = {}  # folder -> name without extension -> first such picture

    def find(self, path: str) -> Path | None:
        """As sd-scripts v0.11.1 finds it; keys of Windows are understood elsewhere too."""
        for spelt in dict.fromkeys((path, path.replace("\\", "/"))):
            folder, name = os.path.split(spelt)
            extension = os.path.splitext(name)[1]
            if extension.lower() in self.formats and os.path.isfile(spelt):
                return Path(spelt)
            if name in (pictures := self._pictures(folder)):
                return Path(folder, pictures[name])
        return None

    def _pictures(self, folder: str) -> dict[str, str]:
        if folder not in self._listed:
            try:
                names = sorted(os.listdir(folder or "."))
            except (OSError, ValueError):  # ValueError: a null character, or half a character, in the name
                names = []
            found: dict[str, str] = {}
            for name in names:
                stem, extension = os.path.splitext(name)
                if extension.lower() in self.formats and os.path.isfile(os.path.join(folder, name)):
                    found.setdefault(stem, name)
            self._listed[folder] = found
        return self._listed[folder]
