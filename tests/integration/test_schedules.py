"""Optimizers and schedules against sd-scripts' own `get_optimizer` and `get_scheduler_fix`, from the same arguments.

SD_SCRIPTS_DIR=... SD_SCRIPTS_PYTHON=... pytest tests/integration/test_schedules.py -s
"""

from __future__ import annotations

import json

import pytest
import torch

from library.options.parse import parse
from library.training import optimizers, schedules
from tests.integration.conftest import SIDE, needs_sd_scripts, run_script
from tests.test_options import NEEDED

pytestmark = needs_sd_scripts

STEPS = 50
SCHEDULES = [
    "--lr_scheduler constant",
    "--lr_scheduler constant_with_warmup --lr_warmup_steps 7",
    "--lr_scheduler linear --lr_warmup_steps 0.15",
    "--lr_scheduler cosine --lr_warmup_steps 10%",
    "--lr_scheduler cosine_with_restarts --lr_scheduler_num_cycles 3 --lr_warmup_steps 4",
    "--lr_scheduler polynomial --lr_scheduler_power 1.7 --lr_warmup_steps 5 --lr_scheduler_args lr_end=1e-5",
    "--lr_scheduler inverse_sqrt --lr_warmup_steps 6",
    "--lr_scheduler inverse_sqrt --lr_warmup_steps 6 --lr_scheduler_timescale 9",
    "--lr_scheduler cosine_with_min_lr --lr_scheduler_min_lr_ratio 0.2 --lr_warmup_steps 5",
    "--lr_scheduler cosine_with_min_lr --lr_scheduler_min_lr_ratio 0.2 --lr_scheduler_num_cycles 2",
    "--lr_scheduler warmup_stable_decay --lr_warmup_steps 0.1 --lr_decay_steps 0.3 --lr_scheduler_min_lr_ratio 0.1",
    "--lr_scheduler warmup_stable_decay --lr_decay_steps 12 --lr_scheduler_args decay_type='linear'",
    "--lr_scheduler piecewise_constant --lr_scheduler_args step_rules='1:10,0.1:20,0.01'",
    "--lr_scheduler_type StepLR --lr_scheduler_args step_size=8 gamma=0.5",
    "--lr_scheduler_type torch.optim.lr_scheduler.ExponentialLR --lr_scheduler_args gamma=0.9",
]
OPTIMIZERS = [
    "--optimizer_type adamw --optimizer_args weight_decay=0.1 betas=0.9,0.99",
    "--optimizer_type SGDNesterov",
    "--optimizer_type SGDNesterov --optimizer_args momentum=0.5",
    "--optimizer_type NAdam",
    "--optimizer_type torch.optim.RMSprop --optimizer_args alpha=0.9",
    "--use_lion_optimizer",
    "--optimizer_type Prodigy --learning_rate 1 --optimizer_args d_coef=2 decouple=True",
    "--optimizer_type Adafactor",
    "--optimizer_type Adafactor --optimizer_args warmup_init=True relative_step=False",
    "--optimizer_type Adafactor --optimizer_args relative_step=False scale_parameter=False --lr_scheduler cosine",
    "--optimizer_type AdamWScheduleFree --lr_scheduler cosine --optimizer_args warmup_steps=5",
    "--optimizer_type RAdamScheduleFree",
    "--optimizer_type SGDScheduleFree",
]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("schedules")
    cases = [given(case) for case in SCHEDULES + OPTIMIZERS]
    (folder / "arguments.json").write_text(json.dumps({"steps": STEPS, "cases": cases}))
    run_script(SIDE.with_name("schedules_side.py"), folder, with_deft=False)
    found = json.loads((folder / "found.json").read_text())
    return dict(zip(SCHEDULES + OPTIMIZERS, found, strict=True))


def given(case: str) -> list[str]:
    return ["--learning_rate", "0.01", *case.split()]


@pytest.mark.parametrize("case", SCHEDULES + OPTIMIZERS)
def test_rates_weights_and_descriptions_are_sd_scripts(theirs, case):
    options = parse([*NEEDED, *given(case)]).optimizer
    for package in ("lion_pytorch", "prodigyopt", "schedulefree"):
        if optimizers.kind_of(options.optimizer_type).module == package:
            pytest.importorskip(package)
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = optimizers.optimizer_of(options, [{"params": [parameter], "lr": options.learning_rate}])
    schedule = schedules.schedule_of(options, optimizer, STEPS)
    rates = []
    for _ in range(STEPS):
        rates.append(float(schedule.get_last_lr()[0]))
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    print(f"--- {case}: {rates[0]:.6f} ... {rates[-1]:.6f}")
    assert rates == pytest.approx(theirs[case]["rates"], rel=1e-6, abs=1e-12)
    assert parameter.flatten().tolist() == pytest.approx(theirs[case]["weights"], rel=1e-4, abs=1e-6)
    assert optimizers.described(options) == theirs[case]["optimizer"]
    if not options.lr_scheduler_type:
        assert schedules.named(options) == theirs[case]["schedule"]
