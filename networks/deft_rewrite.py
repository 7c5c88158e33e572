"""A checkpoint written anew with some of its weights changed, in its own layout and dtypes, streamed.

What does not change is copied byte by byte; what does is computed in float32, some rows at a time, while the rest is
copied. Nothing stands under the output's name before it is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from networks import deft_io, deft_partial, deft_progress, deft_scaled
from networks.deft_checkpoint import DTYPES, PICKLES, Checkpoint, Scratch, TensorEntry, TensorFile
from networks.deft_config import DeftError, reason_of
from networks.deft_factors import Factors
from networks.deft_progress import Bar

# (key name, the weight's shape (m, in[, kh, kw])) -> what is added to the weight: up @ down; or a matrix (m, n) or of
# the weight's shape; or what makes (m, n) of the weight W (m, n), float32; or None, which leaves it as it is
Change: TypeAlias = Factors | Tensor | Callable[[Tensor], Tensor]
Changes: TypeAlias = Callable[[str, tuple[int, ...]], Change | None]

_ROWS_SIZE = 1 << 19  # elements that are computed at once: 2 MiB in float32, which a core's cache holds
_COPY_SIZE = 1 << 26  # bytes that are copied at once
_WORKERS = min(4, os.cpu_count() or 1)  # more take longer; each has one thread of torch's
_WEIGHTS = (".safetensors", *PICKLES, ".gguf", ".msgpack", ".onnx", ".onnx_data", ".h5")  # not copied along
_SAFETENSORS_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def rewrite(
    checkpoint: Checkpoint,
    output: str | os.PathLike,
    change: Changes,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a checkpoint with changed weights: a file for a file, a new folder for a Diffusers folder.

    Scaled fp8 weights that change get new scales of the same form; the others keep their bytes.

    :param change: asked once for every key name of `checkpoint.layers` and `.further`, in the calling thread and in the
        file's order; a callable that it returns runs in another
    :param dtype: of all floating tensors of the output; None: each keeps its own; fp8 is for the layers alone, and
        scaled fp8 becomes plain
    :param seed: changed weights are rounded stochastically with it; None: to nearest
    :param metadata: of the output, instead of the checkpoint's; a folder's files keep theirs
    :raises DeftError: when a change does not fit its weight or makes it infinite, the output is there or is an input,
        or there is no space; nothing is left of it then
    """
    output = Path(output)
    files = _files(checkpoint)
    _check_output(checkpoint, output)
    partial = _partial(output)
    folder = checkpoint.source.is_dir()
    plans = []
    for before, file in files:
        path = partial / file.path.relative_to(checkpoint.source) if folder else partial
        plans.append(_planned(checkpoint, before, file, path, dtype, metadata))
    others = _other_files(checkpoint) if folder else []
    _check_space(output, sum(plan.size for plan in plans) + sum(path.stat().st_size for path in others))
    try:
        for path in others:
            to = partial / path.relative_to(checkpoint.source)
            to.parent.mkdir(parents=True, exist_ok=True)
            if dtype is not None and ".safetensors.index" in path.name:
                to.write_text(_index(path, plans), encoding="utf-8")
            else:
                shutil.copyfile(path, to)
        _Run(checkpoint, plans, change, seed).run()
        os.replace(partial, output)
    except OSError as error:
        raise DeftError(f"{output}: could not be written, nothing is left of it ({reason_of(error)})") from None
    finally:
        deft_partial.remove(partial)


def _files(checkpoint: Checkpoint) -> list[tuple[str, TensorFile]]:
    """:raises DeftError: for a checkpoint in GGUF"""
    found = [(before, file) for before, file in checkpoint.files if isinstance(file, TensorFile)]
    if len(found) < len(checkpoint.files):
        raise DeftError(
            f"{checkpoint.source}: GGUF is read and not written; merge into the model's bf16 or fp16 file, then "
            f"quantise that"
        )
    return found


def _check_output(checkpoint: Checkpoint, output: Path) -> None:
    source = checkpoint.source
    inputs = (source, *(file.path for _, file in checkpoint.files))
    if any(output.exists() and os.path.samefile(output, path) for path in inputs):
        raise DeftError(f"{output}: this is an input, which is never overwritten; give another name")
    if source.is_dir():
        if source.resolve() in output.resolve().parents:
            raise DeftError(f"{output}: this is inside of the input; give a folder elsewhere")
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise DeftError(f"{output}: is there already; give the name of a new folder")
    elif output.is_dir():
        raise DeftError(f"{output}: this is a folder; give a file that ends in .safetensors")


def _partial(output: Path) -> Path:
    try:
        return deft_partial.partial_of(output)
    except OSError as error:
        raise DeftError(f"{output}: cannot be written there ({reason_of(error)})") from None


def _check_space(output: Path, size: int) -> None:
    with contextlib.suppress(OSError):  # some file systems do not tell
        free = shutil.disk_usage(output.parent).free
        if free < size:
            raise DeftError(f"{output}: needs {size / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free there")


def _other_files(checkpoint: Checkpoint) -> list[Path]:
    """What a Diffusers folder holds besides weights; no lists of shards of other variants."""
    source = checkpoint.source
    used = {file.path.name for _, file in checkpoint.files}
    found = []
    for path in sorted(source.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(source).parts)
        if hidden or not path.is_file() or path.suffix.lower() in _WEIGHTS:
            continue
        if ".safetensors.index" in path.name and not _lists(path, used):
            continue
        if not re.search(r"\.bin\.index(\.[\w-]+)?\.json$", path.name):
            found.append(path)
    return found


def _lists(index: Path, used: set[str]) -> bool:
    try:
        return set(json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"].values()) <= used
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return False


def _index(path: Path, plans: Sequence[_Plan]) -> str:
    """A list of shards, of what is in them in another dtype; it could be read when the checkpoint was opened."""
    of_part = [plan for plan in plans if plan.file.path.parent == path.parent]
    index = json.loads(path.read_text(encoding="utf-8-sig"))
    kept = {key.removeprefix(plan.before) for plan in of_part for key in plan.places}
    index["weight_map"] = {key: file for key, file in index["weight_map"].items() if key in kept}
    size = sum(place.size for plan in of_part for place in plan.places.values())
    about = index.get("metadata")
    index["metadata"] = (about if isinstance(about, dict) else {}) | {"total_size": size}
    return json.dumps(index, indent=2) + "\n"


@dataclass(frozen=True)
class _Place:
    """A tensor in the output."""

    dtype: torch.dtype
    start: int
    size: int


@dataclass(frozen=True)
class _Plan:
    """An output file before it is written.

    :param places: by the checkpoint's keys, those that are left out not among them
    """

    before: str
    file: TensorFile
    path: Path
    header: bytes
    places: Mapping[str, _Place]
    size: int


def _planned(
    checkpoint: Checkpoint,
    before: str,
    file: TensorFile,
    path: Path,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str] | None,
) -> _Plan:
    """The header of an output file: keys in the order of the input's, data in the order of its data."""
    kept = dict(file.metadata if metadata is None or checkpoint.source.is_dir() else metadata)
    dtypes = _dtypes(checkpoint, before, file, dtype)
    if dtype is not None and len(dtypes) < len(file.entries):
        kept.pop("_quantization_metadata", None)
    offsets, end = {}, 0
    for name in sorted(dtypes, key=lambda name: file.entries[name].start):
        size = math.prod(file.entries[name].shape) * dtypes[name].itemsize
        offsets[name] = (end, end + size)
        end += size
    fields: dict[str, object] = {"__metadata__": kept} if kept else {}
    for name in (name for name in file.entries if name in dtypes):
        about = {"dtype": _SAFETENSORS_NAMES[dtypes[name]], "shape": list(file.entries[name].shape)}
        fields[name] = about | {"data_offsets": list(offsets[name])}
    header = deft_io.header_of(fields)
    places = {
        before + name: _Place(dtypes[name], len(header) + first, last - first)
        for name, (first, last) in offsets.items()
    }
    return _Plan(before, file, path, header, places, len(header) + end)


def _dtypes(checkpoint: Checkpoint, before: str, file: TensorFile, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Key in the file -> dtype in the output, of all that are written: scales go with what they are scales of."""
    layers = {piece.key for place in checkpoint.layers.values() for piece in place.pieces}
    plain = dtype is not None and any(checkpoint.entries[key].dtype != dtype for key in checkpoint.scales)
    found = {}
    for name, entry in file.entries.items():
        if plain and deft_scaled.COMPANIONS.fullmatch(name):
            continue
        wanted = dtype is not None and entry.dtype in deft_scaled.FLOATS
        if dtype in deft_scaled.FP8 and before + name not in layers:
            wanted = False
        found[name] = dtype if wanted and dtype is not None else entry.dtype
    return found


class _Output:
    """An output file that is written in any order, from several threads."""

    def __init__(self, plan: _Plan) -> None:
        self._lock = threading.Lock()
        plan.path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = open(plan.path, "wb")  # noqa: SIM115  closed by `close`
        self._handle.write(plan.header)
        self._handle.flush()
        self._handle.truncate(plan.size)
        self._written = threading.Event()
        self._flusher = threading.Thread(target=self._flush, daemon=True)
        self._flusher.start()

    def _flush(self) -> None:
        """Puts onto the disk what is written, while more is computed: `close` has little left to wait for."""
        while not self._written.wait(1.0):
            with contextlib.suppress(OSError):  # which `close` meets too
                os.fsync(self._handle.fileno())

    def write(self, start: int, data: memoryview) -> None:
        if hasattr(os, "pwrite"):
            while data:
                written = os.pwrite(self._handle.fileno(), data, start)
                data, start = data[written:], start + written
            return
        with self._lock:
            self._handle.seek(start)
            self._handle.write(data)
            self._handle.flush()

    def copy(self, file: TensorFile, source: int, start: int, size: int) -> None:
        """Bytes of another file, within the kernel where it can."""
        while size and hasattr(os, "copy_file_range"):
            try:
                copied = os.copy_file_range(file.fileno(), self._handle.fileno(), size, source, start)
            except OSError:
                break
            if not copied:
                break
            source, start, size = source + copied, start + copied, size - copied
        while size:
            data = memoryview(bytearray(min(size, 1 << 23)))
            file.read_into(source, data)
            self.write(start, data)
            source, start, size = source + len(data), start + len(data), size - len(data)

    def close(self, whole: bool) -> None:
        self._written.set()
        self._flusher.join()
        with self._handle:
            if whole:
                os.fsync(self._handle.fileno())


class _Delta:
    """What is added to one layer's weight."""

    def __init__(self, checkpoint: Checkpoint, name: str, shape: tuple[int, ...], change: Change) -> None:
        self._checkpoint, self._name = checkpoint, name
        self._shape = (shape[0], math.prod(shape[1:]))
        self._lock = threading.Lock()
        self._factors: tuple[Tensor, Tensor] | None = None
        self._matrix: Tensor | None = None
        self._made: Callable[[Tensor], Tensor] | None = None
        if isinstance(change, Factors):
            self._check((change.up.shape[0], change.down.shape[1]), change.shape)
            self._factors = change.up.float(), change.down.float()
        elif isinstance(change, Tensor):
            self._matrix = self._as_matrix(change)
        else:
            self._made = change

    def _check(self, found: tuple[int, ...], shape: tuple[int, ...]) -> None:
        if found != self._shape:
            raise DeftError(
                f"{self._name}: a change of shape {tuple(shape)} does not fit the weight of {self._shape} in "
                f"{self._checkpoint.source}; the adapter is for another model"
            )

    def _as_matrix(self, change: Tensor) -> Tensor:
        flat = change.flatten(1) if change.dim() > 1 else change
        self._check(tuple(flat.shape), tuple(change.shape))
        return flat.float()

    def add(self, rows: Tensor, first: int) -> None:
        """Adds its rows from `first` on to those of the weight (number, n), in place."""
        if self._factors is not None:
            up, down = self._factors
            rows.addmm_(up[first : first + len(rows)], down)
            return
        with self._lock:
            if self._matrix is None and self._made is not None:
                weight = self._checkpoint.weight(self._name).flatten(1)
                self._matrix = self._as_matrix(self._made(weight))
        assert self._matrix is not None
        rows.add_(self._matrix[first : first + len(rows)])


@dataclass(frozen=True)
class _Part:
    """A change of some rows of a tensor: which, and where they stand in the layer's weight."""

    first: int
    rows: int
    of_layer: int
    delta: _Delta


class _Run:
    """One writing of all files."""

    def __init__(self, checkpoint: Checkpoint, plans: Sequence[_Plan], change: Changes, seed: int | None) -> None:
        self._checkpoint, self._plans, self._change, self._seed = checkpoint, plans, change, seed
        self._shapes = {name: p.shape for name, p in {**checkpoint.further, **checkpoint.layers}.items()}
        self._at: dict[str, list[tuple[str, int, int, int]]] = {}  # key -> name, first, rows, first of the layer
        self._to_come: dict[str, set[str]] = {}  # name -> keys that it has not been asked for
        for name, place in {**checkpoint.further, **checkpoint.layers}.items():
            first = 0
            for piece in place.pieces:
                self._at.setdefault(piece.key, []).append((name, piece.first, piece.rows, first))
                first += piece.rows
            self._to_come[name] = {piece.key for piece in place.pieces}
        self._deltas: dict[str, _Delta | None] = {}
        self._parts: dict[str, list[_Part]] = {}
        self._weight_of = {scale.key: key for key, scale in checkpoint.scales.items()}

    def run(self) -> None:
        """:raises DeftError, OSError: when a weight does not come out right, or the disk is full"""
        outputs: list[_Output] = []
        whole = False
        try:
            outputs += map(_Output, self._plans)
            with (
                deft_progress.single_threaded(),
                Bar(sum(plan.size for plan in self._plans), "writing", "B", unit_scale=True) as bar,
            ):
                self._write(outputs, bar)
            whole = True
        finally:
            for output in outputs:
                output.close(whole)

    def _write(self, outputs: Sequence[_Output], bar: Bar) -> None:
        pool = ThreadPoolExecutor(_WORKERS)
        working: deque[tuple[Future[None], int]] = deque()
        try:
            for work, size in self._work(outputs):
                if work is None:
                    bar.add(size)
                    continue
                working.append((pool.submit(work), size))
                while len(working) > 2 * _WORKERS or (working and working[0][0].done()):
                    _finish(working, bar)
            while working:
                _finish(working, bar)
        finally:
            pool.shutdown(cancel_futures=True)

    def _work(self, outputs: Sequence[_Output]) -> Iterator[tuple[Callable[[], None] | None, int]]:
        """Copies what stays, and yields what is to be computed, and the bytes that either writes."""
        for plan, output in zip(self._plans, outputs, strict=True):
            run: tuple[int, int, int] = (0, 0, 0)  # where, where to, bytes
            for entry in sorted(plan.file.entries.values(), key=lambda entry: entry.start):
                key = plan.before + entry.name
                place = plan.places.get(key)
                if place is None or not entry.size:
                    continue
                parts = self._parts_of(self._weight_of.get(key, key))
                scale = self._checkpoint.scales.get(key)
                converted = place.dtype != entry.dtype or (scale is not None and scale.key not in plan.places)
                if key in self._weight_of and parts and not converted:
                    continue  # a scale, which is written with its weight
                if not parts and not converted:
                    source, to, size = run
                    if (source + size, to + size) == (entry.start, place.start) and size < _COPY_SIZE:
                        run = (source, to, size + entry.size)
                    else:
                        output.copy(plan.file, *run)
                        yield None, size
                        run = (entry.start, place.start, entry.size)
                    continue
                yield self._job(key, place, plan, output, self._parts.pop(key, [])), place.size
            output.copy(plan.file, *run)
            yield None, run[2]

    def _parts_of(self, key: str) -> list[_Part]:
        """What changes in a tensor."""
        if key not in self._parts:
            self._parts[key] = []
            pieces = self._at.get(key, [])
            deltas = {name: self._delta(name, key) for name in dict.fromkeys(name for name, *_ in pieces)}
            for name, first, rows, of_layer in pieces:
                delta = deltas[name]
                if delta is not None:
                    self._parts[key].append(_Part(first, rows, of_layer, delta))
        return self._parts[key]

    def _delta(self, name: str, key: str) -> _Delta | None:
        if name not in self._deltas:
            change = self._change(name, self._shapes[name])
            self._deltas[name] = None if change is None else _Delta(self._checkpoint, name, self._shapes[name], change)
        self._to_come[name].discard(key)
        return self._deltas[name] if self._to_come[name] else self._deltas.pop(name)

    def _job(self, key: str, place: _Place, plan: _Plan, output: _Output, parts: Sequence[_Part]) -> _Job:
        scale = self._checkpoint.scales.get(key)
        scales = None if scale is None else plan.places.get(scale.key)
        generator = None
        if self._seed is not None and parts:
            digest = hashlib.sha256(f"{self._seed} {key}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        return _Job(self._checkpoint, key, place, scales, output, parts, generator)


@dataclass(frozen=True)
class _Job:
    """One tensor to be computed and written.

    :param scales: where its scales are written, if it has any in the output
    """

    checkpoint: Checkpoint
    key: str
    place: _Place
    scales: _Place | None
    output: _Output
    parts: Sequence[_Part]
    generator: torch.Generator | None

    @property
    def entry(self) -> TensorEntry:
        found = self.checkpoint.entries[self.key]
        assert isinstance(found, TensorEntry)
        return found

    def __call__(self) -> None:
        same, scale = self.place.dtype == self.entry.dtype, self.checkpoint.scales.get(self.key)
        if same and scale is not None and self.scales is not None:
            self._write_scaled(self.scales, scale.blocks)
            return
        same = same and scale is None
        end = 0
        for first, rows in self._ranges() if same else [(0, self._rows)]:
            self._copy(end, first - end)
            for at, number in _chunks(first, rows, self.entry):
                self._write(at, self._changed(at, number))
            end = first + rows
        self._copy(end, self._rows - end)

    @property
    def _rows(self) -> int:
        return self.entry.shape[0] if self.entry.shape else 1

    def _ranges(self) -> list[tuple[int, int]]:
        """(first, number) of the rows that change."""
        return sorted((part.first, part.rows) for part in self.parts)

    def _copy(self, first: int, rows: int) -> None:
        """Rows that stay, in the same dtype."""
        size = self.entry.row_size
        self.output.copy(self.entry.file, self.entry.start + first * size, self.place.start + first * size, rows * size)

    def _changed(self, first: int, rows: int) -> Tensor:
        """Some rows of the new weight, (rows, n), float32."""
        found = self.checkpoint.rows(self.key, first, rows, _scratch()).view(rows, -1)
        for part in self.parts:
            start, end = max(first, part.first), min(first + rows, part.first + part.rows)
            if start < end:
                part.delta.add(found[start - first : end - first], part.of_layer + start - part.first)
        return found

    def _write(self, first: int, values: Tensor) -> None:
        if self.parts:
            self._check(values)
        self._put(
            self.place.start + first * self.entry.row_size // self.entry.dtype.itemsize * self.place.dtype.itemsize,
            values,
            self.place.dtype,
            self.generator,
        )

    def _put(self, start: int, values: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> None:
        if not values.numel():
            return
        data = _scratch().take("stored", values.numel() * dtype.itemsize)
        if generator is not None or dtype in deft_scaled.FP8:
            values = deft_scaled.rounded(values, dtype, generator)
        torch.frombuffer(data, dtype=dtype).view(values.shape).copy_(values)
        self.output.write(start, data)

    def _check(self, values: Tensor) -> None:
        """:raises DeftError: when a value is not finite, or too large for the dtype; fp8 has its largest for it"""
        low, high = (float(value) for value in values.aminmax())
        largest = torch.finfo(torch.float32 if self.place.dtype in deft_scaled.FP8 else self.place.dtype).max
        if not (-largest <= low and high <= largest):
            name = str(self.place.dtype).removeprefix("torch.")
            raise DeftError(
                f"{self.checkpoint.source}: {self.key} would hold values from {low:.3g} to {high:.3g} with the change, "
                f"which {name} cannot; lower the strength, or see whether the model or the adapter holds NaN"
            )

    def _write_scaled(self, place: _Place, blocks: int) -> None:
        """With scales made anew: of the whole weight, or of each row's blocks."""
        chunks = [(0, self._rows)] if blocks == 0 else _chunks(0, self._rows, self.entry)
        for first, rows in chunks:
            values = self._values(first, rows)
            scales = deft_scaled.made(values, blocks, self.place.dtype, place.dtype)
            self._put(place.start + first * blocks * place.dtype.itemsize, scales, place.dtype, None)
            for at, number in _chunks(first, rows, self.entry):
                some = slice(at - first, at - first + number)
                share = 1 / (scales[some] if blocks else scales).float()
                stored = deft_scaled.times(values[some], share, blocks)
                self._put(self.place.start + at * self.entry.row_size, stored, self.place.dtype, self.generator)

    def _values(self, first: int, rows: int) -> Tensor:
        found = torch.empty(rows, self.entry.row_size)  # a byte each in fp8
        for at, number in _chunks(first, rows, self.entry):
            values = self._changed(at, number)
            self._check(values)
            found[at - first : at - first + number] = values
        return found


_of_thread = threading.local()


def _scratch() -> Scratch:
    """The calling thread's."""
    if not hasattr(_of_thread, "scratch"):
        _of_thread.scratch = Scratch()
    found: Scratch = _of_thread.scratch
    return found


def _chunks(first: int, rows: int, entry: TensorEntry) -> Iterator[tuple[int, int]]:
    """(first, number) of rows that are computed at once."""
    step = max(1, _ROWS_SIZE // max(1, entry.row_size // entry.dtype.itemsize))
    for at in range(first, first + rows, step):
        yield at, min(step, first + rows - at)


def _finish(working: deque[tuple[Future[None], int]], bar: Bar) -> None:
    done, size = working.popleft()
    done.result()
    bar.add(size)
