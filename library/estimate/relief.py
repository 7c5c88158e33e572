"""A device's memory that has run out: said once, with what would help."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from library.estimate import phases
from library.models.loading import outline_of
from library.options.rooms import Run
from library.training import start
from library.training.given import Given
from library.training.saves import TrainingStopped
from library.training.state import Length
from networks.deft_config import reason_of

logger = logging.getLogger(__name__)

_TOLD = ("MPS backend out of memory", "DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough",
         "CUDA error: out of memory")  # fmt: skip  # the last: of the host's, that is locked for a card
MOST = 3  # settings that are named
LEAST = 2**26  # bytes that are worth it
SECONDS = 50.0  # that figures may take


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
        reason, of_card = reason_of(error), isinstance(error, torch.OutOfMemoryError)
    raise TrainingStopped(f"{line}. {_helps(run, given, phase, of_card)} ({reason})")


def is_out_of_memory(error: BaseException) -> bool:
    """Of a card, of MPS, or of the host."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(line in str(error) for line in _TOLD)


def changes(
    run: Run, given: Given, phase: str = phases.TRAINING, of_card: bool = True
) -> Iterator[tuple[str, Run, Given]]:
    """Settings that are not in use, go together with the others and take less memory in a phase: what saves most
    usually comes first. Each with what it makes of the options and files.

    :param of_card: whether the memory is a card's: else the host's is no other
    """
    model, process, caches, network = run.model, run.process, run.data.caches, run.network

    def cached(**to: Any) -> Run:
        return replace(run, data=replace(run.data, caches=replace(caches, **to)))

    if phase == phases.LATENTS:
        if caches.vae_batch_size > 1:
            yield "--vae_batch_size 1", cached(vae_batch_size=1), given
        return
    if phase == phases.TEXTS and (caches.text_encoder_batch_size or 1) > 1:
        yield "--text_encoder_batch_size 1", cached(text_encoder_batch_size=1), given
    if process.mixed_precision == "no" and (torch.cuda.is_available() or not torch.backends.mps.is_available()):
        yield "--mixed_precision bf16", replace(run, process=replace(process, mixed_precision="bf16")), given
    if phase == phases.TEXTS:
        return
    if not model.gradient_checkpointing:
        yield "--gradient_checkpointing", replace(run, model=replace(model, gradient_checkpointing=True)), given
    if any(dataset.options.batch_size > 1 for dataset in given.plan):
        one = tuple(replace(d, options=replace(d.options, batch_size=1)) for d in given.plan)
        yield "--train_batch_size 1", run, replace(given, plan=one)
    if process.mixed_precision != "no" and not (model.fp8_base or model.quantize_base or model.torch_compile):
        yield "--fp8_base", replace(run, model=replace(model, fp8_base=True)), given
    half = 0
    if of_card and model.gradient_checkpointing and not (model.blocks_to_swap or model.torch_compile):
        half = len(phases.empty_model(run).swappable()) // 2
    if half:
        yield f"--blocks_to_swap {half}", replace(run, model=replace(model, blocks_to_swap=half)), given
    if of_card and model.gradient_checkpointing and not model.cpu_offload_checkpointing:
        yield "--cpu_offload_checkpointing", replace(run, model=replace(model, cpu_offload_checkpointing=True)), given
    changing = any(subset.captions.changing for dataset in run.data.datasets for subset in dataset.subsets)
    may_keep = not (caches.cache_text_encoder_outputs or changing or network.network_train_text_encoder_only)
    if may_keep and outline_of(run.model).encoders:
        names = [] if network.network_train_unet_only else ["--network_train_unet_only"]
        kept = replace(cached(cache_text_encoder_outputs=True), network=replace(network, network_train_unet_only=True))
        yield " ".join([*names, "--cache_text_encoder_outputs"]), kept, given
    if (network.network_dim or 4) >= 16 and not network.dim_from_weights:
        half = (network.network_dim or 4) // 2
        yield f"--network_dim {half}", replace(run, network=replace(network, network_dim=half)), given
    plain = run.optimizer.optimizer_type == "AdamW" and not run.optimizer.optimizer_args
    if plain and torch.cuda.is_available() and importlib.util.find_spec("bitsandbytes"):
        eight = replace(run.optimizer, optimizer_type="AdamW8bit")
        yield "--optimizer_type AdamW8bit", replace(run, optimizer=eight), given


def _helps(run: Run, given: Given, phase: str, of_card: bool) -> str:
    """What would save most; without figures where they cannot be had, or not in `SECONDS`."""
    asked = {phase if phase in phases.PHASES else phases.TRAINING}
    if phases.TRAINING in asked and given.samples:
        asked.add(phases.SAMPLES)
    possible, found = list(changes(run, given, phase, of_card)), []
    begin, now = time.monotonic(), 0
    try:
        now = _needed(run, given, asked)
        for number, (what, changed, files) in enumerate(possible, 2):
            if (time.monotonic() - begin) * number / (number - 1) > SECONDS:
                break
            found.append((now - _needed(changed, files, asked), what))
    except Exception as error:  # whatever: the message counts
        logger.debug(f"no estimate ({reason_of(error)})")
    figures = [f"{what} (saves {_told_size(size)})" for size, what in sorted(found, reverse=True) if size >= LEAST]
    others = [what for what, *_ in possible[len(found) :]]
    told = f"What would help: {', '.join([*figures, *others, 'a smaller --resolution'][:MOST])}"
    return f"It needs about {_told_size(now)}. {told}" if now else told


def _told_size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _needed(run: Run, given: Given, asked: set[str]) -> int:
    model = phases.empty_model(run)
    return phases.estimate(run, given, model, None, Length(1, 1), asked=asked).deciding.least
