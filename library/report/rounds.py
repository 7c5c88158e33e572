"""A training's samples for the page: round by round, as small JPEGs that are made once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from library.data.building import WORKERS
from library.data.pixels import read_picture
from library.pages import data_url
from library.training.record import Drawn
from networks.deft_progress import Bar

PROMPTS = 24  # shown at most
BYTES = 6_000_000  # of all samples in the page
A_PIXEL = 0.16  # bytes of a photograph there: so many pictures are tried first
SIDES = ((4, 512), (9, 384), (PROMPTS, 256))  # prompts at most -> pixels of a picture's longer side
TRAINED_ON, SMALL = 8, 160  # pictures beside the samples, and their longer side


@dataclass(frozen=True)
class Shown:
    """An image as it stands in the page."""

    url: str
    width: int
    height: int


@dataclass(frozen=True)
class Round:
    """What was drawn after a step: of each prompt that is shown, None where there is no picture."""

    step: int
    pictures: Sequence[Shown | None]


@dataclass
class Pictures:
    """Reads pictures, each once."""

    folder: Path
    _read: dict[tuple[Path, int], Shown | None] = field(default_factory=dict)
    _every: int = 1  # of so many rounds one is shown; it only grows, so that what is shown was read before

    def rounds(self, samples: Sequence[Drawn]) -> list[Round]:
        """All, or as many evenly spread ones as the page has room for, and the last; those without any picture are left
        out."""
        prompts = prompts_of(samples)
        by_step: dict[int, dict[int, str]] = {}
        for one in samples:  # of what was drawn twice, the later one
            by_step.setdefault(one.step, {})[one.prompt] = one.name
        steps, side = sorted(by_step), next(side for most, side in SIDES if len(prompts) <= most)
        while True:
            chosen = sorted({*steps[:: self._every], *steps[-1:]})
            names = {step: [by_step[step].get(one) for one in prompts] for step in chosen}
            fits = len(chosen) <= 2 or len(chosen) * len(prompts) * side**2 * A_PIXEL <= BYTES
            if fits and (found := self._rounds(names, side)) is not None:
                shown = {self.folder / name for of_step in names.values() for name in of_step if name}
                self._read = {key: value for key, value in self._read.items() if key[1] != side or key[0] in shown}
                return found
            self._every *= 2

    def _rounds(self, names: Mapping[int, Sequence[str | None]], side: int) -> list[Round] | None:
        """None where they are more than the page has room for, unless there are but two."""
        budget, rounds = BYTES, []
        with Bar(len(names), "making samples small", "rounds") as bar:
            for step, of_step in names.items():
                pictures = self.read([self.folder / name for name in of_step if name], side)
                one = Round(step, [pictures[self.folder / name] if name else None for name in of_step])
                budget -= sum(len(picture.url) for picture in one.pictures if picture)
                if budget < 0 and len(names) > 2:
                    return None
                if any(one.pictures):
                    rounds.append(one)
                bar.add(1)
        return rounds

    def read(self, paths: Sequence[Path], side: int) -> dict[Path, Shown | None]:
        """None for what is gone, or no picture.

        :param side: the longer one's pixels at most
        """
        new = [path for path in dict.fromkeys(paths) if (path, side) not in self._read]
        if new:
            with ThreadPoolExecutor(WORKERS) as pool:
                for path, shown in zip(new, pool.map(lambda path: _small(path, side), new), strict=True):
                    self._read[path, side] = shown
        return {path: self._read[path, side] for path in paths}


def prompts_of(samples: Sequence[Drawn]) -> list[int]:
    """The numbers of those that are shown."""
    return sorted({one.prompt for one in samples})[:PROMPTS]


def _small(path: Path, side: int) -> Shown | None:
    try:
        image = read_picture(path).image
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        return Shown(data_url(image), *image.size)
    except Exception:  # whatever Pillow raises
        return None


def spread(paths: Sequence[Path]) -> Sequence[Path]:
    """Some of the pictures that are trained on, evenly."""
    return paths[:: max(1, -(-len(paths) // TRAINED_ON))]
