"""A device's memory that has run out: said once, with what would help."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from library.estimate import phases
from library.estimate.ledger import Rates
from library.options.rooms import Run
from library.training import start
from library.training.given import Given
from library.training.saves import TrainingStopped
from library.training.state import Length
from networks.deft_config import reason_of

logger = logging.getLogger(__name__)

_TOLD = ("MPS backend out of memory", "DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough")
_ANY = Rates({torch.float32: 1e12}, 1e12, 1e6)  # times are not asked for
MOST = 3  # settings that are named


@contextlib.contextmanager
def told(run: Run, given: Given, phase: str, saved: Callable[[], str]) -> Iterator[None]:
    """Around a phase.

    :param saved: says what is saved by now
    :raises TrainingStopped: where memory has run out
    """
    try:
        yield
        return
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        line = f"out of memory while {phase}; {saved()}"
        if not start.is_main_process():
            raise TrainingStopped(line) from None
        reason = reason_of(error)
    raise TrainingStopped(f"{line}. {_helps(run, given)} ({reason})")


def is_out_of_memory(error: BaseException) -> bool:
    """Of a card, of MPS, or of the host."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(line in str(error) for line in _TOLD)


def changes(run: Run) -> Iterator[tuple[str, Run]]:
    """Settings that are not in use, go together with the others and take less memory."""
    model, process, caches, network = run.model, run.process, run.data.caches, run.network
    if not model.gradient_checkpointing:
        yield "--gradient_checkpointing", replace(run, model=replace(model, gradient_checkpointing=True))
    if process.mixed_precision == "no" and (torch.cuda.is_available() or not torch.backends.mps.is_available()):
        yield "--mixed_precision bf16", replace(run, process=replace(process, mixed_precision="bf16"))
    elif process.mixed_precision != "no" and not model.fp8_base:
        yield "--fp8_base", replace(run, model=replace(model, fp8_base=True))
    changing = any(subset.captions.changing for dataset in run.data.datasets for subset in dataset.subsets)
    if network.network_train_unet_only and not caches.cache_text_encoder_outputs and not changing:
        data = replace(run.data, caches=replace(caches, cache_text_encoder_outputs=True))
        yield "--cache_text_encoder_outputs", replace(run, data=data)
    if (network.network_dim or 4) >= 16 and not network.dim_from_weights:
        half = (network.network_dim or 4) // 2
        yield f"--network_dim {half}", replace(run, network=replace(network, network_dim=half))


def _helps(run: Run, given: Given) -> str:
    """What would save most; without figures where they cannot be had."""
    try:
        now, found = _peak(run, given), []
        for what, changed in changes(run):
            found.append((now - _peak(changed, given), what))
        if any(dataset.options.batch_size > 1 for dataset in given.plan):
            one = tuple(replace(d, options=replace(d.options, batch_size=1)) for d in given.plan)
            found.append((now - _peak(run, replace(given, plan=one)), "--train_batch_size 1"))
        best = [
            f"{what} (saves {size / 2**30:.1f} GiB)" for size, what in sorted(found, reverse=True)[:MOST] if size > 0
        ]
        if best:
            return f"It would take about {now / 2**30:.1f} GiB; what would help: {', '.join(best)}"
    except Exception as error:  # whatever: the message counts
        logger.debug(f"no estimate ({reason_of(error)})")
    names = [what for what, _ in changes(run)]
    names += ["--train_batch_size 1"] if any(d.options.batch_size > 1 for d in given.plan) else []
    return f"What would help: {', '.join([*names, 'a smaller --resolution'][:MOST])}"


def _peak(run: Run, given: Given) -> int:
    return phases.estimate(run, given, _ANY, Length(1, 1)).deciding.peak
