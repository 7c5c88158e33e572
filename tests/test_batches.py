"""An epoch's batches, shared out among processes: nothing lost, twice, or of two sizes, and always the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.batches import Example, Loader, Turn, joined
from library.data.buckets import Buckets, Fit
from library.data.plan import Dataset, Picture, Plan
from library.options.rooms import BucketOptions, DatasetOptions, SubsetOptions

SIZES = [(64, 64), (64, 128), (128, 64)]


def plan_with(datasets: list[tuple[int, list[tuple[int, int]]]]) -> Plan:
    """:param datasets: a batch size, and for every picture which of SIZES it has and its repeats"""
    options = BucketOptions((64, 64))
    subset, buckets = SubsetOptions("d"), Buckets(options)
    return tuple(
        Dataset(
            DatasetOptions((subset,), options, batch_size),
            tuple(
                Picture(Path(f"{i}.png"), "a", subset, repeats, SIZES[size], Fit(SIZES[size], SIZES[size]), buckets)
                for i, (size, repeats) in enumerate(pictures)
            ),
        )
        for batch_size, pictures in datasets
    )


class Turns(torch.utils.data.Dataset):
    """Examples that say which turn they are."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, turn: Turn) -> Example:
        return Example(torch.zeros(1), None, f"{turn.dataset} {turn.picture} {turn.place}", torch.zeros(6))


PLANS = st.lists(
    st.tuples(st.integers(1, 4), st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3)), min_size=1, max_size=7)),
    min_size=1,
    max_size=3,
).map(plan_with)


@settings(max_examples=60, deadline=None)
@given(plan=PLANS, processes=st.integers(1, 4), seed=st.integers(0, 2**32 - 1), epoch=st.integers(1, 4))
def test_every_picture_comes_as_often_as_it_is_repeated(plan, processes, seed, epoch):
    loaders = [Loader(plan, Turns(), seed, process, processes) for process in range(processes)]
    turns = [loader.turns(epoch) for loader in loaders]
    assert {len(one) for one in turns} == {len(loaders[0])}
    flat = [turn for one in turns for batch in one for turn in batch]
    assert sorted(turn.place for turn in flat) == list(range(loaders[0].pictures))
    found = Counter((turn.dataset, turn.picture) for turn in flat)
    assert found == {(d, p): one.repeats for d, dataset in enumerate(plan) for p, one in enumerate(dataset.pictures)}
    for batch in (batch for one in turns for batch in one if batch):
        (dataset,) = {turn.dataset for turn in batch}
        assert len({plan[dataset].pictures[turn.picture].fit for turn in batch}) == 1
        assert len(batch) <= plan[dataset].options.batch_size
    assert all(len(one[k]) > 0 for one in turns for k in range(len(one) - 1))  # only the last round may lack some


@settings(max_examples=30, deadline=None)
@given(plan=PLANS, seed=st.integers(0, 99), epoch=st.integers(1, 5), done=st.integers(0, 9))
def test_an_epoch_goes_on_where_it_was_left(plan, seed, epoch, done):
    loader = Loader(plan, Turns(), seed)
    whole = [batch.captions for batch in loader.epoch(epoch)]
    later = Loader(plan, Turns(), seed)
    assert [batch.captions for batch in later.epoch(epoch, done)] == whole[done:]


def test_processes_side_by_side_see_what_one_sees_one_after_the_other():
    plan = plan_with([(2, [(0, 3), (1, 2), (0, 1)]), (1, [(2, 4)])])
    one = [batch for batch in Loader(plan, Turns(), 5, accumulated=2).turns(3) if batch]
    several = [Loader(plan, Turns(), 5, process, 2).turns(3) for process in range(2)]
    assert [batch for pair in zip(*several, strict=True) for batch in pair if batch] == one


def test_what_a_last_round_lacks_does_not_weigh():
    """Five batches in two processes: the mean over both of the last round's loss is that of the one batch."""
    plan = plan_with([(1, [(0, 5)])])
    shares = [[batch.share for batch in Loader(plan, Turns(), 1, process, 2).epoch(1)] for process in range(2)]
    sizes = [[len(batch) for batch in Loader(plan, Turns(), 1, process, 2).epoch(1)] for process in range(2)]
    assert sizes == [[1, 1, 1], [1, 1, 0]]
    assert shares == [[1, 1, 2], [1, 1, 2]]


def test_epochs_and_seeds_differ_and_repeat():
    plan = plan_with([(2, [(i % 3, 1) for i in range(30)])])
    orders = [Loader(plan, Turns(), seed).order(epoch) for seed in (1, 2) for epoch in (1, 2)]
    assert all(one != other for i, one in enumerate(orders) for other in orders[:i])
    assert Loader(plan, Turns(), 2).order(2) == orders[3]


def test_steps_that_are_done_before_a_batch():
    """For captions that change with them: seven batches an epoch, two a step, so four steps an epoch."""
    plan = plan_with([(1, [(0, 7)])])
    loader = Loader(plan, Turns(), 1, accumulated=2, steps=8)
    assert [batch[0].step for batch in loader.turns(1)] == [0, 0, 1, 1, 2, 2, 3]
    assert [batch[0].step for batch in loader.turns(2)] == [4, 4, 5, 5, 6, 6, 7]
    assert {batch[0].steps for batch in loader.turns(2)} == {8}


def test_a_validation_is_in_order():
    plan = plan_with([(2, [(0, 1), (1, 1), (0, 1), (0, 1)])])
    assert Loader(plan, Turns(), 1, shuffle=False).order(1) == [[(0, 0), (0, 2)], [(0, 3)], [(0, 1)]]


def test_masks_of_some_pictures_are_ones_for_the_others():
    one = Example(torch.zeros(4, 2, 2), None, "a", torch.zeros(6), torch.full((1, 2, 2), 0.25))
    other = one._replace(mask=None)
    batch = joined([one, other])
    assert batch.masks is not None
    assert batch.masks[0].eq(0.25).all()
    assert batch.masks[1].eq(1).all()
    assert joined([other, other]).masks is None
    assert len(joined([])) == 0
