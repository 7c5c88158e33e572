"""What --dry_run prints: one page."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

import torch

from library.data import plan
from library.estimate import relief
from library.estimate.ledger import Rates, Work
from library.estimate.phases import Estimate
from library.options.rooms import Run, SaveOptions
from library.training.given import Given
from library.training.saves import every_n_epochs
from library.training.state import Length

# of the time that operations would take at the rates of large products and copies: SDXL's step on an H100 takes 1.7
# times as long, small models' more (docs/performance.md)
SLOWEST = 3.0
OF_CUDA = 2**29  # bytes that CUDA itself takes, about


def lines(run: Run, given: Given, found: Estimate, rates: Rates | None, length: Length, drawings: int) -> Iterator[str]:
    """In 80 columns.

    :param rates: of this machine's card; None where there is none
    :param drawings: how often all samples are drawn
    """
    pictures = list(plan.pictures(given.plan))
    sizes = {one.fit.bucket for one in pictures}
    repeated = sum(dataset.appearances for dataset in given.plan)
    yield f"pictures     {len(pictures)}, {repeated} with repeats, in {len(sizes)} size{'s' * (len(sizes) > 1)}"
    yield f"steps        {length.steps} in {length.epochs} epoch{'s' * (length.epochs > 1)}"
    yield f"adapter      {found.parameters:,} parameters in {found.modules} layers; a file of {_size(found.file)}"
    yield ""
    deciding = found.deciding
    yield "memory of a card, at most (what CUDA itself takes, about 0.5 GiB, is not in it)"
    for phase in found.phases:
        mark = "  <- decides" if phase is deciding else ""
        tiles = f", or {_size(phase.least)} in tiles" if phase.least < phase.peak else ""
        yield f"  {phase.name:<18}{_size(phase.peak):>10}{tiles}{mark}"
    yield f"of {deciding.name}:"
    for what, size in deciding.parts.items():
        if size > 2**20:
            yield f"  {what:<18}{_size(size):>10}"
    yield from _beside_the_card(deciding.least, run, given)
    yield ""
    caches = run.data.caches
    yield f"host memory  {_size(found.host)} while the model is read, beside Python's own and this:"
    for what, size, on_disk in (
        ("latents", found.latents, caches.cache_latents_to_disk),
        ("texts", found.texts, caches.cache_text_encoder_outputs_to_disk),
    ):
        if size:
            yield f"             {what}: {_size(size)} kept {'on the disk instead' if on_disk else 'in it'}"
    files, states = saves_of(run.saves, length)
    yield f"disk         {files} file{'s' * (files > 1)} of {_size(found.file)}, together {_size(files * found.file)}"
    if states:
        yield f"             {states} state{'s' * (states > 1)} of {_size(found.state)} each"
    if given.samples and drawings:
        size = 3 * drawings * sum(one.width * one.height for one in given.samples)
        yield f"             {drawings * len(given.samples)} samples, up to {_size(size)}"
    yield ""
    if rates is None:
        yield "time         not known without the GPU"
        return
    yield "time         on this card, by its speed in products, copies and starts"
    for phase in found.phases:
        low, high = seconds_of(phase.work, rates)
        yield f"  {phase.name:<18}{_time(low * phase.times)} to {_time(high * phase.times)}"


def seconds_of(work: Work, rates: Rates) -> tuple[float, float]:
    """The least and the most that it may take: what bounds each operation, and what starting them takes."""
    starting = work.operations / rates.operations
    return max(work.busy, starting), SLOWEST * max(work.busy, 2 * starting)


def saves_of(options: SaveOptions, length: Length) -> tuple[int, int]:
    """How many adapter files and states there are at the end."""
    in_steps, in_epochs = options.save_every_n_steps, every_n_epochs(options, length)

    def left(last_steps: int | None, last_epochs: int | None) -> int:
        steps = (length.steps - 1) // in_steps if in_steps else 0
        if in_steps and last_steps is not None:
            steps = min(steps, last_steps // in_steps + 1)
        epochs = (length.epochs - 1) // in_epochs if in_epochs else 0
        return steps + (min(epochs, last_epochs) if last_epochs else epochs) + 1

    files = left(options.save_last_n_steps, options.save_last_n_epochs)
    if not options.save_state:
        return files, int(options.save_state_on_train_end)
    return files, left(
        options.save_last_n_steps_state or options.save_last_n_steps,
        options.save_last_n_epochs_state or options.save_last_n_epochs,
    )


def _beside_the_card(needed: int, run: Run, given: Given) -> Iterator[str]:
    if not torch.cuda.is_available():
        yield "this machine has no CUDA card"
        return
    free, whole = torch.cuda.mem_get_info()
    enough = needed + OF_CUDA < whole
    yield f"this card has {_size(whole)}, {_size(free)} are free{'' if enough else ': TOO LITTLE'}"
    if not enough:
        names = [what for what, *_ in relief.changes(run, given)]
        yield from textwrap.wrap(f"what would help: {', '.join([*names, 'a smaller --resolution'])}", 80)


def _size(number: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 2**10:.0f} KiB"


def _time(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
