"""What stands between a model and the first step: latents, captions, batches."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from library.data.folders import TrainImage
from library.data.latents import CachedLatents
from library.models.family import Family
from library.options.rooms import DataOptions
from library.prompts import Prompt
from networks.deft_config import DeftError

logger = logging.getLogger(__name__)

WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def cache_latents(
    options: DataOptions, parts: Sequence[list[TrainImage]], model: Family, accelerator: Accelerator
) -> list[CachedLatents]:
    """Encodes all images of each part that has some once, and puts the VAE aside.

    :raises DeftError: when no image can be read, or for a resolution that the model cannot have
    """
    (width, height), step = options.resolution, model.multiple_of
    if width % step or height % step:
        raise DeftError(f"--resolution {width},{height}: both must be multiples of {step}")
    model.vae.to(accelerator.device)
    background = options.transparent_background
    data = [CachedLatents(images, options.resolution, model.encode_image, background) for images in parts if images]
    model.vae.to("cpu")
    told = [f"{len(one.images)} images, {len(one)} with repeats" for one in data]
    logger.info(f"{', to validate on '.join(told)}, latents cached")
    return data


def tell_what_is_cut(model: Family, captions: Mapping[str, str]) -> None:
    """One line where texts are longer than the text encoder reads.

    :param captions: what a user knows a text by -> the text
    """
    rests = {name: found for name, text in captions.items() if (found := model.beyond(text))[0]}
    if rests:
        name, (rest, tokens) = next(iter(rests.items()))
        rest = rest if len(rest) <= 60 else f"... {rest[-60:]}"  # a trigger word stands last as often as first
        logger.warning(
            f"{len(rests)} of {len(captions)} captions and prompts are longer than the text encoder's {tokens} "
            f"tokens, what is behind is not read: '{rest}' in {name} for one"
        )


def tell_what_is_rounded(model: Family, prompts: Sequence[Prompt]) -> None:
    """One line where pictures are drawn smaller than they are asked for, as sd-scripts draws them without a word.

    :raises DeftError: for those of which nothing would be left
    """
    step, rounded = model.multiple_of, []
    for prompt in prompts:
        width, height = (side - side % step for side in (prompt.width, prompt.height))
        told = f"{prompt.width} x {prompt.height} of '{prompt.text}'"
        if not width or not height:
            raise DeftError(f"--sample_prompts: {told}: this model draws at least {step} x {step}")
        if (width, height) != (prompt.width, prompt.height):
            rounded.append(f"{told} as {width} x {height}")
    if rounded:
        logger.warning(f"--sample_prompts: this model draws multiples of {step} alone: {', '.join(rounded)}")


def batches(data: CachedLatents, number: int, shuffle: bool, accelerator: Accelerator) -> DataLoader:
    """Batches, shared out among the processes; shuffled, in an order that the accelerator's seed and the epoch decide.

    :param number: of pictures in a batch
    """
    return accelerator.prepare(DataLoader(data, batch_size=number, shuffle=shuffle))
