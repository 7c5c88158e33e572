"""The weights of adapted layers: read as the formulas need them, whatever holds them, and changed in place."""

from __future__ import annotations

import torch
from torch import Tensor

from networks.deft_config import DeftError
from networks.deft_targets import Layer, Target


def read_weight(layer: Layer, rows: tuple[int, int] | None = None, device: torch.device | None = None) -> Tensor:
    """The layer's weight as (outputs, inputs * kernel), detached, read where it is at this moment.

    :param rows: (first, behind last) of the outputs that are asked for
    :param device: where it is wanted, if not where it is
    :returns: in its own dtype, scaled fp8 in its scale's
    :raises DeftError: when the weight is on the meta device
    """
    if layer.weight.is_meta:
        raise DeftError(f"the weight of a {type(layer).__name__} layer is not loaded (meta device), but DEFT needs it")
    weight = rows_of(layer.weight.detach(), rows).flatten(1)
    weight = weight if device is None else weight.to(device)
    scale = getattr(layer, "scale_weight", None)
    return weight if scale is None else _dequantised(weight, scale, rows)


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


@torch.no_grad()
def add_to_weight(target: Target, up: Tensor, down: Tensor, multiplier: float) -> None:
    """W += multiplier * up @ down, computed in float32 on the weight's device and cast once to its dtype.

    :raises DeftError: for a scaled fp8 weight, which would have to be scaled anew
    """
    for place, rows in zip(target.places, up.split([place.shape[0] for place in target.places]), strict=True):
        if hasattr(place.layer, "scale_weight"):
            raise DeftError(f"{place.name}: cannot be merged into a scaled fp8 weight; merge into the bf16 file first")
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
