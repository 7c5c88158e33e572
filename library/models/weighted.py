"""Captions with weights, `(cat:1.3)`, as sd-scripts' --weighted_captions reads them (commit 48d368fa,
strategy_base.py), which is the stable-diffusion-webui's way of writing them."""

from __future__ import annotations

import re

from networks.deft_config import DeftError

MORE, LESS = 1.1, 1 / 1.1  # (word) and [word]

_PIECES = re.compile(r"\\[\\()\[\]]?|[()\[\]]|:([+-]?[.\d]+)\)|[^\\()\[\]:]+|:")


def parse(caption: str) -> list[tuple[str, float]]:
    """Its texts, in their order, each with its weight: 1.1 within ( ), a number of one's own with (word:1.3), 1/1.1
    within [ ], the product within several; a bracket behind a backslash is one of the text. At least one.

    :raises DeftError: for a weight that is no number
    """
    found: list[list] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where brackets begin that are not closed yet

    def weigh(start: int, by: float) -> None:
        for one in found[start:]:
            one[1] *= by

    for piece in _PIECES.finditer(caption):
        text, weight = piece[0], piece[1]
        if text in opened:
            opened[text].append(len(found))
        elif text == ")" and opened["("]:
            weigh(opened["("].pop(), MORE)
        elif text == "]" and opened["["]:
            weigh(opened["["].pop(), LESS)
        elif weight and opened["("]:
            weigh(opened["("].pop(), _number(weight, caption))
        else:
            found.append([text[1:] if text.startswith("\\") else text, 1.0])
    for bracket, by in (("(", MORE), ("[", LESS)):
        for start in opened[bracket]:
            weigh(start, by)
    joined: list[tuple[str, float]] = []
    for text, weight in found or [["", 1.0]]:
        if joined and joined[-1][1] == weight:
            joined[-1] = joined[-1][0] + text, weight
        else:
            joined.append((text, weight))
    return joined


def _number(weight: str, caption: str) -> float:
    try:
        return float(weight)
    except ValueError:
        raise DeftError(f"--weighted_captions: {weight} in '{caption}' is no number; write (word:1.3)") from None
