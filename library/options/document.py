"""The table of all options in docs/trainer.md: `python -m library.options.document` writes it anew."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from library.options.table import OPTIONS, Option

PAGE = Path(__file__).resolve().parents[2] / "docs" / "trainer.md"
BEGIN, END = "<!-- options: python -m library.options.document -->\n", "<!-- end of options -->\n"

_STATUS = {"always": "done anyway"}  # the others are told as they are


def table() -> str:
    """Every row in Markdown, a table a group."""
    return "\n".join(itertools.chain.from_iterable(_group(*found) for found in itertools.groupby(OPTIONS, _title)))


def page(text: str) -> str:
    """The page with the table as it is now."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def _title(option: Option) -> str:
    return option.group


def _group(title: str, options: Iterator[Option]) -> Iterator[str]:
    yield f"### {title[0].upper()}{title[1:]}\n\n| option | default | |\n|---|---|---|"
    for status, alike in itertools.groupby(options, lambda one: (one.status, one.help if one.status else one.name)):
        rows = list(alike)
        names = ", ".join(f"`{one.name}`" for one in rows)
        yield f"| {names} | {_default(rows[0])} | {_told(status[0])}{_text(rows[0])}{_choices(rows[0])} |"
    yield ""


def _text(option: Option) -> str:
    return option.help.replace("|", "\\|").replace("%%", "%")  # the first would end the cell, the second is argparse's


def _told(status: str) -> str:
    return f"{_STATUS.get(status, status)}: " if status else ""


def _default(option: Option) -> str:
    if option.status or option.default in (None, ()):
        return ""
    return "off" if option.default is False else f"{option.default}"


def _choices(option: Option) -> str:
    return "" if option.status or len(option.choices) < 2 else f": {', '.join(map(str, option.choices))}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
