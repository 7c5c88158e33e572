"""A DEFT on another base model than it was trained on, as a plain LoRA for that one; removal and injection apart.

A file of `removal=1` holds what does not depend on a base: P (so L and E), E0, R and s. On a base W it is

    W' = W - x L (E - E0)^T W + y L s R

with x and y 1: on the training's base that is what was trained, exactly. x is the strength of what is removed, W's part
in the directions that have turned away from the start, and y that of what is injected; with both 0 W' is W.

In the paper's terms, W' = W - x Q Q^T W + y Q s R_paper, R_paper holds the training base's own part as well,
s R_paper = s R + E0^T W_trained, which the file does not have and another base has no use for. Here the start's part is
put back from W itself, once and for all: of Q Q^T W only Q (Q - E0)^T W is removed, and only s R counts as injected.
Where the start put nothing back (`init=paper` and PaRa: E0 = 0), both say the same.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from networks import deft_factors, deft_io, deft_math
from networks.deft_architectures import ARCHITECTURES
from networks.deft_checkpoint import Checkpoint
from networks.deft_config import DeftError
from networks.deft_factors import Factors
from networks.deft_io import AdapterFile, DeftLayer
from networks.deft_progress import progress
from networks.deft_targets import TOGETHER


def depends_on_base(adapter: AdapterFile) -> bool:
    """Whether its change of a weight depends on that weight: something of the base stays out."""
    return any(isinstance(layer, DeftLayer) and layer.removes for layer in adapter.layers.values())


def rebased(adapter: AdapterFile, base: Checkpoint, removal: float = 1.0, injection: float = 1.0) -> dict[str, Factors]:
    """The changes that it makes on a base, by key name of the whole weight, float32; parts of one weight put together.

    :param adapter: of DEFT layers
    :param removal: x of the formula above
    :param injection: y
    :raises DeftError: when the base has other layers, or of other shapes
    """
    places = {name: _place(adapter, name, base) for name in adapter.layers}
    parts: dict[str, list[tuple[Factors, int]]] = {}
    for name, place in progress(list(places.items()), "rebasing"):
        layer = adapter.layers[name]
        assert isinstance(layer, DeftLayer)
        up, down = _on_weight(layer, place.read(base), removal, injection)
        for (whole, first, _), some in zip(place.rows, up.split([n for _, _, n in place.rows]), strict=True):
            parts.setdefault(whole, []).append((Factors(some, down, place.inputs), first))
    return {name: _of_whole(found, base.layers[name].shape[0]) for name, found in parts.items()}


def _on_weight(layer: DeftLayer, W: Tensor, removal: float, injection: float) -> tuple[Tensor, Tensor]:
    """up (m, r) and down (r, n) on W (m, n)."""
    scale = layer.scale * (1.0 if layer.gate is None else float(torch.sigmoid(layer.gate.float())))
    R = None if layer.R is None else layer.R.float()
    return deft_math.lora_factors(
        layer.P.float(), R, layer.E0.float(), scale * injection, layer.basis, lambda: W, removal
    )


def _of_whole(parts: Sequence[tuple[Factors, int]], outputs: int) -> Factors:
    if len(parts) == 1 and parts[0][0].up.shape[0] == outputs:
        return parts[0][0]
    return deft_factors.stacked(parts, outputs)


# --- where a layer stands in a base -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """The weight that an adapter's layer is for: rows of one, or of several stacked.

    :param rows: (key name of the whole weight, the first of its rows, how many) of each
    :param inputs: the weight's shape behind its outputs
    """

    rows: tuple[tuple[str, int, int], ...]
    inputs: tuple[int, ...]

    def read(self, base: Checkpoint) -> Tensor:
        """(m, n), float32."""
        return torch.cat([base.weight(name).flatten(1)[first : first + n] for name, first, n in self.rows])


def _place(adapter: AdapterFile, name: str, base: Checkpoint) -> _Place:
    """:raises DeftError: when the base has no such layer, or of another shape"""
    layer = adapter.layers[name]
    assert isinstance(layer, DeftLayer)
    found = [_rows(adapter, one, base) for one in name.split(TOGETHER)]
    inputs = found[0][1]
    n = math.prod(inputs)
    made_for = (layer.E0.shape[0], n if layer.R is None else layer.R.shape[1])
    there = (sum(rows for (_, _, rows), _ in found), n)
    if made_for != there or len({own for _, own in found}) > 1:
        raise DeftError(f"--base {base.source}: {name} is made for a weight of {made_for}, it has {there} there")
    return _Place(tuple(rows for rows, _ in found), inputs)


def _rows(adapter: AdapterFile, name: str, base: Checkpoint) -> tuple[tuple[str, int, int], tuple[int, ...]]:
    """The rows of a `_Place`, and its inputs.

    :raises DeftError: when the base has no such layer
    """
    whole, _, part = name.partition("-")
    if whole not in base.layers:
        raise DeftError(f"--base {base.source}: it has no layer {whole}, which {adapter.source} changes")
    shape, first = tuple(base.layers[whole].shape), 0
    if part:
        sizes = _part_sizes(whole, shape)
        if not part.isdigit() or int(part) >= len(sizes):
            raise DeftError(f"{adapter.source}: {name} is no part of a layer that is known here")
        first, shape = sum(sizes[: int(part)]), (sizes[int(part)], *shape[1:])
    return (whole, first, shape[0]), shape[1:]


def _part_sizes(name: str, shape: Sequence[int]) -> list[int]:
    """Outputs of the parts of a fused weight, as `split_qkv` and Diffusers have them; empty for another weight."""
    m, n = shape[0], shape[1]
    for architecture in ARCHITECTURES:
        for pattern, with_mlp in architecture.fused.items():
            if re.search(pattern, name):
                return [n, n, n, m - 3 * n] if with_mlp else [n, (m - n) // 2, (m - n) // 2]
    return []


# --- whether it is the training's -------------------------------------------------------------------------------------


def trained_on(adapter: AdapterFile, metadata: Mapping[str, str], base: Checkpoint) -> bool | None:
    """Whether a base has the weights that the adapter was trained on; None where the file does not say which it was.

    False for the same weights too where the training had them in more than two dtypes, or rounded twice.
    """
    recorded, dtypes = metadata.get(deft_io.BASE_HASH_KEY), _dtypes(metadata)
    try:
        names = list(json.loads(metadata.get(deft_io.LAYERS_KEY, "{}")))
    except (ValueError, RecursionError):
        names = []
    if not recorded or not dtypes or set(names) != adapter.layers.keys():
        return None
    places = {name: _place(adapter, name, base) for name in names}
    halves = sorted({name.startswith("lora_unet") for name in names})
    for chosen in itertools.product(dtypes, repeat=len(halves)):
        dtype_of = dict(zip(halves, chosen, strict=True))
        if set(chosen) == set(dtypes) and recorded == deft_io.base_fingerprint(_weights(places, base, dtype_of)):
            return True
    return False


def _weights(
    places: Mapping[str, _Place], base: Checkpoint, dtype_of: Mapping[bool, torch.dtype]
) -> Iterator[tuple[str, Tensor]]:
    for name, place in progress(list(places.items()), "comparing the base's weights"):
        yield name, place.read(base).to(dtype_of[name.startswith("lora_unet")])


def _dtypes(metadata: Mapping[str, str]) -> list[torch.dtype]:
    found = [getattr(torch, name, None) for name in metadata.get(deft_io.BASE_DTYPE_KEY, "").split(",")]
    known = [dtype for dtype in found if isinstance(dtype, torch.dtype)]
    return known if len(known) == len(found) else []  # of a quantised base, whose file has other weights
