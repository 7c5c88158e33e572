"""The training loop: one batch, one step, one epoch.

Where the device can leave a step out by itself, the CPU queues one step behind the other, and reads the numbers of each
once the next one is queued: see `Queued`. Where anything but another step follows, all numbers are read before it.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from library.data.batches import Batch, Gone, Loader
from library.options.rooms import LoopOptions
from library.report.report import Report
from library.training import optimizers, start
from library.training.adapter import Adapter
from library.training.interrupts import Interrupted, Interrupts
from library.training.losses import Losses
from library.training.meters import Meters
from library.training.randoms import Randoms
from library.training.record import Record
from library.training.samples import Samples
from library.training.saves import Saves, TrainingStopped
from library.training.state import Length, Position
from library.training.validation import Validation
from networks.deft_late import Late

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Queued:
    """A step that the device has been given, and what will be told of it.

    :param step: of the optimizer, that is done with it
    :param numbers: the losses of its batches, over all processes; the signal that all are to end by; and the
        gradients' norm
    :param rates: for the logs
    """

    step: int
    numbers: Late
    rates: dict[str, float]


@dataclass
class TrainingLoop:
    """Everything that a step needs. `optimizer` is prepared by accelerate.

    :param seed: of all noise and the order of pictures
    :param group_names: of the optimizer's parameter groups, for the logs
    :param evaluated: within which the adapter is as it is to be used, where the optimizer averages weights
    :param position: where the training begins
    :param record: that is told of all that is logged
    :param signals: that have come
    :param meters: of drift and of what is learnt
    :param report: that is written anew with each round of samples
    """

    options: LoopOptions
    accelerator: Accelerator
    losses: Losses
    seed: int
    adapter: Adapter
    loader: Loader
    optimizer: Any
    schedule: Any
    group_names: list[str]
    evaluated: Callable[[], AbstractContextManager[None]]
    saves: Saves
    samples: Samples
    validation: Validation | None
    length: Length
    position: Position
    record: Record
    signals: Interrupts
    report: Report
    meters: Meters | None = None
    ending: int = 0  # the signal that all processes have agreed to end by
    accumulated: int = 0  # batches of the step that is under way
    found: list[Tensor] = field(default_factory=list)  # the numbers of the step that is under way, as `Queued` has them
    has_gradients: bool = False  # of the step that is under way
    queued: Queued | None = None  # the last step, until its numbers are read
    non_finite_in_a_row: int = 0
    recent_losses: deque[float] = field(init=False)

    def __post_init__(self) -> None:
        self.recent_losses = deque(self.position.recent, maxlen=100)
        self.trained = list(self.adapter.parameters())
        # whether no other gradients would suffer from a loss that is not finite, so that nobody has to know it first
        self.alone = self.options.gradient_accumulation_steps == 1 and self.accelerator.scaler is None
        self.late = self.alone and optimizers.leaves_out(self.optimizer)

    def run(self) -> None:
        """Trains for `length.steps` optimizer steps.

        :raises TrainingStopped: after `--max_nan_steps` non-finite losses in a row, or when pictures or caches are gone
        :raises Interrupted: when a signal has ended it, after saving
        """
        main = self.accelerator.is_local_main_process
        done = self.position.step
        with tqdm(
            total=self.length.steps, initial=done, desc="steps", disable=not main, smoothing=0.1
        ) as self.progress:
            if done == 0 and self.options.sample_at_first:
                self._draw("000000")
            try:
                while self.position.step < self.length.steps:
                    self._epoch()
                if self.meters and not self.meters.at(self.position.step):  # nothing was left to do
                    self._measure(self.meters)
            except Gone as error:
                raise self._stopped_by(error) from error

    @property
    def average_loss(self) -> float:
        """Of the last 100 batches."""
        return sum(self.recent_losses) / max(len(self.recent_losses), 1)

    def _epoch(self) -> None:
        """The rest of the epoch that is under way, or the next one."""
        position = self.position
        number = position.epoch if position.batches else position.epoch + 1
        self.adapter.start_epoch()
        for batch in self.loader.epoch(number, position.batches):
            position.epoch = number
            with self.accelerator.accumulate():
                self._batch(batch)
            position.batches += 1
            if self.accelerator.sync_gradients:
                position.step += 1
                self._after_step()
                if position.step >= self.length.steps:
                    break
        if position.batches >= len(self.loader):  # else more steps may follow it one day
            position.batches = 0
        self._after_epoch()

    def _stopped_by(self, error: Gone) -> TrainingStopped:
        """After saving, where all of the last step is done and no other process has to take part."""
        self._settle()
        if self.accelerator.num_processes == 1 and not self.accumulated and self.position.step:
            self.saves.interrupted(self.position)
        return TrainingStopped(
            f"stopped at step {self.position.step}: {error}; put it back, or start again; {self.saves.described()}"
        )

    def _randoms(self, batch: Batch) -> Randoms:
        """This batch's, whose pictures stand in the step behind those of other processes and accumulated batches."""
        b = self.loader.batch_size
        first = (self.accumulated * self.accelerator.num_processes + self.accelerator.process_index) * b
        return Randoms(self.seed, self.position.step, range(first, first + len(batch)))

    def _batch(self, batch: Batch) -> None:
        """Forward, backward and, where gradients are complete, the update."""
        self.adapter.start_step(ahead=self.queued is not None)
        if not len(batch):
            self.adapter.skip_pass()
        loss = torch.zeros((), device=self.accelerator.device)
        if len(batch):
            loss = self.losses(batch, self._randoms(batch)).mean() * batch.share
        self.accumulated += 1
        if self.alone and len(batch):
            self.accelerator.backward(loss)
        mean, signal = self._agree_on(loss)
        self.found.append(mean)
        if self.alone:
            self.has_gradients = True
        elif math.isfinite(mean.item()):
            if len(batch):
                self.accelerator.backward(loss)
            self.has_gradients = True
        if self.accelerator.sync_gradients:
            norm = self._update() if self.has_gradients else torch.zeros_like(mean)
            self.found += [signal, norm]
            self.has_gradients, self.accumulated = False, 0
            if not self.optimizer.step_was_skipped:  # by a GradScaler
                self.schedule.step()
            self.optimizer.zero_grad()

    def _agree_on(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """The loss's mean over processes; and a signal that one of them has noted by now, which is to end all."""
        loss = loss.detach().float()
        found = torch.stack([loss, torch.full_like(loss, self.signals.number)])
        found = self.accelerator.gather(found).view(-1, 2)
        return found[:, 0].mean(), found[:, 1].max()

    def _update(self) -> Tensor:
        """Averages the gradients over processes, clips them, and steps unless they or the loss are not finite.

        :returns: (), their norm
        """
        if self.accelerator.num_processes > 1:
            self._average_gradients(self.trained)
        norm = self.accelerator.clip_grad_norm_(self.trained, self.options.max_grad_norm or math.inf)
        norm = norm.to(self.found[0])  # that of no gradients at all is on the CPU
        if self.accelerator.scaler is not None:
            self.optimizer.step()  # it skips non-finite gradients by itself, and finds its scale that way
            return torch.zeros_like(norm)
        finite = norm.isfinite()
        optimizers.step(self.optimizer, finite & self.found[0].isfinite() if self.alone else finite)
        return norm

    def _average_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """In one piece. DistributedDataParallel would count each gradient as it comes; ours come together, at the end
        of the backward pass, and of a layer that dropout has skipped in this process there is none. Taken apart again
        they stay views of that piece, as they lie in memory: a copy would be a kernel for each of a thousand."""
        gradients = [_lying_as(parameter) for parameter in parameters]
        flat = torch.cat([one.as_strided((one.numel(),), (1,)) for one in gradients])
        together = self.accelerator.reduce(flat, reduction="mean")
        parts = together.split([one.numel() for one in gradients])
        for parameter, one, part in zip(parameters, gradients, parts, strict=True):
            parameter.grad = part.as_strided(one.shape, one.stride())

    def _after_step(self) -> None:
        options, step = self.options, self.position.step
        self.adapter.after_step()
        before, self.queued = self.queued, Queued(step, Late(torch.stack(self.found)), self._rates())
        self.found = []
        if before is not None:
            self._tell(before)
        if not self.late or self._pauses():
            self._settle()
        if self.ending and step < self.length.steps:  # before what may take longer than a shutdown waits
            self._settle()
            raise Interrupted(self.ending, self.saves.interrupted(self.position), self.saves.described())
        if self.meters and self.meters.due(step):
            self._measure(self.meters)
        if options.sample_every_n_steps and step % options.sample_every_n_steps == 0:
            self._draw(f"{step:06d}")
        self.saves.at_step(self.position)
        if options.validate_every_n_steps and step % options.validate_every_n_steps == 0:
            self._validate("step")

    def _pauses(self) -> bool:
        """Whether something else than another step follows this one."""
        step, options = self.position.step, self.options
        every = options.sample_every_n_steps, options.validate_every_n_steps
        return (
            step >= self.length.steps
            or self.position.batches >= len(self.loader)
            or any(number and step % number == 0 for number in every)
            or self.saves.due(step)
            or (self.meters is not None and self.meters.due(step))
        )

    def _settle(self) -> None:
        """Reads what has not been read yet."""
        queued, self.queued = self.queued, None
        if queued is not None:
            self._tell(queued)

    def _tell(self, queued: Queued) -> None:
        """What a step has come to: counts what was not finite in it, which has been left out, and logs the rest.

        :raises TrainingStopped: see `run`
        """
        *losses, signal, norm = queued.numbers.read()
        self.ending = self.ending or int(signal)
        finite = [loss for loss in losses if math.isfinite(loss)]
        self.recent_losses.extend(finite)
        what = ""
        if finite and not math.isfinite(norm):
            what = f"gradient {norm}"
        elif len(finite) < len(losses):
            what = f"loss {next(loss for loss in reversed(losses) if not math.isfinite(loss))}"
        self._count_non_finite(what, queued.step)
        self.position.recent = list(self.recent_losses)
        self._show()
        self._log({"loss/current": losses[-1], "loss/average": self.average_loss, **queued.rates}, queued.step)

    def _count_non_finite(self, what: str, step: int) -> None:
        """Counts steps in a row with a non-finite loss or gradient.

        :param what: was not finite, or nothing
        """
        self.non_finite_in_a_row = self.non_finite_in_a_row + 1 if what else 0
        if what:
            logger.warning(f"step {step}: non-finite {what}, left out ({self.non_finite_in_a_row} in a row)")
        if self.non_finite_in_a_row >= self.options.max_nan_steps:
            raise TrainingStopped(
                f"stopped at step {step}: non-finite {what} {self.non_finite_in_a_row} times in a row; try a lower "
                f"learning rate, or bf16 for fp16. Last good save: {self.saves.last_good or 'none yet'}"
            )

    def _show(self) -> None:
        try:
            self.progress.update()
            shown = self.meters.shown() if self.meters else {}
            self.progress.set_postfix(avr_loss=f"{self.average_loss:.4f}", **shown, **self._memory())
        except OSError:  # a terminal that is gone, a full disk behind 2> FILE
            self.progress.disable = True

    def _after_epoch(self) -> None:
        options, epoch = self.options, self.position.epoch
        if options.validate_every_n_epochs is None or epoch % options.validate_every_n_epochs == 0:
            self._validate("epoch")
        self._log({"loss/epoch_average": self.average_loss})
        if options.sample_every_n_epochs and epoch % options.sample_every_n_epochs == 0:
            self._draw(f"e{epoch:06d}")
        self.saves.at_epoch(self.position)  # behind the samples, which files show

    def _draw(self, label: str) -> None:
        with self.evaluated():
            self.samples.draw(label, self.position.step, lambda: bool(self.signals.number))
        self.report.write()

    def _validate(self, when: str) -> None:
        """Under sd-scripts' names."""
        if self.validation is None:
            return
        with self.evaluated():
            found = self.validation.measure()
        logger.info(f"step {self.position.step}: validation loss {found:.5f}")
        values = {"average": found, "divergence": found - self.average_loss}
        named = {f"loss/validation/{when}_{key}": value for key, value in values.items()}
        self._log(named)

    def _measure(self, meters: Meters) -> None:
        """Drift and what is learnt; a drift that is too large makes this step the last one."""
        step = self.position.step
        with self.evaluated():
            found = meters.measure(step)
        self._log(found.logged())
        for line in meters.watch.lines(found):
            logger.warning(line)
        most = meters.stop_at_drift
        if most is not None and found.drift >= most and step < self.length.steps:
            logger.warning(
                f"step {step}: the drift is {found.drift:.3g}; --stop_at_drift {most:g} ends the training here"
            )
            self.length.steps, self.length.epochs = step, self.position.epoch

    def _log(self, values: dict[str, float], step: int | None = None) -> None:
        step = self.position.step if step is None else step
        self.record.log(values, step)
        start.log(self.accelerator, values, step)

    def _memory(self) -> dict[str, str]:
        """The most that was taken of the GPU's, for the bar."""
        device = self.accelerator.device
        return {"GPU": f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f}G"} if device.type == "cuda" else {}

    def _rates(self) -> dict[str, float]:
        """Under sd-scripts' names; of optimizers that find their own rate, also that."""
        found: dict[str, float] = {}
        for name, group in zip(self.group_names, self.optimizer.param_groups, strict=True):
            rate = group["lr"]
            found[f"lr/{name}"] = float(rate) if rate is not None else math.nan
            if "d" in group and rate is not None:
                found[f"lr/d*lr/{name}"] = float(group["d"] * rate)
        return found


def _lying_as(parameter: torch.nn.Parameter) -> Tensor:
    """Its gradient, 0 if there is none, in memory as the parameter is, which fused optimizers ask for."""
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return gradient if gradient.stride() == parameter.stride() else torch.empty_like(parameter).copy_(gradient)
