"""A training's step behind its gradients."""

from __future__ import annotations

import logging
import time

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class Descent:
    """Steps of an optimizer whose rate rises to what it was made with and falls again; a line of log every hundred.

    :param name: of what is trained, for the log
    :param rise: the share of steps in which the rate rises
    """

    def __init__(self, name: str, optimizer: torch.optim.Optimizer, steps: int, rise: float = 0.1) -> None:
        self.name, self.optimizer, self.steps = name, optimizer, steps
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, optimizer.defaults["lr"], steps, pct_start=rise)
        self.step_number, self.start = 0, time.time()

    def step(self, measure: str, value: Tensor) -> None:
        """Goes down the gradients, clipped to a norm of 1, and makes them zero.

        :param value: of the measure that the log shows, a scalar
        """
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=False)  # a CUDA graph (`backward_of`) goes on writing into them
        if self.step_number % 100 == 0 or self.step_number == self.steps - 1:
            seconds = time.time() - self.start
            logger.info(f"{self.name} {self.step_number}/{self.steps} {measure} {value.item():.4f} {seconds:.0f} s")
        self.step_number += 1
