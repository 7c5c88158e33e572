"""Models in GGUF, which are read through the gguf package where it is installed, and not written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from networks.deft_config import DeftError, reason_of

_SHAPE_KEY = "comfy.gguf.orig_shape."  # ComfyUI-GGUF: the shape of a tensor that was flattened for its blocks


@dataclass(frozen=True)
class GgufEntry:
    """A tensor in a file, which is read as float32.

    :param stored: the gguf package's
    """

    name: str
    shape: tuple[int, ...]
    stored: Any
    source: Path
    dtype: torch.dtype = torch.float32

    @property
    def size(self) -> int:
        """Bytes of the whole, as it is read."""
        return 4 * math.prod(self.shape)

    def read(self, first: int = 0, rows: int | None = None, scratch: object = None) -> Tensor:
        """Some of its rows, or all of it.

        :raises DeftError: when its numbers are of a kind that the gguf package does not read
        """
        try:
            import gguf

            whole = self.stored.data.reshape(self.shape[0] if self.shape else 1, -1)
            some = whole if rows is None else whole[first : first + rows]
            values = gguf.quants.dequantize(some, self.stored.tensor_type)
            found = torch.from_numpy(values if values.flags.writeable else values.copy())
            return found.float().reshape(self.shape if rows is None else (rows, *self.shape[1:]))
        except Exception as error:  # of many kinds, by its version
            kind = getattr(self.stored.tensor_type, "name", "")
            raise DeftError(f"{self.source}: {self.name} ({kind}) cannot be read ({reason_of(error)})") from None


class GgufFile:
    """A GGUF file.

    :raises DeftError: when it is damaged, or gguf is not installed
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        try:
            import gguf
        except ImportError:
            raise DeftError(f"{path}: reading GGUF needs: pip install gguf") from None
        try:
            reader = gguf.GGUFReader(path)
            self.entries = {
                tensor.name: GgufEntry(tensor.name, _shape(reader, tensor), tensor, path) for tensor in reader.tensors
            }
        except Exception as error:  # of many kinds, by its version
            raise DeftError(f"{path}: not a whole GGUF file ({reason_of(error)})") from None

    def close(self) -> None:
        """Its memory map goes with the last tensor."""
        self.entries = {}


def _shape(reader: Any, tensor: Any) -> tuple[int, ...]:
    """As torch has it: the file has it the other way round."""
    field = reader.fields.get(_SHAPE_KEY + tensor.name)
    shape = tuple(int(size) for size in reversed(tensor.shape))
    if field is None:
        return shape
    original = tuple(int(field.parts[i][0]) for i in field.data)
    return original if math.prod(original) == math.prod(shape) else shape
