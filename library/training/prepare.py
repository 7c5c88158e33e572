"""What stands between a model and the first step: latents, batches, the optimizer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from library.data.folders import TrainImage
from library.data.latents import CachedLatents
from library.models.family import Family
from library.options.rooms import DataOptions, OptimizerOptions
from library.training import optimizers, schedules
from networks.deft_config import DeftError

logger = logging.getLogger(__name__)

WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def cache_latents(
    options: DataOptions, images: list[TrainImage], model: Family, accelerator: Accelerator
) -> CachedLatents:
    """Encodes all images once and puts the VAE aside.

    :raises DeftError: when no image can be read, or for a resolution that the model cannot have
    """
    (width, height), step = options.resolution, model.multiple_of
    if width % step or height % step:
        raise DeftError(f"--resolution {width},{height}: both must be multiples of {step}")
    model.vae.to(accelerator.device)
    data = CachedLatents(images, options.resolution, model.encode_image, options.transparent_background)
    model.vae.to("cpu")
    logger.info(f"{len(data.images)} images, {len(data)} with repeats, latents cached")
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


def batches(options: DataOptions, data: CachedLatents, accelerator: Accelerator, seed: int) -> DataLoader:
    """Shuffled batches of (latents, captions), shared out among the processes, which draw different noise from here."""
    set_seed(seed, device_specific=True)
    generator = torch.Generator()
    generator.manual_seed(seed)
    loader: DataLoader = DataLoader(data, batch_size=options.train_batch_size, shuffle=True, generator=generator)
    return accelerator.prepare(loader)


def optimizer_of(
    options: OptimizerOptions, groups: list[dict[str, Any]], steps: int, accelerator: Accelerator
) -> tuple[Any, Any]:
    """The optimizer, prepared by accelerate, and its schedule, which is stepped once a step of the optimizer.

    :raises DeftError: for options that do not fit the adapter's rates or the number of steps
    """
    optimizer = optimizers.optimizer_of(options, groups)
    schedule = schedules.schedule_of(options, optimizer, steps)
    return accelerator.prepare(optimizer), schedule
