"""The training loop: one batch, one step, one epoch."""

from __future__ import annotations

import argparse
import logging
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from library import sampling
from library.checkpoints import Checkpoints, TrainingStopped
from library.noise import diffusion_loss
from library.prompts import Prompt
from library.sd import StableDiffusion
from networks.deft import DeftNetwork

logger = logging.getLogger(__name__)


@dataclass
class TrainingLoop:
    """Everything that a step needs. `optimizer` and `schedule` are prepared by accelerate.

    :param group_names: of the optimizer's parameter groups, for the logs
    :param prompts: of the sample images; empty for none
    """

    args: argparse.Namespace
    accelerator: Accelerator
    model: StableDiffusion
    network: DeftNetwork
    loader: DataLoader
    optimizer: Any
    schedule: Any
    group_names: list[str]
    noise_scheduler: DDPMScheduler
    checkpoints: Checkpoints
    prompts: list[Prompt]
    steps: int
    epochs: int
    step: int = 0
    epoch: int = 0
    first_batch: tuple[Tensor, list[str]] | tuple[()] = ()
    has_gradients: bool = False  # of the step that is under way
    non_finite: str = ""  # what was not finite in it
    non_finite_in_a_row: int = 0
    recent_losses: deque[float] = field(default_factory=lambda: deque(maxlen=100))

    def run(self) -> None:
        """Trains for `steps` optimizer steps.

        :raises TrainingStopped: after `--max_nan_steps` non-finite losses in a row
        """
        if self.args.sample_at_first:
            self._sample("000000")
        main = self.accelerator.is_local_main_process
        with tqdm(total=self.steps, desc="steps", disable=not main, smoothing=0.1) as progress:
            while self.step < self.steps:
                self.epoch += 1
                self.network.on_epoch_start(self.model.text_encoder, self.model.unet)
                for latents, captions in self.loader:
                    with self.accelerator.accumulate():
                        loss = self._batch(latents, list(captions))
                    if not self.accelerator.sync_gradients:
                        continue
                    self.step += 1
                    self._after_step(loss)
                    progress.update()
                    progress.set_postfix(avr_loss=f"{self.average_loss:.4f}")
                    if self.step >= self.steps:
                        break
                self._after_epoch()
        self._warn_where_nothing_moved()

    @property
    def average_loss(self) -> float:
        """Of the last 100 batches."""
        return sum(self.recent_losses) / max(len(self.recent_losses), 1)

    def _loss(self, latents: Tensor, captions: list[str]) -> Tensor:
        """The objective at random noise and timesteps."""
        with self.accelerator.autocast():
            text = self.model.encode_text(captions)
            return diffusion_loss(
                lambda noisy, timesteps: self.model.predict(noisy, timesteps, text),
                latents.to(self.accelerator.device),
                self.noise_scheduler,
                self.args.min_snr_gamma or None,
            )

    def _batch(self, latents: Tensor, captions: list[str]) -> float:
        """Forward, backward and, where gradients are complete, the update; returns the loss over all processes."""
        self.network.on_step_start(self.model.text_encoder, self.model.unet)
        if not self.first_batch:
            self.first_batch = (latents, captions)
        loss = self._loss(latents, captions)
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
            self.has_gradients = False
        self.schedule.step()
        self.optimizer.zero_grad()
        return value

    @torch.no_grad()
    def _warn_where_nothing_moved(self) -> None:
        """Where the loss on the first batch is what it is without the adapter, at the same noise."""
        training, losses = self.network.training, []
        self.network.eval()
        for multiplier in (0.0, 1.0):
            self.network.set_multiplier(multiplier)
            with torch.random.fork_rng([self.accelerator.device] if self.accelerator.device.type == "cuda" else []):
                torch.manual_seed(0)
                losses.append(float(self._loss(*self.first_batch)))
        self.network.train(training)
        if abs(losses[1] - losses[0]) <= 1e-6 * abs(losses[0]):
            logger.warning(
                f"the adapter does not change the loss on the first batch, {losses[0]:.6f}: nothing has been learnt. "
                f"A higher learning rate, more steps or another --mixed_precision may help"
            )

    def _update(self) -> None:
        """Averages the gradients over processes, clips them, and steps unless they are not finite."""
        parameters = [p for p in self.network.get_trainable_params() if p.requires_grad]
        if self.accelerator.num_processes > 1:
            for parameter in parameters:  # dropout may have skipped a layer in one process and not in another
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(gradient, reduction="mean")
        norm = float(self.accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm or math.inf))
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
        if self.non_finite_in_a_row >= self.args.max_nan_steps:
            raise TrainingStopped(
                f"stopped at step {number}: non-finite {what} {self.non_finite_in_a_row} times in a row; try a lower "
                f"learning rate, or bf16 for fp16. Last good save: {self.checkpoints.last_good or 'none yet'}"
            )

    def _after_step(self, loss: float) -> None:
        args = self.args
        if args.scale_weight_norms:
            self.network.apply_max_norm_regularization(args.scale_weight_norms, self.accelerator.device)
        if args.logging_dir:
            rates = zip(self.group_names, self.schedule.get_last_lr(), strict=True)
            values = {"loss/current": loss, "loss/average": self.average_loss}
            self.accelerator.log(values | {f"lr/{name}": rate for name, rate in rates}, step=self.step)
        if args.sample_every_n_steps and self.step % args.sample_every_n_steps == 0:
            self._sample(f"{self.step:06d}")
        if args.save_every_n_steps and self.step % args.save_every_n_steps == 0 and self.step < self.steps:
            self.checkpoints.save_during_training(f"-step{self.step:08d}", self.step, self.epoch)

    def _after_epoch(self) -> None:
        args = self.args
        if args.sample_every_n_epochs and self.epoch % args.sample_every_n_epochs == 0:
            self._sample(f"e{self.epoch:06d}")
        if args.save_every_n_epochs and self.epoch % args.save_every_n_epochs == 0 and self.step < self.steps:
            self.checkpoints.save_during_training(f"-{self.epoch:06d}", self.step, self.epoch)

    def _sample(self, label: str) -> None:
        if self.prompts and self.accelerator.is_main_process:
            label = f"{self.args.output_name}_{label}"
            sampling.save_samples(self.model, self.network, self.prompts, self.accelerator, self.args.output_dir, label)
        self.accelerator.wait_for_everyone()
