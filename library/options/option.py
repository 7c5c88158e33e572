"""What a row of the options' table is, and the ways to write one."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

Check = tuple[Callable[[Any], bool], str]  # whether a value is good, and what it must be

AT_LEAST_1: Check = (lambda value: value >= 1, "at least 1")
AT_LEAST_0: Check = (lambda value: 0 <= value < math.inf, "a number of at least 0")
ABOVE_0: Check = (lambda value: 0 < value < math.inf, "a number above 0")
FINITE: Check = (lambda value: math.isfinite(value), "a finite number")
TIMESTEP: Check = (lambda value: 0 <= value <= 999, "from 0 to 999")
PAST_TIMESTEP: Check = (lambda value: 1 <= value <= 1000, "from 1 to 1000")
MODE_SCALE: Check = (lambda value: -1 <= value <= 1.75, "from -1 to 1.75")  # arXiv 2403.03206, section 3.1
SHARE: Check = (lambda value: 0 <= value <= 1, "from 0 to 1")
NOT_EMPTY: Check = (lambda value: value != "", "a text that is not empty")
MULTIPLE_OF_16: Check = (lambda value: value >= 16 and value % 16 == 0, "a multiple of 16")
SEED: Check = (lambda value: 0 <= value < 2**32, f"from 0 to {2**32 - 1}")


@dataclass(frozen=True)
class Option:
    """A row of the table.

    :param kind: bool for a switch, otherwise what makes a value of a string
    :param help: for `--help`, one line; where the option is not honoured, why, and what to do instead
    :param many: whether it takes several values
    :param check: of each value
    :param metadata: the name of the field, `ss_...`
    :param status: "" where it is honoured; "always" where it asks for what is done anyway; "no effect" where what is
        trained is the same without it; "refused" where it would change something
    """

    name: str
    kind: Any
    default: Any = None
    help: str = ""
    choices: Sequence[str | int] = ()
    many: bool = False
    check: Check | None = None
    metadata: str | None = None
    metavar: str | None = None
    status: str = ""
    group: str = ""


def steps_or_share(text: str) -> int | float:
    """An int for steps, a float for a share of all steps, which is below 1 or in %.

    :raises argparse.ArgumentTypeError: for anything else
    """
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        number = float(text)
        return int(text) if number >= 1 else number or 0
    except ValueError:
        told = f"'{text}' must be a whole number of steps, or a share of them as 0.1 or 10%"
        raise argparse.ArgumentTypeError(told) from None


def group(title: str, *options: Option) -> list[Option]:
    return [replace(option, group=title) for option in options]


# sd-scripts' defaults of what is not honoured: in a configuration they ask for nothing, and nor does 0
_ASK_FOR_NOTHING = {"zero_stage": 2}


def asks_for_nothing(name: str, text: str) -> bool:
    """Whether an option that is not honoured has a value that changes nothing in sd-scripts either."""
    neutral = _ASK_FOR_NOTHING.get(name)
    try:
        return float(text) in (0, neutral)
    except ValueError:
        return text in ("", neutral)


def not_honoured(status: str, kind: Any, reason: str, *names: str, many: bool = False) -> list[Option]:
    """Options alike: switches, or such that take a value, of any kind."""
    return [Option(name, kind, False if kind is bool else None, reason, many=many, status=status) for name in names]


def always(reason: str, *switches: str) -> list[Option]:
    return not_honoured("always", bool, reason, *switches)


def no_effect(reason: str, name: str, kind: Any) -> Option:
    return not_honoured("no effect", kind, reason, name)[0]


def refused(reason: str, *names: str, switch: bool = False, many: bool = False) -> list[Option]:
    return not_honoured("refused", bool if switch else str, reason, *names, many=many)


def number_or_pair(value: Any) -> tuple[int, int]:
    """(width, height) from `512`, `512,768` or a list of two.

    :raises ValueError: which says what it must be
    """
    numbers = _numbers(int, value)
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise ValueError("one number or WIDTH,HEIGHT")
    return numbers[0], numbers[-1]


def pair(value: Any) -> tuple[float, float]:
    """(least, most) from `2.0,4.0` or a list of two.

    :raises ValueError: which says what it must be
    """
    numbers = _numbers(float, value)
    if len(numbers) != 2 or not 0 < numbers[0] <= numbers[1] < math.inf:
        raise ValueError("two numbers above 0, the smaller one first, as 2.0,4.0")
    return numbers[0], numbers[1]


def _numbers(kind: type, value: Any) -> list[Any]:
    """None where there is anything else."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(part, bool) or (kind is int and isinstance(part, float)) for part in parts):
        return []
    try:
        return [kind(part) for part in parts]
    except (ValueError, TypeError, OverflowError):
        return []
