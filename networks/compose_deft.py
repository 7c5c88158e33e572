"""Puts several concepts' LoRAs into one file, so that they disturb each other least.

    python networks/compose_deft.py --models cat.safetensors dog.safetensors --save_to both.safetensors --mode projected

Adapters of any format that is known here, and of different ranks. The modes:

  sum        W + d1 + d2, exactly, whatever the ranks (no adding of factors, which gives cross terms)
  sequence   W1 = W + d1(W), then W2 = W1 + d2(W1), exactly: for files of removal=1 in save_format=deft, whose change
             depends on the weight below it (--base). For plain LoRAs, and DEFT's default form, it is the sum
  projected  the sum, with each concept's input directions kept free of those before it in the order of --models:
             down_i (I - V V^T). Where an input is what an earlier concept answers to, later ones add nothing

What the concepts have in common is printed: the angles between their subspaces on both sides, and how much of each lies
in inputs that another answers to (in projected: what was cut).
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a file: its folder is on the path, not the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from networks import deft_checkpoint, deft_factors, deft_io, deft_sum, deft_tools
from networks.deft_blocks import block_of
from networks.deft_config import DeftError, naming, reason_of
from networks.deft_factors import Decomposed, Factors
from networks.deft_formats import Change, Dense, OnBase
from networks.deft_progress import progress
from networks.deft_sum import Part

MODES = ("sum", "sequence", "projected")
MOST_ROWS = 24  # of the table: where blocks are more, they are put together by kind

Weight = Callable[[str], Tensor]  # a layer's key name -> the base model's weight (m, in[, kh, kw]), float32


@dataclass(frozen=True)
class Common:
    """What the concepts of one layer have in common.

    :param pairs: of each two concepts that change the layer: the smallest angle in degrees, and the mean squared cosine
        of all, of their output directions and of their input directions
    :param shared: of each concept, the squared norm of what it answers to inputs of others (in `projected`: of those
        before it, which is cut)
    :param square: of each concept, its squared norm
    :param chance: the mean squared cosines that random subspaces of these sizes would have
    """

    pairs: list[tuple[float, float, float, float]]
    shared: list[float]
    square: list[float]
    chance: list[tuple[float, float]]


@dataclass(frozen=True)
class Options:
    """:param symmetric: whether concepts are kept free of all others', not of those before them alone"""

    mode: str
    symmetric: bool = False


# --- one layer -------------------------------------------------------------------------------------------------------


def union(directions: Sequence[Tensor], n: int) -> Tensor:
    """Orthonormal (n, k), the span of several orthonormal (n, k_i), which may overlap."""
    if len(directions) == 1:
        return directions[0]
    Q, T = torch.linalg.qr(torch.cat([torch.zeros(n, 0, dtype=torch.float64), *directions], 1))
    U, S, _ = torch.linalg.svd(T, full_matrices=False)
    return Q @ U[:, S > 1e-6]


def projected(parts: Sequence[Factors], directions: Sequence[Tensor], symmetric: bool = False) -> list[Factors]:
    """Each part without what it adds to the inputs of those before it, or of all others.

    :param directions: of each part, its input directions (n, k_i), orthonormal
    """
    freed = []
    for i, part in enumerate(parts):
        others = [U for j, U in enumerate(directions) if j < i or (symmetric and j != i)]
        freed.append(deft_factors.outside(part, union(others, part.down.shape[1])))
    return freed


def in_common(decomposed: Sequence[Decomposed | None], options: Options) -> Common:
    """Of the parts of one layer; None where a concept has none."""
    pairs, chance = [], []
    found = [d for d in decomposed if d is not None and d.values.any()]
    ranks = [deft_factors.rank_of_energy(d.values, 1.0) for d in found]
    for i, (one, j) in enumerate(zip(found, ranks, strict=True)):
        for other, k in list(zip(found, ranks, strict=True))[i + 1 :]:
            outputs = deft_factors.cosines(one.left[:, :j], other.left[:, :k])
            inputs = deft_factors.cosines(one.right[:j].mT, other.right[:k].mT)
            pairs.append((_angle(outputs), _square(outputs), _angle(inputs), _square(inputs)))
            chance.append((max(j, k) / len(one.left), max(j, k) / one.right.shape[1]))
    shared, square = [], []
    for i, mine in enumerate(decomposed):
        others = [
            d.leading_inputs(1.0)
            for j, d in enumerate(decomposed)
            if d is not None and j != i and (j < i or options.mode != "projected" or options.symmetric)
        ]
        rows = torch.zeros(1, 1) if mine is None else mine.values[:, None] * mine.right
        square.append(float(rows.square().sum()))
        inside = 0.0 if mine is None else float((rows @ union(others, rows.shape[1]).to(rows)).square().sum())
        shared.append(inside)
    return Common(pairs, shared, square, chance)


def _angle(cosines: Tensor) -> float:
    return math.degrees(math.acos(float(cosines[0])))


def _square(cosines: Tensor) -> float:
    return float(cosines.square().mean())


def factors_of(change: Change, source: str, weight: Tensor | None) -> Factors:
    """A change in two factors, float64, exactly.

    :param source: how errors begin
    :param weight: W (m, n), float32; None where no base model is given
    :raises DeftError: when it depends on the base model and there is none, or one of another shape
    """
    if isinstance(change, Factors):
        return change.double()
    if isinstance(change, Dense):
        return deft_factors.approximated(change.delta().double(), change.shape[1:], None, 1.0)[0]
    if weight is None:
        raise DeftError(f"{source} is {change.kind}, which depends on the weight below it; give --base MODEL")
    try:
        delta = change.delta(weight)
    except (RuntimeError, ValueError) as error:
        raise DeftError(f"{source} does not fit the weight of --base ({reason_of(error)})") from None
    return deft_factors.approximated(delta.double(), change.shape[1:], None, 1.0)[0]


def composed(
    changes: Sequence[tuple[str, Change, float] | None], weight: Tensor | None, options: Options
) -> tuple[Factors, Common]:
    """One layer of the file, float64, and what its concepts have in common.

    :param changes: of each concept: how errors begin, the change, its strength; None where it has none
    :param weight: the base model's, where some change depends on it
    """
    kernel = _kernel([change for _, change, _ in filter(None, changes)], weight)
    W = None if weight is None else weight.flatten(1)
    parts: list[Factors | None] = []
    for found in changes:
        if found is None:
            parts.append(None)
            continue
        source, change, strength = found
        before = [part for part in parts if part is not None]
        below = W
        if W is not None and before and options.mode == "sequence":
            below = W + deft_factors.concatenated(before).delta().float()
        part = factors_of(change, source, below)
        parts.append(replace(part.scaled(strength), kernel=kernel))
    decomposed = [None if part is None else deft_factors.decomposed(part) for part in parts]
    common = in_common(decomposed, options)
    there = [part for part in parts if part is not None]
    if options.mode == "projected":
        directions = [d.leading_inputs(1.0) for d in decomposed if d is not None]
        there = projected(there, directions, options.symmetric)
    return deft_factors.concatenated(there), common


def _kernel(changes: Sequence[Change], weight: Tensor | None) -> tuple[int, ...]:
    """Of a weight: some files have a convolution's as a matrix."""
    if weight is not None:
        return tuple(weight.shape[1:])
    return max((tuple(change.shape[1:]) for change in changes), key=len)


# --- whole files -----------------------------------------------------------------------------------------------------


def compose(
    parts: Sequence[Part], options: Options, weight: Weight | None = None
) -> tuple[dict[str, Factors], dict[str, Common]]:
    """The layers of one file, float32, and what the concepts have in common in each.

    :param weight: of the base model, where some change depends on it
    :raises DeftError: when a change depends on the base model and there is none
    """
    strengths = [part.strengths() for part in parts]
    names = list(dict.fromkeys(name for many in strengths for name in many))
    if not names:
        raise DeftError("--ratios leave no layer of the adapters with a strength but 0")
    layers, common = {}, {}
    for name in progress(names, "composing", "layers"):
        found = [
            (f"{part.adapter.source}: {name}", part.adapter.changes[name], many[name]) if name in many else None
            for part, many in zip(parts, strengths, strict=True)
        ]
        _check_shapes(name, [(part, part.adapter.changes[name]) for part in parts if name in part.adapter.changes])
        needed = weight is not None and any(f is not None and isinstance(f[1], OnBase) for f in found)
        with naming(name):
            whole, common[name] = composed(found, weight(name) if needed and weight else None, options)
        layers[name] = replace(whole, up=whole.up.float(), down=whole.down.float())
    return layers, common


def _check_shapes(name: str, changes: Sequence[tuple[Part, Change]]) -> None:
    """:raises DeftError: when they are of different weights"""
    (first, one), *others = changes
    for part, other in others:
        if not deft_sum.same_weight(one.shape, other.shape):
            raise DeftError(
                f"{name} has the shape {one.shape} in {first.adapter.source} and {other.shape} in "
                f"{part.adapter.source}: give adapters for one model"
            )


def truncated(layers: Mapping[str, Factors], rank: int) -> tuple[dict[str, Factors], float, float]:
    """Each layer's best approximation of a rank; the relative error of all together, and the largest."""
    cut, lost, whole, largest = {}, 0.0, 0.0, 0.0
    for name, factors in progress(list(layers.items()), "to the new rank", "layers"):
        exact = deft_factors.decomposed(factors.double())
        small, error = exact.truncated(rank)
        cut[name] = replace(small, up=small.up.float(), down=small.down.float())
        square = float(exact.values.square().sum())
        lost, whole, largest = lost + error**2 * square, whole + square, max(largest, error)
    return cut, math.sqrt(lost / whole) if whole else 0.0, largest


# --- the report ------------------------------------------------------------------------------------------------------


def name_of(part: Part) -> str:
    """A concept's, for tables: the file's."""
    return Path(part.adapter.source).stem


def table(parts: Sequence[Part], common: Mapping[str, Common], options: Options) -> Iterator[str]:
    """The lines of the report: a row a block, and all of them."""
    blocks: dict[str, list[Common]] = {}
    for name, layer in common.items():
        blocks.setdefault(block_of(name) or "other", []).append(layer)
    if len(blocks) > MOST_ROWS:
        kinds: dict[str, list[Common]] = {}
        for block, rows in blocks.items():
            kinds.setdefault(block.rstrip("0123456789"), []).extend(rows)
        blocks = kinds
    width = max(map(len, [*blocks, "by chance"]))
    names = [name_of(part)[:12] for part in parts]
    cut = "cut" if options.mode == "projected" else "in inputs of others"
    yield f"{'':{width}}   smallest angle        overlap       {cut}"
    columns = "  ".join(f"{name:>{max(7, len(name))}}" for name in names)
    yield f"{'':{width}}  outputs  inputs  outputs  inputs   {columns}"
    for block, rows in [*sorted(blocks.items()), ("all", list(common.values()))]:
        pairs = [pair for row in rows for pair in row.pairs]
        angles = [sum(values) / len(pairs) for values in zip(*pairs, strict=True)] if pairs else [math.nan] * 4
        shares = [
            sum(row.shared[i] for row in rows) / max(sum(row.square[i] for row in rows), 1e-300)
            for i in range(len(parts))
        ]
        told = "  ".join(f"{share:>{max(7, len(name))}.1%}" for share, name in zip(shares, names, strict=True))
        degrees = f"{angles[0]:6.0f}°  {angles[2]:5.0f}°" if pairs else f"{'-':>7}  {'-':>6}"
        overlaps = f"{angles[1]:7.3f}  {angles[3]:6.3f}" if pairs else f"{'-':>7}  {'-':>6}"
        yield f"{block:{width}}  {degrees}  {overlaps}   {told}"
    chances = [pair for row in common.values() for pair in row.chance]
    if chances:
        outputs, inputs = (sum(values) / len(chances) for values in zip(*chances, strict=True))
        yield f"{'by chance':{width}}  {'':7}  {'':6}  {outputs:7.3f}  {inputs:6.3f}"


# --- the command -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(base: str | None) -> Iterator[Weight | None]:
    """The weights of a base model.

    :raises DeftError: for a layer that it does not have
    """
    if base is None:
        yield None
        return
    with deft_checkpoint.open_checkpoint(base) as checkpoint:

        def weight(name: str) -> Tensor:
            try:
                return checkpoint.weight(name)
            except KeyError:
                raise DeftError(f"--base {base}: has no {name}; the adapters are made for another model") from None

        yield weight


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = deft_tools.parser(__doc__)
    add = parser.add_argument
    add("--models", nargs="+", required=True, metavar="FILE", help="adapters; in projected, the first stay as they are")
    add("--ratios", nargs="+", type=float, default=[], metavar="X", help="how much each counts, also below 0 (1)")
    add("--save_to", required=True, metavar="FILE", help="what is written")
    add("--mode", choices=MODES, default="sum", help="how they are put together (sum)")
    add("--symmetric", action="store_true", help="projected: each free of all others', not of those before it alone")
    add("--new_rank", type=int, metavar="N", help="cut what is written to this rank, with the least error")
    add("--save_precision", choices=deft_tools.PRECISIONS, help="dtype of what is written (the first adapter's)")
    add("--base", metavar="MODEL", help="the base model, where changes depend on the weight below them")
    given = parser.parse_args(argv)
    options = Options(given.mode, given.symmetric)
    sizes = given.new_rank, given.save_precision
    return deft_tools.run(lambda: work(given.models, given.ratios, given.save_to, options, *sizes, given.base))


def work(
    models: Sequence[str],
    ratios: Sequence[float],
    save_to: str,
    options: Options,
    new_rank: int | None,
    precision: str | None,
    base: str | None,
) -> None:
    """The tool's work.

    :raises DeftError: for what does not go together, files that cannot be read, and a base model that is missing
    """
    output = deft_tools.output_path("--save_to", save_to, [*models, *filter(None, [base])])
    if len(models) < 2:
        raise DeftError(f"--models {models[0]}: give two or more")
    if options.mode != "projected" and options.symmetric:
        raise DeftError("--symmetric is for --mode projected")
    if new_rank is not None and new_rank < 1:
        raise DeftError(f"--new_rank {new_rank}: give at least 1")
    parts = deft_sum.read_parts(models, ratios, [], [])
    deft_sum.say_what_is_left(parts)
    with opened(base) as weight:
        layers, common = compose(parts, options, weight)
    for line in table(parts, common, options):
        print(line)
    if options.mode == "sequence" and base is None:  # without which a change that needs it is refused
        print("no change depends on the weight below it: in sequence is the same as the sum")
    done: dict[str, object] = {
        "mode": options.mode,
        "models": [Path(model).name for model in models],
        "ratios": [part.strength.denoiser for part in parts],
    }
    if options.mode == "projected":
        done["symmetric"] = options.symmetric
    if new_rank is not None:
        layers, error, largest = truncated(layers, new_rank)
        print(f"to rank {new_rank}: relative error {error:.2g}, of a layer {largest:.2g} at most")
        done |= {"new_rank": new_rank, "error": float(f"{error:.3g}")}
    save(output, parts, layers, done, deft_tools.saved_dtype(precision, parts[0].adapter.dtype))


def save(
    output: Path,
    parts: Sequence[Part],
    layers: Mapping[str, Factors],
    done: Mapping[str, object],
    dtype: torch.dtype,
) -> None:
    """Writes a plain LoRA.

    :param done: what the metadata says of how it was made
    :raises DeftError: when it cannot be written
    """
    tensors, _ = deft_io.lora_tensors(layers, dtype, pad=True)
    rank = max(factors.rank for factors in layers.values())
    metadata = deft_sum.sum_metadata(parts, output, rank, done, "compose_deft")
    deft_tools.write_adapter(output, tensors, metadata)
    size = sum(tensor.nbytes for tensor in tensors.values()) / 2**20
    print(f"{output}: {len(layers)} layers, rank {rank}, {str(dtype).removeprefix('torch.')}, {size:.1f} MiB")


if __name__ == "__main__":
    raise SystemExit(main())
