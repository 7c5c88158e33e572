"""The network as sd-scripts and our trainer use it, on the small model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from networks import deft
from networks.deft_config import DeftError
from tests.conftest import deltas, network_of, relative_error


@pytest.fixture
def model(whole):
    return whole


def predict(model, latents, prompts=("sks cat", "a house")):
    with torch.no_grad():
        return model.predict(latents, torch.tensor([7, 700]), model.encode_text(list(prompts)), torch.zeros(2, 6))


def test_layers_and_names_are_those_of_sd_scripts(model):
    """Counts of networks.lora on SD 1.5, measured with sd-scripts 48d368fa: 72 + 192, with conv_dim 72 + 278."""
    attention = network_of(model)
    assert (len(attention.text_encoder_modules), len(attention.unet_modules)) == (72, 192)
    names = {m.lora_name for m in attention.all_modules}
    assert "lora_te_text_model_encoder_layers_11_self_attn_out_proj" in names
    assert "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_0_proj" in names
    assert "lora_unet_mid_block_attentions_0_proj_in" in names
    attention.remove()
    with_convolutions = network_of(model, conv_dim="2", conv_alpha="1")
    assert len(with_convolutions.unet_modules) == 278
    extra = {m.lora_name for m in with_convolutions.all_modules} - names
    assert "lora_unet_down_blocks_0_downsamplers_0_conv" in extra
    assert "lora_unet_down_blocks_1_resnets_0_conv_shortcut" in extra
    ranks = {m.lora_name: m.rank for m in with_convolutions.all_modules}
    assert ranks["lora_unet_down_blocks_0_resnets_0_conv1"] == 2
    assert ranks["lora_unet_down_blocks_1_resnets_0_conv_shortcut"] == 4


def test_defaults_are_sd_scripts(model):
    network = network_of(model, None, 1.0)
    module = network.all_modules[0]
    assert (module.rank, module.scale) == (4, 1 / 4)


def test_identity_start_and_multiplier(model, latents):
    base = predict(model, latents)
    network = network_of(model, trained=False, conv_dim=2)
    assert relative_error(predict(model, latents), base) < 1e-6
    network.remove()  # with `removal=1` its E0 is the first E but for rounding, which differs from batch to batch
    network = network_of(model, trained=False, removal="0")
    assert torch.equal(predict(model, latents), base)
    network.remove()
    network = network_of(model)
    trained = predict(model, latents)
    assert relative_error(trained, base) > 1e-3
    network.set_multiplier(0.0)
    assert torch.equal(predict(model, latents), base)
    network.set_multiplier(1.0)
    network.remove()
    assert torch.equal(predict(model, latents), base)


def test_only_the_applied_halves_become_parameters(model):
    for te, unet, count in ((True, False, 72), (False, True, 192)):
        network = deft.create_network(1.0, 2, 2, None, model.text_encoders, model.denoiser)
        network.apply_to(model.text_encoders, model.denoiser, te, unet)
        assert len(list(network.children())) == len(network.all_modules) == count
        network.remove()


def test_optimizer_groups(model):
    network = network_of(model, trained=False)
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs(None, None, 1e-3)
    assert ([g["lr"] for g in groups], names) == ([1e-3, 1e-3], ["textencoder", "unet"])
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(p.numel() for p in network.parameters())
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs([2e-5, 1e-5], 1e-4, 1e-3)
    assert [g["lr"] for g in groups] == [2e-5, 1e-4]
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs([], 1e-4, None)
    assert names == ["unet"]
    assert not any(p.requires_grad for m in network.text_encoder_modules for p in m.parameters())
    groups, names = network.prepare_optimizer_params(0, 1e-4)
    assert names == ["unet"]
    with pytest.raises(DeftError, match="nothing to train"):
        network.prepare_optimizer_params_with_multiple_te_lrs(0.0, 0.0, 1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: network_of(m, 0), "network_dim=0: must be a whole number of at least 1"),
        (lambda m: network_of(m, 4, block_dim="4"), "unknown network_args key 'block_dim'"),
        (lambda m: network_of(m, 4, alpha=-1), "network_alpha=-1"),
        (lambda m: network_of(m, 4, conv_dims="4"), "did you mean 'conv_dim'"),
        (lambda m: deft.create_network(1.0, 4, 1, None, None, nn.Linear(2, 2)), "does not adapt Linear"),
    ],
)
def test_wrong_calls_are_refused_before_training(model, call, message):
    with pytest.raises(DeftError, match=message):
        call(model)


def test_dim_and_alpha_belong_to_the_command_line(model):
    with pytest.raises(DeftError, match="use --network_dim"):
        deft.create_network(1.0, 4, 1, None, model.text_encoders, model.denoiser, **{"dim": "8"})


def test_rank_above_a_layers_size_is_capped_with_one_warning(model, caplog):
    network = network_of(model, 100, 100)
    assert {m.rank for m in network.all_modules} == {32, 64, 96}
    assert {m.scale for m in network.all_modules} == {1.0}
    assert len([r for r in caplog.records if "rank capped" in r.message]) == 1


class Arguments:
    save_model_as = "safetensors"
    scale_weight_norms = None


def test_options_that_would_fail_in_the_night_are_refused_before(model):
    network, arguments = network_of(model, para="true"), Arguments()
    network.prepare_network(arguments)
    arguments.scale_weight_norms = 1.0
    with pytest.raises(DeftError, match="scale_weight_norms"):
        network.prepare_network(arguments)
    arguments.save_model_as = "ckpt"
    with pytest.raises(DeftError, match="writes safetensors only"):
        network.prepare_network(arguments)


@pytest.mark.parametrize("options", [{}, {"basis": "relu"}, {"gate": "true"}, {"conv_dim": "2"}])
def test_max_norm(model, options):
    network = network_of(model, **options)
    before = deltas(network)
    limit = sorted(float(d.norm()) for d in before.values())[len(before) // 2]
    scaled, mean, largest = network.apply_max_norm_regularization(limit, torch.device("cpu"))
    after = deltas(network)
    above = [name for name, delta in before.items() if delta.norm() > limit * (1 + 1e-5)]
    assert abs(scaled - len(above)) <= 1
    for name in above:
        assert relative_error(after[name], before[name] * limit / before[name].norm()) < 1e-4
    assert largest == pytest.approx(limit, rel=1e-4)
    assert mean == pytest.approx(sum(float(d.norm()) for d in after.values()) / len(after), rel=1e-4)


def test_state_dict_round_trip_is_bit_for_bit(model, latents):
    network = network_of(model, gate="true")
    state = {key: value.clone() for key, value in network.state_dict().items()}
    wanted = predict(model, latents)
    network.remove()
    other = network_of(model, gate="true")
    other.load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
    assert torch.equal(predict(model, latents), wanted)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({k: v for k, v in state.items() if "down_blocks_0" not in k})


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_generators_load_merge_and_pre_calculate(model, latents, tmp_path, dtype):
    """The three ways in which sd-scripts' gen_img.py uses a network, each equal to the trained one's output."""
    file = str(tmp_path / "a.safetensors")
    network = network_of(model, conv_dim="2")
    network.save_weights(file, dtype, None)
    base_state = {k: v.clone() for k, v in model.denoiser.state_dict().items()}
    network.set_multiplier(0.7)
    wanted = predict(model, latents)
    network.remove()
    base = predict(model, latents)
    tolerance = (1e-5 if dtype is None else 2e-2) * float((wanted - base).norm())

    def load():
        net, tensors = deft.create_network_from_weights(
            0.7, file, None, model.text_encoders, model.denoiser, for_inference=True, rank_dropout="0.5"
        )
        return net, tensors

    network, tensors = load()
    assert network.is_mergeable()
    network.apply_to(model.text_encoders, model.denoiser)
    network.load_state_dict(tensors, False)
    assert (predict(model, latents) - wanted).norm() < tolerance
    network.backup_weights()
    network.restore_weights()
    network.pre_calculation()
    assert (predict(model, latents) - wanted).norm() < tolerance
    network.restore_weights()
    network.remove()
    assert torch.equal(predict(model, latents), base)

    network, tensors = load()
    network.merge_to(model.text_encoders, model.denoiser, tensors, torch.float32, "cpu")
    assert (predict(model, latents) - wanted).norm() < tolerance
    model.denoiser.load_state_dict(base_state)


def test_two_networks_pre_calculated_together(model, latents, tmp_path):
    """Both PaRa: each removes from the base's weight, not from what the other has left."""
    files = [str(tmp_path / f"{i}.safetensors") for i in range(2)]
    base = {m: m.weight.clone() for m in model.denoiser.modules() if isinstance(m, nn.Linear)}
    wanted = dict(base)
    for i, file in enumerate(files):
        network = network_of(model, 2, para="true")
        for module in network.unet_modules:
            if module.org_module in wanted:
                wanted[module.org_module] = wanted[module.org_module] + torch.matmul(*module.lora_factors()).detach()
        network.save_weights(file, None, None)
        network.remove()
        torch.manual_seed(i + 1)
    networks = []
    for file in files:
        network, tensors = deft.create_network_from_weights(
            1.0, file, None, model.text_encoders, model.denoiser, for_inference=True
        )
        network.apply_to(model.text_encoders, model.denoiser)
        network.load_state_dict(tensors, False)
        network.backup_weights()
        networks.append(network)
    for network in networks:
        network.restore_weights()
    for network in networks:
        network.pre_calculation()
    assert max(relative_error(m.weight, wanted[m]) for m in wanted) < 1e-5


def test_regional_prompts_are_refused_by_name(model):
    with pytest.raises(NotImplementedError, match=r"networks\.lora"):
        network_of(model).set_region(0, True, torch.ones(8, 8))


def test_training_lowers_a_loss_and_leaves_gradients_alone(model, latents):
    network = network_of(model, trained=False, conv_dim=2).train()
    groups, _ = network.prepare_optimizer_params_with_multiple_te_lrs(None, None, 3e-3)
    optimizer = torch.optim.AdamW(groups)
    target = torch.randn_like(latents)
    losses = []
    for _ in range(8):
        text = model.encode_text(["sks cat", "a house"])
        loss = (model.predict(latents, torch.tensor([7, 700]), text, torch.zeros(2, 6)) - target).pow(2).mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    assert all(not p.requires_grad and p.grad is None for p in model.denoiser.parameters())
    assert all(math.isfinite(loss) for loss in losses)
