"""What the pages that people look at have in common: each is one file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import unicodedata
from pathlib import Path

from PIL import Image


def jpeg(image: Image.Image, quality: int = 78) -> bytes:
    """A small file of it."""
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality, optimize=True)
    return content.getvalue()


def data_url(image: Image.Image) -> str:
    """Of an image that stands in the page itself."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg(image)).decode()}"


def plain(value: object) -> str:
    """Anything of the user's on one line, with control characters and undecodable bytes as a mark."""
    letters = str(value).replace("\n", " ").replace("\t", " ")
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(letter) in ("Cc", "Cs") else letter
                   for letter in letters)  # fmt: skip


def text(value: object) -> str:
    """`plain` as HTML."""
    return html.escape(plain(value))


def style() -> str:
    """Colours, letters and tables, light and dark."""
    return Path(__file__).with_name("pages.css").read_text(encoding="utf-8")
