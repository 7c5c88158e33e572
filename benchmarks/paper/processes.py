"""Several processes of one run, on one machine or more: each does its share, and waits where it needs the others'.

They are started by accelerate or torchrun, whose names in the environment say which of them this one is, or by
`--jobs`. The trainer must not know of it, since each trains adapters of its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

from networks.deft_config import DeftError

T = TypeVar("T")
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE")
_CPU = "ACCELERATE_USE_CPU"
_LONGEST = timedelta(days=7)  # that shares may differ by


class Together(Protocol):
    """Which of the processes this one is."""

    index: int
    number: int

    def wait(self, place: str) -> None:
        """Until all have come to this place, which each passes as often as the others."""
        ...

    @property
    def first(self) -> bool:
        """Whether it is the one that writes what there is but once."""
        ...


@dataclass
class Alone:
    """One process."""

    index: int = 0
    number: int = 1
    first: bool = True

    def wait(self, place: str) -> None:
        """Nobody is to come."""


class Several:
    """One of several, which meet in a store of torch's."""

    def __init__(self, store: Any, index: int, number: int):
        self.store, self.index, self.number = store, index, number
        self.passed = 0

    @property
    def first(self) -> bool:
        """See `Together`."""
        return self.index == 0

    def wait(self, place: str) -> None:
        """See `Together`."""
        self.passed += 1
        here = [f"{place}/{self.passed}/{i}" for i in range(self.number)]
        self.store.set(here[self.index], "")
        while not self.store.check(here):
            time.sleep(0.2)


def join() -> Together:
    """Finds the others, and takes this process's own GPU; to be called before torch has seen any."""
    number = int(os.environ.get("WORLD_SIZE", "1"))
    if number == 1:
        return Alone()
    import torch

    local = int(os.environ.get("LOCAL_RANK", "0"))
    store, index, number = next(torch.distributed.rendezvous("env://", timeout=_LONGEST))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    gpus = gpus if gpus != [""] else [str(i) for i in range(torch.cuda.device_count())]
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[local % len(gpus)]
    for name in _NAMES:  # the trainer would share its steps out
        os.environ.pop(name, None)
    if index:
        os.environ["TQDM_DISABLE"] = "1"
    return Several(store, index, number)


@contextlib.contextmanager
def on(device: str | None) -> Iterator[None]:
    """Within it, accelerate takes this device; None: a GPU where there is one.

    :raises DeftError: for a GPU where there is none
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise DeftError("--device cuda: torch finds no GPU")
    before = os.environ.get(_CPU)
    try:
        if device == "cpu":
            os.environ[_CPU] = "true"
        yield
    finally:
        if device == "cpu":
            os.environ.pop(_CPU)
            os.environ |= {} if before is None else {_CPU: before}


def share(things: Sequence[T], together: Together) -> list[T]:
    """This process's part of them; all parts together are the whole, and none overlap."""
    return list(things[together.index :: together.number])


def start(jobs: int, argv: Sequence[str]) -> int:
    """This script again, in so many processes; the first exit code that is not 0, at which the others are ended.

    :param argv: its options
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(jobs)}
    if os.name == "nt":
        common["USE_LIBUV"] = "0"  # torch for Windows is built without it
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    running = [
        subprocess.Popen([sys.executable, sys.argv[0], *argv], env=common | {"RANK": str(i), "LOCAL_RANK": str(i)})
        for i in range(jobs)
    ]
    try:
        while True:
            codes = [one.poll() for one in running]
            if any(codes) or all(code == 0 for code in codes):
                return next((code for code in codes if code), 0)
            time.sleep(0.2)
    except KeyboardInterrupt:  # which they have had as well, and save by
        for one in running:
            one.wait()
        raise
    finally:
        for one in running:
            if one.poll() is None:
                one.terminate()
        for one in running:
            one.wait()
