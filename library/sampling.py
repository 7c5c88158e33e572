"""Sample images during training, from a prompts file in sd-scripts' format."""

from __future__ import annotations

import logging
import re
import time
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


_LETTERS = {
    "n": ("negative", str),
    "w": ("width", int),
    "h": ("height", int),
    "d": ("seed", int),
    "l": ("guidance", float),
    "s": ("steps", int),
}


def read_prompts(path: str, size: tuple[int, int]) -> list[Prompt]:
    """The prompts of a text file; empty lines and those that begin with # are passed over.

    :param size: (width, height) where a line gives none
    :raises DeftError: for a missing or empty file, or a line that cannot be read
    """
    if not Path(path).is_file():
        raise DeftError(f"--sample_prompts: no such file: {path}")
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise DeftError(f"--sample_prompts {path}: the file is not UTF-8 text") from None
    prompts = [parse_prompt(line, size) for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise DeftError(f"--sample_prompts {path}: no prompts in it")
    return prompts


def parse_prompt(line: str, size: tuple[int, int]) -> Prompt:
    """`a cat --n blurry --w 512 --h 512 --d 1 --l 7.5 --s 28` as a Prompt."""
    text, *options = re.split(r"\s--(?=\w+\s)", line)
    values: dict[str, object] = {"width": size[0], "height": size[1]}
    for option in options:
        letter, _, value = option.partition(" ")
        if letter not in _LETTERS:
            raise DeftError(f"--sample_prompts: unknown option --{letter} in '{line}'; known: --{' --'.join(_LETTERS)}")
        name, kind = _LETTERS[letter]
        try:
            values[name] = kind(value.strip())
        except ValueError:
            raise DeftError(f"--sample_prompts: --{letter} {value} is no number in '{line}'") from None
    prompt = Prompt(text.strip(), **values)  # type: ignore[arg-type]
    if min(prompt.width, prompt.height, prompt.steps) < 1 or prompt.width % 8 or prompt.height % 8:
        raise DeftError(f"--sample_prompts: --w and --h must be multiples of 8, and --s at least 1, in '{line}'")
    return prompt


@torch.no_grad()
def draw(pipeline: StableDiffusionPipeline, prompts: list[Prompt]) -> list[Image.Image]:
    """One image a prompt, by DDIM."""
    trained_scheduler = pipeline.scheduler
    pipeline.scheduler = DDIMScheduler.from_config(trained_scheduler.config)
    images = []
    try:
        for prompt in prompts:
            generator = torch.Generator("cpu")
            generator.manual_seed(prompt.seed) if prompt.seed is not None else generator.seed()
            images += pipeline(
                prompt.text,
                negative_prompt=prompt.negative,
                width=prompt.width,
                height=prompt.height,
                guidance_scale=prompt.guidance,
                num_inference_steps=prompt.steps,
                generator=generator,
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


def grid(rows: list[str], columns: dict[str, list[Image.Image]]) -> Image.Image:
    """Images in a table: a column for each name, a row for each prompt, both labelled."""
    label, gap = 20, 4
    width, height = next(iter(columns.values()))[0].size
    size = (len(columns) * (width + gap), label + len(rows) * (height + label + gap))
    table = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(table)
    for x, (name, images) in enumerate(columns.items()):
        left = x * (width + gap)
        pen.text((left + gap, 4), name, fill="black")
        for y, image in enumerate(images):
            top = label + y * (height + label + gap)
            table.paste(image, (left, top + label))
            if x == 0:
                pen.text((gap, top + 4), rows[y], fill="black")
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
