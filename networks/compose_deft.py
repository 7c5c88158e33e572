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
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from networks import deft_checkpoint, deft_factors, deft_formats, deft_io, deft_tools
from networks.deft_config import DeftError
from networks.deft_factors import Decomposed, Factors
from networks.deft_formats import Adapter, Change, OnBase
from networks.deft_progress import progress

MODES = ("sum", "sequence", "projected")
PRECISIONS = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MOST_ROWS = 24  # of the table: where blocks are more, they are put together by kind

Weight = Callable[[str], Tensor]  # a layer's key name -> the base model's weight (m, in[, kh, kw]), float32


@dataclass(frozen=True)
class Concept:
    """An adapter, and how strong it is."""

    adapter: Adapter
    ratio: float

    @property
    def name(self) -> str:
        """For tables: the file's."""
        return Path(self.adapter.source).stem


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
    """:param energy: share of a concept's squared norm whose input directions count as its own
    :param symmetric: whether concepts are kept free of all others', not of those before them alone
    """

    mode: str
    energy: float = 1.0
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


def in_common(parts: Sequence[Factors | None], decomposed: Sequence[Decomposed | None], options: Options) -> Common:
    """Of the parts of one layer; None where a concept has none."""
    pairs, chance = [], []
    found = [d for d in decomposed if d is not None and d.values.any()]
    ranks = [deft_factors.rank_of_energy(d.values, options.energy) for d in found]
    for i, (one, j) in enumerate(zip(found, ranks, strict=True)):
        for other, k in list(zip(found, ranks, strict=True))[i + 1 :]:
            outputs = deft_factors.cosines(one.left[:, :j], other.left[:, :k])
            inputs = deft_factors.cosines(one.right[:j].mT, other.right[:k].mT)
            pairs.append((_angle(outputs), _square(outputs), _angle(inputs), _square(inputs)))
            chance.append((max(j, k) / len(one.left), max(j, k) / one.right.shape[1]))
    shared, square = [], []
    for i, mine in enumerate(decomposed):
        others = [
            d.leading_inputs(options.energy)
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


def factors_of(change: Change, source: str, name: str, weight: Callable[[], Tensor] | None) -> Factors:
    """A change in two factors, float64, exactly.

    :param weight: W (m, n), float32; None where no base model is given
    :raises DeftError: when it depends on the base model and there is none
    """
    if isinstance(change, Factors):
        return change.double()
    if isinstance(change, OnBase):
        if weight is None:
            raise DeftError(f"{source}: {name} depends on the weight below it ({change.kind}); give --base MODEL")
        delta = change.delta(weight())
    else:
        delta = change.delta()
    return deft_factors.approximated(delta.double(), tuple(change.shape[1:]), None, 1.0)[0].double()


def composed(
    changes: Sequence[tuple[Concept, Change | None]], name: str, weight: Callable[[], Tensor] | None, options: Options
) -> tuple[Factors, Common]:
    """One layer of the file, float64, and what its concepts have in common.

    :param changes: of each concept; None where it has none
    :param weight: the base model's W (m, n), float32, if there is one
    """
    parts: list[Factors | None] = []
    for concept, change in changes:
        below = weight
        before = [part for part in parts if part is not None]
        if options.mode == "sequence" and weight is not None and before:
            changed = weight() + deft_factors.concatenated(before).delta().float()
            below = lambda W=changed: W  # noqa: E731
        part = None if change is None else factors_of(change, concept.adapter.source, name, below)
        parts.append(None if part is None else part.scaled(concept.ratio))
    decomposed = [None if part is None else deft_factors.decomposed(part) for part in parts]
    common = in_common(parts, decomposed, options)
    there = [part for part in parts if part is not None]
    if options.mode == "projected":
        directions = [d.leading_inputs(options.energy) for d in decomposed if d is not None]
        there = projected(there, directions, options.symmetric)
    return deft_factors.concatenated(there), common


# --- whole files -----------------------------------------------------------------------------------------------------


def read_concepts(models: Sequence[str], ratios: Sequence[float] | None) -> list[Concept]:
    """:raises DeftError: for files that cannot be read or are of different models, and ratios that are not as many"""
    if len(models) < 2:
        raise DeftError(f"--models {' '.join(models)}: give two or more")
    if ratios is not None and len(ratios) != len(models):
        raise DeftError(f"--ratios: {len(ratios)} numbers for {len(models)} files of --models; give as many")
    if not all(map(math.isfinite, ratios or ())):
        raise DeftError("--ratios: give finite numbers")
    concepts = [Concept(deft_formats.read(m), r) for m, r in zip(models, ratios or [1.0] * len(models), strict=True)]
    first = concepts[0].adapter
    for other in (concept.adapter for concept in concepts[1:]):
        if first.architecture and other.architecture and first.architecture != other.architecture:
            raise DeftError(
                f"--models: {first.source} is made for {first.architecture}, {other.source} for {other.architecture}"
            )
        for name in first.changes.keys() & other.changes.keys():
            one, two = (_without_ones(tuple(a.changes[name].shape)) for a in (first, other))
            if one != two:
                raise DeftError(f"--models: {name} is a change of {one} in {first.source}, of {two} in {other.source}")
    for concept in concepts:
        for key, reason in concept.adapter.left.items():
            print(f"{concept.adapter.source}: {key} is left out ({reason})")
    return concepts


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if shape[2:] == (1, 1) else shape


def compose(
    concepts: Sequence[Concept], options: Options, weight: Weight | None = None
) -> tuple[dict[str, Factors], dict[str, Common]]:
    """The layers of one file, float32, and what the concepts have in common in each.

    :param weight: of the base model, where some change depends on it
    :raises DeftError: when a change depends on the base model and there is none
    """
    names = list({name: None for concept in concepts for name in concept.adapter.changes})
    layers, common = {}, {}
    for name in progress(names, "composing"):
        changes = [(concept, concept.adapter.changes.get(name)) for concept in concepts]
        kernel = next(tuple(c.shape[1:]) for _, c in changes if c is not None)
        below = None if weight is None else _read_once(weight, name, changes)
        whole, common[name] = composed([(c, _of_kernel(f, kernel)) for c, f in changes], name, below, options)
        layers[name] = replace(whole, up=whole.up.float(), down=whole.down.float())
    return layers, common


def _of_kernel(change: Change | None, kernel: tuple[int, ...]) -> Change | None:
    """A change of a 1x1 convolution as of a matrix, or the other way round, as the first concept has it."""
    return replace(change, kernel=kernel) if isinstance(change, Factors) else change


def _read_once(
    weight: Weight, name: str, changes: Sequence[tuple[Concept, Change | None]]
) -> Callable[[], Tensor] | None:
    """W (m, n), where some change needs it."""
    if not any(isinstance(change, OnBase) for _, change in changes):
        return None
    W = weight(name).flatten(1)
    return lambda: W


def truncated(layers: Mapping[str, Factors], rank: int) -> tuple[dict[str, Factors], float, float]:
    """Each layer's best approximation of a rank; the relative error of all together, and the largest."""
    cut, lost, whole, largest = {}, 0.0, 0.0, 0.0
    for name, factors in progress(list(layers.items()), "to the new rank"):
        exact = deft_factors.decomposed(factors.double())
        small, error = exact.truncated(rank)
        cut[name] = replace(small, up=small.up.float(), down=small.down.float())
        square = float(exact.values.square().sum())
        lost, whole, largest = lost + error**2 * square, whole + square, max(largest, error)
    return cut, math.sqrt(lost / whole) if whole else 0.0, largest


# --- the report ------------------------------------------------------------------------------------------------------


def block_of(name: str) -> str:
    """The part of the model that a layer belongs to: "down_blocks_0", "mid_block", "double_blocks_3", "te1"."""
    half = re.match(r"lora_(te\d?|unet)_", name)
    if half is None or half[1] != "unet":
        return half[1] if half else "other"
    found = re.match(r"(?:[a-z]+_)*?[a-z]+_blocks?(?:_\d+)?(?=_)|[a-z]+(?:_[a-z]+)*_\d+", name[half.end() :])
    return found[0] if found else "other"


def table(concepts: Sequence[Concept], common: Mapping[str, Common], options: Options) -> Iterator[str]:
    """The lines of the report: a row a block, and all of them."""
    blocks: dict[str, list[Common]] = {}
    for name, layer in common.items():
        blocks.setdefault(block_of(name), []).append(layer)
    if len(blocks) > MOST_ROWS:
        kinds: dict[str, list[Common]] = {}
        for block, rows in blocks.items():
            kinds.setdefault(re.sub(r"_\d+$", "", block), []).extend(rows)
        blocks = kinds
    width = max(map(len, [*blocks, "by chance"]))
    names = [concept.name[:12] for concept in concepts]
    cut = "cut" if options.mode == "projected" else "in inputs of others"
    yield f"{'':{width}}   smallest angle        overlap       {cut}"
    columns = "  ".join(f"{name:>{max(7, len(name))}}" for name in names)
    yield f"{'':{width}}  outputs  inputs  outputs  inputs   {columns}"
    for block, rows in [*blocks.items(), ("all", list(common.values()))]:
        pairs = [pair for row in rows for pair in row.pairs]
        angles = [sum(values) / len(pairs) for values in zip(*pairs, strict=True)] if pairs else [math.nan] * 4
        shares = [
            sum(row.shared[i] for row in rows) / max(sum(row.square[i] for row in rows), 1e-300)
            for i in range(len(concepts))
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
    parser.add_argument("--models", nargs="+", required=True, metavar="FILE", help="adapters, the most important first")
    parser.add_argument("--ratios", nargs="+", type=float, metavar="NUMBER", help="strength of each; default 1")
    parser.add_argument("--save_to", required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--mode", choices=MODES, default="sum")
    parser.add_argument(
        "--energy", type=float, default=1.0, metavar="SHARE",
        help="of a concept's squared norm, whose leading input directions count as its own; default 1: all",
    )  # fmt: skip
    parser.add_argument("--symmetric", action="store_true", help="projected: free of all others', not of earlier ones'")
    parser.add_argument("--new_rank", type=int, metavar="RANK", help="cut the result to this rank, at least error")
    parser.add_argument("--save_precision", choices=list(PRECISIONS), help="default: the most precise of the files'")
    parser.add_argument("--base", metavar="MODEL", help="the base model, for files whose change depends on it")
    args = parser.parse_args(argv)

    def work() -> None:
        output = deft_tools.output_path("--save_to", args.save_to, [*args.models, *filter(None, [args.base])])
        if not 0 < args.energy <= 1:
            raise DeftError(f"--energy {args.energy:g}: give a share above 0 and up to 1")
        if args.new_rank is not None and args.new_rank < 1:
            raise DeftError(f"--new_rank {args.new_rank}: give at least 1")
        options = Options(args.mode, args.energy, args.symmetric)
        concepts = read_concepts(args.models, args.ratios)
        with opened(args.base) as weight:
            layers, common = compose(concepts, options, weight)
        save(output, concepts, layers, common, options, args.new_rank, args.save_precision)

    return deft_tools.run(work)


def save(
    output: Path,
    concepts: Sequence[Concept],
    layers: Mapping[str, Factors],
    common: Mapping[str, Common],
    options: Options,
    new_rank: int | None,
    precision: str | None,
) -> None:
    """Writes the file and prints the report.

    :raises DeftError: when it cannot be written
    """
    for line in table(concepts, common, options):
        print(line)
    dependent = any(isinstance(change, OnBase) for c in concepts for change in c.adapter.changes.values())
    if options.mode == "sequence" and not dependent:
        print("no change depends on the weight below it: in sequence is the same as the sum")
    done: dict[str, object] = {
        "mode": options.mode,
        "models": [Path(concept.adapter.source).name for concept in concepts],
        "ratios": [concept.ratio for concept in concepts],
    }
    if options.mode == "projected":
        done |= {"energy": options.energy, "symmetric": options.symmetric}
    if new_rank is not None:
        layers, error, largest = truncated(layers, new_rank)
        print(f"to rank {new_rank}: relative error {error:.2e}, largest of a layer {largest:.2e}")
        done |= {"new_rank": new_rank, "error": error}
    dtype = PRECISIONS[precision] if precision else _widest([concept.adapter.dtype for concept in concepts])
    tensors, _ = deft_io.lora_tensors(layers, dtype, pad=True)
    rank = max(factors.rank for factors in layers.values())
    own = {deft_io.OPTIONS_KEY, deft_io.LAYERS_KEY, deft_io.BASE_HASH_KEY, deft_io.BASE_DTYPE_KEY}
    metadata = {key: value for key, value in concepts[0].adapter.metadata.items() if key not in own}
    metadata |= {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
    }
    deft_tools.write_adapter(output, tensors, deft_tools.carried(metadata, "compose_deft", done))
    size = sum(tensor.nbytes for tensor in tensors.values()) / 2**20
    print(f"{output}: {len(layers)} layers of rank {rank}, {str(dtype).removeprefix('torch.')}, {size:.1f} MiB")


def _widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest if widest in PRECISIONS.values() else torch.float32


if __name__ == "__main__":
    raise SystemExit(main())
