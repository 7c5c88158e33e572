"""How much an adapter counts, layer by layer: strengths of its parts, and weights of its blocks by their usual names.

Blocks of a U-Net are BASE (the text encoders), IN00 to IN11, MID, OUT00 to OUT11, as in sd-scripts'
networks/svd_merge_lora.py (commit 48d368fa) and in the WebUI extension sd-webui-lora-block-weight; those of a
transformer are D00, D01, ... (of two streams), S00, ... (of one) or B00, ....
"""

from __future__ import annotations

import fnmatch
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from networks.deft_architectures import ARCHITECTURES, Blocks
from networks.deft_config import DeftError

BASE = "BASE"
SD, SDXL = (architecture.name for architecture in ARCHITECTURES if architecture.blocks)
DENOISER = "lora_unet_"  # what key names of a U-Net or transformer begin with


def _numbered(word: str, numbers: Collection[int]) -> tuple[str, ...]:
    return tuple(f"{word}{number:02}" for number in numbers)


_SEVENTEEN = (BASE, *_numbered("IN", (1, 2, 4, 5, 7, 8)), "MID", *_numbered("OUT", range(3, 12)))
# how many numbers a list has -> the architectures that it is for, and the blocks they are of; others keep 1
LISTS: Mapping[int, tuple[tuple[str, ...], tuple[str, ...]]] = {
    12: ((SDXL,), (BASE, *_numbered("IN", (4, 5, 7, 8)), "MID", *_numbered("OUT", range(6)))),
    17: ((SD,), _SEVENTEEN),
    20: ((SDXL,), (BASE, *_numbered("IN", range(9)), "MID", *_numbered("OUT", range(9)))),
    26: ((SD, SDXL), (BASE, *_numbered("IN", range(12)), "MID", *_numbered("OUT", range(12)))),
}
# the extension's own names: the blocks that count, others and BASE where it is not named do not
PRESETS: Mapping[str, tuple[str, ...]] = {
    "ALL": ("*",),
    "NONE": (),
    "INALL": (BASE, "IN*"),
    "OUTALL": (BASE, "OUT*"),
}
# those that tell deep blocks from shallow ones are for 17 blocks
_PRESETS_OF_17: Mapping[str, tuple[str, ...]] = {
    "INS": (BASE, *_numbered("IN", (1, 2, 4))),
    "IND": (BASE, *_numbered("IN", (5, 7, 8))),
    "MIDD": (BASE, *_numbered("IN", (5, 7, 8)), "MID", *_numbered("OUT", range(3, 7))),
    "OUTD": (BASE, *_numbered("OUT", range(3, 7))),
    "OUTS": (BASE, *_numbered("OUT", range(7, 12))),
}
_TRANSFORMER_BLOCKS = ((r"_double_blocks_(\d+)_", "D"), (r"_single_blocks_(\d+)_", "S"),
                       (r"_(?:joint_)?blocks_(\d+)_", "B"), (r"_layers_(\d+)_", "B"))  # fmt: skip
_KNOWN = {BASE, "MID", *_numbered("IN", range(12)), *_numbered("OUT", range(12))}


def block_of(layer: str) -> str:
    """The name of a layer's block, by its key name; "" outside of the blocks."""
    if not layer.startswith(DENOISER):
        return BASE
    for architecture in ARCHITECTURES:
        number = architecture.blocks.number(layer) if architecture.blocks else None
        if architecture.blocks is not None and number is not None:
            return _of_unet(number, architecture.blocks)
    for pattern, letter in _TRANSFORMER_BLOCKS:
        found = re.search(pattern, layer)
        if found is not None:
            return f"{letter}{int(found[1]):02}"
    return ""


def _of_unet(number: int, blocks: Blocks) -> str:
    """sd-scripts counts embeddings to the first block, and the output as one more behind the last."""
    number = max(number - blocks.outside, 0)
    if number < blocks.down:
        return f"IN{number:02}"
    return "MID" if number < blocks.down + blocks.mid else f"OUT{number - blocks.down - blocks.mid:02}"


@dataclass(frozen=True)
class Strength:
    """How much the layers of an adapter count.

    :param denoiser: the U-Net's or transformer's layers
    :param text_encoders: the others
    :param blocks: block -> weight, by which that is multiplied; 1 for those that are not there
    """

    denoiser: float = 1.0
    text_encoders: float = 1.0
    blocks: Mapping[str, float] | None = None

    def of(self, layer: str) -> float:
        """A layer's, by its key name."""
        part = self.denoiser if layer.startswith(DENOISER) else self.text_encoders
        return part if self.blocks is None else part * self.blocks.get(block_of(layer), 1.0)


def block_weights(text: str, layers: Collection[str], architecture: str) -> dict[str, float]:
    """The weights that `--lbws` gives an adapter: `[1,0,...]`, a preset, or `IN*=0.5,OUT03=0`.

    :param layers: key names of the adapter
    :param architecture: for which it is, "" if that is not known
    :raises DeftError: naming what is not understood
    """
    source = f"--lbws {text}"
    there = {block_of(layer) for layer in layers} - {""}
    name = text.strip().upper()
    if name in PRESETS or name in _PRESETS_OF_17:
        if name in _PRESETS_OF_17:
            _check_architecture(source, 17, architecture)
        counts = PRESETS.get(name) or _PRESETS_OF_17.get(name, ())
        return {block: float(_fits(block, counts)) for block in there}
    if "=" in text:
        return _by_names(text, there)
    numbers = _numbers(text)
    if len(numbers) not in LISTS:
        raise DeftError(f"{source}: {len(numbers)} numbers; there are lists of 12, 17, 20 and 26")
    _check_architecture(source, len(numbers), architecture)
    return dict(zip(LISTS[len(numbers)][1], numbers, strict=True))


def _fits(block: str, patterns: Collection[str]) -> bool:
    return any(fnmatch.fnmatchcase(block, pattern) for pattern in patterns)


def _check_architecture(source: str, length: int, architecture: str) -> None:
    made_for = LISTS[length][0]
    if architecture and architecture not in made_for:
        fitting = [str(number) for number, (names, _) in LISTS.items() if architecture in names]
        there = f"a list of {' or '.join(fitting)} numbers" if fitting else "names, as in D00=0.5,S*=0"
        raise DeftError(f"{source}: these blocks are those of {made_for[0]}; for {architecture} give {there}")


def _by_names(text: str, there: Collection[str]) -> dict[str, float]:
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        name = name.strip().upper()
        fitting = [block for block in sorted(there) if fnmatch.fnmatchcase(block, name)]
        if not fitting and name not in _KNOWN:
            raise DeftError(f"--lbws {text}: {name} is no block of the adapter; it has {', '.join(sorted(there))}")
        weights.update(dict.fromkeys(fitting, _number(f"--lbws {text}", value)))
    return weights


def _numbers(text: str) -> list[float]:
    bare = text.strip()
    try:
        found = json.loads(bare if bare.startswith("[") else f"[{bare}]")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not found:
        names = ", ".join([*PRESETS, *_PRESETS_OF_17])
        raise DeftError(f"--lbws {text}: give a list of numbers, NAME=WEIGHT,... or one of {names}")
    return [_number(f"--lbws {text}", value) for value in found]


def _number(source: str, value: object) -> float:
    try:
        found = float(str(value))
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise DeftError(f"{source}: {value} is no number")
    return found
