"""What is trained: the interface that the loop knows, and networks.deft behind it."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from library import keep
from library.models.family import Family
from library.models.lending import on_device
from library.options.rooms import NetworkOptions, OptimizerOptions
from library.prompts import Prompt
from library.training.given import Given
from networks import deft, deft_factors, deft_io, deft_keep, deft_weights
from networks.deft_config import DeftError

logger = logging.getLogger(__name__)


class Adapter(Protocol):
    """What the loop, the samples and the saves ask of an adapter that has been attached to a model."""

    @property
    def module(self) -> nn.Module:
        """That holds its parameters; in training mode or not."""
        ...

    def fields(self) -> dict[str, object]:
        """`ss_...` of a file's metadata: its size and options."""
        ...

    def groups(self, rates: OptimizerOptions) -> tuple[list[dict[str, Any]], list[str]]:
        """Parameter groups for an optimizer, and their names. The model has been placed by now: in the training's
        precision, with all that is part of it."""
        ...

    def parameters(self) -> Iterable[nn.Parameter]:
        """Those that are trained."""
        ...

    def start_epoch(self) -> None: ...

    def start_step(self, ahead: bool) -> None:
        """:param ahead: what the last step has come to is not known yet; one that is not finite is left out"""
        ...

    def skip_pass(self) -> None:
        """Another process has pictures in this step, this one has none."""
        ...

    def after_step(self) -> None: ...

    def set_multiplier(self, multiplier: float) -> None:
        """At 0, the model computes as if there were no adapter."""
        ...

    def save(self, path: Path, dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
        """Whole or not at all.

        :raises DeftError: when it is not finite or cannot be written
        """
        ...

    def apart(self, path: Path) -> tuple[str, float]:
        """The layer of a saved file that is furthest from what this computes with, and how far: a share of the layer's
        own change, or of a thousandth of the largest one's, where that is more.

        :raises DeftError: when the file cannot be read, or lacks a layer
        """
        ...


# from the options, what is given in files, the model that is loaded and not yet placed, and the folder of the output
AdapterOf: TypeAlias = Callable[[NetworkOptions, Given, Family, Accelerator, Path], Adapter]


def merge_base(files: Given, model: Family) -> None:
    """--base_weights, into the model.

    :raises DeftError: for files that do not fit it
    """
    for file, strength in files.base:
        parts = model.text_encoders, model.denoiser
        deft.network_of_adapter(strength, file, *parts, for_inference=True).merge_to(*parts, file.tensors)


class DeftAdapter:
    """networks.deft on a Stable Diffusion model.

    :param folder: where directions to keep are left for later trainings
    :raises DeftError: for options or files that do not fit the model
    """

    def __init__(self, options: NetworkOptions, given: Given, model: Family, accelerator: Accelerator, folder: Path):
        self.model, self.max_norm, self.options = model, options.scale_weight_norms, options
        self.device = accelerator.device
        encoder, unet = model.text_encoders, model.denoiser
        network_args = dict(options.network_args)
        if given.to_keep:
            source = f"keep={network_args['keep']}"
            made = _directions(given.to_keep, source, model, accelerator, folder)
            others = [file for file in deft_keep.files_of(network_args["keep"]) if not deft_keep.are_prompts(file)]
            network_args["keep"] = ",".join([str(made), *others])
        if options.dim_from_weights and given.start is not None:
            self.module = deft.network_of_adapter(1.0, given.start, encoder, unet, **network_args)
        else:
            sizes = options.network_dim, options.network_alpha
            self.module = deft.create_network(1.0, *sizes, None, encoder, unet, **network_args)
        self.module.prepare_network(Namespace(scale_weight_norms=options.scale_weight_norms))
        only_unet, only_encoder = options.network_train_unet_only, options.network_train_text_encoder_only
        self.module.apply_to(encoder, unet, not only_unet, not only_encoder)
        if given.start is not None:
            logger.info(str(self.module.load_adapter(given.start)))

    def fields(self) -> dict[str, object]:
        """See `Adapter`."""
        args = {key: value for key, value in self.options.network_args.items() if key != "neuron_dropout"}
        config = self.module.config
        return {
            "ss_network_dim": config.dim, "ss_network_alpha": config.alpha, "ss_network_args": json.dumps(args)
        }  # fmt: skip

    def groups(self, rates: OptimizerOptions) -> tuple[list[dict[str, Any]], list[str]]:
        """See `Adapter`."""
        encoders = len(self.module.modules_of_encoders)
        if 0 < encoders < len(rates.text_encoder_lr):
            logger.warning(
                f"--text_encoder_lr: {len(rates.text_encoder_lr)} rates for {encoders}; the last have no effect"
            )
        if not self.model.text_encoders and any(rates.text_encoder_lr):
            logger.warning("--text_encoder_lr: without effect, this model has no text encoder")
        return self.module.prepare_optimizer_params_with_multiple_te_lrs(
            rates.text_encoder_lr or None, rates.unet_lr, rates.learning_rate
        )

    def parameters(self) -> Iterable[nn.Parameter]:
        """See `Adapter`."""
        return [p for p in self.module.get_trainable_params() if p.requires_grad]

    def start_epoch(self) -> None:
        """See `Adapter`."""
        self.module.on_epoch_start(self.model.text_encoders, self.model.denoiser)

    def start_step(self, ahead: bool) -> None:
        """See `Adapter`."""
        self.module.runs_ahead = ahead
        self.module.on_step_start(self.model.text_encoders, self.model.denoiser)

    def skip_pass(self) -> None:
        """See `Adapter`."""
        self.module.check_bases()

    def after_step(self) -> None:
        """See `Adapter`; scales deltas above --scale_weight_norms down."""
        if self.max_norm:
            self.module.limit_norms(self.max_norm)

    def set_multiplier(self, multiplier: float) -> None:
        """See `Adapter`."""
        if multiplier != self.module.multiplier:  # hundreds of layers
            self.module.set_multiplier(multiplier)

    def save(self, path: Path, dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
        """See `Adapter`."""
        self.module.save_weights(str(path), dtype, metadata)

    @torch.no_grad()
    def apart(self, path: Path) -> tuple[str, float]:
        """See `Adapter`."""
        file = deft_io.read_adapter(path)
        sizes, errors = {}, {}
        for module in self.module.all_modules:
            layer = file.layer_of(module.target)
            if layer is None:
                raise DeftError(f"{path}: lacks {module.lora_name}")
            up, down = (part.cpu().double() for part in module.lora_factors())
            read_up, read_down = (p.cpu().double() for p in deft_io.factors_of(layer, module.base_weight))
            sizes[module.lora_name] = float(deft_factors.norm(up, down))
            difference = torch.cat([read_up, -up], 1), torch.cat([read_down, down])
            errors[module.lora_name] = float(deft_factors.norm(*difference))
        least = max(sizes.values()) / 1000
        shares = {name: error / (max(sizes[name], least) or 1.0) for name, error in errors.items()}
        worst = max(shares, key=lambda name: math.inf if math.isnan(shares[name]) else shares[name])
        return worst, shares[worst]


def _directions(prompts: list[Prompt], source: str, model: Family, accelerator: Accelerator, folder: Path) -> Path:
    """The file of `library.keep` for these prompts, made once a base model and folder.

    :param source: of the prompts, for messages
    :raises DeftError: when it cannot be made or written
    """
    parts = (*model.text_encoders, model.denoiser)
    weights = (pair for part in parts for pair in _weights(part))
    made_of = f"{deft_io.base_fingerprint(weights)} {prompts} {keep.DIRECTIONS}"
    file = folder / f"keep-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}.safetensors"
    with accelerator.main_process_first():
        if file.is_file():
            logger.info(f"{source}: {file} is of this base model and these prompts")
            return file
        logger.info(f"{source}: drawing {len(prompts)} pictures with the base model, once, to make {file}")
        drawn_with = [one for one in model.pipeline.components.values() if isinstance(one, nn.Module)]
        with on_device(drawn_with, accelerator.device), accelerator.autocast():
            keep.write(keep.directions_to_keep(model.pipeline, prompts, keep.DIRECTIONS), file)
    return file


def _weights(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in part.named_parameters():
        layer = part.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, nn.Linear) and parameter is layer.weight and deft_weights.is_quantised(layer):
            yield name, deft_weights.read_weight(layer)
        elif parameter.dim() > 1:
            yield name, parameter
