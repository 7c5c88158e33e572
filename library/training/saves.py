"""Files of a run: adapters and states, their names, when they are written, which stay, and which is good."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from accelerate import Accelerator

from library.options.rooms import SaveOptions
from library.training import state
from library.training.adapter import Adapter
from library.training.meters import Meters
from library.training.record import Record, Saved
from library.training.sharing import Sharing
from library.training.state import Length, Position, Setting
from networks.deft_config import DeftError

logger = logging.getLogger(__name__)

SAVE_DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# what a change may lose by being saved; rounding leaves 1e-7, 3e-4 and 2e-3 of it
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
LONG = 5.0  # seconds above which files are checked only where it is asked for


def planned(options: SaveOptions, length: Length, an_epoch: int) -> set[int]:
    """The steps of all saves.

    :param an_epoch: steps of an epoch
    """
    of_epochs = range(0, length.epochs, every_n_epochs(options, length) or length.epochs)
    of_steps = range(0, length.steps, options.save_every_n_steps or length.steps)
    return {*of_steps, *(epoch * an_epoch for epoch in of_epochs), length.steps} - {0}


def every_n_epochs(options: SaveOptions, length: Length) -> int | None:
    """Epochs between saves; None where no epoch is saved."""
    ratio = options.save_n_epoch_ratio
    return length.epochs // ratio or 1 if ratio else options.save_every_n_epochs


class TrainingStopped(RuntimeError):
    """The training cannot go on, or its result cannot be written; what was saved before is untouched."""


class Saves:
    """Saves adapters and states under sd-scripts' names, and knows the last file that was saved whole.

    Only the main process writes adapters; every process has to call.

    :param metadata: of `library.training.metadata`
    :param evaluated: within which the adapter is as it is to be used
    :param length: of the whole training, whose end has files of its own
    :param record: that is told of the files
    :param sharing: their pictures
    :param meters: whose reading of a file's step goes into it
    :param written: called by the main process after files were written or deleted
    """

    def __init__(
        self,
        options: SaveOptions,
        adapter: Adapter,
        metadata: Mapping[str, str],
        setting: Setting,
        length: Length,
        record: Record,
        sharing: Sharing,
        evaluated: Callable[[], AbstractContextManager[None]],
        accelerator: Accelerator,
        meters: Meters | None = None,
        written: Callable[[], None] = lambda: None,
    ):
        self.options, self.folder, self.name = options, Path(options.output_dir), options.output_name
        self.dtype, self.adapter, self.metadata = SAVE_DTYPES[options.save_precision], adapter, metadata
        self.setting, self.length, self.record = setting, length, record
        self.sharing, self.evaluated, self.accelerator, self.meters = sharing, evaluated, accelerator, meters
        self.written, self.every_n_epochs = written, every_n_epochs(options, length)
        self.verifies = True
        self.last_good: Path | None = None
        self.last_state = None if options.resume is None else Path(options.resume)

    def described(self) -> str:
        """What there is, whatever happens now, for the user."""
        state = "" if self.last_state is None else f"; --resume {self.last_state} goes on"
        return f"last good save: {self.last_good or 'none'}{state}"

    def due(self, step: int) -> bool:
        """Whether --save_every_n_steps says so."""
        every = self.options.save_every_n_steps
        return every is not None and every > 0 and step % every == 0 and step < self.length.steps

    def at_step(self, position: Position) -> None:
        """Where `due` says so."""
        options = self.options
        every, last = options.save_every_n_steps, options.save_last_n_steps
        last_states = options.save_last_n_steps_state or last
        if every and self.due(position.step):
            self._save(
                self._of_step,
                position,
                position.step,
                self._step_before(position.step, last, every),
                self._step_before(position.step, last_states, every),
            )

    def at_epoch(self, position: Position) -> None:
        """Where --save_every_n_epochs or --save_n_epoch_ratio says so."""
        options = self.options
        every, last = self.every_n_epochs, options.save_last_n_epochs
        last_states = options.save_last_n_epochs_state or last
        if every and position.epoch % every == 0 and position.epoch < self.length.epochs:
            self._save(
                self._of_epoch,
                position,
                position.epoch,
                position.epoch - every * last if last else 0,
                position.epoch - every * last_states if last_states else 0,
            )

    def interrupted(self, position: Position) -> Path | None:
        """The adapter and the state of a training that is asked to end; returns the state, where it is whole."""
        name = self._of_step(position.step)
        self._tried(self._write, name, position)
        return self._tried(self._write_state, name, position)

    def final(self, position: Position) -> Path:
        """The state, where it is asked for, and `<output_name>.safetensors`, which is returned.

        :raises TrainingStopped: when the adapter cannot be written or is not finite
        """
        if self.options.save_state or self.options.save_state_on_train_end:
            self._tried(self._write_state, self.name, position)
        try:
            file = self._write(self.name, position)
        except DeftError as error:
            raise TrainingStopped(f"{error}; {self.described()}") from error
        if self.accelerator.is_main_process:
            self.sharing.beside({file: position.step})
        return file

    def _of_epoch(self, epoch: int) -> str:
        return f"{self.name}-{epoch:06d}"

    def _of_step(self, step: int) -> str:
        return f"{self.name}-step{step:08d}"

    @staticmethod
    def _step_before(step: int, last: int | None, every: int) -> int:
        """The step whose files go, of those saved every so many; sd-scripts keeps what is `last` steps old at most."""
        if last is None:
            return 0
        before = step - last - 1
        return before - before % every

    def _save(self, name_of: Callable[[int], str], position: Position, number: int, old: int, old_state: int) -> None:
        """:param number: of the step or epoch
        :param old: whose adapter goes; below 1 for none
        :param old_state: whose state goes
        """
        saved = self._tried(self._write, name_of(number), position)
        state_saved = self._tried(self._write_state, name_of(number), position) if self.options.save_state else None
        if self.accelerator.is_main_process:  # where it failed, what is there stays
            if saved and old > 0:
                (self.folder / f"{name_of(old)}.safetensors").unlink(missing_ok=True)
            if state_saved and old_state > 0:
                shutil.rmtree(self.folder / f"{name_of(old_state)}-state", ignore_errors=True)
            self.written()

    @staticmethod
    def _tried(write: Callable[[str, Position], Path], name: str, position: Position) -> Path | None:
        """A failure is only reported: the disk may have room again."""
        try:
            return write(name, position)
        except DeftError as error:
            logger.error(f"step {position.step}: {error}")
            return None

    def _write(self, name: str, position: Position) -> Path:
        path = self.folder / f"{name}.safetensors"
        reading = self.meters.at(position.step) if self.meters else None
        if self.accelerator.is_main_process:
            now = {"ss_steps": position.step, "ss_epoch": position.epoch, "ss_training_finished_at": time.time()}
            fields = {**self.metadata, **{key: str(value) for key, value in now.items()}}
            fields |= self.sharing.cover(path.name, position.step)
            if reading and not self.options.no_metadata:
                fields |= reading.fields()
            with self.evaluated():
                self.adapter.save(path, self.dtype, fields)
                if self.verifies:
                    self._verify(path)
            logger.info(f"saved {path}")
        self.last_good = path
        measured = (reading.drift, reading.learnt) if reading else ()
        self.record.saved(Saved(path.name, position.step, position.epoch, *measured))
        return path

    def _verify(self, path: Path) -> None:
        """:raises DeftError: when the file is not what was trained"""
        start = time.perf_counter()
        layer, apart = self.adapter.apart(path)
        if not apart <= TOLERANCES[self.dtype]:
            raise DeftError(
                f"{path}: is NOT what was trained: {layer} is {apart:.1e} of its change away (rounding leaves at most "
                f"{TOLERANCES[self.dtype]:g}); the disk or the memory may be failing, take an earlier file"
            )
        taken = time.perf_counter() - start
        if taken > LONG and not self.options.verify_saves:
            self.verifies = False
            logger.info(f"{path.name} is what was trained; that took {taken:.0f} s, so later files are not compared "
                        f"(--verify_saves compares them all)")  # fmt: skip

    def _write_state(self, name: str, position: Position) -> Path:
        folder = self.folder / f"{name}-state"
        state.write(folder, position, self.setting, self.record, self.accelerator)
        self.last_state = folder
        logger.info(f"saved {folder}")
        return folder
