"""Learning rate schedules by sd-scripts' names, or by any class's (sd-scripts 48d368fa, `get_scheduler_fix`)."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from diffusers.optimization import get_piecewise_constant_schedule
from torch.optim import Optimizer
from transformers import optimization

from library.options.rooms import OptimizerOptions
from library.training import optimizers
from library.training.classes import check_arguments, check_step, find
from networks.deft_config import DeftError, nearest, reason_of

logger = logging.getLogger(__name__)

_WARMUP = {"num_warmup_steps": "lr_warmup_steps"}
_LENGTH = _WARMUP | {"num_training_steps": "steps"}
_HALF = "lr_scheduler_num_cycles / 2"  # a whole cycle of these is down and up again

# name -> the function, and which option each of its arguments is
SCHEDULES: dict[str, tuple[Callable[..., Any], Mapping[str, str]]] = {
    "constant": (optimization.get_constant_schedule, {}),
    "constant_with_warmup": (optimization.get_constant_schedule_with_warmup, _WARMUP),
    "linear": (optimization.get_linear_schedule_with_warmup, _LENGTH),
    "cosine": (optimization.get_cosine_schedule_with_warmup, _LENGTH),
    "cosine_with_restarts": (
        optimization.get_cosine_with_hard_restarts_schedule_with_warmup,
        _LENGTH | {"num_cycles": "lr_scheduler_num_cycles"},
    ),
    "polynomial": (
        optimization.get_polynomial_decay_schedule_with_warmup,
        _LENGTH | {"power": "lr_scheduler_power"},
    ),
    "inverse_sqrt": (optimization.get_inverse_sqrt_schedule, _WARMUP | {"timescale": "lr_scheduler_timescale"}),
    "cosine_with_min_lr": (
        optimization.get_cosine_with_min_lr_schedule_with_warmup,
        _LENGTH | {"num_cycles": _HALF, "min_lr_rate": "lr_scheduler_min_lr_ratio"},
    ),
    "warmup_stable_decay": (
        optimization.get_wsd_schedule,
        _WARMUP
        | {"num_stable_steps": "stable", "num_decay_steps": "lr_decay_steps"}
        | {"num_cycles": _HALF, "min_lr_ratio": "lr_scheduler_min_lr_ratio"},
    ),
    "piecewise_constant": (get_piecewise_constant_schedule, {}),
}
_SHAPES = [field for field in fields(OptimizerOptions) if field.name.startswith("lr_")]


class _NoSchedule:
    """Beside a schedule-free optimizer: what the loop and its logs ask of a schedule."""

    def __init__(self, optimizer: Optimizer):
        self.optimizer = optimizer

    def step(self) -> None: ...

    def get_last_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class _OwnRates(optimization.AdafactorSchedule):
    """A number for every group, also where dropout has left out the layer that transformers asks for it."""

    def get_lr(self) -> list[Any]:
        optimizer: Any = self.optimizer
        found: list[Any] = []
        for group, first in zip(optimizer.param_groups, self.base_lrs, strict=True):
            states = (optimizer.state.get(parameter) for parameter in group["params"])
            state = next((state for state in states if state), None)
            found.append(first if state is None else float(optimizer._get_lr(group, state)))
        return found


def schedule_of(options: OptimizerOptions, optimizer: Optimizer, steps: int) -> Any:
    """The schedule, which is stepped once behind every step of the optimizer, and not wrapped by accelerate.

    Steps of options are the optimizer's, however many processes there are. One line where options have no effect.

    :param optimizer: accelerate's or its own
    :param steps: of the optimizer, in all
    :returns: something with `step()`, `get_last_lr()`, `state_dict()` and `load_state_dict()`
    :raises DeftError: see `check`, when warmup and decay take more than all steps, and when any of the steps would fail
    """
    _try_out(options, steps, tried=steps)
    used = _used(options, optimizer)
    without_effect = [f"--{f.name}" for f in _SHAPES if f.name not in used and _is_given(options, f.name)]
    if without_effect:
        which = "a schedule-free optimizer" if optimizers.averages(optimizer) else f"--lr_scheduler={named(options)}"
        logger.warning(f"no effect with {which}: {', '.join(without_effect)}")
    return _built(options, optimizers.unwrapped(optimizer), steps)


def check(options: OptimizerOptions) -> None:
    """Before a model is loaded. Raises as `optimizers.check`, and:

    :raises DeftError: for a schedule that is unknown, lacks an option or does not go with the optimizer, or arguments
        that it does not take or step by
    """
    _try_out(options, 1 << 40, tried=1)  # how many there are is not known yet


def _try_out(options: OptimizerOptions, steps: int, tried: int) -> None:
    """:param tried: how many of the steps to take
    :raises DeftError: for one that raises, as the last one may, or gives no rate
    """
    schedule = _built(options, optimizers.on_trial(options), steps)
    if isinstance(schedule, _NoSchedule | _OwnRates):
        return
    for number in range(1, tried + 1):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, that the optimizer has not stepped
                schedule.step()
            rate = float(schedule.get_last_lr()[0])
            reason = "" if math.isfinite(rate) else f"a rate of {rate}"
        except Exception as error:  # whatever a class raises
            reason = reason_of(error)
        if reason:
            raise DeftError(f"{_told(options)}: fails behind step {number}: {reason}")


def _told(options: OptimizerOptions) -> str:
    """As the user gave it."""
    values = {field.name: getattr(options, field.name) for field in _SHAPES if _is_given(options, field.name)}
    if options.lr_scheduler_args:
        values["lr_scheduler_args"] = " ".join(f"{key}={value!r}" for key, value in options.lr_scheduler_args.items())
    return " ".join(f"--{name} {value}" for name, value in values.items())


def named(options: OptimizerOptions) -> str:
    """What `ss_lr_scheduler` says: with Adafactor's own rates, as in sd-scripts, `adafactor:` and --learning_rate."""
    if options.lr_scheduler_type:
        return options.lr_scheduler_type
    return f"adafactor:{options.learning_rate}" if optimizers.sets_own_rates(options) else options.lr_scheduler


def _is_given(options: OptimizerOptions, name: str) -> bool:
    return getattr(options, name) != getattr(OptimizerOptions(), name)


def _used(options: OptimizerOptions, optimizer: Optimizer) -> set[str]:
    """Names of the options that have an effect."""
    if optimizers.averages(optimizer):
        return set()
    if options.lr_scheduler_type:
        return {"lr_scheduler_type", "lr_scheduler_args"}
    if optimizers.sets_own_rates(options):
        return {"lr_scheduler"}  # of which `optimizers` tells
    sources = SCHEDULES[options.lr_scheduler][1].values() if options.lr_scheduler in SCHEDULES else ()
    return {"lr_scheduler", "lr_scheduler_args", *(source.split(" ")[0] for source in sources)}


def _built(options: OptimizerOptions, optimizer: Optimizer, steps: int) -> Any:
    if optimizers.averages(optimizer):
        return _NoSchedule(optimizer)
    name, own_rates = options.lr_scheduler, optimizers.sets_own_rates(options)
    if options.lr_warmup_steps and (options.lr_scheduler_type or own_rates or name in ("constant", "adafactor")):
        hint = "; use constant_with_warmup" if name == "constant" and not options.lr_scheduler_type else ""
        hint = "; --optimizer_args warmup_init=True warms up" if own_rates else hint
        raise DeftError(f"--lr_warmup_steps: --lr_scheduler={named(options)} has no warmup{hint}")
    if options.lr_scheduler_type and own_rates:
        raise DeftError(
            f"--lr_scheduler_type={options.lr_scheduler_type}: Adafactor with relative_step=True finds its rates by "
            "itself; add --optimizer_args relative_step=False"
        )
    if options.lr_scheduler_type:
        return _of_class(options, optimizer)
    if own_rates:
        return _OwnRates(optimizer, options.learning_rate)
    if name == "adafactor":
        raise DeftError("--lr_scheduler=adafactor needs --optimizer_type Adafactor with relative_step=True")
    if name not in SCHEDULES:
        raise DeftError(f"--lr_scheduler={name}: unknown{nearest(name, SCHEDULES)}")
    make, sources = SCHEDULES[name]
    if name == "cosine_with_min_lr" and not (
        options.lr_scheduler_min_lr_ratio is not None or "min_lr" in options.lr_scheduler_args
    ):
        raise DeftError(f"--lr_scheduler={name} needs --lr_scheduler_min_lr_ratio")
    ours = {argument: f"use --{source.split(' ')[0]}" for argument, source in sources.items()}
    ours |= {"num_training_steps": "use --max_train_steps", "optimizer": "it is --optimizer_type's"}
    ours |= {"num_stable_steps": "it is what --lr_warmup_steps and --lr_decay_steps leave"}
    check_arguments("lr_scheduler_args", make, options.lr_scheduler_args, ours)
    values = _values(options, steps)
    if "stable" in sources.values() and values["stable"] < 0:
        raise DeftError(f"--lr_warmup_steps and --lr_decay_steps take more than all {steps} steps")
    arguments = {key: values[source] for key, source in sources.items() if values[source] is not None}
    return _made(f"--lr_scheduler={name}", make, optimizer, arguments | dict(options.lr_scheduler_args))


def _values(options: OptimizerOptions, steps: int) -> dict[str, Any]:
    """What `SCHEDULES` names."""
    found: dict[str, Any] = {field.name: getattr(options, field.name) for field in _SHAPES}
    for name in ("lr_warmup_steps", "lr_decay_steps"):
        share = found[name]
        found[name] = int(share * steps) if isinstance(share, float) else share
    stable = steps - found["lr_warmup_steps"] - found["lr_decay_steps"]
    return found | {"steps": steps, "stable": stable, _HALF: options.lr_scheduler_num_cycles / 2}


def _of_class(options: OptimizerOptions, optimizer: Optimizer) -> Any:
    """Of --lr_scheduler_type."""
    name = str(options.lr_scheduler_type)
    module, _, attribute = name.rpartition(".")
    made = find("lr_scheduler_type", name, module or "torch.optim.lr_scheduler", attribute)
    if not callable(made):
        raise DeftError(f"--lr_scheduler_type={name}: is no class")
    check_arguments("lr_scheduler_args", made, options.lr_scheduler_args, {"optimizer": "it is --optimizer_type's"})
    schedule = _made(f"--lr_scheduler_type={name}", made, optimizer, options.lr_scheduler_args)
    if not hasattr(schedule, "step"):
        raise DeftError(f"--lr_scheduler_type={name}: is no learning rate schedule")
    check_step("lr_scheduler_type", name, schedule)
    return schedule


def _made(source: str, make: Callable[..., Any], optimizer: torch.optim.Optimizer, arguments: Mapping[str, Any]) -> Any:
    try:
        return make(optimizer, **arguments)
    except Exception as error:  # whatever a class raises for its arguments
        raise DeftError(f"{source}, --lr_scheduler_args: {reason_of(error)}") from None
