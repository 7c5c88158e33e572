"""Adapters into one adapter, or into a checkpoint: the sum of what they change, exactly.

    python networks/merge_deft.py --models a.safetensors b.safetensors --ratios 1 0.5 --save_to ab.safetensors
    python networks/merge_deft.py --sd_model m.safetensors --models a.safetensors --ratios 0.8 --save_to new.safetensors

Adapters of any formats and ranks, for one architecture. Their sum has the sum of their ranks; --new_rank or --energy
cut that to the best approximation. A checkpoint (a file, or a folder of Diffusers) keeps its layout and dtype, scaled
fp8 too. All is computed in float32. Inputs are never overwritten; what is written is there whole or not at all.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a file: its folder is on the path, not the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from networks import deft_blocks, deft_io, deft_progress, deft_sum, deft_tools
from networks.deft_checkpoint import Checkpoint, open_checkpoint
from networks.deft_config import DeftError
from networks.deft_factors import Factors
from networks.deft_formats import Adapter
from networks.deft_rewrite import rewrite
from networks.deft_sum import Part, Rank

TOOL = "merge_deft"


def save_sum(parts: Sequence[Part], rank: Rank, save_to: Path, dtype: torch.dtype) -> None:
    """Writes the sum of adapters as a plain LoRA, and says what was cut."""
    layers, errors = deft_sum.summed(parts, rank)
    tensors, _ = deft_io.lora_tensors(layers, dtype, pad=True)
    file_rank = max(factors.rank for factors in layers.values())
    done = {**_settings(parts), "rank": file_rank}
    if rank.limited:
        done["errors"] = {name: float(f"{error:.3g}") for name, error in errors.items()}
    deft_tools.write_adapter(save_to, tensors, deft_sum.sum_metadata(parts, save_to, file_rank, done, TOOL))
    print(f"{save_to}: the sum of {len(parts)}, {len(layers)} layers, rank {file_rank}")
    if rank.limited:
        worst = max(errors, key=errors.__getitem__)
        mean = sum(errors.values()) / len(errors)
        print(f"cut: relative error {mean:.2g} on average, {errors[worst]:.2g} at most ({worst})")


def _settings(parts: Sequence[Part]) -> dict[str, object]:
    """What the metadata says of how it was merged."""
    return {
        "models": [Path(part.adapter.source).name for part in parts],
        "ratios": [part.strength.denoiser for part in parts],
        "te_ratios": [part.strength.text_encoders for part in parts],
        **({"lbws": [part.strength.blocks for part in parts]} if parts[0].strength.blocks is not None else {}),
    }


class Merged:
    """What `rewrite` asks of each layer of a checkpoint: the sum of what the adapters change there.

    :raises DeftError: for adapters of another model, and for layers that the checkpoint lacks
    """

    def __init__(self, parts: Sequence[Part], checkpoint: Checkpoint, ignore_unmatched: bool) -> None:
        self.checkpoint = checkpoint
        self.parts = [(part.adapter, part.strengths()) for part in parts]
        self.left: list[str] = []
        there = {**checkpoint.layers, **checkpoint.further}
        for adapter, strengths in self.parts:
            left = [name for name in strengths if name not in there]
            _check_matches(adapter, strengths, left, checkpoint, ignore_unmatched)
            for name in left:
                del strengths[name]
            self.left += left
        self.names = {name for _, strengths in self.parts for name in strengths}

    def __call__(self, name: str, shape: tuple[int, ...]) -> Factors | Callable[[Tensor], Tensor] | None:
        """As factors where they are such, otherwise as a function of the weight (m, n), float32."""
        found = [
            (adapter, adapter.changes[name], strengths[name]) for adapter, strengths in self.parts if name in strengths
        ]
        if not found:
            return None
        for adapter, change, _ in found:
            if not deft_sum.same_weight(change.shape, shape):
                raise DeftError(
                    f"{adapter.source}: {name} is of a weight of {change.shape}, {self.checkpoint.source} has one of "
                    f"{shape}: it is for another model than this {self.checkpoint.architecture}"
                )
        factors = [change.scaled(strength) for _, change, strength in found if isinstance(change, Factors)]
        return deft_sum.added(factors) if len(factors) == len(found) else lambda W: deft_sum.change_of(W, found)


def _check_matches(
    adapter: Adapter, strengths: Mapping[str, float], left: Sequence[str], checkpoint: Checkpoint, ignored: bool
) -> None:
    """:raises DeftError: naming what does not fit, and what each looks made for"""
    made_for = f"{checkpoint.source} looks made for {checkpoint.architecture}, in the layout {checkpoint.layout}"
    if adapter.architecture and adapter.architecture != checkpoint.architecture:
        raise DeftError(f"{adapter.source} is for {adapter.architecture}, but {made_for}: give what fits each other")
    if not left or (ignored and len(left) < len(strengths)):
        return
    if len(left) == len(strengths):
        raise DeftError(f"{adapter.source}: none of its layers, such as {left[0]}, is in it: {made_for}")
    texts = [name for name in left if not name.startswith(deft_blocks.DENOISER)]
    what = "--te_ratios 0 leaves the text encoders out" if len(texts) == len(left) else "--ignore_unmatched goes on"
    raise DeftError(
        f"{adapter.source}: {len(left)} of its {len(strengths)} layers, such as {left[0]}, are not there: {made_for}; "
        f"{what}"
    )


def save_merged(
    parts: Sequence[Part], source: str, save_to: Path, dtype: torch.dtype | None, seed: int | None, ignored: bool
) -> None:
    """Writes a copy of a checkpoint with the adapters in it."""
    with open_checkpoint(source) as checkpoint:
        merged = Merged(parts, checkpoint, ignored)
        if not merged.names:
            raise DeftError("--ratios, --te_ratios and --lbws leave no layer of the adapters with a strength but 0")
        old = dict(checkpoint.metadata)
        old.pop("modelspec.hash_sha256", None)
        inputs = [(source, old), *((part.adapter.source, part.adapter.metadata) for part in parts)]
        done = {**_settings(parts), "layers": len(merged.names)}
        metadata = deft_tools.carried(old | deft_sum.merged_fields(inputs, save_to), TOOL, done)
        rewrite(checkpoint, save_to, merged, dtype=dtype, seed=seed, metadata=metadata)
        print(f"{save_to}: {len(merged.names)} of {len(checkpoint.layers)} layers changed ({checkpoint.layout})")
    if merged.left:
        print(f"left out: {len(merged.left)} layers that the checkpoint does not have, such as {merged.left[0]}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = deft_tools.parser(__doc__)
    add = parser.add_argument
    add("--models", nargs="+", required=True, metavar="FILE", help="adapters")
    add("--ratios", nargs="+", type=float, default=[], metavar="X", help="how much each counts, also below 0 (1)")
    add("--te_ratios", nargs="+", type=float, default=[], metavar="X", help="that of their text encoders (as --ratios)")
    add("--lbws", nargs="+", default=[], metavar="WEIGHTS",
        help="block weights of each: 12, 17, 20 or 26 numbers, a preset such as INALL, or IN*=0.5,OUT03=0")  # fmt: skip
    add("--sd_model", "--flux_model", metavar="MODEL", help="the checkpoint to merge into; without it into one adapter")
    add("--save_to", required=True, metavar="FILE", help="what is written")
    add(
        "--save_precision",
        choices=deft_tools.PRECISIONS,
        help="dtype of what is written (a checkpoint's own; the first adapter's)",
    )
    add("--new_rank", type=int, metavar="N", help="rank of the adapter at most (the sum of theirs)")
    add("--new_conv_rank", type=int, metavar="N", help="that of k x k convolutions (as --new_rank)")
    add("--energy", type=float, metavar="X", help="share of each layer's squared norm to keep, such as 0.99")
    add("--ignore_unmatched", action="store_true", help="go on without the layers that the checkpoint does not have")
    add("--stochastic_rounding", type=int, metavar="SEED", help="round changed weights at random, right on average")
    given = parser.parse_args(argv)
    return deft_tools.run(
        lambda: merge(
            lambda: deft_sum.read_parts(given.models, given.ratios, given.te_ratios, given.lbws),
            inputs=given.models,
            sd_model=given.sd_model,
            save_to=given.save_to,
            precision=given.save_precision,
            rank=Rank(
                given.new_rank, given.new_rank if given.new_conv_rank is None else given.new_conv_rank, given.energy
            ),
            seed=given.stochastic_rounding,
            ignore_unmatched=given.ignore_unmatched,
        )
    )


def merge(
    read: Callable[[], list[Part]],
    inputs: Sequence[str],
    sd_model: str | None,
    save_to: str,
    precision: str | None,
    rank: Rank,
    seed: int | None,
    ignore_unmatched: bool,
) -> None:
    """The tool's work; what can be refused without reading an adapter is refused before.

    :param read: reads the adapters
    """
    check_options(sd_model, rank, seed, ignore_unmatched)
    deft_tools.check_native("--save_to", save_to)
    folder = sd_model is not None and Path(sd_model).is_dir()
    output = (
        Path(save_to) if folder else deft_tools.output_path("--save_to", save_to, [*inputs, *filter(None, [sd_model])])
    )
    with deft_progress.single_threaded():
        parts = read()
        deft_sum.say_what_is_left(parts)
        if sd_model is None:
            save_sum(parts, rank, output, deft_tools.saved_dtype(precision, parts[0].adapter.dtype))
        else:
            save_merged(parts, sd_model, output, deft_tools.PRECISIONS.get(precision or ""), seed, ignore_unmatched)


def check_options(sd_model: str | None, rank: Rank, seed: int | None, ignore_unmatched: bool) -> None:
    """:raises DeftError: for options that do not go together, and values outside of their range"""
    if sd_model is not None and rank != Rank():
        raise DeftError("--new_rank, --new_conv_rank and --energy are for the sum of adapters, without --sd_model")
    if sd_model is None and (seed is not None or ignore_unmatched):
        option = "--stochastic_rounding" if seed is not None else "--ignore_unmatched"
        raise DeftError(f"{option} is for merging into a checkpoint: give one with --sd_model")
    if rank.most is None and rank.most_conv is not None:
        raise DeftError("--new_conv_rank: give --new_rank too")
    for option, value in (("--new_rank", rank.most), ("--new_conv_rank", rank.most_conv)):
        if value is not None and value < 1:
            raise DeftError(f"{option} {value}: give 1 or more")
    if rank.energy is not None and not 0 < rank.energy <= 1:
        raise DeftError(f"--energy {rank.energy}: give a share above 0 and up to 1")


if __name__ == "__main__":
    sys.exit(main())
