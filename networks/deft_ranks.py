"""Which layers an architecture's options choose, with which rank and scale, and at which rate they learn.

The options and what they mean are those of sd-scripts' networks.lora, lora_flux, lora_sd3, lora_lumina,
lora_hunyuan_image and lora_anima (commit 48d368fa), and musubi-tuner's networks.lora* (30c658c).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TypeVar

from torch import nn

from networks.deft_architectures import ARCHITECTURES, Architecture, Part
from networks.deft_config import DeftConfig, DeftError
from networks.deft_targets import Target, is_pointwise, joined, outside_targets, targets

RankAndScale = tuple[int, float]
Chosen = list[tuple[Target, RankAndScale]]  # layers that are adapted
Number = TypeVar("Number", int, float)
_PRESETS = ("cosine", "sine", "linear", "reverse_linear", "zeros")


class Ranks:
    """The options of one network on one architecture.

    :raises DeftError: for an option that this architecture does not have, or a list of the wrong length
    """

    def __init__(self, config: DeftConfig, architecture: Architecture) -> None:
        self.config, self.architecture = config, architecture
        self._refuse_others_options()
        self.fused = architecture.fused if config.split_qkv else {}
        self.weights = self._block_weights()
        self.dims = self._of_blocks("block_dims", config.dim if self.weights else None)
        self.alphas = self._of_blocks("block_alphas", config.alpha)
        self.conv_dims = self._of_blocks("conv_block_dims", config.conv_dim)
        self.conv_alphas = self._of_blocks("conv_block_alphas", config.conv_alpha)
        if config.block_alphas and self.dims is None:
            raise DeftError("block_alphas needs block_dims")
        if config.conv_block_alphas and self.conv_dims is None:
            raise DeftError("conv_block_alphas needs conv_block_dims or conv_dim")
        kinds = {"all", *architecture.train_blocks}
        if config.train_blocks and config.train_blocks not in kinds:
            raise DeftError(f"train_blocks={config.train_blocks}: allowed are {', '.join(sorted(kinds))}")
        self.numbered = {
            option: numbers_of(option, getattr(config, option))
            for option in architecture.numbered
            if getattr(config, option) is not None
        }
        if architecture.outside and (given := getattr(config, architecture.outside[0])) is not None:
            words = architecture.outside[1]
            if len(given) != len(words):
                names = ", ".join(word.strip("_") for word in words)
                raise DeftError(f"{architecture.outside[0]}: needs {len(words)} ranks ({names}), not {len(given)}")

    @property
    def with_convolutions(self) -> bool:
        """Whether k x k convolutions are adapted."""
        return self.conv_dims is not None or self.config.conv_dim is not None

    def chosen(self, model: nn.Module, part: Part, denoiser: bool) -> Chosen:
        """The layers of one model, with rank and scale."""
        if part.option and not getattr(self.config, part.option):
            return []
        options = [option for option in part.optional_containers if getattr(self.config, option)]
        found = targets(model, part, self.with_convolutions, options, self.fused if denoiser else {})
        wanted = [(target, self.of(target, denoiser)) for target in found]
        if denoiser and self.architecture.outside:
            option, words = self.architecture.outside
            dims = getattr(self.config, option) or ()
            for i, target in outside_targets(model, part, words) if dims else []:
                by_pattern = self._by_pattern(target)
                dim = dims[i] if by_pattern is None else by_pattern
                wanted.append((target, _rank_and_scale(dim, self.config.alpha)))
        if denoiser:
            self._refuse_missing_blocks([target.file_name for target in found])
        chosen = [(target, size) for target, size in wanted if size is not None]
        return self._joined(chosen) if denoiser and self.config.fuse_qkv else chosen

    def _joined(self, chosen: Chosen) -> Chosen:
        """:raises DeftError: when layers that are to be adapted as one have different ranks or scales"""
        sizes = {target.name: size for target, size in chosen}
        found = []
        for target in joined([target for target, _ in chosen], self.architecture.together):
            own = {sizes[part.name] for part in target.parts or (target,)}
            if len(own) > 1:
                raise DeftError(f"fuse_qkv=true: {target.name} has ranks or alphas that differ; give all of it one")
            found.append((target, own.pop()))
        return found

    def of(self, target: Target, denoiser: bool) -> RankAndScale | None:
        """Rank and scale of a layer; None: it is left alone."""
        config, name = self.config, target.file_name
        if self._is_left_out(target) or (denoiser and self._is_of_other_blocks(name)):
            return None
        by_pattern = self._by_pattern(target)
        if by_pattern is not None:
            return _rank_and_scale(by_pattern, config.alpha)
        pointwise = is_pointwise(target.layer)
        dim, alpha = (config.dim, config.alpha) if pointwise else (config.conv_dim or 0, config.conv_alpha)
        if not denoiser:
            return _rank_and_scale(dim, alpha)
        block = self.architecture.blocks.number(name) if self.architecture.blocks else None
        dims, alphas = (self.dims, self.alphas) if pointwise else (self.conv_dims, self.conv_alphas)
        if block is not None and dims is not None and alphas is not None:
            dim, alpha = dims[block], alphas[block]
        if self.weights is not None and block is not None and self.weights[block] == 0:
            return None
        if pointwise:
            for option, words in self.architecture.kinds.items():
                if getattr(config, option) is not None and all(word in name for word in words):
                    dim = getattr(config, option)
                    break
        return None if self._is_deselected(name) else _rank_and_scale(dim, alpha)

    def _by_pattern(self, target: Target) -> int | None:
        """The rank that `network_reg_dims` gives a layer; None if no pattern fits."""
        dims = self.config.network_reg_dims or {}
        return next((dim for pattern, dim in dims.items() if self._matches(pattern, target)), None)

    def _matches(self, pattern: str, target: Target) -> bool:
        if self.architecture.patterns_fit_paths:
            return bool(re.fullmatch(pattern, target.path))
        return bool(re.search(pattern, target.file_name))

    def rate_of(self, target: Target, rate: float | None, denoiser: bool) -> tuple[str, float | None]:
        """A layer's own learning rate, where its half's is `rate`, and what to call it in logs."""
        for i, (pattern, own) in enumerate((self.config.network_reg_lrs or {}).items()):
            matching = [self._matches(pattern, part) for part in target.parts or (target,)]
            if any(matching) and not all(matching):
                raise DeftError(f"fuse_qkv=true: {target.name} has rates that differ; give all of it one")
            if any(matching):
                return f" reg_lr_{i}", own
        if rate is None or not denoiser or self.weights is None or self.architecture.blocks is None:
            return "", rate
        block = self.architecture.blocks.number(target.file_name)
        return ("", rate) if block is None else (f"_block{block}", rate * self.weights[block])

    def plus_ratio(self, denoiser: bool) -> float:
        """LoRA+'s ratio: the rate of P, which spans `lora_up`, over that of the rest."""
        own = self.config.loraplus_unet_lr_ratio if denoiser else self.config.loraplus_text_encoder_lr_ratio
        return own or self.config.loraplus_lr_ratio or 1.0

    def _refuse_others_options(self) -> None:
        special = set().union(*(architecture.options() for architecture in ARCHITECTURES))
        for f in fields(self.config):
            value = getattr(self.config, f.name)
            if f.name in special - self.architecture.options() and value != f.default:
                others = ", ".join(a.name for a in ARCHITECTURES if f.name in a.options())
                raise DeftError(f"network_args {f.name}: an option for {others}, not for {self.architecture.name}")

    def _refuse_missing_blocks(self, names: Sequence[str]) -> None:
        for option, selected in self.numbered.items():
            found = [re.search(self.architecture.numbered[option], name) for name in names]
            there = {int(match[1]) for match in found if match is not None}
            if selected and not selected <= there:
                text = getattr(self.config, option)
                raise DeftError(f"{option}={text}: this model's blocks are 0 to {max(there, default=-1)}")

    def _is_left_out(self, target: Target) -> bool:
        row, excluded, included = self.architecture, self.config.exclude_patterns, self.config.include_patterns
        if row.left_out is None:
            return False
        excluded = (row.left_out, *((row.left_out_by_default,) if excluded is None else excluded))
        included = row.put_back if included is None else included
        if any(re.fullmatch(pattern, target.path) for pattern in included):
            return False
        return any(re.fullmatch(pattern, target.path) for pattern in excluded)

    def _is_of_other_blocks(self, name: str) -> bool:
        pattern = self.architecture.train_blocks.get(self.config.train_blocks or "all")
        return pattern is not None and not re.search(pattern, name)

    def _is_deselected(self, name: str) -> bool:
        for option, selected in self.numbered.items():
            found = re.search(self.architecture.numbered[option], name)
            if found is not None and selected is not None and int(found[1]) not in selected:
                return True
        return False

    def _of_blocks(self, option: str, default: Number | None) -> tuple[Number, ...] | None:
        """A number for each block; None where neither the option nor a default is given."""
        given = getattr(self.config, option)
        if self.architecture.blocks is None or (given is None and default is None):
            return None
        total = self.architecture.blocks.total
        if given is None:
            return (default,) * total if default is not None else None
        if len(given) != total:
            raise DeftError(f"{option}: {self.architecture.name} needs {total} numbers, not {len(given)}")
        return given

    def _block_weights(self) -> tuple[float, ...] | None:
        """Factors on the rates of all blocks, from the three `..._lr_weight` options; None if none is given."""
        blocks, config = self.architecture.blocks, self.config
        given = {way: getattr(config, f"{way}_lr_weight") for way in ("down", "mid", "up")}
        if blocks is None or not any(given.values()):
            return None
        weights: list[float] = []
        for way, text in given.items():
            number, least = blocks.mid if way == "mid" else blocks.down, config.block_lr_zero_threshold
            named = weights_of(f"{way}_lr_weight", text, number) if text else None
            weights += [1.0] * number if named is None else [w if w > least else 0.0 for w in named]
        outside = [1.0] * blocks.outside
        return (*outside, *weights, *outside)


def _rank_and_scale(dim: int | None, alpha: float) -> RankAndScale | None:
    return (dim, (alpha or dim) / dim) if dim else None


def numbers_of(option: str, text: str) -> set[int] | None:
    """The numbers of a selection such as `0,3-5`; None for `all`.

    :raises DeftError: for anything else but `none`
    """
    if text.strip() in ("all", "none", ""):
        return None if text.strip() == "all" else set()
    numbers: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if found is None or (found[2] and int(found[2]) < int(found[1])):
            raise DeftError(f"{option}={text}: must be all, none, or numbers and ranges such as 0,3-5")
        numbers.update(range(int(found[1]), int(found[2] or found[1]) + 1))
    return numbers


def weights_of(option: str, text: str, number: int) -> list[float]:
    """Factors on the rates of `number` blocks, from `1,0.5,...` or a preset such as `cosine+.25`.

    sd-scripts' presets (networks/lora.py, get_block_lr_weight): sine and linear rise from 0 to 1, cosine and
    reverse_linear fall, zeros is 0; what stands behind the plus is added. Missing numbers are 1, and an empty one 0.

    :raises DeftError: for another word, or more numbers than there are blocks
    """
    name, _, more = text.strip().partition("+")
    steps = [i / max(number - 1, 1) for i in range(number)]
    rising = {"sine": [math.sin(math.pi / 2 * x) for x in steps], "linear": steps, "zeros": [0.0] * number}
    presets: Mapping[str, Sequence[float]] = rising | {
        "cosine": rising["sine"][::-1], "reverse_linear": steps[::-1],
    }  # fmt: skip
    try:
        if name in presets:
            return [weight + float(more or 0) for weight in presets[name]]
        given = [float(part or 0) for part in text.split(",")]
    except ValueError:
        raise DeftError(
            f"{option}={text}: must be numbers separated by commas or one of {', '.join(_PRESETS)}, as cosine+.25"
        ) from None
    if len(given) > number:
        raise DeftError(f"{option}={text}: there are {number} such blocks, not {len(given)}")
    return given + [1.0] * (number - len(given))
