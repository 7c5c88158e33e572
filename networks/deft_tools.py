"""What the command-line tools share: the frame of a run, where they write, and the metadata of what they write."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from networks import deft_io
from networks.deft_config import DeftError, reason_of

HISTORY_KEY = "deft_history"  # JSON: a list of what tools made of the file, each {"tool", "version", ...}


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a module's docstring, as it stands there."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def run(work: Callable[[], None]) -> int:
    """Runs a tool's work: 0, or one line and 2 for a user's mistake, one line and 130 after Ctrl-C."""
    try:
        work()
    except DeftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"error: not enough memory ({reason_of(error)})", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


def output_path(option: str, path: str | os.PathLike, inputs: Iterable[str | os.PathLike]) -> Path:
    """Where a tool may write.

    :param option: how errors name it
    :raises DeftError: for one of the inputs, a folder, or another ending than .safetensors
    """
    found = Path(path)
    if found.suffix.lower() != ".safetensors":
        raise DeftError(f"{option} {path}: give a file that ends in .safetensors")
    if found.is_dir():
        raise DeftError(f"{option} {path}: this is a folder; give a file")
    for other in map(Path, inputs):
        same = found.exists() and other.exists() and os.path.samefile(found, other)
        inside = other.is_dir() and other.resolve() in found.resolve().parents and found.exists()
        if same or inside:
            raise DeftError(f"{option} {path}: this is an input, which is never overwritten; give another file")
    return found


def carried(metadata: Mapping[str, str], tool: str, done: Mapping[str, object]) -> dict[str, str]:
    """The metadata of what a tool makes of a file: the file's own, with what was done added.

    The hashes `sshs_*` go, being of other tensors: `write_adapter` makes them anew.

    :param metadata: of the input that the output mostly is
    :param tool: the tool's name
    :param done: its settings and results, as JSON can have them
    """
    try:
        history = list(json.loads(metadata.get(HISTORY_KEY, "[]")))
    except (TypeError, ValueError, RecursionError):
        history = []
    history.append({"tool": tool, "version": deft_io.VERSION, **done})
    kept = {key: value for key, value in metadata.items() if not key.startswith("sshs_")}
    return kept | {HISTORY_KEY: json.dumps(history)}


def write_adapter(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes an adapter file whole or not at all, with the hashes by which UIs know it.

    :raises DeftError: for non-finite values, a full disk, or a folder that cannot be written to
    """
    deft_io.write_safetensors(tensors, path, {**metadata, **deft_io.webui_hashes(tensors, metadata)})
