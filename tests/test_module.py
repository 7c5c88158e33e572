"""One adapted layer: against peft's DEFT, against float64 autograd, and in the conditions of a training."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from networks.deft_batch import BatchedFactors
from networks.deft_config import DeftConfig, DeftError, parse_options, user_options
from networks.deft_module import DeftModule, add_to_weight
from networks.deft_targets import Target
from tests.conftest import LAYER_KINDS, input_of, layer_of, perturb, relative_error

FORMS = {
    "qr": {},
    "relu": {"basis": "relu"},
    "para": {"para": True},
    "svd": {"basis": "svd"},
    "none": {"basis": "none"},
    "PaRa by tsvd": {"para": True, "basis": "tsvd"},
    "PaRa by eigen": {"para": True, "basis": "none"},
    "PaRa by nmf": {"para": True, "basis": "nmf"},
    "gate": {"gate": True},
    "half removed": {"removal": 0.5},
    "none removed": {"removal": 0.0},
    "paper start": {"init": "paper"},
    "svd start": {"init": "svd"},
    "minor start": {"init": "minor"},
}
BATCHED = [form for form, options in FORMS.items() if options.get("basis", "qr") == "qr"]


def module_on(
    layer: nn.Module, rank: int = 4, alpha: float = 2, trained: bool = True, batched: bool = False, **options
) -> DeftModule:
    config = DeftConfig(dim=rank, alpha=alpha, **{"removal": 1.0} | options)
    module = DeftModule(Target("lora_unet_x", "x", layer), 1.0, rank, config.scale, config)
    if trained:
        perturb(module)
    module.apply_to()
    if batched:
        BatchedFactors([module], layer)
    return module


def adapted_weight(module: DeftModule) -> torch.Tensor:
    with torch.no_grad():
        up, down = module.lora_factors()
        return (module.base_weight() + module.multiplier * up @ down).view_as(module.org_module.weight)


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_activations_equal_the_adapted_weight(form, kind):
    layer = layer_of(kind)
    module = module_on(layer, **FORMS[form])
    module.multiplier = 0.6
    x = input_of(layer)
    merged = layer_of(kind)
    merged.load_state_dict({**layer.state_dict(), "weight": adapted_weight(module)})
    assert relative_error(layer(x), merged(x)) < 1e-6


@pytest.mark.parametrize("batched", [False, True], ids=["alone", "batched"])
def test_inputs_and_outputs_as_models_handle_them(batched):
    """A transposed input, a single vector, nothing at all; and an output that is changed in place."""
    layer = layer_of("linear")
    module = module_on(layer, batched=batched)
    weight = adapted_weight(module)
    for x in (torch.randn(2, 48, 5).mT, torch.randn(48), torch.randn(0, 48), torch.randn(1, 2, 3, 48)):
        y = layer(x.requires_grad_())
        wanted = nn.functional.linear(x, weight, layer.bias)
        assert y.shape == wanted.shape
        assert relative_error(y, wanted) < 1e-6 or not y.numel()
        y.add_(1.0).sum().backward()


@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize("basis", ["qr", "relu"])
def test_identity_start(kind, basis):
    layer = layer_of(kind)
    x = input_of(layer)
    before = layer(x)
    module_on(layer, trained=False, basis=basis)
    assert relative_error(layer(x), before) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_identity_start_survives_a_later_cast_of_the_base(dtype):
    layer = layer_of("linear")
    module = module_on(layer, trained=False)
    layer.to(dtype)
    with torch.no_grad():
        up, down = module.lora_factors()
    assert (up @ down).norm() < 1e-6 * layer.weight.float().norm()


@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize("form", list(FORMS))
def test_multiplier_zero_is_the_base_layer_bit_for_bit(kind, form):
    layer = layer_of(kind)
    x = input_of(layer)
    before = layer(x)
    module = module_on(layer, **FORMS[form])
    module.multiplier = 0.0
    assert torch.equal(layer(x), before)


def peft_layer(layer: nn.Linear, rank: int, alpha: float, method: str, para: bool):
    peft = pytest.importorskip("peft", minversion="0.20")
    config = peft.DeftConfig(
        r=rank, alpha=alpha, decomposition_method=method, para=para, target_modules=["0"], init_weights=False
    )
    return peft.get_peft_model(nn.Sequential(layer), config)


@pytest.mark.parametrize(("method", "para"), [("qr", False), ("relu", False), ("qr", True)])
@pytest.mark.parametrize("start", ["identity", "paper"])
def test_equals_pefts_deft(method, para, start):
    """Same P and R in both: outputs, deltas, and gradients of P and R."""
    rank, alpha = 6, 3
    layer, twin = layer_of("linear"), layer_of("linear")
    twin.load_state_dict(layer.state_dict())
    options = {"para": True} if para else {"basis": method, "init": start}
    module = module_on(layer, rank, alpha, **options)
    theirs = peft_layer(twin, rank, alpha, method, para)
    adapter = theirs.base_model.model[0]
    with torch.no_grad():
        adapter.deft_P["default"].copy_(module.effective_P)
        # LAPACK's Q may have columns of the other sign than the positive diagonal's, and then so have peft's rows of R
        sign = torch.linalg.qr(module.effective_P)[1].diagonal().sign()[:, None] if method == "qr" else 1.0
        if not para:  # peft's R is the paper's: the deviation plus E0^T W / s
            start_part = module.E0.T @ layer.weight / module.scale
            adapter.deft_R["default"].copy_(sign * (module.effective_R + start_part))
    x, direction = input_of(layer), torch.randn(3, 5, 40)
    ours, reference = layer(x), theirs(x)
    assert relative_error(ours, reference) < 1e-5
    up, down = module.lora_factors()
    assert relative_error(up @ down, adapter.get_delta_weight("default")) < 1e-5
    (ours * direction).sum().backward()
    (reference * direction).sum().backward()
    assert relative_error(module.P.grad / module.P_rate, adapter.deft_P["default"].grad) < 1e-5
    if not para:
        assert relative_error(sign * module.R.grad / module.R_rate, adapter.deft_R["default"].grad) < 1e-5


def lapack(P: torch.Tensor) -> torch.Tensor:
    Q, T = torch.linalg.qr(P)
    return Q * torch.sign(T.diagonal().detach())


def reference_gradients(module: DeftModule, layer: nn.Module, x, direction, kept=1.0):
    """float64 autograd through LAPACK's QR, the formula and the layer itself.

    :param kept: what dropout multiplies the update's r values by
    """
    P, R, g = (None if t is None else t.detach().double().requires_grad_() for t in (module.P, module.R, module.g))
    eP = P * module.P_rate
    if module.config.basis == "qr":
        L = E = lapack(eP)
    elif module.config.basis == "svd":
        U = torch.linalg.svd(eP, full_matrices=False)[0]
        L = E = U * torch.sign((lapack(eP).T @ U).diagonal().detach())
    elif module.config.basis == "tsvd":
        U, _, Vh = torch.linalg.svd(eP, full_matrices=False)
        L, E = eP, U @ Vh
    elif module.config.basis == "nmf":
        L, E = eP.clamp(min=0).split(module.rank, dim=1)
    else:
        L, E = eP, eP if module.config.basis == "none" else eP.clamp(min=0)
    s = module.scale * (1 if g is None else torch.sigmoid(g))
    W = layer.weight.double().flatten(1)
    E0 = 0 if module.E0 is None else module.E0.double()
    down = -module.config.removal * (E - E0).T @ W
    if R is not None:
        down = down + s * R * module.R_rate
    bias = None if layer.bias is None else layer.bias.double()
    x = x.detach().double().requires_grad_()
    weight = layer.weight.double()
    if isinstance(layer, nn.Conv2d):
        y = nn.functional.conv2d(x, weight, bias, layer.stride, layer.padding)
        z = nn.functional.conv2d(x, down.view(-1, *weight.shape[1:]), None, layer.stride, layer.padding)
        y = y + module.multiplier * torch.einsum("mr,brhw->bmhw", L, z * kept)
    else:
        y = nn.functional.linear(x, weight, bias) + module.multiplier * (x @ down.T * kept) @ L.T
    (y * direction.double()).sum().backward()
    return [t.grad for t in (P, R, g, x) if t is not None]


@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize(
    ("form", "batched"),
    [*((form, False) for form in FORMS), *((form, True) for form in BATCHED)],
)
def test_gradients_equal_float64_autograd(kind, form, batched):
    layer = layer_of(kind)
    module = module_on(layer, batched=batched, **FORMS[form])
    module.multiplier = 0.8
    x = input_of(layer).requires_grad_()
    y = layer(x)
    direction = torch.randn_like(y)
    (y * direction).sum().backward()
    trained = [t for t in (module.P, module.R, module.g, x) if t is not None]
    for t, wanted in zip(trained, reference_gradients(module, layer, x, direction), strict=True):
        size = wanted.norm()
        if t is module.g:  # a sum over all of R, whose terms cancel
            size = module.R.norm() * module.R.grad.norm()
        assert (t.grad.double() - wanted).norm() < 1e-5 * size


@pytest.mark.parametrize("batched", [False, True], ids=["alone", "batched"])
@pytest.mark.parametrize("kind", ["linear", "conv 3x3"])
@pytest.mark.parametrize("options", [{"neuron_dropout": 0.4}, {"rank_dropout": 0.4}], ids=str)
def test_gradients_under_dropout_equal_float64_autograd(kind, options, batched):
    layer = layer_of(kind)
    module = module_on(layer, batched=batched, **options)
    x = input_of(layer).requires_grad_()
    y = layer(x)
    direction = torch.randn_like(y)
    with torch.random.fork_rng():  # the same numbers drawn, for what the r values are multiplied by
        torch.manual_seed(5)
        shape = (3, 4, *y.shape[2:]) if kind == "conv 3x3" else (3, 5, 4)
        kept = module._dropout(torch.ones(shape), rank_dim=1 if kind == "conv 3x3" else -1).double()
        torch.manual_seed(5)
        y = layer(x)
    (y * direction).sum().backward()
    assert 0 < (kept == 0).float().mean() < 1
    for t, wanted in zip((module.P, module.R, x), reference_gradients(module, layer, x, direction, kept), strict=True):
        assert relative_error(t.grad.double(), wanted) < 1e-5


@pytest.mark.parametrize("batched", [False, True], ids=["alone", "batched"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_gradients_are_as_good_as_a_loras(dtype, autocast, batched):
    """Against the same float64 reference: below 2e-2, and at most 1.2 times the error of a LoRA in that precision."""

    def errors(as_lora: bool) -> float:
        torch.manual_seed(1)
        layer = nn.Linear(256, 320).requires_grad_(False)
        layer.weight.data = layer.weight.to(dtype).float()
        module = module_on(layer, 16, 16, batched=batched)
        up, down = (t.detach() for t in module.lora_factors())
        up.requires_grad_(), down.requires_grad_()
        layer.to(dtype if not autocast else torch.float32)
        x = torch.randn(64, 256).to(dtype if not autocast else torch.float32)
        with torch.autocast("cpu", dtype, enabled=autocast):
            if as_lora:
                y = module.org_forward(x)
                cast = dtype if not autocast else torch.float32
                y = y + nn.functional.linear(nn.functional.linear(x, down.to(cast)), up.to(cast))
            else:
                y = layer(x)
        direction = torch.randn_like(y)
        (y * direction).sum().backward()
        if as_lora:
            d = direction.double().T @ x.double()
            pairs = [(down.grad, up.detach().double().T @ d), (up.grad, d @ down.detach().double().T)]
        else:
            module.org_module.float()
            reference = reference_gradients(module, layer, x, direction)
            pairs = list(zip((module.P.grad, module.R.grad), reference[:2], strict=True))
        return max(relative_error(a.double(), b) for a, b in pairs)

    ours, lora = errors(False), errors(True)
    assert ours < 2e-2
    assert ours < 1.2 * lora


@pytest.mark.parametrize("batched", [False, True], ids=["alone", "batched"])
def test_the_first_steps_survive_float16(batched):
    """alpha 1 at rank 16 and a rate of 1e-5: down is of the size of float16's smallest numbers."""
    layer = nn.Linear(320, 320).requires_grad_(False)
    module = module_on(layer, 16, 1, trained=False, batched=batched)
    with torch.no_grad():
        module.R += 1e-5 * torch.randn_like(module.R).sign()
        up, down = module.lora_factors()
    x = (100 * torch.randn(64, 320)).half()  # so that the output itself is of a size for float16
    wanted = x.float() @ (up @ down).T
    layer.half()
    layer.weight.data.zero_()
    layer.bias.data.zero_()
    ours = relative_error(layer(x).float(), wanted)
    assert ours < 3e-3
    plain = nn.functional.linear(nn.functional.linear(x, down.half()), up.half()).float()
    assert relative_error(plain, wanted) > 2 * ours  # why it is done


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant):
    def gradients(mode):
        torch.manual_seed(2)
        layers = [nn.Linear(32, 32).requires_grad_(False) for _ in range(2)]
        modules = [module_on(layer) for layer in layers]
        x = torch.randn(4, 32, requires_grad=True)
        block = nn.Sequential(layers[0], nn.Tanh(), layers[1])
        y = block(x) if mode is None else checkpoint(block, x, use_reentrant=mode)
        y.pow(2).sum().backward()
        return [p.grad for module in modules for p in module.parameters()]

    for a, b in zip(gradients(reentrant), gradients(None), strict=True):
        assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("batched", [False, True], ids=["alone", "batched"])
def test_a_frozen_basis_stays_and_the_rest_learns(batched):
    layer = layer_of("linear")
    module = module_on(layer, batched=batched, freeze_basis=True, init="paper")
    P, before = module.P.clone(), layer(input_of(layer))
    layer(input_of(layer)).square().sum().backward()
    assert module.P.grad is None
    torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.1).step()
    assert torch.equal(module.P, P)
    assert relative_error(layer(input_of(layer)), before) > 1e-2


def test_second_derivatives():
    layer = layer_of("linear")
    module = module_on(layer)
    (first,) = torch.autograd.grad(layer(input_of(layer)).pow(2).sum(), module.P, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), module.P)
    assert second.isfinite().all()
    assert second.norm() > 0


def test_weight_is_read_where_it_is_at_that_moment():
    """Block swap replaces a layer's weight data between forward and backward: neither pass may hold an older one."""
    layer = layer_of("linear")
    module = module_on(layer)
    x, weight = input_of(layer), layer.weight.data

    def gradient_of_P(during_backward):
        layer.weight.data = weight.clone()
        y = module.org_forward(x).detach() * 0 + (layer(x) - module.org_forward(x).detach())
        layer.weight.data = during_backward
        module.P.grad = None
        y.sum().backward()
        return module.P.grad

    same, zero, doubled = (gradient_of_P(weight * factor) for factor in (1.0, 0.0, 2.0))
    assert relative_error(same - zero, doubled - same) < 1e-4  # the part with W follows the W of the backward pass
    assert relative_error(doubled, same) > 1e-2


def test_base_weight_is_no_part_of_the_module():
    layer = layer_of("linear")
    module = module_on(layer)
    assert set(module.state_dict()) == {"P", "R", "E0"}
    shapes = {tuple(t.shape) for t in [*module.parameters(), *module.buffers()]}
    assert tuple(layer.weight.shape) not in shapes
    held = [v for v in module.__dict__.values() if isinstance(v, torch.Tensor)]
    assert not held


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_parameters_stay_float32_whatever_the_network_is_cast_to(cast):
    module = module_on(layer_of("linear"))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    getattr(nn.ModuleList([module]), cast)()
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])
        assert value.dtype == torch.float32
    assert all(p.requires_grad for p in module.parameters())


def test_neuron_dropout_drops_the_ranks_values():
    layer = layer_of("linear")
    module = module_on(layer, neuron_dropout=0.5)
    x = input_of(layer, 1)[:, :1].expand(4000, 1, -1)
    base = module.org_forward(x)
    update = layer(x) - base
    module.eval()
    full = layer(x) - base
    assert relative_error(update, full) > 0.5
    assert relative_error(update.mean(0), full.mean(0)) < 0.1  # the same in expectation


@pytest.mark.parametrize("kind", ["linear", "conv 3x3"])
def test_rank_dropout_drops_a_rank_for_a_whole_sample(kind):
    layer = layer_of(kind)
    module = module_on(layer, rank=4, rank_dropout=0.5)
    x = input_of(layer, 6)
    update = (layer(x) - module.org_forward(x)).detach()
    up = module.lora_factors()[0].detach()

    def between(update):  # the rank's values that an update came from, (rank, sample, position)
        columns = update.movedim(1 if isinstance(layer, nn.Conv2d) else -1, 0).flatten(2)
        return torch.linalg.lstsq(up, columns.flatten(1)).solution.unflatten(1, columns.shape[1:])

    dropped = between(update)
    module.eval()
    ratio = dropped / between((layer(x) - module.org_forward(x)).detach())
    kept = ratio.median(dim=2).values.round()
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert (ratio - kept[:, :, None]).abs().median() < 1e-2


def test_module_dropout_skips_the_layer_at_its_rate():
    layer = layer_of("linear")
    module = module_on(layer, module_dropout=0.25)
    x = input_of(layer)
    base = module.org_forward(x)
    skipped = sum(torch.equal(layer(x), base) for _ in range(400)) / 400
    assert 0.18 < skipped < 0.32
    module.eval()
    assert not any(torch.equal(layer(x), base) for _ in range(50))


@pytest.mark.parametrize("form", ["qr", "svd", "relu", "none", "gate", "half removed", "none removed"])
@pytest.mark.parametrize("rank", [4, 7])
def test_reading_a_lora_is_exact(form, rank):
    layer = layer_of("conv 3x3")
    module = module_on(layer, rank, alpha=1, **FORMS[form])
    m, n = module.target.shape
    up, down = torch.randn(m, 4), torch.randn(4, n)
    module.load_lora(up, down)
    assert relative_error(torch.matmul(*module.lora_factors()), up @ down) < 2e-6


def test_para_reads_only_paras_of_its_own_base():
    layer = layer_of("linear")
    module = module_on(layer, para=True)
    up, down = (t.detach() for t in module.lora_factors())
    module.load_lora(2 * up, down / 2)
    assert relative_error(torch.matmul(*module.lora_factors()), up @ down) < 2e-6
    with pytest.raises(DeftError, match="no PaRa of this base model"):
        module.load_lora(torch.randn_like(up), torch.randn_like(down))


@pytest.mark.parametrize("form", ["qr", "relu", "none", "gate", "paper start", "half removed", "none removed"])
def test_scale_delta(form):
    module = module_on(layer_of("linear"), **FORMS[form])
    before = torch.matmul(*module.lora_factors()).detach()
    P = module.P.clone()
    module.scale_delta(0.25)
    assert relative_error(torch.matmul(*module.lora_factors()), 0.25 * before) < 1e-5
    assert torch.equal(module.P, P)


def test_weight_decay_pulls_towards_the_start_not_towards_an_erased_base():
    layer = layer_of("linear")
    module = module_on(layer, trained=False)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.5)
    x = input_of(layer)
    before = layer(x)
    for _ in range(20):
        (layer(x) * 0).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert relative_error(layer(x), before) < 1e-5


def test_adding_to_a_half_precision_weight_rounds_once():
    layer = layer_of("conv 3x3").to(torch.bfloat16)
    up, down = torch.randn(40, 3), torch.randn(3, 108) * 1e-2
    wanted = (layer.weight.double().flatten(1) + 0.5 * (up.double() @ down.double())).to(torch.bfloat16)
    add_to_weight(Target("lora_unet_x", "x", layer), up, down, 0.5)
    assert (layer.weight.flatten(1) == wanted).float().mean() > 0.999  # float32 sums may fall on the other side


def test_meta_weight_is_refused_by_name():
    layer = nn.Linear(8, 8, device="meta")
    with pytest.raises(DeftError, match="meta device"):
        module_on(layer, trained=False, init="svd")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bassis": "qr"}, "unknown network_args key 'bassis' .did you mean 'basis'"),
        ({"basis": "rq"}, "basis=rq: allowed are qr, svd, relu, none, tsvd, nmf"),
        ({"conv_dim": "4.5"}, "conv_dim=4.5: must be a whole number"),
        ({"dim": 0}, "network_dim=0: must be a whole number of at least 1"),
        ({"dim": -3}, "network_dim=-3: must be"),
        ({"alpha": "many"}, "network_alpha=many: must be a number"),
        ({"rank_dropout": "1"}, "rank_dropout=1: must be a number from 0 to below 1"),
        ({"para": "maybe"}, "para=maybe: must be true or false"),
        ({"para": "true", "init": "identity"}, "init=identity: para=true removes"),
        ({"para": "true", "basis": "relu"}, "para=true needs basis=qr"),
        ({"basis": "lrmf"}, "basis=tsvd .lrmf. only removes: add para=true"),
        ({"basis": "nmf"}, "basis=nmf only removes: add para=true"),
        ({"para": "true", "basis": "nmf", "init": "svd"}, "init=svd: basis=nmf starts with random"),
        ({"para": "true", "removal": "0.5"}, "removal=0.5: with para=true"),
        ({"para": "true", "freeze_basis": "true"}, "freeze_basis=true: with para=true"),
        ({"removal": "1.5"}, "removal=1.5: must be a number from 0 to 1"),
        ({"para": "yes", "gate": "yes"}, "gate=true scales R"),
        ({"init": "paper", "removal": "0.5"}, "removal=0.5: init=paper starts with all"),
        ({"init": "zero"}, "init=zero: allowed are identity, paper, svd"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(DeftError, match=message) as raised:
        parse_options(options)
    assert "\n" not in str(raised.value)


def test_options_are_read_as_strings():
    given = {"conv_dim": "4", "para": "False", "gate": "TRUE", "dropout": 0.1, "pad": "no", "init": None}
    config = parse_options(user_options(given) | {"dim": 8})
    assert (config.conv_dim, config.para, config.gate, config.neuron_dropout, config.pad) == (
        4,
        False,
        True,
        0.1,
        False,
    )
    assert user_options({"dropout": None}) == {}
    assert parse_options({}).scale == 1 / 4  # sd-scripts' defaults: dim 4, alpha 1
    assert parse_options({"dim": 8, "alpha": 0}).scale == 1  # as in sd-scripts


def test_removal_is_the_papers_where_a_published_form_is_asked_for():
    forms = [{"para": True}, {"gate": True}, {"basis": "relu"}, {"basis": "svd"}, {"basis": "none"}, {"init": "paper"}]
    assert all(parse_options(form).removal == 1 for form in forms)
    assert parse_options({}).removal == parse_options({"freeze_basis": True, "init": "minor"}).removal == 0
    assert parse_options({"removal": "1"}).removal == 1
