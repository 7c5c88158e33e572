"""Entries of a cache that are not there yet: made in batches, by as many processes and runs as want them."""

from __future__ import annotations

import math
import os
import random
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from library.data.cache import Entries
from networks.deft_progress import Bar

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")

WORKERS = 4  # threads that load


def build(
    store: Entries,
    wanted: Mapping[str, Item],
    load: Callable[[Item], Loaded],
    make: Callable[[list[str], list[Loaded]], Sequence[Mapping[str, Tensor]]],
    at_once: int = 1,
    *,
    what: str,
    unit: str,
    alike: Callable[[Item], Hashable] = lambda item: None,
    check: bool = True,
    process_index: int = 0,
    num_processes: int = 1,
) -> dict[str, Exception]:
    """Makes what is missing or damaged. It can be ended at any moment, and goes on from there.

    Every process of a training calls this with the same entries, begins with its share, and returns when all are there;
    none has to wait for another. Independent runs that build the same at once share the work too.

    Batches are made of all that is wanted, not of what is missing: what a batch's size does to rounding is then the
    same whether a run was interrupted or not. So `make` must not draw from a generator that others draw from, either:
    see `cache.generator_of`.

    :param wanted: keys -> what their entries are made of
    :param load: an item's content, in threads, while others are made; its errors cost that item alone
    :param make: the entries of a batch, of its keys and contents
    :param at_once: items of a batch
    :param what: the progress bar's title, and `unit` what it counts
    :param alike: items can stand in one batch when this is equal for them
    :param check: whether entries that are there are verified, see `Entries.has`
    :returns: keys that could not be made, in the order of `wanted`, with the reason: what `load` raised, or that the
        result was not finite
    """
    workers = min(WORKERS, os.cpu_count() or 1)
    failed: dict[str, Exception] = {}

    def missing(batch: list[str]) -> list[str]:
        return [key for key in batch if key in absent and key not in failed and not store.has(key, check)]

    def start(batch: list[str]) -> list[Future[Loaded]]:
        return [pool.submit(load, wanted[key]) for key in batch] if missing(batch) else []

    with ThreadPoolExecutor(workers) as pool:
        absent = _absent(store, list(wanted), check, pool, unit)
        order = _order(_batches(wanted, at_once, alike), absent, process_index, num_processes)
        with Bar(len(absent), what, unit) as bar:
            for batch, futures in _ahead(order, start, math.ceil(2 * workers / at_once)):
                contents = _contents(batch, futures, failed, absent)
                if contents and (still := missing(batch)):
                    for key, tensors in zip(contents, make(list(contents), list(contents.values())), strict=True):
                        if key in still and all(map(_is_finite, tensors.values())):
                            store.write(key, tensors)
                        elif key in still:
                            failed[key] = ArithmeticError("what comes of it is not finite")
                bar.add(sum(key in absent for key in batch))
    return {key: failed[key] for key in wanted if key in failed}


def _absent(store: Entries, keys: list[str], check: bool, pool: ThreadPoolExecutor, unit: str) -> set[str]:
    absent = set()
    with Bar(len(keys), "checking caches", unit) as bar:
        for key, there in zip(keys, pool.map(lambda key: store.has(key, check), keys), strict=True):
            if not there:
                absent.add(key)
            bar.add(1)
    return absent


def _batches(wanted: Mapping[str, Item], at_once: int, alike: Callable[[Item], Hashable]) -> list[list[str]]:
    groups: dict[Hashable, list[str]] = {}
    for key, item in wanted.items():
        groups.setdefault(alike(item), []).append(key)
    return [group[i : i + at_once] for group in groups.values() for i in range(0, len(group), at_once)]


def _order(batches: list[list[str]], absent: set[str], process_index: int, num_processes: int) -> list[list[str]]:
    """Those with something to make: a process's own ones, then the others'. Each part is shuffled, so that runs that
    know nothing of each other seldom make the same batch at the same time."""
    own: list[list[str]] = []
    others: list[list[str]] = []
    for i, batch in enumerate(batches):
        if not absent.isdisjoint(batch):
            (own if i % num_processes == process_index else others).append(batch)
    shuffle = random.Random(os.urandom(16)).shuffle
    shuffle(own)
    shuffle(others)
    return own + others


def _ahead(
    batches: list[list[str]], start: Callable[[list[str]], list[Future[Loaded]]], depth: int
) -> Iterator[tuple[list[str], list[Future[Loaded]]]]:
    """Each batch with what it has started, when so many more have been started."""
    waiting: deque[tuple[list[str], list[Future[Loaded]]]] = deque()
    for batch in batches:
        waiting.append((batch, start(batch)))
        if len(waiting) > depth:
            yield waiting.popleft()
    yield from waiting


def _contents(
    batch: list[str], futures: list[Future[Loaded]], failed: dict[str, Exception], absent: set[str]
) -> dict[str, Loaded]:
    """Of all that could be loaded; the others are noted."""
    contents = {}
    for key, future in zip(batch, futures, strict=False):  # none were started where nothing was missing
        try:
            contents[key] = future.result()
        except Exception as error:  # whatever Pillow raises for a file costs that file at most
            if key in absent:
                failed[key] = error
    return contents


def _is_finite(tensor: Tensor) -> bool:
    return tensor.element_size() == 1 or bool(torch.isfinite(tensor).all())  # 8 bits: whole numbers, or cast from more
