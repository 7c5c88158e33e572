"""Sample images during training, from a prompts file in sd-scripts' format."""

from __future__ import annotations

import itertools
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image, ImageDraw

from library.sd import StableDiffusion
from networks.deft import DeftNetwork
from networks.deft_config import DeftError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """One line of a prompts file; the letters of the options are sd-scripts'."""

    text: str
    negative: str = ""  # --n
    width: int = 512  # --w
    height: int = 512  # --h
    seed: int | None = None  # --d
    guidance: float = 7.5  # --l
    steps: int = 30  # --s

    def generator(self) -> torch.Generator:
        """Of the picture's noise, the same on every device; from a seed of its own where there is none."""
        generator = torch.Generator("cpu")
        generator.manual_seed(self.seed) if self.seed is not None else generator.seed()
        return generator


_LETTERS = {
    "n": ("negative", str),
    "w": ("width", int),
    "h": ("height", int),
    "d": ("seed", int),
    "l": ("guidance", float),
    "s": ("steps", int),
}


def read_prompts(
    path: str, size: tuple[int, int], option: str = "--sample_prompts", steps: int = Prompt.steps
) -> list[Prompt]:
    """The prompts of a text file; empty lines and those that begin with # are passed over.

    :param size: (width, height) where a line gives none
    :param option: that names the file, for errors
    :param steps: where a line gives none
    :raises DeftError: for a missing or empty file, or a line that cannot be read
    """
    if not Path(path).is_file():
        raise DeftError(f"{option}: no such file: {path}")
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise DeftError(f"{option} {path}: the file is not UTF-8 text") from None
    prompts = [parse_prompt(line, size, option, steps) for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise DeftError(f"{option} {path}: no prompts in it")
    return prompts


def parse_prompt(
    line: str, size: tuple[int, int], option: str = "--sample_prompts", steps: int = Prompt.steps
) -> Prompt:
    """`a cat --n blurry --w 512 --h 512 --d 1 --l 7.5 --s 28` as a Prompt."""
    text, *options = re.split(r"\s--(?=\w+\s)", line)
    values: dict[str, object] = {"width": size[0], "height": size[1], "steps": steps}
    for given in options:
        letter, _, value = given.partition(" ")
        if letter not in _LETTERS:
            raise DeftError(f"{option}: unknown option --{letter} in '{line}'; known: --{' --'.join(_LETTERS)}")
        name, kind = _LETTERS[letter]
        try:
            values[name] = kind(value.strip())
        except ValueError:
            raise DeftError(f"{option}: --{letter} {value} is no number in '{line}'") from None
    prompt = Prompt(text.strip(), **values)  # type: ignore[arg-type]
    if min(prompt.width, prompt.height, prompt.steps) < 1 or prompt.width % 8 or prompt.height % 8:
        raise DeftError(f"{option}: --w and --h must be multiples of 8, and --s at least 1, in '{line}'")
    return prompt


@torch.no_grad()
def draw(pipeline: StableDiffusionPipeline, prompts: list[Prompt]) -> list[Image.Image]:
    """One image a prompt, by DDIM."""
    trained_scheduler = pipeline.scheduler
    pipeline.scheduler = DDIMScheduler.from_config(trained_scheduler.config)
    images = []
    try:
        for prompt in prompts:
            images += pipeline(
                prompt.text,
                negative_prompt=prompt.negative,
                width=prompt.width,
                height=prompt.height,
                guidance_scale=prompt.guidance,
                num_inference_steps=prompt.steps,
                generator=prompt.generator(),
            ).images
    finally:
        pipeline.scheduler = trained_scheduler
    return images


def draw_in_training(
    model: StableDiffusion, network: DeftNetwork, prompts: list[Prompt], accelerator: Accelerator
) -> list[Image.Image]:
    """`draw` with the network as it is now, dropout off; the training's random numbers stay untouched."""
    training, vae_device = network.training, model.vae.device
    network.eval()
    model.vae.to(accelerator.device)
    try:
        devices = [accelerator.device] if accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices), accelerator.autocast():
            return draw(model.pipeline, prompts)
    finally:
        model.vae.to(vae_device)
        network.train(training)


def grid(prompts: list[str], columns: dict[str, list[Image.Image]], above: Sequence[Image.Image] = ()) -> Image.Image:
    """Pictures in a table: a column for each name, a row for each prompt, all labelled.

    Pictures of one prompt that follow each other stand side by side; small ones are enlarged.

    :param above: pictures for a row of their own on top, the training's
    """
    rows = [(text, len(list(same))) for text, same in itertools.groupby(prompts)]
    beside = max(number for _, number in rows)
    width, height = next(iter(columns.values()))[0].size
    scale, label, gap = max(1, 96 // width), 20, 4
    width, height = width * scale, height * scale
    column = beside * width + 4 * gap
    strip = label + height + gap if above else 0
    right = max(len(columns) * column, len(above) * (width + gap))
    table = Image.new("RGB", (right, strip + label + len(rows) * (label + height + gap)), "white")
    pen = ImageDraw.Draw(table)
    if above:
        pen.text((gap, 4), "trained on", fill="black")
    for i, image in enumerate(above):
        table.paste(image.resize((width, height), Image.Resampling.NEAREST), (i * (width + gap), label))
    for x, (name, images) in enumerate(columns.items()):
        left = x * column
        pen.text((left + gap, strip + 4), name, fill="black")
        remaining = iter(images)
        for y, (text, number) in enumerate(rows):
            top = strip + label + y * (label + height + gap)
            if x == 0:
                pen.text((gap, top + 4), text, fill="black")
            for i in range(number):
                image = next(remaining).resize((width, height), Image.Resampling.NEAREST)
                table.paste(image, (left + i * width, top + label))
    return table


def save_samples(
    model: StableDiffusion,
    network: DeftNetwork,
    prompts: list[Prompt],
    accelerator: Accelerator,
    output_dir: str,
    label: str,
) -> None:
    """Draws and writes `sample/<label>_<number>_<time>[_<seed>].png`, sd-scripts' names.

    A picture that cannot be written is reported, and does not end a training.
    """
    folder = Path(output_dir) / "sample"
    now = time.strftime("%Y%m%d%H%M%S")
    for i, (prompt, image) in enumerate(
        zip(prompts, draw_in_training(model, network, prompts, accelerator), strict=True)
    ):
        seed = "" if prompt.seed is None else f"_{prompt.seed}"
        path = folder / f"{label}_{i:02d}_{now}{seed}.png"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            image.save(path)
        except OSError as error:
            logger.error(f"{path}: not written ({error})")
