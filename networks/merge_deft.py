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

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from networks import deft_blocks, deft_formats, deft_io, deft_progress, deft_sum, deft_tools
from networks.deft_blocks import Strength
from networks.deft_checkpoint import Checkpoint, open_checkpoint
from networks.deft_config import DeftError
from networks.deft_factors import Factors
from networks.deft_formats import Adapter
from networks.deft_rewrite import rewrite
from networks.deft_sum import Part, Rank

TOOL = "merge_deft"
DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# fields that say what a file was trained as, or are sums over it, and of a sum of several are not true
UNTRUE = (
    "modelspec.hash_sha256",
    "ss_session_id",
    "ss_new_sd_model_hash",
    "ss_network_dropout",
    "ss_steps",
    "ss_epoch",
)
OF_ONE = (deft_io.OPTIONS_KEY, deft_io.LAYERS_KEY, deft_io.BASE_HASH_KEY, deft_io.BASE_DTYPE_KEY)


def read_parts(
    models: Sequence[str], ratios: Sequence[float], te_ratios: Sequence[float], lbws: Sequence[str]
) -> list[Part]:
    """The adapters that the command line names; a list that is empty stands for 1, or for the ratios.

    :raises DeftError: for lists of different lengths, files that cannot be read, or other architectures
    """
    for option, given in (("--ratios", ratios), ("--te_ratios", te_ratios), ("--lbws", lbws)):
        if given and len(given) != len(models):
            raise DeftError(f"{option}: {len(given)} for {len(models)} files in --models; give as many")
    for option, numbers in (("--ratios", ratios), ("--te_ratios", te_ratios)):
        if not all(map(math.isfinite, numbers)):
            raise DeftError(f"{option}: give finite numbers")
    adapters = [deft_formats.read(model) for model in models]
    deft_sum.check_architectures(adapters)
    ratios = ratios or [1.0] * len(models)
    parts = []
    for k, adapter in enumerate(adapters):
        weights = deft_blocks.block_weights(lbws[k], adapter.changes, adapter.architecture) if lbws else None
        parts.append(Part(adapter, Strength(ratios[k], te_ratios[k] if te_ratios else ratios[k], weights)))
    return parts


def sum_metadata(
    parts: Sequence[Part], save_to: Path, rank: int, done: Mapping[str, object], tool: str = TOOL
) -> dict[str, str]:
    """Of the first adapter, with the tags of all; what is not true of a sum is left out."""
    first = dict(parts[0].adapter.metadata)
    for key in (*UNTRUE, *OF_ONE):
        first.pop(key, None)
    if "ss_network_dim" in first or "ss_network_alpha" in first:
        first |= {"ss_network_dim": str(rank), "ss_network_alpha": str(float(rank))}
    first |= {"ss_output_name": save_to.stem} if "ss_output_name" in first else {}
    first |= _united_tags([part.adapter.metadata for part in parts])
    phrases = [part.adapter.metadata.get("modelspec.trigger_phrase", "") for part in parts]
    if any(phrases):
        first["modelspec.trigger_phrase"] = ", ".join(dict.fromkeys(filter(None, phrases)))
    first |= merged_fields([(part.adapter.source, part.adapter.metadata) for part in parts], save_to)
    return deft_tools.carried(first, tool, done)


def merged_fields(inputs: Sequence[tuple[str, Mapping[str, str]]], save_to: Path) -> dict[str, str]:
    """The fields that sd-scripts writes on merging (`sai_model_spec.py`, commit 48d368fa)."""
    titles = [metadata.get("modelspec.title") or Path(source).stem for source, metadata in inputs]
    date = time.strftime("%Y-%m-%dT%H:%M:%S")
    return {
        "modelspec.title": save_to.stem,
        "modelspec.merged_from": ", ".join(titles),
        "modelspec.date": date,
    }


def _united_tags(metadata: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """`ss_tag_frequency`, from which UIs show trigger words, of all adapters."""
    united: dict[str, object] = {}
    for k, fields in enumerate(metadata):
        try:
            tags = dict(json.loads(fields.get("ss_tag_frequency", "{}")))
        except (TypeError, ValueError, RecursionError):
            continue
        united |= {name if name not in united else f"{name} ({k + 1})": found for name, found in tags.items()}
    return {"ss_tag_frequency": json.dumps(united)} if united else {}


def save_sum(parts: Sequence[Part], rank: Rank, save_to: Path, dtype: torch.dtype) -> None:
    """Writes the sum of adapters as a plain LoRA, and says what was cut."""
    layers, errors = deft_sum.summed(parts, rank)
    tensors, _ = deft_io.lora_tensors(layers, dtype, pad=True)
    file_rank = max(factors.rank for factors in layers.values())
    done = {**_settings(parts), "rank": file_rank}
    if rank.limited:
        done["errors"] = {name: float(f"{error:.3g}") for name, error in errors.items()}
    deft_tools.write_adapter(save_to, tensors, sum_metadata(parts, save_to, file_rank, done))
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
        self.parts = [(part.adapter, part.strengths()) for part in parts]
        self.left: list[str] = []
        there = {**checkpoint.layers, **checkpoint.further}
        for adapter, strengths in self.parts:
            left = [name for name in strengths if name not in there]
            _check_matches(adapter, strengths, left, checkpoint, ignore_unmatched)
            for name in left:
                del strengths[name]
            for name in strengths:
                shape = adapter.changes[name].shape
                if not deft_sum.same_weight(shape, there[name].shape):
                    raise DeftError(
                        f"{adapter.source}: {name} is of a weight of {shape}, {checkpoint.source} has one of "
                        f"{there[name].shape}: it is for another model than this {checkpoint.architecture}"
                    )
            self.left += left
        self.names = {name for _, strengths in self.parts for name in strengths}

    def __call__(self, name: str, shape: tuple[int, ...]) -> Factors | Callable[[Tensor], Tensor] | None:
        """As factors where they are such, otherwise as a function of the weight (m, n), float32."""
        found = [
            (adapter, adapter.changes[name], strengths[name]) for adapter, strengths in self.parts if name in strengths
        ]
        if not found:
            return None
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
        metadata = deft_tools.carried(old | merged_fields(inputs, save_to), TOOL, done)
        rewrite(checkpoint, save_to, merged, dtype=dtype, seed=seed, metadata=metadata)
        print(f"{save_to}: {len(merged.names)} of {len(checkpoint.layers)} layers changed ({checkpoint.layout})")
    if merged.left:
        print(f"left out: {len(merged.left)} layers that the checkpoint does not have, such as {merged.left[0]}")


def say_what_is_left(parts: Sequence[Part]) -> None:
    """What of the adapters is no change of a weight, and so in no sum."""
    for part in parts:
        for key, why in list(part.adapter.left.items())[:1]:
            print(f"{part.adapter.source}: {len(part.adapter.left)} tensors are not merged, such as {key}: {why}")


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
    add("--save_precision", choices=DTYPES, help="dtype of what is written (a checkpoint's own; the first adapter's)")
    add("--new_rank", type=int, metavar="N", help="rank of the adapter at most (the sum of theirs)")
    add("--new_conv_rank", type=int, metavar="N", help="that of k x k convolutions (as --new_rank)")
    add("--energy", type=float, metavar="X", help="share of each layer's squared norm to keep, such as 0.99")
    add("--ignore_unmatched", action="store_true", help="go on without the layers that the checkpoint does not have")
    add("--stochastic_rounding", type=int, metavar="SEED", help="round changed weights at random, right on average")
    given = parser.parse_args(argv)
    return deft_tools.run(
        lambda: merge(
            lambda: read_parts(given.models, given.ratios, given.te_ratios, given.lbws),
            inputs=given.models,
            sd_model=given.sd_model,
            save_to=given.save_to,
            dtype=DTYPES.get(given.save_precision),
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
    dtype: torch.dtype | None,
    rank: Rank,
    seed: int | None,
    ignore_unmatched: bool,
) -> None:
    """The tool's work; what can be refused without reading an adapter is refused before.

    :param read: reads the adapters
    """
    check_options(sd_model, rank, seed, ignore_unmatched)
    folder = sd_model is not None and Path(sd_model).is_dir()
    output = (
        Path(save_to) if folder else deft_tools.output_path("--save_to", save_to, [*inputs, *filter(None, [sd_model])])
    )
    with deft_progress.single_threaded():
        parts = read()
        say_what_is_left(parts)
        if sd_model is None:
            save_sum(parts, rank, output, dtype or saved_dtype(parts[0].adapter))
        else:
            save_merged(parts, sd_model, output, dtype, seed, ignore_unmatched)


def saved_dtype(adapter: Adapter) -> torch.dtype:
    """An adapter's own, if it is one that every client reads."""
    return adapter.dtype if adapter.dtype in DTYPES.values() else torch.float32


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
