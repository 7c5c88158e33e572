"""What an adapter file holds, taken over by a network: plain LoRAs by their product, DEFT files as they are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch import nn

from networks import deft_factors
from networks.deft_architectures import Architecture, Part
from networks.deft_config import DeftConfig, DeftError, naming
from networks.deft_factors import Factors
from networks.deft_io import AdapterFile, DeftLayer, factors_of
from networks.deft_module import DeftModule
from networks.deft_names import looks_made_for
from networks.deft_progress import progress
from networks.deft_ranks import Chosen
from networks.deft_targets import Target, joined, outside_targets, targets, weight_shape

logger = logging.getLogger(__name__)


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


def layers_of_file(adapter: AdapterFile, architecture: Architecture, config: DeftConfig) -> Callable[..., Chosen]:
    """Chooses a model's layers by what a file holds of them."""

    def chosen(model: nn.Module, part: Part, denoiser: bool) -> Chosen:
        fused = architecture.fused if denoiser and config.split_qkv else {}
        found = targets(model, part, True, part.optional_containers, fused)
        if denoiser and config.fuse_qkv:
            found = joined(found, architecture.together)
        if denoiser and architecture.outside:
            found += [target for _, target in outside_targets(model, part, architecture.outside[1])]
        layers = [(target, adapter.layer_of(target)) for target in found]
        return [(target, (layer.trained_rank, layer.scale)) for target, layer in layers if layer is not None]

    return chosen


def load(
    adapter: AdapterFile, modules: Sequence[DeftModule], config: DeftConfig, architecture: Architecture
) -> LoadResult:
    """Loads every module that the file has something for.

    :raises DeftError: when the file is made for another model, holds modules that have no counterpart here, or has a
        higher rank than the network (unless `truncate=true`); some modules may have been loaded then
    """
    found = {m.lora_name: m for m in modules if adapter.layer_of(m.target) is not None}
    halves = {"_".join(m.lora_name.split("_")[:2]) + "_" for m in modules}
    refuse_unknown(adapter, modules, architecture, halves)
    for module in found.values():
        check_shape(adapter, module.target)
    loading = progress(list(found.items()), "loading the adapter")
    errors = {name: _load_layer(module, adapter, config) for name, module in loading}
    truncated = {name: error for name, error in errors.items() if error is not None}
    for name, error in truncated.items():
        logger.info(f"truncated {name}: relative error {error:.2e}")
    if truncated:
        logger.warning(
            f"{adapter.source}: {len(truncated)} modules truncated, largest error {max(truncated.values()):.2e}"
        )
    names = {name for m in found.values() for name in _names(m)}
    return LoadResult(adapter.source, len(found), len(modules) - len(found), len(adapter.layers.keys() - names))


def refuse_unknown(
    adapter: AdapterFile, modules: Sequence[DeftModule], architecture: Architecture, prefixes: Collection[str]
) -> None:
    """:raises DeftError: when the file holds layers of the halves with these prefixes that are none of the modules"""
    known = {name for module in modules for name in _names(module)}
    unknown = sorted(adapter.layers.keys() - known)
    made_for = looks_made_for(adapter.tensors)
    all_prefixes = tuple(f"{part.prefix}_" for part in (*architecture.denoisers, *architecture.text_encoders))
    missing = [name for name in unknown if name.startswith(tuple(prefixes)) or not name.startswith(all_prefixes)]
    if missing and len(unknown) == len(adapter.layers):
        raise DeftError(f"{adapter.source}: none of its modules is in this network; it looks made for {made_for}")
    if missing:
        raise DeftError(
            f"{adapter.source}: {len(missing)} of its modules have no counterpart, {missing[0]} for one; use "
            f"--dim_from_weights, or conv_dim=... for convolutions (it looks made for {made_for})"
        )
    if len(unknown) == len(adapter.layers):
        raise DeftError(f"{adapter.source}: it adapts only a half of the model that is not trained here")


def _names(module: DeftModule) -> list[str]:
    """What a file may call it, or parts of it."""
    return [module.lora_name, module.target.own_name, *(piece.file_name for piece in module.target.pieces)]


def check_shape(adapter: AdapterFile, target: Target) -> None:
    """:raises DeftError: when the file's layer has another shape than the model's"""
    found = adapter.layer_of(target)
    if isinstance(found, DeftLayer):
        expected: tuple[int, ...] = target.shape
        shape: tuple[int, ...] = (found.P.shape[0], expected[1] if found.R is None else found.R.shape[1])
    elif found is not None:
        # some programs write a 1x1 convolution as a matrix, or a matrix as a 1x1 convolution
        expected = _without_ones((target.shape[0], *weight_shape(target.layer)[1:]))
        shape = _without_ones((found.up.shape[0], *found.kernel))
    if found is not None and shape != expected:
        raise DeftError(
            f"{adapter.source}: {target.name} is made for a weight of {shape}, this model has "
            f"{expected}; the file looks made for {looks_made_for(adapter.tensors)}"
        )


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A weight's shape without a kernel of 1 x 1."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def _load_layer(module: DeftModule, adapter: AdapterFile, config: DeftConfig) -> float | None:
    """Loads one layer; the relative error where `truncate` cut its rank, else None."""
    layer = adapter.layer_of(module.target)
    assert layer is not None
    if isinstance(layer, DeftLayer) and _same_form(layer, module, config):
        R = None if layer.R is None else layer.R * (layer.scale / module.scale)
        module.set_matrices(layer.P, R, layer.E0)
        module.spread_removal()
        if module.g is not None and layer.gate is not None:
            module.g.data.copy_(layer.gate)
        return None
    up, down = factors_of(layer, module.base_weight)
    if up.shape[1] <= module.rank:
        module.load_lora(up, down)
        return None
    with naming(f"{adapter.source}: {module.lora_name}"):
        cut, error = deft_factors.truncated(Factors(up.double(), down.double(), down.shape[1:]), module.rank)
    if module.rank == min(module.target.shape):  # the product's rank is no higher: nothing is lost
        module.load_lora(cut.up, cut.down)
        return None
    if not config.truncate:
        raise DeftError(
            f"{adapter.source}: {module.lora_name} has rank {up.shape[1]}, the network {module.rank}; use "
            f"--dim_from_weights, a larger dim, or --network_args truncate=true (best approximation)"
        )
    module.load_lora(cut.up, cut.down)
    return error


def _same_form(layer: DeftLayer, module: DeftModule, config: DeftConfig) -> bool:
    """Whether the module can take over a DEFT file's matrices as they are."""
    return (
        layer.trained_rank == module.rank
        and layer.basis == config.basis
        and (layer.R is None) == config.para
        and (layer.gate is None) == (module.g is None)
        and (config.removal > 0 or not layer.removes)
    )
