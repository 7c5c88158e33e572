"""Two meters beside the loss: how far the model has drifted from itself, and how much it has learnt.

Both ask the model with its adapter and, once, without it, at noise and timesteps that stay the same:

    drift   = |f - f_base|^2 / |f_base|^2     f: predictions on pictures that the base model has drawn itself
    learnt  = 1 - loss / loss_base            loss: the training's, on some of its pictures; see `Learnt`

Kept small, so that a training does not get longer: see `interval`.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from library.data import cache
from library.data.batches import Loader
from library.data.cache import Store
from library.data.plan import Picture, Plan, pictures
from library.models.family import Family
from library.options.rooms import CacheOptions, MeterOptions
from library.prompts import Prompt
from library.training.given import METERED
from library.training.losses import Asked, Losses
from library.training.objective import Noised, Objective
from library.training.randoms import Purpose, Randoms
from library.training.record import Reading
from library.training.samples import drawing
from library.training.validation import Question, losses_of, ratio, undisturbed
from library.training.watch import Watch
from networks import deft_io
from networks.deft_progress import Bar

logger = logging.getLogger(__name__)

PROBES = 8  # pictures with a timestep each, of either meter
STEPS = 6  # of each
SHARE = 0.03  # of the training's time, at most
FORWARDS = 2  # that a training step takes for a picture: frozen weights need no gradients; measured, 2.3 and more
MOST, FEWEST = 20, 2  # measurements of a training
SEED = 0  # of their noise, the same in every training, so that trainings can be compared
_ROWS = 32  # of a weight, that tell one base model from another
_STEP = 2**40  # of their random numbers, where no training comes


# --- when ------------------------------------------------------------------------------------------------------------


def interval(steps: int, pictures: float, saves: Collection[int]) -> int | None:
    """Steps between measurements, so that both meters together take less than `SHARE` of the training's time and are
    read `MOST` times at most; None where they could not be read `FEWEST` times.

    Counted in pictures that go forward through the model: a training step has `FORWARDS` of each of its pictures. What
    is measured before saves counts too; where that alone is more, nothing is measured beside it.

    :param steps: of the whole training
    :param pictures: of a step, in all processes
    :param saves: the steps of the saves, the last one's too
    """
    left = SHARE * FORWARDS * steps * pictures - METERED * STEPS - 2 * PROBES
    number = min(MOST, int(left // (2 * PROBES)))
    if number < FEWEST:
        return None
    own = {step for step in saves if step < steps} | {steps}
    if len(own) > number:
        return steps
    return next(n for n in range(1, steps + 1) if steps // n + sum(step % n > 0 for step in own) <= number)


# --- learnt ----------------------------------------------------------------------------------------------------------


def chosen(plan: Plan, number: int = PROBES) -> Plan:
    """So many pictures of a plan, from all over it; where it has fewer, they come several times. None that are only to
    be kept; captions are never left out.
    """
    candidates = [one for one in pictures(plan) if not (one.subset.is_reg or one.subset.preserved)]
    places = [i * len(candidates) // number for i in range(number)] if candidates else []
    repeats = {id(candidates[place]): places.count(place) for place in places}

    def asked(picture: Picture) -> Picture:
        whole = replace(
            picture.subset.captions, caption_dropout_rate=0.0, caption_dropout_every_n_epochs=0,
            caption_tag_dropout_rate=0.0, condition_dropout_prob=0.0, token_warmup_step=0,
        )  # fmt: skip
        return replace(picture, repeats=repeats[id(picture)], subset=replace(picture.subset, captions=whole))

    found = [replace(one, pictures=tuple(asked(p) for p in one.pictures if id(p) in repeats)) for one in plan]
    return tuple(one for one in found if one.pictures)


class Learnt:
    """The mean over pictures and timesteps of 1 - loss with the adapter / loss without it, each of them -1 at least.

    Each by itself, since losses of noise differ a thousandfold: their sum is that of the least noise, where the finest
    detail is learnt, which comes first. What timesteps weigh in the training's loss does not matter so.

    :param loader: of the pictures, in the same order every time
    """

    def __init__(self, loader: Loader, losses: Losses):
        self.losses, self.accelerator = losses, losses.accelerator
        with undisturbed(losses.adapter.module, self.accelerator):
            self.questions = list(self._questions(loader))
            self.base = self._losses(0.0)

    def _questions(self, loader: Loader) -> Iterator[Question]:
        timesteps = _timesteps(self.losses.objective)
        for turns, batch in zip(loader.turns(1), loader.epoch(1), strict=True):
            if turns:
                randoms = Randoms(SEED, _STEP, [turn.place for turn in turns])
                at = [timesteps[turn.place % PROBES] for turn in turns]
                latents = self.losses.latents(batch, randoms).cpu()
                yield Question(replace(batch, latents=latents, pixels=None), randoms, at)

    def _losses(self, multiplier: float) -> list[float]:
        """Of this process's pictures."""
        with Bar(len(self.questions), "measuring what is learnt") as bar:
            return losses_of(self.questions, self.losses, bar, multiplier)

    def measure(self) -> float:
        """Within `undisturbed`; every process has to call. 0 where the base model has no loss."""
        pairs = zip(self._losses(1.0), self.base, strict=True)
        shares = [_at_least(-1.0, 1 - loss / base) if base else 0.0 for loss, base in pairs]
        return ratio((sum(shares), len(shares)), self.accelerator)


# --- drift -----------------------------------------------------------------------------------------------------------


def base_of(model: Family) -> str:
    """A hash of what the model is without an adapter, of some rows of every weight, which takes no time; before its
    text encoders are freed."""
    parts = (*model.text_encoders, model.denoiser)
    weights = (
        (f"{i} {name}", weight[:: -(-len(weight) // _ROWS)])
        for i, part in enumerate(parts)
        for name, weight in part.named_parameters()
        if weight.dim() > 1 and not weight.requires_grad
    )
    return deft_io.base_fingerprint(weights)


def drawn(prompts: Sequence[Prompt], base: str, losses: Losses, caches: CacheOptions) -> list[Tensor]:
    """Latents (1, c, h, w), float32, on the CPU, that the base model draws without guidance, which is what it takes the
    world for; made once a base model and prompt, and kept among the caches. Every process has to call.

    :param base: see `base_of`
    """
    model, adapter, accelerator = losses.model, losses.adapter, losses.accelerator
    store, step = Store(caches.folder), model.multiple_of
    wanted = [
        replace(
            one, width=max(step, one.width - one.width % step), height=max(step, one.height - one.height % step),
            steps=STEPS, guidance=1.0,
        ) for one in prompts
    ]  # fmt: skip
    keys = [
        cache.key_of(
            what="drawn by the base model", base=base, reading=dict(model.reading()), text=one.text, seed=one.seed,
            size=(one.width, one.height), steps=one.steps, guidance=one.guidance, told=one.embedded_guidance,
            precision=accelerator.mixed_precision,
        ) for one in wanted
    ]  # fmt: skip
    with accelerator.main_process_first():
        kept = {key: store.read(key) for key in keys}
        left = [(key, one) for key, one in zip(keys, wanted, strict=True) if kept[key] is None]
        with Bar(len(left) * STEPS, "drawing with the base model", "steps") as bar:
            for key, one in left:
                with drawing(model, adapter, accelerator):
                    adapter.set_multiplier(0.0)
                    latents = model.drawn(one, losses.texts([one.text]), None, None, bar).float().cpu()
                kept[key] = {"latents": latents}
                store.write(key, {"latents": latents})
    return [(kept[key] or {})["latents"] for key in keys]


class Drift:
    """|f - f_base|^2 / |f_base|^2 on noised latents.

    :param prompts: that these were drawn of
    :param latents: (1, c, h, w) of each
    :param batch_size: pictures at once, at most
    """

    def __init__(self, prompts: Sequence[Prompt], latents: Sequence[Tensor], losses: Losses, batch_size: int):
        self.losses, self.accelerator = losses, losses.accelerator
        number, every = self.accelerator.process_index, self.accelerator.num_processes
        self.questions = list(self._questions(prompts, latents, batch_size))[number::every]
        with undisturbed(losses.adapter.module, self.accelerator):
            self.base = list(self._predictions(0.0))

    def _questions(
        self, prompts: Sequence[Prompt], latents: Sequence[Tensor], batch_size: int
    ) -> Iterator[tuple[Noised, Asked, Tensor]]:
        objective, pixels = self.losses.objective, self.losses.model.pixels_per_latent
        timesteps = _timesteps(objective)
        in_order = sorted(range(PROBES), key=lambda i: tuple(latents[i % len(latents)].shape))
        for _, alike in itertools.groupby(in_order, lambda i: latents[i % len(latents)].shape):
            places = list(alike)
            for some in (places[i : i + batch_size] for i in range(0, len(places), batch_size)):
                x = torch.cat([latents[i % len(latents)] for i in some]).to(self.accelerator.device)
                noise = Randoms(SEED, _STEP, some).normal(Purpose.NOISE, x.shape[1:]).to(x.device)
                at = torch.tensor([timesteps[i] for i in some], device=x.device)
                height, width = (side * pixels for side in x.shape[-2:])
                sizes = torch.tensor([[height, width, 0, 0, height, width]] * len(some), device=x.device)
                asked = Asked([prompts[i % len(latents)].text for i in some])
                yield objective.at(x, noise, at), asked, sizes.float()

    def _predictions(self, multiplier: float) -> Iterator[Tensor]:
        """Of this process's questions, float32, on the CPU."""
        self.losses.adapter.set_multiplier(multiplier)
        with Bar(len(self.questions), "measuring drift") as bar:
            for noised, asked, sizes in self.questions:
                yield self.losses.predicted(noised, asked, sizes).float().cpu()
                bar.add(1)

    def measure(self) -> float:
        """Within `undisturbed`; every process has to call."""
        off = whole = 0.0
        for base, found in zip(self.base, self._predictions(1.0), strict=True):
            off += float((found.double() - base).square().sum())
            whole += float(base.double().square().sum())
        return ratio((off, whole), self.accelerator)


# --- both ------------------------------------------------------------------------------------------------------------


class Meters:
    """Read every so many steps, and before each save.

    :param every: steps
    :param saves: the steps of saves
    :param watch: that says what is wrong
    :param stop_at_drift: at which a training ends
    """

    def __init__(
        self,
        learnt: Learnt,
        drift: Drift,
        every: int,
        saves: Collection[int],
        watch: Watch,
        stop_at_drift: float | None = None,
    ):
        self.learnt, self.drift, self.every, self.saves = learnt, drift, every, frozenset(saves)
        self.watch, self.stop_at_drift = watch, stop_at_drift
        self.last: Reading | None = None

    def due(self, step: int) -> bool:
        """Whether they are to be read behind this step."""
        return step % self.every == 0 or step in self.saves

    def measure(self, step: int) -> Reading:
        """Every process has to call; within `evaluated`, where an optimizer averages weights."""
        losses = self.learnt.losses
        with undisturbed(losses.adapter.module, losses.accelerator):
            learnt, drift = self.learnt.measure(), self.drift.measure()
        self.last = Reading(step, drift, learnt)
        return self.last

    def at(self, step: int) -> Reading | None:
        """What they have shown at a step, where that is the last at which they were read."""
        return self.last if self.last is not None and self.last.step == step else None

    def shown(self) -> dict[str, str]:
        """For the bar."""
        return {} if self.last is None else {"drift": f"{self.last.drift:.3f}", "learnt": f"{self.last.learnt:.3f}"}


def meters_of(
    options: MeterOptions,
    caches: CacheOptions,
    watch: Callable[[bool], Watch],
    prompts: Sequence[Prompt],
    base: str,
    plan: Plan,
    loading: Callable[..., Loader],
    losses: Losses,
    steps: int,
    step_pictures: float,
    saves: Collection[int],
) -> Meters | None:
    """The meters of a training; None where they are off. Every process has to call.

    :param watch: whether the model has a loss on the pictures, without the adapter -> what says that something is wrong
    :param prompts: of what the base model draws
    :param base: of `base_of`
    :param plan: what is trained on
    :param loading: plan and seed -> its loader, see `prepare.loader_of`
    :param steps: of the whole training
    :param step_pictures: pictures of a step, in all processes
    :param saves: the steps of saves, the last one's too
    """
    every = every_of(options, steps, step_pictures, saves)
    some = chosen(plan)
    if every is None or not some:
        if options.meter_every_n_steps != 0:
            why = "it would take over 3% of so short a training; --meter_every_n_steps asks for it all the same"
            why = why if some else "all pictures are only to be preserved"
            logger.info(f"drift and what is learnt are not measured: {why}")
        return None
    logger.info(f"drift and what is learnt are measured every {min(every, steps)} steps, and before each save")
    loader = loading(some, SEED, shuffle=False)
    learnt = Learnt(loader, losses)
    drift = Drift(prompts, drawn(prompts, base, losses, caches), losses, loader.batch_size)
    losses.adapter.set_multiplier(1.0)
    return Meters(learnt, drift, every, saves, watch(any(learnt.base)), options.stop_at_drift)


def every_of(options: MeterOptions, steps: int, step_pictures: float, saves: Collection[int]) -> int | None:
    """Steps between measurements; None where the meters are off. Parameters: see `meters_of`."""
    if options.meter_every_n_steps is not None:
        return options.meter_every_n_steps or None
    found = interval(steps, step_pictures, saves)
    if found is None and options.stop_at_drift is not None:
        return math.ceil(steps / MOST)
    return found


def _at_least(least: float, value: float) -> float:
    """NaN stays."""
    return least if value < least else value


def _timesteps(objective: Objective) -> list[int]:
    """The middles of `PROBES` equal parts of the training's range, in an order in which neighbours are far apart."""
    middles = np.linspace(*objective.bounds, 2 * PROBES + 1, dtype=int)[1::2].tolist()
    return [middles[3 * i % PROBES] for i in range(PROBES)]
