"""The loss on pictures that are not trained on, with the same noise every time."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from library.data.batches import Batch, Loader
from library.training.adapter import Adapter
from library.training.losses import Losses
from library.training.objective import Objective
from library.training.randoms import Randoms
from networks.deft_progress import Bar

TIMESTEPS = 4  # that every picture is measured at


class Question(NamedTuple):
    """A batch with the noise and the timesteps at which it is measured.

    :param timesteps: of each picture
    """

    batch: Batch
    randoms: Randoms
    timesteps: Sequence[int]


@contextmanager
def undisturbed(network: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Within it dropout is off and nothing learns; the training's random numbers stay as they are."""
    training, device = network.training, accelerator.device
    try:
        network.eval()
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            yield
    finally:
        network.train(training)


def losses_of(questions: Iterable[Question], losses: Losses, bar: Bar, multiplier: float = 1.0) -> list[float]:
    """Of every picture of the questions; within `undisturbed`.

    :param bar: that counts the questions
    :param multiplier: a factor of the adapter's own
    """
    found: list[float] = []
    for batch, randoms, timesteps in questions:
        found += losses(batch, randoms, timesteps, multiplier).tolist()
        bar.add(1)
    return found


def ratio(sums: Sequence[float], accelerator: Accelerator) -> float:
    """Of two sums over all processes, the first by the second; 0 where that is 0. Every process has to call."""
    over_all = accelerator.reduce(torch.tensor(sums, dtype=torch.float32, device=accelerator.device))
    one, other = over_all.tolist()
    return one / other if other else 0.0


def validated(objective: Objective) -> list[int]:
    """The timesteps of a validation, sd-scripts' four; those of flow matching, which it draws, likewise."""
    return np.linspace(*objective.bounds, TIMESTEPS + 2, dtype=int)[1:-1].tolist()


@dataclass(frozen=True)
class Validation:
    """:param loader: of the pictures, in the same order every time
    :param seed: of the noise
    :param batches: of each process, at most
    """

    loader: Loader
    losses: Losses
    adapter: Adapter
    seed: int
    batches: int | None

    def measure(self) -> float:
        """The mean over pictures and fixed timesteps; every process has to call."""
        accelerator, number = self.losses.accelerator, self._number
        with Bar(number * TIMESTEPS, "validating") as bar, undisturbed(self.adapter.module, accelerator):
            found = losses_of(self._questions(), self.losses, bar)
        return ratio((sum(found), len(found)), accelerator)

    @property
    def _number(self) -> int:
        return min(self.batches or len(self.loader), len(self.loader))

    def _questions(self) -> Iterator[Question]:
        loader, timesteps = self.loader, validated(self.losses.objective)
        for i, batch in enumerate(itertools.islice(loader.epoch(1), self._number)):
            first = (i * loader.processes + loader.process) * loader.batch_size
            for timestep in timesteps if len(batch) else ():
                randoms = Randoms(self.seed, timestep, range(first, first + len(batch)))
                yield Question(batch, randoms, [timestep] * len(batch))
