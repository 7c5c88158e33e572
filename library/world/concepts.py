"""Things that the world lacks: creatures drawn from a seed, for an adapter to learn."""

from __future__ import annotations

import colorsys
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from library.world.draw import Colour, Layer, Picture, render, to_image
from library.world.scenes import BACKGROUNDS, PALETTE


@dataclass(frozen=True)
class Creature:
    """A lobed body with ears or horns, a belly and eyes. The parts' places and sizes are in units of the body's."""

    parts: tuple[Layer, ...]

    def at(self, x: float, y: float, radius: float) -> tuple[Layer, ...]:
        """Its layers with the body's centre and half width in pixels."""
        return tuple(
            replace(p, x=x + p.x * radius, y=y + p.y * radius, rx=p.rx * radius, ry=p.ry * radius) for p in self.parts
        )


def creature(seed: int) -> Creature:
    """The creature of this seed."""
    rng = random.Random(f"creature {seed}")
    hue = rng.random()
    body, ears, belly = (
        _colour(hue + shift, rng.uniform(0.45, 0.9), rng.uniform(0.55, 0.95)) for shift in (0, 0.33, 0.6)
    )
    number = rng.choice((2, 3, 4, 5, 6))
    lobes = ((number, rng.uniform(0.08, 0.2), rng.choice((0.0, 3.14159))), (1, rng.uniform(-0.12, 0.12), 0.0))
    height = rng.uniform(0.8, 1.05)
    ear, spread, long = rng.choice(("triangle", "circle", "square")), rng.uniform(0.4, 0.75), rng.uniform(0.28, 0.5)
    wide = long * rng.uniform(0.5, 1.0)
    parts = [Layer(ear, side * spread, -height * 0.95, wide, long, ears) for side in (-1, 1)]
    parts.append(Layer("blob", 0, 0, 1, height, body, rng.choice(("plain", "plain", "striped")), lobes))
    parts.append(Layer(rng.choice(("circle", "heart", "square")), 0, 0.42, 0.42, 0.36, belly))
    eye, apart = rng.uniform(0.2, 0.28), rng.uniform(0.28, 0.4)
    for side in (-1, 1):
        parts.append(Layer("circle", side * apart, -0.25, eye, eye, (250, 250, 250)))
        parts.append(Layer("circle", side * apart, -0.22, eye * 0.5, eye * 0.5, (20, 20, 20)))
    return Creature(tuple(parts))


def _colour(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def portrait(concept: Creature, rng: random.Random, background: str | None = None, number: int = 1) -> Picture:
    """The creature alone, somewhere near the middle, on one of the world's backgrounds; or two of it, side by side."""
    layers: list[Layer] = []
    for i in range(number):
        radius = rng.uniform(11.0, 16.0) if number == 1 else rng.uniform(9.0, 12.0)
        reach = 8.0 if number == 1 else 2.0
        x = 32 + rng.uniform(-reach, reach) + (0 if number == 1 else 32 * i - 16)
        layers += concept.at(x, 34 + rng.uniform(-7, 7), radius)
    return Picture(PALETTE[background or rng.choice(BACKGROUNDS)], tuple(layers))


def places(picture: Picture) -> list[tuple[float, float, float]]:
    """Centre and half width in pixels of every creature in a picture: of its body."""
    return [(layer.x, layer.y, layer.rx) for layer in picture.layers if layer.shape == "blob"]


def write_data_set(
    folder: Path, concept: Creature, word: str, backgrounds: Sequence[str], seed: int
) -> list[Image.Image]:
    """A picture with a caption beside it on each of these backgrounds, as a trainer's image folder has them."""
    rng = random.Random(f"data set {seed}")
    folder.mkdir(parents=True, exist_ok=True)
    images = [to_image(pixels) for pixels in render([portrait(concept, rng, background) for background in backgrounds])]
    for background, image in zip(backgrounds, images, strict=True):
        image.save(folder / f"{background}.png")
        (folder / f"{background}.txt").write_text(f"{word} on a {background} background\n", encoding="utf-8")
    return images
