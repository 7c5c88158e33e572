"""Files of a run: a line of JSON for each thing that is done, at once, and JSON that is written whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from networks.deft_config import DeftError, read_text, reason_of
from networks.deft_io import write_whole

Record = dict[str, Any]


class Records:
    """`<name>.jsonl`, where the first process writes, and `<name>.<i>.jsonl` of the others until they are gathered.

    :param process: which of them this one is
    """

    def __init__(self, folder: Path, name: str, process: int = 0):
        self.folder, self.name, self.process = folder, name, process

    @property
    def file(self) -> Path:
        """Of all, once they are gathered."""
        return self.folder / f"{self.name}.jsonl"

    @property
    def _own(self) -> Path:
        return self.folder / f"{self.name}.{self.process}.jsonl" if self.process else self.file

    def add(self, record: Mapping[str, Any]) -> None:
        """Appends a line, which is on the disk when this returns.

        :raises DeftError: when it cannot be written
        """
        line = json.dumps(record, ensure_ascii=False) + "\n"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _end_line(self._own)
            with open(self._own, "a", encoding="utf-8", newline="\n") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DeftError(f"{self._own}: cannot be written ({reason_of(error)})") from None

    def read(self) -> Iterator[Record]:
        """All processes' records, in the order of each; what a killed run has left of a line is passed over.

        :raises DeftError: for another line that is no JSON
        """
        for file in (self.file, *self._others()):
            yield from lines_of(file)

    def gather(self) -> None:
        """Moves all into one file; while no process writes."""
        for other in self._others():
            for record in lines_of(other):
                self.add(record)
            other.unlink()

    def _others(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.name}.*.jsonl"))


def _end_line(file: Path) -> None:
    """Takes away what a killed run has left of its last line."""
    if not file.is_file() or not file.stat().st_size:
        return
    with open(file, "rb+") as opened:
        opened.seek(-1, os.SEEK_END)
        if opened.read(1) != b"\n":
            opened.seek(0)
            opened.truncate(opened.read().rfind(b"\n") + 1)


def lines_of(file: Path) -> Iterator[Record]:
    """The objects of a JSONL file, none where there is no file.

    :raises DeftError: for a line that is no JSON object, but for the last, which a killed run may have left
    """
    lines = read_text(file, f"{file}:").split("\n") if file.is_file() else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if isinstance(found, dict):
            yield found
        elif number < len(lines):
            raise DeftError(f"{file}: line {number} is no JSON object; remove it, and run again")


def read_json(file: Path) -> Record:
    """A JSON object, empty where there is no file.

    :raises DeftError: for another content
    """
    if not file.is_file():
        return {}
    try:
        found = json.loads(read_text(file, f"{file}:"))
    except ValueError as error:
        raise DeftError(f"{file}: no JSON ({reason_of(error)}); remove it, and run again") from None
    if not isinstance(found, dict):
        raise DeftError(f"{file}: no JSON object; remove it, and run again")
    return found


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all.

    :raises DeftError: when it cannot be written
    """
    write_whole(file, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
