"""The judge's training, on renders."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.world import concepts, draw, judge, scenes
from library.world.backward import autocast
from library.world.descent import Descent
from library.world.judge import CELL, EMBEDDING, Judge
from library.world.scenes import COLOURS, SHAPES, STYLES, TEXTURES, Scene, Thing

CREATURES = 512  # creatures to tell apart, from the seed FIRST_CREATURE on
FIRST_CREATURE = 10_000


@dataclass(frozen=True)
class Answer:
    """What the judge has to say of one thing of a picture; -1 where it may say anything."""

    picture: int
    x: float
    y: float
    radius: float
    shape: int
    colour: int
    texture: int
    style: int
    identity: int


def train(steps: int, batch_size: int, device: torch.device, seed: int) -> Judge:
    """A judge of the world's things, and of which creature is which."""
    torch.manual_seed(seed)
    rng = random.Random(f"judge {seed}")
    net = Judge().to(device)
    identities = nn.Parameter(torch.randn(CREATURES + len(SHAPES) * len(COLOURS), EMBEDDING, device=device))
    optimizer = torch.optim.AdamW([*net.parameters(), identities], lr=2e-3, weight_decay=0.01)
    descent = Descent("judge", optimizer, steps)
    for _ in range(steps):
        pixels, answers = _batch(batch_size, rng, device)
        with autocast(device):
            maps = net(_worn(pixels))
        loss = _loss({name: values.float() for name, values in maps.items()}, identities, answers)
        loss.backward()
        descent.step("loss", loss)
    return net.eval()


def _batch(size: int, rng: random.Random, device: torch.device) -> tuple[Tensor, list[Answer]]:
    """Six scenes for every four pictures with creatures."""
    pictures, answers = [], []
    for i in range(size):
        if i % 10 < 6:
            scene = scenes.draw_scene(rng, held_out=rng.random() < 0.4)
            pictures.append(scene.picture())
            answers += _scene_answers(i, scene)
        else:
            which = rng.randrange(CREATURES)
            number = rng.choices((1, 2), (3, 1))[0]
            picture = concepts.portrait(concepts.creature(FIRST_CREATURE + which), rng, number=number)
            pictures.append(picture)
            answers += [
                Answer(i, x, y, radius, len(SHAPES), -1, -1, -1, which) for x, y, radius in concepts.places(picture)
            ]
    return draw.render(pictures, device), answers


def _scene_answers(picture: int, scene: Scene) -> list[Answer]:
    def answer(t: Thing) -> Answer:
        shape, colour = SHAPES.index(t.shape), COLOURS.index(t.colour)
        texture = TEXTURES.index(t.texture) if scene.style == "flat" else -1
        identity = CREATURES + shape * len(COLOURS) + colour
        return Answer(picture, t.x, t.y, t.radius, shape, colour, texture, STYLES.index(scene.style), identity)

    return [answer(thing) for thing in scene.things]


def _worn(pixels: Tensor) -> Tensor:
    """Pictures blurred a little and with noise, as a model's are."""
    shape, device = (len(pixels), 1, 1, 1), pixels.device
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    pixels = pixels.lerp(blurred, torch.rand(shape, device=device))
    return pixels + torch.rand(shape, device=device) * 0.08 * torch.randn_like(pixels)


def _loss(maps: dict[str, Tensor], identities: Tensor, answers: Sequence[Answer]) -> Tensor:
    device = identities.device
    picture = torch.tensor([a.picture for a in answers], device=device)
    column, row = (torch.tensor([int(getattr(a, axis) / CELL) for a in answers], device=device) for axis in "xy")
    centre = maps["centre"][:, 0]
    wanted = torch.zeros_like(centre)
    wanted[picture, row, column] = 1
    loss = 10 * F.binary_cross_entropy_with_logits(centre, wanted, pos_weight=torch.tensor(4.0, device=device))

    at = {name: values[picture, :, row, column] for name, values in maps.items()}
    for name in ("shape", "colour", "texture", "style"):
        target = torch.tensor([getattr(a, name) for a in answers], device=device)
        loss = loss + F.cross_entropy(at[name], target, ignore_index=-1)
    offset = torch.tensor([[a.x / CELL % 1, a.y / CELL % 1] for a in answers], device=device)
    radius = torch.tensor([[math.log(a.radius)] for a in answers], device=device)
    loss = loss + F.l1_loss(at["offset"], offset) + F.l1_loss(at["radius"], radius)
    cosine = F.normalize(at["identity"], dim=-1) @ F.normalize(identities, dim=-1).T
    return loss + F.cross_entropy(16 * cosine, torch.tensor([a.identity for a in answers], device=device))


def accuracy(net: Judge, number: int, device: torch.device, seed: int) -> dict[str, float]:
    """Shares of right answers on renders that training did not see: of each kind of scene, `number` with combinations
    that the model's training holds out; and of unseen creatures: told from another by likeness to a portrait.

    "same creature": whether a picture is more like the portrait of its own creature than like any of 19 others'.
    """
    rng = random.Random(f"accuracy {seed}")
    sums: dict[str, list[float]] = {}
    for kind in ("single", "pair", "several"):
        batch = [scenes.draw_scene(rng, kind, held_out=True) for _ in range(number)]
        readings = judge.read(net, draw.render([scene.picture() for scene in batch], device))
        for scene, reading in zip(batch, readings, strict=True):
            for name, right in judge.agreement(scene, reading).items():
                sums.setdefault(name, []).append(float(right))
    portraits, pictures = [], []
    for creature in map(concepts.creature, range(20)):
        both = [concepts.portrait(creature, rng) for _ in range(32)]
        read = judge.read(net, draw.render(both, device))
        portraits.append(judge.portrait_of(read[:16]))
        pictures.append(read[16:])
    for own, read in enumerate(pictures):
        alike = torch.stack([judge.likeness(read, portrait) for portrait in portraits])
        sums.setdefault("same creature", []).extend((alike.argmax(0) == own).float().tolist())
    return {name: sum(values) / len(values) for name, values in sums.items()}
