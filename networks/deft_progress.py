"""A bar on work that takes more than a few seconds, in the main process, where tqdm is installed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

try:
    from tqdm import tqdm
except ImportError:  # networks/ needs torch and safetensors alone
    tqdm = None

DELAY = 2.0  # seconds before a bar appears

T = TypeVar("T")


def progress(items: Sequence[T], what: str, unit: str = "it") -> Iterable[T]:
    """The items, one by one, with a bar beside them."""
    return items if tqdm is None else tqdm(items, **_shown(what, unit))


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """Torch with one thread: on many small tensors several wait for one another, which costs more than they do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Bar:
    """A bar that is moved by hand; to be used in a `with` block.

    :param total: of what `add` adds up
    """

    def __init__(self, total: int, what: str, unit: str = "it", **options: Any) -> None:
        self._bar = None if tqdm is None else tqdm(total=total, **_shown(what, unit), **options)

    def add(self, number: int) -> None:
        """So much more is done."""
        if self._bar is not None:
            with contextlib.suppress(OSError):  # a terminal that is gone, a full disk behind 2> FILE
                self._bar.update(number)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()


def _shown(what: str, unit: str) -> dict[str, Any]:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    other = distributed and torch.distributed.get_rank() > 0
    return {"desc": what, "unit": unit, "delay": DELAY, "leave": False, "disable": other}
