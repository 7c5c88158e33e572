"""An adapter file in another form: its changes as factors, a form's tensors of them, and what is told of both."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from networks import (
    deft_factors,
    deft_formats,
    deft_io,
    deft_math,
    deft_names,
    deft_partial,
    deft_rebase,
    deft_repair,
    deft_tools,
)
from networks.deft_checkpoint import Checkpoint, open_checkpoint
from networks.deft_config import DeftError, naming, reason_of
from networks.deft_factors import Factors
from networks.deft_formats import Adapter, Dense, OnBase
from networks.deft_io import DeftLayer
from networks.deft_progress import progress

FORMATS = ("kohya", "diffusers", "comfy", "peft", "deft")
EXACT = 1e-5  # a relative error that is rounding in float32


@dataclass(frozen=True)
class Made:
    """A file to be written, and what to say of how it came about, a line each."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    told: Sequence[str]


@dataclass(frozen=True)
class Limit:
    """How what is not exact becomes factors, and on which base."""

    rank: int | None = None
    energy: float | None = None
    base: str | None = None
    removal: float | None = None
    injection: float | None = None


@dataclass
class _Read:
    """A file's changes as factors.

    :param told: what to say of it, a line each
    :param errors: relative error of each layer that is not exact
    :param done: for the new file's history
    """

    changes: dict[str, Factors]
    metadata: Mapping[str, str]
    format: str
    architecture: str
    dtype: torch.dtype
    told: list[str]
    errors: dict[str, float] = field(default_factory=dict)
    done: dict[str, object] = field(default_factory=dict)


def converted(file: Path, to: str, dtype: torch.dtype | None, limit: Limit, verbose: bool) -> Made:
    """A file in another form.

    :param dtype: None for the file's own
    :raises DeftError: for a file that cannot be read, or not be converted without more options
    """
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(open_checkpoint(limit.base)) if limit.base else None
        read = _read_deft(file, base, limit) or _read_any(file, base, limit)
    dtype = dtype or deft_tools.saved_dtype(None, read.dtype)
    read.told += _told_of_errors(read.errors, verbose)
    done = {"from": read.format, "to": to, **read.done} | ({"errors": read.errors} if read.errors else {})
    named, lines = deft_repair.base_named(read.metadata, read.architecture, read.changes)
    read.told += lines if to not in ("kohya", "deft") else []
    metadata = deft_tools.carried(named if to not in ("kohya", "deft") else read.metadata, "convert", done)
    tensors, metadata = _tensors(to, read, dtype, metadata)
    read.told.append(_read_back(read.changes, tensors, metadata, dtype if to != "deft" else torch.float32))
    ranks = sorted({change.rank for change in read.changes.values()})
    rank = f"rank {ranks[-1]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    what = f"{read.format}, {read.architecture or 'of an unknown model'}, {len(read.changes)} layers, {rank}"
    return Made(tensors, metadata, [f"{file}: {what}", *read.told])


def _read_any(file: Path, base: Checkpoint | None, limit: Limit) -> _Read:
    adapter = deft_formats.read(file)
    _refuse_removal(limit, f"{file} is")
    told = deft_tools.left_told(adapter.left)
    read = _Read({}, adapter.metadata, adapter.format, adapter.architecture, adapter.dtype, told)
    _fill(read, adapter, limit, base)
    if base is not None and not any(isinstance(adapter.changes[name], OnBase) for name in adapter.changes):
        read.told.append(f"--base {base.source}: made no difference; what this file changes is the same on every model")
    _scale(read, limit)
    return read


def _fill(read: _Read, adapter: Adapter, limit: Limit, base: Checkpoint | None) -> None:
    for name in progress(list(adapter.changes), "converting"):
        change = adapter.changes[name]
        if isinstance(change, Factors):
            read.changes[name] = change
        else:
            read.changes[name], read.errors[name] = _as_factors(adapter, name, change, limit, base)


def _as_factors(
    adapter: Adapter, name: str, change: Dense | OnBase, limit: Limit, base: Checkpoint | None
) -> tuple[Factors, float]:
    """:raises DeftError: when the base is needed, or a rank"""
    where = f"{adapter.source}: {name} is of the kind {change.kind}"
    if isinstance(change, OnBase) and base is None:
        raise DeftError(f"{where}, whose change depends on the base model's weight; give it with --base MODEL")
    names = (change.together if isinstance(change, OnBase) else ()) or (name,)
    weight = _weight_of(base, names) if base is not None else None
    with naming(where):
        if limit.rank is None and limit.energy is None:
            rank = min(64, change.shape[0] or 64)
            error = deft_formats.to_factors(change, rank, None, weight)[1]
            raise DeftError(
                f"{where}, no product of two small matrices; say how much to keep: --rank N ({rank} leaves a relative "
                f"error of {error:.1e} in this layer), or --energy E"
            )
        return deft_formats.to_factors(change, limit.rank, limit.energy, weight)


def _weight_of(base: Checkpoint, names: Sequence[str]) -> Callable[[], Tensor]:
    """Reads a layer's weight (m, in[, kh, kw]) when it is needed, or those of several, stacked.

    :raises DeftError: then, if the base has no such layer
    """

    def weight() -> Tensor:
        for name in names:
            if name not in base.layers.keys() | base.further.keys():
                raise DeftError(f"--base {base.source}: it has no layer {name}, which the file changes")
        return torch.cat([base.weight(name) for name in names])

    return weight


def _refuse_removal(limit: Limit, what: str) -> None:
    """:raises DeftError: when a file that removes nothing should do so at another strength"""
    if limit.removal is not None:
        raise DeftError(
            f"--removal {limit.removal:g}: {what} no DEFT of removal=1, and takes nothing out that could be weaker or "
            f"stronger; leave it away (--injection scales the whole)"
        )


def _scale(read: _Read, limit: Limit) -> None:
    if limit.injection is not None:
        read.changes = {name: change.scaled(limit.injection) for name, change in read.changes.items()}
        read.done["injection"] = limit.injection
        read.told.append(f"injection {limit.injection:g}: every change times that")


def _read_deft(file: Path, base: Checkpoint | None, limit: Limit) -> _Read | None:
    """A file of the formula's own matrices; None for any other."""
    if file.is_dir() or file.suffix.lower() != ".safetensors":
        return None
    tensors, metadata = deft_io.read_tensors(file)
    if not any(key.endswith(".deft_E0") for key in tensors):
        return None
    adapter = deft_io.parse_adapter(tensors, metadata, str(file))
    read = _Read({}, metadata, "deft", "", torch.float32, [])
    if not deft_rebase.depends_on_base(adapter):
        _refuse_removal(limit, f"{file} is")
        whole = deft_formats.parse(tensors, metadata, str(file))
        read.architecture = whole.architecture
        _fill(read, whole, limit, None)
        read.told.append(f"{file}: removal=0, it changes every base in the same way, so no base is needed")
        _scale(read, limit)
        return read
    if base is None:
        raise DeftError(
            f"{file}: of removal=1, so what it changes depends on the base model; give it with --base MODEL"
        )
    removal, injection = (1.0 if given is None else given for given in (limit.removal, limit.injection))
    read.done |= {"base": base.source.name, "removal": removal, "injection": injection}
    same = deft_rebase.trained_on(adapter, metadata, base)
    read.told.append(
        f"{base.source}: "
        + {
            True: "the model that it was trained on",
            False: "another model than the one that it was trained on",
            None: "whether it was trained on this model, the file does not say",
        }[same]
    )
    read.told.append(f"removal {removal:g}, injection {injection:g}: a plain LoRA for this model alone")
    read.changes = deft_rebase.rebased(adapter, base, removal, injection)
    of_training = (deft_io.BASE_HASH_KEY, deft_io.BASE_DTYPE_KEY)
    read.metadata = {key: value for key, value in metadata.items() if key not in of_training}
    read.architecture = base.architecture
    return read


def _told_of_errors(errors: Mapping[str, float], verbose: bool) -> list[str]:
    """The largest error and where it is; all of them if asked for."""
    if not errors:
        return []
    lines = [f"{name}: relative error {error:.2e}" for name, error in errors.items() if verbose]
    worst = max(errors, key=errors.__getitem__)
    if errors[worst] < EXACT:
        return [*lines, f"{len(errors)} layers made into products of two matrices, exactly"]
    squares = math.sqrt(sum(error**2 for error in errors.values()) / len(errors))
    return [
        *lines,
        f"{len(errors)} layers are not exact: relative error {errors[worst]:.2e} at most, in {worst}; {squares:.2e} in "
        f"the root of their mean square (--verbose tells each; a higher --rank or --energy makes it less)",
    ]


def repaired(file: Path, dtype: torch.dtype | None) -> Made:
    """The file that every client reads right.

    :raises DeftError: for values that are not finite, and for other adapters than LoRA
    """
    tensors, metadata = ({}, {}) if file.is_dir() else deft_io.read_tensors(file)
    deft_repair.refuse_non_finite(tensors, str(file))
    adapter = deft_formats.parse(tensors, metadata, str(file)) if tensors else deft_formats.read(file)
    found = deft_repair.repaired(adapter, tensors)
    metadata = deft_tools.carried(found.metadata, "convert", {"repaired": list(found.done)})
    read = _Read(found.changes, metadata, adapter.format, adapter.architecture, adapter.dtype, [])
    dtype = dtype or deft_tools.saved_dtype(None, adapter.dtype)
    made, metadata = _tensors("kohya", read, dtype, metadata)
    told = [f"  {line}" for line in found.done] or ["  nothing to mend"]
    back = _read_back(read.changes, made, metadata, dtype)
    return Made(made, metadata, [f"{file}: {adapter.format}, {len(found.changes)} layers", *told, back])


def _tensors(
    to: str, read: _Read, dtype: torch.dtype, metadata: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors, and its metadata with what has to fit them."""
    metadata = dict(metadata)
    recorded = _recorded(metadata.pop(deft_io.LAYERS_KEY, "{}"))
    rank = max(change.rank for change in read.changes.values())
    for key in ("ss_network_dim", "ss_network_alpha"):
        if key in metadata:
            metadata[key] = str(rank)
    if to == "deft":
        layers = {}
        for name, change in read.changes.items():
            with naming(name):
                layers[name] = _as_deft(change)
        about = {name: [layer.trained_rank, layer.scale, 0] for name, layer in layers.items()}
        options = json.dumps({"basis": "qr", "save_format": "deft"})
        new = {deft_io.VERSION_KEY: deft_io.VERSION, deft_io.OPTIONS_KEY: options}
        return deft_io.deft_tensors(layers), metadata | new | {deft_io.LAYERS_KEY: json.dumps(about)}
    if to == "kohya":
        tensors, exponents = deft_io.lora_tensors(read.changes, dtype, True)
        kept = {name: [*recorded[name][:2], exponents[name]] for name in exponents.keys() & recorded.keys()}
        return tensors, metadata | ({deft_io.LAYERS_KEY: json.dumps(kept)} if kept else {})
    row = deft_names.named(read.architecture)
    alone = to == "peft" and row is not None and row.peft_form != "diffusers"  # one model, for programs of the original
    try:  # peft's paths are Diffusers' elsewhere
        form = "diffusers" if to == "peft" and not alone else to
        tensors = deft_formats.tensors_as(form, read.changes, dtype, True, read.architecture)
    except (KeyError, ValueError) as error:
        raise DeftError(f"--to {to}: not possible for this file ({error})") from None
    if to == "peft" and not alone and read.architecture != "Stable Diffusion 3" and transformers_version() >= 5:
        old = "text_encoder.text_model."  # of a CLIPTextModel; those with a projection have kept it
        if any(key.startswith(old) for key in tensors):
            tensors = {re.sub(f"^{re.escape(old)}", "text_encoder.", key): t for key, t in tensors.items()}
            read.told.append(
                "text_encoder: modules as transformers 5 calls them; transformers 4 has text_model. before"
            )
    return tensors, metadata


def transformers_version() -> int:
    """The first number of the one that is installed here, which peft's files have to go with; 5 if there is none."""
    try:
        return int(importlib.metadata.version("transformers").partition(".")[0])
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return 5


def _read_back(
    changes: Mapping[str, Factors], tensors: Mapping[str, Tensor], metadata: Mapping[str, str], dtype: torch.dtype
) -> str:
    """What the new tensors are when they are read again, compared by their answers to eight random inputs a layer.

    :returns: the largest relative difference, in words
    :raises DeftError: when they are something else
    """
    _check_fits(tensors, dtype)
    again = deft_formats.parse(tensors, metadata, "what would be written").changes
    generator = torch.Generator().manual_seed(0)
    errors = dict.fromkeys(changes.keys() ^ again.keys(), 1.0)
    for name, change in progress(list(changes.items()), "comparing"):
        found = again.get(name)
        if isinstance(found, Factors) and change.up.any():
            x = torch.randn(change.down.shape[1], 8, generator=generator, dtype=torch.float64)
            before, after = (f.up.double() @ (f.down.double() @ x) for f in (change, found))
            errors[name] = float(((after - before).norm() / before.norm().clamp(min=1e-300)).nan_to_num(torch.inf))
    worst = max(errors, key=errors.__getitem__, default="")
    if errors.get(worst, 0.0) > (1e-3 if dtype == torch.float32 else 0.5):
        if worst in changes and not _multiplies(changes[worst]):
            raise DeftError(f"not written: the change of {worst}, up @ down, is too large for float32")
        raise DeftError(f"not written: {worst} would be another change than in the input; please report this file")
    kind, error = str(dtype).removeprefix("torch."), errors.get(worst, 0.0)
    what = f"the same up to {error:.1e} of it" if error else "exactly the same"
    return f"read back: every layer's change is {what}, in {kind}"


def _check_fits(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """:raises DeftError: for values that are infinite in the dtype of what is written; the input's are finite"""
    for key, tensor in tensors.items():
        if not deft_factors.is_finite(tensor):
            name = str(dtype).removeprefix("torch.")
            raise DeftError(f"not written: {key} is too large for {name}; give --save_precision float or bf16")


def _multiplies(change: Factors) -> bool:
    """Whether float32 has the product of a layer's matrices."""
    return bool((change.up.double() @ change.down.double()).abs().max() < torch.finfo(torch.float32).max)


def _recorded(text: str) -> dict[str, list[float]]:
    try:
        return {name: list(values) for name, values in dict(json.loads(text)).items()}
    except (TypeError, ValueError, RecursionError):
        return {}


def _as_deft(change: Factors) -> DeftLayer:
    """A change as a DEFT that takes nothing out, exactly: E0 = E."""
    m, n = change.up.shape[0], change.down.shape[1]
    if change.rank > min(m, n):
        change = deft_factors.truncated(change, min(m, n))[0]
    P, R = deft_math.from_lora(change.up, change.down, change.rank, 1.0, "qr")
    return DeftLayer("qr", P, R, deft_math.left_and_eraser(P, "qr")[1], 1.0, None)


# --- writing ----------------------------------------------------------------------------------------------------------


def write(output: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], to: str | None) -> None:
    if to == "peft":
        _write_peft(output, tensors, metadata)
        return
    if to == "kohya":
        deft_io.write_hashed(
            deft_names.as_musubi(tensors, deft_names.said_or_seen(metadata, tensors)), output, metadata
        )
    else:
        deft_tools.write_adapter(output, tensors, metadata)
    size = output.stat().st_size / 2**20
    print(f"{output}: {to or 'kohya'}, {size:.1f} MiB, {_dtype_of(tensors)}")


def _dtype_of(tensors: Mapping[str, Tensor]) -> str:
    return str(next(iter(tensors.values())).dtype).removeprefix("torch.")


def _write_peft(output: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A folder of folders, one for each model, as peft's `PeftModel.from_pretrained` takes them; whole or not at all.

    :param tensors: in Diffusers' form: MODEL.PATH.lora_A.weight; in peft's own, of one model, which needs no folder
    """
    models: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        model, _, rest = key.partition(".")
        if model == "base_model":
            models.setdefault("", {})[key] = tensor
        else:
            models.setdefault(model, {})[f"base_model.model.{rest}"] = tensor
    partial: Path | None = None
    try:
        partial = deft_partial.partial_of(output)
        for model, found in models.items():
            deft_io.write_safetensors(
                found, partial / model / "adapter_model.safetensors", {"format": "pt", **metadata}
            )
            config = json.dumps(deft_formats.peft_config(found), indent=2, sort_keys=True)
            deft_io.write_whole(partial / model / "adapter_config.json", config.encode())
        if output.exists():
            output.rmdir()  # empty: `_output` has seen to it
        partial.replace(output)
    except DeftError as error:  # of a file in it, which is not there any more
        raise DeftError(str(error).replace(str(partial), str(output))) from None
    except OSError as error:
        raise DeftError(f"{output}: could not be saved ({reason_of(error)})") from None
    finally:
        if partial is not None:
            deft_partial.remove(partial)
    print(f"{output}: peft, {' and '.join(sorted(models)) or 'the original model'}, {_dtype_of(tensors)}")
