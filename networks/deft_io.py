"""Adapter files: reading LoRA and DEFT files, writing them whole or not at all, hashes and metadata.

Names in a LoRA file are `<layer>.lora_up.weight`, `<layer>.lora_down.weight`, `<layer>.alpha`, or those of
`Architecture.dotted`; in a DEFT file (`save_format=deft`) `<layer>.deft_P` (`.deft_P_relu` and the like under other
bases than qr), `.deft_R`, `.deft_E0`, `.deft_g` and `.alpha`, the formula's own matrices with s = alpha / rank.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from networks import deft_factors, deft_layouts, deft_math, deft_partial, deft_pictures
from networks.deft_config import DeftError, option_names, reason_of
from networks.deft_factors import Factors
from networks.deft_names import looks_made_for, own_key
from networks.deft_targets import TOGETHER, Target

logger = logging.getLogger(__name__)

VERSION = "0.3.0"  # of the project, as CHANGELOG.md has it; here, since networks/ is copied without the rest
VERSION_KEY = "deft_version"  # for people: reading does not depend on it
OPTIONS_KEY = "deft_options"  # JSON of DeftConfig
LAYERS_KEY = "deft_layers"  # JSON: layer -> [rank without padding, s of the training, exponent of balancing_exponent]
PEFT_KEY = "lora_adapter_metadata"  # of diffusers: JSON of peft's configurations, "unet.r" and the like
BASE_HASH_KEY, BASE_DTYPE_KEY = "deft_base_hash", "deft_base_dtype"
EMBEDDINGS = "bundle_emb."  # textual inversions that A1111 reads from a LoRA's file
KEPT_KEY = "deft_kept_layers"  # JSON: layer -> tensor

# dtypes in the order in which safetensors' `save` puts tensors into a file, from its end, and its names of them
_KINDS = (
    torch.bool, torch.uint8, torch.int8, torch.float8_e5m2, torch.float8_e4m3fn, torch.int16, torch.float16,
    torch.bfloat16, torch.int32, torch.float32, torch.float64, torch.int64,
)  # fmt: skip
_KIND_NAMES = ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")


@dataclass(frozen=True)
class LoraLayer(Factors):
    """One layer of a LoRA file, float32, without padding, with the file's alpha / rank in down.

    :param trained_rank: to train on with: of the factors, or what the file says where more than padding is zero
    :param scale: the s to train on with: that of the training that wrote the file, where it says so, or else the
        file's alpha / rank
    """

    trained_rank: int
    scale: float


@dataclass(frozen=True)
class DeftLayer:
    """One layer of a DEFT file: the formula's P (m, r), R (r, n) or None, E0 (m, r), s and the gate or None.

    P is (m, 2r) for `nmf`.
    """

    basis: str
    P: Tensor
    R: Tensor | None
    E0: Tensor
    scale: float
    gate: Tensor | None

    @property
    def trained_rank(self) -> int:
        """The rank that a network made for it has."""
        return self.E0.shape[1]

    @property
    def removes(self) -> bool:
        """Whether something of W stays out: E is not E0."""
        E = deft_math.left_and_eraser(self.P, self.basis)[1]
        return bool((E - self.E0).norm() > 1e-6 * E.norm())


@dataclass(frozen=True)
class AdapterFile:
    """What a file holds: layers by key name, and the metadata's `deft_*` part (empty in files of other programs)."""

    source: str
    layers: Mapping[str, LoraLayer | DeftLayer]
    options: dict[str, object]
    tensors: Mapping[str, Tensor]

    def layer_of(self, target: Target) -> LoraLayer | DeftLayer | None:
        """What the file holds for a layer, for a part of a fused one, or for several together; None if nothing.

        :raises DeftError: when the method's own matrices are those of the whole, and a part is asked for, or of parts
        """
        found = self.layers.get(target.name) or self.layers.get(target.own_name)
        if found is None and len(target.pieces) > 1:
            return self._together(target)
        if target.file_rows is None and found is None and f"{target.name}-0" in self.layers:
            use = "leave fuse_qkv=true out" if target.parts else "use --network_args split_qkv=true"
            raise DeftError(f"{self.source}: its matrices of {target.name} are split; {use}")
        if found is None and any(target.name in name.split(TOGETHER) for name in self.layers if TOGETHER in name):
            raise DeftError(
                f"{self.source}: its matrices of {target.name} are those of queries, keys and values together; use "
                f"--network_args fuse_qkv=true"
            )
        if found is not None or target.file_rows is None:
            return found
        fused = self.layers.get(target.file_name)
        if isinstance(fused, DeftLayer):
            raise DeftError(
                f"{self.source}: its matrices of {target.file_name} are not split as this network's are; leave "
                f"split_qkv=true out (in Diffusers' form: add fuse_qkv=true), or save the file as a LoRA "
                f"(save_format=lora)"
            )
        return None if fused is None else _part(fused, target)

    def _together(self, target: Target) -> LoraLayer | None:
        """The LoRA of several layers as if they were one; what the file does not hold of them does not change."""
        found = [(piece, self.layer_of(piece)) for piece in target.pieces]
        layers: list[tuple[LoraLayer, Target]] = []
        for piece, layer in found:
            if isinstance(layer, DeftLayer):
                raise DeftError(
                    f"{self.source}: its matrices of {piece.name} are that layer's alone; leave fuse_qkv=true out, or "
                    f"save the file as a LoRA (save_format=lora)"
                )
            if layer is not None and layer.up.shape[0] != piece.shape[0]:
                return layer  # which `deft_load.check_shape` refuses
            layers += [] if layer is None else [(layer, piece)]
        if not layers:
            return None
        first = layers[0][0]
        sizes = [piece.shape[0] for piece in target.pieces]
        starts = {piece.name: sum(sizes[:k]) for k, piece in enumerate(target.pieces)}
        ups = [_up_for(layer, first.down) for layer, _ in layers]
        same = [up for up in ups if up is not None]
        if len(same) == len(sizes):
            whole = Factors(torch.cat(same), first.down, first.kernel)
        else:
            placed = [(Factors(layer.up, layer.down, layer.kernel), starts[piece.name]) for layer, piece in layers]
            whole = deft_factors.shared(deft_factors.stacked(placed, sum(sizes)))
        known = max(layer.trained_rank for layer, _ in layers)
        return replace(first, up=whole.up, down=whole.down, trained_rank=max(known, whole.rank))


def _up_for(layer: Factors, down: Tensor) -> Tensor | None:
    """The up of the same product with another down, where that is the layer's own up to a power of two, which half
    precision's balance puts in; else None."""
    if torch.equal(layer.down, down):
        return layer.up
    if layer.down.shape != down.shape or not layer.down.any():
        return None
    ratio = float(down.abs().max() / layer.down.abs().max())
    exact = ratio > 0 and math.frexp(ratio)[0] == 0.5 and torch.equal(layer.down * ratio, down)
    return layer.up / ratio if exact else None


def _part(fused: LoraLayer, target: Target) -> LoraLayer:
    """Some outputs of a fused LoRA: exactly those rows of up, and of the rank what they use."""
    first, total = target.file_rows or (0, 0)
    outputs = target.shape[0]
    if fused.up.shape[0] != total:
        return fused  # which `deft_load.check_shape` refuses
    part = deft_factors.rows_of(fused, first, outputs)
    return replace(fused, up=part.up, down=part.down, trained_rank=part.rank or fused.trained_rank)


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Any]:
    path = Path(path)
    if path.is_dir():
        raise DeftError(f"{path}: this is a folder; give a .safetensors file")
    if not path.is_file():
        raise DeftError(f"no such adapter file: {path}")
    if path.suffix.lower() != ".safetensors":
        raise DeftError(f"{path}: only .safetensors is read, since other formats can run code; convert the file first")
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise DeftError(f"{path}: not a whole safetensors file ({error})") from None


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a `.safetensors` file.

    :raises DeftError: when it is missing, cut off, of a kind that would have to be unpickled, or of complex numbers
    """
    with _opened(path) as file:
        deft_layouts.refuse_model(file.keys(), str(path))  # before gigabytes are read
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        metadata = file.metadata() or {}
    for key, tensor in tensors.items():
        if tensor.is_complex():
            raise DeftError(f"{path}: {key} holds complex numbers, which no adapter has; the file is damaged")
    return tensors, metadata


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """`read_tensors` without the tensors."""
    with _opened(path) as file:
        deft_layouts.refuse_model(file.keys(), str(path))
        return file.metadata() or {}


def read_adapter(path: str | os.PathLike) -> AdapterFile:
    """Reads a LoRA or DEFT file."""
    tensors, metadata = read_tensors(path)
    return parse_adapter(tensors, metadata, str(path))


def parse_adapter(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> AdapterFile:
    """Sorts the tensors of a LoRA or DEFT file into layers and takes padding off.

    :raises DeftError: for any other kind of adapter, and for damaged ones
    """
    grouped: dict[str, dict[str, Tensor]] = {}
    embeddings = [key for key in tensors if key.startswith(EMBEDDINGS)]
    if embeddings:
        logger.warning(
            f"{source}: {len(embeddings)} tensors of embeddings, {embeddings[0]} for one, are passed over: they are no "
            f"part of a LoRA, and what is saved will not hold them"
        )
    for key, value in tensors.items():
        layer, _, part = own_key(key).partition(".")
        if key not in embeddings:
            grouped.setdefault(layer, {})[part] = value
    options, recorded = parse_metadata(metadata, source)
    layers: dict[str, LoraLayer | DeftLayer] = {}
    for name, parts in grouped.items():
        try:
            layers[name] = parse_layer(parts, recorded.get(name))
        except KeyError as missing:
            raise DeftError(
                f"{source}: neither a plain LoRA nor a DEFT file (unexpected or missing {missing}); "
                f"it looks made for {looks_made_for(tensors)}"
            ) from None
        except ValueError as error:
            raise DeftError(f"{source}: {name} is damaged ({error})") from None
    if not layers:
        raise DeftError(f"{source}: holds no adapter layers")
    return AdapterFile(source, layers, options, tensors)


def parse_metadata(metadata: Mapping[str, str], source: str) -> tuple[dict[str, object], dict[str, tuple]]:
    """The options and the layers' records of our own files; empty for others'."""
    try:
        options = dict(json.loads(metadata.get(OPTIONS_KEY, "{}")))
        recorded = {
            name: (int(rank), float(scale), int(exponent))
            for name, (rank, scale, exponent) in dict(json.loads(metadata.get(LAYERS_KEY, "{}"))).items()
        }
        for rank, scale, exponent in recorded.values():
            if rank < 0 or not 0 < scale < math.inf or abs(exponent) > 64:
                raise ValueError(f"a rank of {rank}, a scale of {scale}, an exponent of {exponent}")
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise DeftError(f"{source}: its deft_* metadata cannot be read ({reason_of(error)})") from None
    for name in options.keys() - set(option_names()):
        logger.warning(f"{source}: made with the option {name}, which is not known here; a newer version wrote it")
        del options[name]
    return options, recorded


def parse_layer(parts: dict[str, Tensor], recorded: tuple[int, float, int] | None) -> LoraLayer | DeftLayer:
    """One layer by the names of its parts.

    :raises KeyError: with the name of a part that is missing or that no plain LoRA or DEFT layer has
    :raises ValueError: when the parts do not fit each other, are empty or not finite
    """
    for name, tensor in parts.items():
        check_values(name, tensor)
    return checked_layer(dict(parts), recorded)


def checked_layer(parts: dict[str, Tensor], recorded: tuple[int, float, int] | None) -> LoraLayer | DeftLayer:
    """`parse_layer` of parts whose values have been checked, which it takes out of `parts`."""
    alpha = None
    if "alpha" in parts:
        if parts["alpha"].numel() != 1:
            raise ValueError(f"alpha has {parts['alpha'].numel()} values")
        alpha = parts.pop("alpha").item()
    bases = {"deft_P": "qr"} | {f"deft_P_{basis}": basis for basis in ("svd", "relu", "none", "tsvd", "nmf")}
    for P_name in bases.keys() & parts.keys():
        basis, P, E0 = bases[P_name], parts.pop(P_name), parts.pop("deft_E0")
        R, gate = parts.pop("deft_R", None), parts.pop("deft_g", None)
        _refuse_rest(parts)
        if E0.dim() != 2 or P.shape != (len(E0), E0.shape[1] * (2 if basis == "nmf" else 1)):
            raise ValueError("the shapes of P and E0 do not fit")
        if R is not None and (R.dim() != 2 or R.shape[0] != E0.shape[1]):
            raise ValueError("the shapes of P and R do not fit")
        return DeftLayer(basis, P, R, E0, 1.0 if alpha is None else alpha / E0.shape[1], gate)
    up, down = parts.pop("lora_up.weight"), parts.pop("lora_down.weight")
    _refuse_rest(parts)
    if min(up.dim(), down.dim()) < 2 or not down.shape[0] or up.shape[1] != down.shape[0] or up.shape[2:].numel() != 1:
        raise ValueError(f"up {tuple(up.shape)} and down {tuple(down.shape)} do not fit")
    kernel, padded = tuple(down.shape[1:]), down.shape[0]
    file_scale = 1.0 if alpha is None else (alpha or padded) / padded
    true_rank, scale, exponent = recorded or (0, abs(file_scale) or 1.0, 0)  # the sign is in down, not in the rate
    factors = deft_factors.stripped(Factors(up.float().flatten(1), down.float().flatten(1), kernel))
    rank = factors.rank
    if rank < true_rank <= padded:  # zero directions that were not padding
        rank = true_rank
    elif rank == 0:
        rank = padded
    up, down = factors.up, factors.down
    if exponent:
        up, down = up * 2.0**exponent, down * 2.0**-exponent
    return LoraLayer(up, down if file_scale == 1 else down * file_scale, kernel, rank, scale)


def check_values(name: str, tensor: Tensor) -> None:
    """:raises ValueError: for a tensor of a layer without any value, or with one that is no number"""
    if not tensor.numel():
        raise ValueError(f"{name} of shape {tuple(tensor.shape)} holds nothing")
    if not deft_factors.is_finite(tensor):
        raise ValueError(f"{name} has non-finite values")


def factors_of(layer: LoraLayer | DeftLayer, base_weight: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """up (m, k) and down (k, n) of a file's layer; those of a DEFT file's depend on the model's weight (m, n)."""
    if isinstance(layer, LoraLayer):
        return layer.up, layer.down
    W = base_weight().float()
    scale = layer.scale * (1.0 if layer.gate is None else float(torch.sigmoid(layer.gate)))
    P, E0 = layer.P.to(W), layer.E0.to(W)
    R = None if layer.R is None else layer.R.to(W)
    return deft_math.lora_factors(P, R, E0, scale, layer.basis, lambda: W)


def _refuse_rest(parts: Mapping[str, Tensor]) -> None:
    for name in parts:
        raise KeyError(name)


def is_adapter_dict(tensors: Iterable[str]) -> bool:
    """Whether names are those of an adapter file, not of a network's state dict."""
    return any(own_key(key).endswith((".lora_up.weight", ".lora_down.weight", ".deft_E0")) for key in tensors)


def lora_tensors(
    layers: Mapping[str, Factors], dtype: torch.dtype, pad: bool
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The tensors of a plain LoRA file, and each layer's balancing exponent.

    One rank R and alpha = R in the whole file, since diffusers misreads files of mixed ranks or alphas; smaller layers
    get zero columns and rows, which every client reads right.

    :param layers: by key name, float32
    :param pad: False leaves each layer its own rank
    """
    layers = dict(layers)
    file_rank = max(factors.rank for factors in layers.values())
    tensors: dict[str, Tensor] = {}
    exponents: dict[str, int] = {}
    ups: dict[int, list[Tensor]] = {}  # of layers that have one down: it stays one
    for factors in layers.values():
        ups.setdefault(id(factors.down), []).append(factors.up)
    for name, factors in layers.items():
        rank = file_rank if pad else factors.rank
        wide, up = deft_factors.padded(factors, rank), torch.cat(ups[id(factors.down)])
        exponent = deft_factors.balancing_exponent(up, factors.down) if dtype == torch.float16 else 0
        up, down = wide.up * 2.0**-exponent, wide.down * 2.0**exponent
        ones = (1,) * (len(factors.kernel) - 1)
        tensors[f"{name}.lora_up.weight"] = _for_file(up.reshape(*up.shape, *ones), dtype)
        tensors[f"{name}.lora_down.weight"] = _for_file(down.reshape(rank, *factors.kernel), dtype)
        tensors[f"{name}.alpha"] = torch.tensor(float(rank))  # float32 always: bfloat16 rounds ranks above 256
        exponents[name] = exponent
    return tensors, exponents


def _for_file(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype).contiguous()


def deft_tensors(layers: Mapping[str, DeftLayer]) -> dict[str, Tensor]:
    """The tensors of a DEFT file, float32."""
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        P_name = "deft_P" if layer.basis == "qr" else f"deft_P_{layer.basis}"
        parts = {P_name: layer.P, "deft_R": layer.R, "deft_E0": layer.E0, "deft_g": layer.gate}
        tensors.update({f"{name}.{p}": _for_file(t, torch.float32) for p, t in parts.items() if t is not None})
        tensors[f"{name}.alpha"] = torch.tensor(layer.scale * layer.trained_rank)
    return tensors


def kept_tensors(directions: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file of directions for the option `keep`, and its metadata: layers with the same directions share a tensor.

    :param directions: key name -> (n, k)
    """
    tensors: dict[str, Tensor] = {}
    layers: dict[str, str] = {}
    by_content: dict[bytes, str] = {}
    for name, found in directions.items():
        half = found.to(torch.float16).cpu().contiguous()
        content = f"{tuple(half.shape)}".encode() + half.numpy().tobytes()
        key = by_content.setdefault(hashlib.sha256(content).digest(), f"kept.{len(tensors)}")
        tensors[key], layers[name] = half, key
    return tensors, {VERSION_KEY: VERSION, KEPT_KEY: json.dumps(layers)}


def kept_directions(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Key name -> orthonormal directions (n, k), float32, of what `kept_tensors` has made."""
    whole = {key: torch.linalg.qr(tensor.float())[0] for key, tensor in tensors.items()}
    return {name: whole[key] for name, key in json.loads(metadata[KEPT_KEY]).items()}


def base_fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of base weights that is the same on every device: of the integer row and column sums of their bits.

    :param weights: (name, weight), of any floating dtype
    """
    digest = hashlib.sha256()
    bits_of_size = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, weight in weights:
        bits = weight.detach().flatten(1).contiguous().view(bits_of_size[weight.element_size()])
        sums = {"rows": bits.sum(1, dtype=torch.int64).cpu(), "columns": bits.sum(0, dtype=torch.int64).cpu()}
        digest.update(name.encode() + save(sums))
    return digest.hexdigest()


def header_of(fields: Mapping[str, object]) -> bytes:
    """What stands before a safetensors file's data: its length, and JSON, so long that the data begins at an eighth.

    :param fields: "__metadata__", and a tensor's dtype, shape and place by its name
    """
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def fitted_header(fields: Mapping[str, object], metadata: Mapping[str, str], path: str | os.PathLike) -> bytes:
    """`header_of` with metadata whose pictures are as small as it needs, see `deft_pictures.fitted`.

    :param fields: of the tensors
    :param path: of the file, for what is told
    """
    found, told = deft_pictures.fitted(metadata, len(header_of(fields)))
    if told:
        logger.warning(f"{path}: {told}")
    return header_of({"__metadata__": found, **fields})


def write_hashed(tensors: Mapping[str, Tensor], path: str | os.PathLike, metadata: Mapping[str, str]) -> None:
    """`write_safetensors` with `sshs_model_hash` and `sshs_legacy_hash`, by which A1111 and Civitai know a file.

    As `precalculate_safetensors_hashes` of sd-scripts' library/train_util.py (commit 48d368fa): SHA-256 of the file
    behind its header, and of 64 KiB at 1 MiB, the file having the training's `ss_*` metadata alone. No second copy of
    the tensors is made: they are hashed and written where they are.

    :raises DeftError: for non-finite values, a full disk, or a folder that cannot be written to
    """
    _check_finite(tensors, path)
    fields, contents = _laid_out(tensors)
    of_training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    hashes = _hashes_of(header_of({"__metadata__": of_training, **fields}), contents)
    header = fitted_header(fields, {**metadata, **hashes}, path)
    write_whole(Path(path), [header, *contents])


def _laid_out(tensors: Mapping[str, Tensor]) -> tuple[dict[str, object], list[memoryview]]:
    """What a file's header has of tensors, and their bytes, in the order of safetensors' own `save`."""
    fields: dict[str, object] = {}
    contents: list[memoryview] = []
    end = 0
    kinds = {name: _KINDS.index(tensor.dtype) for name, tensor in tensors.items()}
    for name in sorted(tensors, key=lambda name: (-kinds[name], name)):
        tensor = tensors[name].detach().cpu().contiguous()
        contents.append(tensor.reshape(-1).view(torch.uint8).numpy().data)
        start, end = end, end + contents[-1].nbytes
        dtype = _KIND_NAMES[kinds[name]]
        fields[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    return fields, contents


def _hashes_of(header: bytes, contents: Iterable[memoryview]) -> dict[str, str]:
    whole, legacy, end = hashlib.sha256(), hashlib.sha256(header[0x100000:0x110000]), len(header)
    for content in contents:
        whole.update(content)
        legacy.update(content[max(0, 0x100000 - end) : max(0, 0x110000 - end)])
        end += content.nbytes
    return {"sshs_model_hash": whole.hexdigest(), "sshs_legacy_hash": legacy.hexdigest()[:8]}


def write_safetensors(tensors: Mapping[str, Tensor], path: str | os.PathLike, metadata: Mapping[str, str]) -> None:
    """Writes a file whole or not at all: what was there stays if anything fails on the way.

    :raises DeftError: for non-finite values, a full disk, or a folder that cannot be written to
    """
    _check_finite(tensors, path)
    # not save_file, whose files only their owner may read (safetensors 0.8)
    content = save(dict(tensors), dict(metadata))
    start = 8 + int.from_bytes(content[:8], "little")
    if start - 8 < deft_pictures.HEADER_LIMIT:
        write_whole(Path(path), content)
        return
    fields = json.loads(content[8:start])
    fields.pop("__metadata__", None)
    write_whole(Path(path), [fitted_header(fields, metadata, path), memoryview(content)[start:]])


def _check_finite(tensors: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    for name, tensor in tensors.items():
        if not deft_factors.is_finite(tensor):
            raise DeftError(
                f"{path}: not saved, since {name} is not finite in {tensor.dtype}; what was there is untouched"
            )


def write_whole(path: Path, content: bytes | Iterable[bytes | memoryview]) -> None:
    """A file, or what was there.

    :param content: the whole, or its parts in order
    :raises DeftError: for a full disk, or a folder that cannot be written to
    """
    partial: Path | None = None
    try:
        partial = deft_partial.partial_of(path)
        with open(partial, "wb") as file:
            for part in [content] if isinstance(content, bytes) else content:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise DeftError(f"{path}: could not be saved, what was there is untouched ({reason_of(error)})") from None
    finally:
        if partial is not None:
            deft_partial.remove(partial)
