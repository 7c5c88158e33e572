"""The input directions that a model uses while it draws, for the option `keep`."""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.deft_config import DeftError, read_text
from networks.deft_progress import progress
from networks.deft_targets import Target

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


def inputs_of(layer: nn.Module, x: Tensor) -> Tensor:
    """What a Linear layer or a convolution multiplies its weight with, as (number, n)."""
    if isinstance(layer, nn.Conv2d):
        padded = F.pad(x, layer._reversed_padding_repeated_twice)  # numbers also for a padding such as "same"
        return F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride).mT.flatten(0, 1)
    return x.reshape(-1, x.shape[-1])


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
            X = inputs_of(layer, args[0].detach())
            if len(X) > ROWS:
                X = X[torch.randint(len(X), (ROWS,), generator=self._generator).to(X.device)]
            self._sketch(name, X.device).add(X)

    def _sketch(self, name: str, device: torch.device) -> Sketch:
        if name not in self.sketches:
            n = self.layers[name].shape[1]
            some = min(self.k, max(1, n // 4))
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
