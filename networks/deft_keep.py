"""The input directions that a model uses while it draws, or another adapter answers to, for the option `keep`."""

from __future__ import annotations

import argparse
import functools
import logging
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import deft_factors, deft_formats, deft_io
from networks.deft_config import DeftError, naming, read_text, reason_of
from networks.deft_factors import Decomposed
from networks.deft_formats import Adapter, Change
from networks.deft_progress import progress
from networks.deft_targets import Target

logger = logging.getLogger(__name__)

DIRECTIONS = 64  # a layer, and at most a quarter of its inputs
FEWEST = 16  # pictures that a trainer's samples have to be
ROWS = 4096  # of a layer's inputs that are looked at in each of its calls, chosen at random


class Sketch:
    """The leading directions of vectors that are seen once, a few at a time, without an n x n matrix of them.

    Nystrom's approximation of their second moment from its product with random directions (Tropp, Yurtsever, Udell,
    Cevher: Fixed-rank approximation of a positive-semidefinite matrix from streaming data, 2017, algorithm 3).

    :param test: random orthonormal directions (n, at least k), `test_directions`
    :param k: how many are wanted
    """

    def __init__(self, test: Tensor, k: int) -> None:
        self.test, self.k = test, k
        self.product = torch.zeros_like(test)

    def add(self, X: Tensor) -> None:
        """Vectors (number, n)."""
        X = X.float()
        self.product += X.mT @ (X @ self.test)

    def directions(self) -> Tensor:
        """Orthonormal (n, k), or fewer where the vectors span fewer, the most used first; on the CPU."""
        product, test = self.product.double().cpu(), self.test.double().cpu()
        shift = math.sqrt(len(product)) * torch.finfo(torch.float32).eps * torch.linalg.matrix_norm(product, 2)
        product = product + shift * test
        core = test.mT @ product
        factor = torch.linalg.cholesky((core + core.mT) / 2)
        root = torch.linalg.solve_triangular(factor.mT, product, upper=True, left=False)
        U, S, _ = torch.linalg.svd(root, full_matrices=False)
        used = int((S.square() > 4 * shift).sum())
        return U[:, : min(self.k, max(1, used))]


def test_directions(n: int, k: int) -> Tensor:
    """For a `Sketch` of k directions: the same for the same n and k, (n, min(n, 2 k + 8))."""
    random = torch.randn(n, min(n, 2 * k + 8), generator=torch.Generator().manual_seed(n))
    return torch.linalg.qr(random)[0]


def most_directions(n: int, k: int) -> int:
    """Of a layer with n inputs, where k are wanted."""
    return min(k, max(1, n // 4))


def inputs_of(layer: nn.Module, x: Tensor, most: int | None = None, generator: torch.Generator | None = None) -> Tensor:
    """What a Linear layer or a convolution multiplies its weight with.

    A convolution's are gathered from views of x: all of them together are as large as x times the kernel.

    :param most: where there are more, as many are chosen at random, by `generator`
    :returns: (number, n)
    """
    if isinstance(layer, nn.Conv2d):
        windows = F.pad(x, layer._reversed_padding_repeated_twice)  # numbers also for a padding such as "same"
        for axis, (size, step, apart) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
            windows = windows.unfold(2 + axis, (size - 1) * apart + 1, step)[..., ::apart]
        windows = windows.movedim(1, 3)  # picture, row, column; channel, and the kernel's
        places = windows.shape[:3]
    else:
        windows = x.reshape(-1, x.shape[-1])
        places = windows.shape[:1]
    number = places.numel()
    if most is None or number <= most:
        return windows.reshape(number, -1)
    chosen = torch.randint(number, (most,), generator=generator).to(x.device)
    return windows[torch.unravel_index(chosen, places)].flatten(1)


class Watch:
    """Looks at the inputs of layers in every call until it is closed, at the end of a `with` block or by `close`.

    :param layers: layers with the same key name, such as parts of a fused one, share a sketch
    :param k: directions that are wanted of each, at most a quarter of its inputs
    """

    def __init__(self, layers: Iterable[Target], k: int) -> None:
        self.k = k
        self.layers = {target.file_name: target for target in layers}
        self.sketches: dict[str, Sketch] = {}  # by key name, of layers that have been called
        self._tests: dict[tuple[int, torch.device], Tensor] = {}
        self._generator = torch.Generator().manual_seed(0)
        self._handles = [
            target.layer.register_forward_pre_hook(functools.partial(self._look, name))
            for name, target in self.layers.items()
        ]

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Looks no longer; the sketches stay."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.compiler.disable
    def _look(self, name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        with torch.no_grad(), torch.autocast(args[0].device.type, enabled=False):
            X = inputs_of(layer, args[0].detach(), ROWS, self._generator)
            self._sketch(name, X.device).add(X)

    def _sketch(self, name: str, device: torch.device) -> Sketch:
        if name not in self.sketches:
            n = self.layers[name].shape[1]
            some = most_directions(n, self.k)
            if (n, device) not in self._tests:
                self._tests[n, device] = test_directions(n, some).to(device)
            self.sketches[name] = Sketch(self._tests[n, device], some)
        return self.sketches[name]

    def add_other_processes(self, device: torch.device) -> None:
        """Makes every process's sketches those of all inputs; to be called in all of them, where there are several.

        :param device: of sketches of layers that this process has not called
        """
        for name in self.layers:
            torch.distributed.all_reduce(self._sketch(name, device).product)

    def directions(self) -> dict[str, Tensor]:
        """Key name -> directions (n, k), on the CPU, of every layer with inputs other than zero.

        :raises DeftError: for a layer whose inputs are not finite
        """
        for name, sketch in self.sketches.items():
            if not bool(sketch.product.isfinite().all()):
                raise DeftError(f"{name}: its inputs are not finite; use bfloat16, or with library.keep --device cpu")
        finding = progress(list(self.sketches.items()), "finding directions")
        return {name: sketch.directions() for name, sketch in finding if bool(sketch.product.any())}


def check_samples(keep: str, args: argparse.Namespace) -> None:
    """Whether what sd-scripts draws before the first step can make the file that is not there.

    :param args: sd-scripts' options
    :raises DeftError: when it draws nothing, or less than `FEWEST` pictures
    """
    prompts = getattr(args, "sample_prompts", None)
    if not (prompts and getattr(args, "sample_at_first", False)):
        raise DeftError(
            f"keep={keep}: no such file; make it with `python -m library.keep` of the DEFT project, or let this "
            f"training make it: --sample_at_first --sample_prompts keep.txt, with what the model is to go on drawing"
        )
    lines = read_text(prompts, f"--sample_prompts {prompts}:").split("\n")
    number = sum(bool(line.strip()) and not line.startswith("#") for line in lines)
    if Path(prompts).suffix != ".txt" or number < FEWEST:
        raise DeftError(
            f"keep={keep}: no such file, and to make it from --sample_prompts {prompts}, that has to be a .txt of "
            f"{FEWEST} prompts or more; configs/keep.txt of the DEFT project has 65"
        )


def are_prompts(file: str | os.PathLike) -> bool:
    """Whether a file of the option `keep` holds prompts, and no directions yet."""
    return Path(file).suffix.lower() in (".txt", ".json", ".toml")


def files_of(keep: str) -> list[str]:
    """The files that the option `keep` names, separated by commas."""
    return [keep] if os.path.exists(keep) else [part.strip() for part in keep.split(",") if part.strip()] or [keep]


def made_by_samples(keep: str) -> bool:
    """Whether the option `keep` names a file that may be made of what a trainer draws before its first step."""
    files = files_of(keep)
    return len(files) == 1 and not os.path.exists(keep) and not are_prompts(keep)


def read_kept(keep: str) -> dict[str, Tensor]:
    """Key name -> orthonormal directions (n, k), float32, of the files that the option `keep` names: of `library.keep`,
    or adapters of any format that `deft_formats` reads.

    :raises DeftError: for one that cannot be read or is neither, and where they leave a layer no inputs
    """
    found = [_read_one(file) for file in files_of(keep)]
    if len(found) == 1:
        return found[0]
    names = {name: None for directions in found for name in directions}
    parts = {name: [directions[name] for directions in found if name in directions] for name in names}
    return {name: together(some, f"keep={keep}: {name}") for name, some in parts.items()}


def together(parts: Sequence[Tensor], source: str) -> Tensor:
    """Orthonormal directions (n, k) of all that is in any of several.

    :param source: how errors begin
    :raises DeftError: when they are of different n, or all inputs
    """
    if len(parts) == 1:
        return parts[0]
    if len({len(part) for part in parts}) != 1:
        raise DeftError(f"{source}: the files are made for models with different inputs of it")
    U, S, _ = torch.linalg.svd(torch.cat(list(parts), 1).double(), full_matrices=False)
    U = U[:, S > 1e-3]  # what is in several of them
    if U.shape[1] == len(U):
        raise DeftError(f"{source}: together all {len(U)} inputs of it are taken; name fewer files")
    return U.float()


def _read_one(file: str) -> dict[str, Tensor]:
    """:raises DeftError: when it cannot be read or holds no directions and no adapter"""
    if are_prompts(file):
        raise DeftError(
            f"keep={file}: only train_network_deft.py takes prompts; make a file with `python -m library.keep "
            f"--prompts {file}` of the DEFT project, and give that"
        )
    if not Path(file).exists():
        raise DeftError(
            f"keep={file}: no such file; `python -m library.keep` of the DEFT project makes one, or the samples of a "
            f"training on pictures in sd-scripts"
        )
    tensors, metadata = deft_io.read_tensors(file)
    if deft_io.KEPT_KEY not in metadata:
        try:
            adapter = deft_formats.parse(tensors, metadata, file)
        except DeftError as error:
            raise DeftError(f"keep={file}: no file of `python -m library.keep`, and no adapter ({error})") from None
        return directions_of_adapter(adapter)
    try:
        return deft_io.kept_directions(tensors, metadata)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError, RecursionError) as error:
        raise DeftError(f"keep={file}: damaged, make it anew ({reason_of(error)})") from None


def directions_of_adapter(adapter: Adapter) -> dict[str, Tensor]:
    """Key name -> orthonormal directions (n, k), float32, of the inputs that an adapter answers to, by weight; of a
    layer that it does not change, none.

    :raises DeftError: when they depend on the base model
    """
    found: dict[str, Tensor] = {}
    kept = whole = 0.0
    for name, change in progress(list(adapter.changes.items()), "finding directions"):
        exact = _decomposed(change, f"keep={adapter.source}: {name}")
        directions = exact.leading_inputs(1.0, most_directions(exact.right.shape[1], DIRECTIONS))
        squares = exact.values.square()
        kept, whole = kept + float(squares[: directions.shape[1]].sum()), whole + float(squares.sum())
        if directions.shape[1]:
            found[name] = directions.float()
    if not found:
        raise DeftError(f"keep={adapter.source}: an adapter that changes nothing; nothing is to be kept")
    if kept < 0.999 * whole:
        logger.warning(f"keep={adapter.source}: {kept / whole:.1%} of its square is in the directions that are kept")
    return found


def _decomposed(change: Change, source: str) -> Decomposed:
    """:raises DeftError: when it depends on the base model, or is not finite"""
    if isinstance(change, deft_formats.OnBase):
        raise DeftError(f"{source}: depends on the base model ({change.kind}); save it as a LoRA, and give that")
    with naming(source):
        if isinstance(change, deft_formats.Dense):
            change, _ = deft_factors.approximated(change.delta(), change.shape[1:], 2 * DIRECTIONS)
        return deft_factors.decomposed(change.double())
