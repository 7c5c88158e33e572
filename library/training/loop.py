"""The training loop: one batch, one step, one epoch."""

from __future__ import annotations

import logging
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from library.data.latents import Batch
from library.models.family import Family
from library.options.rooms import LoopOptions
from library.training.adapter import Adapter
from library.training.objective import Objective
from library.training.randoms import Randoms
from library.training.samples import Samples
from library.training.saves import Saves, TrainingStopped

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Length:
    """Of a training."""

    steps: int
    epochs: int

    @staticmethod
    def of(options: LoopOptions, batches: int) -> Length:
        """:param batches: of an epoch, in this process"""
        an_epoch = math.ceil(batches / options.gradient_accumulation_steps)
        steps = options.max_train_epochs * an_epoch if options.max_train_epochs else options.max_train_steps
        return Length(steps, math.ceil(steps / an_epoch))


@dataclass
class TrainingLoop:
    """Everything that a step needs. `optimizer` and `schedule` are prepared by accelerate.

    :param group_names: of the optimizer's parameter groups, for the logs
    """

    options: LoopOptions
    accelerator: Accelerator
    model: Family
    objective: Objective
    seed: int
    adapter: Adapter
    loader: DataLoader
    optimizer: Any
    schedule: Any
    group_names: list[str]
    saves: Saves
    samples: Samples
    length: Length
    step: int = 0
    epoch: int = 0
    accumulated: int = 0  # batches of the step that is under way
    first_batch: Batch | None = None
    has_gradients: bool = False  # of the step that is under way
    non_finite: str = ""  # what was not finite in it
    non_finite_in_a_row: int = 0
    recent_losses: deque[float] = field(default_factory=lambda: deque(maxlen=100))

    def run(self) -> None:
        """Trains for `steps` optimizer steps.

        :raises TrainingStopped: after `--max_nan_steps` non-finite losses in a row
        """
        if self.options.sample_at_first:
            self.samples.draw("000000")
        main = self.accelerator.is_local_main_process
        with tqdm(total=self.length.steps, desc="steps", disable=not main, smoothing=0.1) as progress:
            while self.step < self.length.steps:
                self.epoch += 1
                self.adapter.start_epoch()
                for batch in self.loader:
                    with self.accelerator.accumulate():
                        loss = self._batch(batch)
                    if not self.accelerator.sync_gradients:
                        continue
                    self.step += 1
                    self._after_step(loss)
                    progress.update()
                    progress.set_postfix(avr_loss=f"{self.average_loss:.4f}")
                    if self.step >= self.length.steps:
                        break
                self._after_epoch()

    @property
    def average_loss(self) -> float:
        """Of the last 100 batches."""
        return sum(self.recent_losses) / max(len(self.recent_losses), 1)

    def _randoms(self, batch: Batch) -> Randoms:
        """This batch's, whose pictures stand in the step behind those of other processes and accumulated batches."""
        b = self.loader.batch_size or len(batch.latents)
        first = (self.accumulated * self.accelerator.num_processes + self.accelerator.process_index) * b
        return Randoms(self.seed, self.step, range(first, first + len(batch.latents)))

    def _loss(self, batch: Batch, randoms: Randoms) -> Tensor:
        """The objective at random noise and timesteps."""
        randoms.seed_torch()
        noised = self.objective.draw(randoms, batch.latents.to(self.accelerator.device))
        with self.accelerator.autocast():
            text = self.model.encode_text(list(batch.captions))
            prediction = self.model.predict(noised.noisy, noised.timesteps, text, batch.sizes)
        return self.objective.loss(noised, prediction).mean()

    def _batch(self, batch: Batch) -> float:
        """Forward, backward and, where gradients are complete, the update; returns the loss over all processes."""
        self.adapter.start_step()
        self.first_batch = self.first_batch or batch
        loss = self._loss(batch, self._randoms(batch))
        self.accumulated += 1
        value = self.accelerator.gather(loss.detach()).mean().item()  # one value, so that all processes agree
        if math.isfinite(value):
            self.recent_losses.append(value)
            self.accelerator.backward(loss)
            self.has_gradients = True
        else:
            self.non_finite = f"loss {value}"
        if self.accelerator.sync_gradients:
            if self.has_gradients:
                self._update()
            self._count_non_finite()
            self.has_gradients, self.accumulated = False, 0
            if not self.optimizer.step_was_skipped:  # by a GradScaler
                self.schedule.step()
        self.optimizer.zero_grad()
        return value

    @torch.no_grad()
    def warn_where_nothing_moved(self) -> None:
        """After a training: where the loss on the first batch is what it is without the adapter, noise alike."""
        assert self.first_batch is not None
        network, losses = self.adapter.module, []
        training = network.training
        network.eval()
        for on in (False, True):
            self.adapter.switch(on)
            with torch.random.fork_rng([self.accelerator.device] if self.accelerator.device.type == "cuda" else []):
                losses.append(
                    float(self._loss(self.first_batch, Randoms(self.seed, 0, range(len(self.first_batch.latents)))))
                )
        network.train(training)
        if abs(losses[1] - losses[0]) <= 1e-6 * abs(losses[0]):
            logger.warning(
                f"the adapter does not change the loss on the first batch, {losses[0]:.6f}: nothing has been learnt. "
                f"A higher learning rate, more steps or another --mixed_precision may help"
            )

    def _update(self) -> None:
        """Averages the gradients over processes, clips them, and steps unless they are not finite."""
        parameters = list(self.adapter.parameters())
        if self.accelerator.num_processes > 1:
            for parameter in parameters:  # dropout may have skipped a layer in one process and not in another
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(gradient, reduction="mean")
        norm = float(self.accelerator.clip_grad_norm_(parameters, self.options.max_grad_norm or math.inf))
        if self.accelerator.scaler is not None or math.isfinite(norm):
            self.optimizer.step()  # a GradScaler skips non-finite gradients by itself, and finds its scale that way
        else:
            self.non_finite = f"gradient {norm}"

    def _count_non_finite(self) -> None:
        """Counts steps in a row with a non-finite loss or gradient; what was not finite has been left out."""
        number, what, self.non_finite = self.step + 1, self.non_finite, ""
        self.non_finite_in_a_row = self.non_finite_in_a_row + 1 if what else 0
        if what:
            logger.warning(f"step {number}: non-finite {what}, left out ({self.non_finite_in_a_row} in a row)")
        if self.non_finite_in_a_row >= self.options.max_nan_steps:
            raise TrainingStopped(
                f"stopped at step {number}: non-finite {what} {self.non_finite_in_a_row} times in a row; try a lower "
                f"learning rate, or bf16 for fp16. Last good save: {self.saves.last_good or 'none yet'}"
            )

    def _after_step(self, loss: float) -> None:
        options = self.options
        self.adapter.after_step()
        if self.accelerator.trackers:
            rates = zip(self.group_names, self.schedule.get_last_lr(), strict=True)
            values = {"loss/current": loss, "loss/average": self.average_loss}
            self.accelerator.log(values | {f"lr/{name}": rate for name, rate in rates}, step=self.step)
        if options.sample_every_n_steps and self.step % options.sample_every_n_steps == 0:
            self.samples.draw(f"{self.step:06d}")
        if options.save_every_n_steps and self.step % options.save_every_n_steps == 0 and self.step < self.length.steps:
            self.saves.during_training(f"-step{self.step:08d}", self.step, self.epoch)

    def _after_epoch(self) -> None:
        options = self.options
        if options.sample_every_n_epochs and self.epoch % options.sample_every_n_epochs == 0:
            self.samples.draw(f"e{self.epoch:06d}")
        if (
            options.save_every_n_epochs
            and self.epoch % options.save_every_n_epochs == 0
            and self.step < self.length.steps
        ):
            self.saves.during_training(f"-{self.epoch:06d}", self.step, self.epoch)
