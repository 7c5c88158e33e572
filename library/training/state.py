"""States: what a training goes on from, as if nothing had happened."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from library.options.rooms import LoopOptions
from networks.deft_config import DeftError, read_text, reason_of

logger = logging.getLogger(__name__)

FILE = "train_state.json"


@dataclass(frozen=True)
class Length:
    """Of a whole training."""

    steps: int
    epochs: int

    @staticmethod
    def of(options: LoopOptions, batches: int) -> Length:
        """:param batches: of an epoch, in this process"""
        an_epoch = math.ceil(batches / options.gradient_accumulation_steps)
        steps = options.max_train_epochs * an_epoch if options.max_train_epochs else options.max_train_steps
        return Length(steps, math.ceil(steps / an_epoch))


@dataclass
class Position:
    """Where a training is.

    :param step: optimizer steps that are done
    :param epoch: the one under way, from 1; 0 before the first
    :param batches: of that epoch that are done, in each process
    :param recent: the last losses, for the average that is shown
    """

    step: int = 0
    epoch: int = 0
    batches: int = 0
    recent: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Setting:
    """What has to be the same for a training to go on exactly."""

    seed: int
    processes: int
    batches_an_epoch: int  # in each process
    train_batch_size: int
    gradient_accumulation_steps: int


def write(folder: Path, position: Position, setting: Setting, accelerator: Accelerator) -> None:
    """All that accelerate has prepared, and the position, whole or not at all; every process has to call.

    :raises DeftError: in every process, when one of them cannot write
    """
    unfinished, error = folder.with_name(f"{folder.name}.unfinished"), ""
    if accelerator.is_main_process:
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        except OSError as reason:
            error = reason_of(reason)
    accelerator.wait_for_everyone()
    try:
        if not error:
            accelerator.save_state(str(unfinished))
            if accelerator.is_main_process:
                content = {**asdict(position), **asdict(setting)}
                (unfinished / FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")
    except (OSError, RuntimeError) as reason:  # torch's for a full disk
        error = reason_of(reason)
    errors = [one for one in _gathered(error, accelerator) if one]
    if accelerator.is_main_process:
        if not errors:
            _replace(unfinished, folder)
        else:
            shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    if errors:
        raise DeftError(f"{folder}: not saved ({errors[0]})")


def _gathered(value: str, accelerator: Accelerator) -> list[str]:
    """Of every process."""
    return gather_object([value]) if accelerator.num_processes > 1 else [value]


def _replace(new: Path, folder: Path) -> None:
    """`new` becomes `folder`; at every moment one of the two is whole."""
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def read(path: str) -> tuple[Position, Setting]:
    """The position of a state and the setting that it was saved with.

    :raises DeftError: when it is no state of this trainer's, or not whole
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DeftError(f"--resume: no such folder: {path}")
    file = folder / FILE
    if not file.is_file() or folder.name.endswith(".unfinished"):
        raise DeftError(f"--resume {path}: no whole state of this trainer's (no {FILE})")
    try:
        content = json.loads(read_text(file, f"{file}:"))
        position = Position(**{one.name: content.pop(one.name) for one in fields(Position)})
        return position, Setting(**{one.name: content[one.name] for one in fields(Setting)})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DeftError(f"--resume {file}: not of this trainer's ({reason_of(error)})") from None


def restore(path: str, then: Setting, now: Setting, accelerator: Accelerator) -> None:
    """Takes over what `write` has written.

    :param then: the setting that it was saved with
    :raises DeftError: when the adapter or the optimizer is another one now
    """
    before = asdict(then)
    differing = [f"{key} {before[key]} -> {value}" for key, value in asdict(now).items() if before[key] != value]
    if differing:
        logger.warning(
            f"--resume {path}: {', '.join(differing)}: the training goes on with other pictures or noise than it would "
            f"have had"
        )
    try:
        accelerator.load_state(path)
    except Exception as error:  # of many kinds: sizes, names, files
        raise DeftError(
            f"--resume {path}: saved with other network or optimizer options ({reason_of(error)})"
        ) from None
    logger.info(f"--resume {path}: going on from there")
