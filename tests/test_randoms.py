"""The random numbers of a batch: whose they are depends on seed, step, place and purpose, and on nothing else."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from library.training.randoms import Purpose, Randoms

DRAWS = {
    "normal": lambda randoms, purpose=Purpose.NOISE: randoms.normal(purpose, (3, 5)),
    "uniform": lambda randoms, purpose=Purpose.NOISE: randoms.uniform(purpose, (3, 5)),
    "integers": lambda randoms, purpose=Purpose.NOISE: randoms.integers(purpose, 0, 1 << 40),
    "generators": lambda randoms, purpose=Purpose.NOISE: torch.stack(
        [torch.rand(5, generator=generator) for generator in randoms.generators(purpose)]
    ),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_a_batch_is_its_pictures_wherever_they_are_drawn(draw):
    """Two processes with two pictures each, or one with four, in whatever order; and each alone."""
    four = draw(Randoms(7, 3, range(4)))
    assert torch.equal(four, torch.cat([draw(Randoms(7, 3, [0, 1])), draw(Randoms(7, 3, [2, 3]))]))
    assert torch.equal(four.flip(0), draw(Randoms(7, 3, [3, 2, 1, 0])))
    assert torch.equal(four, torch.cat([draw(one) for one in Randoms(7, 3, range(4)).each()]))


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_seed_step_place_and_purpose_each_make_other_numbers(draw):
    every = list(product((0, 1, 2**32 - 1), (0, 1, 10**6), (0, 1, 4095), Purpose))
    drawn = {tuple(draw(Randoms(seed, step, [at]), purpose).flatten().tolist()) for seed, step, at, purpose in every}
    assert len(drawn) == len(every)


def test_the_stream_is_philoxs():
    """As numpy draws it for that key and counter; so a resumed run needs no state but the step."""
    stream = np.random.Generator(np.random.Philox(key=5 + (int(Purpose.OFFSET) << 64), counter=(2 << 128) + (9 << 192)))
    expected = stream.standard_normal(6, np.float32)
    assert torch.equal(Randoms(5, 9, [2]).normal(Purpose.OFFSET, (6,))[0], torch.from_numpy(expected))


def test_distributions_and_types():
    randoms = Randoms(0, 0, range(64))
    normal, uniform = randoms.normal(Purpose.NOISE, (4, 16, 16)), randoms.uniform(Purpose.NOISE, (1000,))
    whole = randoms.integers(Purpose.NOISE, 3, 6)
    assert normal.shape == (64, 4, 16, 16)
    assert normal.dtype == uniform.dtype == torch.float32
    assert whole.dtype == torch.int64
    assert abs(float(normal.mean())) < 0.02
    assert float(normal.std()) == pytest.approx(1, abs=0.01)
    assert float(normal.pow(4).mean()) == pytest.approx(3, abs=0.1)
    assert float(uniform.min()) >= 0
    assert float(uniform.max()) < 1
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.01)
    assert set(whole.tolist()) == {3, 4, 5}
    pictures = normal.flatten(1)
    between = (pictures @ pictures.T / pictures.shape[1]).fill_diagonal_(0)
    assert float(between.abs().max()) < 0.2  # 6 standard deviations: pictures have nothing in common


def test_layers_draw_alike_for_the_same_place():
    def dropped(*args):
        Randoms(*args).seed_torch()
        return tuple(torch.nn.functional.dropout(torch.ones(64)).tolist())

    assert dropped(1, 2, [4, 5]) == dropped(1, 2, [4, 5])
    assert len({dropped(1, 2, [0]), dropped(1, 2, [1]), dropped(1, 3, [0]), dropped(2, 2, [0])}) == 4


def test_no_two_purposes_have_one_number():
    assert len({purpose.value for purpose in Purpose}) == len(Purpose.__members__)
