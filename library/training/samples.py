"""Sample images during training."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from torch import Tensor

from library.models.family import Family
from library.prompts import Prompt
from library.training.adapter import Adapter
from library.training.record import Drawn, Record
from library.training.texts import Texts
from library.training.validation import undisturbed
from networks.deft_config import reason_of
from networks.deft_progress import Bar

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def drawing(model: Family, adapter: Adapter, accelerator: Accelerator) -> Iterator[None]:
    """Within it, the model draws with the adapter as it is now, dropout off; the training's random numbers stay as they
    are."""
    vae_device = model.vae.device
    try:
        model.vae.to(accelerator.device)
        with undisturbed(adapter.module, accelerator), accelerator.autocast():
            yield
    finally:
        model.vae.to(vae_device)


@dataclass(frozen=True)
class Samples:
    """Draws the same prompts again and again.

    :param folder: where `sample/` is made
    :param name: the adapter's
    :param sampler: of `--sample_sampler`
    :param inputs: of each prompt, see `inputs.encoded`
    :param record: that is told of the pictures
    """

    prompts: Sequence[Prompt]
    model: Family
    texts: Texts
    adapter: Adapter
    accelerator: Accelerator
    folder: Path
    name: str
    sampler: str | None
    inputs: Sequence[Sequence[Tensor]]
    record: Record

    def __post_init__(self) -> None:
        """:raises DeftError: for a sampler that the model does not have"""
        for prompt in self.prompts:
            self.model.sampler(prompt.sampler or self.sampler)

    def draw(self, label: str, step: int, ending: Callable[[], bool] = lambda: False) -> None:
        """Writes `sample/<name>_<label>_<number>_<time>[_<seed>].png`, sd-scripts' names, and shows the trackers the
        pictures; every process has to call.

        A picture that cannot be drawn or written is reported, and does not end a training.

        :param ending: whether the training is to end, so that those that are left are not waited for
        """
        if self.prompts and self.accelerator.is_main_process:
            now = time.strftime("%Y%m%d%H%M%S")
            for i, prompt in enumerate(self.prompts):
                if ending():
                    break
                seed = "" if prompt.seed is None else f"_{prompt.seed}"
                path = self.folder / "sample" / f"{self.name}_{label}_{i:02d}_{now}{seed}.png"
                try:
                    with drawing(self.model, self.adapter, self.accelerator):
                        self._draw(i, prompt, path, step)
                except Exception as error:  # out of memory, a full disk, whatever a pipeline raises
                    logger.error(f"{path}: not drawn ({reason_of(error)})")
        self.accelerator.wait_for_everyone()

    def _draw(self, number: int, prompt: Prompt, path: Path, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.adapter.set_multiplier(1.0)  # as the file is used, whatever the last batch had
        inputs = [one.to(self.accelerator.device) for one in self.inputs[number]]
        text, negative = self.texts([prompt.text], [inputs]), self.texts([prompt.negative])
        with Bar(prompt.steps, "drawing", "steps") as bar:
            image = self.model.draw(prompt, text, negative, prompt.sampler or self.sampler, bar, inputs)
        image.save(path)
        self.record.samples.append(Drawn(path.relative_to(self.folder).as_posix(), step, number))
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({f"sample_{number}": np.asarray(image)[None]}, step=step, **layout)
