"""Curves as SVG's coordinates: lines, and round numbers beside them.

They are drawn in the template and not by matplotlib, whose five figures take a second and two at every save, and whose
letters shrink with the figure on a telephone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from library.training.record import Curve

WIDTH, HEIGHT = 1000, 1000  # of the coordinates, which are stretched to what the page has
DOTTED = 40  # points at most that are drawn as such too
RATIO = 10  # of the largest value to the smallest, above which an axis may be logarithmic
DEEPEST = 1e4  # of the largest value to the end of such an axis
STYLES = {"loss/current": "raw", "loss/average": "mean"}  # curves that do not look like others
COLOURS = 4  # of others
LARGEST, SMALLEST = 1e100, 1e-100  # that an axis tells apart


@dataclass(frozen=True)
class Kind:
    """Curves that belong together.

    :param names: of the logs -> what the page calls them; of several, those that the record has
    :param logarithmic: whether the axis is, where values are far apart
    :param by_curve: whether these values are each curve's largest: what only begins or ends at 0 is not far apart
    """

    title: str
    told: str
    names: Mapping[str, str]
    logarithmic: bool = False
    by_curve: bool = False
    percent: bool = False


KINDS = (
    Kind("Learnt", "the share of the base model's loss on the training pictures that is gone", {"meter/learnt": ""},
         percent=True),
    Kind("Drift", "how far predictions for other prompts have moved", {"meter/drift": ""}),
    Kind("Loss", "of each step, and the mean of the last 100 batches",
         {"loss/current": "each step", "loss/average": "mean"}, True),
    Kind("Validation loss", "on pictures that are kept apart",
         {"loss/validation/step_average": "", "loss/validation/epoch_average": ""}, True),
)  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """An axis; what it shows lies from `least` to `most`."""

    least: float
    most: float
    length: int
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """A coordinate, from 0 to `length`; of what lies outside, that of the nearer end."""
        value = min(max(value, self.least), self.most)
        low, here, high = map(math.log10, (self.least, value, self.most)) if self.logarithmic else (
            self.least, value, self.most)  # fmt: skip
        return self.length * (here - low) / (high - low)

    def ticks(self) -> list[float]:
        """A few round numbers within."""
        return list(self._decades() if self.logarithmic else self._steps())

    def _decades(self) -> Iterator[float]:
        low, high = math.log10(self.least), math.log10(self.most)
        every = max(1, math.ceil((high - low) / 5))
        factors = (1, 2, 5) if high - low < 2 else (1,)
        for power in range(math.floor(low), math.floor(high) + 1):
            if power % every == 0:
                yield from (f * 10.0**power for f in factors if self.least <= f * 10.0**power <= self.most)

    def _steps(self) -> Iterator[float]:
        raw = (self.most - self.least) / 4
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(factor * power for factor in (1, 2, 5, 10, 20) if factor * power >= raw * (1 - 1e-9))
        for number in range(math.ceil(self.least / step), math.floor(self.most / step) + 1):
            yield number * step


@dataclass(frozen=True)
class Line:
    """:param name: of the logs
    :param label: the page's; "" where it is alone
    :param points: x,y of SVG, whose y grows downwards
    :param last: its last value, in words
    :param style: a class of the page's
    """

    name: str
    label: str
    points: list[tuple[float, float]]
    last: str
    style: str

    @property
    def polyline(self) -> str:
        return " ".join(f"{x:g},{y:g}" for x, y in self.points)

    @property
    def dots(self) -> str:
        """A path of them; none of a long line."""
        return "".join(f"M{x:g} {y:g}h0" for x, y in self.points) if len(self.points) <= DOTTED else ""


@dataclass(frozen=True)
class Tick:
    """:param at: in percent, from the left or the top"""

    at: float
    label: str


@dataclass(frozen=True)
class Panel:
    """A drawing of curves."""

    title: str
    told: str
    lines: list[Line]
    scale: Scale
    ticks: list[Tick]


def steps_of(curves: Mapping[str, Curve], step: int) -> Scale:
    """The axis of steps that all panels share."""
    return Scale(0, max([1, step, *(curve.steps[-1] for curve in curves.values() if curve.steps)]), WIDTH)


def steps_told(steps: Scale) -> list[Tick]:
    """The axis's numbers."""
    return [Tick(_percent(steps.at(one) / WIDTH), f"{one:,.0f}") for one in steps.ticks() if one == int(one)]


def panels(curves: Mapping[str, Curve], steps: Scale) -> list[Panel]:
    """Of what has been measured, the most telling first."""
    rates = {name: name.removeprefix("lr/") for name in curves if name.startswith("lr/")}
    kinds = [*KINDS, Kind("Learning rate", "", rates, logarithmic=True, by_curve=True)]
    found = (_panel(kind, {name: curves[name] for name in kind.names if name in curves}, steps) for kind in kinds)
    return [panel for panel in found if panel is not None]


def _panel(kind: Kind, curves: Mapping[str, Curve], steps: Scale) -> Panel | None:
    curves = {name: curve for name, curve in curves.items() if curve.values}
    if not curves:
        return None
    values = [value for curve in curves.values() for value in curve.values]
    compared = [max(curve.values) for curve in curves.values()] if kind.by_curve else values
    far_apart = min(values) >= 0 and _apart([one for one in compared if one >= SMALLEST]) > RATIO
    scale = _scale(values, kind.logarithmic and far_apart)
    lines = [
        Line(
            name,
            kind.names[name] if len(curves) > 1 else "",
            [(round(steps.at(step), 1), round(HEIGHT - scale.at(value), 1))
             for step, value in zip(curve.steps, curve.values, strict=True)],
            told(curve.values[-1], kind.percent),
            STYLES.get(name, f"line{number % COLOURS}"),
        )
        for number, (name, curve) in enumerate(curves.items())
    ]  # fmt: skip
    ticks = [Tick(_percent(1 - scale.at(one) / HEIGHT), told(one, kind.percent)) for one in scale.ticks()]
    return Panel(kind.title, kind.told, lines, scale, ticks)


def _apart(values: Sequence[float]) -> float:
    """The largest of values above 0, to the smallest."""
    return min(max(values), LARGEST) / min(values) if values else 1.0


def _scale(values: Sequence[float], logarithmic: bool) -> Scale:
    """From what there is to what there is, a linear one from 0."""
    least, most = (max(-LARGEST, min(LARGEST, extreme(values))) for extreme in (min, max))
    if logarithmic:
        return Scale(max(min(value for value in values if value > 0), most / DEEPEST), most, HEIGHT, True)
    least, most = min(least, 0), max(most, 0)
    if most - least < SMALLEST:
        return Scale(least, least + 1, HEIGHT)
    room = (most - least) / 20
    return Scale(least - room * (least < 0), most + room * (most > 0), HEIGHT)


def told(value: float, percent: bool = False) -> str:
    """In three digits or so."""
    if percent:
        return f"{100 * value:.3g}%"
    if 0 < abs(value) < 1e-4:
        digits, power = f"{value:.1e}".split("e")
        return f"{digits.removesuffix('.0')}e{int(power)}"
    return f"{value:.3g}"


def _percent(share: float) -> float:
    return round(100 * share, 2)
