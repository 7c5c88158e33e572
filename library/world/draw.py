"""Draws the world's pictures from outlines given as distances, many at a time, on any device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

SIZE = 64

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Layer:
    """One outline, filled; later layers cover earlier ones.

    `x`, `y` are the centre in pixels, y down; `rx`, `ry` half the width and height in pixels. A blob's `lobes` are
    (number, amplitude, phase) of the cosine waves on its radius.
    """

    shape: str
    x: float
    y: float
    rx: float
    ry: float
    colour: Colour
    texture: str = "plain"
    lobes: tuple[tuple[int, float, float], ...] = ()


@dataclass(frozen=True)
class Picture:
    """A background and the layers on it."""

    background: Colour
    layers: tuple[Layer, ...]
    sketched: bool = False


def _star(u: Tensor, v: Tensor) -> Tensor:
    """Five points: the half-plane beyond the edge from an outer corner to the next inner one, folded by symmetry."""
    outer, inner, turn = 1.15, 0.5, math.tau / 5
    angle = (torch.atan2(u, -v) + turn / 2).remainder(turn) - turn / 2
    radius = torch.hypot(u, v)
    x, y = radius * angle.abs().sin(), radius * angle.cos()
    ex, ey = inner * math.sin(turn / 2), inner * math.cos(turn / 2) - outer
    return (x * -ey + (y - outer) * ex) / math.hypot(ex, ey)


def _heart(u: Tensor, v: Tensor) -> Tensor:
    """A square on its corner, and a half circle on each of its upper edges."""
    side, low = 1.3, 0.15
    quarter = side / math.sqrt(8)
    square = (u.abs() + (v - low).abs()) / math.sqrt(2) - side / 2
    return torch.minimum(square, torch.hypot(u.abs() - quarter, v - low + quarter) - side / 2)


def _triangle(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(v - 0.8, u.abs() * 0.87 - v * 0.5 - 0.48)


def _cross(u: Tensor, v: Tensor) -> Tensor:
    long, short = torch.maximum(u.abs(), v.abs()), torch.minimum(u.abs(), v.abs())
    return torch.maximum(long - 1, short - 0.34)


def _moon(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(torch.hypot(u, v) - 1, 0.85 - torch.hypot(u - 0.55, v))


# Outlines: signed distance, negative inside, of points in units of the half width (u) and height (v, down).
OUTLINES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": lambda u, v: torch.hypot(u, v) - 1,
    "square": lambda u, v: torch.maximum(u.abs(), v.abs()) - 0.88,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "cross": _cross,
    "moon": _moon,
    "ring": lambda u, v: (torch.hypot(u, v) - 0.74).abs() - 0.28,
}


def render(pictures: Sequence[Picture], device: torch.device | str = "cpu") -> Tensor:
    """Pixels (b, 3, 64, 64) in [-1, 1], float32, with edges smoothed over one pixel."""
    axis = torch.arange(SIZE, device=device, dtype=torch.float32) + 0.5
    y, x = (grid.expand(len(pictures), -1, -1) for grid in torch.meshgrid(axis, axis, indexing="ij"))
    sketched = torch.tensor([picture.sketched for picture in pictures], device=device)
    image = _rgb([picture.background for picture in pictures], device)[:, :, None, None].repeat(1, 1, SIZE, SIZE)
    wobble = 0.7 * sketched.float().view(-1, 1, 1)
    x, y = x + wobble * torch.sin(0.4 * y + 1), y + wobble * torch.sin(0.45 * x)

    for depth in range(max((len(picture.layers) for picture in pictures), default=0)):
        rows = [i for i, picture in enumerate(pictures) if depth < len(picture.layers)]
        layers = [pictures[i].layers[depth] for i in rows]
        index = torch.tensor(rows, device=device)
        distance = _distances(layers, x[index], y[index])
        ink, cover = _textured(layers, distance, x[index], y[index], sketched[index])
        image[index] += cover[:, None] * (ink - image[index])
    return image


def _rgb(colours: Sequence[Colour], device: torch.device | str) -> Tensor:
    return torch.tensor(colours, dtype=torch.float32, device=device) / 127.5 - 1


def _distances(layers: Sequence[Layer], x: Tensor, y: Tensor) -> Tensor:
    """Signed distance in pixels of every pixel from each layer's outline."""
    numbers = torch.tensor([[p.x, p.y, p.rx, p.ry] for p in layers], device=x.device)[:, :, None, None]
    u, v = (x - numbers[:, 0]) / numbers[:, 2], (y - numbers[:, 1]) / numbers[:, 3]
    distance = torch.empty_like(x)
    for shape in {layer.shape for layer in layers}:
        rows = torch.tensor([i for i, layer in enumerate(layers) if layer.shape == shape], device=x.device)
        if shape == "blob":
            outline = _blobs([layers[int(i)] for i in rows], u[rows], v[rows])
        else:
            outline = OUTLINES[shape](u[rows], v[rows])
        distance[rows] = outline
    return distance * numbers[:, 2:].amin(1)


def _blobs(layers: Sequence[Layer], u: Tensor, v: Tensor) -> Tensor:
    angle, radius = torch.atan2(u, -v), torch.ones_like(u)
    for i, layer in enumerate(layers):
        for number, amplitude, phase in layer.lobes:
            radius[i] += amplitude * torch.cos(number * angle[i] + phase)
    return torch.hypot(u, v) - radius


def _textured(
    layers: Sequence[Layer], distance: Tensor, x: Tensor, y: Tensor, sketched: Tensor
) -> tuple[Tensor, Tensor]:
    """Each layer's colours (b, 3, h, w) and how much of each pixel it covers (b, h, w).

    Stripes and spots lie on the canvas, as if the object were cut from printed paper. A sketch is an outline around a
    pale wash.
    """
    colour = _rgb([layer.colour for layer in layers], x.device)[:, :, None, None]
    stripes = ((y / 8).remainder(1) * 8 - 2).abs() < 2
    spots = torch.hypot(x.remainder(8) - 4, y.remainder(8) - 4) < 2.2
    striped, spotted = (
        torch.tensor([layer.texture == name for layer in layers], device=x.device)[:, None, None]
        for name in ("striped", "spotted")
    )
    dark = ((stripes & striped) | (spots & spotted))[:, None]
    ink = torch.where(dark, (colour + 1) * 0.4 - 1, colour)

    filled = (0.5 - distance).clamp(0, 1)
    stroke = (1.7 - distance.abs()).clamp(0, 1)
    cover = torch.where(sketched[:, None, None], torch.maximum(stroke, 0.35 * filled), filled)
    return ink, cover


def to_image(pixels: Tensor) -> Image.Image:
    """One picture (3, h, w) in [-1, 1] as an image."""
    return Image.fromarray(((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy())
