"""Makes an adapter's rank lower: the best approximation of every layer, exact, and what each of them loses.

    python networks/resize_deft.py --model cat.safetensors --new_rank 16 --save_to cat_16.safetensors
    python networks/resize_deft.py --model cat.safetensors --new_rank 64 --dynamic_method sv_fro --dynamic_param 0.9 \\
        --save_to small.safetensors --verbose

By QR decompositions of both factors and a singular value decomposition of r x r: no product is formed. With
--dynamic_method each layer gets its own rank by sd-scripts' rules, at most --new_rank. The file still has one rank, the
highest that a layer got, with zeros in the others, since diffusers misreads files of mixed ranks; --no_pad leaves each
layer its own, for a smaller file. Adapters of other formats are written as kohya's.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a file: its folder is on the path, not the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from networks import deft_factors, deft_formats, deft_tools
from networks.deft_config import DeftError, naming
from networks.deft_factors import Factors
from networks.deft_formats import Adapter, OnBase
from networks.deft_progress import progress

TOOL = "resize_deft"


@dataclass(frozen=True)
class Rule:
    """How a layer's new rank is found.

    :param rank: of Linear layers and 1x1 convolutions; with a method the most
    :param conv_rank: of k x k convolutions
    :param method: of `deft_factors.DYNAMIC`, or None
    """

    rank: int
    conv_rank: int
    method: str | None = None
    target: float | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or self.conv_rank < 1:
            raise DeftError("--new_rank and --new_conv_rank: must be at least 1")
        target = 1.0 if self.target is None else self.target
        if self.method == "sv_ratio" and not 1 <= target < math.inf:
            raise DeftError(f"--dynamic_param {target:g}: with sv_ratio it is a number of at least 1")
        if self.method in ("sv_fro", "sv_cumulative") and not 0 < target <= 1:
            raise DeftError(f"--dynamic_param {target:g}: with {self.method} it is a share above 0, at most 1")

    def of(self, found: deft_factors.Decomposed) -> int:
        """The rank for a layer with these singular values."""
        most = self.conv_rank if math.prod(found.kernel[1:]) > 1 else self.rank
        most = min(most, len(found.values))
        if self.method is None or self.target is None:
            return most
        return min(most, deft_factors.dynamic_rank(found.values, self.method, self.target))

    def words(self, before: int) -> str:
        """As sd-scripts' resize_lora.py puts it into `ss_training_comment`."""
        if self.method is not None:
            return f"Dynamic resize with {self.method}: {self.target} from {before}"
        conv = "" if self.conv_rank == self.rank else f" (conv: {self.conv_rank})"
        return f"dimension is resized from {before} to {self.rank}{conv}"


class Resized:
    """Every layer's best approximation of its new rank, on the CPU, and what is lost.

    :raises DeftError: for adapters of other kinds, and values so large that float32 has no product of them
    """

    def __init__(self, adapter: Adapter, rule: Rule, device: torch.device) -> None:
        self.before: dict[str, int] = {}
        self.layers: dict[str, Factors] = {}
        self.losses = deft_tools.Losses()
        if not adapter.changes:
            raise DeftError(f"{adapter.source}: holds no layers of a LoRA")
        for name in progress(list(adapter.changes), "resize", "layer"):
            change = adapter.changes[name]
            if not isinstance(change, Factors):
                base = " --model_org MODEL" if isinstance(change, OnBase) else ""
                raise DeftError(
                    f"{adapter.source}: {name} is {change.kind}, no LoRA; make it one, of the rank that you want: "
                    f"extract_deft.py --adapter {adapter.source} --dim {rule.rank}{base}"
                )
            self._add(adapter.source, name, change, rule, device)

    def _add(self, source: str, name: str, change: Factors, rule: Rule, device: torch.device) -> None:
        with naming(f"{source}: {name}"):
            whole = deft_factors.decomposed(Factors(change.up.to(device), change.down.to(device), change.kernel))
        cut, error = whole.truncated(rule.of(whole))
        self.before[name] = change.rank
        self.layers[name] = Factors(cut.up.cpu(), cut.down.cpu(), cut.kernel)
        self.losses.add(name, error, float(whole.values.norm()))


def resize(
    model: str, save_to: str, rule: Rule, precision: str | None, pad: bool, device: torch.device, verbose: bool
) -> None:
    """Reads, cuts down, writes, and tells.

    :raises DeftError: for mistakes
    """
    output = deft_tools.output_path("--save_to", save_to, [model])
    adapter = deft_formats.read(model)
    made = Resized(adapter, rule, device)
    before = max(made.before.values())
    dtype = deft_tools.saved_dtype(precision, adapter.dtype)
    comment = adapter.metadata.get("ss_training_comment", "")
    metadata = {**adapter.metadata, "ss_training_comment": f"{rule.words(before)}; {comment}"}
    settings = {name: value for name, value in asdict(rule).items() if value is not None}
    done = {"from_rank": before, "error": made.losses.record(), **settings}
    tensors, metadata = deft_tools.lora_file(made.layers, dtype, pad, deft_tools.carried(metadata, TOOL, done))
    deft_tools.write_adapter(output, tensors, metadata)
    if verbose:
        for name, error in made.losses.errors.items():
            print(f"{name}: rank {made.before[name]} -> {made.layers[name].rank}, relative error {error:.3g}")
    for line in deft_tools.left_told(adapter.left):
        print(line)
    print(f"{model}: {len(made.layers)} layers of rank {before} -> {deft_tools.padding_told(made.layers, dtype, pad)}")
    print(f"{made.losses}\n{output} is written")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = deft_tools.parser(__doc__)
    parser.add_argument("--model", required=True, metavar="FILE", help="the adapter, in any format")
    parser.add_argument("--save_to", required=True, metavar="FILE", help="what to write, .safetensors")
    parser.add_argument("--new_rank", type=int, default=4, help="with --dynamic_method the most (default: 4)")
    parser.add_argument("--new_conv_rank", type=int, help="of k x k convolutions (default: --new_rank)")
    parser.add_argument("--dynamic_method", choices=deft_factors.DYNAMIC, help="each layer's rank by singular values")
    parser.add_argument("--dynamic_param", type=float, help="its target: largest / least, or the share to keep")
    parser.add_argument("--no_pad", action="store_true", help="each layer's own rank in the file")
    parser.add_argument("--save_precision", choices=deft_tools.PRECISIONS, help="default: the adapter's own")
    parser.add_argument("--device", default="cpu", help="to compute on (default: cpu)")
    parser.add_argument("--verbose", action="store_true", help="print every layer's error")
    given = parser.parse_args(argv)

    def work() -> None:
        if (given.dynamic_method is None) != (given.dynamic_param is None):
            raise DeftError("--dynamic_method and --dynamic_param: give both or neither")
        conv_rank = given.new_rank if given.new_conv_rank is None else given.new_conv_rank
        rule = Rule(given.new_rank, conv_rank, given.dynamic_method, given.dynamic_param)
        device = deft_tools.device_of(given.device)
        resize(given.model, given.save_to, rule, given.save_precision, not given.no_pad, device, given.verbose)

    return deft_tools.run(work)


if __name__ == "__main__":
    sys.exit(main())
