"""What a network writes: a plain LoRA, or the formula's matrices, and what a file's metadata says of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from networks import deft_factors, deft_io, deft_math, deft_weights
from networks.deft_architectures import Architecture
from networks.deft_config import DeftConfig, DeftError
from networks.deft_factors import Factors
from networks.deft_io import DeftLayer
from networks.deft_module import DeftModule
from networks.deft_names import with_dots
from networks.deft_progress import progress
from networks.deft_targets import Target, weight_shape

logger = logging.getLogger(__name__)
Own = Sequence[tuple[Tensor, Tensor]]  # each module's up and down


def tensors_of(
    modules: Sequence[DeftModule],
    config: DeftConfig,
    architecture: Architecture,
    own: Own,
    file: str,
    dtype: torch.dtype,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors, and the metadata by which a network reads them again.

    :param own: `module.lora_factors()` of each
    :param file: its name, for what is told
    :param dtype: of a plain LoRA's tensors
    """
    exponents: Mapping[str, int] = {}
    if config.save_format == "deft":
        tensors = deft_io.deft_tensors({m.lora_name: _as_deft_layer(m) for m in modules})
    else:
        factors = file_factors(modules, own)
        for line in architecture.warnings(factors):
            logger.warning(f"{file}: {line}")
        tensors, exponents = deft_io.lora_tensors(factors, dtype, config.pad)
        if config.basis in deft_math.ORTHONORMAL:  # any scaling of up spans the same subspace
            exponents = {}
        tensors = with_dots(tensors, architecture.name)
        if config.pad:
            _log_padding(file, dtype, [(f.rank, f.up.shape[0] + f.down.shape[1]) for f in factors.values()])
    recorded: dict[str, list[float]] = {}
    for m in modules:
        of_files = [piece.file_name for piece in m.target.pieces]
        for name in [m.lora_name] if config.save_format == "deft" else of_files:
            before = recorded.get(name, [0])[0]
            recorded[name] = [before + m.rank, m.scale, exponents.get(name, 0)]
    return tensors, {
        deft_io.VERSION_KEY: deft_io.VERSION,
        deft_io.OPTIONS_KEY: config.to_json(),
        deft_io.LAYERS_KEY: json.dumps(recorded),
    }


def file_factors(modules: Sequence[DeftModule], own: Own) -> dict[str, Factors]:
    """Key name -> the change of the weight that files know, parts of one weight put together."""
    parts: dict[str, list[tuple[Factors, Target]]] = {}
    for module, (up, down) in zip(modules, own, strict=True):
        kernel, pieces = weight_shape(module.target.layer)[1:], module.target.pieces
        rows = [up] if len(pieces) == 1 else up.split([piece.shape[0] for piece in pieces])
        for piece, some in zip(pieces, rows, strict=True):
            parts.setdefault(piece.file_name, []).append((Factors(some, down, kernel), piece))
    return {name: _of_whole(pieces) for name, pieces in parts.items()}


def warn_of_nothing_learnt(file: str, dtype: torch.dtype, own: Own, of_base: Callable[[], Tensor]) -> None:
    """Where no weight of a model in `dtype` would change by it, or hardly one.

    :param of_base: each weight's Frobenius norm (modules,)
    """
    sizes = torch.stack([deft_factors.norm(up, down) for up, down in own])
    largest = float((sizes / of_base().to(sizes).clamp(min=1e-30)).max())
    if largest >= torch.finfo(dtype).eps / 8:
        return
    told = f"the largest delta is {largest:.0e} of its weight, below {dtype}'s rounding"
    logger.warning(
        f"{file}: nearly nothing has been learnt yet, {told if largest else 'every delta is 0'}. Where that stays "
        f"so: a rate of 0 or far too low, gradients that underflow in fp16 (use bf16), or a dropout of everything"
    )


def check_finite(tensors: Mapping[str, Tensor], file: str) -> None:
    """:raises DeftError: for a parameter that is not"""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise DeftError(f"{file}: not saved, since {name} has non-finite values; what was there is untouched")


def hash_of_base(modules: Sequence[DeftModule]) -> dict[str, str]:
    """The metadata that says what weights the adapter was trained on."""
    dtypes: set[str] = set()

    def weights() -> Iterator[tuple[str, Tensor]]:  # one at a time: quantised ones are made for it
        for module in progress(modules, "hashing the base weights"):
            weight = deft_weights.held_weight(module.target)
            dtypes.update(map(deft_weights.dtype_name, module.target.places))
            yield module.lora_name, weight

    fingerprint = deft_io.base_fingerprint(weights())
    return {deft_io.BASE_HASH_KEY: fingerprint, deft_io.BASE_DTYPE_KEY: ",".join(sorted(dtypes))}


def _log_padding(file: str, dtype: torch.dtype, sizes: Sequence[tuple[int, int]]) -> None:
    """:param sizes: each layer's rank, and its outputs and inputs together"""
    file_rank, true_size = max(rank for rank, _ in sizes), sum(rank * size for rank, size in sizes)
    padded_size = file_rank * sum(size for _, size in sizes)
    if padded_size > true_size:
        byte = dtype.itemsize / 2**20
        logger.info(
            f"{file}: {padded_size * byte:.1f} MiB, {true_size * byte:.1f} without padding every layer to rank "
            f"{file_rank}, which diffusers needs"
        )


def _of_whole(parts: Sequence[tuple[Factors, Target]]) -> Factors:
    """The change of a weight as files know it, of its parts' changes."""
    if len(parts) == 1 and parts[0][1].file_rows is None:
        return parts[0][0]
    places = [target.file_rows or (0, 0) for _, target in parts]
    total = max(number for _, number in places)
    placed = [(part, first) for (part, _), (first, _) in zip(parts, places, strict=True)]
    return deft_factors.stacked(placed, total)


def _as_deft_layer(module: DeftModule) -> DeftLayer:
    """As a file has it, where all of E - E0 is taken out: what `removal` leaves goes into E0."""
    removal, E, E0 = module.config.removal, module.left_and_eraser()[1], module.E0
    start = E if E0 is None else E0 if removal == 1 else E - removal * (E - E0)
    return DeftLayer(module.config.basis, module.effective_P, module.effective_R, start, module.scale, module.g)
