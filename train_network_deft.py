"""Trains a DEFT adapter on a folder of images and saves it as a LoRA: `accelerate launch train_network_deft.py`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import library

if Path(library.__path__[0]).resolve() != Path(__file__).resolve().parent / "library":
    print(f"error: found another project's library/ at {library.__path__[0]}; take it off PYTHONPATH", file=sys.stderr)
    sys.exit(2)

from library.models.loading import load
from library.options.parse import parse
from library.options.rooms import Run
from library.training import given, metadata, prepare, start
from library.training.adapter import DeftAdapter
from library.training.loop import Length, TrainingLoop
from library.training.objective import objective_of
from library.training.samples import Samples
from library.training.saves import Saves, TrainingStopped
from networks.deft_config import DeftError

logger = logging.getLogger(__name__)


def train(run: Run) -> Path:
    """One training run; returns the file of the finished adapter.

    :raises DeftError: for mistakes in options, data or files, before the first step
    :raises TrainingStopped: when the training cannot go on, or its result cannot be written
    """
    start.log_from_main_process()
    files, folder = given.read(run), Path(run.output.output_dir)
    accelerator = start.accelerator_of(run.loop, run.output.logging_dir)
    seed = start.seed_everything(run.loop.seed)
    dtype = prepare.WEIGHT_DTYPES[run.loop.mixed_precision]
    model = load(run.model, dtype)
    objective = objective_of(run.objective, model)
    prepare.tell_what_is_cut(model, files.texts())
    data = prepare.cache_latents(run.data, files.images, model, accelerator)
    adapter = DeftAdapter(run.network, files, model, accelerator, folder)
    model.place(accelerator.device, dtype, encoders=True)
    adapter.module.to(accelerator.device)

    loader = prepare.batches(run.data, data, accelerator, seed)
    length = Length.of(run.loop, len(loader))
    groups, names = adapter.groups(run.optimizer)
    optimizer, schedule = prepare.optimizer_of(run.optimizer, groups, length.steps, accelerator)
    fields = metadata.of_training(run, model, adapter.module, data, length, seed)
    saves = Saves(run.output, adapter, fields, accelerator)
    samples = Samples(files.samples, model, adapter, accelerator, folder, run.output.output_name)
    if run.output.logging_dir:
        accelerator.init_trackers(run.output.output_name)

    parameters = sum(p.numel() for p in adapter.parameters())
    logger.info(f"training {parameters:,} parameters for {length.steps} steps in {length.epochs} epochs")
    loop = TrainingLoop(
        run.loop,
        accelerator,
        model,
        objective,
        seed,
        adapter,
        loader,
        optimizer,
        schedule,
        names,
        saves,
        samples,
        length,
    )
    loop.run()
    accelerator.end_training()
    file = saves.final(length.steps, length.epochs)
    loop.warn_where_nothing_moved()
    return file


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 2 for a mistake of the user's, 1 for a training that could not go on."""
    try:
        train(parse(sys.argv[1:] if argv is None else argv))
        return 0
    except DeftError as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except TrainingStopped as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
