"""Columns of P that come to depend on others are replaced: any rank, any optimizer, any number of layers."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from networks import deft_math
from networks.deft_renewal import MOMENTS
from tests.conftest import relative_error
from tests.test_architectures import Flux, network

STEPS = 50


def merge_columns(net) -> int:
    """Lets the third column of every layer's P repeat the second; how many layers."""
    with torch.no_grad():
        for module in net.all_modules:
            module.P[:, 2] = module.P[:, 1]
    return len(net.all_modules)


def step(model, net, optimizer) -> None:
    net.on_step_start(None, model)
    model(torch.randn(2, 5, 4)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("rank", [23, 24, 64])
def test_ranks_at_and_above_the_layers_sizes_train(rank, caplog):
    """A fresh P has orthogonal columns, so nothing has to be replaced at a usual rate."""
    model = Flux()
    net = network(model, dim=rank, trained=False).train()
    assert max(module.rank / min(module.target.shape) for module in net.all_modules) == min(rank / 24, 1)
    assert all(deft_math.cholesky_qr(module.P)[1] > 0.999 for module in net.all_modules)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    caplog.clear()
    for _ in range(STEPS):
        step(model, net, optimizer)
    assert not any("had merged with others" in line for line in caplog.messages)
    assert all(p.isfinite().all() for p in net.parameters())


def test_many_layers_in_one_step_and_many_steps(caplog):
    model = Flux()
    net = network(model).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    with caplog.at_level(logging.WARNING, "networks"):
        for _ in range(STEPS):
            merge_columns(net)
            step(model, net, optimizer)
    assert all(p.isfinite().all() for p in net.parameters())
    assert sum("had merged with others" in line for line in caplog.messages) == 1  # of a training, not of a step


def adapted(net):
    """A module that every pass goes through."""
    return next(module for module in net.all_modules if module.lora_name.endswith("img_attn_qkv"))


def merge(module, apart: float) -> None:
    """Turns the third column of P to the second, up to this part of it."""
    with torch.no_grad():
        column = module.P[:, 1]
        other = torch.randn_like(column)
        module.P[:, 2] = column + apart * other * column.norm() / other.norm()


@pytest.mark.parametrize("apart", [0.0, 1e-5, 2e-4, 1e-3, 8e-3])
@pytest.mark.parametrize("width", [24, 640])
def test_a_trainer_that_runs_ahead(width, apart, caplog):
    """A basis that has degenerated is renewed as the next step begins; where it was of no use, its step is left out:
    none has gradients that are far too large."""
    model, merged, left_out, largest = Flux(width, 1, 0), (4, 8), [], []
    net = network(model).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    for number in range(12):
        if number in merged:
            merge(adapted(net), apart)
        net.runs_ahead = number > 0
        net.on_step_start(None, model)
        model(torch.randn(2, 5, 4)).square().mean().backward()
        gradients = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        if bool(gradients.isfinite().all()):
            optimizer.step()
            largest.append(float(gradients.norm()))
        else:
            left_out.append(number)
        optimizer.zero_grad()
        weak = deft_math.cholesky_qr(adapted(net).P)[1] <= deft_math.LEAST_INDEPENDENCE
        assert bool(weak) == (number in merged)
    assert left_out == (list(merged) if apart < deft_math.LEAST_INDEPENDENCE / 2 else [])
    assert max(largest) < 2 / deft_math.LEAST_INDEPENDENCE * sorted(largest)[len(largest) // 2]
    assert sum("had merged with others" in line for line in caplog.messages) == 1
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("rank", [24, 32, 64])
def test_columns_that_depend_on_one_another_all_together(rank):
    """Each has a part of its own, and yet float32 cannot have their basis: all are replaced, and it stays."""
    own = 0.012
    T = torch.randn(rank, rank, dtype=torch.double).triu(1)
    T = T / T.norm(dim=0).clamp(min=1e-9) * (1 - own**2) ** 0.5 + own * torch.eye(rank)
    T[0, 0] = 1
    P = (torch.linalg.qr(torch.randn(640, rank, dtype=torch.double))[0] @ T).float()
    assert deft_math.cholesky_qr(P)[1] <= deft_math.LEAST_INDEPENDENCE / 2
    mended, new = deft_math.independent_columns(P)
    assert bool(new.all())
    Q, independence = deft_math.cholesky_qr(mended)
    assert independence > 0.9
    assert relative_error(Q, deft_math.positive_qr(P.double())[0]) < 1e-6
    assert deft_math.independent_columns(mended) is None


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("apart", [5e-4, 8e-3])
def test_processes_renew_the_same_columns_at_the_same_time(apart, ahead):
    """Whether a step has one pass, two, or none, since it has no pictures here."""
    found = []
    for passes in (1, 2, 0):
        torch.manual_seed(0)
        model = Flux()
        net = network(model).train()
        for number in range(4):
            if number == 2:
                merge(adapted(net), apart)
            net.runs_ahead = ahead and number > 0
            net.on_step_start(None, model)
            if number == 2 and not passes:
                net.check_bases()
            for _ in range(passes if number == 2 else 1):
                model(torch.ones(2, 5, 4)).sum().backward()
        found.append(adapted(net).P.detach().clone())
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert deft_math.cholesky_qr(found[0])[1] > 0.9


def state_of(optimizer, parameter) -> dict[str, torch.Tensor]:
    """What the optimizer keeps in the parameter's shape."""
    kept = optimizer.state[parameter].items()
    return {name: value for name, value in kept if isinstance(value, torch.Tensor) and value.shape == parameter.shape}


@pytest.mark.parametrize("name", ["AdamW", "AMSGrad", "SGD", "Adafactor", "Prodigy", "schedule-free AdamW"])
def test_moments_of_replaced_columns_are_forgotten_and_nothing_else(name):
    schedulefree, prodigyopt = pytest.importorskip("schedulefree"), pytest.importorskip("prodigyopt")
    make = {
        "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
        "AMSGrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
        "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
        "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
        "Prodigy": lambda p: prodigyopt.Prodigy(p, lr=1.0),
        "schedule-free AdamW": lambda p: schedulefree.AdamWScheduleFree(p, lr=1e-2),
    }[name]
    model = Flux()
    net = network(model).train()
    optimizer = make(list(net.parameters()))
    if name.startswith("schedule-free"):
        optimizer.train()
    for _ in range(3):
        step(model, net, optimizer)
    merge_columns(net)
    model(torch.randn(2, 5, 4)).square().mean().backward()  # replaces them
    before = {module: {n: v.clone() for n, v in state_of(optimizer, module.P).items()} for module in net.all_modules}
    seen = {}
    handle = register_optimizer_step_pre_hook(
        lambda *_: seen.update({m: {n: v.clone() for n, v in state_of(optimizer, m.P).items()} for m in before})
    )
    optimizer.step()
    handle.remove()
    assert sum(bool(old) for old in before.values()) >= (0 if name == "Adafactor" else 6)
    for module, old in before.items():
        for kind, value in seen[module].items():
            cleared = kind in MOMENTS
            assert torch.equal(value[:, 2], torch.zeros_like(value[:, 2]) if cleared else old[kind][:, 2]), kind
            assert torch.equal(value[:, [0, 1, 3]], old[kind][:, [0, 1, 3]]), kind


@pytest.mark.parametrize("rate", [1e-3, 1e-2])
def test_a_replaced_column_keeps_its_size_under_schedule_free(rate):
    schedulefree = pytest.importorskip("schedulefree")
    model = Flux()
    net = network(model).train()
    optimizer = schedulefree.AdamWScheduleFree(net.parameters(), lr=rate)
    optimizer.train()
    for _ in range(3):
        step(model, net, optimizer)
    merge_columns(net)
    sizes = []
    for _ in range(6):
        step(model, net, optimizer)
        sizes.append(torch.stack([module.P[:, 2].norm() / module.P[:, 1].norm() for module in net.all_modules]))
    assert torch.stack(sizes).min() > 0.5


def test_an_optimizer_that_has_not_stepped_yet_is_left_alone():
    model = Flux()
    net = network(model).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    merge_columns(net)
    step(model, net, optimizer)
    model(torch.randn(2, 5, 4)).square().mean().backward()
    trained = [module for module in net.all_modules if module.P.grad is not None]
    first = [optimizer.state[module.P]["exp_avg"].clone() for module in trained]
    optimizer.step()
    assert len(trained) >= 6
    for module, old in zip(trained, first, strict=True):
        wanted = 0.9 * old + 0.1 * module.P.grad
        assert relative_error(optimizer.state[module.P]["exp_avg"], wanted) < 1e-5
