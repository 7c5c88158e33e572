"""Learning rate schedules by name, against closed forms, step by step; and what is refused or told."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from library.options.parse import parse
from library.options.rooms import OptimizerOptions
from library.training import optimizers, schedules
from networks.deft_config import DeftError
from tests.test_options import NEEDED

STEPS, RATE = 40, 0.02


def options_of(**changes) -> OptimizerOptions:
    return OptimizerOptions(learning_rate=RATE, **changes)


def rates(options: OptimizerOptions, steps: int = STEPS) -> list[float]:
    """Of every step of a training."""
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = optimizers.optimizer_of(options, [{"params": [parameter], "lr": options.learning_rate}])
    schedule = schedules.schedule_of(options, optimizer, steps)
    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[0])
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return found


def done(step: int, warmup: int) -> float:
    """How much of what follows the warmup."""
    return (step - warmup) / (STEPS - warmup)


def stable_decay(step: int) -> float:
    """10 steps up from a tenth, 20 at the whole rate, 10 down to the tenth along half a cosine."""
    if step < 10:
        return 0.1 + 0.9 * step / 10
    return 1.0 if step < 30 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 30) / 10))


CLOSED_FORMS = {
    "constant": ({}, lambda step: 1.0),
    "constant_with_warmup": ({"lr_warmup_steps": 10}, lambda step: min(1, step / 10)),
    "linear": ({"lr_warmup_steps": 10}, lambda step: min(step / 10, 1 - done(step, 10))),
    "cosine": (
        {"lr_warmup_steps": 0.25},
        lambda step: step / 10 if step < 10 else (1 + math.cos(math.pi * done(step, 10))) / 2,
    ),
    "cosine_with_restarts": (
        {"lr_scheduler_num_cycles": 3},
        lambda step: (1 + math.cos(math.pi * (3 * done(step, 0) % 1))) / 2,
    ),
    "polynomial": (
        {"lr_scheduler_power": 2.0},
        lambda step: (1 - 1e-7 / RATE) * (1 - done(step, 0)) ** 2 + 1e-7 / RATE,
    ),
    "inverse_sqrt": (
        {"lr_warmup_steps": 10, "lr_scheduler_timescale": 4},
        lambda step: step / 10 if step < 10 else 1 / math.sqrt((step + 4 - 10) / 4),
    ),
    "cosine_with_min_lr": (
        {"lr_scheduler_min_lr_ratio": 0.1},
        lambda step: 0.1 + 0.9 * (1 + math.cos(math.pi * done(step, 0))) / 2,
    ),
    "warmup_stable_decay": (
        {"lr_warmup_steps": 10, "lr_decay_steps": 0.25, "lr_scheduler_min_lr_ratio": 0.1},
        stable_decay,
    ),
    "piecewise_constant": (
        {"lr_scheduler_args": {"step_rules": "1:10,0.1:20,0.01"}},
        lambda step: 1.0 if step < 10 else 0.1 if step < 20 else 0.01,
    ),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_rates_are_their_closed_form_at_every_step_and_nothing_is_unused(name, caplog):
    changes, form = CLOSED_FORMS[name]
    found = rates(options_of(lr_scheduler=name, **changes))
    assert found == pytest.approx([RATE * form(step) for step in range(STEPS)], rel=1e-9, abs=1e-12)
    assert not caplog.messages


def test_every_schedule_has_a_closed_form_here():
    assert CLOSED_FORMS.keys() == schedules.SCHEDULES.keys()


@pytest.mark.parametrize("name", ["StepLR", "torch.optim.lr_scheduler.StepLR"])
def test_any_class_is_a_schedule(name):
    options = options_of(lr_scheduler_type=name, lr_scheduler_args={"step_size": 10, "gamma": 0.5})
    assert rates(options) == pytest.approx([RATE * 0.5 ** (step // 10) for step in range(STEPS)])
    assert schedules.named(options) == name


def test_adafactors_own_rates():
    """1 / sqrt(step), or less of it while it is above 0.01, times the weights' size of 1; arXiv 1804.04235."""
    found = rates(options_of(optimizer_type="Adafactor", lr_scheduler="adafactor"), 10)
    assert found == pytest.approx([RATE] + [0.01] * 9, rel=0.1)
    warming = options_of(optimizer_type="Adafactor", optimizer_args={"warmup_init": True})
    assert rates(warming, 10)[1:] == pytest.approx([1e-6 * step for step in range(1, 10)], rel=1e-3)
    given = options_of(
        optimizer_type="Adafactor",
        optimizer_args={"relative_step": False},
        lr_scheduler="constant_with_warmup",
        lr_warmup_steps=10,
    )
    assert rates(given) == pytest.approx([RATE * min(1, step / 10) for step in range(STEPS)])


def test_adafactor_tells_the_rate_of_a_group_whose_first_layer_was_dropped():
    options = options_of(optimizer_type="Adafactor")
    first, second, third = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    groups = [{"params": [first, second], "lr": RATE}, {"params": [third], "lr": RATE}]
    optimizer = optimizers.optimizer_of(options, groups)
    schedule = schedules.schedule_of(options, optimizer, STEPS)
    second.grad = torch.ones_like(second)
    optimizer.step()
    schedule.step()
    assert schedule.get_last_lr() == pytest.approx([0.01, RATE], rel=0.1)


def test_schedule_free_optimizers_have_no_schedule(caplog):
    pytest.importorskip("schedulefree")
    options = options_of(optimizer_type="AdamWScheduleFree", lr_scheduler="cosine", lr_warmup_steps=10)
    assert rates(options) == [RATE] * STEPS
    (line,) = caplog.messages
    assert "--lr_scheduler, --lr_warmup_steps" in line


@pytest.mark.parametrize(
    ("changes", "unused"),
    [
        ({"lr_scheduler": "constant", "lr_decay_steps": 3}, "--lr_decay_steps"),
        ({"lr_scheduler": "cosine", "lr_scheduler_num_cycles": 2, "lr_scheduler_power": 2.0},
         "--lr_scheduler_num_cycles, --lr_scheduler_power"),
        ({"lr_scheduler": "linear", "lr_scheduler_timescale": 2, "lr_scheduler_min_lr_ratio": 0.1},
         "--lr_scheduler_timescale, --lr_scheduler_min_lr_ratio"),
        ({"lr_scheduler": "cosine", "lr_scheduler_type": "StepLR", "lr_scheduler_args": {"step_size": 1}},
         "--lr_scheduler"),
        ({"lr_scheduler_power": 2.0, "optimizer_type": "Adafactor"}, "--lr_scheduler_power"),
        ({**CLOSED_FORMS["piecewise_constant"][0], "lr_scheduler": "piecewise_constant", "lr_warmup_steps": 3},
         "--lr_warmup_steps"),
    ],
)  # fmt: skip
def test_options_without_effect_are_told(changes, unused, caplog):
    rates(options_of(**changes))
    (line,) = [line for line in caplog.messages if line.startswith("no effect with")]
    assert line.endswith(f": {unused}")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lr_warmup_steps": 3}, "--lr_scheduler=constant has no warmup; use constant_with_warmup"),
        ({"lr_warmup_steps": 3, "optimizer_type": "Adafactor"}, "warmup_init=True warms up"),
        ({"lr_warmup_steps": 3, "lr_scheduler_type": "StepLR"}, "StepLR has no warmup"),
        ({"lr_scheduler": "adafactor"}, "needs --optimizer_type Adafactor"),
        ({"lr_scheduler": "cosine_with_min_lr"}, "needs --lr_scheduler_min_lr_ratio"),
        ({"lr_scheduler": "piecewise_constant"}, "step_rules"),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": {"num_warmup_steps": 3}}, "use --lr_warmup_steps"),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": {"num_training_steps": 3}}, "use --max_train_steps"),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": {"num_cycels": 3}}, "did you mean 'num_cycles'"),
        ({"lr_scheduler_type": "StepLR", "lr_scheduler_args": {"gama": 3}}, "did you mean 'gamma'"),
        ({"lr_scheduler_type": "StepLR"}, "step_size"),
        ({"lr_scheduler_type": "StepL"}, "did you mean 'StepLR'"),
        ({"lr_scheduler_type": f"{__name__}.Swallows", "lr_scheduler_args": {"x": 3}}, "x=3: Swallows has no such"),
        ({"lr_scheduler_type": "ReduceLROnPlateau"}, "its step needs metrics"),
        ({"lr_scheduler_type": "not_installed_here.X"}, "pip install not-installed-here"),
        ({"lr_scheduler_type": "StepLR", "lr_scheduler_args": {"step_size": 0}},
         "--lr_scheduler_type StepLR --lr_scheduler_args step_size=0: fails behind step 1: "),
        ({"lr_scheduler_type": "ExponentialLR", "lr_scheduler_args": {"gamma": math.nan}}, "a rate of nan"),
        ({"lr_scheduler_type": "StepLR", "lr_scheduler_args": {"step_size": 3}, "optimizer_type": "Adafactor"},
         "add --optimizer_args relative_step=False"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_are_one_line_before_a_model_is_loaded(changes, told):
    with pytest.raises(DeftError) as error:
        schedules.check(options_of(**changes))
    assert told in str(error.value)
    assert "\n" not in str(error.value)


class Swallows(LambdaLR):
    def __init__(self, optimizer, **kwargs):
        super().__init__(optimizer, lambda step: 1.0)


def test_warmup_and_decay_fit_into_the_steps():
    options = options_of(lr_scheduler="warmup_stable_decay", lr_warmup_steps=30, lr_decay_steps=0.5)
    schedules.check(options)
    with pytest.raises(DeftError, match="take more than all 40 steps"):
        rates(options)


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ({"lr_scheduler": "polynomial", "lr_warmup_steps": STEPS}, STEPS),  # before the adapter would have been saved
        ({"lr_scheduler": "polynomial", "lr_scheduler_power": -2.0}, STEPS),
        ({"lr_scheduler_type": "OneCycleLR", "lr_scheduler_args": {"max_lr": 0.1, "total_steps": STEPS - 1}}, STEPS),
        ({"lr_scheduler_type": "OneCycleLR", "lr_scheduler_args": {"max_lr": 0.1, "total_steps": 9}}, 10),
    ],
    ids=str,
)
def test_a_step_that_would_fail_is_told_before_the_first(changes, step):
    options = options_of(**changes)
    schedules.check(options)  # knows no number of steps yet
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = optimizers.optimizer_of(options, [{"params": [parameter], "lr": RATE}])
    with pytest.raises(DeftError, match=f"fails behind step {step}: ") as error:
        schedules.schedule_of(options, optimizer, STEPS)
    given = [key for key in changes if key != "lr_scheduler_args"]
    assert all(f"--{key} {changes[key]}" in str(error.value) for key in given)
    assert optimizer.param_groups[0]["lr"] == RATE  # which was not the one that was tried


def test_as_many_steps_as_a_class_allows_are_allowed():
    options = options_of(lr_scheduler_type="OneCycleLR", lr_scheduler_args={"max_lr": 0.1, "total_steps": STEPS})
    assert max(rates(options)) == pytest.approx(0.1)


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("7", 7), ("0.1", 0.1), ("10%", 0.1), ("1e-2", 0.01)])
def test_steps_or_a_share_of_them(text, value):
    found = parse([*NEEDED, "--lr_warmup_steps", text]).optimizer.lr_warmup_steps
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["1.5", "many", "-1", "nan", "x%"])
def test_what_is_neither_is_refused(text):
    with pytest.raises(DeftError, match="--lr_warmup_steps"):
        parse([*NEEDED, "--lr_warmup_steps", text])
