"""`fuse_qkv`: queries, keys and values of one P and one R, whatever layers the model and the files have of them."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

import train_network_deft
from networks import convert_deft, deft, deft_io, deft_math, inspect_deft
from networks.deft_config import DeftError
from networks.deft_module import DeftModule
from tests import small_omnigen
from tests.conftest import arguments, deltas, file_factors, largest_error, relative_error
from tests.test_architectures import Flux, OmniGen, flux_transformer, network, omnigen_transformer, sdxl_unet
from tests.test_conditions import gradients

QKV = "lora_unet_layers_0_self_attn_to_q+lora_unet_layers_0_self_attn_to_k+lora_unet_layers_0_self_attn_to_v"
PIECES = QKV.split("+")
FORMS = [{}, {"removal": "0"}, {"removal": "0.5"}, {"init": "paper"}, {"gate": "true"}, {"para": "true"},
         {"basis": "relu"}, {"basis": "svd"}, {"basis": "none"}, {"init": "svd"}]  # fmt: skip


def answer(model: nn.Module, call=None) -> Tensor:
    """Of the small transformer of diffusers, for two captions of five words."""
    generator = torch.Generator().manual_seed(5)
    dtype = next(model.parameters()).dtype
    inputs = {
        "hidden_states": torch.randn(2, 4, 4, 4, generator=generator, dtype=torch.float64).to(dtype),
        "timestep": torch.tensor([0.3, 0.7], dtype=dtype),
        "input_ids": torch.randint(3, 40, (2, 5), generator=generator),
        "input_img_latents": [], "input_image_sizes": {}, "attention_mask": torch.ones(2, 10, 10, dtype=dtype),
        "position_ids": torch.arange(10).repeat(2, 1), "return_dict": False,
    }  # fmt: skip
    return (call or model)(**inputs)[0]


def fused_modules(net: deft.DeftNetwork) -> list[DeftModule]:
    return [m for m in net.all_modules if len(m.target.places) > 1]


def module_of(net: deft.DeftNetwork, name: str = QKV) -> DeftModule:
    return next(m for m in net.all_modules if m.lora_name == name)


def plain_delta(m: DeftModule, W: Tensor, P: Tensor, R: Tensor | None, g: Tensor | None) -> Tensor:
    """The formula's W' - W in float64, in the words of the paper, of what the optimizer sees."""
    basis, P = m.config.basis, P * m.P_rate
    if basis == "qr":
        L = torch.linalg.qr(P).Q
        L = L * (L.detach() * P.detach()).sum(0).sign()
    elif basis == "svd":
        L = deft_math.left_singular_vectors(P)
    else:
        L = P
    E = torch.relu(P) if basis == "relu" else L
    removed = 0 if m.E0 is None else m.config.removal * (E - m.E0.double()).T @ W
    scale = m.scale if g is None else m.scale * torch.sigmoid(g)
    return L @ (-removed if R is None else scale * m.R_rate * R - removed)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_answer_and_gradients_are_those_of_the_fused_formula_in_float64(options, batched):
    """Each layer's weight plus its rows of the one delta, through the whole model."""
    model = omnigen_transformer()
    net = network(model, **{"fuse_qkv": "true", **({"removal": None} if "removal" not in options else {}), **options})
    net.train()
    net.batched = batched
    found = answer(model)
    found.square().sum().backward()

    paths = {layer: path for path, layer in model.named_modules()}
    exact = copy.deepcopy(model).double()
    weights, leaves = {}, {}
    for m in net.all_modules:
        leaves[m] = [None if p is None else p.detach().double().requires_grad_() for p in (m.P, m.R, m.g)]
        delta = plain_delta(m, m.base_weight().double(), *leaves[m])
        rows = delta.split([place.shape[0] for place in m.target.places])
        for place, some in zip(m.target.places, rows, strict=True):
            weights[f"{paths[place.layer]}.weight"] = place.layer.weight.double() + some
    for layer in exact.modules():
        layer.__dict__.pop("forward", None)
    expected = answer(exact, lambda **inputs: functional_call(exact, weights, kwargs=inputs))
    expected.square().sum().backward()
    assert relative_error(found.double(), expected) < 1e-5
    assert len(fused_modules(net)) == 2
    for m in net.all_modules:
        for parameter, leaf in zip((m.P, m.R, m.g), leaves[m], strict=True):
            if parameter is not None:
                assert relative_error(parameter.grad.double(), leaf.grad) < 1e-5, m.lora_name


@pytest.mark.parametrize("options", [{}, {"removal": "0"}, {"basis": "relu"}], ids=str)
def test_checkpointing_and_accumulation_change_nothing(options):
    results = []
    for checkpointed, steps in ((False, 2), (True, 2)):
        torch.manual_seed(3)
        model = omnigen_transformer()
        net = network(model, fuse_qkv="true", **options).train()
        if checkpointed:
            model.train()
            model.enable_gradient_checkpointing()
        for _ in range(steps):
            answer(model).square().sum().backward()
        results.append(gradients(net))
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(*results, strict=True))


def test_both_forms_of_the_model_train_the_same(tmp_path):
    """Three layers of diffusers' and the one of the original's: equal P, R and gradients, equal files."""
    theirs, ours = omnigen_transformer(), OmniGen()
    for k, block in enumerate(ours.llm.layers):
        attention = theirs.layers[k].self_attn
        block["self_attn"].qkv_proj.weight.copy_(torch.cat([getattr(attention, f"to_{x}").weight for x in "qkv"]))
        block["self_attn"].o_proj.weight.copy_(attention.to_out[0].weight)
    nets = [network(model, fuse_qkv="true", train_block_indices="0").train() for model in (theirs, ours)]
    nets[1].load_state_dict(nets[0].state_dict())
    x = torch.randn(2, 5, 16)
    attention, block = theirs.layers[0].self_attn, ours.llm.layers[0]["self_attn"]
    attention.to_out[0](attention.to_q(x) * attention.to_k(x) + attention.to_v(x)).square().sum().backward()
    q, k, v = block.qkv_proj(x).chunk(3, -1)
    block.o_proj(q * k + v).square().sum().backward()
    for name in (QKV, "lora_unet_layers_0_self_attn_to_out_0"):
        a, b = (module_of(net, name) for net in nets)
        assert relative_error(a.P.grad, b.P.grad) < 1e-5
        assert relative_error(a.R.grad, b.R.grad) < 1e-5
    for number, net in enumerate(nets):
        net.save_weights(str(tmp_path / f"{number}.safetensors"), torch.float32, None)
    first, second = (load_file(tmp_path / f"{number}.safetensors") for number in range(2))
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[key], second[key], atol=1e-6) for key in first)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_file_is_a_plain_lora_of_three_layers_with_one_down(tmp_path, dtype):
    """Read into split layers, into the original's, and back into the fused form, which is a fixed point."""
    model, file = omnigen_transformer(), str(tmp_path / "x.safetensors")
    net = network(model, fuse_qkv="true", trained=False)
    with torch.no_grad():
        m = module_of(net)
        m.P[:16] *= 100  # so that the layers' ups are of very different sizes
        m.R.normal_()
    net.save_weights(file, dtype, None)
    tensors = load_file(file)
    downs = [tensors[f"{name}.lora_down.weight"] for name in PIECES]
    assert downs[0].shape == (4, 16)
    assert torch.equal(downs[0], downs[1])
    assert torch.equal(downs[0], downs[2])
    expected = torch.matmul(*m.lora_factors()).detach()
    tolerance = 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps

    for name, factor in zip(PIECES, (1.0, 4.0, 0.125), strict=True):  # as other programs' files of float16 may have it
        tensors[f"{name}.lora_down.weight"] *= factor
        tensors[f"{name}.lora_up.weight"] /= factor
    save_file(tensors, file, deft_io.read_metadata(file))

    apart = read(omnigen_transformer(), file, fuse_qkv="false")
    assert relative_error(torch.cat([deltas(apart)[name] for name in PIECES]), expected) < tolerance
    for other in (read(omnigen_transformer(), file), read(OmniGen(), file)):
        assert module_of(other).rank == 4
        assert relative_error(deltas(other)[QKV], expected) < tolerance
        other.save_weights(str(tmp_path / "again.safetensors"), torch.float32, None)
        again = read(omnigen_transformer(), str(tmp_path / "again.safetensors"))
        assert largest_error(deltas(again), deltas(other)) < 1e-6
        assert {m.rank for m in again.all_modules} == {4}


def read(model: nn.Module, file: str, **options) -> deft.DeftNetwork:
    net, _ = deft.create_network_from_weights(1.0, file, None, [], model, **options)
    net.apply_to([], model)
    assert net.load_weights(file).left_at_start == 0
    return net


def test_a_fresh_network_comes_back_with_its_subspace(tmp_path):
    """Where R is 0, all rows of down are equal: none is taken for another."""
    net = network(omnigen_transformer(), fuse_qkv="true", trained=False)
    net.save_weights(str(tmp_path / "x.safetensors"), torch.float32, None)
    again = read(omnigen_transformer(), str(tmp_path / "x.safetensors"))
    (up, _), (wanted, _) = (module_of(n).lora_factors() for n in (again, net))
    assert relative_error(up @ up.T, wanted @ wanted.T) < 1e-5
    assert not any(m.R.any() for m in again.all_modules)


def test_layers_with_downs_of_their_own_are_read_with_the_sum_of_their_ranks(tmp_path):
    file, model = str(tmp_path / "x.safetensors"), omnigen_transformer()
    net = network(model, dim=2)
    net.save_weights(file, torch.float32, None)
    wanted = deltas(net)
    net.remove()
    whole = read(model, file, fuse_qkv="true")
    assert module_of(whole).rank == 6
    assert relative_error(deltas(whole)[QKV], torch.cat([wanted[name] for name in PIECES])) < 1e-6
    whole.remove()
    small = network(model, fuse_qkv="true", trained=False)
    with pytest.raises(DeftError, match="has rank 6, the network 4"):
        small.load_weights(file)


def test_what_a_file_does_not_hold_of_the_three_does_not_change(tmp_path):
    up, down = torch.randn(16, 2), torch.randn(2, 16)
    name = PIECES[1]
    tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(2.0)}
    deft_io.write_safetensors(tensors, tmp_path / "x.safetensors", {})
    found = deltas(read(omnigen_transformer(), str(tmp_path / "x.safetensors"), fuse_qkv="true"))[QKV]
    assert relative_error(found[16:32], up @ down) < 1e-6
    assert found[:16].norm() + found[32:].norm() < 1e-5


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_the_formulas_own_matrices_are_saved_and_read(tmp_path, options):
    options = {"fuse_qkv": "true", "save_format": "deft", **options}
    file, model = str(tmp_path / "x.safetensors"), omnigen_transformer()
    net = network(model, **{"removal": None, **options})
    net.save_weights(file, None, None)
    wanted, state = deltas(net), net.state_dict()
    net.remove()
    assert f"{QKV}.deft_E0" in load_file(file)
    again = read(model, file)
    assert again.config.fuse_qkv
    assert largest_error(deltas(again), wanted) < 1e-6
    again.remove()
    fresh = network(model, trained=False, **{"removal": None, **options})
    fresh.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), state.values(), strict=True))
    assert largest_error(deltas(fresh), wanted) == 0
    fresh.remove()
    with pytest.raises(DeftError, match="fuse_qkv=true"):
        network(model, trained=False, **{"removal": None, **options, "fuse_qkv": "false"}).load_weights(file)


@pytest.mark.parametrize("removal", ["0", "1"])
def test_tools_take_them_apart(tmp_path, removal, capsys):
    """Into a plain LoRA of three layers; with the base model where it depends on that."""
    file, model = str(tmp_path / "x.safetensors"), omnigen_transformer()
    net = network(model, fuse_qkv="true", save_format="deft", removal=removal)
    net.save_weights(file, None, None)
    wanted = {name: factors.delta().detach() for name, factors in file_factors(net).items()}
    net.remove()
    assert inspect_deft.main([file]) == 0
    more = []
    if removal == "1":
        assert convert_deft.main([file, "--save_to", str(tmp_path / "y.safetensors")]) == 2
        assert "depends on the base model; give it with --base MODEL" in capsys.readouterr().err
        model.save_pretrained(tmp_path / "base" / "transformer")
        more = ["--base", str(tmp_path / "base" / "transformer" / "diffusion_pytorch_model.safetensors")]
    assert convert_deft.main([file, "--save_to", str(tmp_path / "y.safetensors"), *more]) == 0
    if removal == "1":
        assert "the model that it was trained on" in capsys.readouterr().out
    found = deft_io.read_adapter(tmp_path / "y.safetensors").layers
    assert largest_error({name: layer.up @ layer.down for name, layer in found.items()}, wanted) < 1e-5


def test_flux_in_diffusers_form_has_files_of_the_one_rank(tmp_path):
    """What files have as one weight anyway: the adapter of the original's layers, neither more nor less."""
    theirs, ours, file = flux_transformer(), Flux(dim=64), str(tmp_path / "x.safetensors")
    net = network(theirs, fuse_qkv="true")
    net.save_weights(file, torch.float32, None)
    name = "lora_unet_single_blocks_0_linear1"
    assert load_file(file)[f"{name}.lora_down.weight"].shape == (4, 64)
    other = read(ours, file, fuse_qkv="false")
    assert largest_error(deltas(other), deltas(net)) < 1e-6
    wanted = deltas(net)
    net.remove()
    again = read(theirs, file)
    assert len(fused_modules(again)) == 6
    assert largest_error(deltas(again), wanted) < 1e-6
    other.config = other.config.__class__(**{**other.config.__dict__, "save_format": "deft"})
    other.save_weights(file, None, None)
    again.remove()
    assert largest_error(deltas(read(theirs, file, fuse_qkv="true")), wanted) < 1e-6


# --- what else a network does -----------------------------------------------------------------------------------------


def test_merged_and_taken_out(tmp_path):
    model, file = omnigen_transformer(), str(tmp_path / "x.safetensors")
    base, net = answer(model), network(model, fuse_qkv="true")
    trained = answer(model)
    net.save_weights(file, torch.float32, None)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    net.backup_weights()
    net.pre_calculation()
    assert relative_error(answer(model), trained) < 1e-5
    assert relative_error(base, trained) > 1e-3
    net.restore_weights()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    net.remove()
    assert torch.equal(answer(model), base)
    merged, tensors = deft.create_network_from_weights(1.0, file, None, [], model, for_inference=True)
    merged.merge_to([], model, tensors)
    assert relative_error(answer(model), trained) < 1e-5


def test_norms_are_those_of_the_whole():
    net = network(omnigen_transformer(), fuse_qkv="true")
    before = deltas(net)
    limit = 0.5 * float(before[QKV].norm())
    net.apply_max_norm_regularization(limit, torch.device("cpu"))
    assert float(deltas(net)[QKV].norm()) == pytest.approx(limit, rel=1e-4)
    assert relative_error(deltas(net)[QKV], before[QKV] * limit / before[QKV].norm()) < 1e-4


def test_what_is_kept_of_any_of_the_three_is_kept(tmp_path):
    """The directions of a file that knows the layers one by one."""
    kept = {name: torch.linalg.qr(torch.randn(16, 3))[0] for name in PIECES}
    kept[PIECES[1]] = kept[PIECES[0]]
    tensors, metadata = deft_io.kept_tensors(kept)
    deft_io.write_safetensors(tensors, tmp_path / "keep.safetensors", metadata)
    net = network(omnigen_transformer(), fuse_qkv="true", removal="0", keep=str(tmp_path / "keep.safetensors"))
    m = module_of(net)
    assert m.kept.shape == (16, 6)
    delta = deltas(net)[QKV]
    assert all((delta @ directions).norm() < 1e-3 * delta.norm() for directions in kept.values())


@pytest.mark.parametrize(
    ("make", "options", "told"),
    [
        (omnigen_transformer, {"module_dropout": "0.1"}, "module_dropout=0.1: fuse_qkv=true has no dropout"),
        (omnigen_transformer, {"rank_dropout": "0.1"}, "rank_dropout=0.1: fuse_qkv=true has no dropout"),
        (omnigen_transformer, {"dropout": "0.1"}, "network_dropout=0.1: fuse_qkv=true has no dropout"),
        (Flux, {"split_qkv": "true"}, "together or apart"),
        (sdxl_unet, {}, "HunyuanVideo 1.5, not for SDXL"),
        (omnigen_transformer, {"network_reg_dims": "0_self_attn_to_k=2"}, "ranks or alphas that differ"),
        (omnigen_transformer, {"network_reg_lrs": "0_self_attn_to_k=1e-3"}, "rates that differ"),
    ],
)
def test_mistakes_are_one_line(make, options, told):
    with pytest.raises(DeftError, match=re.escape(told)) as error:
        network(make(), fuse_qkv="true", **options).prepare_optimizer_params(None, 1e-4)
    assert "\n" not in str(error.value)


def test_the_trainer_goes_on_from_a_state_bit_for_bit(tmp_path, photos, fresh_accelerator):
    """Four steps, and two and two: with P, R and Adam's averages of the three layers together."""
    model = small_omnigen.build(tmp_path)
    common = {"network_dim": 4, "network_alpha": 4, "max_train_steps": 4, "learning_rate": 1e-2, "save_state": True,
              "save_every_n_steps": 2, "network_args": ["fuse_qkv=true", "removal=1", "init=paper"]}  # fmt: skip
    assert train_network_deft.main(arguments(model, photos, tmp_path, **common)) == 0
    state = next((tmp_path / "out").glob("*00002-state"))
    common |= {"resume": state, "output_dir": tmp_path / "again"}
    assert train_network_deft.main(arguments(model, photos, tmp_path, **common)) == 0
    first, second = (load_file(tmp_path / name / "cat.safetensors") for name in ("out", "again"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    downs = [first[f"{name}.lora_down.weight"] for name in PIECES]
    assert torch.equal(downs[0], downs[2])
    halfway = load_file(tmp_path / "out" / "cat-step00000002.safetensors")
    assert not torch.equal(halfway[f"{PIECES[0]}.lora_down.weight"], downs[0])
