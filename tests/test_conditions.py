"""What trainers do around a step: other multipliers within it, compiled models, fp8 base weights, accumulation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from networks import deft
from networks.deft_config import DeftError
from networks.deft_module import DeftModule, add_to_weight, read_weight
from networks.deft_targets import Target
from tests.conftest import layer_of, relative_error
from tests.test_architectures import Flux, network

OPTIONS = [{}, {"split_qkv": "true"}, {"basis": "relu"}, {"gate": "true"}]


def gradients(net: nn.Module) -> list[torch.Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in net.parameters()]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_forward_without_the_adapter_in_the_middle_of_a_step(options):
    """Prior preservation, as sd-scripts' diff_output_preservation does it: the base model's own output, and the same
    gradients as without it."""
    model, x = Flux(), torch.randn(2, 5, 4)
    base = model(x)
    net = network(model, **options).train()
    model(x).square().sum().backward()
    wanted = gradients(net)
    net.zero_grad()
    trained = model(x)
    net.set_multiplier(0.0)
    with torch.no_grad():
        assert torch.equal(model(x), base)
    net.set_multiplier(1.0)
    trained.square().sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients(net), wanted, strict=True))


def test_a_backward_uses_the_multiplier_of_its_forward():
    model, x = Flux(), torch.randn(2, 5, 4)
    net = network(model)
    model(x).sum().backward()
    wanted = gradients(net)
    net.zero_grad()
    out = model(x).sum()
    net.set_multiplier(0.3)
    out.backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients(net), wanted, strict=True))


def test_micro_steps_add_up():
    model = Flux()
    net = network(model).train()
    batches = [torch.randn(2, 5, 4) for _ in range(3)]
    for x in batches:
        model(x).square().sum().backward()
    together = gradients(net)
    net.zero_grad()
    torch.stack([model(x).square().sum() for x in batches]).sum().backward()
    assert max(relative_error(a, b) for a, b in zip(together, gradients(net), strict=True) if b.any()) < 1e-5


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_compiled(options):
    """One graph, the same numbers, and none compiled anew when the parameters move."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, x = Flux(double=1, single=1), torch.randn(2, 5, 4)
    net = network(model, **options).train()
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(3):
        outputs = []
        for run in (model, compiled):
            net.zero_grad()
            out = run(x)
            out.square().sum().backward()
            outputs.append([out, *gradients(net)])
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*outputs, strict=True))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_compiled_model_is_kept_from_degenerate_bases_too():
    torch._dynamo.reset()
    model, x = Flux(double=1, single=1), torch.randn(2, 5, 4)
    net = network(model).train()
    with torch.no_grad():
        for module in net.all_modules:
            module.P[:, 2] = module.P[:, 1]
    compiled = torch.compile(model, backend="aot_eager")
    net.on_step_start(None, model)
    compiled(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_base_is_read_as_it_is(dtype):
    layer = layer_of("linear")
    layer.weight.data = layer.weight.data.to(dtype)
    W = layer.weight.double()
    module = DeftModule(Target("lora_unet_x", "x", layer), 1.0, 4, 1.0, network(Flux()).config)
    with torch.no_grad():
        module.P += torch.randn_like(module.P) * module.P.std()
        up, down = (t.double() for t in module.lora_factors())
    Q, E0 = up, module.E0.double()
    assert relative_error(down, -(Q - E0).T @ W) < 1e-5


@pytest.mark.parametrize("blocks", [None, 1, 3], ids=["tensor", "row", "block"])
@pytest.mark.parametrize("rows", [None, (8, 20)])
def test_scaled_fp8_base_is_read_as_its_forward_uses_it(blocks, rows):
    """The forms of scale_weight of sd-scripts: one number, one a row, one for each block of a row."""
    layer, W = nn.Linear(48, 40), torch.randn(40, 48)
    shape = (40, blocks or 1, 48 // (blocks or 1))
    size = W.abs().max() if blocks is None else W.view(shape).abs().amax(2, keepdim=True)
    scale = size / 400
    layer.weight.data = (W.view(shape) / scale).to(torch.float8_e4m3fn).view(40, 48)
    layer.requires_grad_(False)
    layer.register_buffer(
        "scale_weight", scale.view(1) if blocks is None else scale.view(40, 1) if blocks == 1 else scale
    )
    read = read_weight(layer, rows)
    assert read.shape == ((40 if rows is None else 12), 48)
    assert relative_error(read, W if rows is None else W[8:20]) < 0.05
    with pytest.raises(DeftError, match="lora_unet_x: cannot be merged into a scaled fp8 weight"):
        add_to_weight(Target("lora_unet_x", "x", layer), torch.ones(40, 1), torch.ones(1, 48), 1.0)


def steps(net, model, optimizer, batches) -> list[float]:
    losses = []
    for x in batches:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_resumed_state_goes_on_as_if_nothing_had_happened(options):
    """The network's and the optimizer's state, as accelerate saves them: equal bit for bit, and so is the next step."""
    model, batches = Flux(), [torch.randn(2, 5, 4) for _ in range(4)]
    net = network(model, **options).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    steps(net, model, optimizer, batches[:3])
    saved = {name: value.clone() for name, value in net.state_dict().items()}
    of_optimizer = copy.deepcopy(optimizer.state_dict())
    undisturbed = steps(net, model, optimizer, batches[3:])
    after = net.state_dict()
    net.remove()

    again = network(model, trained=False, **options).train()
    again.load_state_dict(saved, strict=True)
    assert all(torch.equal(saved[name], value) for name, value in again.state_dict().items())
    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-2)
    optimizer.load_state_dict(of_optimizer)
    assert steps(again, model, optimizer, batches[3:]) == undisturbed
    assert all(torch.equal(after[name], value) for name, value in again.state_dict().items())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_training_goes_on_from_its_lora_at_the_same_loss(tmp_path, options, dtype, bound):
    model, x, file = Flux(), torch.randn(2, 5, 4), str(tmp_path / "x.safetensors")
    net = network(model, **options).train()
    steps(net, model, torch.optim.AdamW(net.parameters(), lr=1e-2), [x] * 3)
    loss = float(model(x).square().mean().detach())
    net.save_weights(file, dtype, None)
    net.remove()
    again, _ = deft.create_network_from_weights(1.0, file, None, [], model)
    again.apply_to([], model)
    again.load_weights(file)
    assert float(model(x).square().mean().detach()) == pytest.approx(loss, rel=bound)
