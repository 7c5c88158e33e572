"""--train_jsonl: instructions, the pictures they speak of, and the picture that is wanted; the rows of OmniGen's own
training (VectorSpaceLab/OmniGen, OmniGen/train_helper/data.py)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from library.placeholders import misplaced
from networks.deft_config import DeftError, nearest, read_text, reason_of

OUTPUT, OUTPUTS = "output_image", "output_images"  # the code's key, and the one of its documentation
KEYS = ("task_type", "instruction", "input_images", OUTPUT)
_EXAMPLE = '{"instruction": "a cat", "input_images": [], "output_image": "cat.png"}'
_NAMED = 5  # further faulty lines that an error names


@dataclass(frozen=True)
class Row:
    """:param inputs: in the order of their numbers"""

    output: Path
    instruction: str
    inputs: tuple[Path, ...]


def read(file: Path, folder: str | None) -> list[Row]:
    """The rows of a file of JSON lines, in its order. Line ends within an instruction become spaces.

    :param folder: what paths are relative to; None: the file's own
    :raises DeftError: for what is wrong in the first faulty line, with the numbers of others
    """
    if not file.is_file():
        raise DeftError(f"train_jsonl: no such file: {file}")
    if folder is not None and not os.path.isdir(folder):
        raise DeftError(f"image_path: no such folder: {folder}")
    files = _Files(file.parent if folder is None else Path(folder))
    rows, faults = [], {}
    for number, line in enumerate(read_text(file, f"{file}:").split("\n"), 1):
        if line.strip():
            try:
                rows.append(_row(line, files))
            except DeftError as error:
                faults[number] = str(error)
    if faults:
        raise DeftError(f"{file}, {_told(faults)}")
    if not rows:
        raise DeftError(f"{file}: has no rows; each line is one, as {_EXAMPLE}")
    return rows


def _told(faults: Mapping[int, str]) -> str:
    (first, fault), *others = faults.items()
    if not others:
        return f"line {first}: {fault}"
    numbers = ", ".join(str(number) for number, _ in others[:_NAMED]) + ", ..." * (len(others) > _NAMED)
    lines = f"{len(others)} more line{'s are' if len(others) > 1 else ' is'}"
    return f"line {first}: {fault} ({lines} wrong: {numbers})"


class _Files:
    """Files of one folder, each looked for once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._found: dict[str, Path] = {}

    def find(self, name: str) -> Path:
        """:raises DeftError: where it is not there; paths of Windows are understood elsewhere too"""
        if name not in self._found:
            for spelt in dict.fromkeys((name, name.replace("\\", "/"))):
                path = self.folder / spelt
                if _is_file(path):
                    self._found[name] = path
                    return path
            if not name.isprintable():  # C:\new.png, where \n is a line's end
                raise DeftError(f"no such file: {name!r}; backslashes have to be doubled")
            raise DeftError(f"no such file: {self.folder / name}")
        return self._found[name]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or has a zero
        return False


def _row(line: str, files: _Files) -> Row:
    """:raises DeftError: for what is wrong with it"""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:  # a number of too many digits is a ValueError too
        reason = "nested too deeply" if isinstance(error, RecursionError) else reason_of(error)
        hint = "; backslashes have to be doubled" if "\\" in line else ""
        raise DeftError(f"not JSON ({reason}){hint}") from None
    if not isinstance(found, dict):
        raise DeftError(f"must be an object, as {_EXAMPLE}")
    for key in found:
        if key not in (*KEYS, OUTPUTS):
            raise DeftError(f"unknown key '{key}'{nearest(key, KEYS)}")
    output = files.find(_output(found))
    inputs = [] if found.get("input_images") is None else found["input_images"]
    if not isinstance(inputs, list) or not all(isinstance(name, str) and name for name in inputs):
        _wrong("input_images", inputs, "a list of paths, in the order of their places")
    text = " ".join(_text(found, "instruction").split("\n")).strip()
    if problem := misplaced(text, len(inputs)):
        raise DeftError(problem)
    return Row(output, text, tuple(files.find(name) for name in inputs))


def _output(found: Mapping[str, Any]) -> str:
    """The picture that is wanted."""
    if OUTPUTS not in found:
        name = _text(found, OUTPUT)
        return name if name else _wrong(OUTPUT, name, "a path")
    names = found[OUTPUTS]
    if OUTPUT in found or not isinstance(names, list) or len(names) != 1 or not names[0]:
        raise DeftError(f"{OUTPUTS} must be a list of one path, without {OUTPUT} beside it")
    return _text({OUTPUT: names[0]}, OUTPUT)


def _text(found: Mapping[str, Any], key: str) -> str:
    if key not in found:
        raise DeftError(f"no {key}; a line is {_EXAMPLE}")
    value = found[key]
    if not isinstance(value, str):
        _wrong(key, value, "a text in quotes")
    try:
        value.encode()
    except UnicodeEncodeError:  # "\ud83d"
        raise DeftError(f"{key} has half a character; write it anew") from None
    return value


def _wrong(key: str, value: object, wanted: str) -> NoReturn:
    raise DeftError(f"{key} = {value!r:.60}: must be {wanted}")
