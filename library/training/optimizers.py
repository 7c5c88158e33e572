"""Optimizers by sd-scripts' names, or by any class's (sd-scripts 48d368fa, `get_optimizer`)."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from library.options.rooms import OptimizerOptions
from library.training.classes import check_arguments, check_step, find
from networks.deft_config import DeftError, nearest, reason_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """A row: the class that a name stands for.

    :param usual: arguments where the user gives no others; files record them as if given
    :param fixed: arguments that make the class this optimizer; files do not record them
    :param own_rate: whether it finds a rate by itself, of which the user's is a multiple
    :param one_rate: whether it stops at several rates
    """

    name: str
    module: str
    class_name: str
    usual: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    own_rate: bool = False
    one_rate: bool = False


def _of(module: str, *names: str, **rest: Any) -> list[Kind]:
    """Classes that are named as they are."""
    return [Kind(name, module, name, **rest) for name in names]


_NESTEROV: dict[str, Any] = {"usual": {"momentum": 0.9}, "fixed": {"nesterov": True}}
_PREPRINT = ("dadaptation.experimental", "DAdaptAdamPreprint")

# of torch.optim, one kernel for all parameters; of those that have it, the ones that every torch for CUDA has
FUSED = ("Adam", "AdamW", "SGD")

KINDS = [
    *_of("torch.optim", "AdamW"),
    Kind("SGDNesterov", "torch.optim", "SGD", **_NESTEROV),
    *_of("bitsandbytes.optim", "AdamW8bit", "Lion8bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit"),
    *_of("bitsandbytes.optim", "PagedLion8bit"),
    Kind("SGDNesterov8bit", "bitsandbytes.optim", "SGD8bit", **_NESTEROV),
    *_of("lion_pytorch", "Lion"),
    Kind("DAdaptation", *_PREPRINT, own_rate=True, one_rate=True),
    Kind("DAdaptAdamPreprint", *_PREPRINT, own_rate=True, one_rate=True),
    *_of("dadaptation", "DAdaptAdam", "DAdaptLion", "DAdaptSGD", own_rate=True, one_rate=True),
    *_of("dadaptation", "DAdaptAdaGrad", "DAdaptAdan", own_rate=True),
    *_of("dadaptation.experimental", "DAdaptAdanIP", own_rate=True),
    *_of("prodigyopt", "Prodigy", own_rate=True, one_rate=True),
    *_of("transformers.optimization", "Adafactor", usual={"relative_step": True}),
    *_of("schedulefree", "AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"),
]
_BY_NAME = {kind.name.lower(): kind for kind in KINDS}


# --- which class, with what -------------------------------------------------------------------------------------------


def optimizer_of(options: OptimizerOptions, groups: list[dict[str, Any]]) -> Optimizer:
    """The optimizer, in training mode; one line where its rates are not what they look like.

    :param groups: parameter groups, each with its own `lr`; left as they are
    :raises DeftError: see `check`, and for rates that it cannot have
    """
    check_rates(options, [group["lr"] for group in groups])
    on_cuda = all(parameter.is_cuda for group in groups for parameter in group["params"])
    optimizer = _built(options, groups, on_cuda)
    _tell_of_rates(options, [group["lr"] for group in groups])
    train_mode(optimizer)
    return optimizer


def check(options: OptimizerOptions) -> None:
    """Before a model is loaded.

    :raises DeftError: for an unknown optimizer, one that is not installed, or arguments that it cannot step by
    """
    on_trial(options)


def check_rates(options: OptimizerOptions, rates: Sequence[float]) -> None:
    """:raises DeftError: when the optimizer would stop at the first step because these differ"""
    several = sorted({rate for rate in rates if rate})
    if kind_of(options.optimizer_type).one_rate and len(several) > 1:
        raise DeftError(
            f"--optimizer_type={options.optimizer_type} takes one rate for all, not {', '.join(map(str, several))}: "
            "give the same --learning_rate, --unet_lr and --text_encoder_lr, and no rates or ratios in --network_args"
        )


def described(options: OptimizerOptions) -> str:
    """The class and its arguments, as sd-scripts writes them into `ss_optimizer`."""
    kind = kind_of(options.optimizer_type)
    made, arguments = _class(kind), _arguments(options)
    listed = ",".join(f"{key}={value}" for key, value in arguments.items())
    return f"{made.__module__}.{made.__name__}" + (f"({listed})" if listed else "")


def sets_own_rates(options: OptimizerOptions) -> bool:
    """Whether it is Adafactor with `relative_step`: no rate and no schedule of the user's then, as in sd-scripts."""
    return kind_of(options.optimizer_type).name == "Adafactor" and bool(_arguments(options)["relative_step"])


def kind_of(name: str) -> Kind:
    """The row, in whatever case; or a new one for MODULE.CLASS or a class of torch.optim."""
    module, _, class_name = name.rpartition(".")
    return _BY_NAME.get(name.lower()) or Kind(name, module or "torch.optim", class_name)


def on_trial(options: OptimizerOptions) -> Optimizer:
    """The optimizer, one step on, of a small parameter: many read their arguments only then. Raises as `check`."""
    number = torch.cuda.device_count()  # some classes and arguments need one; accelerate takes the same
    device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % number}" if number else "cpu"
    parameter = nn.Parameter(torch.zeros(2, 2, device=device))
    optimizer = _built(options, [{"params": [parameter], "lr": options.learning_rate}], bool(number))
    check_step("optimizer_type", options.optimizer_type, optimizer)
    train_mode(optimizer)
    parameter.grad = torch.ones_like(parameter)
    try:
        optimizer.step()
    except Exception as error:  # whatever a class raises
        raise DeftError(f"{_told(options)}: the first step fails: {reason_of(error)}") from None
    return optimizer


def _class(kind: Kind) -> Any:
    known = [row.name for row in KINDS]
    if "." not in kind.name and kind.module == "torch.optim" and not hasattr(torch.optim, kind.class_name):
        hint = nearest(kind.name, [*known, *vars(torch.optim)]) or f"; known are {', '.join(known)}, MODULE.CLASS"
        raise DeftError(f"--optimizer_type={kind.name}: unknown{hint}")
    made = find("optimizer_type", kind.name, kind.module, kind.class_name)
    if not (isinstance(made, type) and issubclass(made, Optimizer)):
        raise DeftError(f"--optimizer_type={kind.name}: is no torch optimizer{nearest(kind.name, known)}")
    return made


def _arguments(options: OptimizerOptions) -> dict[str, Any]:
    """The user's, then the usual ones."""
    kind = kind_of(options.optimizer_type)
    arguments = {**options.optimizer_args, **{k: v for k, v in kind.usual.items() if k not in options.optimizer_args}}
    if kind.name == "Adafactor" and arguments.get("warmup_init"):
        arguments["relative_step"] = True  # it warms up nothing else
    return arguments


def _built(options: OptimizerOptions, groups: list[dict[str, Any]], on_cuda: bool) -> Optimizer:
    kind = kind_of(options.optimizer_type)
    made, arguments = _class(kind), _arguments(options)
    ours = {
        "lr": "give it by --learning_rate, --unet_lr, --text_encoder_lr",
        "params": "what is trained is the adapter",
        **{key: f"{kind.name} has {key}={value} always" for key, value in kind.fixed.items()},
    }
    check_arguments("optimizer_args", made, options.optimizer_args, ours)
    own_rates = sets_own_rates(options)
    groups = [{k: v for k, v in group.items() if not (own_rates and k == "lr")} for group in groups]
    fusing = on_cuda and kind.module == "torch.optim" and kind.class_name in FUSED
    fused = {"fused": True} if fusing and not {"fused", "foreach", "differentiable"} & arguments.keys() else {}
    rate = None if own_rates else options.learning_rate
    try:
        return made(groups, lr=rate, **arguments, **kind.fixed, **fused)
    except Exception as error:  # whatever a class raises for its arguments
        raise DeftError(f"{_told(options)}: {reason_of(error)}") from None


def _told(options: OptimizerOptions) -> str:
    """As the user gave it."""
    given = " ".join(f"{key}={value!r}" for key, value in options.optimizer_args.items())
    return f"--optimizer_type={options.optimizer_type}" + (f" --optimizer_args {given}" if given else "")


def _tell_of_rates(options: OptimizerOptions, rates: Sequence[float]) -> None:
    """What sd-scripts warns of."""
    kind = kind_of(options.optimizer_type)
    if sets_own_rates(options):
        logger.info(
            f"Adafactor with relative_step=True finds its rates by itself: --lr_scheduler is adafactor:"
            f"{options.learning_rate:g}, --unet_lr and --text_encoder_lr have no effect; with --optimizer_args "
            f"relative_step=False all are yours"
        )
    elif kind.name == "Adafactor":
        logger.info(
            "Adafactor with relative_step=False: it clips by itself, so that --max_grad_norm 0 and --lr_scheduler "
            "constant_with_warmup suit it"
        )
    if kind.own_rate and rates and rates[0] <= 0.1:
        logger.warning(
            f"{kind.name} multiplies the rate that it finds by yours, {rates[0]:g}: usual is --learning_rate 1"
        )
    if kind.own_rate and len(set(rates)) > 1:
        logger.warning(f"{kind.name} goes by the first of several rates, {rates[0]:g}; the others have no effect")


# --- steps that are left out ------------------------------------------------------------------------------------------


def leaves_out(optimizer: Optimizer) -> bool:
    """Whether the device leaves a step out by itself, as a GradScaler's does. torch's fused Adams and Adagrad do it
    right; SGD would go on from a momentum of arbitrary numbers if that was the first step (torch 2.13)."""
    inner = unwrapped(optimizer)
    fused = all(group.get("fused") for group in inner.param_groups)
    return fused and type(inner) in (torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)


def step(optimizer: Optimizer, finite: Tensor) -> None:
    """A step, or none, which changes nothing. The device is waited for where the optimizer does not `leaves_out`.

    :param finite: (), bool, whether it is taken
    """
    if not leaves_out(optimizer):
        if bool(finite):
            optimizer.step()
        return
    inner: Any = unwrapped(optimizer)
    inner.grad_scale, inner.found_inf = None, (~finite).float()  # as torch.amp.GradScaler gives them
    try:
        optimizer.step()
    finally:
        del inner.grad_scale, inner.found_inf


# --- schedule-free optimizers: the weights that are trained on are not those to be used -------------------------------


def averages(optimizer: Optimizer) -> bool:
    """Whether it is schedule-free: has a mode for training and one in which its averages are the weights."""
    inner = unwrapped(optimizer)
    return all(callable(getattr(inner, name, None)) for name in ("train", "eval"))


def train_mode(optimizer: Optimizer) -> None:
    """Before training steps; nothing for optimizers that have no modes."""
    if averages(optimizer):
        unwrapped(optimizer).train()  # type: ignore[attr-defined]


@contextlib.contextmanager
def evaluated(optimizer: Optimizer) -> Iterator[None]:
    """Within it, for saves, samples and validation, a schedule-free optimizer's averages are in the weights' place.

    Behind it the weights are, bit for bit, what they were. Nothing for other optimizers, nor within itself.
    """
    in_training = all(group.get("train_mode", True) for group in optimizer.param_groups)
    if not (averages(optimizer) and in_training):
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    trained_on = [parameter.detach().clone() for parameter in parameters]
    unwrapped(optimizer).eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        train_mode(optimizer)
        with torch.no_grad():  # its own way back rounds
            for parameter, value in zip(parameters, trained_on, strict=True):
                parameter.copy_(value)


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """Out of accelerate's; others that hold an optimizer of their own stay whole."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
