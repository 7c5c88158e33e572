"""The weights of adapted layers: read as the formulas need them, whatever holds them, and changed in place."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from networks.deft_config import DeftError
from networks.deft_targets import Layer, Target

# --- quantised weights ------------------------------------------------------------------------------------------------


def _is_four_bit(layer: Layer) -> bool:
    return getattr(layer.weight, "quant_state", None) is not None


def _four_bit(layer: Layer) -> Tensor:
    """Of bitsandbytes' Linear4bit, NF4 and FP4; a weight of it that has not been moved yet is a plain one."""
    weight: Any = layer.weight
    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        layer.state_dict()  # puts back into its place what pictures drawn on a CPU have moved
    here = weight.data.to(weight.quant_state.absmax.device)  # scales stay where blocks that are swapped come and go
    return sys.modules["bitsandbytes"].functional.dequantize_4bit(here, weight.quant_state)


def _largest_of_rows(layer: Layer) -> Tensor | None:
    """Of bitsandbytes' Linear8bitLt; its first forward pass takes them from the weight to the layer."""
    found = getattr(layer.weight, "SCB", None)
    return getattr(getattr(layer, "state", None), "SCB", None) if found is None else found


def _eight_bit(layer: Layer) -> Tensor:
    largest = _largest_of_rows(layer)
    assert largest is not None, "asked before"
    return layer.weight.data * (largest.float() / 127).unsqueeze(1)


def _dequantises_itself(layer: Layer) -> bool:
    """torchao's tensors, and optimum-quanto's. Every tensor has this method, for quantisation of torch's own."""
    return type(layer.weight).dequantize is not Tensor.dequantize


def _itself(layer: Layer) -> Tensor:
    return layer.weight.dequantize()


# whether a layer is quantised in a way, and what its weight stands for: (m, n), in the dtype that it computes in. As
# torchao 0.18 and bitsandbytes 0.50 do it; neither is imported here
_WAYS: tuple[tuple[Callable[[Layer], bool], Callable[[Layer], Tensor]], ...] = (
    (_is_four_bit, _four_bit),
    (lambda layer: layer.weight.dtype == torch.int8 and _largest_of_rows(layer) is not None, _eight_bit),
    (_dequantises_itself, _itself),
)


def is_quantised(layer: Layer) -> bool:
    """Whether a layer keeps its weight in a form that only its own forward pass computes with, known here."""
    if type(layer.weight) in (nn.Parameter, Tensor):  # asked in every forward pass
        return False
    return any(is_of(layer) for is_of, _ in _WAYS)


def check_readable(target: Target) -> None:
    """:raises DeftError: for a quantised layer that is not read here"""
    for place in target.places:
        if not place.layer.weight.is_floating_point() and not is_quantised(place.layer):
            raise DeftError(
                f"{place.name}: the weight of a {type(place.layer).__name__} in {place.layer.weight.dtype} is not "
                f"read; quantise the model with torchao or bitsandbytes"
            )


def streamed(targets: Iterable[Target]) -> str:
    """The name of a layer whose weight is in the memory of another's, "" if none is: both are streamed through one
    buffer, which at this moment holds the weight of one of them."""
    seen: dict[tuple[torch.device, int], Layer] = {}
    for place in (place for target in targets for place in target.places):
        weight = place.layer.weight
        plain = type(weight) in (nn.Parameter, Tensor) and not weight.is_meta and weight.numel()
        if plain and seen.setdefault((weight.device, weight.data_ptr()), place.layer) is not place.layer:
            return place.name
    return ""


# --- reading ----------------------------------------------------------------------------------------------------------


def read_weight(layer: Layer, rows: tuple[int, int] | None = None, device: torch.device | None = None) -> Tensor:
    """The layer's weight as (outputs, inputs * kernel), detached, read where it is at this moment.

    :param rows: (first, behind last) of the outputs that are asked for
    :param device: where it is wanted, if not where it is
    :returns: in its own dtype, scaled fp8 in its scale's; of a quantised layer, what its numbers stand for, made anew
        in every call
    :raises DeftError: when the weight is on the meta device
    """
    if layer.weight.is_meta:
        raise DeftError(f"the weight of a {type(layer).__name__} layer is not loaded (meta device), but DEFT needs it")
    if is_quantised(layer):
        weight = rows_of(_read_quantised(layer), rows)
        return weight if device is None else weight.to(device)
    weight = rows_of(layer.weight.detach(), rows).flatten(1)
    weight = weight if device is None else weight.to(device)
    scale = getattr(layer, "scale_weight", None)
    return weight if scale is None else _dequantised(weight, scale, rows)


@torch.no_grad()
def _read_quantised(layer: Layer) -> Tensor:
    return next(read for is_of, read in _WAYS if is_of(layer))(layer).flatten(1)


def _dequantised(weight: Tensor, scale: Tensor, rows: tuple[int, int] | None) -> Tensor:
    """The weight (m, n) of a scaled fp8 layer, as sd-scripts' library/fp8_optimization_utils.py (commit 48d368fa)
    reads it in the forward pass.

    :param scale: one number, one a row (m, 1), or one for each block of a row's inputs (m, blocks, 1)
    """
    if scale.dim() > 1 and scale.shape[0] > 1:
        scale = rows_of(scale, rows)
    scale, weight = scale.to(weight.device), weight.to(scale.dtype)
    if scale.dim() < 3:
        return weight * scale
    return (weight.unflatten(1, (scale.shape[1], -1)) * scale).flatten(1)


def rows_of(weight: Tensor, rows: tuple[int, int] | None) -> Tensor:
    """The rows (first, behind last) of a weight, or all."""
    return weight if rows is None else weight[slice(*rows)]


def held_weight(target: Target) -> Tensor:
    """The numbers of a target's layers as the model has them, stacked, (m, ...): those of scaled fp8 without scale; of
    quantised layers what they stand for."""
    parts = [
        read_weight(place.layer, place.rows)
        if is_quantised(place.layer)
        else rows_of(place.layer.weight.detach(), place.rows)
        for place in target.places
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def dtype_name(place: Target) -> str:
    """What `held_weight` has of a layer: "bfloat16", "bfloat16 of Int8Tensor"."""
    weight: Any = place.layer.weight
    if not is_quantised(place.layer):
        return str(weight.dtype).removeprefix("torch.")
    computed = weight.quant_state.dtype if _is_four_bit(place.layer) else weight.dtype
    name = "float32" if computed == torch.int8 else str(computed).removeprefix("torch.")
    return f"{name} of {type(weight).__name__}"


def base_weight(target: Target, device: torch.device | None = None) -> Tensor:
    """W of a target as (m, n), the weights of several layers stacked; of a layer that a delta has been merged into,
    what `backup` has kept.

    :raises DeftError: when a weight is on the meta device
    """
    parts = [_kept_weight(place, device) for place in target.places]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _kept_weight(place: Target, device: torch.device | None) -> Tensor:
    if getattr(place.layer, "_lora_restored", True):
        return read_weight(place.layer, place.rows, device)
    kept = rows_of(place.layer.__dict__["_lora_org_weight"], place.rows).flatten(1)
    return kept if device is None else kept.to(device)


def check_mergeable(targets: Iterable[Target]) -> None:
    """:raises DeftError: where a weight is scaled fp8 or quantised: rounding it anew would lose most of a delta"""
    for place in (place for target in targets for place in target.places):
        if hasattr(place.layer, "scale_weight"):
            raise DeftError(f"{place.name}: cannot be merged into a scaled fp8 weight; merge into the bf16 file first")
        if is_quantised(place.layer):
            raise DeftError(
                f"{place.name}: cannot be merged into a quantised weight; merge before the model is quantised, or "
                f"apply the adapter beside it"
            )


@torch.no_grad()
def add_to_weight(target: Target, up: Tensor, down: Tensor, multiplier: float) -> None:
    """W += multiplier * up @ down, computed in float32 on the weight's device and cast once to its dtype.

    :raises DeftError: see `check_mergeable`
    """
    check_mergeable([target])
    for place, rows in zip(target.places, up.split([place.shape[0] for place in target.places]), strict=True):
        weight = rows_of(place.layer.weight.data, place.rows)
        delta = rows.to(weight.device, torch.float32) @ down.to(weight.device, torch.float32)
        weight.copy_((read_weight(place.layer, place.rows).float() + multiplier * delta).view_as(weight))


def backup(target: Target) -> None:
    """Keeps a copy of each weight on its layer, under the attribute names of sd-scripts' networks."""
    for place in target.places:
        if not hasattr(place.layer, "_lora_org_weight"):
            kept = place.layer.weight.detach().clone()
            place.layer.__dict__.update(_lora_org_weight=kept, _lora_restored=True)


def restore(target: Target) -> None:
    """Copies each kept weight back, if it was changed."""
    for place in target.places:
        kept = place.layer.__dict__
        if not kept["_lora_restored"]:
            place.layer.weight.data.copy_(kept["_lora_org_weight"])
            kept["_lora_restored"] = True
