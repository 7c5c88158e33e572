"""What a run is given in files, read once and before a model is loaded, so that mistakes cost seconds."""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from library import keep
from library.data import captions, plan
from library.data.index import Index
from library.data.plan import Plan
from library.data.remarks import Remarks
from library.models import quantised, samplers
from library.options.rooms import NetworkOptions, OptimizerOptions, PreservationOptions, Run
from library.prompts import Prompt, read_prompts
from library.training import inputs, optimizers, schedules, sharing, start, state
from library.training.state import Position, Setting
from networks import deft_io, deft_keep, deft_pictures
from networks.deft_config import DeftError, parse_options, user_options
from networks.deft_io import AdapterFile

logger = logging.getLogger(__name__)

METERED = 4  # prompts, at most


@dataclass(frozen=True)
class Given:
    """:param plan: the pictures, with their captions
    :param remarks: of what is not used of them, which the log has
    :param samples: what is drawn during the training
    :param to_keep: prompts of what the model is to go on drawing, where `keep` names such
    :param metered: prompts that drift is measured with
    :param start: the adapter that the training goes on from
    :param base: adapters that are merged first, with their strengths
    :param resumed: where a state was saved, and the setting then
    """

    plan: Plan
    remarks: Remarks
    samples: list[Prompt]
    to_keep: list[Prompt]
    metered: list[Prompt]
    start: AdapterFile | None
    base: list[tuple[AdapterFile, float]]
    resumed: tuple[Position, Setting] | None

    def texts(self) -> list[tuple[str, str]]:
        """Captions and prompts, each behind what a user knows it by."""
        found = [(str(one.path), captions.whole(one.caption, one.subset.captions)) for one in plan.pictures(self.plan)]
        return found + [(f"prompt {i + 1}", prompt.text) for i, prompt in enumerate(self.samples)]

    def texts_encoded(self, preservation: PreservationOptions) -> list[str]:
        """All that the text encoders are ever asked for, where captions are the same in every step."""
        texts = [text for _, text in self.texts()]
        of_class = [words for text in texts if (words := preservation.of_class(text))]
        of_drift = (prompt.text for prompt in self.metered)
        return [*texts, *of_class, *(prompt.negative for prompt in self.samples), *of_drift]


def read(run: Run) -> Given:
    """:raises DeftError: for network options, adapter files, pictures, prompts, rates and folders"""
    try:
        return _read(run)
    except OSError as error:  # a name that is too long, a folder that cannot be looked into
        raise DeftError(str(error)) from None


def _read(run: Run) -> Given:
    size, network = run.data.datasets[0].buckets.resolution, run.network
    sizes = {} if network.dim_from_weights else {"dim": network.network_dim, "alpha": network.network_alpha}
    keep_file = parse_options(user_options(network.network_args) | sizes).keep
    to_keep: list[Prompt] = []
    for kept in deft_keep.files_of(keep_file) if keep_file else ():
        if deft_keep.are_prompts(kept):
            to_keep += keep.read_prompts(kept, size, "--network_args keep")
        else:
            deft_keep.read_kept(kept)
    adapter = None if network.network_weights is None else deft_io.read_adapter(network.network_weights)
    base = [(deft_io.read_adapter(file), strength) for file, strength in network.base_weights]
    schedules.check(run.optimizer)  # and the optimizer
    _check_rates(run.optimizer, network)
    _check_writable("output_dir", run.saves.output_dir)
    _check_writable("logging_dir", run.logs.logging_dir)
    start.check_trackers(run.logs)
    if thumbnail := run.recorded.get(deft_pictures.THUMBNAIL):
        sharing.thumbnail_fields(thumbnail)
    if run.model.quantize_base:
        quantised.check_installed(run.model.quantize_base)
    file = finished_file(run)
    if file.is_dir():
        raise DeftError(f"--output_name {run.saves.output_name}: {file} is a folder")
    resumed = state.read(run.saves.resume) if run.saves.resume else None
    if run.saves.resume and resumed:
        state.check(run.saves.resume, resumed[1], run.optimizer)
        if not run.loop.max_train_epochs:  # what these make of the pictures is known later
            check_left(run, resumed[0], run.loop.max_train_steps)
    _tell_what_has_no_effect(run)
    prompts = run.samples.sample_prompts
    samples = [] if prompts is None else read_prompts(prompts, size)
    if samples:
        samplers.check(run.samples.sample_sampler, "--sample_sampler")
    for prompt in samples:
        samplers.check(prompt.sampler, f"--sample_prompts {prompts}: --ss")
    remarks = Remarks()
    pictures = plan.plan_of(run.data, Index(run.data.caches.folder), remarks)
    _check_captions(run, pictures, remarks)
    remarks.tell()
    samples = inputs.checked(run, pictures, samples)
    metered = [] if run.meters.meter_every_n_steps == 0 else _metered(to_keep, size)
    return Given(pictures, remarks, samples, to_keep, metered, adapter, base, resumed)


def _metered(to_keep: list[Prompt], size: tuple[int, int]) -> list[Prompt]:
    """Some of what is to be kept, from all over it; of configs/keep.txt where nothing is given."""
    possible = max(8, size[0] - size[0] % 8), max(8, size[1] - size[1] % 8)  # what else is wrong is told later
    found = to_keep or keep.read_prompts(keep.PROMPTS, possible)
    number = min(METERED, len(found))
    return [found[i * len(found) // number] for i in range(number)]


def _check_captions(run: Run, pictures: Plan, remarks: Remarks) -> None:
    """:raises DeftError: for captions that cannot be made as the options ask"""
    for subset, group in plan.by_subset(plan.pictures(pictures)):
        texts = [picture.caption for picture in group]
        for line in captions.problems(subset.captions, texts, run.model.weighted_captions):
            remarks.add(f"{subset.name}: {line}", subset.place)
    asked = run.preservation
    if asked.diff_output_preservation_class is not None and not any(
        asked.of_class(text)
        for picture in plan.pictures(pictures)
        for text in (picture.caption, captions.whole(picture.caption, picture.subset.captions))  # a prefix may have it
    ):
        raise DeftError(f"--trigger_word {asked.trigger_word}: no caption has it, so that nothing would be preserved")


def finished_file(run: Run) -> Path:
    """Of the whole training's adapter."""
    return Path(run.saves.output_dir, f"{run.saves.output_name}.safetensors")


def check_left(run: Run, position: Position, steps: int) -> None:
    """:param steps: of the whole training
    :raises DeftError: where --resume has nothing left to do
    """
    epochs = run.loop.max_train_epochs
    option = f"--max_train_epochs {epochs} ({steps} steps)" if epochs else f"--max_train_steps {steps}"
    state.check_left(str(run.saves.resume), position, steps, option, finished_file(run))


def _check_rates(rates: OptimizerOptions, network: NetworkOptions) -> None:
    trained: list[float | None] = []
    if not network.network_train_text_encoder_only:
        trained.append(rates.unet_lr)
    if not network.network_train_unet_only:
        trained += rates.text_encoder_lr or [None]
    given = [rates.learning_rate if rate is None else rate for rate in trained]
    if not any(given):
        raise DeftError("nothing to train: every learning rate is 0 (--learning_rate, --unet_lr, --text_encoder_lr)")
    optimizers.check_rates(rates, given)


def _tell_what_has_no_effect(run: Run) -> None:
    """What was asked for and does nothing beside the other options."""
    loop, network, rates, saves = run.loop, run.network, run.optimizer, run.saves
    by_epochs = saves.save_every_n_epochs or saves.save_n_epoch_ratio
    drawn = loop.sample_at_first or loop.sample_every_n_steps or loop.sample_every_n_epochs
    without_effect = {
        "--sample_prompts draws nothing without --sample_every_n_steps, --sample_every_n_epochs, --sample_at_first":
            run.samples.sample_prompts and not drawn,
        "--sample_every_n_steps and the like draw nothing without --sample_prompts":
            drawn and not run.samples.sample_prompts,
        "--text_encoder_lr has no effect with --network_train_unet_only":
            network.network_train_unet_only and any(rates.text_encoder_lr),
        "--unet_lr has no effect with --network_train_text_encoder_only":
            network.network_train_text_encoder_only and rates.unet_lr,
        "--save_state saves but the last without --save_every_n_steps, --save_every_n_epochs or --save_n_epoch_ratio":
            saves.save_state and not (saves.save_every_n_steps or by_epochs),
        "--save_last_n_epochs has no effect without --save_every_n_epochs or --save_n_epoch_ratio":
            saves.save_last_n_epochs and not by_epochs,
        "--save_last_n_steps has no effect without --save_every_n_steps":
            saves.save_last_n_steps is not None and not saves.save_every_n_steps,
        "--save_last_n_epochs_state and --save_last_n_steps_state have no effect without --save_state":
            (saves.save_last_n_epochs_state or saves.save_last_n_steps_state) and not saves.save_state,
        "--validate_every_n_steps and the like do nothing without --validation_split":
            not run.validation.validation_split and (
                loop.validate_every_n_steps or loop.validate_every_n_epochs or run.validation.max_validation_steps),
        "--network_dim has no effect with --dim_from_weights": network.dim_from_weights and network.network_dim,
    }  # fmt: skip
    for line, is_so in without_effect.items():
        if is_so:
            logger.warning(line)


def _check_writable(option: str, folder: str | None) -> None:
    if folder is None:
        return
    path = Path(os.path.realpath(folder))
    existing = next(p for p in (path, *path.parents) if p.exists())
    try:  # what os.access says is not true of every system
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise DeftError(
            f"--{option} {folder}: {existing} is not a folder that can be written to ({error.strerror})"
        ) from None
