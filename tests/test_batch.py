"""Factors and gradients of all layers at once, against the same layers one by one, in what trainers do to them."""

from __future__ import annotations

import copy
import functools
import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from networks import deft_batch, deft_math
from networks.deft_config import DeftError
from networks.deft_module import DeftModule
from tests.conftest import in_two_processes, relative_error
from tests.test_architectures import Flux, network
from tests.test_conditions import gradients

OPTIONS = [{}, {"removal": "0"}, {"gate": "true"}, {"para": "true"}, {"split_qkv": "true"}, {"module_dropout": "0.3"},
           {"neuron_dropout": "0.3", "rank_dropout": "0.3"}]  # fmt: skip


class Checkpointed(Flux):
    """:param reentrant: None for no gradient checkpointing"""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x):
        x = self.img_in(x)
        for block in self.single_blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return (attention(self, x),)


def attention(model: Flux, x):
    """A double block's attention on what the single blocks made, outside of any checkpoint."""
    q, k, v = model.double_blocks[0].img_attn.qkv(x).chunk(3, -1)
    return model.double_blocks[0].img_attn.proj(torch.softmax(q @ k.mT, -1) @ v)


def gradients_of(batched: bool, reentrant: bool | None, micro_steps: int, **options) -> list[torch.Tensor]:
    torch.manual_seed(3)
    model = Checkpointed(reentrant)
    net = network(model, **options).train()
    net.batched = batched
    assert net.batched == batched
    for step in range(micro_steps):
        torch.manual_seed(100 + step)
        (out,) = model(torch.randn(2, 5, 4, requires_grad=True))
        out.square().sum().backward()
    return gradients(net)


@pytest.mark.parametrize("micro_steps", [1, 3])
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_equal_those_of_layers_alone(options, reentrant, micro_steps):
    alone = gradients_of(False, None, micro_steps, **options)
    together = gradients_of(True, reentrant, micro_steps, **options)
    assert sum(bool(b.any()) for b in alone) >= 6
    for a, b in zip(together, alone, strict=True):
        assert relative_error(a, b) < 1e-5 if b.any() else not a.any()


def test_large_groups_are_computed_in_parts(monkeypatch):
    alone = gradients_of(False, None, 1)
    monkeypatch.setattr(deft_batch, "AT_ONCE", 200)
    sizes, derivative = [], deft_math.basis_gradient

    def watched(P, Q, d_Q):
        sizes.append(P.shape)
        return derivative(P, Q, d_Q)

    monkeypatch.setattr(deft_math, "basis_gradient", watched)
    for a, b in zip(gradients_of(True, False, 1), alone, strict=True):
        assert relative_error(a, b) < 1e-5
    assert all(shape[0] == 1 or shape.numel() <= 200 for shape in sizes)
    assert len(sizes) > len({shape[1:] for shape in sizes})


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradients_are_formed_once_a_backward_pass_and_factors_once_a_pass(monkeypatch, reentrant):
    counts = {"gradients": 0, "compute": 0}

    def counted(name, function):
        @functools.wraps(function)
        def call(*args):
            counts[name] += 1
            return function(*args)

        return call

    for name in counts:
        counting = counted(name, getattr(deft_batch.BatchedFactors, name))
        monkeypatch.setattr(deft_batch.BatchedFactors, name, counting)
    gradients_of(True, reentrant, 3)
    assert counts == {"gradients": 3, "compute": 3}


def test_other_ways_to_ask_for_gradients():
    """`torch.autograd.grad`, `backward(inputs=...)`, and a graph that is used twice."""
    model, x = Flux(), torch.randn(2, 5, 4)
    net = network(model).train()
    used = [p for module in net.all_modules if "img_attn" in module.lora_name for p in module.parameters()]
    model(x).square().sum().backward()
    wanted = [p.grad.clone() for p in used]
    net.zero_grad()

    found = torch.autograd.grad(model(x).square().sum(), used)
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(found, wanted, strict=True))
    assert all(p.grad is None for p in net.parameters())

    model(x).square().sum().backward(inputs=used[:2])
    assert all(relative_error(p.grad, b) < 1e-6 for p, b in zip(used[:2], wanted, strict=False))
    assert all(p.grad is None for p in used[2:])
    net.zero_grad()

    loss = model(x).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert all(relative_error(p.grad, 2 * b) < 1e-6 for p, b in zip(used, wanted, strict=True))


def test_second_derivatives_need_layers_alone():
    model, x = Flux(), torch.randn(2, 5, 4)
    net = network(model).train()
    P = next(m for m in net.all_modules if m.lora_name.endswith("img_attn_qkv")).P
    with pytest.raises(DeftError, match="set `batched = False`"):
        torch.autograd.grad(model(x).square().sum(), P, create_graph=True)
    net.batched = False
    (first,) = torch.autograd.grad(model(x).square().sum(), P, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), P)
    assert second.norm() > 0


def test_a_backward_pass_that_fails_leaves_nothing_behind():
    model, x = Flux(), torch.randn(2, 5, 4)
    net = network(model).train()
    model(x).square().sum().backward()
    wanted = gradients(net)
    net.zero_grad()

    def fail(gradient):
        raise MemoryError("out of memory")

    hidden = []
    handle = model.img_in.register_forward_hook(lambda layer, args, out: hidden.append(out.requires_grad_()))
    out = model(x)
    hidden[0].register_hook(fail)  # behind all adapted layers
    with pytest.raises(MemoryError):
        out.square().sum().backward()
    handle.remove()
    net.zero_grad()
    model(x).square().sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients(net), wanted, strict=True))


def test_weights_that_are_there_only_in_their_layers_turn():
    """Block swap: between its turns a weight is elsewhere, here on the meta device, and reading it would fail."""

    def swapped(model: Flux) -> None:
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                here = layer.weight
                away = nn.Parameter(here.data.to("meta"), requires_grad=False)
                layer.weight = away

                def bring(layer, *_, weight=here):
                    layer.weight = weight

                def take(layer, args, out, bring=bring, weight=away):
                    layer.weight = weight
                    if out.requires_grad:
                        out.register_hook(lambda gradient: bring(layer))

                layer.register_forward_pre_hook(bring)
                layer.register_forward_hook(take)

    results = []
    for swap in (False, True):
        torch.manual_seed(3)
        model = Flux()
        net = network(model).train()
        if swap:
            swapped(model)
        out = model(torch.ones(2, 5, 4))
        out.square().sum().backward()
        results.append([out, *gradients(net)])
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(*results, strict=True) if b.any())


def test_a_copy_of_an_adapted_model_is_its_own():
    model, x = Flux(), torch.randn(2, 5, 4)
    net = network(model).train()
    model(x).sum().backward()
    twin = copy.deepcopy(model)
    net.zero_grad()
    twin(x).square().sum().backward()
    assert all(p.grad is None for p in net.parameters())
    copied = twin.single_blocks[0].linear1.forward.__self__
    original = next(m for m in net.all_modules if m.lora_name == copied.lora_name)
    model(x).square().sum().backward()
    assert copied.P is not original.P
    assert torch.equal(copied.P.grad, original.P.grad)


def optimizers() -> dict:
    found = {
        "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
        "fused AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
        "SGD": lambda p: torch.optim.SGD(p, lr=1e-2),
        "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    }
    prodigyopt, schedulefree = pytest.importorskip("prodigyopt"), pytest.importorskip("schedulefree")
    found["Prodigy"] = lambda p: prodigyopt.Prodigy(p, lr=1.0)
    found["schedule-free AdamW"] = lambda p: schedulefree.AdamWScheduleFree(p, lr=1e-2)
    return found


@pytest.mark.parametrize("calls_on_step_start", [True, False])
@pytest.mark.parametrize("name", ["AdamW", "fused AdamW", "SGD", "Adafactor", "Prodigy", "schedule-free AdamW"])
def test_kept_factors_follow_every_optimizer(name, calls_on_step_start):
    """With validation and a forward pass without gradients in between: bit for bit as without kept factors."""
    results = []
    for keep in (True, False):
        torch.manual_seed(3)
        model = Flux()
        net = network(model).train()
        optimizer = optimizers()[name](list(net.parameters()))
        losses = []

        def forward(batch, model=model, net=net, keep=keep):
            if not keep:
                net._forget_factors()
            return model(batch).square().mean()

        for step in range(4):
            torch.manual_seed(step)
            if calls_on_step_start:
                net.on_step_start(None, model)
            if name.startswith("schedule-free"):
                optimizer.train()
            loss = forward(torch.randn(2, 5, 4))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
            if name.startswith("schedule-free"):  # swaps the weights, as a validation does
                optimizer.eval()
            with torch.no_grad():
                losses += [forward(torch.ones(1, 3, 4)) for _ in range(2)]
        results.append([*losses, *net.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][0] != results[0][3]


def test_a_sampler_computes_the_factors_once(monkeypatch):
    model, x = Flux(), torch.randn(2, 5, 4)
    net = network(model).eval()
    computed = []
    compute = deft_batch.BatchedFactors.compute
    monkeypatch.setattr(deft_batch.BatchedFactors, "compute", lambda *a: computed.append(1) or compute(*a))
    with torch.no_grad():
        first = [model(x) for _ in range(4)][-1]
        assert len(computed) == 1
        for module in net.all_modules:
            module.R *= 2
        assert not torch.equal(model(x), first)
        assert len(computed) == 2
    with torch.inference_mode():
        model(x)
    net.train()
    model(x).sum().backward()  # factors made in inference mode could not be used here
    assert len(computed) == 3


@pytest.mark.parametrize("fault", ["a repeated column", "a zero column", "nearly a repeated column"])
def test_a_basis_that_degenerates_is_renewed_once(fault, caplog):
    model, x = Flux(), torch.randn(2, 5, 4)
    net = network(model).train()
    module: DeftModule = next(m for m in net.all_modules if m.lora_name.endswith("img_attn_qkv"))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        module.P[:, 2] = {
            "a repeated column": module.P[:, 1],
            "a zero column": torch.zeros_like(module.P[:, 1]),
            "nearly a repeated column": module.P[:, 1] + 1e-3 * torch.randn_like(module.P[:, 1]),
        }[fault]
        good = module.P.clone()
        before = module.lora_factors()[0]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            loss = model(x).square().sum()
            loss.backward()
            assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
            others = [m.P.grad.norm() for m in net.all_modules if m is not module and m.P.grad is not None]
            assert module.P.grad.norm() < 20 * max(others)
    assert len([r for r in caplog.records if module.lora_name in r.message]) == 1
    assert torch.equal(module.P[:, [0, 1, 3]], good[:, [0, 1, 3]])
    if fault.startswith("nearly"):  # elsewhere the direction is anybody's choice
        with torch.no_grad():
            assert relative_error(module.lora_factors()[0], before) < 1e-3
    state = optimizer.state[module.P]["exp_avg"]
    old = state.clone()
    optimizer.step()
    fresh = 0.1 * module.P.grad  # Adam's memory of a first step
    assert relative_error(state[:, 2], fresh[:, 2]) < 1e-6
    assert relative_error(state[:, 1], 0.9 * old[:, 1] + fresh[:, 1]) < 1e-6


def test_grad_scaler_skips_a_step_with_an_infinite_micro_batch():
    model = Flux()
    net = network(model).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = copy.deepcopy(net.state_dict())
    for factor in (1.0, float("inf")):
        scaler.scale(model(torch.ones(2, 5, 4)).square().sum() * factor).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    optimizer.zero_grad()
    scaler.scale(model(torch.ones(2, 5, 4)).square().sum()).backward()
    scaler.step(optimizer)
    assert not all(torch.equal(before[name], value) for name, value in net.state_dict().items())


DATA_PARALLEL = """
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tests.test_architectures import Flux, network

class Wrapped(nn.Module):
    def __init__(self, model, net):
        super().__init__()
        self.net = net
        self.model = [model]  # its weights are not to be synchronised
    def forward(self, x):
        return self.model[0](x)

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
torch.manual_seed(0)
model = Flux()
net = network(model).train()
wrapped = DistributedDataParallel(Wrapped(model, net), find_unused_parameters=True)
batches = torch.randn(2, 2, 5, 4)
wrapped(batches[rank]).square().sum().backward()
found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in net.parameters()]
net.zero_grad()
for batch in batches:
    (model(batch).square().sum() / 2).backward()
wanted = [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()]
errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, wanted) if b.any()]
open({told!r} + str(rank), "w").write(f"{{len(errors)}} {{max(errors)}}")
torch.distributed.destroy_process_group()
"""


def test_distributed_data_parallel(tmp_path):
    """In two processes under torch's own wrapper, which counts every parameter's gradient as it comes."""
    told = tmp_path / "told"
    in_two_processes(tmp_path, DATA_PARALLEL.format(told=str(told)))
    for rank in range(2):
        number, error = Path(f"{told}{rank}").read_text().split()
        assert int(number) > 8
        assert float(error) < 1e-5
