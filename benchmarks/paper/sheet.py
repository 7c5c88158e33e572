"""A contact sheet: a row a subject and prompt, a column for the real picture and for each method."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps

from networks.deft_io import write_whole

CELL, GAP, LABEL, HEAD, POINTS = 160, 6, 210, 40, 13  # pixels, and the size of letters


class Line(NamedTuple):
    """One row.

    :param label: stands at its left
    :param cells: a picture a column; None is drawn as missing
    """

    label: str
    cells: Sequence[Path | None]


def spread(number: int, most: int) -> list[int]:
    """At most `most` of 0 … number - 1, as far from each other as can be."""
    if number <= most:
        return list(range(number))
    return [round(i * (number - 1) / max(most - 1, 1)) for i in range(most)]


def draw(columns: Sequence[str], lines: Sequence[Line], file: Path) -> None:
    """Writes the sheet as PNG.

    Pictures keep their shape within their cell. One that cannot be read is drawn as missing, as those that are not
    there.

    :param columns: what stands above them
    """
    size = (LABEL + len(columns) * (CELL + GAP), HEAD + len(lines) * (CELL + GAP))
    sheet = Image.new("RGB", size, "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(POINTS)
    for column, name in enumerate(columns):
        _write(canvas, font, name, LABEL + column * (CELL + GAP), 4, CELL, 2)
    for row, line in enumerate(lines):
        top = HEAD + row * (CELL + GAP)
        _write(canvas, font, line.label, 6, top, LABEL - 12, 9)
        for column, path in enumerate(line.cells):
            left = LABEL + column * (CELL + GAP)
            picture = _read(path)
            if picture is None:
                canvas.rectangle((left, top, left + CELL - 1, top + CELL - 1), "gainsboro")
                canvas.text((left + CELL // 2, top + CELL // 2), "missing", "dimgray", font, anchor="mm")
            else:
                sheet.paste(picture, (left + (CELL - picture.width) // 2, top + (CELL - picture.height) // 2))
    written = io.BytesIO()
    sheet.save(written, "PNG")
    write_whole(file, written.getvalue())


def _read(path: Path | None) -> Image.Image | None:
    try:
        with Image.open(path or "") as picture:
            upright = ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    return ImageOps.contain(upright, (CELL, CELL), Image.Resampling.LANCZOS)


def _write(canvas: ImageDraw.ImageDraw, font: Any, text: str, left: int, top: int, width: int, most: int) -> None:
    """A text in lines of a width in pixels; what is over `most` lines is cut."""
    lines = wrapped(text, lambda part: font.getlength(part) <= width)
    if len(lines) > most:
        lines[most - 1 :] = [lines[most - 1][:-1] + "…"]
    canvas.multiline_text((left, top), "\n".join(lines), "black", font, spacing=2)


def wrapped(text: str, fits: Callable[[str], bool]) -> list[str]:
    """A text's lines, broken at spaces, and within words that fit nowhere."""
    lines = []
    for part in text.split("\n"):
        line = ""
        for word in part.split(" "):
            longer = f"{line} {word}" if line else word
            if line and not fits(longer):
                lines.append(line)
                longer = word
            while not fits(longer):
                cut = next((end for end in range(len(longer) - 1, 1, -1) if fits(longer[:end])), 1)
                if cut == len(longer):
                    break
                lines.append(longer[:cut])
                longer = longer[cut:]
            line = longer
        lines.append(line)
    return lines
