"""How well a model's pictures show what was asked for, by the judge."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from library.sampling import counted_by
from library.world import concepts, judge, scenes
from library.world import draw as drawing
from library.world.concepts import Creature
from library.world.judge import Judge
from library.world.scenes import BACKGROUNDS, Scene
from networks.deft_progress import Bar

MODEL = Path(__file__).parent / "model"
GUIDANCE = 4.0
STEPS = 25


@torch.no_grad()
def draw(
    pipeline: StableDiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], batch_size: int = 64
) -> Tensor:
    """Pixels (b, 3, 64, 64) in [-1, 1], a seed a picture: the same noise whatever else is drawn beside it."""
    images = []
    with Bar(STEPS * len(prompts), "drawing", "steps") as bar:
        for first in range(0, len(prompts), batch_size):
            part = slice(first, first + batch_size)
            images.append(
                pipeline(
                    list(prompts[part]),
                    guidance_scale=GUIDANCE,
                    num_inference_steps=STEPS,
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
                    output_type="pt",
                    callback_on_step_end=counted_by(bar, len(prompts[part])),
                ).images.cpu()
            )
    return torch.cat(images).float() * 2 - 1


def load(model: Path, device: torch.device | str = "cpu") -> StableDiffusionPipeline:
    """The pipeline in float32, without a progress bar."""
    pipeline = StableDiffusionPipeline.from_pretrained(str(model), local_files_only=True).to(device, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def held_out_scenes(number: int, seed: int = 0) -> list[tuple[Scene, str]]:
    """Scenes that training never showed, with captions that name the background: `number` of each kind."""
    rng = random.Random(f"measure {seed}")
    made = [
        scenes.draw_scene(rng, kind, held_out=True) for kind in ("single", "pair", "several") for _ in range(number)
    ]
    return [(scene, scenes.caption(scene, rng, background=True)) for scene in made]


def agreements(
    net: Judge, pipeline: StableDiffusionPipeline, asked: Sequence[tuple[Scene, str]]
) -> dict[str, list[bool]]:
    """For every property that the captions ask for, whether each picture has it."""
    pixels = draw(pipeline, [text for _, text in asked], range(len(asked)))
    results: dict[str, list[bool]] = {}
    for (scene, text), reading in zip(asked, judge.read(net, pixels), strict=True):
        for name, right in judge.agreement(scene, reading).items():
            if name != "relation" or " and " not in text:  # which leaves it open
                results.setdefault(name, []).append(right)
    return results


def concept_prompts(word: str, number: int) -> list[str]:
    """Prompts with the word for a concept, alone and on every background in turn."""
    forms = [word, f"a picture of {word}", *(f"{word} on a {background} background" for background in BACKGROUNDS)]
    return [forms[i % len(forms)] for i in range(number)]


def known_scenes(number: int, seed: int = 0) -> list[tuple[Scene, str]]:
    """Single things of the kind that training showed, with captions that name the background."""
    rng = random.Random(f"known {seed}")
    made = [scenes.draw_scene(rng, "single") for _ in range(number)]
    return [(scene, scenes.caption(scene, rng, background=True)) for scene in made]


class Likeness:
    """How like a creature pictures are; renders that no adapter was trained on reach `of_renders` on average."""

    def __init__(self, net: Judge, concept: Creature, number: int = 64) -> None:
        rng = random.Random("held-out renders")
        readings = judge.read(net, drawing.render([concepts.portrait(concept, rng) for _ in range(2 * number)]))
        self.judge = net
        self.portrait = judge.portrait_of(readings[:number])
        self.of_renders = float(judge.likeness(readings[number:], self.portrait).mean())

    def __call__(self, pixels: Tensor) -> list[float]:
        """Of each picture of pixels (b, 3, 64, 64)."""
        return judge.likeness(judge.read(self.judge, pixels), self.portrait).tolist()


def share(right: Sequence[bool | float]) -> dict[str, float]:
    """Share, number and half the width of its 95% interval (normal approximation of the mean)."""
    values = torch.tensor(right, dtype=torch.float64)
    spread = float(values.std()) if len(values) > 1 else 0.0
    return {"share": float(values.mean()), "number": len(values), "interval": 1.96 * spread / len(values) ** 0.5}


def change(before: Sequence[bool | float], after: Sequence[bool | float]) -> str:
    """Two means of paired values, and their difference with its 95% interval."""
    difference = share([float(b) - float(a) for a, b in zip(before, after, strict=True)])
    means = (share(values)["share"] for values in (before, after))
    return (
        "{:.2f} before, {:.2f} after".format(*means)
        + f" ({difference['share']:+.2f} ± {difference['interval']:.2f}, {difference['number']} pictures)"
    )


def figures(model: Path, net: Judge, device: torch.device, number: int = 250) -> dict[str, dict[str, float]]:
    """The model card's figures: `number` pictures of single things, of pairs and of several, all held out."""
    results = agreements(net, load(model, device), held_out_scenes(number))
    return {name: share(right) for name, right in results.items()}
