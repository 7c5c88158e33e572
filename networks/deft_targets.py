"""Layers that can be adapted: what finds them in a model, their key names, and what is put together or taken apart."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypeAlias, TypeGuard

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from networks.deft_architectures import Part

Layer: TypeAlias = nn.Linear | nn.Conv2d
TOGETHER = "+"  # between the key names of layers that have their matrices together


@dataclass(frozen=True)
class Target:
    """A layer that can be adapted, or some of its outputs, or what `joined` puts together, and its place in files.

    :param name: unique in a network: the files' key name, with `-k` behind it for the k-th part of a fused weight, and
        `+` between those of several
    :param path: in the model, with dots
    :param layer: of several, the first
    :param rows: (first, behind last) of the layer's outputs; None for all
    :param file_rows: (first, number of all) of these outputs in the files' weight; None for all
    :param parts: what is put together, its outputs stacked in this order; () for a layer by itself
    """

    name: str
    path: str
    layer: Layer
    rows: tuple[int, int] | None = None
    file_rows: tuple[int, int] | None = None
    parts: tuple[Target, ...] = ()

    @property
    def file_name(self) -> str:
        """The key name in files, those of several with `+` between them."""
        return self.name.partition("-")[0]

    @property
    def own_name(self) -> str:
        """The key name that musubi-tuner's own networks give it."""
        return self.name if self.parts or self.rows else f"lora_unet_{self.path.replace('.', '_')}"

    @property
    def places(self) -> tuple[Target, ...]:
        """Where it is in the model: the layers whose outputs, stacked, are its."""
        several = any(part.layer is not self.layer for part in self.parts)
        return self.parts if several else (self,)

    @property
    def pieces(self) -> tuple[Target, ...]:
        """Where it is in files: what each of their weights has of it, stacked."""
        return self.parts if TOGETHER in self.name else (self,)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n): outputs and inputs, a convolution's kernel counted among its inputs."""
        all_outputs, *inputs = weight_shape(self.layer)
        outputs = all_outputs if self.rows is None else self.rows[1] - self.rows[0]
        if len(self.places) > 1:
            outputs = sum(place.shape[0] for place in self.places)
        return outputs, math.prod(inputs)


def weight_shape(layer: Layer) -> tuple[int, ...]:
    """(outputs, inputs, *kernel) of a layer's weight, however it is kept: a quantised one may have another shape."""
    if isinstance(layer, nn.Conv2d):
        height, width = layer.kernel_size
        return layer.out_channels, layer.in_channels // layer.groups, height, width
    return layer.out_features, layer.in_features


def targets(
    model: nn.Module, part: Part, with_convolutions: bool, options: Collection[str] = (), fused: Mapping[str, bool] = {}
) -> list[Target]:
    """Every layer of `model` that can be adapted, in sd-scripts' order: that of `named_modules`.

    :param with_convolutions: whether k x k convolutions, and the layers of `conv_containers`, are included
    :param options: those of `Part.optional_containers` that are set
    :param fused: `Architecture.fused` to adapt the parts of such weights one by one
    """
    containers = part.containers + (part.conv_containers if with_convolutions else ())
    for option, more in part.optional_containers.items():
        containers += more if option in options else ()
    found: list[Target] = []
    seen: set[int] = set()
    for path, container in model.named_modules():
        if type(container).__name__ not in containers:
            continue
        for child_path, layer in container.named_modules():
            if id(layer) in seen or not is_adaptable(layer) or not (with_convolutions or is_pointwise(layer)):
                continue
            seen.add(id(layer))
            whole_path = ".".join(filter(None, (path, child_path)))
            found += _several(part, whole_path, layer) or _split(_target(part, whole_path, layer), fused)
    return _with_rows(found)


def outside_targets(model: nn.Module, part: Part, words: Sequence[str]) -> list[tuple[int, Target]]:
    """(which word, layer) of the layers whose key names hold one of these words, word by word."""
    layers = [_target(part, path, layer) for path, layer in model.named_modules() if is_adaptable(layer)]
    return [(i, target) for i, word in enumerate(words) for target in layers if word in target.name]


def _target(part: Part, path: str, layer: Layer) -> Target:
    in_files = path
    for pattern, replacement in part.renames:
        in_files = re.sub(pattern, replacement, in_files)
    in_files, _, number = in_files.partition("#")
    if not in_files.startswith(part.path_root):
        in_files = part.path_root + in_files
    file_name = f"{part.prefix}_{in_files}".replace(".", "_")
    return Target(f"{file_name}-{number}" if number else file_name, path, layer)


def parts_of(path: str, part: Part) -> list[str]:
    """The paths in files of the layers that one of the model's is in one; empty where it is one layer there too."""
    numbers = {found for pattern, _ in part.renames for found in re.findall(r"#(\d)\$$", pattern)}
    paths = [f"{path}#{number}" for number in sorted(numbers)]
    for pattern, replacement in part.renames:
        paths = [re.sub(pattern, replacement, one) for one in paths]
    return [one for one in paths if "#" not in one]


def _several(part: Part, path: str, layer: Layer) -> list[Target]:
    """The layers of files that this one is: each some of its outputs."""
    paths = parts_of(path, part)
    size = weight_shape(layer)[0] // max(len(paths), 1)
    return [replace(_target(part, one, layer), rows=(k * size, (k + 1) * size)) for k, one in enumerate(paths)]


def _split(target: Target, fused: Mapping[str, bool]) -> list[Target]:
    """The parts of a fused weight: queries as wide as the input, keys and values of equal size, and the rest."""
    for pattern, with_mlp in fused.items():
        if re.search(pattern, target.file_name) and target.name == target.file_name:
            m, n = target.shape
            sizes = [n, n, n, m - 3 * n] if with_mlp else [n, (m - n) // 2, (m - n) // 2]
            ends = list(accumulate(sizes))
            return [
                replace(target, name=f"{target.name}-{k}", rows=(end - size, end), file_rows=(end - size, m))
                for k, (size, end) in enumerate(zip(sizes, ends, strict=True))
            ]
    return [target]


def _with_rows(found: list[Target]) -> list[Target]:
    """Tells layers that are parts of one weight in files where they stand in it."""
    sizes: dict[str, dict[str, int]] = {}
    for target in found:
        if target.name != target.file_name and target.rows is None:
            sizes.setdefault(target.file_name, {})[target.name] = target.shape[0]
    placed = []
    for target in found:
        parts = sizes.get(target.file_name)
        if parts is not None:
            before = sum(size for name, size in parts.items() if name < target.name)
            target = replace(target, file_rows=(before, sum(parts.values())))
        placed.append(target)
    return placed


def joined(found: Sequence[Target], endings: Sequence[str]) -> list[Target]:
    """The same layers, some of them put together as if they were one: the parts of what files have as one weight, and
    layers whose key names are the same up to one of these endings each.

    :param endings: `Architecture.together`
    """
    groups: dict[str, list[tuple[int, Target]]] = {}
    for target in found:
        first = target.file_rows[0] if target.file_rows else 0
        start, number = target.file_name, first
        for k, ending in enumerate(endings):
            if target.name.endswith(ending):
                start, number = target.name.removesuffix(ending), k
        groups.setdefault(start, []).append((number, target))
    return [_together([target for _, target in sorted(group, key=lambda one: one[0])]) for group in groups.values()]


def _together(parts: Sequence[Target]) -> Target:
    if len(parts) == 1:
        return parts[0]
    names = list(dict.fromkeys(part.file_name for part in parts))
    return Target(TOGETHER.join(names), parts[0].path, parts[0].layer, parts=tuple(parts))


def is_adaptable(layer: nn.Module) -> TypeGuard[Layer]:
    """Linear layers, of classes derived from torch's too, as quantised ones are; and ungrouped, zero-padded Conv2d
    layers."""
    if type(layer).__name__ == "Linear":
        return True
    if isinstance(layer, nn.Linear):
        # nn.MultiheadAttention's, of which it reads the weight
        return not isinstance(layer, NonDynamicallyQuantizableLinear)
    if not isinstance(layer, nn.Conv2d) or type(layer).__name__ != "Conv2d":
        return False
    return layer.groups == 1 and layer.padding_mode == "zeros"


def is_pointwise(layer: nn.Module) -> bool:
    """Linear layers and 1x1 convolutions, which follow `dim`; the others follow `conv_dim`."""
    return not isinstance(layer, nn.Conv2d) or layer.kernel_size == (1, 1)


def as_list(models: nn.Module | Sequence[nn.Module | None] | None) -> list[nn.Module | None]:
    """sd-scripts passes SD 1.5's text encoder bare and others' in a list."""
    if models is None:
        return []
    return [models] if isinstance(models, nn.Module) else list(models)
