"""The loss on pictures that are not trained on, with the same noise every time."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from library.data.batches import Batch, Loader
from library.training.adapter import Adapter
from library.training.losses import Losses
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


def loss_of(questions: Iterable[Question], losses: Losses, bar: Bar, multiplier: float = 1.0) -> float:
    """The mean over the pictures of all processes, of which every one has to call; within `undisturbed`.

    :param bar: that counts the questions
    :param multiplier: a factor of the adapter's own
    """
    total = torch.zeros(2, dtype=torch.float64)  # of losses, and how many
    for batch, randoms, timesteps in questions:
        found = losses(batch, randoms, timesteps, multiplier)
        total += torch.tensor([float(found.double().sum()), len(batch)])
        bar.add(1)
    summed, pictures = over_processes(total, losses.accelerator)
    return summed / pictures


def over_processes(sums: Tensor, accelerator: Accelerator) -> list[float]:
    """The sums (n,) over all processes; every one has to call."""
    return accelerator.reduce(sums.float().to(accelerator.device)).tolist()


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
            return loss_of(self._questions(), self.losses, bar)

    @property
    def _number(self) -> int:
        return min(self.batches or len(self.loader), len(self.loader))

    def _questions(self) -> Iterator[Question]:
        loader, timesteps = self.loader, self.losses.objective.spread(TIMESTEPS)
        for i, batch in enumerate(itertools.islice(loader.epoch(1), self._number)):
            first = (i * loader.processes + loader.process) * loader.batch_size
            for timestep in timesteps if len(batch) else ():
                randoms = Randoms(self.seed, timestep, range(first, first + len(batch)))
                yield Question(batch, randoms, [timestep] * len(batch))
