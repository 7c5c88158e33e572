"""Pictures that a model draws, and tables of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image, ImageDraw

from library.prompts import GUIDANCE, Prompt
from networks.deft_progress import Bar


@torch.no_grad()
def draw(pipeline: StableDiffusionPipeline, prompts: Sequence[Prompt]) -> list[Image.Image]:
    """One image a prompt, by DDIM."""
    trained_scheduler = pipeline.scheduler
    pipeline.scheduler = DDIMScheduler.from_config(trained_scheduler.config)
    images = []
    try:
        with Bar(sum(prompt.steps for prompt in prompts), "drawing", "steps") as bar:
            for prompt in prompts:
                images += pipeline(
                    prompt.text,
                    negative_prompt=prompt.negative,
                    width=prompt.width,
                    height=prompt.height,
                    guidance_scale=GUIDANCE if prompt.guidance is None else prompt.guidance,
                    num_inference_steps=prompt.steps,
                    generator=prompt.generator(),
                    callback_on_step_end=counted_by(bar),
                ).images
    finally:
        pipeline.scheduler = trained_scheduler
    return images


def counted_by(bar: Bar, number: int = 1) -> Callable[..., dict[str, Any]]:
    """A callback that a pipeline calls after each step of `number` pictures."""

    def after_step(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        bar.add(number)
        return tensors

    return after_step


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
