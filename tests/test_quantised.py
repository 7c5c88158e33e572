"""Frozen layers in 8 and 4 bits, as torchao and bitsandbytes keep them: what DEFT computes on them, and keeps.

Where these are installed: `pip install torchao bitsandbytes`. They are not in tests/requirements.txt: diffusers imports
them wherever it finds them, which takes every process seconds, and torchao tells stderr what it cannot load.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import weakref

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import library.models.flux
import library.models.quantised
import train_network_deft
from library.models.quantised import PACKAGES, quantise, read_anew
from networks import deft, deft_io, deft_math, deft_weights
from networks.deft_config import DeftError
from networks.deft_module import DeftModule
from networks.deft_progress import Bar
from networks.deft_targets import Target, is_adaptable
from tests import small_flux
from tests.conftest import arguments, deltas, largest_error, loaded, perturb, relative_error
from tests.test_architectures import Flux, network

INSTALLED = [kind for kind, package in PACKAGES.items() if importlib.util.find_spec(package)]
KINDS = [pytest.param(kind, marks=pytest.mark.skipif(kind not in INSTALLED, reason=f"needs {PACKAGES[kind]}"))
         for kind in PACKAGES]  # fmt: skip
CPU = torch.device("cpu")
ERRORS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def flux(kind: str | None, dtype: torch.dtype = torch.float32, **shape: int) -> Flux:
    """The same weights every time, for the same shape."""
    torch.manual_seed(0)
    model = Flux(**({"dim": 64, "double": 1, "single": 1} | shape))
    if kind is not None:
        quantise(model, kind, CPU, dtype)
    return model.to(dtype)


def stands_for(layer: nn.Linear) -> Tensor:
    """W (m, n) in float32, seen from what the layer's own forward pass makes of the unit vectors."""
    with torch.no_grad():
        answers = layer(torch.eye(layer.in_features, dtype=layer.bias.dtype)) - layer.bias
    return answers.mT.float()


def plain_copy(model: Flux) -> Flux:
    """The same model with ordinary layers."""
    found = copy.deepcopy(model)
    for path, layer in list(found.named_modules()):
        if is_adaptable(layer) and deft_weights.is_quantised(layer):
            plain = nn.Linear(layer.in_features, layer.out_features).requires_grad_(False)
            plain.weight.data, plain.bias.data = stands_for(layer).to(layer.bias.dtype), layer.bias.data.clone()
            found.set_submodule(path, plain)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_read_as_the_layers_own_forward_uses_it(kind):
    layer, wanted = (flux(k).double_blocks[0].img_attn.qkv for k in (kind, None))
    assert (deft_weights.is_quantised(layer), deft_weights.is_quantised(wanted)) == (True, False)
    assert relative_error(deft_weights.read_weight(layer), stands_for(layer)) < 1e-6
    assert torch.equal(deft_weights.read_weight(layer, (5, 70)), deft_weights.read_weight(layer)[5:70])
    assert 1e-3 < relative_error(stands_for(layer), wanted.weight) < {"int8": 0.01, "fp8": 0.04, "nf4": 0.12}[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("removal", ["0", "1"])
def test_gradients_are_those_of_the_dequantised_layer_in_float64(kind, dtype, removal):
    layer = flux(kind, dtype).double_blocks[0].img_attn.qkv
    config = network(Flux(), removal=removal).config
    module = DeftModule(Target("lora_unet_x", "x", layer), 0.7, 4, 1.5, config).train()
    perturb(module)
    W, b = deft_weights.read_weight(layer).double(), layer.bias.double()
    module.apply_to()
    x, direction = torch.randn(2, 5, 64).to(dtype).requires_grad_(), torch.randn(2, 5, 192).to(dtype)
    (layer(x) * direction).sum().backward()

    P, R = (p.detach().double().requires_grad_() for p in (module.P, module.R))
    wide = x.detach().double().requires_grad_()
    Q, start = torch.linalg.qr(P)[0], 0 if module.E0 is None else module.E0.double()
    Q = Q * torch.sign((Q * P).sum(0))  # columns in the direction of P's, since the triangle's diagonal is positive
    down = 1.5 * module.R_rate * R - (0 if removal == "0" else (Q - start).mT @ W)
    out = wide @ W.mT + b + 0.7 * (wide @ down.mT) @ Q.mT
    (out * direction).sum().backward()
    for found, wanted in ((module.P, P), (module.R, R), (x, wide)):
        assert relative_error(found.grad.double(), wanted.grad) < ERRORS[dtype]
    assert relative_error(layer(x).double(), out) < ERRORS[dtype]


OPTIONS = [{}, {"removal": "0"}, {"split_qkv": "true"}, {"basis": "relu"}, {"neuron_dropout": "0.3"}, {"gate": "true"}]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_whole_model_trains_as_one_of_ordinary_layers(kind, options):
    """All layers at once, parts of a fused one, and dropout within a layer."""
    model = flux(kind)
    other, x, found = plain_copy(model), torch.randn(2, 5, 4), []
    for one in (other, model):
        torch.manual_seed(1)
        net = network(one, **options).train()
        torch.manual_seed(2)
        out = one(x)
        out.square().sum().backward()
        found.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None} | {"out": out})
        with torch.no_grad():
            net.set_multiplier(0.0)
            found[-1]["base"] = one(x)
    assert largest_error(found[1], found[0]) < 1e-4


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """What a forward pass keeps for the backward pass, each storage once; the model's own weights left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters() if type(p) is nn.Parameter}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    out.sum().backward()
    return sum(kept.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"split_qkv": "true"}, {"neuron_dropout": "0.3"}], ids=str)
def test_no_dequantised_weight_is_kept(kind, options):
    """For the backward pass no more than with ordinary layers, and behind a step nothing that is as large as W."""
    model, x = flux(kind, torch.bfloat16), torch.randn(1, 2, 4, dtype=torch.bfloat16)
    other, kept = plain_copy(model), []
    for one in (other, model):
        for module in network(one, **options).train().all_modules:
            module._is_plain_linear = False  # whose factors are kept elsewhere
        kept.append(kept_bytes(one, x))
    W = 2 * model.double_blocks[0].img_attn.proj.in_features ** 2  # bytes of the smallest
    assert kept[1] <= kept[0]
    alone = flux(kind, torch.bfloat16).requires_grad_(False)
    if kind != "nf4":  # as torchao does it by itself, in which case this test sees it
        assert kept_bytes(alone, x.clone().requires_grad_()) > kept[0] + W
    del other, one
    gc.collect()
    alive = [t for t in gc.get_objects() if type(t) is Tensor and t.is_floating_point() and t.numel() >= W / 2]
    assert not [t for t in alive if t.dtype == torch.bfloat16]


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_layer_s_old_weight_is_gone_before_the_next_but_one(kind, monkeypatch):
    """Else the whole model would be on the GPU in bf16."""
    model, alive = flux(None), []
    old = [weakref.ref(layer.weight) for layer in model.modules() if isinstance(layer, nn.Linear)]

    class Counting(Bar):
        def add(self, number: int) -> None:
            alive.append(sum(weight() is not None for weight in old))

    monkeypatch.setattr(library.models.quantised, "Bar", Counting)
    quantise(model, kind, CPU, torch.float32)
    assert all(left <= len(old) - done + 1 for done, left in enumerate(alive, 1))
    assert len(alive) > 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_goes_out_and_in_and_knows_its_base(kind, tmp_path):
    file = tmp_path / "a.safetensors"
    net, fresh = (network(flux(kind, torch.bfloat16), save_format="deft") for _ in range(2))
    perturb(fresh)
    net.save_weights(str(file), None, {})
    assert relative_error(torch.cat([d.flatten() for d in deltas(fresh).values()]),
                          torch.cat([d.flatten() for d in deltas(net).values()])) > 0.1  # fmt: skip
    fresh.load_weights(str(file))
    assert largest_error(deltas(fresh), deltas(net)) < 1e-6
    with safe_open(str(file), "pt") as opened:
        metadata = opened.metadata()
    read = [(m.lora_name, deft_weights.read_weight(m.org_module)) for m in net.all_modules]
    assert metadata[deft_io.BASE_HASH_KEY] == deft_io.base_fingerprint(read)
    assert metadata[deft_io.BASE_DTYPE_KEY] == f"bfloat16 of {type(net.all_modules[0].org_module.weight).__name__}"
    unquantised = network(flux(None, torch.bfloat16), save_format="deft")
    unquantised.save_weights(str(file), None, {})
    with safe_open(str(file), "pt") as opened:
        assert opened.metadata()[deft_io.BASE_HASH_KEY] != metadata[deft_io.BASE_HASH_KEY]


@pytest.mark.parametrize("kind", KINDS)
def test_starts_that_need_w_use_what_the_layer_computes_with(kind):
    model = flux(kind)
    net = network(model, trained=False, init="svd", removal="1")
    module = net.all_modules[0]
    U = torch.linalg.svd(stands_for(module.org_module))[0][:, :4]
    Q = deft_math.positive_qr(module.effective_P.detach())[0]
    assert relative_error(Q @ Q.mT, U @ U.mT) < 1e-3
    net.remove()
    x = torch.randn(2, 5, 4)
    base = model(x)
    network(model, trained=False)
    assert relative_error(model(x), base) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_refused_before_anything_is_changed(kind):
    model = flux(kind)
    first = flux(None).double_blocks[0].img_attn.qkv  # an ordinary layer before the quantised ones
    model.double_blocks[0].img_attn.qkv = first
    net, x = network(model), torch.randn(2, 5, 4)
    weights = {f"{m.lora_name}.lora_{k}.weight": t for m in net.all_modules
               for k, t in zip(("up", "down"), m.lora_factors(), strict=True)}  # fmt: skip
    before = first.weight.clone()
    assert not net.is_mergeable()
    for merge in (lambda: net.merge_to([], model, weights), net.pre_calculation):
        with pytest.raises(DeftError, match="cannot be merged into a quantised weight; merge before"):
            merge()
    assert torch.equal(first.weight, before)
    assert model(x).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_left_as_it_is(kind):
    """By a network that is cast, applied and removed; and a model that is cast and moved about is read as before."""
    model, x = flux(kind), torch.randn(2, 5, 4)
    layer = model.double_blocks[0].img_attn.qkv
    base, weight, W = model(x), layer.weight, deft_weights.read_weight(layer)
    net = network(model)
    net.to(torch.float16).to("cpu")
    assert net.all_modules[0].P.dtype == torch.float32
    trained = model(x)
    model.to("cpu")
    assert layer.weight.data_ptr() == weight.data_ptr() if kind == "nf4" else layer.weight is not None
    assert torch.equal(model(x), trained)
    net.remove()
    assert torch.equal(model(x), base)
    assert torch.equal(deft_weights.read_weight(layer), W)
    model.to(torch.bfloat16)
    assert relative_error(deft_weights.read_weight(layer).float(), W) < 1e-2


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.values[0] != "nf4"])
def test_a_model_may_be_quantised_after_the_adapter_has_been_put_on_it(kind):
    model, x = flux(None), torch.randn(2, 5, 4)
    net = network(model).train()
    quantise(model, kind, CPU, torch.float32)
    model(x).sum().backward()
    wanted = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    net.remove()
    other = plain_copy(model)
    again = network(other, trained=False).train()
    again.load_state_dict(net.state_dict())
    other(x).sum().backward()
    found = [p.grad for p in again.parameters() if p.grad is not None]
    assert max(relative_error(a, b) for a, b in zip(found, wanted, strict=True)) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_reaches_quantised_layers(kind):
    model, x = flux(kind, torch.bfloat16), torch.randn(2, 5, 4)
    net = network(model).train()
    block = model.double_blocks[0].img_attn.qkv
    with torch.autocast("cpu", torch.bfloat16):
        assert block(torch.randn(2, 64, requires_grad=True)).dtype == torch.bfloat16
        model(x).float().sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


class Packed(nn.Linear):
    """As diffusers' GGUFLinear has its weight: bytes, and nobody here who knows what they stand for."""

    def __init__(self) -> None:
        super().__init__(64, 192)
        self.weight = nn.Parameter(torch.zeros(192, 34, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_is_not_adapted_keeps_no_dequantised_weight(kind):
    model = flux(kind, torch.bfloat16)
    layer, kept = model.double_blocks[0].img_attn.qkv, []
    read_anew(model)
    x = torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert not [t for t in kept if t.is_floating_point() and t.numel() >= 64 * 192 and t is not layer.weight]
    g = torch.randn_like(y)
    y.backward(g)
    assert relative_error(x.grad.double(), g.double() @ deft_weights.read_weight(layer).double()) < 1e-2


def test_layers_of_unknown_quantisation_are_refused_by_name():
    model = flux(None)
    model.double_blocks[0].img_attn.qkv = Packed()
    with pytest.raises(DeftError, match="double_blocks_0_img_attn_qkv: the weight of a Packed in"):
        network(model)


def test_subclasses_of_linear_count_where_they_are_called():
    class Special(nn.Linear):
        pass

    assert is_adaptable(Special(4, 4))
    assert not is_adaptable(nn.MultiheadAttention(4, 2).out_proj)
    model = flux(None)
    model.double_blocks[0].img_attn.qkv = Special(64, 192)
    assert "lora_unet_double_blocks_0_img_attn_qkv" in {m.lora_name for m in network(model).all_modules}


def test_bitsandbytes_layers_of_8_bits():
    """Its forward pass rounds x too, its backward does not; what belongs to the weight moves about in it."""
    bnb = pytest.importorskip("bitsandbytes")
    plain = nn.Linear(64, 96)
    layer = bnb.nn.Linear8bitLt(64, 96, has_fp16_weights=False)
    layer.load_state_dict(plain.state_dict())
    layer = layer.to("cpu").requires_grad_(False)
    wanted = bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    assert relative_error(deft_weights.read_weight(layer), wanted) < 1e-6
    assert relative_error(wanted, plain.weight) < 0.01
    x = torch.randn(3, 64, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    own = x.grad.clone()
    assert relative_error(deft_weights.read_weight(layer), wanted) < 1e-6
    module = DeftModule(Target("lora_unet_x", "x", layer), 1.0, 4, 1.0, network(Flux()).config)
    module.apply_to()
    x.grad = None
    out = layer(x)
    out.sum().backward()
    assert relative_error(out, y) < 1e-5
    assert relative_error(x.grad, own) < 1e-2
    assert torch.allclose(x.grad, wanted.sum(0).expand(3, 64), atol=1e-4)


def test_bitsandbytes_weights_that_pictures_have_packed_are_read():
    """Drawing on a CPU with AVX512 packs a weight in its own way for it."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    layer = flux("nf4", torch.bfloat16).double_blocks[0].img_attn.qkv
    W = deft_weights.read_weight(layer)
    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    assert relative_error(deft_weights.read_weight(layer), W) < 5e-3  # its packing rounds scales to bf16


# --- in the trainer ---------------------------------------------------------------------------------------------------


def test_a_package_that_is_missing_is_told_before_the_model_is_loaded(run, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for kind, package in PACKAGES.items():
        assert run(quantize_base=kind) == 2
        assert f"--quantize_base {kind}: not installed; pip install {package}" in capsys.readouterr().err


def test_one_way_of_fewer_bits_at_a_time(run, capsys):
    assert run(quantize_base="nf4", fp8_base=True, mixed_precision="bf16") == 2
    assert "--fp8_base and --quantize_base do not go together" in capsys.readouterr().err


@pytest.fixture(scope="module")
def to_merge(tmp_path_factory, model_folder):
    """An adapter file for --base_weights."""
    file = tmp_path_factory.mktemp("base") / "first.safetensors"
    model = loaded(model_folder)
    network(model.denoiser).save_weights(str(file), None, {})
    return file


@pytest.mark.parametrize("kind", KINDS)
def test_training_with_everything_around_it(run, kind, tmp_path, to_merge):
    """Gradient checkpointing, merged base weights, a picture, a state, and going on from it."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1 --l 1\n")
    common = {"quantize_base": kind, "base_weights": [to_merge], "network_train_unet_only": True}
    more = {"gradient_checkpointing": True, "sample_prompts": prompts, "sample_every_n_steps": 3, "save_state": True}
    assert run(**common, **more) == 0
    assert len(list((tmp_path / "out" / "sample").glob("*.png"))) == 1
    assert run(output_name="on", resume=tmp_path / "out" / "cat-state", **common, max_train_steps=4) == 0
    with safe_open(str(tmp_path / "out" / "on.safetensors"), "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_quantize_base"] == kind
    assert " of " in metadata["deft_base_dtype"]


@pytest.fixture(scope="module")
def small_flux_model(tmp_path_factory):
    return small_flux.build(tmp_path_factory.mktemp("flux"))


@pytest.mark.parametrize("kind", KINDS)
def test_flux_trains(kind, small_flux_model, photos, tmp_path, fresh_accelerator, monkeypatch):
    """Of one file as well: what is quantised has been loaded by then."""
    monkeypatch.setattr(library.models.flux, "CONFIG", small_flux_model.folder)
    common = {"mixed_precision": "bf16", "cache_text_encoder_outputs": True, "network_train_unet_only": True,
              "tokenizer_cache_dir": small_flux_model.tokenizers, "quantize_base": kind, "learning_rate": 1e-2,
              "t5xxl_max_token_length": 48, **small_flux_model.files(tmp_path)}  # fmt: skip
    given = arguments(small_flux_model.folder, photos, tmp_path, **common)
    assert train_network_deft.main(given) == 0
    with safe_open(str(tmp_path / "out" / "cat.safetensors"), "pt") as file:
        ups = [file.get_tensor(key) for key in file.keys() if key.endswith("lora_up.weight")]
        downs = [file.get_tensor(key) for key in file.keys() if key.endswith("lora_down.weight")]
        assert " of " in file.metadata()["deft_base_dtype"]
    assert ups
    assert all(up.isfinite().all() for up in ups)
    assert all(down.any() for down in downs)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_are_not_adapted_keep_their_precision(kind, model_folder):
    model = loaded(model_folder, quantize_base=kind)
    model.quantise(CPU, torch.float32)
    quantised = {path for path, layer in model.denoiser.named_modules()
                 if isinstance(layer, nn.Linear) and deft_weights.is_quantised(layer)}  # fmt: skip
    net = deft.create_network(1.0, 4, 4.0, None, model.text_encoders, model.denoiser)
    adapted = {id(m.org_module) for m in net.unet_modules}
    assert quantised == {path for path, layer in model.denoiser.named_modules()
                         if id(layer) in adapted and isinstance(layer, nn.Linear)}  # fmt: skip
    assert not any("time_emb" in path for path in quantised)
    assert next(model.denoiser.parameters()).device == CPU
