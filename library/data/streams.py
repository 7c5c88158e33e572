"""Random numbers of a picture's turn, the same whoever draws them: one process or several, fresh or resumed."""

from __future__ import annotations

import random
from enum import Enum


class Purpose(Enum):
    """What is drawn. Each has a stream of its own: one option's draws move no other's."""

    CAPTION = "caption"
    CONDITION = "condition"
    MIRROR = "mirror"
    CROP = "crop"
    COLOUR = "colour"


def stream(purpose: Purpose, *key: int | str) -> random.Random:
    """Of a key, such as the seed, the epoch and a place in it. Python promises the same numbers in all its versions."""
    return random.Random(" ".join([purpose.value, *map(str, key)]))
