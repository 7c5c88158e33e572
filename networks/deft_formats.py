"""Adapter files of other programs: their key names and kinds of adapter, to and from changes by layer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from networks import deft_io
from networks.deft_factors import Factors


@dataclass(frozen=True)
class Dense:
    """A change of one weight that is no product of two small matrices, or not exactly.

    :param kind: in words, for what is said of it
    :param shape: the weight's (m, in[, kh, kw])
    :param delta: makes it (m, n), float32, anew each time
    """

    kind: str
    shape: tuple[int, ...]
    delta: Callable[[], Tensor]


@dataclass(frozen=True)
class OnBase:
    """A change that depends on the base model's weight.

    :param kind: in words, for what is said of it
    :param shape: the weight's (m, in[, kh, kw])
    :param delta: of the weight W (m, n), float32, makes the change (m, n)
    """

    kind: str
    shape: tuple[int, ...]
    delta: Callable[[Tensor], Tensor]


Change: TypeAlias = Factors | Dense | OnBase


@dataclass(frozen=True)
class Adapter:
    """What an adapter file holds, whatever wrote it.

    :param format: of `FORMATS`
    :param architecture: name of a row of `deft_targets.ARCHITECTURES`, "" if it cannot be seen
    :param changes: by kohya's key name of the whole weight, as sd-scripts' LoRA has it
    :param left: key -> why it is no change of a weight (embeddings, biases, norms)
    :param dtype: that of most of its tensors
    """

    source: str
    format: str
    architecture: str
    changes: Mapping[str, Change]
    metadata: Mapping[str, str]
    left: Mapping[str, str]
    dtype: torch.dtype


def read(path: str | os.PathLike) -> Adapter:
    """An adapter file of any known format.

    :raises DeftError: when it cannot be read, is damaged, or is of no known format
    """
    tensors, metadata = deft_io.read_tensors(path)
    return parse(tensors, metadata, str(path))


def parse(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> Adapter:
    """An adapter of any known format, by its tensors.

    :raises DeftError: when it is damaged or of no known format
    """
    found = deft_io.parse_adapter(tensors, metadata, source)
    changes: dict[str, Change] = {k: layer for k, layer in found.layers.items() if isinstance(layer, Factors)}
    return Adapter(source, "kohya", "", changes, metadata, {}, torch.float32)
