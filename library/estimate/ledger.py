"""Counts the bytes of a card that are in use, by what they are for, and the time that its work takes."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from library.estimate.pretending import CARD

aten = torch.ops.aten
BLOCK = 512  # bytes that torch's CUDA allocator gives out at least, and multiples of which
OTHER = "activations"
# taken once from torch's allocator for cuBLAS, by a Hopper card (aten/src/ATen/cuda/CUDABlas.cpp, 32 MiB)
WORKSPACE = 32 * 2**20


@dataclass
class Work:
    """What a pass has the card do.

    :param flops: by dtype of the result
    :param bytes: that are read and written
    :param operations: that are started, one by one
    :param busy: seconds of the operations by themselves, each by what bounds it
    """

    flops: Counter[torch.dtype] = field(default_factory=Counter)
    bytes: int = 0
    operations: int = 0
    busy: float = 0.0

    def add(self, other: Work, times: float) -> None:
        """What is done so often."""
        for dtype, number in other.flops.items():
            self.flops[dtype] += int(number * times)
        self.bytes += int(other.bytes * times)
        self.operations += int(other.operations * times)
        self.busy += other.busy * times


@dataclass(frozen=True)
class Rates:
    """What the card does in a second.

    :param flops: of matrix products, by dtype
    :param bytes: read or written
    :param operations: that the program starts
    """

    flops: Mapping[torch.dtype, float]
    bytes: float
    operations: float


class Ledger(TorchDispatchMode):
    """Within it, everything that is made on `CARD` is counted until it is gone; see `pretending.card`.

    :param rates: of a card; None where its work is not asked for
    """

    def __init__(self, rates: Rates | None):
        super().__init__()
        self.rates, self.work = rates, Work()
        self.now: Counter[str] = Counter()
        self.total = self.peak = 0
        self.at_peak: dict[str, int] = {}
        self._known: dict[int, tuple[Any, int, str]] = {}  # a storage's address -> weak reference, bytes, what for

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # nothing is compiled here, and saying so at each operation takes its time
        return False

    def start(self) -> None:
        """Begins a phase: what is there stays, its peak and its work are counted anew."""
        self.work, self.peak, self.at_peak = Work(), self.total, dict(self.now)

    def claim(self, what: str, tensors: Iterable[Tensor]) -> None:
        """These are for that."""
        for tensor in tensors:
            known = self._known.get(tensor.untyped_storage()._cdata) if tensor.device == CARD else None
            if known is not None and known[2] != what:
                reference, size, before = known
                self._known[tensor.untyped_storage()._cdata] = reference, size, what
                self.now[before] -= size
                self.now[what] += size
        self._look()

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return _answer(args[0])
        if func is aten.nonzero.default:  # a sampler asks where a step stands: in the first place
            return torch.tensor([[0] * args[0].dim()])
        result = func(*args, **kwargs)
        made = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
        for one in made:
            if one.device.type == "meta":  # of a function that is made of others, which C++ has asked
                one.fake_device = CARD  # type: ignore[attr-defined]
            if one.device == CARD:
                self._count(one)
        if func is aten.convolution.default and result.dtype == torch.float32 and result.device == CARD:
            self._passing(args[0].nbytes + result.nbytes)
        packet = func._overloadpacket
        if packet in (aten.any, aten.all):
            for one in made:
                one.is_all = packet is aten.all  # type: ignore[attr-defined]
        if self.rates is not None and not func.is_view:
            self._work_of(self.rates, func, args, kwargs, result, made)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._known:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        if not size:
            return

        def gone(_: Any) -> None:
            if address not in self._known:
                return
            _, size, what = self._known.pop(address)
            self.now[what] -= size
            self.total -= size

        self._known[address] = weakref.ref(storage, gone), size, OTHER
        self.now[OTHER] += size
        self.total += size
        if self.total > self.peak:
            self.peak = self.total
            self.at_peak = dict(self.now)

    def _passing(self, size: int) -> None:
        """What a convolution of float32 takes beside its input and output: cuDNN puts both into another order, for
        tensor cores. Measured on an H100: without it, the peaks of the VAE were 15% too low."""
        if self.total + size > self.peak:
            self.peak = self.total + size
            self.at_peak = {**self.now, "cuDNN": size}

    def forget(self) -> None:
        """No more is counted."""
        self._known.clear()

    def _look(self) -> None:
        if self.total >= self.peak:
            self.peak, self.at_peak = self.total, dict(self.now)

    def _work_of(self, rates: Rates, func: Any, args: Any, kwargs: Any, result: Any, made: list[Tensor]) -> None:
        read = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        there = [one for one in (*read, *made) if one.device == CARD]
        if not there:
            return
        work = self.work
        moved = sum(one.numel() * one.element_size() for one in there)
        work.bytes += moved
        work.operations += 1
        count = flop_registry.get(func._overloadpacket) or _IN_PLACE.get(func._overloadpacket)
        seconds = moved / rates.bytes
        if count is not None:
            flops, dtype = int(count(*args, **kwargs, out_val=result)), made[0].dtype if made else there[0].dtype
            work.flops[dtype] += flops
            seconds = max(seconds, flops / rates.flops.get(dtype, rates.flops[torch.float32]))
        work.busy += seconds


_IN_PLACE: dict[Any, Any] = {}
for _theirs, _ours in ((aten.addmm, aten.addmm_), (aten.baddbmm, aten.baddbmm_)):
    _IN_PLACE[_ours] = flop_registry[_theirs]


def _answer(tensor: Tensor) -> Any:
    """Of a question about values: those of small tensors that come from Python are known; else everything is finite and
    good, nothing is wrong."""
    known = getattr(tensor, "constant", None)
    if known is not None:
        return known.item()
    if tensor.dtype == torch.bool:
        return getattr(tensor, "is_all", True)
    return 1.0 if tensor.is_floating_point() else 1
