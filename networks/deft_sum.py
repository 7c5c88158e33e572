"""Sums of adapters, layer by layer: as factors, exactly or cut to a rank, or as a change of a weight at hand; and
what a file of several says of itself."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from networks import deft_blocks, deft_factors, deft_formats, deft_io, deft_tools
from networks.deft_blocks import Strength
from networks.deft_config import DeftError, naming
from networks.deft_factors import Factors
from networks.deft_formats import Adapter, Change, Dense, OnBase
from networks.deft_progress import progress

# fields that say what a file was trained as, or are sums over it, and of a sum of several are not true
UNTRUE = (
    "modelspec.hash_sha256",
    "ss_session_id",
    "ss_new_sd_model_hash",
    "ss_network_dropout",
    "ss_steps",
    "ss_epoch",
)
OF_ONE = (deft_io.OPTIONS_KEY, deft_io.LAYERS_KEY, deft_io.BASE_HASH_KEY, deft_io.BASE_DTYPE_KEY)


@dataclass(frozen=True)
class Part:
    """An adapter, and how much it counts."""

    adapter: Adapter
    strength: Strength

    def strengths(self) -> dict[str, float]:
        """Of its layers that count, by key name."""
        found = {name: self.strength.of(name) for name in self.adapter.changes}
        return {name: strength for name, strength in found.items() if strength != 0}


@dataclass(frozen=True)
class Rank:
    """What a sum is cut to: a rank at most, that of k x k convolutions, a share of each layer's squared norm."""

    most: int | None = None
    most_conv: int | None = None
    energy: float | None = None

    @property
    def limited(self) -> bool:
        """Whether anything is cut."""
        return self.most is not None or self.energy is not None

    def of(self, kernel: tuple[int, ...]) -> int | None:
        """The rank that a layer may have."""
        return self.most_conv if len(kernel) > 1 and kernel[1:] != (1, 1) else self.most


# a layer's change, of which adapter, and its strength
Found = tuple[Adapter, Change, float]


def read_parts(
    models: Sequence[str], ratios: Sequence[float], te_ratios: Sequence[float], lbws: Sequence[str]
) -> list[Part]:
    """The adapters that the command line names; a list that is empty stands for 1, or for the ratios.

    :raises DeftError: for lists of different lengths, files that cannot be read, or other architectures
    """
    for option, given in (("--ratios", ratios), ("--te_ratios", te_ratios), ("--lbws", lbws)):
        if given and len(given) != len(models):
            raise DeftError(f"{option}: {len(given)} for {len(models)} files in --models; give as many")
    for option, numbers in (("--ratios", ratios), ("--te_ratios", te_ratios)):
        if not all(map(math.isfinite, numbers)):
            raise DeftError(f"{option}: give finite numbers")
    adapters = [deft_formats.read(model) for model in models]
    check_architectures(adapters)
    ratios = ratios or [1.0] * len(models)
    parts = []
    for k, adapter in enumerate(adapters):
        weights = deft_blocks.block_weights(lbws[k], adapter.changes, adapter.architecture) if lbws else None
        parts.append(Part(adapter, Strength(ratios[k], te_ratios[k] if te_ratios else ratios[k], weights)))
    return parts


def check_architectures(adapters: Sequence[Adapter]) -> None:
    """:raises DeftError: when they are for different ones"""
    known = [adapter for adapter in adapters if adapter.architecture]
    for other in known[1:]:
        if other.architecture != known[0].architecture:
            raise DeftError(
                f"{known[0].source} is for {known[0].architecture}, {other.source} for {other.architecture}: "
                f"give adapters for one model"
            )


def same_weight(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether shapes are of one weight: with its kernel or flattened, 0 where a file does not tell."""
    if len(a) == len(b) == 4 and 0 not in (*a, *b):
        return tuple(a) == tuple(b)
    sizes = zip((a[0], math.prod(a[1:])), (b[0], math.prod(b[1:])), strict=True)
    return all(x == y or 0 in (x, y) for x, y in sizes)


def summed(parts: Sequence[Part], rank: Rank) -> tuple[dict[str, Factors], dict[str, float]]:
    """The sum of adapters as factors by key name, and each layer's relative error where it was cut.

    :raises DeftError: when nothing is left, a layer has different shapes, or a change cannot be expressed without more
        being said
    """
    strengths = [part.strengths() for part in parts]
    names = list(dict.fromkeys(name for many in strengths for name in many))
    if not names:
        raise DeftError("--ratios, --te_ratios and --lbws leave no layer of the adapters with a strength but 0")
    layers: dict[str, Factors] = {}
    errors: dict[str, float] = {}
    for name in progress(names, "adding", "layers"):
        pairs = [(part.adapter, many) for part, many in zip(parts, strengths, strict=True) if name in many]
        found = [(adapter, adapter.changes[name], many[name]) for adapter, many in pairs]
        layers[name], errors[name] = sum_of_layer(name, found, rank)
    return layers, errors


def sum_of_layer(name: str, found: Sequence[Found], rank: Rank) -> tuple[Factors, float]:
    """One layer's sum, and its relative error; of no higher rank than its weight can have."""
    _check_layer(name, found, rank)
    factors = [change.scaled(strength) for _, change, strength in found if isinstance(change, Factors)]
    if len(factors) == len(found):
        whole: Change = added(factors)
    else:
        shape = max((change.shape for _, change, _ in found), key=len)
        whole = Dense("a sum", shape, lambda: dense_sum(found))
    least = min(whole.shape[0], math.prod(whole.shape[1:]))
    with naming(name):
        return deft_formats.to_factors(whole, min(rank.of(whole.shape[1:]) or least, least), rank.energy, None)


def _check_layer(name: str, found: Sequence[Found], rank: Rank) -> None:
    """:raises DeftError: naming the layer, the file, and what to do"""
    first, change, _ = found[0]
    for adapter, other, _ in found:
        if not same_weight(other.shape, change.shape):
            raise DeftError(
                f"{name} has the shape {change.shape} in {first.source} and {other.shape} in {adapter.source}: "
                f"give adapters for one model"
            )
        if isinstance(other, OnBase):
            raise DeftError(
                f"{adapter.source}: {name} is {other.kind}, which depends on the base model's weights: merge it into "
                f"the checkpoint with --sd_model, or make a plain LoRA of it first: convert_deft.py --base MODEL"
            )
        if isinstance(other, Dense) and not rank.limited:
            raise DeftError(
                f"{adapter.source}: {name} is {other.kind}, of no rank that a LoRA could have: give --new_rank or "
                f"--energy"
            )


def added(factors: Sequence[Factors]) -> Factors:
    """Their sum, as a change of one weight, whose kernel is that of the one that has it."""
    kernel = max((part.kernel for part in factors), key=len)
    return deft_factors.concatenated([replace(part, kernel=kernel) for part in factors])


def dense_sum(found: Sequence[Found]) -> Tensor:
    """The sum (m, n) of changes that do not depend on a base."""
    whole = torch.zeros(())
    for _, change, strength in found:
        if not isinstance(change, OnBase):
            whole = whole + change.delta() * strength
    return whole


def change_of(W: Tensor, found: Sequence[Found]) -> Tensor:
    """The sum (m, n) of changes of one weight, each of the weight as it was before."""
    whole = torch.zeros_like(W)
    for _, change, strength in found:
        if isinstance(change, Factors):
            whole.addmm_(change.up, change.down, alpha=strength)
        else:
            delta = change.delta(W) if isinstance(change, OnBase) else change.delta()
            whole.add_(delta.reshape(W.shape), alpha=strength)
    return whole


def say_what_is_left(parts: Sequence[Part]) -> None:
    """What of the adapters is no change of a weight, and so in no sum."""
    for part in parts:
        for line in deft_tools.left_told(part.adapter.left):
            print(f"{part.adapter.source}: {line}")


def sum_metadata(
    parts: Sequence[Part], save_to: Path, rank: int, done: Mapping[str, object], tool: str
) -> dict[str, str]:
    """Of the first adapter, with the tags of all; what is not true of a sum is left out."""
    first = dict(parts[0].adapter.metadata)
    for key in (*UNTRUE, *OF_ONE):
        first.pop(key, None)
    if "ss_network_dim" in first or "ss_network_alpha" in first:
        first |= {"ss_network_dim": str(rank), "ss_network_alpha": str(float(rank))}
    first |= {"ss_output_name": save_to.stem} if "ss_output_name" in first else {}
    first |= _united_tags([part.adapter.metadata for part in parts])
    phrases = [part.adapter.metadata.get("modelspec.trigger_phrase", "") for part in parts]
    if any(phrases):
        first["modelspec.trigger_phrase"] = ", ".join(dict.fromkeys(filter(None, phrases)))
    first |= merged_fields([(part.adapter.source, part.adapter.metadata) for part in parts], save_to)
    return deft_tools.carried(first, tool, done)


def merged_fields(inputs: Sequence[tuple[str, Mapping[str, str]]], save_to: Path) -> dict[str, str]:
    """The fields that sd-scripts writes on merging (`sai_model_spec.py`, commit 48d368fa)."""
    titles = [metadata.get("modelspec.title") or Path(source).stem for source, metadata in inputs]
    date = time.strftime("%Y-%m-%dT%H:%M:%S")
    return {
        "modelspec.title": save_to.stem,
        "modelspec.merged_from": ", ".join(titles),
        "modelspec.date": date,
    }


def _united_tags(metadata: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """`ss_tag_frequency`, from which UIs show trigger words, of all adapters."""
    united: dict[str, object] = {}
    for k, fields in enumerate(metadata):
        try:
            tags = dict(json.loads(fields.get("ss_tag_frequency", "{}")))
        except (TypeError, ValueError, RecursionError):
            continue
        united |= {name if name not in united else f"{name} ({k + 1})": found for name, found in tags.items()}
    return {"ss_tag_frequency": json.dumps(united)} if united else {}
