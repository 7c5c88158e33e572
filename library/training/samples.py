"""Sample images during training."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from library import sampling
from library.models.family import Family
from library.prompts import Prompt
from library.training.adapter import Adapter
from networks.deft_config import reason_of

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def drawing(model: Family, adapter: Adapter, accelerator: Accelerator) -> Iterator[None]:
    """Within it, the model draws with the adapter as it is now, dropout off; the training's random numbers stay as they
    are."""
    network, vae_device = adapter.module, model.vae.device
    training = network.training
    network.eval()
    model.vae.to(accelerator.device)
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), accelerator.autocast():
            yield
    finally:
        model.vae.to(vae_device)
        network.train(training)


@dataclass(frozen=True)
class Samples:
    """Draws the same prompts again and again.

    :param folder: where `sample/` is made
    :param name: the adapter's
    """

    prompts: Sequence[Prompt]
    model: Family
    adapter: Adapter
    accelerator: Accelerator
    folder: Path
    name: str

    def draw(self, label: str) -> None:
        """Writes `sample/<name>_<label>_<number>_<time>[_<seed>].png`, sd-scripts' names; every process has to call.

        A picture that cannot be drawn or written is reported, and does not end a training.
        """
        if self.prompts and self.accelerator.is_main_process:
            with drawing(self.model, self.adapter, self.accelerator):
                now = time.strftime("%Y%m%d%H%M%S")
                for i, prompt in enumerate(self.prompts):
                    seed = "" if prompt.seed is None else f"_{prompt.seed}"
                    self._draw(prompt, self.folder / "sample" / f"{self.name}_{label}_{i:02d}_{now}{seed}.png")
        self.accelerator.wait_for_everyone()

    def _draw(self, prompt: Prompt, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            sampling.draw(self.model.pipeline, [prompt])[0].save(path)
        except Exception as error:  # out of memory, a full disk, whatever a pipeline raises
            logger.error(f"{path}: not drawn ({reason_of(error)})")
