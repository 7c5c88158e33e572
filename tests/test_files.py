"""Adapter files: what clients find in them, what comes back from them, and what a failing save leaves behind."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from networks import deft
from networks.deft_config import DeftError
from tests.conftest import TEXT, UNET, deltas, largest_error, network_of, relative_error

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {None: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
FORMS = [{}, {"basis": "relu"}, {"para": "true"}, {"gate": "true"}, {"init": "paper"}, {"conv_dim": "2"},
         {"basis": "svd"}, {"basis": "none"}, {"para": "true", "basis": "tsvd"}, {"removal": "0.3"}, {"removal": "0"},
         {"freeze_basis": "true"}]  # fmt: skip


def save(network, tmp_path, name="a.safetensors", dtype=None, metadata=None) -> str:
    file = str(tmp_path / name)
    network.save_weights(file, dtype, metadata)
    return file


def metadata_of(file: str) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def loaded_from(file: str, model, **options) -> deft.DeftNetwork:
    network, _ = deft.create_network_from_weights(1.0, file, None, model.text_encoders, model.denoiser, **options)
    network.apply_to(model.text_encoders, model.denoiser)
    network.load_weights(file)
    return network


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_saved_and_loaded_deltas(model, tmp_path, form, dtype):
    network = network_of(model, **form)
    wanted = deltas(network)
    file = save(network, tmp_path, dtype=dtype)
    network.remove()
    again = loaded_from(file, model)
    assert largest_error(deltas(again), wanted) < DTYPES[dtype]
    assert again.config.basis == network.config.basis
    assert again.config.para == network.config.para
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_small_deltas_survive(model, tmp_path, dtype):
    """After one step at rate 1e-5 and alpha 1, deltas are a millionth of the weights."""
    network = network_of(model, 8, 1, trained=False)
    with torch.no_grad():
        for module in network.all_modules:
            module.R += 1e-5 * torch.randn_like(module.R).sign()
    wanted = deltas(network)
    file = save(network, tmp_path, dtype=dtype)
    network.remove()
    assert largest_error(deltas(loaded_from(file, model)), wanted) < DTYPES[dtype]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_saving_and_loading_is_a_fixed_point(model, tmp_path, form):
    network = network_of(model, **form)
    files = [save(network, tmp_path, "0.safetensors")]
    network.remove()
    for i in range(1, 4):
        again = loaded_from(files[-1], model)
        files.append(save(again, tmp_path, f"{i}.safetensors"))
        again.remove()
    contents = [deltas_of_lora(load_file(file)) for file in files]
    for before, after in itertools.pairwise(contents):
        assert largest_error(after, before) < 1e-6
    assert largest_error(contents[-1], contents[0]) < 1e-6


def test_training_goes_on_from_a_file_as_from_memory(model, tmp_path, latents):
    """Read back, a network is the same function of P and R around that point: one SGD step moves it alike."""
    network = network_of(model)
    file = save(network, tmp_path)
    text = {"hidden": model.encode_text(["sks cat", "a house"])["hidden"].detach()}

    def step_of(net):
        loss = model.predict(latents, torch.tensor([300, 30]), text, torch.zeros(2, 6)).pow(2).sum()
        loss.backward()
        with torch.no_grad():
            before = {m.lora_name: torch.matmul(*m.lora_factors()) for m in net.unet_modules}
            for m in net.unet_modules:
                m.R -= 10 * m.R.grad
        return {name: after - before[name] for name, after in deltas(net).items() if name in before}

    in_memory = step_of(network)
    network.remove()
    again = loaded_from(file, model)
    assert largest_error(step_of(again), in_memory) < 1e-3


def test_one_rank_and_one_alpha_in_the_file(model, tmp_path, caplog):
    caplog.set_level("INFO")
    network = network_of(model, 8, 8, conv_dim="2")
    parameters = sum(p.numel() for p in network.parameters())
    tensors = load_file(save(network, tmp_path))
    assert {t.shape[0] for k, t in tensors.items() if k.endswith("lora_down.weight")} == {8}
    assert {t.shape[1] for k, t in tensors.items() if k.endswith("lora_up.weight")} == {8}
    assert {float(t) for k, t in tensors.items() if k.endswith(".alpha")} == {8.0}
    assert {k.split(".", 1)[1] for k in tensors} == {"lora_up.weight", "lora_down.weight", "alpha"}
    assert "without padding" in caplog.text
    network.remove()
    again = loaded_from(str(tmp_path / "a.safetensors"), model)
    assert sum(p.numel() for p in again.parameters()) == parameters


def test_shapes_are_those_of_sd_scripts(model, tmp_path):
    network = network_of(model, conv_dim="2")
    tensors = load_file(save(network, tmp_path))
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    assert tensors[f"{name}.lora_down.weight"].shape == (4, 32, 1, 1)
    assert tensors[f"{name}.lora_up.weight"].shape == (32, 4, 1, 1)
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    assert tensors[f"{name}.lora_down.weight"].shape == (4, 32, 3, 3)
    assert tensors[f"{name}.lora_up.weight"].shape == (32, 4, 1, 1)


def test_pad_false_keeps_each_layers_rank(model, tmp_path):
    network = network_of(model, 8, 8, conv_dim="2", pad="false")
    tensors = load_file(save(network, tmp_path))
    assert {t.shape[0] for k, t in tensors.items() if k.endswith("lora_down.weight")} == {2, 8}
    assert all(tensors[f"{k.split('.')[0]}.alpha"] == t.shape[0] for k, t in tensors.items() if "lora_down" in k)


def test_loads_in_diffusers_with_every_module_and_the_same_output(whole, tmp_path):
    from library import sampling
    from library.prompts import Prompt

    prompts = [Prompt("sks cat", width=128, height=128, seed=3, guidance=2.0, steps=3)]
    base = sampling.draw(whole.pipeline, prompts)[0]
    network = network_of(whole, conv_dim="2", dim=8, alpha=8)
    wanted, ours = deltas(network), sampling.draw(whole.pipeline, prompts)[0]
    file = save(network, tmp_path)
    network.remove()
    whole.pipeline.load_lora_weights(str(tmp_path), weight_name=Path(file).name)
    drawn = sampling.draw(whole.pipeline, prompts)[0]
    pixels = [torch.tensor(list(image.tobytes()), dtype=torch.float32) for image in (base, ours, drawn)]
    assert (pixels[2] - pixels[1]).abs().max() < 2
    assert (pixels[1] - pixels[0]).abs().max() > 10  # the adapter is seen at all
    found = 0
    by_layer = {m.org_module: m.lora_name for m in network.all_modules}
    for part in (whole.denoiser, *whole.text_encoders):
        for layer in part.modules():
            if hasattr(layer, "get_delta_weight"):
                delta = layer.get_delta_weight(layer.active_adapters[0]).flatten(1)
                assert relative_error(delta, wanted[by_layer[layer.base_layer]]) < 1e-5
                found += 1
    assert found == len(network.all_modules)


def test_no_layer_outside_of_the_blocks_is_adapted(whole, tmp_path):
    # diffusers before 0.39 drops such layers of a file; OneTrainer writes them (docs/clients.md)
    names = {key.split(".")[0] for key in load_file(save(network_of(whole, conv_dim="2"), tmp_path))}
    blocks = (
        "lora_te_text_model_encoder_layers_",
        "lora_unet_down_blocks_",
        "lora_unet_mid_block_",
        "lora_unet_up_blocks_",
    )
    assert len(names) == 350
    assert all(name.startswith(blocks) for name in names)


def plain_lora(network, rank: int, alpha: float | None, make) -> dict[str, torch.Tensor]:
    """A LoRA file as another trainer might have written it, for the network's layers."""
    tensors = {}
    for module in network.all_modules:
        weight = module.org_module.weight
        ones = (1,) * (weight.dim() - 2)
        up, down = make(weight.shape[0], rank, weight.shape[1:].numel())
        tensors[f"{module.lora_name}.lora_up.weight"] = up.reshape(-1, rank, *ones).contiguous()
        tensors[f"{module.lora_name}.lora_down.weight"] = down.reshape(rank, *weight.shape[1:]).contiguous()
        if alpha is not None:
            tensors[f"{module.lora_name}.alpha"] = torch.tensor(alpha)
    return tensors


def random_lora(m, r, n):
    return torch.randn(m, r), torch.randn(r, n)


def deltas_of_lora(tensors):
    found = {}
    for key in (k for k in tensors if k.endswith("lora_up.weight")):
        name = key.split(".")[0]
        up, down = tensors[key].flatten(1), tensors[f"{name}.lora_down.weight"].flatten(1)
        found[name] = up @ down * (tensors[f"{name}.alpha"] / down.shape[0] if f"{name}.alpha" in tensors else 1)
    return found


@pytest.mark.parametrize("form", [{}, {"basis": "relu"}, {"gate": "true"}], ids=str)
@pytest.mark.parametrize(("rank", "alpha"), [(4, 4.0), (4, 1.0), (2, 1.0), (3, None)])
def test_any_plain_lora_becomes_a_deft(model, tmp_path, form, rank, alpha):
    network = network_of(model, trained=False, **form)
    tensors = plain_lora(network, rank, alpha, random_lora)
    save_file(tensors, tmp_path / "other.safetensors")
    assert f"{TEXT + UNET} modules loaded" in str(network.load_weights(str(tmp_path / "other.safetensors")))
    assert largest_error(deltas(network), deltas_of_lora(tensors)) < 1e-6
    network.remove()
    again = loaded_from(str(tmp_path / "other.safetensors"), model)  # --dim_from_weights, no metadata
    assert largest_error(deltas(again), deltas_of_lora(tensors)) < 1e-6
    assert {m.rank for m in again.all_modules} == {rank}


def test_a_fresh_lora_of_sd_scripts_with_up_zero(model, tmp_path):
    network = network_of(model)
    tensors = plain_lora(network, 4, 1.0, lambda m, r, n: (torch.zeros(m, r), torch.randn(r, n)))
    save_file(tensors, tmp_path / "fresh.safetensors")
    network.load_weights(str(tmp_path / "fresh.safetensors"))
    assert max(float(d.norm()) for d in deltas(network).values()) < 1e-5
    assert {m.rank for m in network.all_modules} == {4}


def test_higher_rank_is_refused_or_truncated(model, tmp_path, caplog):
    network = network_of(model)
    tensors = plain_lora(network, 6, 6.0, random_lora)
    save_file(tensors, tmp_path / "large.safetensors")
    with pytest.raises(DeftError, match=r"has rank 6, the network 4; use --dim_from_weights.*truncate=true"):
        network.load_weights(str(tmp_path / "large.safetensors"))
    network.remove()
    caplog.set_level("INFO")
    cut = network_of(model, truncate="true")
    cut.load_weights(str(tmp_path / "large.safetensors"))
    name, wanted = next(iter(deltas_of_lora(tensors).items()))
    S = torch.linalg.svdvals(wanted)
    best = float(S[4:].norm() / S.norm())
    assert relative_error(deltas(cut)[name], wanted) == pytest.approx(best, rel=1e-3)
    assert f"truncated {name}: relative error {best:.2e}" in caplog.text
    assert f"{TEXT + UNET} modules truncated" in caplog.text


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lora_unet_input_blocks_4_1_proj_in": (4, 320)}, "looks made for SDXL"),
        ({"lora_unet_double_blocks_0_img_attn_qkv": (4, 3072)}, "looks made for FLUX.1"),
        ({"lora_unet_joint_blocks_0_x_block_mlp_fc1": (4, 1536)}, "looks made for Stable Diffusion 3"),
        (
            {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (4, 1024)},
            "looks made for Stable Diffusion 2.x",
        ),
    ],
)
def test_files_of_other_models_are_refused_by_name(model, tmp_path, keys, message):
    tensors = {}
    for name, (rank, width) in keys.items():
        tensors[f"{name}.lora_up.weight"] = torch.randn(32, rank)
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, width)
    file = str(tmp_path / "other.safetensors")
    save_file(tensors, file)
    network = network_of(model)
    before = network.state_dict()
    with pytest.raises(DeftError, match=message) as raised:
        network.load_weights(file)
    assert "\n" not in str(raised.value)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    network.remove()
    with pytest.raises(DeftError, match=message):
        loaded_from(file, model)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": torch.ones(4, 8)},
            "Stable Diffusion 1.x or 2.x, with Diffusers' names",
        ),
        ({"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": torch.ones(4, 8)}, "neither a plain LoRA nor a DEFT"),
        ({"lora_unet_x.lora_up.weight": torch.ones(8, 4)}, "lora_down.weight"),
        (
            {
                "lora_unet_x.lora_up.weight": torch.ones(8, 4),
                "lora_unet_x.lora_down.weight": torch.ones(4, 8),
                "lora_unet_x.dora_scale": torch.ones(8),
            },
            "dora_scale",
        ),
    ],
)
def test_other_adapters_are_refused(model, tmp_path, tensors, message):
    file = str(tmp_path / "other.safetensors")
    save_file(tensors, file)
    with pytest.raises(DeftError, match=message):
        network_of(model).load_weights(file)


def test_unreadable_files_are_refused(model, tmp_path):
    network = network_of(model)
    whole = Path(save(network, tmp_path))
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-1000])
    (tmp_path / "pickle.pt").write_bytes(b"\x80\x04.")
    for name, message in (
        ("cut.safetensors", "not a whole safetensors file"),
        ("none.safetensors", "no such adapter file"),
        ("pickle.pt", "only .safetensors is read"),
    ):
        with pytest.raises(DeftError, match=message):
            network.load_weights(str(tmp_path / name))


def test_modules_without_counterpart_are_an_error_other_halves_are_not(whole, tmp_path):
    network = network_of(whole, conv_dim="2")
    file = save(network, tmp_path)
    network.remove()
    plain = network_of(whole)
    with pytest.raises(DeftError, match=r"86 of its modules have no counterpart.*conv_dim"):
        plain.load_weights(file)
    plain.remove()
    half = deft.create_network(1.0, 4, 4, None, whole.text_encoders, whole.denoiser, conv_dim="2")
    half.apply_to(whole.text_encoders, whole.denoiser, apply_text_encoder=False)
    assert "72 of the file belong to a half that is not trained" in str(half.load_weights(file))


NMF = {"para": "true", "basis": "nmf"}


@pytest.mark.parametrize("form", [*FORMS, NMF], ids=str)
def test_deft_format_round_trip_and_in_another_basis(model, tmp_path, form):
    network = network_of(model, save_format="deft", **form)
    unused = "E0" if form.get("removal") == "0" else "none"  # nothing leaves, wherever E has gone
    wanted = {k: v.clone() for k, v in network.state_dict().items() if not k.endswith(unused)}
    file = save(network, tmp_path, dtype=torch.float16)
    assert {t.dtype for t in load_file(file).values()} == {torch.float32}
    delta = deltas(network)
    network.remove()
    again = loaded_from(file, model)
    state = {k: v for k, v in again.state_dict().items() if not k.endswith(unused)}
    assert largest_error(state, wanted) < 1e-6
    assert largest_error(deltas(again), delta) < 1e-5
    again.remove()
    other_basis = {"basis": "qr" if form.get("basis") else "relu", "para": "false", "gate": "false"}
    other = network_of(model, conv_dim=form.get("conv_dim"), **other_basis)
    other.load_weights(file)
    assert largest_error(deltas(other), delta) < 1e-5


@pytest.mark.parametrize("form", [{}, {"basis": "relu"}], ids=str)
def test_deft_format_follows_the_base_a_lora_does_not(model, tmp_path, form):
    """What is taken out of W depends on W: on another base the DEFT file gives that base's own delta."""
    network = network_of(model, save_format="deft", **form)
    module = network.unet_modules[4]
    file = save(network, tmp_path)
    network.remove()
    module.org_module.weight.data += 0.1 * torch.randn_like(module.org_module.weight)
    W = module.base_weight().double()
    P, R = module.effective_P.double(), module.effective_R.double()
    L, E = (torch.linalg.qr(P)[0],) * 2 if not form else (P, P.clamp(min=0))
    if not form:
        L = E = L * torch.sign(torch.linalg.qr(P)[1].diagonal())
    wanted = L @ (module.scale * R - (E - module.E0.double()).T @ W)
    tensors = load_file(file)  # without metadata, as generators pass it
    again, _ = deft.create_network_from_weights(1.0, None, None, model.text_encoders, model.denoiser, tensors)
    again.apply_to(model.text_encoders, model.denoiser)
    again.load_state_dict(tensors)
    again.remove()
    merged, _ = deft.create_network_from_weights(0.5, file, None, model.text_encoders, model.denoiser)
    merged.merge_to(model.text_encoders, model.denoiser, tensors)
    assert relative_error(module.org_module.weight.double() - W, 0.5 * wanted) < 1e-4


@pytest.mark.parametrize("form", [*FORMS, NMF], ids=str)
def test_generators_apply_any_file_to_any_base_as_a_lora(model, tmp_path, form):
    network = network_of(model, **form)
    file = save(network, tmp_path)
    network.remove()
    for module in network.all_modules:
        module.org_module.weight.data += 0.1 * torch.randn_like(module.org_module.weight)
    again, tensors = deft.create_network_from_weights(
        1.0, file, None, model.text_encoders, model.denoiser, for_inference=True
    )
    again.apply_to(model.text_encoders, model.denoiser)
    again.load_state_dict(tensors)
    assert largest_error(deltas(again), deltas_of_lora(load_file(file))) < 1e-6


def test_what_a_file_takes_out_of_the_model_stays_out_under_the_default(model, tmp_path):
    network = network_of(model, save_format="deft", removal="1")
    file, delta = save(network, tmp_path), deltas(network)
    network.remove()
    again = network_of(model, removal=None)
    assert again.config.removal == 0
    again.load_weights(file)
    assert largest_error(deltas(again), delta) < 1e-5
    again.remove()
    assert loaded_from(file, model).config.removal == 1, (
        "a training that takes the file's options over goes on as it was"
    )


def test_nmf_goes_on_from_its_own_format_alone(model, tmp_path):
    network = network_of(model, **NMF)
    file = save(network, tmp_path)
    network.remove()
    with pytest.raises(DeftError, match="basis=nmf is not continued from a plain LoRA"):
        loaded_from(file, model)
    as_deft = loaded_from(file, model, para="false", basis="qr")
    assert largest_error(deltas(as_deft), deltas_of_lora(load_file(file))) < 1e-6


def test_scale_of_the_training_survives_continuing_twice(model, tmp_path):
    network = network_of(model, trained=False, conv_dim="2")
    tensors = plain_lora(network, 16, 8.0, random_lora)
    network.remove()
    save_file(tensors, tmp_path / "0.safetensors")
    for i in range(2):
        network = loaded_from(str(tmp_path / f"{i}.safetensors"), model)
        assert {m.scale for m in network.all_modules} == {0.5}
        assert (network.config.dim, network.config.alpha) == (16, 8.0)
        save(network, tmp_path, f"{i + 1}.safetensors")
        network.remove()


def test_rank_above_a_layers_size_is_read_exactly(model, tmp_path):
    network = network_of(model, trained=False)
    tensors = plain_lora(network, 100, 50.0, random_lora)
    network.remove()
    save_file(tensors, tmp_path / "large.safetensors")
    again = loaded_from(str(tmp_path / "large.safetensors"), model)
    assert {m.rank for m in again.all_modules} == {32, 64, 96}
    assert largest_error(deltas(again), deltas_of_lora(tensors)) < 1e-6


def test_a_pointwise_convolution_may_be_a_matrix(model, tmp_path):
    network = network_of(model, trained=False)
    tensors = plain_lora(network, 4, 4.0, random_lora)
    matrices = {key: t.flatten(1).contiguous() if t.dim() == 4 else t for key, t in tensors.items()}
    save_file(matrices, tmp_path / "matrices.safetensors")
    network.load_weights(str(tmp_path / "matrices.safetensors"))
    assert largest_error(deltas(network), deltas_of_lora(tensors)) < 1e-6


def test_a_refused_file_changes_nothing(model, tmp_path):
    network = network_of(model)
    tensors = plain_lora(network, 4, 4.0, random_lora)
    last = network.all_modules[-1]
    m, n = last.org_module.weight.shape[0], last.org_module.weight[0].numel()
    ones = (1,) * (last.org_module.weight.dim() - 2)
    tensors[f"{last.lora_name}.lora_up.weight"] = torch.randn(m, 9, *ones)
    tensors[f"{last.lora_name}.lora_down.weight"] = torch.randn(9, n).reshape(9, *last.org_module.weight.shape[1:])
    save_file(tensors, tmp_path / "mixed.safetensors")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(DeftError, match="has rank 9, the network 4"):
        network.load_weights(str(tmp_path / "mixed.safetensors"))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_random_directions_are_seeded_and_leave_the_trainings_random_numbers_alone(model, tmp_path):
    network = network_of(model, 8, 8, trained=False)
    save_file(plain_lora(network, 2, 2.0, random_lora), tmp_path / "small.safetensors")
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        network.load_weights(str(tmp_path / "small.safetensors"))
        states.append({key: value.clone() for key, value in network.state_dict().items()})
        drawn = torch.rand(3)
        torch.manual_seed(seed)
        assert torch.equal(drawn, torch.rand(3))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def damaged(**changes):
    parts = {"lora_up.weight": torch.ones(8, 4), "lora_down.weight": torch.ones(4, 8), "alpha": torch.tensor(4.0)}
    return {f"lora_unet_x.{name}": value for name, value in (parts | changes).items()}


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (damaged(**{"lora_up.weight": torch.ones(8, 5)}), {}, "lora_unet_x is damaged .up .8, 5. and down .4, 8."),
        (damaged(**{"lora_up.weight": torch.full((8, 4), float("nan"))}), {}, "lora_up.weight has non-finite values"),
        (damaged(alpha=torch.ones(2)), {}, "lora_unet_x is damaged"),
        (damaged(), {"deft_options": "null"}, "its deft_. metadata cannot be read"),
        (damaged(), {"deft_layers": "[1]"}, "its deft_. metadata cannot be read"),
        (damaged(), {"deft_layers": '{"lora_unet_x": [1]}'}, "its deft_. metadata cannot be read"),
        ({"single.lora_up.weight": torch.ones(8, 4), "single.lora_down.weight": torch.ones(4, 8)}, {}, "none of its"),
    ],
)
def test_damaged_files_are_one_line(model, tmp_path, tensors, metadata, message):
    save_file(tensors, tmp_path / "damaged.safetensors", metadata)
    with pytest.raises(DeftError, match=message) as raised:
        network_of(model).load_weights(str(tmp_path / "damaged.safetensors"))
    assert "\n" not in str(raised.value)


def test_options_of_newer_versions_are_passed_over_with_a_warning(model, tmp_path, caplog):
    network = network_of(model)
    file = save(network, tmp_path)
    network.remove()
    metadata = metadata_of(file)
    metadata["deft_options"] = json.dumps(json.loads(metadata["deft_options"]) | {"future": 1})
    save_file(load_file(file), file, metadata)
    loaded_from(file, model)
    assert "made with the option future, which is not known here" in caplog.text


def test_merging_refuses_what_it_would_drop(model, tmp_path):
    network = network_of(model)
    tensors = plain_lora(network, 4, 4.0, random_lora)
    network.remove()
    tensors |= {"lora_unet_conv_in.lora_up.weight": torch.ones(32, 4, 1, 1)}
    tensors |= {"lora_unet_conv_in.lora_down.weight": torch.ones(4, 4, 3, 3)}
    save_file(tensors, tmp_path / "more.safetensors")
    with pytest.raises(DeftError, match="1 of its modules have no counterpart, lora_unet_conv_in for one"):
        loaded_from(str(tmp_path / "more.safetensors"), model)


def test_a_file_of_the_other_half_says_so(model, tmp_path):
    network = deft.create_network(1.0, 4, 4, None, model.text_encoders, model.denoiser)
    network.apply_to(model.text_encoders, model.denoiser, apply_unet=False)
    file = save(network, tmp_path)
    network.remove()
    other = deft.create_network(1.0, 4, 4, None, model.text_encoders, model.denoiser)
    other.apply_to(model.text_encoders, model.denoiser, apply_text_encoder=False)
    with pytest.raises(DeftError, match="adapts only a half of the model that is not trained here"):
        other.load_weights(file)
