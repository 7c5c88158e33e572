"""Facts of an adapter file: what it is, its ranks and norms layer by layer, and what each client makes of it."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from networks import deft_blocks, deft_clients, deft_factors, deft_formats, deft_io
from networks.deft_checkpoint import Checkpoint
from networks.deft_clients import CLIENTS, DORA_SCALE, LORAS, Client, Outline, Reading
from networks.deft_config import DeftError
from networks.deft_factors import Factors
from networks.deft_formats import Adapter, Change
from networks.deft_inventory import Inventory
from networks.deft_progress import Bar

ENERGY = 0.99  # of the effective rank
IN_USE = 1e-5  # a direction below this part of the largest is rounding
ROWS = 256  # outputs of a layer on which clients are compared


@dataclass(frozen=True)
class LayerFacts:
    """One layer's change.

    :param values: singular values, falling; none of a change that is no product of two small matrices
    :param norm: Frobenius; nan where it depends on the base model
    :param relative: norm to that of the base model's weight, where there is one
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rank: int | None
    alpha: float | None
    values: Tensor
    norm: float
    relative: float | None = None

    @property
    def in_use(self) -> int:
        """Directions above rounding."""
        return int((self.values > IN_USE * self.values[0]).sum()) if len(self.values) and self.values[0] > 0 else 0

    @property
    def effective(self) -> int:
        """Directions that have 99% of the squared norm."""
        return min(deft_factors.rank_of_energy(self.values, ENERGY), self.in_use) if self.in_use else 0

    @property
    def block(self) -> str:
        """For grouping: a text encoder, or a block of the U-Net or transformer."""
        if self.name.startswith("lora_te"):
            return {"lora_te2": "TE2", "lora_te3": "T5"}.get(self.name[:8], "TE")
        return deft_blocks.block_of(self.name) or "other"


@dataclass
class Error:
    """How far a client's deltas are from the right ones, in parts of their norms."""

    largest: float = 0.0
    layer: str = ""
    squares: float = 0.0
    whole: float = 0.0

    def add(self, name: str, difference: float, norm: float) -> None:
        """:param difference: norm of the difference"""
        self.squares, self.whole = self.squares + difference**2, self.whole + norm**2
        if norm > 0 and difference / norm > self.largest:
            self.largest, self.layer = difference / norm, name

    @property
    def total(self) -> float:
        return math.sqrt(self.squares / self.whole) if self.whole else 0.0


@dataclass
class Report:
    """All that is known of a file.

    :param problem: why it could not be understood as an adapter, if so
    :param not_finite: layers with NaN or infinite numbers; they are in none of `layers`
    :param readings: client -> what it makes of the file; None where it does not run the model
    :param errors: client -> how far its deltas are from the right ones; with a base model alone
    """

    path: str
    size: int
    tensors: int
    dtypes: Counter[str]
    metadata: Mapping[str, str]
    adapter: Adapter | None = None
    problem: str = ""
    not_finite: list[str] = field(default_factory=list)
    layers: list[LayerFacts] = field(default_factory=list)
    known: Inventory | None = None
    readings: dict[str, Reading | None] = field(default_factory=dict)
    errors: dict[str, Error] = field(default_factory=dict)
    base: str = ""
    base_missing: list[str] = field(default_factory=list)

    @property
    def zero(self) -> list[str]:
        """Layers that have learnt nothing."""
        return [layer.name for layer in self.layers if layer.norm == 0]


def report(path: str, base: Checkpoint | None) -> Report:
    """Reads a file and finds out all that can be said of it.

    :raises DeftError: when it is no whole safetensors file, or made for another architecture than the base model
    """
    tensors, metadata = _read(path)
    dtypes = Counter({str(t.dtype).removeprefix("torch."): 0 for t in tensors.values()})
    for tensor in tensors.values():
        dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    found = Report(path, Path(path).stat().st_size if Path(path).is_file() else size, len(tensors), dtypes, metadata)
    outline = Outline.of(tensors, metadata)
    found.known = deft_clients.made_for(outline)
    if found.known is not None and deft_clients.is_published(outline, found.known):
        found.readings = deft_clients.readings(outline, found.known)
    groups = deft_clients.grouped(tensors)
    bad = {stem for stem, rests in groups.items() if not all(_finite(tensors[key]) for key in rests.values())}
    found.not_finite = sorted(bad)
    finite = {
        key: t for stem, rests in groups.items() if stem not in bad for key in rests.values() for t in [tensors[key]]
    }
    try:
        found.adapter = deft_formats.parse(finite, metadata, path) if Path(path).is_file() else deft_formats.read(path)
    except DeftError as error:
        found.problem = str(error)
        return found
    if base is not None:
        _check_base(found.adapter, base)
        found.base = str(base.source)
    _measure(found, finite, groups, base)
    return found


def _read(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not Path(path).is_dir():
        return deft_io.read_tensors(path)
    files = sorted(Path(path).glob("**/adapter_model.safetensors"))
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        found, metadata = deft_io.read_tensors(file)
        tensors |= {f"{file.parent.name}/{key}" if len(files) > 1 else key: t for key, t in found.items()}
    if not tensors:
        raise deft_formats.no_adapter_in(Path(path))
    return tensors, metadata


def _finite(tensor: Tensor) -> bool:
    small = tensor.float() if tensor.element_size() == 1 else tensor
    return bool(torch.isfinite(small).all())


def _check_base(adapter: Adapter, base: Checkpoint) -> None:
    if adapter.architecture and adapter.architecture != base.architecture:
        raise DeftError(
            f"--base {base.source}: a model of {base.architecture}, and {adapter.source} is for {adapter.architecture}"
        )


def _measure(
    found: Report, tensors: Mapping[str, Tensor], groups: Mapping[str, Mapping[str, str]], base: Checkpoint | None
) -> None:
    assert found.adapter is not None
    changes = found.adapter.changes
    stems = _stems(found, groups)
    places = {} if base is None else {**base.layers, **base.further}
    if base is not None:
        found.errors = {name: Error() for name, reading in found.readings.items() if reading and not reading.refused}
    with Bar(len(changes), Path(found.path).name, "layer") as bar:
        for name, change in changes.items():
            stem = stems.get(name, "")
            parts = {rest: tensors[key] for rest, key in groups.get(stem, {}).items()}
            alpha = deft_clients.recorded_alpha(found.adapter.metadata, stem, {r: t.shape for r, t in parts.items()})
            parts |= {} if alpha is None else {".alpha": torch.tensor(alpha)}
            W = None
            if base is not None and name in places and _same_size(places[name].shape, change.shape):
                W = base.weight(name)
            elif base is not None:
                found.base_missing.append(name)
            facts = layer_facts(name, change, parts, W)
            found.layers.append(facts)
            if base is not None and W is not None and any(kind.signs[0] in parts for kind in LORAS):
                _compare(found, stems[name], parts, change, W, _dtype(base, name))
            bar.add(1)


def _same_size(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return shape[0] == other[0] and (0 in other or math.prod(shape) == math.prod(other))


def _dtype(base: Checkpoint, name: str) -> torch.dtype:
    """That in which a client would hold the base model: fp8 is computed in half precision."""
    dtype = base.entries[base.place(name).pieces[0].key].dtype
    return dtype if dtype in (torch.float32, torch.bfloat16) else torch.float16


def _stems(found: Report, groups: Mapping[str, object]) -> dict[str, str]:
    """Kohya's key name of a whole weight -> what the file calls the layer, where it has it in one piece."""
    if found.known is None:
        return {stem: stem for stem in groups}
    names = deft_clients.all_names(found.known.name)
    stems: dict[str, str] = {}
    for stem in groups:
        plain = stem.replace(".processor.", ".")
        layer = names.get(stem) or names.get(plain + ".0" if plain.endswith(".to_out") else plain)
        if layer is not None and (len(layer.diffusers) == 1 or layer.path.split(".")[-1] in re.split(r"[._]", stem)):
            stems[found.known.key(layer)] = stem
    return stems | {stem: stem for stem in groups if stem not in names}


def layer_facts(name: str, change: Change, parts: Mapping[str, Tensor], W: Tensor | None) -> LayerFacts:
    """:param parts: the layer's tensors in the file, by the ends of their keys"""
    kind = next((kind for kind in deft_clients.KINDS if any(sign in parts for sign in kind.signs)), None)
    word = "DoRA" if DORA_SCALE in parts else kind.name if kind else "LoRA"
    if ".lora_mid.weight" in parts:
        word = "LoCon with a middle"
    values, norm = torch.empty(0), math.nan
    if isinstance(change, Factors):
        with contextlib.suppress(ValueError):  # too large to be multiplied: a norm that is no number tells
            values = deft_factors.spectrum(change)
            norm = float(values.double().norm())
    elif isinstance(change, deft_formats.Dense):
        norm = float(change.delta().double().norm())
    elif W is not None:
        norm = float(change.delta(W.flatten(1)).double().norm())
    alpha = parts.get(".alpha")
    return LayerFacts(
        name,
        word,
        change.shape,
        _rank(parts, change),
        float(alpha) if alpha is not None and alpha.numel() == 1 else None,
        values,
        norm,
        None if W is None or math.isnan(norm) else norm / max(float(W.norm()), 1e-30),
    )


def _rank(parts: Mapping[str, Tensor], change: Change) -> int | None:
    """As the file has it, padding included."""
    for kind in LORAS:
        if kind.needs[0] in parts:
            return parts[kind.needs[0]].shape[0]
    sizes = [parts[rest].shape[-1] for rest in (".hada_w1_a", ".lokr_w2_a", ".lokr_w1_a", ".deft_E0") if rest in parts]
    return sizes[0] if sizes else change.rank if isinstance(change, Factors) else None


# --- as clients read it -----------------------------------------------------------------------------------------------


def _compare(
    found: Report, stem: str, parts: Mapping[str, Tensor], change: Change, W: Tensor, dtype: torch.dtype
) -> None:
    flat = W.flatten(1)
    rows = slice(None) if DORA_SCALE in parts else slice(0, None, max(1, -(-len(flat) // ROWS)))
    right = _right(change, flat, rows)
    norm = float(right.norm())
    for client in CLIENTS:
        reading = found.readings.get(client.name)
        if reading is None or reading.refused:
            continue
        if not any(deft_clients.split(key)[0] == stem for key in reading.matched if key.startswith(stem)):
            found.errors[client.name].add(stem, norm, norm)
            continue
        seen = as_read(client, parts, W, dtype, rows) * reading.factors.get(stem, 1.0)
        found.errors[client.name].add(stem, float((seen - right).norm()), norm)


def _right(change: Change, flat: Tensor, rows: slice) -> Tensor:
    if isinstance(change, Factors):
        return change.up[rows] @ change.down
    return (change.delta() if isinstance(change, deft_formats.Dense) else change.delta(flat))[rows]


def as_read(client: Client, parts: Mapping[str, Tensor], W: Tensor, dtype: torch.dtype, rows: slice) -> Tensor:
    """Some rows of a LoRA's delta (m, n) as a client computes it, in float32.

    :param parts: the layer's tensors in the file, by the ends of their keys
    :param W: the base model's weight, float32
    :param dtype: in which the client holds the base model
    """
    kind = next(kind for kind in LORAS if kind.signs[0] in parts)
    up, down, mid = (parts.get(rest) for rest in (kind.signs[0], kind.needs[0], ".lora_mid.weight"))
    assert up is not None
    assert down is not None
    rank = down.shape[0]
    scale = 1.0 if ".alpha" not in parts else float(parts[".alpha"]) / rank
    if scale == 0 and client.zero_alpha:
        scale = 1.0
    order = {"float32": torch.float32, "model": dtype, "file": up.dtype}[client.order]
    up, down = up.flatten(1)[rows].to(order), down.to(order)
    if mid is not None:
        down = torch.einsum("ij...,jn->in...", mid.to(order), down.flatten(1))
    delta = (up @ down.flatten(1)) * scale
    lengths = parts.get(DORA_SCALE)
    if lengths is None or client.dora in ("", "plain"):
        return delta.float()
    return _dora_as_read(client, delta.float(), lengths.float(), W)


def _dora_as_read(client: Client, delta: Tensor, lengths: Tensor, W: Tensor) -> Tensor:
    """Norms over the outputs in all clients; but ComfyUI and Forge take lengths of outputs to be those of W before."""
    new = W + delta.reshape(W.shape)
    lengths = lengths.reshape(*lengths.shape[:2], *(1,) * (W.dim() - 2))
    if client.dora == "file" and lengths.shape[0] == W.shape[0]:
        norm = W.flatten(1).norm(dim=1).reshape(-1, *(1,) * (W.dim() - 1))
    else:
        norm = new.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *(1,) * (W.dim() - 2))
    return (new * (lengths / norm) - W).flatten(1)


# --- as JSON ----------------------------------------------------------------------------------------------------------


def blocks(layers: list[LayerFacts]) -> Iterator[tuple[str, list[LayerFacts]]]:
    """(block, its layers), text encoders first, in the model's order."""
    groups: dict[str, list[LayerFacts]] = {}
    for layer in layers:
        groups.setdefault(layer.block, []).append(layer)
    order = ("TE", "TE2", "T5", "IN", "MID", "OUT", "D", "S", "B", "other")
    place = {name: (order.index(re.sub(r"(?<!^TE)(?<!^T)\d+$", "", name)), name) for name in groups if name != "BASE"}
    for name in sorted(groups, key=lambda name: place.get(name, (0, ""))):
        yield name, groups[name]


def norm_of(layers: list[LayerFacts]) -> float:
    """Of all their changes together."""
    return math.sqrt(sum(layer.norm**2 for layer in layers if not math.isnan(layer.norm)))


def training(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The training's essentials, by short names; empty where nothing is said."""
    names = {
        "base": ("ss_sd_model_name", "modelspec.title_base"),
        "module": ("ss_network_module",),
        "dim": ("ss_network_dim",),
        "alpha": ("ss_network_alpha",),
        "steps": ("ss_steps",),
        "epochs": ("ss_epoch",),
        "pictures": ("ss_num_train_images",),
        "rate": ("ss_unet_lr", "ss_learning_rate"),
        "optimizer": ("ss_optimizer",),
        "title": ("modelspec.title",),
        "trigger": ("modelspec.trigger_phrase",),
        "version": ("ss_base_model_version",),
    }
    found = {name: next((metadata[key] for key in keys if metadata.get(key)), "") for name, keys in names.items()}
    given: dict[str, Any] = {name: value for name, value in found.items() if value not in ("", "None")}
    tags = _tags(metadata.get("ss_tag_frequency", ""))
    return given | ({"tags": dict(tags.most_common(5))} if tags else {})


def _tags(text: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    try:
        for folder in json.loads(text).values() if text else ():
            counts.update({str(tag).strip(): int(number) for tag, number in folder.items()})
    except (AttributeError, TypeError, ValueError, RecursionError):
        return Counter()
    return counts


def options(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The DEFT options that a file of ours names."""
    try:
        return dict(json.loads(metadata.get(deft_io.OPTIONS_KEY, "{}")))
    except (TypeError, ValueError, RecursionError):
        return {}


def as_json(found: Report) -> dict[str, Any]:
    """All of it, under keys that stay."""
    return {
        "file": found.path,
        "bytes": found.size,
        "tensors": found.tensors,
        "dtypes": dict(found.dtypes.most_common()),
        "format": found.adapter.format if found.adapter else None,
        "architecture": found.adapter.architecture if found.adapter else "",
        "model": found.known.title if found.known else None,
        "problem": found.problem or None,
        "kinds": dict(Counter(layer.kind for layer in found.layers)),
        "ranks": _counted([layer.rank for layer in found.layers]),
        "ranks_in_use": _counted([layer.in_use for layer in found.layers if len(layer.values)]),
        "effective_ranks": _counted([layer.effective for layer in found.layers if len(layer.values)]),
        "alphas": _counted([layer.alpha for layer in found.layers]),
        "norm": _number(norm_of(found.layers)),
        "not_finite": found.not_finite,
        "zero": found.zero,
        "left": dict(found.adapter.left) if found.adapter else {},
        "training": training(found.metadata),
        "deft": {"version": found.metadata.get(deft_io.VERSION_KEY), "options": options(found.metadata)},
        "base": {
            "fingerprint": found.metadata.get(deft_io.BASE_HASH_KEY),
            "dtype": found.metadata.get(deft_io.BASE_DTYPE_KEY),
            "compared_with": found.base or None,
            "not_there": found.base_missing,
        },
        "blocks": [
            {"block": name, "layers": len(part), "norm": _number(norm_of(part))} for name, part in blocks(found.layers)
        ],
        "layers": [_layer_json(layer) for layer in found.layers],
        "clients": [_client_json(found, client) for client in CLIENTS] if found.readings else [],
    }


def _layer_json(layer: LayerFacts) -> dict[str, Any]:
    return {
        "name": layer.name,
        "block": layer.block,
        "kind": layer.kind,
        "shape": list(layer.shape),
        "rank": layer.rank,
        "rank_in_use": layer.in_use if len(layer.values) else None,
        "effective_rank": layer.effective if len(layer.values) else None,
        "alpha": layer.alpha,
        "norm": _number(layer.norm),
        "relative_norm": None if layer.relative is None else _number(layer.relative),
        "spectrum": [_number(float(value)) for value in layer.values],
    }


def _client_json(found: Report, client: Client) -> dict[str, Any]:
    reading, error = found.readings.get(client.name), found.errors.get(client.name)
    facts: dict[str, Any] = {"client": client.name, "version": client.version, "runs_model": reading is not None}
    if reading is None:
        return facts
    return facts | {
        "keys": len(reading.matched),
        "ignored": found.tensors - len(reading.matched),
        "refused": reading.refused or None,
        "wrong": reading.wrong,
        "remarks": reading.remarks,
        "largest_error": None if error is None else _number(error.largest),
        "error": None if error is None else _number(error.total),
    }


def _counted(values: list[Any]) -> dict[str, int]:
    return {str(value): number for value, number in Counter(v for v in values if v is not None).most_common()}


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
