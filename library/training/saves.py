"""Adapter files of a run: their names, and which one is good."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator

from library.options.rooms import OutputOptions
from library.training.adapter import Adapter
from networks.deft_config import DeftError

logger = logging.getLogger(__name__)

SAVE_DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class TrainingStopped(RuntimeError):
    """The training cannot go on, or its result cannot be written; what was saved before is untouched."""


class Saves:
    """Saves an adapter under sd-scripts' file names, and knows the last file that was saved whole.

    Only the main process writes; every process may call.

    :param metadata: of `library.training.metadata`
    """

    def __init__(self, options: OutputOptions, adapter: Adapter, metadata: Mapping[str, str], accelerator: Accelerator):
        self.folder, self.name = Path(options.output_dir), options.output_name
        self.dtype, self.adapter, self.metadata = SAVE_DTYPES[options.save_precision], adapter, metadata
        self.accelerator = accelerator
        self.last_good: Path | None = None

    def _save(self, suffix: str, step: int, epoch: int) -> Path:
        path = self.folder / f"{self.name}{suffix}.safetensors"
        if self.accelerator.is_main_process:
            progress = {"ss_steps": step, "ss_epoch": epoch, "ss_training_finished_at": time.time()}
            self.adapter.save(
                path, self.dtype, {**self.metadata, **{key: str(value) for key, value in progress.items()}}
            )
            logger.info(f"saved {path}")
        self.last_good = path
        return path

    def during_training(self, suffix: str, step: int, epoch: int) -> None:
        """Writes `<output_name><suffix>.safetensors`; a failure is only reported: the disk may have room again."""
        try:
            self._save(suffix, step, epoch)
        except DeftError as error:
            logger.error(f"step {step}: {error}")

    def final(self, step: int, epoch: int) -> Path:
        """Writes `<output_name>.safetensors`.

        :raises TrainingStopped: when it cannot be written or the network is not finite
        """
        try:
            return self._save("", step, epoch)
        except DeftError as error:
            raise TrainingStopped(f"{error}. Last good save: {self.last_good or 'none'}") from error
