"""What an optimizer remembers of columns that have been replaced, and that it forgets it."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

# averages of past gradients, as torch, Lion, Prodigy, D-Adaptation and schedule-free optimizers name them. Others may
# be no such thing: schedule-free's `z` is the weights' own iterate, bitsandbytes' `state1` holds codes
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "grad_avg", "momentum_buffer")

_replaced: MutableMapping[nn.Parameter, Tensor] = WeakTensorKeyDictionary()
_hook: Any = None


def forget_moments(parameter: nn.Parameter, columns: Tensor) -> None:
    """At its next step, the optimizer that has `parameter` (m, r) sets its `MOMENTS` of these columns to zero.

    :param columns: which (r,), bool
    """
    global _hook
    before = _replaced.get(parameter)
    _replaced[parameter] = columns if before is None else before | columns
    if _hook is None:  # one for all, which stays: while hooks run, torch goes through their dictionary
        _hook = register_optimizer_step_pre_hook(_forget)


def _forget(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Before a step of any optimizer."""
    if not _replaced:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            columns = _replaced.pop(parameter, None)
            if columns is None:
                continue
            for name, value in optimizer.state.get(parameter, {}).items():
                if name in MOMENTS and isinstance(value, Tensor) and value.shape == parameter.shape:
                    value[:, columns] = 0
