"""States: what a training goes on from, as if nothing had happened."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open

from library.data.plan import Plan, fingerprint
from library.options.rooms import LoopOptions, OptimizerOptions, Run
from library.training import optimizers
from library.training.record import Record
from networks.deft_config import DeftError, read_text, reason_of

logger = logging.getLogger(__name__)

FILE = "train_state.json"


@dataclass
class Length:
    """Of a whole training; all that were told of it see when it is to end earlier."""

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
    """What a state was saved with: what has to be the same for a training to go on exactly.

    :param optimizer: its class
    :param of_state: options that a state keeps -> their values, whatever is given at --resume
    :param of_now: options that take effect as they are given at --resume
    """

    seed: int
    processes: int
    batches_an_epoch: int  # in each process
    train_batch_size: str  # of each data set
    pictures: str  # a hash of them, their captions, repeats, sizes and contents
    gradient_accumulation_steps: int
    optimizer: str
    of_state: Mapping[str, str] = field(default_factory=dict)
    of_now: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def of(run: Run, plan: Plan, contents: Mapping[Path, str], seed: int, processes: int, batches: int) -> Setting:
        """:param contents: see `library.data.plan.fingerprint`
        :param batches: of an epoch, in each process
        """
        network = {name: getattr(run.network, name) for name in ("network_alpha", "network_args", "scale_weight_norms")}
        rates = {name: getattr(run.optimizer, name) for name in _RATES}
        schedule = {name: getattr(run.optimizer, name) for name in _SCHEDULE}
        return Setting(
            seed, processes, batches, ", ".join(str(one.batch_size) for one in run.data.datasets),
            fingerprint(plan, contents), run.loop.gradient_accumulation_steps, optimizer_of(run.optimizer),
            _as_text(rates), _as_text(network | schedule | asdict(run.objective) | _of_pictures_and_texts(run)),
        )  # fmt: skip


_RATES = ("learning_rate", "unet_lr", "text_encoder_lr", "optimizer_args")
_READING = ("clip_skip", "max_token_length", "weighted_captions", "t5xxl_max_token_length", "apply_t5_attn_mask",
            "guidance_scale")  # fmt: skip
_SUBSET = ("alpha_mask", "custom_attributes", "resize_interpolation")
_SCHEDULE = ("lr_scheduler", "lr_warmup_steps", "lr_decay_steps", "lr_scheduler_num_cycles", "lr_scheduler_power")


def _of_pictures_and_texts(run: Run) -> dict[str, Any]:
    """Options of what is made of pictures and captions; several values where folders have others."""
    found = {name: getattr(run.model, name) for name in _READING} | asdict(run.preservation)
    found["transparent_background"] = run.data.transparent_background
    several: dict[str, list[str]] = {}
    for dataset in run.data.datasets:
        for subset in dataset.subsets:
            own = asdict(subset.captions) | asdict(subset.augment) | {name: getattr(subset, name) for name in _SUBSET}
            own |= {"masks": subset.conditioning_data_dir is not None, "network_multiplier": dataset.network_multiplier}
            for name, value in own.items():
                several.setdefault(name, []).append(str(value))
    return found | {name: ", ".join(v if len(set(v)) > 1 else v[:1]) for name, v in several.items()}


def _as_text(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}


def optimizer_of(options: OptimizerOptions) -> str:
    """The class, as states name it."""
    kind = optimizers.kind_of(options.optimizer_type)
    return f"{kind.module}.{kind.class_name}"


def write(folder: Path, position: Position, setting: Setting, record: Record, accelerator: Accelerator) -> None:
    """All that accelerate has prepared, the position and the record, whole or not at all; every process has to call.

    :raises DeftError: in every process, when one of them cannot write
    """
    unfinished = folder.with_name(f"{folder.name}.unfinished")

    def make_room() -> None:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)

    def write_all() -> None:
        accelerator.save_state(str(unfinished))
        if accelerator.is_main_process:
            content = {**asdict(position), **asdict(setting)}
            (unfinished / FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")
            record.write(unfinished)

    try:
        for action, by_all in ((make_room, False), (write_all, True), (lambda: _replace(unfinished, folder), False)):
            error = _error_of(action) if by_all or accelerator.is_main_process else ""
            errors = [one for one in _gathered(error, accelerator) if one]
            if errors:
                raise DeftError(f"{folder}: not saved ({errors[0]})")
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)


def _error_of(action: Callable[[], object]) -> str:
    """Nothing, where it succeeds; other processes wait for what comes of it."""
    try:
        action()
    except Exception as error:  # for a full disk alone: Python's, torch's, safetensors'
        return reason_of(error)
    return ""


def _gathered(value: str, accelerator: Accelerator) -> list[str]:
    """Of every process."""
    return gather_object([value]) if accelerator.num_processes > 1 else [value]


def _replace(new: Path, folder: Path) -> None:
    """`new` becomes `folder`; at every moment one of the two is whole."""
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    try:
        os.replace(new, folder)
    except OSError:
        if old.exists():
            os.replace(old, folder)
        raise
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
    for part in sorted(folder.iterdir()):
        try:
            if part.suffix == ".safetensors":
                with safe_open(str(part), "pt"):
                    pass
            elif part.suffix in (".bin", ".pkl", ".pt"):  # torch's, which are zip archives
                zipfile.ZipFile(part).close()
        except (SafetensorError, OSError, zipfile.BadZipFile) as error:
            raise DeftError(f"--resume {part}: cannot be read, it is cut off or damaged ({reason_of(error)})") from None
    try:
        content = json.loads(read_text(file, f"{file}:"))
        position = Position(**{one.name: content.pop(one.name) for one in fields(Position)})
        return position, Setting(**{one.name: content[one.name] for one in fields(Setting)})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DeftError(f"--resume {file}: not of this trainer's ({reason_of(error)})") from None


def check(path: str, then: Setting, options: OptimizerOptions) -> None:
    """Before a model is loaded.

    :param then: the setting that the state was saved with
    :raises DeftError: for another optimizer, which would stop at its first step or misread what it finds
    """
    now = optimizer_of(options)
    if now != then.optimizer:
        raise DeftError(f"--resume {path}: saved with the optimizer {then.optimizer}, not {now}; give the same one")


def check_left(path: str, position: Position, steps: int, option: str, file: Path) -> None:
    """:param steps: of the whole training
    :param option: that says so, as the user gave it
    :param file: of the finished adapter
    :raises DeftError: when nothing is left to train; without the file, written behind the state, it is still to be made
    """
    done = position.step
    if steps < done:
        raise DeftError(
            f"{option}: --resume {path} was saved at step {done}, beyond {steps}; give more, or another state"
        )
    if steps == done and file.is_file() and file.stat().st_mtime >= (Path(path) / FILE).stat().st_mtime:
        raise DeftError(
            f"{option}: nothing is left to train, --resume {path} was saved at step {done} and {file} is there; to go "
            f"further, give more than {done} steps"
        )


def restore(path: str, then: Setting, now: Setting, accelerator: Accelerator) -> None:
    """Takes over what `write` has written; one line where other options are given than then.

    :param then: the setting that it was saved with
    :raises DeftError: when the adapter or the optimizer is another one now
    """
    told = (
        (_facts(then), _facts(now), "the training goes on with other pictures or noise than it would have had"),
        (then.of_now, now.of_now, "taking effect from here on"),
        (then.of_state, now.of_state, "without effect, the state's is kept"),
    )
    for before, after, what in told:
        differing = [f"{name} {before.get(name)} -> {after[name]}" for name in after if before.get(name) != after[name]]
        if differing:
            logger.warning(f"--resume {path}: {', '.join(differing)}: {what}")
    try:
        accelerator.load_state(path)
    except OSError as error:
        raise DeftError(f"--resume {path}: a file is missing or cannot be read ({reason_of(error)})") from None
    except Exception as error:  # of many kinds: sizes, names
        raise DeftError(
            f"--resume {path}: saved with other network or optimizer options ({reason_of(error)})"
        ) from None
    logger.info(f"--resume {path}: going on from there")


def _facts(setting: Setting) -> dict[str, Any]:
    return {name: value for name, value in vars(setting).items() if not isinstance(value, Mapping)}
