"""How an instruction or a prompt names its input pictures: OmniGen's words for them."""

from __future__ import annotations

import re

PICTURE = re.compile(r"<\|image_(\d+)\|>")  # which of the input pictures, from 1
_FRAMED = re.compile(rf"<img>{PICTURE.pattern}</img>")


def placeholder(number: int) -> str:
    """What stands in an instruction for an input picture, counted from 1."""
    return f"<img><|image_{number}|></img>"


def misplaced(text: str, pictures: int) -> str | None:
    """What is wrong with how a text names its pictures; None if nothing. Each has to be named, once or more."""
    if stray := PICTURE.search(_FRAMED.sub("", text)):
        return f"{stray[0]} has to be written {placeholder(int(stray[1]))}"
    named, wanted = {int(number) for number in PICTURE.findall(text)}, set(range(1, pictures + 1))
    if named == wanted:
        return None
    if named - wanted:
        there = f"there {'is' if pictures == 1 else 'are'} {pictures} input picture{'s' * (pictures != 1)}"
        return f"it names <|image_{min(named - wanted)}|>, and {there}"
    return f"it has to name its input pictures, as in {placeholder(min(wanted - named))}"
