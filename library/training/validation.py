"""The loss on pictures that are not trained on, with the same noise every time."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from library.data.batches import Loader
from library.training.adapter import Adapter
from library.training.losses import Losses
from library.training.randoms import Randoms
from networks.deft_progress import Bar


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

    @torch.no_grad()
    def measure(self) -> float:
        """The mean over pictures and fixed timesteps; every process has to call."""
        accelerator, network = self.losses.accelerator, self.adapter.module
        training, total = network.training, torch.zeros(2, dtype=torch.float64)  # of losses, and how many
        network.eval()
        timesteps = self.losses.objective.validation_timesteps
        number = min(self.batches or len(self.loader), len(self.loader))
        with Bar(number * len(timesteps), "validating") as bar, torch.random.fork_rng(_devices(accelerator.device)):
            for i, batch in enumerate(itertools.islice(self.loader.epoch(1), number)):
                first = (i * accelerator.num_processes + accelerator.process_index) * self.loader.batch_size
                for timestep in timesteps if len(batch) else ():
                    randoms = Randoms(self.seed, timestep, range(first, first + len(batch)))
                    losses = self.losses(batch, randoms, timestep)
                    total += torch.tensor([float(losses.double().sum()), len(batch)])
                    bar.add(1)
        network.train(training)
        summed, pictures = accelerator.reduce(total.float().to(accelerator.device)).tolist()
        return summed / pictures


def _devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
