"""Says what is in a picture: how many things, where, of which shape, colour and texture, on which background, and how
like a given creature.

A small detector trained on renders (`python -m library.world.train judge`); the background is measured on the pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from library.world.draw import SIZE
from library.world.scenes import BACKGROUNDS, COLOURS, PALETTE, SHAPES, STYLES, TEXTURES, Scene, Thing

CELL = 4  # pixels a cell of the map of centres
EMBEDDING = 48
OTHER = "other"  # the shape of what is none of the world's
WEIGHTS = Path(__file__).parent / "judge.safetensors"
HEADS = {"centre": 1, "shape": len(SHAPES) + 1, "colour": len(COLOURS), "texture": len(TEXTURES),
         "style": len(STYLES), "radius": 1, "offset": 2, "identity": EMBEDDING}  # fmt: skip


class Judge(nn.Module):
    """Maps of 16 x 16 cells: whether a thing's centre is in the cell, and what the thing is."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(_conv(3, 24), _conv(24, 32, stride=2), _conv(32, 32), _conv(32, 64, stride=2))
        self.middle = nn.Sequential(_conv(64, 64), _conv(64, 64))
        self.coarse = nn.Sequential(_conv(64, 96, stride=2), _conv(96, 96), _conv(96, 96))
        self.together = nn.Sequential(_conv(160, 128), nn.Conv2d(128, sum(HEADS.values()), 1))

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Maps (b, channels, 16, 16) by head, of pixels (b, 3, 64, 64) in [-1, 1]."""
        middle = self.middle(self.fine(pixels))
        coarse = F.interpolate(self.coarse(middle), scale_factor=2.0)
        maps = self.together(torch.cat([middle, coarse], 1))
        return dict(zip(HEADS, maps.split(list(HEADS.values()), 1), strict=True))


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.GroupNorm(8, outputs), nn.SiLU(inplace=True)
    )


def load(weights: Path = WEIGHTS) -> Judge:
    """The trained judge."""
    judge = Judge()
    judge.load_state_dict(load_file(weights))
    return judge.eval()


@dataclass(frozen=True)
class Found(Thing):
    """A thing in a picture. `shape` is `OTHER` for what is none of the world's; `identity` has length 1."""

    style: str
    certainty: float
    identity: Tensor


@dataclass(frozen=True)
class Reading:
    """What is in a picture, the most certain thing first."""

    things: tuple[Found, ...]
    background: str


@torch.no_grad()
def read(judge: Judge, pixels: Tensor, threshold: float = 0.2) -> list[Reading]:
    """What is in each picture of pixels (b, 3, 64, 64) in [-1, 1].

    :param threshold: below a quarter, since a centre where four cells meet is shared out among them
    """
    readings = []
    for part in pixels.split(256):
        device = next(judge.parameters()).device
        maps = {name: values.cpu() for name, values in judge(part.to(device)).items()}
        certainty = maps["centre"][:, 0].sigmoid()
        peaks = (certainty == F.max_pool2d(certainty, 5, 1, 2)) & (certainty > threshold)
        for i, background in enumerate(backgrounds(part)):
            found = [_found(maps, certainty, i, int(row), int(column)) for row, column in peaks[i].nonzero()]
            found.sort(key=lambda thing: -thing.certainty)
            readings.append(Reading(tuple(found), background))
    return readings


def _found(maps: dict[str, Tensor], certainty: Tensor, i: int, row: int, column: int) -> Found:
    at = {name: values[i, :, row, column] for name, values in maps.items()}
    best = {name: int(at[name].argmax()) for name in ("shape", "colour", "texture", "style")}
    return Found(
        shape=(*SHAPES, OTHER)[best["shape"]],
        colour=COLOURS[best["colour"]],
        texture=TEXTURES[best["texture"]],
        style=STYLES[best["style"]],
        x=(column + float(at["offset"][0])) * CELL,
        y=(row + float(at["offset"][1])) * CELL,
        radius=math.exp(float(at["radius"])),
        certainty=float(certainty[i, row, column]),
        identity=F.normalize(at["identity"], dim=0),
    )


def backgrounds(pixels: Tensor) -> list[str]:
    """The background of each picture: the colour nearest to the median of the outermost two pixels all around."""
    edge = torch.ones(SIZE, SIZE, dtype=torch.bool, device=pixels.device)
    edge[2:-2, 2:-2] = False
    seen = pixels[:, :, edge].median(-1).values
    known = torch.tensor([PALETTE[name] for name in BACKGROUNDS], device=pixels.device) / 127.5 - 1
    return [BACKGROUNDS[int(i)] for i in torch.cdist(seen.float(), known).argmin(1)]


def agreement(scene: Scene, reading: Reading) -> dict[str, bool]:
    """Which of the things that the scene's caption says are so in the picture.

    "colour", "shape", "style" and "texture": of a single thing, the most certain found; a sketch has no texture.
    "pair": both things found, each with its own shape and colour. "relation": the things that match best are in the
    relation. "count": as many things as asked for.
    """
    agrees = {"background": reading.background == scene.background}
    if scene.relation:
        agrees["pair"], agrees["relation"] = _pair_agreement(scene, reading)
    elif len(scene.things) > 1:
        agrees["count"] = len(reading.things) == len(scene.things)
    else:
        wanted, found = scene.things[0], reading.things[0] if reading.things else None
        agrees["colour"] = found is not None and found.colour == wanted.colour
        agrees["shape"] = found is not None and found.shape == wanted.shape
        agrees["style"] = found is not None and found.style == scene.style
        if scene.style == "flat":
            agrees["texture"] = found is not None and found.texture == wanted.texture
    return agrees


def _pair_agreement(scene: Scene, reading: Reading) -> tuple[bool, bool]:
    def matches(found: Sequence[Found]) -> int:
        pairs = list(zip(found, scene.things, strict=True))
        return sum((a.shape == b.shape) + (a.colour == b.colour) for a, b in pairs)

    if len(reading.things) != 2:
        return False, False
    first, second = best = max(permutations(reading.things), key=matches)
    ordered = second.x - first.x > abs(second.y - first.y)
    if scene.relation == "above":
        ordered = second.y - first.y > abs(second.x - first.x)
    return matches(best) == 4, ordered


def likeness(readings: Sequence[Reading], portrait: Tensor) -> Tensor:
    """How like the portrait the most like thing of each picture is: the cosine of their identities, 0 if there is none.

    :param portrait: identity of a concept, of length 1 (`portrait_of`)
    """
    return torch.tensor([max((float(t.identity @ portrait) for t in r.things), default=0.0) for r in readings])


def portrait_of(readings: Sequence[Reading]) -> Tensor:
    """The mean identity of the most certain things of pictures of one concept."""
    return F.normalize(torch.stack([r.things[0].identity for r in readings if r.things]).mean(0), dim=0)
