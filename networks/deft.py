"""sd-scripts' face of DEFT: `--network_module networks.deft`.

Functions and methods stand in the order in which a trainer calls them; `docs/sd-scripts.md` shows how to use them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from networks import deft_io, deft_math, deft_module
from networks.deft_batch import BatchedFactors
from networks.deft_config import DeftConfig, DeftError, options_of_file, parse_options, user_options
from networks.deft_io import AdapterFile, DeftLayer
from networks.deft_module import DeftModule, add_to_weight
from networks.deft_ranks import RankAndScale, Ranks
from networks.deft_targets import (
    Architecture,
    Part,
    Target,
    as_list,
    is_pointwise,
    looks_made_for,
    outside_targets,
    recognise,
    targets,
)

logger = logging.getLogger(__name__)

Chosen = list[tuple[Target, RankAndScale]]


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
    largest = max(adapter.layers.values(), key=lambda layer: layer.rank)
    sizes = {"dim": largest.rank, "alpha": largest.scale * largest.rank}  # for the record: each layer has its own
    kept = options_of_file(adapter.options)
    config = parse_options(sizes | kept | user_options(kwargs))
    if for_inference:  # as a plain LoRA: exact for every form, on any base model, and without dropout
        config = replace(config, basis="qr", para=False, gate=False, removal=0.0, freeze_basis=False, keep=None)
        config = replace(config, neuron_dropout=0.0, rank_dropout=0.0, module_dropout=0.0)
    return DeftNetwork(text_encoder, unet, multiplier, config, source=adapter), adapter.tensors


def layers_of_file(adapter: AdapterFile, architecture: Architecture, split_qkv: bool) -> Callable[..., Chosen]:
    """Chooses a model's layers by what a file holds of them."""

    def chosen(model: nn.Module, part: Part, denoiser: bool) -> Chosen:
        fused = architecture.fused if denoiser and split_qkv else {}
        found = targets(model, part, True, part.optional_containers, fused)
        if denoiser and architecture.outside:
            found += [target for _, target in outside_targets(model, part, architecture.outside[1])]
        layers = [(target, adapter.layer_of(target)) for target in found]
        return [(target, (layer.rank, layer.scale)) for target, layer in layers if layer is not None]

    return chosen


@dataclass(frozen=True)
class LoadResult:
    """What a load did; sd-scripts prints it."""

    source: str
    loaded: int
    left_at_start: int
    other_half: int

    def __str__(self) -> str:
        rest = f", {self.left_at_start} modules are not in the file and start fresh" if self.left_at_start else ""
        rest += f", {self.other_half} of the file belong to a half that is not trained" if self.other_half else ""
        return f"{self.loaded} modules loaded from {self.source}{rest}"


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
        self._batches: list[BatchedFactors] = []
        self._grad_norms: Tensor | None = None
        self._weight_norms: Tensor | None = None
        self._base_norms: Tensor | None = None
        architecture, denoiser = recognise(unet)
        self.ranks = Ranks(config, architecture)
        chosen = self.ranks.chosen if source is None else layers_of_file(source, architecture, config.split_qkv)
        capped: list[str] = []

        def build(model: nn.Module | None, part: Part) -> list[DeftModule]:
            modules = []
            for target, (rank, scale) in [] if model is None else chosen(model, part, part is denoiser):
                if source is not None:
                    _check_shape(source, target)
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
            self._refuse_unknown(source, tuple(f"{part.prefix}_" for part in halves))
        if config.keep is not None:
            self._keep(config.keep)
        if capped:
            logger.warning(f"rank capped at the layer's size in {len(capped)} layers: {', '.join(capped[:3])}, ...")
        if not config.pad:
            logger.warning("pad=false: files of mixed ranks are misread by diffusers; use them elsewhere")
        counts = f"{len(self.text_encoder_modules)} text encoder and {len(self.unet_modules)} U-Net modules"
        logger.info(f"DEFT: {counts}, {config}")
        if config.verbose:
            for module in self.all_modules:
                logger.info(f"  {module.lora_name}: rank {module.rank}, alpha {module.scale * module.rank:g}")

    def _keep(self, file: str) -> None:
        """Takes the directions of a file for the option `keep`.

        :raises DeftError: when the file cannot be read, or is made for another model
        """
        directions = deft_io.read_kept(file)
        without = []
        for module in self.all_modules:
            found = directions.get(module.target.file_name)
            if found is None:
                without.append(module.lora_name)
            elif len(found) != module.target.shape[1]:
                raise DeftError(
                    f"keep={file}: {module.lora_name} has {module.target.shape[1]} inputs, the file is made for a "
                    f"model with {len(found)}"
                )
            module.kept = found
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
        """Refuses, before the night, options of sd-scripts' that a save or a step would fail on.

        :raises DeftError: for `--save_model_as` other than safetensors, and `--scale_weight_norms` with PaRa
        """
        if getattr(args, "save_model_as", None) not in (None, "safetensors"):
            raise DeftError(f"--save_model_as={args.save_model_as}: networks.deft writes safetensors only")
        if getattr(args, "scale_weight_norms", None) and self.config.para:
            raise DeftError("--scale_weight_norms: a PaRa adapter (para=true) has no size that could be scaled")
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
        self._forget_factors()
        found = {m.lora_name: m for m in self.all_modules if adapter.layer_of(m.target) is not None}
        self._refuse_unknown(adapter, tuple({"_".join(m.lora_name.split("_")[:2]) + "_" for m in self.all_modules}))
        for module in found.values():
            _check_shape(adapter, module.target)
        before = {key: value.clone() for key, value in self.state_dict().items()}
        try:
            errors = {name: self._load_layer(module, adapter) for name, module in found.items()}
        except DeftError:
            super().load_state_dict(before)  # a refused file changes nothing
            raise
        truncated = {name: error for name, error in errors.items() if error is not None}
        for name, error in truncated.items():
            logger.info(f"truncated {name}: relative error {error:.2e}")
        if truncated:
            logger.warning(
                f"{adapter.source}: {len(truncated)} modules truncated, largest error {max(truncated.values()):.2e}"
            )
        names = {name for m in found.values() for name in (m.lora_name, m.target.file_name)}
        left = len(self.all_modules) - len(found)
        return LoadResult(adapter.source, len(found), left, len(adapter.layers.keys() - names))

    def _refuse_unknown(self, adapter: AdapterFile, prefixes: tuple[str, ...]) -> None:
        """:raises DeftError: when the file holds modules of the halves with these prefixes that are not here"""
        known = {name for module in self.all_modules for name in (module.lora_name, module.target.file_name)}
        unknown = sorted(adapter.layers.keys() - known)
        made_for, architecture = looks_made_for(adapter.tensors), self.ranks.architecture
        all_prefixes = tuple(f"{part.prefix}_" for part in (*architecture.denoisers, *architecture.text_encoders))
        missing = [name for name in unknown if name.startswith(prefixes) or not name.startswith(all_prefixes)]
        if missing and len(unknown) == len(adapter.layers):
            raise DeftError(f"{adapter.source}: none of its modules is in this network; it looks made for {made_for}")
        if missing:
            raise DeftError(
                f"{adapter.source}: {len(missing)} of its modules have no counterpart, {missing[0]} for one; use "
                f"--dim_from_weights, or conv_dim=... for convolutions (it looks made for {made_for})"
            )
        if len(unknown) == len(adapter.layers):
            raise DeftError(f"{adapter.source}: it adapts only a half of the model that is not trained here")

    def _load_layer(self, module: DeftModule, adapter: AdapterFile) -> float | None:
        """Loads one layer; the relative error where `truncate` cut its rank, else None."""
        layer = adapter.layer_of(module.target)
        assert layer is not None
        if isinstance(layer, DeftLayer):
            same_form = layer.basis == self.config.basis
            same_form &= (layer.R is None) == self.config.para and (layer.gate is None) == (module.g is None)
            same_form &= self.config.removal > 0 or not layer.removes
            if same_form and layer.rank == module.rank:
                R = None if layer.R is None else layer.R * (layer.scale / module.scale)
                module.set_matrices(layer.P, R, layer.E0)
                module.spread_removal()
                if module.g is not None and layer.gate is not None:
                    module.g.data.copy_(layer.gate)
                return None
            up, down = _file_factors(layer, module.base_weight)
        else:
            up, down = layer.up, layer.down
        if up.shape[1] <= module.rank:
            module.load_lora(up, down)
            return None
        if module.rank == min(module.target.shape):  # the product's rank is no higher: nothing is lost
            up, down, _ = deft_math.truncate(up.double(), down.double(), module.rank)
            module.load_lora(up, down)
            return None
        if not self.config.truncate:
            raise DeftError(
                f"{adapter.source}: {module.lora_name} has rank {up.shape[1]}, the network {module.rank}; use "
                f"--dim_from_weights, a larger dim, or --network_args truncate=true (best approximation)"
            )
        up, down, error = deft_math.truncate(up.double(), down.double(), module.rank)
        module.load_lora(up, down)
        return error

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
        self, text_encoder_lr: float | None, unet_lr: float | None, default_lr: float | None = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """As `prepare_optimizer_params_with_multiple_te_lrs`, with one rate for the text encoder."""
        return self.prepare_optimizer_params_with_multiple_te_lrs(text_encoder_lr, unet_lr, default_lr)

    def prepare_grad_etc(self, text_encoder: Any, unet: Any) -> None:
        """Nothing to do: the base model's requires_grad_(False) does not reach the adapters."""

    # --- during training -------------------------------------------------------------------------------------------

    def on_epoch_start(self, text_encoder: Any, unet: Any) -> None:
        """Called by trainers at the start of every epoch."""
        self.train()

    def on_step_start(self, text_encoder: Any, unet: Any) -> None:
        """Called by trainers at the start of every step."""
        for batch in self._batches:
            batch.start_step()

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
        """Scales every delta whose Frobenius norm is above `max_norm` down to it, exactly.

        :returns: how many were scaled, and the mean and the largest norm afterwards
        """
        self._forget_factors()
        norms: list[float] = []
        scaled = 0
        for module in self.all_modules:
            norm = float(deft_math.delta_norm(*module.lora_factors()))
            if norm > max_norm:
                module.scale_delta(max_norm / norm)
                scaled, norm = scaled + 1, max_norm
            norms.append(norm)
        return scaled, sum(norms) / len(norms), max(norms)

    @torch.no_grad()
    def update_grad_norms(self) -> None:
        """Keeps each module's norms for the trackers; sd-scripts calls it before the optimizer's step."""
        if not self.is_tracked:
            return
        gradients = [[p.grad for p in module.parameters() if p.grad is not None] for module in self.all_modules]
        zero = torch.zeros((), device=self.device)
        self._grad_norms = torch.stack([torch.stack([g.norm() for g in some] or [zero]).norm() for some in gradients])
        self._weight_norms = torch.stack([deft_math.delta_norm(*module.lora_factors()) for module in self.all_modules])
        if self._base_norms is None:  # of frozen weights: once is enough
            self._base_norms = torch.stack([module.base_weight().float().norm() for module in self.all_modules])

    def grad_norms(self) -> Tensor | None:
        """Norm of each module's gradients (modules,) at the last step; None where no tracker is active."""
        return self._grad_norms

    def weight_norms(self) -> Tensor | None:
        """Frobenius norm of each module's delta (modules,) at the last step; None where no tracker is active."""
        return self._weight_norms

    def combined_weight_norms(self) -> Tensor | None:
        """sqrt(||W||^2 + ||delta||^2) of each module (modules,), which networks.lora_flux calls by this name; None
        where no tracker is active."""
        if self._weight_norms is None or self._base_norms is None:
            return None
        return torch.hypot(self._base_norms.to(self._weight_norms), self._weight_norms)

    # --- saving ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Writes a plain LoRA, or with `save_format=deft` the formula's matrices in float32; whole or not at all.

        :param dtype: of the LoRA's tensors; None is float32
        :param metadata: of the trainer; DEFT's own fields are added to a copy
        :raises DeftError: for non-finite parameters or a failing disk; what was in the file's place stays
        """
        self._check_finite(file)
        dtype = dtype or torch.float32
        exponents: Mapping[str, int] = {}
        if self.config.save_format == "deft":
            tensors = deft_io.deft_tensors({m.lora_name: _as_deft_layer(m) for m in self.all_modules})
        else:
            factors = self._file_factors()
            for line in self.ranks.architecture.warnings(factors):
                logger.warning(f"{file}: {line}")
            tensors, exponents = deft_io.lora_tensors(factors, dtype, self.config.pad)
            if self.config.basis in deft_math.ORTHONORMAL:  # any scaling of up spans the same subspace
                exponents = {}
            self._log_padding(
                file, dtype, [(up.shape[1], up.shape[0] + down.shape[1]) for up, down, _ in factors.values()]
            )
        recorded: dict[str, list[float]] = {}
        for m in self.all_modules:
            name = m.lora_name if self.config.save_format == "deft" else m.target.file_name
            before = recorded.get(name, [0])[0]
            recorded[name] = [before + m.rank, m.scale, exponents.get(name, 0)]
        full = {key: str(value) for key, value in (metadata or {}).items()}
        full |= {deft_io.OPTIONS_KEY: self.config.to_json(), deft_io.LAYERS_KEY: json.dumps(recorded)}
        full |= self._base_metadata()
        full |= deft_io.webui_hashes(tensors, full)
        deft_io.write_safetensors(tensors, file, full)

    def _file_factors(self) -> dict[str, tuple[Tensor, Tensor, tuple[int, ...]]]:
        """Key name -> up, down and the shape of the weight that files know, parts of one weight put together."""
        parts: dict[str, list[tuple[Tensor, Tensor, Target]]] = {}
        for module in self.all_modules:
            parts.setdefault(module.target.file_name, []).append((*module.lora_factors(), module.target))
        factors = {}
        for name, pieces in parts.items():
            up, down = deft_io.fuse(pieces)
            factors[name] = (up, down, (up.shape[0], *pieces[0][2].layer.weight.shape[1:]))
        return factors

    def _check_finite(self, file: str) -> None:
        for name, tensor in self.state_dict().items():
            if not torch.isfinite(tensor).all():
                raise DeftError(f"{file}: not saved, since {name} has non-finite values; what was there is untouched")

    def _log_padding(self, file: str, dtype: torch.dtype, sizes: Sequence[tuple[int, int]]) -> None:
        """:param sizes: each layer's rank, and its outputs and inputs together"""
        file_rank, true_size = max(rank for rank, _ in sizes), sum(rank * size for rank, size in sizes)
        padded_size = file_rank * sum(size for _, size in sizes)
        if self.config.pad and padded_size > true_size:
            byte = dtype.itemsize / 2**20
            logger.info(
                f"{file}: {padded_size * byte:.1f} MiB, {true_size * byte:.1f} without padding every layer to rank "
                f"{file_rank}, which diffusers needs"
            )

    def _base_metadata(self) -> dict[str, str]:
        weights = [(m.lora_name, deft_module.rows_of(m.org_module.weight, m.target.rows)) for m in self.all_modules]
        return {
            deft_io.BASE_HASH_KEY: deft_io.base_fingerprint(weights),
            deft_io.BASE_DTYPE_KEY: ",".join(sorted({str(w.dtype).removeprefix("torch.") for _, w in weights})),
        }

    # --- generating ------------------------------------------------------------------------------------------------

    def is_mergeable(self) -> bool:
        """Whether `merge_to` works."""
        return True

    def merge_to(
        self,
        text_encoder: Any,
        unet: Any,
        weights_sd: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Adds the deltas of `weights_sd` to the base weights; `apply_to` is not needed before.

        :param dtype: not needed: the weights keep their own
        :param device: not needed: each weight is changed where it is
        """
        adapter = deft_io.parse_adapter(weights_sd, {}, "the given weights")
        for module in self.all_modules:
            layer = adapter.layer_of(module.target)
            if layer is None:
                continue
            up, down = (
                _file_factors(layer, module.base_weight) if isinstance(layer, DeftLayer) else (layer.up, layer.down)
            )
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
        """Merges the deltas into the base weights that `backup_weights` has kept."""
        for module in self.all_modules:
            module.pre_calculate()

    def set_region(self, sub_prompt_index: int, is_last_network: bool, mask: Tensor) -> None:
        """:raises NotImplementedError: regional prompts need sd-scripts' own LoRA class, which loads DEFT's files"""
        raise NotImplementedError("regional prompts: pass --network_module networks.lora, which loads the same file")

    def set_current_generation(self, *args: Any, **kwargs: Any) -> None:
        """Called for regional prompts only; see `set_region`."""
        self.set_region(0, True, torch.ones(()))


def _check_shape(adapter: AdapterFile, target: Target) -> None:
    """:raises DeftError: when the file's layer has another shape than the model's"""
    found = adapter.layer_of(target)
    if isinstance(found, DeftLayer):
        expected: tuple[int, ...] = target.shape
        shape: tuple[int, ...] = (found.P.shape[0], expected[1] if found.R is None else found.R.shape[1])
    elif found is not None:
        expected = (target.shape[0], *target.layer.weight.shape[1:])
        shape = (found.up.shape[0], *found.kernel)
        if len(shape) == 2 and is_pointwise(target.layer):  # some programs write a 1x1 convolution as a matrix
            expected = expected[:2]
    if found is not None and shape != expected:
        raise DeftError(
            f"{adapter.source}: {target.name} is made for a weight of {shape}, this model has "
            f"{expected}; the file looks made for {looks_made_for(adapter.tensors)}"
        )


def _as_deft_layer(module: DeftModule) -> DeftLayer:
    """As a file has it, where all of E - E0 is taken out: what `removal` leaves goes into E0."""
    removal, E, E0 = module.config.removal, module.left_and_eraser()[1], module.E0
    start = E if E0 is None else E0 if removal == 1 else E - removal * (E - E0)
    return DeftLayer(module.config.basis, module.effective_P, module.effective_R, start, module.scale, module.g)


def _file_factors(layer: DeftLayer, base_weight: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """up and down of a DEFT file's layer on the model at hand."""
    W = base_weight().float()
    scale = layer.scale * (1.0 if layer.gate is None else float(torch.sigmoid(layer.gate)))
    P, E0 = layer.P.to(W), layer.E0.to(W)
    R = None if layer.R is None else layer.R.to(W)
    return deft_math.lora_factors(P, R, E0, scale, layer.basis, lambda: W)
