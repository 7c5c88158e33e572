"""The loss on pictures that are not trained on, with the same noise every time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader

from library.training.adapter import Adapter
from library.training.losses import Losses
from library.training.randoms import Randoms
from networks.deft_progress import Bar


@dataclass(frozen=True)
class Validation:
    """:param loader: of the pictures, in the same order every time, prepared by accelerate
    :param seed: of the noise
    :param batches: of each process, at most
    """

    loader: DataLoader
    losses: Losses
    adapter: Adapter
    seed: int
    batches: int | None

    @torch.no_grad()
    def measure(self) -> float:
        """The mean over pictures and fixed timesteps; every process has to call."""
        accelerator, network = self.losses.accelerator, self.adapter.module
        training, found = network.training, []
        network.eval()
        timesteps = self.losses.objective.validation_timesteps
        number = min(self.batches or len(self.loader), len(self.loader))
        with Bar(number * len(timesteps), "validating") as bar, torch.random.fork_rng(_devices(accelerator.device)):
            for i, batch in enumerate(self.loader):
                if i >= number:
                    break
                first = (i * accelerator.num_processes + accelerator.process_index) * (self.loader.batch_size or 1)
                for timestep in timesteps:
                    randoms = Randoms(self.seed, timestep, range(first, first + len(batch.latents)))
                    found.append(accelerator.gather_for_metrics(self.losses(batch, randoms, timestep)))
                    bar.add(1)
        network.train(training)
        return float(torch.cat(found).mean())


def _devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
