"""A checkpoint's tensors by layer, streamed, whatever its layout and dtype.

`open_checkpoint` takes a safetensors file or a Diffusers folder (also that of one component). Keys of a pipeline's
folder have the component before them: `unet/conv_in.weight`.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from networks import deft_layouts, deft_scaled
from networks.deft_config import DeftError, read_text, reason_of
from networks.deft_gguf import GgufEntry, GgufFile
from networks.deft_layouts import Place
from networks.deft_scaled import FLOATS, KNOWN_FORMATS, Scale

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae")
PICKLES = (".ckpt", ".pt", ".pth", ".bin")

# safetensors' names; torch before 2.7 has no float8_e8m0fnu
_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "I64": "int64", "I32": "int32", "I16": "int16",
    "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "C64": "complex64",
}  # fmt: skip
DTYPES: dict[str, torch.dtype] = {k: getattr(torch, name) for k, name in _NAMES.items() if hasattr(torch, name)}
_QUANTISED = "take the model in bf16, fp16, fp32 or fp8, and quantise what comes out"
_MARK = ".comfy_quant"  # JSON in bytes, behind a layer's path
_MARKS = "_quantization_metadata"  # the same of all layers, in a file's metadata


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file.

    :param name: its key in the file
    :param start: its first byte, from the beginning of the file
    """

    file: TensorFile
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def row_size(self) -> int:
        """Bytes of a row, or of the whole where there are no rows."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def size(self) -> int:
        """Bytes of the whole."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, first: int = 0, rows: int | None = None, scratch: Scratch | None = None) -> Tensor:
        """Some of its rows, or all of it, as they stand in the file."""
        size = self.size if rows is None else rows * self.row_size
        shape = self.shape if rows is None else (rows, *self.shape[1:])
        if not size:
            return torch.empty(shape, dtype=self.dtype)
        data = bytearray(size) if scratch is None else scratch.take("read", size)
        self.file.read_into(self.start + first * self.row_size, memoryview(data))
        return torch.frombuffer(data, dtype=self.dtype).reshape(shape)


class Scratch:
    """Memory for one thread that is used again and again: new pages cost more time than what is computed in them."""

    def __init__(self) -> None:
        self._held: dict[str, bytearray] = {}

    def take(self, use: str, size: int) -> memoryview:
        """So many bytes; what was taken for the same use before is gone."""
        if len(self._held.get(use, b"")) < size:
            self._held[use] = bytearray(size)
        return memoryview(self._held[use])[:size]

    def floats(self, use: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor in float32, not empty."""
        return torch.frombuffer(self.take(use, 4 * math.prod(shape)), dtype=torch.float32).view(shape)


class TensorFile:
    """A safetensors file, of which no more is in memory than what was asked for.

    safetensors checks the file; the bytes are read without it, since the pages of its memory map count as ours.

    :raises DeftError: when it is damaged or something else
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _check_kind(path)
        try:
            with safe_open(str(path), "pt") as checked:
                self.metadata: dict[str, str] = checked.metadata() or {}
            self._handle: BufferedReader = open(path, "rb")  # noqa: SIM115  closed by `close`
        except (SafetensorError, OSError) as error:
            raise DeftError(f"{path}: not a whole safetensors file ({reason_of(error)})") from None
        self._lock = threading.Lock()
        length = int.from_bytes(self._handle.read(8), "little")
        self.header_size = 8 + length
        self.entries = self._entries(self._handle.read(length))

    def _entries(self, header: bytes) -> dict[str, TensorEntry]:
        try:
            fields = json.loads(header, object_pairs_hook=_without_doubles)
            fields.pop("__metadata__", None)
            return {
                key: TensorEntry(
                    self,
                    key,
                    DTYPES[about["dtype"]],
                    tuple(about["shape"]),
                    self.header_size + about["data_offsets"][0],
                )
                for key, about in fields.items()
            }
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise DeftError(f"{self.path}: a header that cannot be read ({reason_of(error)})") from None

    def read_into(self, start: int, data: memoryview) -> None:
        """:raises DeftError: when the file has become shorter"""
        while data:
            if hasattr(os, "preadv"):
                found = os.preadv(self._handle.fileno(), [data], start)
            else:
                with self._lock:
                    self._handle.seek(start)
                    found = self._handle.readinto(data)
            if not found:
                raise DeftError(f"{self.path}: became shorter while it was read")
            data, start = data[found:], start + found

    def fileno(self) -> int:
        return self._handle.fileno()

    def close(self) -> None:
        self._handle.close()


def _without_doubles(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
    return found


def _check_kind(path: Path) -> None:
    if not path.is_file():
        raise DeftError(f"{path}: no such file or folder")
    ending = path.suffix.lower()
    if ending in PICKLES:
        raise DeftError(
            f"{path}: a pickle, which can run code when it is read; convert it to .safetensors first (A1111 and "
            f"ComfyUI save it as such), or take the .safetensors that most models come in too"
        )
    if ending != ".safetensors":
        raise DeftError(f"{path}: give a .safetensors file, a .gguf file or a Diffusers folder")


Entry: TypeAlias = TensorEntry | GgufEntry


class Checkpoint:
    """A checkpoint that is open for reading; to be used in a `with` block, or to be closed.

    :ivar source: its path
    :ivar architecture: name of a row of `deft_architectures.ARCHITECTURES`
    :ivar layout: of `deft_layouts.LAYOUTS`
    :ivar layers: by kohya's key name of the whole weight, what sd-scripts' LoRA can adapt, in the order of the keys
    :ivar further: in the same way, other matrices that LyCORIS and its like change (embeddings of time, in and out)
    :ivar rest: keys of tensors that are in neither: norms, biases, embeddings, scales, VAE
    :ivar metadata: of a single file
    """

    def __init__(self, source: Path, files: Sequence[tuple[str, TensorFile | GgufFile]], pipeline: str) -> None:
        """:param files: with what stands before their keys"""
        self.source = source
        self.files = files
        self.entries: dict[str, Entry] = {}
        for before, file in files:
            for key, entry in file.entries.items():
                if before + key in self.entries:
                    raise DeftError(f"{source}: {before + key} stands in two of its files")
                self.entries[before + key] = entry
        shapes = {key: entry.shape for key, entry in self.entries.items()}
        self._refuse_unknown_forms()
        layout = deft_layouts.recognise(shapes, pipeline, str(source))
        self.layout, self.architecture = layout.name, layout.architecture
        self.layers, self.further = deft_layouts.places(layout, shapes, str(source))
        places = (*self.layers.values(), *self.further.values())
        held = {piece.key for place in places for piece in place.pieces}
        for key in held:
            if self.entries[key].dtype not in FLOATS:
                raise DeftError(f"{source}: {key} is stored as {self.entries[key].dtype}: {_QUANTISED}")
        self.rest = tuple(key for key in self.entries if key not in held)
        try:
            found = deft_scaled.find(shapes)
        except ValueError as error:
            raise DeftError(f"{source}: {error}") from None
        self.scales: dict[str, Scale] = {
            key: scale for key, scale in found.items() if self.entries[key].dtype in deft_scaled.FP8
        }
        for scale in self.scales.values():
            if self.entries[scale.key].dtype not in (torch.float32, torch.float16, torch.bfloat16):
                raise DeftError(f"{source}: {scale.key} is stored as {self.entries[scale.key].dtype}: {_QUANTISED}")

    def _refuse_unknown_forms(self) -> None:
        """:raises DeftError: for weights that are quantised in another way than `deft_scaled` knows"""
        key = deft_scaled.unknown_form(self.entries)
        if key is not None:
            raise DeftError(f"{self.source}: {key} is part of a quantised form that is not read here: {_QUANTISED}")
        try:
            marks = {key: entry for key, entry in self.entries.items() if key.endswith(_MARK)}
            formats = {
                key: json.loads(bytes(entry.read(0, min(entry.size, 65536)).tolist())) for key, entry in marks.items()
            }
            for _, file in self.files:
                formats |= json.loads(file.metadata.get(_MARKS, "{}")).get("layers", {})
            odd = {key: about["format"] for key, about in formats.items() if about["format"] not in KNOWN_FORMATS}
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise DeftError(
                f"{self.source}: its marks of quantised layers cannot be read ({reason_of(error)})"
            ) from None
        for key, name in odd.items():
            raise DeftError(f"{self.source}: {key} says {name}, which is not read here: {_QUANTISED}")

    @property
    def metadata(self) -> dict[str, str]:
        return dict(self.files[0][1].metadata) if len(self.files) == 1 else {}

    def keys(self) -> tuple[str, ...]:
        """Of all tensors."""
        return tuple(self.entries)

    def tensor(self, key: str) -> Tensor:
        """A tensor as it stands in the file.

        :raises KeyError: when there is none of that name
        """
        return self.entries[key].read()

    def place(self, name: str) -> Place:
        """Of a layer or further matrix.

        :raises KeyError: when it has none of that name
        """
        return self.layers.get(name) or self.further[name]

    def weight(self, name: str) -> Tensor:
        """A layer's weight, or a further matrix, (m, in[, kh, kw]), float32.

        :raises KeyError: when it has none of that name
        """
        parts = [self.rows(piece.key, piece.first, piece.rows) for piece in self.place(name).pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def rows(self, key: str, first: int, rows: int, scratch: Scratch | None = None) -> Tensor:
        """Some rows of a tensor, float32, with its scales applied; with `scratch` they last until the next ones."""
        entry, scale = self.entries[key], self.scales.get(key)
        stored = entry.read(first, rows, scratch)
        if scratch is None or not stored.numel():
            values = torch.empty(stored.shape)
        else:
            values = scratch.floats("values", tuple(stored.shape))
        deft_scaled.to_float(stored, values)
        if scale is not None:
            scales = self.entries[scale.key]
            found = scales.read(first, rows) if scale.blocks else scales.read()
            deft_scaled.times(values, found.float(), scale.blocks)
        return values

    def close(self) -> None:
        for _, file in self.files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """A checkpoint by its file, or by a Diffusers folder (a pipeline's, or of one component).

    :raises DeftError: when it is damaged, a pickle, or in no known layout
    """
    path = Path(path)
    chosen = _of_folder(path) if path.is_dir() else [("", path)]
    files: list[tuple[str, TensorFile | GgufFile]] = []
    try:
        for before, found in chosen:
            is_gguf = found.suffix.lower() == ".gguf" and found.is_file()
            files.append((before, GgufFile(found) if is_gguf else TensorFile(found)))
        return Checkpoint(path, files, (_pipeline(path) or _pipeline(path.parent)) if path.is_dir() else "")
    except BaseException:
        for _, file in files:
            file.close()
        raise


def _of_folder(folder: Path) -> list[tuple[str, Path]]:
    """(what stands before their keys, file) of a Diffusers folder, or of one component's.

    :raises DeftError: when it has no weights, or a model's in pickles alone
    """
    own = weight_files(folder)
    if own and not (folder / "model_index.json").exists():
        before = f"{folder.name}/" if folder.name in COMPONENTS else ""
        return [(before, file) for file in own]
    found: list[tuple[str, Path]] = []
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = weight_files(part)
        found += [(f"{part.name}/", file) for file in files]
        pickles = [path for path in sorted(part.iterdir()) if path.suffix.lower() in PICKLES]
        if pickles and not files and part.name in COMPONENTS:
            _check_kind(pickles[0])  # which says what to do
    if not found and next(folder.glob("**/adapter_config.json"), None):
        raise DeftError(f"{folder}: {deft_layouts.AN_ADAPTER}")
    if not found:
        raise DeftError(f"{folder}: no Diffusers folder: neither it nor a folder in it has *model*.safetensors")
    return found


def weight_files(part: Path) -> list[Path]:
    """The files of a component's weights: whole or in shards, and of a variant (such as fp16) where there is no other.

    :raises DeftError: when a list of shards cannot be read, or one of them is missing
    """
    for variant in (r"", r"\.[\w-]+"):
        for path in sorted(part.iterdir()):
            if re.fullmatch(rf"(diffusion_pytorch_)?model\.safetensors\.index{variant}\.json", path.name):
                return _shards(path)
        for path in sorted(part.iterdir()):
            if re.fullmatch(rf"(diffusion_pytorch_)?model{variant}\.safetensors", path.name):
                return [path]
    return []


def _shards(index: Path) -> list[Path]:
    try:
        places = json.loads(read_text(index, f"{index}:"))["weight_map"]
        names = sorted({str(name) for name in places.values()})
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise DeftError(f"{index}: no list of shards that can be read ({reason_of(error)})") from None
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise DeftError(f"{index}: its shard {name} is missing")
    if not names:
        raise DeftError(f"{index}: it lists no shards")
    return [index.parent / name for name in names]


def _pipeline(folder: Path) -> str:
    """The class name in a folder's model_index.json, or ""."""
    index = folder / "model_index.json"
    if not index.is_file():
        return ""
    try:
        return str(json.loads(read_text(index, f"{index}:"))["_class_name"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return ""
