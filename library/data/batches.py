"""An epoch's batches: which pictures stand in each, in what order, and which process gets them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from accelerate.data_loader import DataLoaderShard
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from library.data.buckets import Epochs, dataset_seed, mixed
from library.data.masks import stacked
from library.data.plan import Plan


class Gone(Exception):
    """What was there when the training began cannot be read any more."""


class Turn(NamedTuple):
    """One picture's appearance in an epoch.

    :param dataset: its number in the plan
    :param picture: its number in the data set
    :param epoch: from 1
    :param place: in the epoch's order, over all data sets and processes
    :param step: of the optimizer, that are done before it
    :param steps: of the whole training
    """

    dataset: int
    picture: int
    epoch: int
    place: int
    step: int
    steps: int


class Example(NamedTuple):
    """One picture as it is trained on. Either `latents` or `pixels` is given.

    :param latents: (c, h, w), float32
    :param pixels: (3, height, width) in [-1, 1], of pictures that change from epoch to epoch
    :param sizes: (6,), see `Batch`
    :param mask: (1, h, w) from 0 to 1, of latents; None for all ones
    :param weight: of its loss
    :param preserved: whether it is to be answered as without the adapter
    :param multiplier: of the adapter
    :param inputs: latents (c, h, w) of the pictures that the caption speaks of, float32
    """

    latents: Tensor | None
    pixels: Tensor | None
    caption: str
    sizes: Tensor
    mask: Tensor | None = None
    weight: float = 1.0
    preserved: bool = False
    multiplier: float = 1.0
    inputs: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Batch:
    """What a step is made of, b pictures of one size; none, where a process has nothing to do while others have.

    :param latents: (b, c, h, w), float32; None where `pixels` are given
    :param pixels: (b, 3, height, width) in [-1, 1]
    :param sizes: (b, 6) in pixels: height and width of the file, top and left of the crop in the scaled picture, height
        and width of what is left
    :param masks: (b, 1, h, w) from 0 to 1; None for all ones
    :param weights: (b,) of the pictures' losses
    :param preserved: those that are to be answered as without the adapter
    :param multiplier: of the adapter
    :param inputs: of each caption, see `Example`; empty where no caption has any
    :param share: of this batch in the mean over processes; 1 but in an epoch's last round
    """

    latents: Tensor | None
    captions: list[str]
    sizes: Tensor
    pixels: Tensor | None = None
    masks: Tensor | None = None
    weights: Tensor | None = None
    preserved: tuple[int, ...] = ()
    multiplier: float = 1.0
    share: float = 1.0
    inputs: tuple[tuple[Tensor, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.captions)


def joined(examples: Sequence[Example]) -> Batch:
    """A batch of pictures of one size."""
    if not examples:
        return Batch(None, [], torch.empty(0, 6))
    latents, pixels = ([one for one in column if one is not None] for column in
                       zip(*((example.latents, example.pixels) for example in examples), strict=True))  # fmt: skip
    masks = [example.mask for example in examples]
    height, width = next((mask.shape[-2:] for mask in masks if mask is not None), (0, 0))
    return Batch(
        torch.stack(latents) if latents else None,
        [example.caption for example in examples],
        torch.stack([example.sizes for example in examples]),
        torch.stack(pixels) if pixels else None,
        stacked(masks, (height, width)),
        torch.tensor([example.weight for example in examples]),
        tuple(i for i, example in enumerate(examples) if example.preserved),
        examples[0].multiplier,
        inputs=tuple(example.inputs for example in examples) if any(example.inputs for example in examples) else (),
    )


class Loader:
    """An epoch's batches for one process. What an epoch holds depends on the seed and its number alone, and who gets
    which batch on the number of processes too: no picture is lost or comes twice.

    :param examples: a `Turn` -> its `Example`
    :param seed: of all orders
    :param accumulated: batches of a step
    :param shuffle: False for a validation
    :param steps: of the whole training, for captions that change with them
    """

    def __init__(
        self,
        plan: Plan,
        examples: TorchDataset,
        seed: int,
        process: int = 0,
        processes: int = 1,
        accumulated: int = 1,
        shuffle: bool = True,
        steps: int = 1,
    ):
        self.plan, self.examples, self.seed = plan, examples, seed
        self.process, self.processes, self.accumulated = process, processes, accumulated
        self.shuffle, self.steps = shuffle, steps
        self.batch_size = max(dataset.options.batch_size for dataset in plan)
        self._epochs = [
            Epochs(
                [picture.alike for picture in dataset.pictures],
                [picture.repeats for picture in dataset.pictures],
                dataset.options.batch_size,
                dataset_seed(seed),
            )
            for dataset in plan
        ]
        self.total = len(self.order(1))  # of all processes

    def __len__(self) -> int:
        """Batches of an epoch in each process."""
        return -(-self.total // self.processes)

    @property
    def steps_an_epoch(self) -> int:
        """Of the optimizer."""
        return -(-len(self) // self.accumulated)

    @property
    def pictures(self) -> int:
        """Of an epoch, with repeats, in all processes."""
        return sum(dataset.appearances for dataset in self.plan)

    def order(self, epoch: int) -> list[list[tuple[int, int]]]:
        """All batches of an epoch: pictures as (data set, picture)."""
        found = [epochs.batches(epoch) if self.shuffle else epochs.in_order() for epochs in self._epochs]
        in_turn = [(number, batch) for number, batches in enumerate(found) for batch in batches]
        order = mixed(found, self.seed, epoch) if self.shuffle else in_turn
        return [[(number, picture) for picture in batch] for number, batch in order]

    def turns(self, epoch: int) -> list[list[Turn]]:
        """The batches of an epoch that this process gets; the last may be empty."""
        steps_before = (epoch - 1) * self.steps_an_epoch
        found, place = [], 0
        for number, batch in enumerate(self.order(epoch)):
            step = steps_before + number // (self.processes * self.accumulated)
            if number % self.processes == self.process:
                found.append([Turn(*one, epoch, place + i, step, self.steps) for i, one in enumerate(batch)])
            place += len(batch)
        return found + [[]] * (len(self) - len(found))

    def epoch(self, number: int, done: int = 0) -> Iterator[Batch]:
        """The batches of an epoch behind the first `done`. While one is used, a thread reads the next."""
        turns = self.turns(number)[done:]
        filled = self.total - (len(self) - 1) * self.processes  # of the last round's batches
        with ThreadPoolExecutor(1, "batches") as thread:
            # it looks one batch ahead, which is so being read when the one before it is given out
            loader = DataLoaderShard(
                _Turns(), device=None, batch_sampler=turns, collate_fn=lambda found: thread.submit(self._batch, found)
            )
            try:
                for i, reading in enumerate(loader, done):
                    batch = reading.result()
                    yield batch if i < len(self) - 1 else replace(batch, share=self.processes / filled)
            finally:
                thread.shutdown(cancel_futures=True)

    def _batch(self, turns: Sequence[Turn]) -> Batch:
        return joined([self.examples[turn] for turn in turns])


class _Turns(TorchDataset):
    """Each is its own example, for a loader that only has to know which batch is the last one."""

    def __getitem__(self, turn: Turn) -> Turn:
        return turn
