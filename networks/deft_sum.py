"""Sums of adapters, layer by layer: as factors, exactly or cut to a rank, or as a change of a weight at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from networks import deft_factors
from networks.deft_blocks import Strength
from networks.deft_config import DeftError
from networks.deft_factors import Factors
from networks.deft_formats import Adapter, Change, Dense, OnBase
from networks.deft_progress import progress


@dataclass(frozen=True)
class Part:
    """An adapter, and how much it counts."""

    adapter: Adapter
    strength: Strength

    def changes(self) -> dict[str, tuple[Change, float]]:
        """Its changes that count, with their strengths, by key name."""
        found = {name: (change, self.strength.of(name)) for name, change in self.adapter.changes.items()}
        return {name: pair for name, pair in found.items() if pair[1] != 0}


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


def check_architectures(adapters: Sequence[Adapter]) -> None:
    """:raises DeftError: when they are for different ones, or a layer has different shapes"""
    known = [adapter for adapter in adapters if adapter.architecture]
    for other in known[1:]:
        if other.architecture != known[0].architecture:
            raise DeftError(
                f"{known[0].source} is for {known[0].architecture}, {other.source} for {other.architecture}: "
                f"give adapters for one model"
            )
    seen: dict[str, Adapter] = {}
    for adapter in adapters:
        for name, change in adapter.changes.items():
            first = seen.setdefault(name, adapter)
            shape = first.changes[name].shape
            if not same_weight(change.shape, shape):
                raise DeftError(
                    f"{name} has the shape {shape} in {first.source} and {change.shape} in {adapter.source}: "
                    f"give adapters for one model"
                )


def same_weight(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether shapes are of one weight: a 1x1 convolution is a linear layer too, as some models have it."""
    ones = (1, 1)
    return tuple(a[:-2] if tuple(a[2:]) == ones else a) == tuple(b[:-2] if tuple(b[2:]) == ones else b)


def summed(parts: Sequence[Part], rank: Rank) -> tuple[dict[str, Factors], dict[str, float]]:
    """The sum of adapters as factors by key name, and each layer's relative error where it was cut.

    :raises DeftError: when nothing is left, or a change cannot be expressed without more being said
    """
    changes = [part.changes() for part in parts]
    names = list(dict.fromkeys(name for many in changes for name in many))
    if not names:
        raise DeftError("--ratios, --te_ratios and --lbws leave no layer of the adapters with a strength but 0")
    layers: dict[str, Factors] = {}
    errors: dict[str, float] = {}
    for name in progress(names, "adding", "layers"):
        found = [(part.adapter, *many[name]) for part, many in zip(parts, changes, strict=True) if name in many]
        layers[name], errors[name] = sum_of_layer(name, found, rank)
    return layers, errors


def sum_of_layer(name: str, found: Sequence[tuple[Adapter, Change, float]], rank: Rank) -> tuple[Factors, float]:
    """One layer's sum, and its relative error."""
    for adapter, change, _ in found:
        if isinstance(change, OnBase):
            raise DeftError(
                f"{adapter.source}: {name} is {change.kind}, which depends on the base model's weights: merge it into "
                f"the checkpoint with --sd_model, or make a plain LoRA of it first: convert_deft.py --base MODEL"
            )
        if isinstance(change, Dense) and not rank.limited:
            raise DeftError(
                f"{adapter.source}: {name} is {change.kind}, of no rank that a LoRA could have: give --new_rank or "
                f"--energy"
            )
    shape = found[0][1].shape
    factors = [change.scaled(strength) for _, change, strength in found if isinstance(change, Factors)]
    most = rank.of(shape[1:])
    if len(factors) < len(found):
        D = dense_sum([(change, strength) for _, change, strength in found])
        return deft_factors.approximated(D, shape[1:], most, rank.energy)
    return cut(added(factors), most, rank.energy)


def added(factors: Sequence[Factors]) -> Factors:
    """Their sum, as a change of a weight of the first one's shape."""
    return deft_factors.concatenated([replace(part, kernel=factors[0].kernel) for part in factors])


def dense_sum(changes: Sequence[tuple[Change, float]]) -> Tensor:
    """The sum (m, n) of changes that do not depend on a base."""
    return sum(
        (change.delta() * strength for change, strength in changes if not isinstance(change, OnBase)), torch.zeros(())
    )


def cut(whole: Factors, rank: int | None, energy: float | None) -> tuple[Factors, float]:
    """The best approximation of a rank at most, or of as low a rank as keeps a share of the squared norm.

    The sum itself, untouched, where that cuts nothing: of a rank above the weight's sides, in as many directions as the
    weight has.
    """
    least = min(whole.up.shape[0], whole.down.shape[1])
    if energy is None and whole.rank <= (least if rank is None else min(rank, least)):
        return whole, 0.0
    found = deft_factors.decomposed(whole)
    kept = len(found.values) if rank is None else min(rank, len(found.values))
    if energy is not None:
        kept = min(kept, deft_factors.rank_of_energy(found.values, energy))
    return found.truncated(max(kept, 1))


def change_of(W: Tensor, changes: Sequence[tuple[Change, float]]) -> Tensor:
    """The sum (m, n) of changes of one weight, each of the weight as it was before."""
    whole = torch.zeros_like(W)
    for change, strength in changes:
        if isinstance(change, Factors):
            whole.addmm_(change.up, change.down, alpha=strength)
        else:
            delta = change.delta() if isinstance(change, Dense) else change.delta(W)
            whole.add_(delta.reshape(W.shape), alpha=strength)
    return whole
