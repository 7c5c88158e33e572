"""Makes a LoRA of what a model was changed by: the difference of two checkpoints, or an adapter of another kind.

    python networks/extract_deft.py --model_org sdxl --model_tuned my.safetensors --dim 32 --save_to lora.safetensors
    python networks/extract_deft.py --adapter loha.safetensors --dim 16 --save_to lora.safetensors

Checkpoints are single files or Diffusers folders, in layouts and dtypes that may differ. They are read layer by layer,
so that one pair of weights is in memory. Large layers are approximated by a randomised singular value decomposition,
small ones exactly; every layer's error is measured. --energy keeps a share of each layer's squared difference in as few
directions as that takes, --dim at most. What a LoRA cannot express is told.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a file: its folder is on the path, not the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import contextlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from networks import deft_architectures, deft_factors, deft_formats, deft_tools
from networks.deft_architectures import Architecture
from networks.deft_checkpoint import Checkpoint, Entry, open_checkpoint
from networks.deft_config import DeftError, naming
from networks.deft_factors import Factors
from networks.deft_formats import Adapter, Dense, OnBase
from networks.deft_progress import progress

TOOL = "extract_deft"
CHUNK = 1 << 23  # numbers that are compared at once


@dataclass(frozen=True)
class Wanted:
    """Which layers, and of what rank.

    :param dim: of Linear layers and 1x1 convolutions; with `energy` the most, None without a limit
    :param conv_dim: of k x k convolutions; None leaves them alone, and the layers beside them that go with them
    :param energy: share of the squared difference to keep
    """

    dim: int | None
    conv_dim: int | None
    energy: float | None
    text_encoders: bool = True

    def __post_init__(self) -> None:
        if self.dim is None and self.energy is None:
            raise DeftError("give --dim, the rank, or --energy, the share of each layer's squared difference to keep")
        for option, value in (("--dim", self.dim), ("--conv_dim", self.conv_dim)):
            if value is not None and value < 1:
                raise DeftError(f"{option} {value}: must be at least 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise DeftError(f"--energy {self.energy:g}: must be a share above 0, at most 1")

    def rank(self, shape: Sequence[int]) -> int | None:
        """The rank of a layer, or with an energy the most."""
        return self.conv_dim if math.prod(shape[2:]) > 1 else self.dim

    def why_not(self, name: str, architecture: Architecture) -> str:
        """Why a layer that differs is left out; nothing when it is not."""
        if not self.text_encoders and name.startswith("lora_te"):
            return "text encoders, which --no_text_encoder leaves out"
        if not architecture.adapts(name, with_convolutions=True):
            return "layers outside of the blocks, which few clients read"
        if not architecture.adapts(name, self.conv_dim is not None):
            return "convolutions and what is beside them, which --conv_dim adds"
        return ""


class Unexpressed:
    """What differs and is in no layer that was made: how many tensors of each kind, and their squared differences."""

    def __init__(self) -> None:
        self.tensors: Counter[str] = Counter()
        self.squares: dict[str, float] = {}
        self.expressed = 0.0

    def add(self, kind: str, square: float) -> None:
        """One tensor, if it differs."""
        if square > 0:
            self.tensors[kind] += 1
            self.squares[kind] = self.squares.get(kind, 0.0) + square

    def lines(self) -> Iterator[str]:
        """What to say."""
        whole = self.expressed + sum(self.squares.values())
        for kind, number in self.tensors.most_common():
            yield f"left out: {number} tensors, {self.squares[kind] / whole:.2%} of the squared difference: {kind}"

    def record(self) -> dict[str, float]:
        """Kind -> share of the squared difference, for the metadata."""
        whole = self.expressed + sum(self.squares.values())
        return {kind: float(f"{square / whole:.3g}") for kind, square in self.squares.items()}


class Extracted:
    """Layers of a LoRA, as they are made one by one."""

    def __init__(self, wanted: Wanted, device: torch.device) -> None:
        self.wanted, self.device = wanted, device
        self.layers: dict[str, Factors] = {}
        self.losses = deft_tools.Losses()
        self.unchanged: list[str] = []
        self.unexpressed = Unexpressed()

    def add(self, name: str, shape: Sequence[int], D: Tensor) -> None:
        """A layer by its change (m, n), float32.

        :raises ValueError: when it is not finite
        """
        norm = deft_factors.frobenius(D)
        if norm == 0:
            self.unchanged.append(name)
            return
        rank, energy = self.wanted.rank(shape), self.wanted.energy
        found, error = deft_factors.approximated(D.to(self.device), tuple(shape[1:]), rank, energy)
        self._keep(name, found, error, norm)

    def add_factors(self, name: str, change: Factors) -> None:
        """A layer that is a LoRA's already."""
        norm = float(deft_factors.norm(change.up.double(), change.down.double()))
        if norm == 0:
            self.unchanged.append(name)
            return
        found, error = deft_formats.to_factors(change, self.wanted.rank(change.shape), self.wanted.energy, None)
        self._keep(name, found, error, norm)

    def _keep(self, name: str, found: Factors, error: float, norm: float) -> None:
        self.layers[name] = Factors(found.up.cpu(), found.down.cpu(), found.kernel)
        self.losses.add(name, error, norm)
        self.unexpressed.expressed += norm**2


def of_checkpoints(org: Checkpoint, tuned: Checkpoint, made: Extracted) -> None:
    """Everything in which two checkpoints differ.

    :raises DeftError: when they are of different models, or hold values that are no numbers
    """
    architecture = _common_architecture(org, tuned)
    layers = {name: place.shape for name, place in {**tuned.layers, **tuned.further}.items() if _in(org, name)}
    if not any(name in tuned.layers for name in layers):
        raise DeftError(f"{tuned.source} and {org.source} have no layer in common: one is a part that the other lacks")
    for name, shape in layers.items():
        if shape != org.place(name).shape:
            raise DeftError(
                f"{name} is {_size(shape)} in {tuned.source} and {_size(org.place(name).shape)} in {org.source}: "
                f"they are of different models; give the base that it was tuned from"
            )
    for name, shape in progress(list(layers.items()), "extract", "layer"):
        D = difference(org, tuned, name)
        kind = made.wanted.why_not(name, architecture) if name in tuned.layers else "inputs and outputs of the model"
        try:
            if kind:
                made.unexpressed.add(kind, _square(D))
            else:
                made.add(name, shape, D)
        except ValueError:
            raise _not_finite(org, tuned, name) from None
    _compare_rest(org, tuned, made.unexpressed)


def _in(checkpoint: Checkpoint, name: str) -> bool:
    return name in checkpoint.layers or name in checkpoint.further


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _common_architecture(org: Checkpoint, tuned: Checkpoint) -> Architecture:
    if org.architecture != tuned.architecture:
        raise DeftError(
            f"{tuned.source} is {tuned.architecture} and {org.source} {org.architecture}; give the base that it was "
            f"tuned from"
        )
    return next(a for a in deft_architectures.ARCHITECTURES if a.name == org.architecture)


def difference(org: Checkpoint, tuned: Checkpoint, name: str) -> Tensor:
    """Tuned - org of a layer, (m, n), float32; zero where only their dtypes differ."""
    W_org, W = org.weight(name).flatten(1), tuned.weight(name).flatten(1)
    dtypes = {side.entries[piece.key].dtype for side in (org, tuned) for piece in side.place(name).pieces}
    if len(dtypes) > 1 and any(torch.equal(W.to(dtype), W_org.to(dtype)) for dtype in dtypes):
        return torch.zeros_like(W)  # one is the other rounded
    return W.sub_(W_org)


def _square(D: Tensor) -> float:
    """||D||^2.

    :raises ValueError: when it is not finite
    """
    norm = deft_factors.frobenius(D)
    if not math.isfinite(norm):
        raise ValueError("non-finite values")
    return norm**2


def _not_finite(org: Checkpoint, tuned: Checkpoint, name: str) -> DeftError:
    broken = next((side for side in (tuned, org) if not side.weight(name).isfinite().all()), tuned)
    return DeftError(f"{broken.source}: {name} has non-finite values; nothing was written")


def _compare_rest(org: Checkpoint, tuned: Checkpoint, found: Unexpressed) -> None:
    """Norms, biases, embeddings and the VAE, which go by their keys: not where the layouts differ.

    :raises DeftError: when they hold values that are no numbers
    """
    there = set(org.rest)
    for key in tuned.rest:
        if key in there and _comparable(tuned.entries[key], org.entries[key]):
            kind = "the VAE" if key.startswith(("first_stage_model.", "vae/")) else "norms, biases and embeddings"
            try:
                found.add(kind, _square_apart(tuned.entries[key], org.entries[key]))
            except ValueError:
                raise DeftError(f"{key} has non-finite values in {tuned.source} or in {org.source}") from None


def _square_apart(entry: Entry, other: Entry) -> float:
    """||difference||^2, of some rows at a time: embeddings are large.

    :raises ValueError: when it is not finite
    """
    if not entry.shape:
        return _square(entry.read().float() - other.read().float())
    rows = max(1, CHUNK // max(1, math.prod(entry.shape[1:])))
    square = 0.0
    for first in range(0, entry.shape[0], rows):
        number = min(rows, entry.shape[0] - first)
        square += _square(entry.read(first, number).float() - other.read(first, number).float())
    return square


def _comparable(entry: Entry, other: Entry) -> bool:
    return entry.shape == other.shape and entry.dtype.is_floating_point and other.dtype.is_floating_point


def of_adapter(adapter: Adapter, base: Checkpoint | None, made: Extracted) -> None:
    """What an adapter of any kind changes.

    :param base: the model that it was trained on; None where none was given
    :raises DeftError: for changes that depend on a base that is not there, a base that does not fit, and values that
        are no numbers
    """
    for name in progress(list(adapter.changes), "extract", "layer"):
        if not made.wanted.text_encoders and name.startswith("lora_te"):
            continue
        change = adapter.changes[name]
        if base is not None:
            _check_fits(adapter.source, name, change.shape, base)
        elif isinstance(change, OnBase):
            raise DeftError(f"{name}: {change.kind} depends on the base model's weights; give it with --model_org")
        with naming(f"{adapter.source}: {name}"):
            if isinstance(change, Factors):
                made.add_factors(name, change)
            elif isinstance(change, Dense):
                made.add(name, change.shape, change.delta())
            elif base is not None:
                W = base.weight(name)
                made.add(name, W.shape, change.delta(W.flatten(1)))


def _check_fits(source: str, name: str, shape: Sequence[int], base: Checkpoint) -> None:
    """:raises DeftError: when the base has no such layer, or one of another size

    :param shape: as an adapter knows it: 0 stands for any size, and some kinds know the inputs without a kernel
    """
    if not _in(base, name):
        raise DeftError(f"{source}: {base.source} has no {name}; give the model that it was trained on")
    there = base.place(name).shape
    inputs = math.prod(shape[1:])
    if shape[0] not in (0, there[0]) or inputs not in (0, there[1], math.prod(there[1:])):
        raise DeftError(
            f"{source}: {name} is {_size(shape)} there and {_size(there)} in {base.source}; give the model that it "
            f"was trained on"
        )


def base_metadata(architecture: str, base: Checkpoint | None) -> dict[str, str]:
    """The fields by which UIs know what model a file is for."""
    places = {} if base is None else {**base.layers, **base.further}
    return deft_architectures.base_metadata_of(architecture, {name: place.shape for name, place in places.items()})


def own_metadata(wanted: Wanted, title: str) -> dict[str, str]:
    """What extract_lora_from_models.py of sd-scripts (commit 48d368fa) says of a file, the rank apart."""
    conv = {} if wanted.conv_dim is None else {"conv_dim": str(wanted.conv_dim), "conv_alpha": str(wanted.conv_dim)}
    return {
        "ss_network_module": "networks.lora",
        "ss_network_args": json.dumps(conv),
        "ss_output_name": title,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": title,
        "modelspec.implementation": "diffusers",
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }


def from_checkpoints(org: str, tuned: str, made: Extracted) -> tuple[dict[str, str], torch.dtype]:
    """Fills `made`; the metadata, and the dtype of the tuned model."""
    with open_checkpoint(org) as base, open_checkpoint(tuned) as model:
        of_checkpoints(base, model, made)
        if base.layout != model.layout:
            print(f"not compared, {base.layout} against {model.layout}: norms, biases and embeddings")
        for one, other in ((base, model), (model, base)):
            if lacking := [name for name in one.layers if not _in(other, name)]:
                print(f"left out: {len(lacking)} layers that {other.source} does not have, {lacking[0]} for one")
        piece = next(iter(model.layers.values())).pieces[0]
        return base_metadata(model.architecture, base), model.entries[piece.key].dtype


def from_adapter(path: str, org: str | None, made: Extracted) -> tuple[dict[str, str], torch.dtype]:
    """Fills `made`; the metadata, and the adapter's dtype."""
    adapter = deft_formats.read(path)
    if not adapter.changes:
        raise DeftError(f"{path}: holds no change of a weight")
    with contextlib.ExitStack() as stack:
        base = None if org is None else stack.enter_context(open_checkpoint(org))
        of_adapter(adapter, base, made)
        architecture = adapter.architecture or ("" if base is None else base.architecture)
        known = base_metadata(architecture, base)
    for line in deft_tools.left_told(adapter.left):
        print(line)
    known = known if base is not None or known["ss_base_model_version"] else {}
    return {**known, **adapter.metadata}, adapter.dtype


@dataclass(frozen=True)
class Given:
    """What the command line gives."""

    org: str | None
    tuned: str | None
    adapter: str | None
    save_to: str
    precision: str | None
    pad: bool
    verbose: bool

    def __post_init__(self) -> None:
        if self.adapter is not None and self.tuned is not None:
            raise DeftError("--adapter and --model_tuned: give one of them")
        if self.adapter is None and (self.tuned is None or self.org is None):
            raise DeftError("give --model_tuned and --model_org, or an --adapter of another kind")


def extract(given: Given, wanted: Wanted, device: torch.device) -> None:
    """Reads, approximates, writes, and tells.

    :raises DeftError: for mistakes
    """
    inputs = [path for path in (given.org, given.tuned, given.adapter) if path is not None]
    output = deft_tools.output_path("--save_to", given.save_to, inputs)
    made = Extracted(wanted, device)
    if given.adapter is not None:
        known, found_dtype = from_adapter(given.adapter, given.org, made)
    else:
        known, found_dtype = from_checkpoints(str(given.org), str(given.tuned), made)
    for line in made.unexpressed.lines():
        print(line)
    if not made.layers:
        raise DeftError(f"{inputs[-1]}: nothing differs that was to be extracted; nothing was written")
    dtype = deft_tools.saved_dtype(given.precision, found_dtype)
    done: dict[str, object] = {name: value for name, value in asdict(wanted).items() if value is not None}
    done |= {"from": [Path(path).name for path in inputs], "error": made.losses.record()}
    done |= {"left_out": made.unexpressed.record(), "errors": made.losses.each()}
    metadata = deft_tools.carried({**known, **own_metadata(wanted, output.stem)}, TOOL, done)
    tensors, metadata = deft_tools.lora_file(made.layers, dtype, given.pad, metadata)
    deft_tools.write_adapter(output, tensors, metadata)
    if given.verbose:
        for name, error in made.losses.errors.items():
            print(f"{name}: rank {made.layers[name].rank}, relative error {error:.3g}")
    if made.unchanged:
        print(f"without any change: {len(made.unchanged)} layers, {made.unchanged[0]} for one")
    print(f"{len(made.layers)} layers, {deft_tools.padding_told(made.layers, dtype, given.pad)}")
    print(f"{made.losses}\n{output} is written")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = deft_tools.parser(__doc__)
    add = parser.add_argument
    add("--model_org", metavar="MODEL", help="the model that was tuned, or that an --adapter was trained on")
    add("--model_tuned", metavar="MODEL", help="what became of it")
    add("--adapter", metavar="FILE", help="instead of --model_tuned: LoHa, LoKr, full differences and the like")
    add("--save_to", required=True, metavar="FILE", help="what to write, .safetensors")
    add("--dim", type=int, help="rank; with --energy the most")
    add("--conv_dim", type=int, help="rank of k x k convolutions (default: they are left out; an adapter's as --dim)")
    add("--energy", type=float, metavar="SHARE", help="of each layer's squared difference, to be kept")
    add("--no_text_encoder", action="store_true", help="leave the text encoders out")
    add("--no_pad", action="store_true", help="each layer's own rank in the file")
    add("--save_precision", choices=deft_tools.PRECISIONS, help="default: that of the tuned model or the adapter")
    add("--device", default="cpu", help="to compute on (default: cpu)")
    add("--verbose", action="store_true", help="print every layer's error")
    given = parser.parse_args(argv)

    def work() -> None:
        conv_dim = given.dim if given.adapter is not None and given.conv_dim is None else given.conv_dim
        wanted = Wanted(given.dim, conv_dim, given.energy, not given.no_text_encoder)
        names = (given.model_org, given.model_tuned, given.adapter, given.save_to, given.save_precision)
        extract(Given(*names, not given.no_pad, given.verbose), wanted, deft_tools.device_of(given.device))

    return deft_tools.run(work)


if __name__ == "__main__":
    sys.exit(main())
