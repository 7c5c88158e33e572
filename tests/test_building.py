"""Building a cache, which can be killed at any moment, by as many as want it."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.data import cache
from library.data.building import build
from library.data.cache import Memory, Store, generator_of, key_of
from tests.test_cache import equal, warnings_in

forks = pytest.mark.skipif(sys.platform != "linux", reason="children are forks, which share what is imported")


N, AT_ONCE = 40, 3
WANTED = {key_of(item=i): i for i in range(N)}


def load(item: int) -> int:
    return item * item


def make(keys: list[str], contents: list[int]) -> list[dict[str, Tensor]]:
    """Differs with the batch, as rounding does."""
    return [{"own": torch.tensor([content, sum(contents)]), "noise": torch.randn(5, generator=generator_of(key))}
            for key, content in zip(keys, contents, strict=True)]  # fmt: skip


def slow(keys: list[str], contents: list[int]) -> list[dict[str, Tensor]]:
    time.sleep(0.01)
    return make(keys, contents)


def kind(item: int) -> bool:
    return item % 4 == 0


def built(store, wanted=WANTED, load=load, make=make, **options):
    options = {"what": "caching", "unit": "pictures", "alike": kind} | options
    return build(store, wanted, load, make, AT_ONCE, **options)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "cache")


@pytest.fixture(scope="module")
def undisturbed() -> Memory:
    store = Memory()
    assert built(store) == {}
    return store


def assert_same(store, undisturbed) -> None:
    for key in WANTED:
        assert equal(store.read(key), undisturbed.read(key)), WANTED[key]


def counting(calls: list[int]):
    def counted(keys, contents):
        calls.append(len(keys))
        return make(keys, contents)

    return counted


def test_batches_hold_items_of_one_kind_and_everything_once(store, undisturbed):
    seen: list[list[int]] = []

    def look(keys, contents):
        seen.append([WANTED[key] for key in keys])
        assert contents == [load(WANTED[key]) for key in keys]
        return make(keys, contents)

    assert built(store, make=look) == {}
    assert sorted(itertools.chain.from_iterable(seen)) == list(range(N))
    assert all(len({kind(item) for item in batch}) == 1 for batch in seen)
    assert sorted(map(len, seen)) == [1] + [3] * 13
    assert_same(store, undisturbed)


@pytest.mark.parametrize("check", [True, False])
def test_what_is_there_is_not_made_again(store, check):
    def fail(*args):
        raise AssertionError

    built(store)
    assert built(store, load=fail, make=fail, check=check) == {}
    assert build(store, {}, fail, fail, what="", unit="") == {}


def test_what_is_damaged_or_lost_is_made_again(store, undisturbed):
    built(store)
    damages = random.Random(0).sample(sorted(WANTED), 6)
    for i, key in enumerate(damages):
        file = store._file(key)
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes((content, b"", content[:-1])[i % 3])
    store._file(damages[0]).unlink()
    calls: list[int] = []
    assert built(store, make=counting(calls)) == {}
    assert 0 < len(calls) <= len(damages)
    assert_same(store, undisturbed)


def test_items_that_cannot_be_loaded_or_are_not_finite_are_named_and_left_out(store):
    def broken(item: int) -> int:
        if item in (5, 8):
            raise OSError(f"item {item} is broken")
        return load(item)

    def overflowing(keys, contents):
        return [{"a": torch.tensor([1.0, float("nan") if WANTED[key] == 6 else content])}
                for key, content in zip(keys, contents, strict=True)]  # fmt: skip

    for entries in (store, Memory()):
        failed = built(entries, load=broken, make=overflowing)
        assert [(WANTED[key], str(error)) for key, error in failed.items()] == [
            (5, "item 5 is broken"),
            (6, "what comes of it is not finite"),
            (8, "item 8 is broken"),
        ]
        assert [WANTED[key] for key in WANTED if not entries.has(key)] == [5, 6, 8]
    assert built(store) == {}  # as soon as they can be


def test_a_fault_in_the_model_ends_the_building(store):
    def fail(keys, contents):
        raise RuntimeError("CUDA out of memory")

    with pytest.raises(RuntimeError, match="CUDA"):
        built(store, make=fail)


def test_a_full_disk_costs_no_entry(store, undisturbed, caplog, monkeypatch):
    left, replace = [10], os.replace

    def full(*args):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(*args)

    monkeypatch.setattr(cache.os, "replace", full)
    assert built(store) == {}
    assert_same(store, undisturbed)
    assert len(warnings_in(caplog)) == 1
    assert sum(Store(store.folder).has(key) for key in WANTED) == 10


def test_little_is_loaded_ahead(store):
    """Memory is bounded however many are wanted."""
    open_now, most = [0], [0]

    def opening(item):
        open_now[0] += 1
        most[0] = max(most[0], open_now[0])
        return item

    def closing(keys, contents):
        time.sleep(0.005)
        open_now[0] -= len(keys)
        return make(keys, contents)

    built(store, {key_of(more=i): i for i in range(120)}, opening, closing)
    assert most[0] <= 24


@pytest.mark.parametrize("shared", [True, False])
def test_processes_of_one_training_each_end_with_everything(store, undisturbed, shared):
    """One behind the other here; those whose entries are not shared make all themselves."""
    calls: list[int] = []
    for index in range(3):
        entries = store if shared else Memory()
        assert built(entries, make=counting(calls), process_index=index, num_processes=3) == {}
        assert_same(entries, undisturbed)
    assert sum(calls) == (N if shared else 3 * N)


def test_a_process_begins_with_its_share(store):
    class Enough(Exception):
        pass

    begun: list[tuple[str, ...]] = []
    for index in range(3):
        mine: list[tuple[str, ...]] = []

        def some(keys, contents, mine=mine):
            mine.append(tuple(keys))
            if len(mine) == 4:
                raise Enough
            return make(keys, contents)

        with pytest.raises(Enough):
            built(Memory(), make=some, process_index=index, num_processes=3)
        begun += mine
    assert len(set(begun)) == 12  # of 14 batches; none in two shares


@pytest.fixture(scope="module")
def clean():
    """Starts children as forks of a process without threads: those here may hold locks that no child gives back."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_building"])
    first = context.Process(target=os.getpid)
    first.start()
    first.join()
    return context


def build_slowly(folder: Path, begun, counts) -> None:
    def counted(keys, contents):
        if counts is not None:
            with counts.get_lock():
                counts.value += len(keys)
        return slow(keys, contents)

    begun.set()
    os._exit(bool(built(Store(folder), make=counted)))


def started(clean, folder: Path, counts=None) -> multiprocessing.Process:
    """A run that has begun by now: how long a process takes to start counts for nothing."""
    begun = clean.Event()
    process = clean.Process(target=build_slowly, args=(folder, begun, counts))
    process.start()
    assert begun.wait(60)
    return process


@forks
def test_killed_at_twenty_moments_and_completed(clean, tmp_path, undisturbed):
    """A run takes about 0.15 s; what is there behind a kill is whole, and what is made then is what would have been."""
    moments, incomplete = random.Random(1), 0
    for i in range(20):
        folder = tmp_path / str(i)
        process = started(clean, folder)
        time.sleep(moments.uniform(0.01, 0.15))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        store = Store(folder)
        there = [key for key in WANTED if store._file(key).exists()]
        assert all(equal(store.read(key), undisturbed.read(key)) for key in there)
        incomplete += 0 < len(there) < N
        assert built(store) == {}
        assert_same(store, undisturbed)
    assert incomplete >= 5


@forks
def test_one_building_killed_over_and_over_goes_on(clean, store, undisturbed):
    there = -1
    for _ in range(40):
        process = started(clean, store.folder)
        process.join(0.06)
        process.kill()
        process.join()
        now = sum(store._file(key).exists() for key in WANTED)
        assert now >= there
        there = now
        if process.exitcode == 0:
            break
    assert process.exitcode == 0
    assert_same(store, undisturbed)


@forks
def test_runs_that_build_one_cache_at_once_share_the_work(clean, tmp_path, undisturbed):
    """Two, three times: about 1.2 times what one makes; 1.7 times if both went in one order."""
    counts = clean.Value("i", 0)
    for i in range(3):
        store = Store(tmp_path / str(i))
        runs = [started(clean, store.folder, counts) for _ in range(2)]
        for run in runs:
            run.join(300)
            assert run.exitcode == 0
        assert_same(store, undisturbed)
        assert not list((store.folder / "unfinished").iterdir())
    assert 3 * N <= counts.value < 1.45 * 3 * N
