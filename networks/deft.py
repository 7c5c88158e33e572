"""The face of DEFT for sd-scripts and musubi-tuner: `--network_module networks.deft`.

Functions and methods stand in the order in which a trainer calls them; `docs/sd-scripts.md` and `docs/musubi.md` show
how to use them. Where both trainers call the same method, one signature takes what each passes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from networks import deft_factors, deft_io, deft_keep, deft_load, deft_save, deft_weights
from networks.deft_architectures import Part, base_metadata, recognise
from networks.deft_batch import BatchedFactors
from networks.deft_config import DeftConfig, DeftError, options_of_file, parse_options, user_options
from networks.deft_io import AdapterFile
from networks.deft_load import LoadResult
from networks.deft_module import DeftModule
from networks.deft_names import looks_made_for
from networks.deft_progress import progress
from networks.deft_ranks import Ranks
from networks.deft_targets import as_list
from networks.deft_weights import add_to_weight

logger = logging.getLogger(__name__)


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: nn.Module | None,
    text_encoder: nn.Module | Sequence[nn.Module] | None,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> DeftNetwork:
    """A fresh network; `kwargs` are the strings of `--network_args`.

    :raises DeftError: for an unknown or wrong option, or a model that is not adapted
    """
    options = user_options(kwargs) | {"dim": network_dim, "alpha": network_alpha}
    if neuron_dropout is not None:
        options["neuron_dropout"] = neuron_dropout
    return DeftNetwork(text_encoder, unet, multiplier, parse_options(options))


def create_network_from_weights(
    multiplier: float,
    file: str | None,
    vae: nn.Module | None,
    text_encoder: nn.Module | Sequence[nn.Module] | None,
    unet: nn.Module,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    **kwargs: Any,
) -> tuple[DeftNetwork, Mapping[str, Tensor]]:
    """A network with the layers, ranks and options of a file, and the file's tensors, which are not loaded yet.

    :param kwargs: options that override the file's; `--network_dim` and `--network_alpha` do not apply
    :raises DeftError: when the file cannot be read or fits none of the model's layers
    """
    adapter = (
        deft_io.read_adapter(file)
        if weights_sd is None and file is not None
        else deft_io.parse_adapter(weights_sd or {}, {}, "the given weights")
    )
    return network_of_adapter(multiplier, adapter, text_encoder, unet, for_inference, **kwargs), adapter.tensors


def create_arch_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: nn.Module | None,
    text_encoders: Sequence[nn.Module] | None,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> DeftNetwork:
    """`create_network` as musubi-tuner calls it, without text encoders."""
    return create_network(multiplier, network_dim, network_alpha, vae, text_encoders, unet, neuron_dropout, **kwargs)


def create_arch_network_from_weights(
    multiplier: float,
    weights_sd: Mapping[str, Tensor],
    text_encoders: Sequence[nn.Module] | None = None,
    unet: nn.Module | None = None,
    for_inference: bool = False,
    **kwargs: Any,
) -> DeftNetwork:
    """`create_network_from_weights` as musubi-tuner calls it: the network alone, of a file's tensors.

    :raises DeftError: when the tensors are no adapter's, or fit none of the model's layers
    """
    if unet is None:
        raise DeftError("create_arch_network_from_weights: give the model, unet=...")
    return create_network_from_weights(
        multiplier, None, None, text_encoders, unet, weights_sd, for_inference, **kwargs
    )[0]


def prepare_network(network: DeftNetwork, args: Any) -> None:
    """The network's own. musubi-tuner asks the module whether there is one, and then calls the network's."""
    network.prepare_network(args)


def network_of_adapter(
    multiplier: float,
    adapter: AdapterFile,
    text_encoder: nn.Module | Sequence[nn.Module] | None,
    unet: nn.Module,
    for_inference: bool = False,
    **kwargs: Any,
) -> DeftNetwork:
    """`create_network_from_weights` for a file that has been read."""
    largest = max(adapter.layers.values(), key=lambda layer: layer.trained_rank)
    sizes = {
        "dim": largest.trained_rank,
        "alpha": largest.scale * largest.trained_rank,
    }  # for the record: each layer has its own
    kept = options_of_file(adapter.options)
    config = parse_options(sizes | kept | user_options(kwargs))
    if for_inference:  # as a plain LoRA: exact for every form, on any base model, and without dropout
        config = replace(config, basis="qr", para=False, gate=False, removal=0.0, freeze_basis=False, keep=None)
        config = replace(config, neuron_dropout=0.0, rank_dropout=0.0, module_dropout=0.0)
    return DeftNetwork(text_encoder, unet, multiplier, config, source=adapter)


class DeftNetwork(nn.Module):
    """The adapters of one model: a U-Net's and its text encoders'.

    :param source: a file that layers and ranks are taken from, instead of from the options
    :raises DeftError: when no layer at all is adapted, or for an option that is not for this model
    """

    def __init__(
        self,
        text_encoder: nn.Module | Sequence[nn.Module | None] | None,
        unet: nn.Module,
        multiplier: float,
        config: DeftConfig,
        source: AdapterFile | None = None,
    ):
        super().__init__()
        self.multiplier, self.config = multiplier, config
        self.is_tracked = False
        # set by a trainer before `on_step_start`: it does not know yet what the step before has come to, and leaves out
        # one whose loss or gradients are not finite; bases are then looked after without waiting for the device
        self.runs_ahead = False
        self._batches: list[BatchedFactors] = []
        self._steps_begun = 0
        self._grad_norms: Tensor | None = None
        self._weight_norms: Tensor | None = None
        self._base_norms: Tensor | None = None
        architecture, denoiser = recognise(unet)
        self._known_as = base_metadata(unet, denoiser)
        self.ranks = Ranks(config, architecture)
        of_file = None if source is None else deft_load.layers_of_file(source, architecture, config)
        chosen = of_file or self.ranks.chosen
        capped: list[str] = []

        def build(model: nn.Module | None, part: Part) -> list[DeftModule]:
            modules = []
            layers = [] if model is None else chosen(model, part, part is denoiser)
            for target, (rank, scale) in progress(layers, "making the network"):
                if source is not None:
                    deft_load.check_shape(source, target)
                largest = min(target.shape)
                if rank > largest:
                    capped.append(f"{target.name} ({largest})")
                modules.append(DeftModule(target, multiplier, min(rank, largest), scale, config))
            return modules

        # plain lists: only the halves that `apply_to` applies become submodules
        encoders = as_list(text_encoder)
        self.modules_of_encoders = [build(*pair) for pair in zip(encoders, architecture.text_encoders, strict=False)]
        self.unet_modules = build(unet, denoiser)
        if not self.all_modules:
            if source is None:
                raise DeftError("networks.deft: the model has no layer that is adapted, or the options leave none")
            made_for = looks_made_for(source.tensors)
            raise DeftError(f"{source.source}: none of its layers is in this model; it looks made for {made_for}")
        if source is not None:
            adapted = zip(architecture.text_encoders, self.modules_of_encoders, strict=False)
            halves = [denoiser, *(part for part, modules in adapted if modules)]  # an encoder may be None or a dummy
            deft_load.refuse_unknown(source, self.all_modules, architecture, {f"{part.prefix}_" for part in halves})
        self._watch: deft_keep.Watch | None = None  # until the file for `keep` is made
        self._makes_keep = False
        if config.keep is not None and not deft_keep.made_by_samples(config.keep):
            self._keep(config.keep, deft_keep.read_kept(config.keep))
        if capped:
            logger.warning(f"rank capped at the layer's size in {len(capped)} layers: {', '.join(capped[:3])}, ...")
        if not config.pad:
            logger.warning("pad=false: files of mixed ranks are misread by diffusers; use them elsewhere")
        counts = f"{len(self.text_encoder_modules)} text encoder and {len(self.unet_modules)} U-Net modules"
        logger.info(f"DEFT: {counts}, {config}")
        if config.verbose:
            for module in self.all_modules:
                logger.info(f"  {module.lora_name}: rank {module.rank}, alpha {module.scale * module.rank:g}")

    def _keep(self, file: str, directions: Mapping[str, Tensor]) -> None:
        """Takes the directions for the option `keep`.

        :param file: where they are
        :raises DeftError: when they are made for another model
        """
        without = []
        for module in self.all_modules:
            pieces = [directions[piece.file_name] for piece in module.target.pieces if piece.file_name in directions]
            for found in pieces:
                if len(found) != module.target.shape[1]:
                    raise DeftError(
                        f"keep={file}: {module.lora_name} has {module.target.shape[1]} inputs, the file is made for a "
                        f"model with {len(found)}"
                    )
            if not pieces:
                without.append(module.lora_name)
            kept = deft_keep.together(pieces, f"keep={file}: {module.lora_name}") if pieces else None
            module.kept = None if kept is None else kept.to(module.P.device)
        if len(without) == len(self.all_modules):
            raise DeftError(f"keep={file}: none of the adapted layers is in it; it is made for another model")
        if without:
            logger.warning(f"keep={file}: {len(without)} layers are not in it, {without[0]} for one; they keep nothing")

    @property
    def text_encoder_modules(self) -> list[DeftModule]:
        """Of all text encoders."""
        return [module for modules in self.modules_of_encoders for module in modules]

    @property
    def train_t5xxl(self) -> bool:
        """Whether T5 is adapted; sd-scripts' FLUX and SD3 trainers ask."""
        return any(module.lora_name.startswith("lora_te3") for module in self.all_modules)

    @property
    def all_modules(self) -> list[DeftModule]:
        """Text encoders first, as sd-scripts orders them."""
        return self.text_encoder_modules + self.unet_modules

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    # --- before training -------------------------------------------------------------------------------------------

    def prepare_network(self, args: Any) -> None:
        """Refuses, before the night, options of the trainer's that a save or a step would fail on.

        :raises DeftError: for `--save_model_as` other than safetensors, `--scale_weight_norms` with PaRa, and a file to
            `keep` that is neither there nor made by this training
        """
        if getattr(args, "save_model_as", None) not in (None, "safetensors"):
            raise DeftError(f"--save_model_as={args.save_model_as}: networks.deft writes safetensors only")
        if getattr(args, "scale_weight_norms", None) and self.config.para:
            raise DeftError("--scale_weight_norms: a PaRa adapter (para=true) has no size that could be scaled")
        if self.config.keep is not None and deft_keep.made_by_samples(self.config.keep):
            deft_keep.check_samples(self.config.keep, args)
            self._makes_keep = True
        self.is_tracked = bool(getattr(args, "logging_dir", None) or getattr(args, "log_with", None))

    def apply_to(
        self,
        text_encoder: nn.Module | Sequence[nn.Module] | None,
        unet: nn.Module,
        apply_text_encoder: bool = True,
        apply_unet: bool = True,
    ) -> None:
        """Replaces the forward of every adapted layer of the halves that are asked for.

        :raises DeftError: when nothing is left to adapt
        """
        if not apply_text_encoder:
            self.modules_of_encoders = []
        if not apply_unet:
            self.unet_modules = []
        if not self.all_modules:
            raise DeftError("nothing to train: the file or the options leave no module in the chosen half of the model")
        if self._makes_keep:
            places = [place for module in self.all_modules for place in module.target.places]
            self._watch = deft_keep.Watch(places, deft_keep.DIRECTIONS)
        elif self.config.keep is not None and all(module.kept is None for module in self.all_modules):
            deft_keep.read_kept(self.config.keep)  # says that it is not there
        for module in self.all_modules:
            module.apply_to()
            self.add_module(module.lora_name, module)
        if self.config.basis == "qr":
            roots = [*zip(as_list(text_encoder), self.modules_of_encoders, strict=False), (unet, self.unet_modules)]
            self._batches = [BatchedFactors(modules, root) for root, modules in roots if modules and root is not None]

    def remove(self) -> None:
        """Gives every adapted layer its own forward back."""
        for module in reversed(self.all_modules):  # several may stand in line before one layer
            module.restore()
        if self._watch is not None:
            self._watch.close()
        for batch in self._batches:
            batch.remove()
        self._batches = []

    @property
    def batched(self) -> bool:
        """Whether factors and gradients of layers of one shape are computed together (`deft_batch`)."""
        return any(batch.enabled for batch in self._batches)

    @batched.setter
    def batched(self, value: bool) -> None:
        for batch in self._batches:
            batch.enabled = value

    def _forget_factors(self) -> None:
        """To be called wherever parameters change or may have changed."""
        for batch in self._batches:
            batch.drop()

    def train(self, mode: bool = True) -> DeftNetwork:
        """As in torch; optimizers that swap weights do so beside it, unseen."""
        self._forget_factors()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DeftNetwork:
        self._forget_factors()
        return super()._apply(fn, recurse)

    def load_weights(self, file: str) -> LoadResult:
        """Takes over a LoRA or DEFT file, after `apply_to`.

        :raises DeftError: when the file cannot be read, is made for another model, holds modules that have no
            counterpart here, or has a higher rank than the network (unless `truncate=true`)
        """
        return self.load_adapter(deft_io.read_adapter(file))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """A network's own state, bit for bit, or the tensors of an adapter file, which sd-scripts' generators pass."""
        if deft_io.is_adapter_dict(state_dict):
            return self.load_adapter(deft_io.parse_adapter(state_dict, {}, "the given weights"))
        self._forget_factors()
        return super().load_state_dict(state_dict, strict, assign)

    def load_adapter(self, adapter: AdapterFile) -> LoadResult:
        """`load_weights` for a file that has been read."""
        if self._watch is not None:
            raise DeftError(f"keep={self.config.keep}: no such file; to go on from weights, give their training's")
        self._forget_factors()
        before = {key: value.clone() for key, value in self.state_dict().items()}
        try:
            return deft_load.load(adapter, self.all_modules, self.config, self.ranks.architecture)
        except DeftError:
            super().load_state_dict(before)  # a refused file changes nothing
            raise

    def enable_gradient_checkpointing(self) -> None:
        """Nothing to do: a layer's forward can be run again at any time."""

    def prepare_optimizer_params_with_multiple_te_lrs(
        self, text_encoder_lr: float | Sequence[float] | None, unet_lr: float | None, default_lr: float | None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Parameter groups and their descriptions. What has a rate of 0 or none is frozen and has no group.

        :param text_encoder_lr: one rate for all text encoders, or one for each, the last for those behind it; None or
            empty: `default_lr`
        :raises DeftError: when nothing is left to train
        """
        given = [text_encoder_lr] if isinstance(text_encoder_lr, (int, float)) else list(text_encoder_lr or [])
        rates: list[float | None] = [*given] or [default_lr]
        halves = [
            (f"textencoder {i + 1}" if len(self.modules_of_encoders) > 1 else "textencoder", modules,
             rates[min(i, len(rates) - 1)])
            for i, modules in enumerate(self.modules_of_encoders)
        ]  # fmt: skip
        halves.append(("unet", self.unet_modules, default_lr if unet_lr is None else unet_lr))
        groups: dict[tuple[str, float], list[nn.Parameter]] = {}
        for name, modules, half_rate in halves:
            denoiser = name == "unet"
            plus = self.ranks.plus_ratio(denoiser)
            for module in modules:
                label, rate = self.ranks.rate_of(module.target, half_rate, denoiser)
                for parameter in module.parameters():
                    if parameter is module.P and self.config.freeze_basis:
                        continue
                    parameter.requires_grad_(bool(rate))
                    is_plus = parameter is module.P and plus != 1
                    if rate:
                        key = (f"{name}{label}{' plus' if is_plus else ''}", rate * plus if is_plus else rate)
                        groups.setdefault(key, []).append(parameter)
        if not groups:
            raise DeftError("nothing to train: every learning rate is 0 or unset (--learning_rate, --unet_lr)")
        listed = [{"params": parameters, "lr": float(rate)} for (_, rate), parameters in groups.items()]
        return listed, [name for name, _ in groups]

    def prepare_optimizer_params(
        self, text_encoder_lr: float | None = None, unet_lr: float | None = None, default_lr: float | None = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """As `prepare_optimizer_params_with_multiple_te_lrs`, with one rate for the text encoder; musubi-tuner gives
        `unet_lr` alone."""
        return self.prepare_optimizer_params_with_multiple_te_lrs(text_encoder_lr, unet_lr, default_lr)

    def prepare_grad_etc(self, text_encoder: Any, unet: Any = None) -> None:
        """Nothing to do: the base model's requires_grad_(False) does not reach the adapters.

        :param text_encoder: of musubi-tuner the transformer, alone
        """

    # --- during training -------------------------------------------------------------------------------------------

    def on_epoch_start(self, text_encoder: Any, unet: Any = None) -> None:
        """Called by trainers at the start of every epoch; before the first, samples may have been drawn.

        :param text_encoder: of musubi-tuner the transformer, alone
        :raises DeftError: when a file to `keep` should be made of them and cannot
        """
        if self._watch is not None:
            self._keep_what_was_drawn(self._watch)
        self.train()

    def _keep_what_was_drawn(self, watch: deft_keep.Watch) -> None:
        """Makes the file for `keep` from the base model's samples, and goes by it from here on."""
        self._watch, file = None, str(self.config.keep)
        watch.close()
        if any(module.R is not None and bool(module.R.any()) for module in self.all_modules):
            raise DeftError(
                f"keep={file}: no such file, and this network is trained already; give its first training's"
            )
        alone = not torch.distributed.is_initialized()
        if not alone:
            watch.add_other_processes(self.device)
        tensors, metadata = deft_io.kept_tensors(watch.directions())
        if not tensors:
            raise DeftError(f"keep={file}: no such file, and nothing has been drawn before the first step")
        if alone or torch.distributed.get_rank() == 0:
            deft_io.write_safetensors(tensors, file, metadata)
        self._keep(file, deft_io.kept_directions(tensors, metadata))
        for batch in self._batches:
            batch.group()
        logger.info(f"keep={file}: made of the samples; give it to later trainings on this model")

    def on_step_start(self, text_encoder: Any = None, unet: Any = None) -> None:
        """Called by trainers at the start of every step; musubi-tuner gives nothing.

        :raises DeftError: at the second, when what is saved would need weights that are streamed through one buffer
        """
        for batch in self._batches:
            batch.start_step(self.runs_ahead)
        if self._steps_begun == 1:  # the first has had all blocks in their buffers
            self._refuse_streamed()
        self._steps_begun += 1

    def check_bases(self) -> None:
        """In place of a step's passes, where other processes have some: what they renew is renewed here."""
        for batch in self._batches:
            batch.check()

    def _refuse_streamed(self) -> str:
        """:returns: the name of a layer that has another's weight, as `deft_weights.streamed`"""
        streamed = deft_weights.streamed(module.target for module in self.all_modules)
        if streamed and (self.config.removal or self.config.para):
            raise DeftError(
                f"removal and para need the base weights at each save, but {streamed} has another layer's while blocks "
                f"are streamed; leave these options of DEFT away, or the trainer's that streams blocks"
            )
        return streamed

    def set_multiplier(self, multiplier: float) -> None:
        """Strength of the adapter: 1 in training, 0 for the base model."""
        self.multiplier = multiplier
        for module in self.all_modules:
            module.multiplier = multiplier

    def get_trainable_params(self) -> Iterable[nn.Parameter]:
        """For gradient clipping."""
        return self.parameters()

    @torch.no_grad()
    def apply_max_norm_regularization(self, max_norm: float, device: torch.device) -> tuple[int, float, float]:
        """`limit_norms`, told.

        :returns: how many were scaled, and the mean and the largest norm afterwards
        """
        norms = self.limit_norms(max_norm).tolist()
        limited = [min(norm, max_norm) for norm in norms]
        return sum(norm > max_norm for norm in norms), sum(limited) / len(limited), max(limited)

    @torch.no_grad()
    def limit_norms(self, max_norm: float) -> Tensor:
        """Scales every delta whose Frobenius norm is above `max_norm` down to it, exactly. In the default form, no
        device is waited for.

        :returns: (modules,), the norms before, where the parameters are
        """
        self._forget_factors()
        norms = torch.stack([module.delta_norm() for module in self.all_modules])
        for module, factor in zip(self.all_modules, (max_norm / norms).clamp(max=1), strict=True):
            module.scale_delta(factor)
        return norms

    @torch.no_grad()
    def update_grad_norms(self) -> None:
        """Keeps each module's norms for the trackers; sd-scripts calls it before the optimizer's step."""
        if not self.is_tracked:
            return
        gradients = [[p.grad for p in module.parameters() if p.grad is not None] for module in self.all_modules]
        zero = torch.zeros((), device=self.device)
        self._grad_norms = torch.stack([torch.stack([g.norm() for g in some] or [zero]).norm() for some in gradients])
        self._weight_norms = torch.stack([deft_factors.norm(*module.lora_factors()) for module in self.all_modules])

    def grad_norms(self) -> Tensor | None:
        """Norm of each module's gradients (modules,) at the last step; None where no tracker is active."""
        return self._grad_norms

    def weight_norms(self) -> Tensor | None:
        """Frobenius norm of each module's delta (modules,) at the last step; None where no tracker is active."""
        return self._weight_norms

    def combined_weight_norms(self) -> Tensor | None:
        """sqrt(||W||^2 + ||delta||^2) of each module (modules,), which networks.lora_flux calls by this name; None
        where no tracker is active."""
        if self._weight_norms is None:
            return None
        return torch.hypot(self._norms_of_base().to(self._weight_norms), self._weight_norms)

    # --- saving ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Writes a plain LoRA, or with `save_format=deft` the formula's matrices in float32; whole or not at all.

        :param dtype: of the LoRA's tensors; None is float32
        :param metadata: of the trainer; DEFT's own fields are added to a copy, and what model the file is for where
            they do not say it, as those of train_leco.py
        :raises DeftError: for non-finite parameters, a failing disk, or base weights that are needed and not there;
            what was in the file's place stays
        """
        deft_save.check_finite(self.state_dict(), file)
        streamed = self._refuse_streamed()
        dtype = dtype or torch.float32
        own = [module.lora_factors() for module in self.all_modules]
        deft_save.warn_of_nothing_learnt(file, dtype, own, self._norms_of_base)
        architecture = self.ranks.architecture
        tensors, fields = deft_save.tensors_of(self.all_modules, self.config, architecture, own, file, dtype)
        full = self._known_as | {key: str(value) for key, value in (metadata or {}).items()} | fields
        if streamed:
            logger.warning(f"{file}: without a hash of the base model, since blocks are streamed ({streamed} for one)")
        else:
            full |= deft_save.hash_of_base(self.all_modules)
        deft_io.write_hashed(tensors, file, full)

    def _norms_of_base(self) -> Tensor:
        """Frobenius norm of each module's weight (modules,), taken once: they are frozen."""
        if self._base_norms is None:
            self._base_norms = torch.stack([module.base_weight().float().norm() for module in self.all_modules])
        return self._base_norms

    # --- generating ------------------------------------------------------------------------------------------------

    def is_mergeable(self) -> bool:
        """Whether `merge_to` works: not into quantised or scaled fp8 weights."""
        try:
            deft_weights.check_mergeable(module.target for module in self.all_modules)
        except DeftError:
            return False
        return True

    def merge_to(
        self,
        text_encoder: Any,
        unet: Any,
        weights_sd: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        non_blocking: bool = False,
    ) -> None:
        """Adds the deltas of `weights_sd` to the base weights; `apply_to` is not needed before.

        :param dtype: not needed: the weights keep their own
        :param device: not needed: each weight is changed where it is
        :param non_blocking: not needed, since nothing is moved; musubi-tuner gives it
        :raises DeftError: where `is_mergeable` is not so, before any weight is changed
        """
        deft_weights.check_mergeable(module.target for module in self.all_modules)
        adapter = deft_io.parse_adapter(weights_sd, {}, "the given weights")
        for module in progress(self.all_modules, "merging"):
            layer = adapter.layer_of(module.target)
            if layer is None:
                continue
            up, down = deft_load.factors_of(layer, module.base_weight)
            add_to_weight(module.target, up, down, self.multiplier)
        logger.info("weights are merged")

    def backup_weights(self) -> None:
        """Keeps a copy of every base weight on its layer, for `restore_weights`."""
        for module in self.all_modules:
            module.backup()

    def restore_weights(self) -> None:
        """Takes every merged delta out again."""
        for module in self.all_modules:
            module.restore_weight()

    def pre_calculation(self) -> None:
        """Merges the deltas into the base weights that `backup_weights` has kept.

        :raises DeftError: where `is_mergeable` is not so, before any weight is changed
        """
        deft_weights.check_mergeable(module.target for module in self.all_modules)
        for module in progress(self.all_modules, "merging"):
            module.pre_calculate()

    def set_region(self, sub_prompt_index: int, is_last_network: bool, mask: Tensor) -> None:
        """:raises NotImplementedError: regional prompts need sd-scripts' own LoRA class, which loads DEFT's files"""
        raise NotImplementedError("regional prompts: pass --network_module networks.lora, which loads the same file")

    def set_current_generation(self, *args: Any, **kwargs: Any) -> None:
        """Called for regional prompts only; see `set_region`."""
        self.set_region(0, True, torch.ones(()))
