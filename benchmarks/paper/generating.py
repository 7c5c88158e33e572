"""Drawing what is asked for: one picture at a time, each from a seed of its own."""

from __future__ import annotations

import io
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from benchmarks.paper.adapters import attached
from benchmarks.paper.plan import Asked
from benchmarks.paper.settings import Settings
from benchmarks.paper.training import run_of
from library.models.loading import load
from library.prompts import Prompt
from library.training import prepare, start
from library.training.inputs import encoded
from library.training.texts import Texts
from networks.deft_io import write_whole


class Painter:
    """The base model, on the device, to which adapters come and go.

    :param guidance: the benchmark's, for models that are drawn with classifier-free guidance
    :raises DeftError: when the model cannot be read
    """

    def __init__(self, settings: Settings, guidance: float):
        run = run_of(settings)
        self.accelerator, _ = start.accelerator_of(run.process, run.logs)
        dtype = prepare.WEIGHT_DTYPES[run.process.mixed_precision]
        self.model = load(replace(run.model, gradient_checkpointing=False), dtype)
        self.model.place(self.accelerator.device, dtype, encoders=True)
        self.model.vae.to(self.accelerator.device)
        self.texts = Texts(self.model, self.accelerator)
        own = guidance if self.model.objective == "diffusion" else None
        self.guidance = own if settings.guidance is None else settings.guidance
        self.data = run.data
        self.size, self.steps = settings.size, settings.drawing_steps

    def using(self, file: Path | None) -> AbstractContextManager[None]:
        """Within it, the adapter of a file is used; None for the base model."""
        return attached(self.model, file)

    @torch.no_grad()
    def draw(self, asked: Asked, seed: int) -> Image.Image:
        """One picture.

        :param seed: of its noise
        :raises DeftError: for a picture of the prompt's that cannot be read
        """
        prompt = Prompt(
            asked.prompt, width=self.size, height=self.size, seed=seed, guidance=self.guidance, steps=self.steps,
            inputs=tuple(map(str, asked.inputs)),
        )  # fmt: skip
        [latents] = encoded([prompt], self.model, self.data, self.accelerator.device)
        inputs = [one.to(self.accelerator.device) for one in latents]
        with self.accelerator.autocast():
            text, negative = self.texts([prompt.text], [inputs]), self.texts([prompt.negative])
            return self.model.draw(prompt, text, negative, inputs=inputs)


def write(image: Image.Image, file: Path) -> None:
    """A PNG, whole or not at all.

    :raises DeftError: when it cannot be written
    """
    content = io.BytesIO()
    image.save(content, "png")
    write_whole(file, content.getvalue())
