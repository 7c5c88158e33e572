"""Trains a DEFT adapter on a folder of images and saves it as a LoRA: `accelerate launch train_network_deft.py`."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if sys.platform == "linux":  # before torch reads it: blocks that come and go leave less memory unused
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

from torch.utils.data import Dataset

import library

if Path(library.__path__[0]).resolve() != Path(__file__).resolve().parent / "library":
    print(f"error: found another project's library/ at {library.__path__[0]}; take it off PYTHONPATH", file=sys.stderr)
    sys.exit(2)

from library.data import advice
from library.data.advice import Facts
from library.data.batches import Loader
from library.data.plan import divided, pictures
from library.estimate import page, phases, rates, relief
from library.models import compiling
from library.models.family import Family
from library.models.loading import load
from library.options.parse import parse
from library.options.rooms import Run
from library.report.report import Report
from library.report.told import Told
from library.training import given, inputs, interrupts, metadata, meters, naming, prepare, preview, start, state
from library.training.adapter import AdapterOf, DeftAdapter, merge_base
from library.training.given import Given
from library.training.interrupts import EndedAtOnce, Interrupted, Interrupts
from library.training.loop import TrainingLoop
from library.training.losses import Losses
from library.training.objective import Objective, objective_of
from library.training.optimizers import evaluated, optimizer_of
from library.training.record import Record
from library.training.samples import Samples
from library.training.saves import Saves, TrainingStopped, planned
from library.training.schedules import schedule_of
from library.training.sharing import sharing_of
from library.training.state import Length, Position, Setting
from library.training.texts import Texts
from library.training.validation import Validation
from library.training.watch import watch_of
from networks.deft_config import DeftError

logger = logging.getLogger(__name__)


def train(run: Run, adapter_of: AdapterOf = DeftAdapter) -> Path:
    """One training run; returns the file of the finished adapter.

    :param adapter_of: puts another adapter on the model, to be trained on the same data, noise and steps
    :raises DeftError: for mistakes in options, data or files, before the first step
    :raises TrainingStopped: when the training cannot go on, or its result cannot be written
    :raises Interrupted: when a signal has ended it, after saving
    :raises EndedAtOnce: when a signal has ended it before the first step, or a second one has
    """
    start.log_messages(run.logs)
    with Interrupts() as signals, Told() as told:
        return _train(run, signals, told, adapter_of)


def show(run: Run) -> None:
    """--debug_dataset: a page of what would be trained on, in place of the training.

    :raises DeftError: for mistakes in options, data or files
    """
    start.log_messages(run.logs)
    files = given.read(run)
    if start.is_main_process():
        for file in preview.write(run, files):
            print(file)


def dry_run(run: Run) -> None:
    """--dry_run: a page of what a training would take, in its place.

    :raises DeftError: for mistakes in options, data or files
    """
    start.log_messages(run.logs)
    files = given.read(run)
    accelerator, seed = start.accelerator_of(run.process, run.logs)
    model = phases.empty_model(run)
    objective = _objective(run, files, model)
    if not accelerator.is_main_process:
        return
    files = replace(files, plan=prepare.readable(run.data, files.plan))
    trained, _ = divided(files.plan, seed)
    accumulated, processes = run.loop.gradient_accumulation_steps, accelerator.num_processes
    length = Length.of(run.loop, len(Loader(trained, Dataset(), seed, 0, processes, accumulated)))
    if run.saves.resume and files.resumed:
        given.check_left(run, files.resumed[0], length.steps)
    found = rates.measured(prepare.WEIGHT_DTYPES[run.process.mixed_precision])
    run = replace(run, objective=objective.options)
    estimate = phases.estimate(run, replace(files, plan=trained), model, found, length, _drawings(run, length))
    for line in page.lines(run, files, estimate, found, length, _drawings(run, length)):
        print(line)
    start.end_trackers(accelerator)


def _objective(run: Run, files: Given, model: Family) -> Objective:
    """What is trained towards, once the options and files have been held against the model.

    :raises DeftError: for what the model's family does not do, and for sizes that it cannot have
    """
    objective = objective_of(run.objective, model)
    prepare.check_text_encoders(model, run.network, run.data.caches)
    prepare.check_sizes(files.plan, model.multiple_of)
    prepare.tell_what_is_cut(model, files.texts())
    prepare.tell_what_is_rounded(model, files.samples)
    return objective


def _drawings(run: Run, length: Length) -> int:
    """How often all samples are drawn."""
    loop = run.loop
    steps = length.steps // loop.sample_every_n_steps if loop.sample_every_n_steps else 0
    epochs = length.epochs // loop.sample_every_n_epochs if loop.sample_every_n_epochs else 0
    return steps + epochs + loop.sample_at_first


def _train(run: Run, signals: Interrupts, told: Told, adapter_of: AdapterOf) -> Path:
    files, folder = given.read(run), Path(run.saves.output_dir)
    accelerator, seed = start.accelerator_of(run.process, run.logs)
    dtype = prepare.WEIGHT_DTYPES[run.process.mixed_precision]
    model = load(run.model, dtype)
    if run.model.torch_compile:
        compiling.check(model.denoiser, run.model.torch_compile, accelerator.device)
    objective, texts = _objective(run, files, model), Texts(model, accelerator)
    run = replace(run, objective=objective.options)

    with relief.told(run, files, "caching latents", lambda: "nothing is trained yet"):
        shown = inputs.encoded(files.samples, model, run.data, accelerator.device)
        plan, latents = prepare.read_pictures(run.data, files.plan, model, accelerator)
    merge_base(files, model)
    base = meters.base_of(model) if files.metered else ""
    with relief.told(run, files, "quantising the model", lambda: "nothing is trained yet"):
        model.quantise(accelerator.device, dtype)
    with relief.told(run, files, "making the adapter, with what it keeps", lambda: "nothing is trained yet"):
        adapter = adapter_of(run.network, files, model, accelerator, folder)
    caches = run.data.caches
    if caches.cache_text_encoder_outputs:
        with relief.told(run, files, "caching texts", lambda: "nothing is trained yet"):
            texts.keep(files.texts_encoded(run.preservation), dtype, caches)
    with relief.told(run, files, "placing the model", lambda: "nothing is trained yet"):
        model.place(accelerator.device, dtype, encoders=not caches.cache_text_encoder_outputs)
    accelerator.prepare_model(adapter.module, evaluation_mode=True)

    trained, kept = divided(plan, seed)
    weight = run.preservation.prior_loss_weight
    loading = functools.partial(prepare.loader_of, weight=weight, latents=latents, model=model, accelerator=accelerator)
    loader = loading(trained, seed, run.loop.gradient_accumulation_steps)
    length = Length.of(run.loop, len(loader))
    loader.steps = length.steps
    advice.tell(Facts(loader, kept, run.preservation.trigger_word, latents.duplicates(plan)))
    groups, names = adapter.groups(run.optimizer)
    optimizer = accelerator.prepare(optimizer_of(run.optimizer, groups))
    schedule = schedule_of(run.optimizer, optimizer, length.steps)
    accelerator.register_for_checkpointing(schedule)
    averaged = functools.partial(evaluated, optimizer)
    setting = Setting.of(run, trained, latents.contents, seed, accelerator.num_processes, len(loader))
    position, record = Position(), Record()
    if run.saves.resume and files.resumed:
        position, then = files.resumed
        given.check_left(run, position, length.steps)
        state.restore(run.saves.resume, then, setting, accelerator)
        record = Record.read(Path(run.saves.resume))

    losses = Losses(model, adapter, texts, objective, run.preservation, accelerator)
    validation = None
    if kept:
        options = run.validation
        noise = seed if options.validation_seed is None else options.validation_seed
        validation = Validation(
            loading(kept, noise, shuffle=False), losses, adapter, noise, options.max_validation_steps
        )
    an_epoch = loader.steps_an_epoch
    untrained = "nothing is trained yet"
    with relief.told(run, files, "measuring the base model", lambda: untrained), compiling.told(lambda: untrained):
        watch = functools.partial(watch_of, run.data.datasets, run.network, run.optimizer, length.steps)
        measuring = meters.meters_of(
            run.meters, caches, watch, files.metered, base, trained, loading, losses, length.steps,
            loader.pictures / an_epoch, planned(run.saves, length, an_epoch),
        )  # fmt: skip
    fields = metadata.of_training(run, model, adapter, trained, length, seed)
    shared = sharing_of(run, record, files.samples, fields)
    report = Report(
        run.report, folder, run.saves.output_name, run.model.pretrained_model_name_or_path, files.samples,
        [one.path for one in pictures(trained)], length, position, record, told, accelerator.is_main_process,
    )  # fmt: skip
    saves = Saves(
        run.saves, adapter, fields, setting, length, record, shared, averaged, accelerator, measuring, report.write
    )
    samples = Samples(
        files.samples, model, texts, adapter, accelerator, folder, run.saves.output_name, run.samples.sample_sampler,
        shown, record,
    )  # fmt: skip
    start.start_trackers(accelerator, run.logs, run.recorded)

    parameters = sum(p.numel() for p in adapter.parameters())
    logger.info(f"training {parameters:,} parameters for {length.steps} steps in {length.epochs} epochs")
    loop = TrainingLoop(
        run.loop, accelerator, losses, seed, adapter, loader, optimizer, schedule, names, averaged, saves, samples,
        validation, length, position, record, signals, report, measuring,
    )  # fmt: skip
    signals.hold(saves.described)
    try:
        with relief.told(run, files, "training", saves.described), compiling.told(saves.described):
            loop.run()
        file = saves.final(position)  # a signal that came in the last step or comes now changes nothing
        named = naming.best(record, folder)
        if named:
            logger.info(named.line())
        report.write("finished")
    except EndedAtOnce as ended:
        report.write(str(ended))
        raise
    except Exception as error:
        report.write(str(error))
        start.end_trackers(accelerator)
        raise
    start.end_trackers(accelerator)
    return file


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, 2 for a mistake of the user's, 1 for a training that could not go on, 128 and a signal's number."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        run = parse(argv)
        (dry_run if run.process.dry_run else show if run.data.debug_dataset else train)(run)
        return 0
    except DeftError as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except TrainingStopped as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Interrupted as ended:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(interrupts.how_to_go_on(ended, argv), file=sys.stderr)
        return ended.exit_code
    except EndedAtOnce as ended:
        print(ended, file=sys.stderr)
        return ended.exit_code
    except KeyboardInterrupt:  # while options were read
        print("interrupted: nothing had been trained yet", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
