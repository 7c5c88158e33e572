"""The random numbers of a batch, the same whoever draws them: one process or several, a fresh run or a resumed one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Purpose(IntEnum):
    """What numbers are drawn for. Each has a stream of its own: one option's draws move no other's.

    The numbers are part of the streams' keys: a new purpose takes a new one, and none is given away again.
    """

    LAYERS = 0  # what layers draw for themselves, as dropout
    NOISE = 1
    TIMESTEPS = 2
    OFFSET = 3
    OFFSET_STRENGTH = 4
    MULTIRES = 5
    MULTIRES_RATIOS = 6
    PERTURBATION = 7
    PERTURBATION_STRENGTH = 8
    LATENTS = 9  # of pictures that are encoded in every step


@dataclass(frozen=True)
class Randoms:
    """Draws every picture's numbers from the seed, the step and the picture's place, by a counter-based generator.

    All are drawn on the CPU, in float32 where they are not whole.

    :param seed: from 0 to 2**64 - 1
    :param step: of the optimizer
    :param places: of this batch's pictures among all that the step sees, over processes and accumulated batches
    """

    seed: int
    step: int
    places: Sequence[int]

    def normal(self, purpose: Purpose, shape: Sequence[int] = ()) -> Tensor:
        """(b, *shape) from N(0, 1)."""
        draws = [stream.standard_normal(tuple(shape), np.float32) for stream in self._streams(purpose)]
        return torch.from_numpy(np.stack(draws))

    def uniform(self, purpose: Purpose, shape: Sequence[int] = ()) -> Tensor:
        """(b, *shape) from [0, 1)."""
        draws = [stream.random(tuple(shape), np.float32) for stream in self._streams(purpose)]
        return torch.from_numpy(np.stack(draws))

    def integers(self, purpose: Purpose, low: int, high: int) -> Tensor:
        """(b,) int64 from low to high - 1."""
        return torch.from_numpy(np.stack([stream.integers(low, high) for stream in self._streams(purpose)]))

    def generators(self, purpose: Purpose) -> list[torch.Generator]:
        """One of torch's a picture, for functions that draw by themselves."""
        return [torch.Generator().manual_seed(_seed(stream)) for stream in self._streams(purpose)]

    def each(self) -> list[Randoms]:
        """One for each picture, where pictures differ in what is drawn."""
        return [replace(self, places=(place,)) for place in self.places]

    def seed_torch(self) -> None:
        """Seeds torch's global generators, which layers draw from, by the first picture's place."""
        torch.manual_seed(_seed(next(self._streams(Purpose.LAYERS))))

    def _streams(self, purpose: Purpose) -> Iterator[np.random.Generator]:
        key = np.array([self.seed, purpose], np.uint64)
        for place in self.places:  # drawing counts the first word up, and reaches the second after 2**64 blocks
            counter = np.array([0, 0, place, self.step], np.uint64)
            yield np.random.Generator(np.random.Philox(counter=counter, key=key))


def _seed(stream: np.random.Generator) -> int:
    return int(stream.integers(2**63))
