"""How a process of the training starts: messages, devices, random numbers."""

from __future__ import annotations

import logging
import os
import random

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed

from library.options.rooms import LoopOptions
from networks.deft_config import DeftError


def log_from_main_process() -> None:
    """Messages to the terminal, those of other processes only where something has failed."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    main = int(os.environ.get("RANK", "0")) == 0
    logging.getLogger().setLevel(logging.INFO if main else logging.ERROR)
    for chatty in ("httpx", "PIL", "diffusers", "transformers", "accelerate"):
        logging.getLogger(chatty).setLevel(logging.ERROR)


def accelerator_of(options: LoopOptions, logging_dir: str | None) -> Accelerator:
    """Devices, precision and trackers.

    :raises DeftError: when the device cannot train in the precision that is asked for
    """
    if options.mixed_precision == "fp16" and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise DeftError("--mixed_precision=fp16 needs a GPU; use bf16 or no")
    return Accelerator(
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        log_with="tensorboard" if logging_dir else None,
        project_dir=logging_dir,
    )


def seed_everything(seed: int | None) -> int:
    """Seeds every process alike, so that all start from the same adapter; returns the seed."""
    seeds = [random.randrange(2**32) if seed is None else seed]
    broadcast_object_list(seeds)
    set_seed(seeds[0])
    return seeds[0]
