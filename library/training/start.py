"""How a process of the training starts: messages, devices, random numbers, trackers."""

from __future__ import annotations

import importlib.util
import logging
import os
import random
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import toml
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
    set_seed,
)

from library.options.rooms import LogOptions, ProcessOptions
from networks.deft_config import DeftError, read_text, reason_of

logger = logging.getLogger(__name__)

TRACKERS = {"wandb": "wandb", "trackio": "trackio"}  # beside TensorBoard: name -> package
ONE_WEIGHT_EVERYWHERE = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def log_messages(options: LogOptions) -> None:
    """Messages to the terminal or a file, those of other processes only where something has failed.

    :raises DeftError: when the file cannot be written
    """
    where: dict[str, Any] = {}
    if options.console_log_file:
        try:
            Path(options.console_log_file).parent.mkdir(parents=True, exist_ok=True)
            file = logging.FileHandler(options.console_log_file, encoding="utf-8", errors="backslashreplace")
            where = {"handlers": [file]}
        except OSError as error:
            raise DeftError(f"--console_log_file {options.console_log_file}: {reason_of(error)}") from None
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", **where)
    logging.getLogger().setLevel(options.console_log_level if is_main_process() else logging.ERROR)
    for chatty in ("httpx", "PIL", "diffusers", "transformers", "accelerate", "torchao"):
        logging.getLogger(chatty).setLevel(logging.ERROR)


def is_main_process() -> bool:
    """As the launcher says, before there is an accelerator."""
    return int(os.environ.get("RANK", "0")) == 0


def accelerator_of(options: ProcessOptions, logs: LogOptions) -> tuple[Accelerator, int]:
    """Devices, precision and trackers; and the seed, of which every process is seeded alike, so that all start from the
    same adapter.

    :raises DeftError: when the device cannot train in the precision that is asked for, or the model would be split over
        processes
    """
    if options.mixed_precision == "fp16" and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise DeftError("--mixed_precision=fp16 needs a GPU; use bf16 or no")
    if options.cuda_allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = options.cuda_cudnn_benchmark
    timeout = None if options.ddp_timeout is None else timedelta(minutes=options.ddp_timeout)
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        log_with=_trackers(logs),
        project_dir=_folder(logs),
        kwargs_handlers=None if timeout is None else [InitProcessGroupKwargs(timeout=timeout)],
    )
    if accelerator.distributed_type not in ONE_WEIGHT_EVERYWHERE:
        raise DeftError(
            f"accelerate launch: {accelerator.distributed_type.value} splits the model over processes, which is not "
            f"done here; choose plain multi-GPU (DDP) in accelerate config, or pass --multi_gpu"
        )
    if accelerator.num_processes == 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise DeftError(
            "several processes were started that do not know each other; on CPUs: ACCELERATE_USE_CPU=true torchrun"
        )
    seeds = [random.randrange(2**32) if options.seed is None else options.seed]
    broadcast_object_list(seeds)
    set_seed(seeds[0])
    accelerator.dataloader_config.data_seed = seeds[0]
    return accelerator, seeds[0]


def check_trackers(options: LogOptions) -> None:
    """:raises DeftError: for trackers that are not installed, have nowhere to write, or whose file cannot be read"""
    names = [options.log_with] if options.log_with != "all" else ["tensorboard"]
    for name in names:
        if name == "tensorboard" and options.logging_dir is None:
            raise DeftError(f"--log_with {options.log_with} needs --logging_dir")
        if name in TRACKERS and importlib.util.find_spec(TRACKERS[name]) is None:
            raise DeftError(f"--log_with {name}: not installed; pip install {TRACKERS[name]}")
    _tracker_arguments(options)


def start_trackers(accelerator: Accelerator, options: LogOptions, settings: Mapping[str, Any]) -> None:
    """Begins a run of each tracker.

    :param settings: that are logged with --log_config
    """
    if not accelerator.log_with:
        return
    arguments = _tracker_arguments(options)
    if options.wandb_api_key and accelerator.is_main_process:
        import wandb

        wandb.login(key=options.wandb_api_key)
    for name in ("wandb", "trackio"):
        if options.wandb_run_name:
            arguments.setdefault(name, {})["name"] = options.wandb_run_name
    config = {key: str(value) for key, value in settings.items()} if options.log_config else None
    try:
        accelerator.init_trackers(options.log_tracker_name or "network_train", config, arguments)
    except Exception as error:  # a full disk, a service that is not there
        where = f"--logging_dir {options.logging_dir}" if options.logging_dir else f"--log_with {options.log_with}"
        raise DeftError(f"{where}: no logs can be written there ({reason_of(error)})") from None


def log(accelerator: Accelerator, values: Mapping[str, float], step: int) -> None:
    """To all trackers. Where one fails, logs end, and the training does not."""
    try:
        accelerator.log(values, step=step)
    except Exception as error:  # a full disk, a service that is gone
        accelerator.trackers = []
        logger.error(f"step {step}: logs end here, the training goes on ({reason_of(error)})")


def end_trackers(accelerator: Accelerator) -> None:
    """With what the processes share. What cannot be written any more is told."""
    for tracker in accelerator.trackers:
        try:
            tracker.finish()
        except Exception as error:  # as in `log`
            logger.error(f"logs by {tracker.name}: not whole ({reason_of(error)})")
    accelerator.trackers = []
    accelerator.end_training()


def _trackers(options: LogOptions) -> str | None:
    return options.log_with or ("tensorboard" if options.logging_dir else None)


def _folder(options: LogOptions) -> str | None:
    """Of this run, sd-scripts' name."""
    if options.logging_dir is None:
        return None
    folder = Path(options.logging_dir) / f"{options.log_prefix or ''}{time.strftime('%Y%m%d%H%M%S')}"
    os.environ.setdefault("WANDB_DIR", str(options.logging_dir))
    return str(folder)


def _tracker_arguments(options: LogOptions) -> dict[str, dict[str, Any]]:
    """A tracker's name -> its own arguments."""
    if options.log_tracker_config is None:
        return {}
    path = options.log_tracker_config
    text = read_text(path, f"--log_tracker_config {path}:") if Path(path).is_file() else None
    if text is None:
        raise DeftError(f"--log_tracker_config: no such file: {path}")
    try:
        found = toml.loads(text)
    except Exception as error:  # of many kinds
        raise DeftError(f"--log_tracker_config {path}: no TOML ({reason_of(error)})") from None
    if not all(isinstance(section, dict) for section in found.values()):
        raise DeftError(f"--log_tracker_config {path}: a tracker's arguments stand in its section, as [wandb]")
    return found
