"""Optimizers by name: each trains, refuses what its class does not name, and schedule-free weights are the averages."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from library.options.parse import parse
from library.options.rooms import OptimizerOptions
from library.training import optimizers
from library.training.classes import argument_names
from networks.deft_config import DeftError
from tests.test_files import deltas_of_lora
from tests.test_options import NEEDED

NAMES = [kind.name for kind in optimizers.KINDS]
SCHEDULE_FREE = [name for name in NAMES if name.endswith("ScheduleFree")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def options_of(name: str, **changes) -> OptimizerOptions:
    kind = optimizers.kind_of(name)
    if "bitsandbytes" in kind.module:
        pytest.importorskip("bitsandbytes", minversion="0.50", reason="older ones need CUDA for everything")
    pytest.importorskip(kind.module.split(".")[0])
    return OptimizerOptions(name, **{"learning_rate": 1.0 if kind.own_rate else 1e-2, **changes})


def parsed(*arguments: str) -> OptimizerOptions:
    return parse([*NEEDED, *arguments]).optimizer


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 8)).to(DEVICE)  # large enough for 8-bit states


def groups_of(model: nn.Module, rate: float) -> list[dict]:
    return [{"params": list(half.parameters()), "lr": rate} for half in (model[0], model[2])]


def train(model: nn.Module, optimizer, steps: int) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(16, n, generator=generator).to(DEVICE) for n in (96, 8))
    losses = []
    for _ in range(steps):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", NAMES)
def test_each_trains(name):
    options = options_of(name)
    model = net()
    before = copy.deepcopy(model.state_dict())
    losses = train(model, optimizers.optimizer_of(options, groups_of(model, options.learning_rate)), 60)
    assert losses[-1] < 0.9 * losses[0]
    assert all(not torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_each_is_checked_before_anything_is_loaded(name):
    options = options_of(name)
    optimizers.check(options)
    optimizers.check(options_of(name.lower()))
    for key, told in (("lr", "--learning_rate"), ("params", "the adapter"), ("weight_decai", "has no such argument")):
        with pytest.raises(DeftError, match=f"--optimizer_args {key}=0.5: .*{told}"):
            optimizers.check(options_of(name, optimizer_args={key: 0.5}))
    if "weight_decay" in argument_names(type(optimizers.on_trial(options))):
        with pytest.raises(DeftError, match="did you mean 'weight_decay'"):
            optimizers.check(options_of(name, optimizer_args={"weight_decai": 0.5}))


class HandsOn(torch.optim.AdamW):
    """Names one argument and leaves the rest to its base class."""

    def __init__(self, params, *, mine=0, **kwargs):
        super().__init__(params, **kwargs)


class SwallowsAll(torch.optim.Optimizer):
    def __init__(self, params, lr, **kwargs):
        super().__init__(params, {"lr": lr})


class StepsBy(torch.optim.Optimizer):
    """Looks at its argument in the first step only, as Prodigy and Lion look at theirs."""

    def __init__(self, params, lr, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data -= group["lr"] * group["beta"] * parameter.grad


class HoldsAnother(StepsBy):
    """As wrappers of other packages do, under the name by which accelerate's holds its own."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.optimizer = torch.optim.SGD(self.param_groups, lr)


def test_only_accelerates_wrapper_is_taken_off(fresh_accelerator):
    holder = optimizers.on_trial(OptimizerOptions(f"{__name__}.HoldsAnother"))
    assert optimizers.unwrapped(holder) is holder
    assert optimizers.unwrapped(Accelerator(cpu=DEVICE == "cpu").prepare(holder)) is holder


def test_arguments_behind_kwargs_are_checked_too():
    path = f"{__name__}.HandsOn"
    optimizers.check(OptimizerOptions(path, optimizer_args={"mine": 1, "betas": (0.5, 0.9)}))
    for where in (path, f"{__name__}.SwallowsAll"):
        with pytest.raises(DeftError, match=r"betos=1: .* has no such argument"):
            optimizers.check(OptimizerOptions(where, optimizer_args={"betos": 1}))


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("Prodigi", {}, r"unknown \(did you mean 'Prodigy'"),
        ("optimizer", {}, "is no torch optimizer|unknown"),
        ("torch.optim.Adamm", {}, "no Adamm in torch.optim .did you mean 'Adam'"),
        ("torch.nn.Linear", {}, "is no torch optimizer"),
        ("not_installed_here.Adam", {}, "not installed: pip install not-installed-here .or the package that has it"),
        ("torch.nowhere.Adam", {}, "No module named 'torch.nowhere'"),
        ("LBFGS", {}, "its step needs closure"),
        ("AdamW", {"betas": (0.9, 2.0)}, r"--optimizer_args betas=\(0.9, 2.0\): Invalid beta parameter"),
        ("SGDNesterov", {"nesterov": False}, "SGDNesterov has nesterov=True always"),
        ("transformers.Adafactor", {}, "Cannot combine manual `lr` and `relative_step=True`"),
        ("SparseAdam", {}, "the first step fails: SparseAdam does not support dense gradients"),
        ("AdamW", {"differentiable": True}, "--optimizer_args differentiable=True: "),
        (f"{__name__}.StepsBy", {"beta": "x"}, "--optimizer_args beta='x': the first step fails: "),
    ],
)
def test_mistakes_are_one_line(name, arguments, told):
    with pytest.raises(DeftError, match=told) as error:
        optimizers.check(OptimizerOptions(name, optimizer_args=arguments))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("--optimizer_")


def test_arguments_are_pythons_literals(tmp_path):
    found = parsed("--optimizer_args", "weight_decay=0.1", "betas=0.9,0.99", "amsgrad=True", "a='b=c'")
    assert found.optimizer_args == {"weight_decay": 0.1, "betas": (0.9, 0.99), "amsgrad": True, "a": "b=c"}
    (tmp_path / "c.toml").write_text("optimizer_args = {decouple = true, mode = 'x', betas = [0.9, 0.99]}")
    found = parsed("--config_file", str(tmp_path / "c.toml"))
    assert found.optimizer_args == {"decouple": True, "mode": "x", "betas": [0.9, 0.99]}
    for text, told in (
        ("decouple=true", "write True"),
        ("mode=cosine", "quote a text: \"mode='cosine'\""),
        ("weight_decay", "must be KEY=VALUE"),
        ("weight_decay=", "must be a Python value"),
    ):
        with pytest.raises(DeftError) as error:
            parsed("--optimizer_args", text)
        assert told in str(error.value)
    with pytest.raises(DeftError, match="eps is given twice"):
        parsed("--optimizer_args", "eps=1", "eps=2")


def test_older_switches_name_an_optimizer():
    assert parsed().optimizer_type == parsed("--optimizer_type", "").optimizer_type == "AdamW"
    assert parsed("--use_8bit_adam").optimizer_type == "AdamW8bit"
    assert parsed("--use_lion_optimizer").optimizer_type == "Lion"
    for other in (["--use_lion_optimizer"], ["--optimizer_type", "AdamW"]):
        with pytest.raises(DeftError, match=f"--use_8bit_adam and {other[0]} name different optimizers"):
            parsed("--use_8bit_adam", *other)


def test_defaults_of_options_and_rooms_agree():
    assert parsed() == OptimizerOptions()


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "SGDNesterov", "torch.optim.AdamW"])
def test_torchs_are_fused_on_cuda_unless_the_user_says_otherwise(name):
    parameters = [{"params": list(net().parameters()), "lr": 1e-3}]
    for arguments, on_cuda, fused in (
        ({}, True, True), ({}, False, None), ({"foreach": False}, True, None), ({"fused": False}, True, False)
    ):  # fmt: skip
        found = optimizers._built(OptimizerOptions(name, optimizer_args=arguments), parameters, on_cuda)
        assert found.defaults["fused"] == fused
    assert "fused" not in optimizers.described(OptimizerOptions(name))


def test_others_than_torchs_are_not_fused():
    parameters = [{"params": list(net().parameters()), "lr": 1e-3}]
    assert "fused" not in optimizers._built(OptimizerOptions("Adafactor"), parameters, True).defaults


def test_what_files_say_of_the_optimizer():
    """sd-scripts' own strings; the integration tests compare more."""
    described = {
        "AdamW": "torch.optim.adamw.AdamW",
        "sgdnesterov": "torch.optim.sgd.SGD(momentum=0.9)",
        "Adafactor": "transformers.optimization.Adafactor(relative_step=True)",
    }
    assert {name: optimizers.described(OptimizerOptions(name)) for name in described} == described
    options = OptimizerOptions(optimizer_args={"weight_decay": 0.1, "betas": (0.9, 0.99)})
    assert optimizers.described(options) == "torch.optim.adamw.AdamW(weight_decay=0.1,betas=(0.9, 0.99))"


# --- rates ------------------------------------------------------------------------------------------------------------


def test_adafactor_finds_its_own_rates_unless_told_not_to(caplog):
    model = net()
    groups = groups_of(model, 1e-3)
    with caplog.at_level(logging.INFO):
        own = optimizers.optimizer_of(OptimizerOptions("Adafactor"), groups)
    assert [group["lr"] for group in own.param_groups] == [None, None]
    assert [group["lr"] for group in groups] == [1e-3, 1e-3]  # the caller's
    (line,) = [line for line in caplog.messages if "Adafactor" in line]
    assert "adafactor:0.0001" in line
    yours = OptimizerOptions("Adafactor", optimizer_args={"relative_step": False})
    assert [group["lr"] for group in optimizers.optimizer_of(yours, groups).param_groups] == [1e-3, 1e-3]
    warming = OptimizerOptions("Adafactor", optimizer_args={"relative_step": False, "warmup_init": True})
    assert optimizers.sets_own_rates(warming)
    assert optimizers.optimizer_of(warming, groups).defaults["relative_step"] is True


@pytest.mark.parametrize("name", [kind.name for kind in optimizers.KINDS if kind.own_rate])
def test_rates_that_find_themselves_are_warned_of(name, caplog):
    options = options_of(name)
    optimizers.optimizer_of(options, groups_of(net(), 1.0))
    assert not caplog.messages
    optimizers.optimizer_of(options, groups_of(net(), 1e-4))
    assert "usual is --learning_rate 1" in caplog.messages[-1]


@pytest.mark.parametrize("name", [kind.name for kind in optimizers.KINDS if kind.own_rate])
def test_several_rates_are_refused_where_the_class_stops_at_them(name, caplog):
    options, model = options_of(name), net()
    groups = groups_of(model, 1.0)
    groups[1]["lr"] = 0.5
    made = type(optimizers.on_trial(options))
    try:
        train(model, made(copy.copy(groups)), 1)
        stops = False
    except RuntimeError:
        stops = True
    assert optimizers.kind_of(name).one_rate == stops
    if stops:
        with pytest.raises(DeftError, match=r"takes one rate for all, not 0\.5, 1\.0"):
            optimizers.optimizer_of(options, groups)
    else:
        optimizers.optimizer_of(options, groups)
        assert "the others have no effect" in caplog.messages[-1]


def test_a_trainings_rates_are_refused_before_its_model_is_loaded(run, capsys):
    pytest.importorskip("prodigyopt")
    wrong = {"optimizer_type": "Prodigy", "unet_lr": 1, "pretrained_model_name_or_path": "nowhere"}
    assert run(**wrong) == 2
    assert "takes one rate for all" in capsys.readouterr().err
    assert run(**wrong, text_encoder_lr=[1], optimizer_args=["d_coeff=2"]) == 2
    assert "did you mean 'd_coef'" in capsys.readouterr().err
    assert run(learning_rate=0, text_encoder_lr=[0], pretrained_model_name_or_path="nowhere") == 2
    assert "every learning rate is 0" in capsys.readouterr().err


# --- schedule-free ----------------------------------------------------------------------------------------------------


def values(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_averages_are_in_place_within_evaluated_and_nowhere_else(name, wrapped, fresh_accelerator):
    """The averages are x of Defazio et al., arXiv 2405.15682, equation 3: y = (1 - beta) z + beta x."""
    options, model = options_of(name), net()
    optimizer = optimizers.optimizer_of(options, groups_of(model, 1e-2))
    inner = optimizer
    if wrapped:
        optimizer = Accelerator(cpu=DEVICE == "cpu").prepare(optimizer)
    train(model, optimizer, 8)
    group = inner.param_groups[0]
    beta = group["betas"][0] if "betas" in group else group["momentum"]
    before = values(model)
    wanted = [(y - (1 - beta) * inner.state[p]["z"]) / beta for y, p in zip(before, model.parameters(), strict=True)]
    with optimizers.evaluated(optimizer):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(values(model), wanted, strict=True))
        with optimizers.evaluated(optimizer):  # as a save while samples are drawn
            pass
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(values(model), wanted, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(before, wanted, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(values(model), before, strict=True))


def test_evaluated_changes_nothing_of_a_training():
    options = options_of("AdamWScheduleFree")
    found = []
    for looks in (False, True):
        model = net()
        optimizer = optimizers.optimizer_of(options, groups_of(model, 1e-2))
        for _ in range(5):
            train(model, optimizer, 1)
            if looks:
                with pytest.raises(KeyError), optimizers.evaluated(optimizer):
                    raise KeyError
        found.append(values(model))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_optimizers_without_modes_are_left_alone():
    model = net()
    optimizer = optimizers.optimizer_of(OptimizerOptions(), groups_of(model, 1e-2))
    train(model, optimizer, 2)
    before = values(model)
    optimizers.train_mode(optimizer)
    with optimizers.evaluated(optimizer):
        assert all(torch.equal(a, b) for a, b in zip(values(model), before, strict=True))
    assert not optimizers.averages(optimizer)


# --- the trainer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rate", "described", "schedule"),
    [
        ("AdamW", 1e-3, "torch.optim.adamw.AdamW(weight_decay=0.02)", "constant"),
        ("Prodigy", 1, "prodigyopt.prodigy.Prodigy(weight_decay=0.02)", "constant"),
        ("Adafactor", 1e-3, "transformers.optimization.Adafactor(weight_decay=0.02,relative_step=True)",
         "adafactor:0.001"),
        ("AdamWScheduleFree", 1e-2, "schedulefree.adamw_schedulefree.AdamWScheduleFree(weight_decay=0.02)", "constant"),
    ],
)  # fmt: skip
def test_real_trainings(run, tmp_path, name, rate, described, schedule):
    options_of(name)
    folder = tmp_path / "logs"
    changes = {"optimizer_args": ["weight_decay=0.02"], "text_encoder_lr": [rate], "logging_dir": folder}
    assert run(optimizer_type=name, learning_rate=rate, max_train_steps=4, **changes) == 0
    assert list(folder.rglob("events.out.tfevents.*"))
    norms = [float(delta.norm()) for delta in deltas_of_lora(load_file(tmp_path / "out" / "cat.safetensors")).values()]
    assert sum(norm > 0 for norm in norms) > 0.9 * len(norms)
    with safe_open(str(tmp_path / "out" / "cat.safetensors"), framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_optimizer"], metadata["ss_lr_scheduler"]) == (described, schedule)
    assert json.loads(metadata["ss_text_encoder_lr"]) == [rate]
