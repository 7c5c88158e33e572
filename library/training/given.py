"""What a run is given in files, read once and before a model is loaded, so that mistakes cost seconds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from library import keep
from library.data.folders import TrainImage, find_images
from library.options.rooms import NetworkOptions, OptimizerOptions, Run
from library.prompts import Prompt, read_prompts
from networks import deft_io
from networks.deft_config import DeftError, parse_options, user_options
from networks.deft_io import AdapterFile


@dataclass(frozen=True)
class Given:
    """:param samples: what is drawn during the training
    :param to_keep: prompts of what the model is to go on drawing, where `keep` names such
    :param start: the adapter that the training goes on from
    :param base: adapters that are merged first, with their strengths
    """

    images: list[TrainImage]
    samples: list[Prompt]
    to_keep: list[Prompt]
    start: AdapterFile | None
    base: list[tuple[AdapterFile, float]]

    def texts(self) -> dict[str, str]:
        """What a user knows a text by -> the text, of captions and prompts."""
        captions = {str(image.path): image.caption for image in self.images}
        return captions | {f"prompt {i + 1}": prompt.text for i, prompt in enumerate(self.samples)}


def read(run: Run) -> Given:
    """:raises DeftError: for network options, adapter files, pictures, prompts, rates and folders"""
    size, network = run.data.resolution, run.network
    sizes = {} if network.dim_from_weights else {"dim": network.network_dim, "alpha": network.network_alpha}
    keep_file = parse_options(user_options(network.network_args) | sizes).keep
    to_keep: list[Prompt] = []
    if keep_file is not None and deft_io.are_prompts(keep_file):
        to_keep = keep.read_prompts(keep_file, size, "--network_args keep")
    elif keep_file is not None:
        deft_io.read_kept(keep_file)
    start = None if network.network_weights is None else deft_io.read_adapter(network.network_weights)
    base = [(deft_io.read_adapter(file), strength) for file, strength in network.base_weights]
    _check_rates(run.optimizer, network)
    for option in ("output_dir", "logging_dir"):
        _check_writable(option, getattr(run.output, option))
    prompts = run.output.sample_prompts
    samples = [] if prompts is None else read_prompts(prompts, size)
    return Given(find_images(run.data.train_data_dir, run.data.caption_extension), samples, to_keep, start, base)


def _check_rates(rates: OptimizerOptions, network: NetworkOptions) -> None:
    trained = []
    if not network.network_train_text_encoder_only:
        trained.append(rates.unet_lr)
    if not network.network_train_unet_only:
        trained.append(rates.text_encoder_lr)
    if not any(rates.learning_rate if rate is None else rate for rate in trained):
        raise DeftError("nothing to train: every learning rate is 0 (--learning_rate, --unet_lr, --text_encoder_lr)")


def _check_writable(option: str, folder: str | None) -> None:
    if folder is None:
        return
    path = Path(folder).resolve()
    existing = next(p for p in (path, *path.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise DeftError(f"--{option} {folder}: {existing} is not a folder that can be written to")
