"""What `personalization.py` measures of a trained adapter, merged into the weights."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import personalization_train as training
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from library.models import loading
from library.options.rooms import ModelOptions
from library.world import concepts, draw, judge, measure, scenes
from library.world.judge import Found, Reading
from library.world.scenes import BACKGROUNDS, COLOURS, SHAPES, Scene

WORDS = ("sks", "vtq")  # of the first and the second concept of a pair; the tokenizer spells both out
READABLE = 0.8  # likeness of renders to each other that a concept must have, for the judge to be able to tell
HALF = 0.5  # of a render's likeness that a thing must have to count as the concept
DRIFT = 48  # predictions
TUNING, TEST = 50, 100  # first seeds of the creatures; the quickstart has 4, and below 1000 none is in a training set
SHEET = ("{}", "{} on a green background", "two {}", "{} left of a red star", "a sketch of {}", "a blue heart")


def concept_seeds(tuning: int, test: int) -> tuple[list[int], list[int]]:
    """Creatures to choose rates on, and to test on: those that the judge can tell."""
    net = judge.load()

    def readable(first: int, number: int) -> list[int]:
        found: list[int] = []
        while len(found) < number:
            if measure.Likeness(net, concepts.creature(first)).of_renders >= READABLE:
                found.append(first)
            first += 1
        return found

    return readable(TUNING, tuning), readable(TEST, test)


class Eye(measure.Likeness):
    """The judge's eye for one concept; it also tells sketches of it from flat pictures."""

    def __init__(self, net: judge.Judge, concept: int):
        creature = concepts.creature(concept)
        super().__init__(net, creature)
        rng = random.Random("sketched renders")
        sketched = [replace(concepts.portrait(creature, rng), sketched=True) for _ in range(64)]
        self.sketched = judge.portrait_of(judge.read(net, draw.render(sketched)))

    def like(self, reading: Reading) -> float:
        """The most like thing's likeness."""
        return float(judge.likeness([reading], self.portrait))

    def is_sketch(self, reading: Reading) -> bool:
        """Whether the concept is there, and more like sketches of it than like its flat renders."""
        sketched = float(judge.likeness([reading], self.sketched))
        return sketched > max(self.like(reading), HALF * self.of_renders)

    def is_it(self, thing: Found) -> bool:
        """Whether a thing is the concept: at least half as like as a render."""
        return float(thing.identity @ self.portrait) >= HALF * self.of_renders

    def are_two(self, reading: Reading) -> bool:
        """Whether the concept is there twice, and nothing else."""
        return len(reading.things) == 2 and all(self.is_it(thing) for thing in reading.things)


@dataclass(frozen=True)
class Asked:
    """A prompt with a concept in it, and what the picture should show: (of `FOLLOWED`) -> whether it does."""

    text: str
    checks: dict[str, Callable[[Reading, Eye], bool]]


FOLLOWED = ("background", "count", "known", "relation", "style")


def following(word: str, number: int, rng: random.Random) -> list[Asked]:
    """`number` prompts of each kind, on backgrounds: two of it, a sketch, it beside a thing that the world knows."""
    asked = []
    for i in range(number):
        ground = BACKGROUNDS[(i + rng.randrange(2)) % len(BACKGROUNDS)]
        on = {"background": lambda reading, eye, ground=ground: reading.background == ground}
        two, sketch = (f"{form} {word} on a {ground} background" for form in ("two", "a sketch of"))
        asked.append(Asked(two, on | {"count": lambda reading, eye: eye.are_two(reading)}))
        asked.append(Asked(sketch, on | {"style": lambda reading, eye: eye.is_sketch(reading)}))
        asked.append(_beside(word, ground, on, rng))
    return asked


def _beside(word: str, ground: str, on: dict[str, Any], rng: random.Random) -> Asked:
    while True:
        shape, colour = rng.choice(SHAPES), rng.choice(COLOURS)
        if colour != ground and (COLOURS.index(colour) - SHAPES.index(shape)) % 8 != 3:  # that the world has seen
            break
    thing = f"{'an' if colour == 'orange' else 'a'} {colour} {shape}"
    relation, first = rng.choice(scenes.RELATIONS), rng.random() < 0.5
    pair = f"{word} {relation} {thing}" if first else f"{thing} {relation} {word}"

    def known_of(reading: Reading) -> Found | None:
        return next((t for t in reading.things if t.shape == shape and t.colour == colour), None)

    def both(reading: Reading, eye: Eye) -> bool:
        known = known_of(reading)
        return known is not None and any(eye.is_it(t) for t in reading.things if t is not known)

    def related(reading: Reading, eye: Eye) -> bool:
        known = known_of(reading)
        other = next((t for t in reading.things if t is not known and eye.is_it(t)), None)
        if known is None or other is None or len(reading.things) != 2:
            return False
        one, two = (other, known) if first else (known, other)
        x, y = two.x - one.x, two.y - one.y
        return x > abs(y) if relation == "left of" else y > abs(x)

    checks = {"known": both, "relation": related}
    return Asked(f"{pair} on a {ground} background", on | checks)


class Bench:
    """The base model, a pipeline whose U-Net takes adapters' deltas, and the judge; one a process.

    :param sampling: steps of a picture
    """

    def __init__(self, device: str, sampling: int = measure.STEPS):
        measure.STEPS = sampling
        self.device = torch.device(device)
        self.model = loading.load(ModelOptions(str(measure.MODEL)))
        for part in (self.model.denoiser, *self.model.text_encoders, self.model.vae):
            part.to(self.device)
        self.unet = self.model.denoiser
        self.merged: UNet2DConditionModel = copy.deepcopy(self.unet)
        self.pipeline: StableDiffusionPipeline = self.model.pipeline
        self.pipeline.unet = self.merged
        if self.device.type == "cuda":
            record_forward(self.merged)
        self.judge = judge.load().to(self.device)
        self.eyes: dict[int, Eye] = {}
        self.drift_inputs = self._drift_inputs()
        self.base_predictions = self._predict()

    @torch.no_grad()
    def _drift_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Noised latents of scenes of the old world, timesteps all over the schedule, captions without the word."""
        generator, scheduler = torch.Generator().manual_seed(0), self.model.noise_scheduler()
        rng = random.Random("drift")
        known = [scenes.draw_scene(rng) for _ in range(DRIFT)]
        text = self.model.encode_text([scenes.caption(scene, rng) for scene in known])["hidden"]
        pixels = draw.render([scene.picture() for scene in known]).to(self.device)
        latents = self.model.pipeline.vae.encode(pixels).latent_dist.mean.cpu()
        latents = latents * self.model.vae.config.scaling_factor
        timesteps = torch.linspace(20, scheduler.config.num_train_timesteps - 20, DRIFT).long()
        timesteps = timesteps[torch.randperm(DRIFT, generator=generator)]
        noisy = scheduler.add_noise(latents, torch.randn(latents.shape, generator=generator), timesteps)
        return noisy.to(self.device), timesteps.to(self.device), text

    @torch.no_grad()
    def _predict(self) -> Tensor:
        return self.merged(*self.drift_inputs, return_dict=False)[0].clone()

    @torch.no_grad()
    def merge(self, *deltas: dict[str, Tensor]) -> None:
        """The base weights and what these adapters add to them."""
        weights = self.merged.state_dict()
        torch._foreach_copy_(list(weights.values()), list(self.unet.state_dict().values()))
        for found in filter(None, deltas):
            torch._foreach_add_([weights[name] for name in found], list(found.values()))

    def eye(self, concept: int) -> Eye:
        """The judge's for a concept."""
        if concept not in self.eyes:
            self.eyes[concept] = Eye(self.judge, concept)
        return self.eyes[concept]

    def read(self, prompts: Sequence[str], first: int) -> tuple[list[Reading], Tensor]:
        """What is in pictures of these prompts, and the pictures."""
        size = len(prompts) if self.device.type == "cuda" else 32
        pixels = measure.draw(self.pipeline, prompts, range(first, first + len(prompts)), size)
        return judge.read(self.judge, pixels), pixels

    def measure(
        self, outcome: training.Outcome, concept: int, word: str, seed: int, number: int
    ) -> tuple[dict[str, Any], Tensor]:
        """All figures of one adapter, and the contact sheet's pictures as bytes (prompts, 3, 64, 64).

        :param number: of pictures of each kind of prompt
        """
        rng = random.Random(f"prompts {concept} {seed}")
        eye = self.eye(concept)
        alone = measure.concept_prompts(word, 8 * max(1, round(number / 4)))
        asked = following(word, number, rng)
        kinds = [("single", 2 * number), ("pair", number)]
        known = [scenes.draw_scene(rng, kind) for kind, count in kinds for _ in range(count)]
        captions = [scenes.caption(scene, rng, background=True) for scene in known]
        figures: dict[str, Any] = {"parameters": outcome.parameters, "loss": outcome.loss, "of_renders": eye.of_renders}
        if not outcome.finite:
            names = (*FOLLOWED, "likeness", "likeness_share", "edit_likeness", "follow", "old", "old_pair")
            sheet = torch.zeros(len(SHEET), 3, draw.SIZE, draw.SIZE, dtype=torch.uint8)
            return figures | dict.fromkeys(names, 0.0) | {"loss": 0.0, "drift": 1.0, "diverged": True}, sheet
        self.merge(outcome.deltas)
        if outcome.example is not None:
            figures["merge_error"] = self._merge_error(outcome.example)
        shown = [text.format(word) for text in SHEET]
        prompts = [*alone, *(a.text for a in asked), *captions, *shown]
        readings, pixels = self.read(prompts, 10_000 * (concept % 1000) + 1000 * seed)
        figures |= self._of_concept(eye, alone, asked, readings)
        figures |= self._of_old_world(known, captions, readings[len(alone) + len(asked) :])
        off = self._predict() - self.base_predictions
        figures["drift"] = float(off.square().sum() / self.base_predictions.square().sum())
        sheet = ((pixels[-len(shown) :].clamp(-1, 1) + 1) * 127.5).round().byte()
        return figures, sheet

    def _of_concept(
        self, eye: Eye, alone: Sequence[str], asked: Sequence[Asked], readings: Sequence[Reading]
    ) -> dict[str, float]:
        """Likeness, and how far the prompts with the concept were followed; `follow` is the mean over `FOLLOWED`."""
        likeness = _mean([eye.like(reading) for reading in readings[: len(alone)]])
        right: dict[str, list[float]] = {name: [] for name in FOLLOWED}
        edits = readings[len(alone) : len(alone) + len(asked)]
        for item, reading in zip(asked, edits, strict=True):
            for name, check in item.checks.items():
                right[name].append(float(check(reading, eye)))
        for text, reading in zip(alone, readings, strict=False):
            if " on a " in text:
                right["background"].append(float(reading.background == text.split(" on a ")[1].split()[0]))
        means = {name: _mean(values) for name, values in right.items()}
        edit = _mean([eye.like(r) for a, r in zip(asked, edits, strict=True) if "style" not in a.checks])
        share = likeness / eye.of_renders
        follow = _mean(list(means.values()))
        return {"likeness": likeness, "likeness_share": share, "edit_likeness": edit} | means | {"follow": follow}

    @staticmethod
    def _of_old_world(known: Sequence[Scene], captions: Sequence[str], readings: Sequence[Reading]) -> dict[str, float]:
        """`old`: the mean of colour, shape and background of single things; `old_pair`: both things of a pair right."""
        right: dict[str, list[float]] = {}
        for scene, text, reading in zip(known, captions, readings, strict=False):
            for name, value in judge.agreement(scene, reading).items():
                if scene.relation and name == "background":
                    continue
                if name != "relation" or " and " not in text:  # which leaves it open
                    right.setdefault(f"old_{name}", []).append(float(value))
        means = {name: _mean(values) for name, values in right.items()}
        return means | {"old": _mean([means[f"old_{name}"] for name in ("colour", "shape", "background")])}

    @torch.no_grad()
    def _merge_error(self, example: tuple[tuple[Tensor, Tensor, Tensor], Tensor]) -> float:
        inputs, trained = example
        merged = self.merged(*inputs, return_dict=False)[0]
        return float((merged - trained).norm() / trained.norm())

    def compose(
        self, outcomes: Sequence[training.Outcome], pair: Sequence[int], seed: int, number: int
    ) -> dict[str, Any]:
        """Both adapters at once: likeness of each word's pictures to its concept (`compose`, as a share of renders')
        and to the other one (`compose_mixed`), and of pictures of both to each (`compose_both`)."""
        if not all(outcome.finite for outcome in outcomes):
            return {"compose": 0.0, "compose_mixed": 0.0, "compose_both": 0.0, "diverged": True}
        self.merge(*(outcome.deltas for outcome in outcomes))
        eyes = [self.eye(concept) for concept in pair]
        alone = [measure.concept_prompts(word, number) for word in WORDS]
        orders = [" left of ".join(WORDS), " above ".join(reversed(WORDS)), " and ".join(WORDS)]
        both = [f"{orders[i % 3]} on a {BACKGROUNDS[i % len(BACKGROUNDS)]} background" for i in range(number)]
        readings, _ = self.read([*alone[0], *alone[1], *both], 10_000 * (pair[0] % 1000) + 1000 * seed + 500)
        parts = [readings[:number], readings[number : 2 * number], readings[2 * number :]]

        def share(which: int, part: int) -> float:
            return _mean([eyes[which].like(reading) for reading in parts[part]]) / eyes[which].of_renders

        return {
            "compose": (share(0, 0) + share(1, 1)) / 2,
            "compose_mixed": (share(1, 0) + share(0, 1)) / 2,
            "compose_both": (share(0, 2) + share(1, 2)) / 2,
        }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def record_forward(unet: UNet2DConditionModel) -> None:
    """Replays the U-Net's forward pass as a CUDA graph, one for each size of batch; weights may change in place."""
    plain, graphs = unet.forward, {}

    def forward(sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **rest: Any) -> tuple[Tensor]:
        inputs = (sample, timestep.to(sample.device).expand(len(sample)), encoder_hidden_states)
        key = tuple(tensor.shape for tensor in inputs)
        if key not in graphs:
            static = [tensor.clone() for tensor in inputs]
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside), torch.no_grad():
                for _ in range(2):
                    plain(*static, return_dict=False)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph), torch.no_grad():
                (out,) = plain(*static, return_dict=False)
            graphs[key] = graph, static, out
        graph, static, out = graphs[key]
        for kept, tensor in zip(static, inputs, strict=True):
            kept.copy_(tensor)
        graph.replay()
        return (out.clone(),)

    unet.forward = forward
