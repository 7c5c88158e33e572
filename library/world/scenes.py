"""The world of the small model: what its pictures show, and how their captions say so."""

from __future__ import annotations

import random
from dataclasses import dataclass

from library.world.draw import Colour, Layer, Picture

PALETTE: dict[str, Colour] = {
    "red": (215, 35, 40),
    "orange": (245, 130, 30),
    "yellow": (250, 215, 45),
    "green": (45, 160, 65),
    "blue": (45, 95, 215),
    "purple": (130, 55, 180),
    "pink": (250, 150, 200),
    "white": (250, 250, 250),
    "grey": (135, 135, 135),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "moon", "ring")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
BACKGROUNDS = ("white", "grey", "black", "blue", "green", "yellow")
TEXTURES = ("plain", "striped", "spotted")
SIZES = ("small", "medium", "large")
RELATIONS = ("left of", "above")  # the other two are these, seen from the second object
NUMBERS = ("one", "two", "three")
STYLES = ("flat", "sketch")

BACKGROUND_SAID = 0.88  # share of captions that name it

_RADIUS = {"small": (7.5, 9.0), "medium": (11.5, 13.5), "large": (17.0, 19.5)}
_RADIUS_OF_SEVERAL = {2: (9.0, 11.0), 3: (8.0, 9.5)}


@dataclass(frozen=True)
class Thing:
    """An object: what it is, and where (centre and half width in pixels)."""

    shape: str
    colour: str
    texture: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """One thing, two or three of the same, or a pair in a relation (left or upper thing first)."""

    things: tuple[Thing, ...]
    background: str
    style: str
    size: str = "medium"
    relation: str | None = None

    def picture(self) -> Picture:
        """What `draw.render` draws."""
        layers = tuple(Layer(t.shape, t.x, t.y, t.radius, t.radius, PALETTE[t.colour], t.texture) for t in self.things)
        return Picture(PALETTE[self.background], layers, self.style == "sketch")

    def is_held_out(self) -> bool:
        """Whether no picture of the training set has this combination.

        One in eight pairs of colour and shape is never seen at all, be it alone, in a pair or several times; besides,
        one in seven of shape, colour and background, one in six of number, shape and colour, and one in five
        of the two things of a pair and their relation.
        """
        numbers = [(SHAPES.index(t.shape), COLOURS.index(t.colour)) for t in self.things]
        if any((colour - shape) % 8 == 3 for shape, colour in numbers):
            return True
        (shape, colour), background = numbers[0], BACKGROUNDS.index(self.background)
        if self.relation:
            (shape2, colour2), relation = numbers[1], RELATIONS.index(self.relation)
            return (shape + 2 * shape2 + colour + 3 * colour2 + relation) % 5 == 0
        if len(numbers) > 1:
            return (2 * shape + colour + len(numbers)) % 6 == 0
        return (2 * background + shape + colour) % 7 == 0


def draw_scene(rng: random.Random, kind: str | None = None, held_out: bool = False) -> Scene:
    """A random scene of the training set, or of the combinations that are not in it.

    :param kind: "single", "pair" or "several"; None draws one, in the proportions of the training set
    """
    kind = kind or rng.choices(("single", "pair", "several"), (40, 35, 25))[0]
    while True:
        scene = {"single": _single, "pair": _pair, "several": _several}[kind](rng)
        if scene.is_held_out() == held_out:
            return scene


def _look(rng: random.Random) -> tuple[str, str, str]:
    """Background, style and texture; a sketch has no texture."""
    style = rng.choices(STYLES, (3, 1))[0]
    texture = "plain" if style == "sketch" else rng.choices(TEXTURES, (4, 1, 1))[0]
    return rng.choice(BACKGROUNDS), style, texture


def _colour(rng: random.Random, background: str) -> str:
    return rng.choice([colour for colour in COLOURS if colour != background])


def _single(rng: random.Random) -> Scene:
    background, style, texture = _look(rng)
    size = rng.choices(SIZES, (1, 2, 1))[0]
    radius = rng.uniform(*_RADIUS[size])
    reach = min(8.0, 30 - radius * 1.15)
    x, y = 32 + rng.uniform(-reach, reach), 32 + rng.uniform(-reach, reach)
    thing = Thing(rng.choice(SHAPES), _colour(rng, background), texture, x, y, radius)
    return Scene((thing,), background, style, size)


def _pair(rng: random.Random) -> Scene:
    background, style, texture = _look(rng)
    relation = rng.choice(RELATIONS)
    things = []
    for side in (-1, 1):
        along, across = 32 + side * rng.uniform(14, 17), 32 + rng.uniform(-4, 4)
        x, y = (along, across) if relation == "left of" else (across, along)
        radius = rng.uniform(*_RADIUS_OF_SEVERAL[2])
        things.append(Thing(rng.choice(SHAPES), _colour(rng, background), texture, x, y, radius))
        texture = "plain" if style == "sketch" else rng.choices(TEXTURES, (4, 1, 1))[0]
    if things[0].shape == things[1].shape and things[0].colour == things[1].colour:
        return _pair(rng)  # that would be "two", without a first and a second
    return Scene(tuple(things), background, style, relation=relation)


def _several(rng: random.Random) -> Scene:
    background, style, texture = _look(rng)
    shape, colour, number = rng.choice(SHAPES), _colour(rng, background), rng.choice((2, 3))
    spots = rng.choice({2: (((16, 32), (48, 32)), ((20, 18), (44, 46))), 3: _THREE}[number])
    radius = rng.uniform(*_RADIUS_OF_SEVERAL[number])
    things = [Thing(shape, colour, texture, x + rng.uniform(-2, 2), y + rng.uniform(-2, 2), radius) for x, y in spots]
    return Scene(tuple(things), background, style)


_THREE = (((17, 18), (47, 18), (32, 46)), ((32, 18), (17, 46), (47, 46)))


def caption(scene: Scene, rng: random.Random, background: bool | None = None) -> str:
    """One of many ways to say what the scene shows.

    A plain texture, the middle size and the flat style mostly go without saying. The background is left out now and
    then; True or False says which.
    """
    text = _things(scene, rng)
    if scene.style == "sketch":
        text = rng.choice((f"a sketch of {text}", f"a pencil sketch of {text}", f"{text}, sketch"))
    else:
        text = rng.choice((text, text, text, f"a picture of {text}", f"a flat drawing of {text}"))
    if background is None:
        background = rng.random() < BACKGROUND_SAID
    if background:
        ground = scene.background
        text = rng.choice(
            (f"{text} on a {ground} background", f"{text} on {ground}", f"{text}, {ground} background",
             f"on a {ground} background, {text}")
        )  # fmt: skip
    return text


def _things(scene: Scene, rng: random.Random) -> str:
    named = [_name(thing, scene) for thing in scene.things]
    if scene.relation:
        (first, second), joined = (_article(name) for name in named), rng.random()
        if joined < 0.25:
            return " and ".join(rng.sample((first, second), 2))
        to_the = "to the " if scene.relation == "left of" and rng.random() < 0.4 else ""
        if joined < 0.625:
            return f"{first} {to_the}{scene.relation} {second}"
        return f"{second} {to_the}{'right of' if scene.relation == 'left of' else 'below'} {first}"
    if len(named) > 1:
        number = rng.choice((NUMBERS[len(named) - 1], NUMBERS[len(named) - 1], str(len(named))))
        return f"{number} {plural(named[0])}"
    return rng.choice((_article(named[0]), _article(named[0]), f"one {named[0]}"))


def plural(name: str) -> str:
    """More than one of it."""
    return name + ("es" if name.endswith("s") else "s")


def _name(thing: Thing, scene: Scene) -> str:
    size = scene.size if len(scene.things) == 1 and scene.size != "medium" else ""
    texture = thing.texture if thing.texture != "plain" else ""
    return " ".join(word for word in (size, texture, thing.colour, thing.shape) if word)


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
