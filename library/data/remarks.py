"""What a user should know of several files, told in one line a kind."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

logger = logging.getLogger(__name__)


def printable(text: str) -> str:
    """With what is no text, as names from archives may have it, in hexadecimal."""
    return text.encode("utf-8", "backslashreplace").decode()


@dataclass
class Remarks:
    """Files by what is to be said of them."""

    files: dict[str, list[Path]] = field(default_factory=dict)

    def add(self, kind: str, file: Path) -> None:
        """:param kind: the line: `{n}` becomes the number of files, `{s}` the plural's, `{one}` the first of them"""
        self.files.setdefault(kind, []).append(file)

    def lines(self) -> list[str]:
        """In the order in which the kinds came up."""
        return [
            printable(kind)
            .replace("{n}", str(len(files)))  # not format: prompts and names stand in it too
            .replace("{s}", "s" * (len(files) > 1))
            .replace("{one}", f"{printable(str(files[0]))}{', ...' * (len(files) > 1)}")
            for kind, files in self.files.items()
        ]

    def tell(self) -> None:
        """All of them, as warnings."""
        for line in self.lines():
            logger.warning(line)
