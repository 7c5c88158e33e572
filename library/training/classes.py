"""Optimizers and schedules are classes that users name, with arguments that users give: found and checked here."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from networks.deft_config import DeftError, nearest, reason_of


def find(option: str, name: str, module: str, attribute: str) -> Any:
    """`attribute` of `module`.

    :param option: that names it, as `name`
    :raises DeftError: when the package is not installed, or has no such thing
    """
    package = module.split(".")[0]
    try:
        content = importlib.import_module(module)
    except Exception as error:  # a package that is installed may fail in many ways
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            other = " (or the package that has it)" if "." in name else ""  # a module that a user names
            raise DeftError(
                f"--{option}={name}: not installed: pip install {package.replace('_', '-')}{other}"
            ) from None
        raise DeftError(f"--{option}={name}: {reason_of(error)}") from None
    if not hasattr(content, attribute):
        raise DeftError(f"--{option}={name}: no {attribute} in {module}{nearest(attribute, vars(content))}")
    return getattr(content, attribute)


def argument_names(made: Callable[..., Any]) -> list[str]:
    """What a class or function names, and, where it hands on **kwargs, what its base class names."""
    if not isinstance(made, type):
        return _named(made)
    names: list[str] = []
    for kind in made.__mro__:
        if kind in (Optimizer, LRScheduler, object):  # these take what their subclasses make of the arguments
            break
        if "__init__" in vars(kind):
            names += _named(vars(kind)["__init__"])
            parameters = inspect.signature(vars(kind)["__init__"]).parameters.values()
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
                break
    return [name for name in dict.fromkeys(names) if name != "self"]


def _named(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def check_arguments(option: str, made: Callable[..., Any], given: Mapping[str, Any], ours: Mapping[str, str]) -> None:
    """:param ours: arguments that are not given by `option` -> what to do instead
    :raises DeftError: for one of these, or one that `made` does not name
    """
    known = [name for name in argument_names(made) if name not in ours]
    for key, value in given.items():
        if key in ours:
            raise DeftError(f"--{option} {key}={value!r}: {ours[key]}")
        if key not in known:
            raise DeftError(f"--{option} {key}={value!r}: {made.__name__} has no such argument{nearest(key, known)}")


def check_step(option: str, name: str, made: Any) -> None:
    """:raises DeftError: when its `step` has to be given something"""
    parameters = list(inspect.signature(type(made).step).parameters.values())[1:]
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if needed:
        raise DeftError(f"--{option}={name}: its step needs {', '.join(needed)}, which this trainer does not give")
