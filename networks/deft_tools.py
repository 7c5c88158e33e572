"""What the command-line tools share: the frame of a run, where they write, and the metadata of what they write."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from networks import deft_io, deft_names
from networks.deft_config import DeftError, reason_of
from networks.deft_factors import Factors

HISTORY_KEY = "deft_history"  # JSON: a list of what tools made of the file, each {"tool", "version", ...}
PRECISIONS = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # of --save_precision
MIXED = "diffusers reads files of mixed ranks wrongly, without a word"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help lists the options\n")


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a module's docstring, as it stands there, and whose errors are one line."""
    return _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)


def run(work: Callable[[], None]) -> int:
    """Runs a tool's work: 0, or one line and 2 for a mistake or a failing disk, one line and 130 after Ctrl-C."""
    try:
        work()
    except DeftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a disk that fails while it is read, a file that goes
        print(f"error: {error.filename or 'the disk'}: {reason_of(error)}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"error: not enough memory ({reason_of(error)})", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


def device_of(name: str) -> torch.device:
    """`--device`.

    :raises DeftError: for one that this torch cannot use
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DeftError(f"--device {name}: cannot be used here ({reason_of(error)})") from None


def saved_dtype(precision: str | None, own: torch.dtype) -> torch.dtype:
    """Of `--save_precision`; without it an adapter's own, if it is one that every client reads, or else float32."""
    if precision is not None:
        return PRECISIONS[precision]
    return own if own in PRECISIONS.values() else torch.float32


def output_path(option: str, path: str | os.PathLike, inputs: Iterable[str | os.PathLike]) -> Path:
    """Where a tool may write.

    :param option: how errors name it
    :raises DeftError: for one of the inputs, a folder, or another ending than .safetensors
    """
    check_native(option, path)
    found = Path(path)
    if found.suffix.lower() != ".safetensors":
        raise DeftError(f"{option} {path}: give a file that ends in .safetensors")
    try:
        is_folder, there = found.is_dir(), found.exists()
    except OSError as error:  # a name that is too long for the disk
        raise DeftError(f"{option} {path}: cannot be written ({error.strerror})") from None
    if is_folder:
        raise DeftError(f"{option} {path}: this is a folder; give a file")
    for other in map(Path, inputs):
        inside = there and other.is_dir() and other.resolve() in found.resolve().parents
        if inside or is_same_file(found, other):
            raise DeftError(f"{option} {path}: this is an input, which is never overwritten; give another file")
    return found


def check_native(option: str, path: str | os.PathLike) -> None:
    """:raises DeftError: for a drive's path elsewhere than on Windows, where it would be one long file name"""
    if os.name != "nt" and re.match(r"[A-Za-z]:[\\/]", str(path)):
        raise DeftError(f"{option} {path}: a path of Windows; write it as this system has it (in WSL /mnt/c/...)")


def is_same_file(one: Path, other: Path) -> bool:
    """Whether both are there, and are one file under whatever names."""
    return one.exists() and other.exists() and os.path.samefile(one, other)


def carried(metadata: Mapping[str, str], tool: str, done: Mapping[str, object]) -> dict[str, str]:
    """The metadata of what a tool makes of a file: the file's own, with what was done added.

    The hashes `sshs_*` go, being of other tensors: `write_adapter` makes them anew. So does diffusers' record of ranks
    and alphas, by which it reads a file rather than by the file's own tensors.

    :param metadata: of the input that the output mostly is
    :param tool: the tool's name
    :param done: its settings and results, as JSON can have them
    """
    try:
        history = list(json.loads(metadata.get(HISTORY_KEY, "[]")))
    except (TypeError, ValueError, RecursionError):
        history = []
    history.append({"tool": tool, "version": deft_io.VERSION, **done})
    kept = {key: value for key, value in metadata.items() if not key.startswith("sshs_") and key != deft_io.PEFT_KEY}
    return kept | {HISTORY_KEY: json.dumps(history)}


def write_adapter(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes an adapter file whole or not at all, with the hashes by which UIs know it.

    :param tensors: by kohya's keys; the file has those that its model's files have
    :raises DeftError: for non-finite values, a full disk, or a folder that cannot be written to
    """
    deft_io.write_hashed(deft_names.with_dots(tensors, deft_names.said_or_seen(metadata, tensors)), path, metadata)


class Losses:
    """What an approximation leaves out, layer by layer: relative Frobenius errors."""

    def __init__(self) -> None:
        self.errors: dict[str, float] = {}
        self._lost = self._whole = 0.0

    def add(self, name: str, error: float, norm: float) -> None:
        """One layer.

        :param norm: Frobenius norm of what was approximated
        """
        self.errors[name] = error
        self._lost += (error * norm) ** 2
        self._whole += norm**2

    @property
    def mean(self) -> float:
        """Over the layers."""
        return sum(self.errors.values()) / len(self.errors)

    @property
    def whole(self) -> float:
        """Of all layers together."""
        return (self._lost / self._whole) ** 0.5 if self._whole else 0.0

    def each(self) -> dict[str, float]:
        """Layer by layer, for the metadata."""
        return {name: float(f"{error:.3g}") for name, error in self.errors.items()}

    def record(self) -> dict[str, float]:
        """For the metadata."""
        found = {"largest": max(self.errors.values()), "mean": self.mean, "whole": self.whole}
        return {name: float(f"{value:.3g}") for name, value in found.items()}

    def __str__(self) -> str:
        worst = max(self.errors, key=lambda name: self.errors[name])
        return (
            f"relative error {self.whole:.3g} of the whole change; of a layer {self.mean:.3g} in the mean, "
            f"{self.errors[worst]:.3g} at most ({worst})"
        )


def lora_file(
    layers: Mapping[str, Factors], dtype: torch.dtype, pad: bool, metadata: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a plain LoRA file, and its metadata with the ranks that these layers have.

    :param layers: by key name, float32, without padding
    :param metadata: of the file that they come from; what it says of the rates that layers were trained with stays
    """
    tensors, exponents = deft_io.lora_tensors(layers, dtype, pad)
    try:
        before = dict(json.loads(metadata.get(deft_io.LAYERS_KEY, "{}")))
        scales = {name: float(scale) for name, (_, scale, _) in before.items()}
    except (TypeError, ValueError, RecursionError):
        scales = {}
    record = {name: [layer.rank, scales.get(name, 1.0), exponents[name]] for name, layer in layers.items()}
    ranks = {layer.rank for layer in layers.values()}
    dim = str(max(ranks)) if pad or len(ranks) == 1 else "Dynamic"  # sd-scripts' word
    said = {"ss_network_dim": dim, "ss_network_alpha": dim, deft_io.LAYERS_KEY: json.dumps(record)}
    return tensors, {**metadata, **said}


def left_told(left: Mapping[str, str]) -> list[str]:
    """What to say of an adapter's tensors that are no change of a weight, reason by reason."""
    by_reason: dict[str, list[str]] = {}
    for key, reason in left.items():
        by_reason.setdefault(reason, []).append(key)
    return [f"left out: {len(keys)} tensors, such as {keys[0]}: {reason}" for reason, keys in by_reason.items()]


def padding_told(layers: Mapping[str, Factors], dtype: torch.dtype, pad: bool) -> str:
    """What one rank for all layers costs, or what goes without it; nothing where ranks are equal anyway."""
    ranks = sorted(layer.rank for layer in layers.values())
    if ranks[0] == ranks[-1]:
        return f"rank {ranks[0]}"
    widths = [(layer.rank, layer.up.shape[0] + layer.down.shape[1]) for layer in layers.values()]
    own = sum(rank * width for rank, width in widths) * dtype.itemsize / 1e6
    full = sum(ranks[-1] * width for _, width in widths) * dtype.itemsize / 1e6
    spread = f"ranks {ranks[0]} to {ranks[-1]}, {ranks[len(ranks) // 2]} in the middle"
    if not pad:
        return f"{spread}, unpadded ({own:.1f} MB instead of {full:.1f}): {MIXED}"
    return f"{spread}, with zeros to {ranks[-1]} ({full:.1f} MB; {own:.1f} with --no_pad), since {MIXED}"
