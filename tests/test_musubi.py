"""What musubi-tuner asks of a network, call by call as its training/trainer_base.py (30c658c) has them, and weights
that it moves about below the adapters. tests/integration/test_musubi.py has its own code."""

from __future__ import annotations

import argparse
import copy
import importlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from networks import deft, deft_io, deft_keep, deft_names, deft_report
from networks.deft_config import DeftError, parse_options
from networks.deft_targets import recognise
from tests.conftest import relative_error

WIDTH = 12


class DoubleStreamBlock(nn.Module):
    """Layers with the names of FLUX.2's, its modulation stands outside of the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.img_attn = nn.ModuleDict({"qkv": nn.Linear(WIDTH, 3 * WIDTH), "proj": nn.Linear(WIDTH, WIDTH)})
        self.img_mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.img_attn["qkv"](x).chunk(3, -1)
        x = x + self.img_attn["proj"](torch.softmax(q @ k.mT, -1) @ v)
        return x + self.img_mlp(x)


class Flux2(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.img_in = nn.Linear(WIDTH, WIDTH)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock() for _ in range(depth))
        self.requires_grad_(False)
        self.checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.img_in(x)
        for block in self.double_blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


def split_as_the_trainer(network_args: list[str]) -> dict[str, str]:
    options = {}
    for given in network_args:
        key, value = given.split("=")
        options[key] = value
    return options


NO_SAMPLES = {"sample_prompts": None, "sample_at_first": False, "logging_dir": None, "log_with": None}


def made(
    model: nn.Module, network_args: list[str], dropout: float | None = None, **options: object
) -> deft.DeftNetwork:
    """As `_build_network` does it."""
    args = argparse.Namespace(**NO_SAMPLES | options)
    module = importlib.import_module("networks.deft")
    given = split_as_the_trainer(network_args)
    network = module.create_arch_network(1.0, 4, 2.0, None, None, model, neuron_dropout=dropout, **given)
    if hasattr(module, "prepare_network"):
        network.prepare_network(args)
    network.apply_to(None, model, apply_text_encoder=False, apply_unet=True)
    network.enable_gradient_checkpointing()
    return network


def trained(model: nn.Module, network: deft.DeftNetwork, steps: int = 2) -> None:
    """As `_build_optimizer_and_dataloader` and `_run_training_loop` do it."""
    parameters, descriptions = network.prepare_optimizer_params(unet_lr=1e-2)
    assert len(parameters) == len(descriptions)
    optimizer = torch.optim.SGD(parameters)
    network.prepare_grad_etc(model)
    network.on_epoch_start(model)
    x = torch.linspace(-1, 1, 5 * WIDTH).view(1, 5, WIDTH)
    for _ in range(steps):
        network.on_step_start()
        (model(x) - x.flip(1)).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(network.get_trainable_params(), 1e3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def metadata(file) -> dict[str, str]:
    with safe_open(str(file), framework="pt") as opened:
        return opened.metadata()


def test_the_calls_of_a_training(tmp_path):
    model, file = Flux2(), tmp_path / "trained.safetensors"
    options = ["network_reg_dims=.*qkv:3,.*mlp.*:2", "loraplus_lr_ratio=2", "exclude_patterns=['.*mlp.2']"]
    network = made(model, options, dropout=0.25)
    assert network.config.neuron_dropout == 0.25
    trained(model, network)
    norms = network.apply_max_norm_regularization(1e-3, torch.device("cpu"))
    assert norms[0] > 0
    assert norms[2] <= 1e-3 * (1 + 1e-5)
    network.save_weights(str(file), None, {"ss_base_model_version": "flux_2_klein_4b"})
    ranks = {name: rank for name, (rank, *_) in json.loads(metadata(file)["deft_layers"]).items()}
    assert {name.partition("_img_")[2]: rank for name, rank in ranks.items()} == {
        "attn_qkv": 3, "attn_proj": 4, "mlp_0": 2,
    }  # fmt: skip
    assert metadata(file)["ss_base_model_version"] == "flux_2_klein_4b"
    found = deft_report.report(str(file), None)
    assert found.known is None  # FLUX.1's layers have the same names
    assert found.adapter is not None
    assert found.adapter.architecture == "FLUX.2"

    weights = load_file(file)
    other = copy.deepcopy(model)
    for layer in other.modules():
        layer.__dict__.pop("forward", None)
    before = {name: p.clone() for name, p in other.named_parameters()}
    merging = deft.create_arch_network_from_weights(0.5, weights, unet=other, for_inference=True)
    merging.merge_to(None, other, weights, torch.bfloat16, "cpu", non_blocking=True)
    for module in network.all_modules:
        path = module.target.path
        up, down = module.lora_factors()
        change = dict(other.named_parameters())[f"{path}.weight"] - before[f"{path}.weight"]
        assert relative_error(change, 0.5 * up @ down) < 1e-3


def test_samples_before_the_first_step_are_kept(tmp_path):
    """`--sample_at_first` draws between `apply_to` and `on_epoch_start`."""
    model, keep, file = Flux2(), tmp_path / "keep.safetensors", tmp_path / "trained.safetensors"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a thing\n" * deft_keep.FEWEST, encoding="utf-8")
    with pytest.raises(DeftError, match="--sample_at_first"):
        made(Flux2(), [f"keep={keep}"])
    network = made(model, [f"keep={keep}"], sample_prompts=str(prompts), sample_at_first=True)
    with torch.no_grad():
        for _ in range(deft_keep.FEWEST):
            model(torch.randn(1, 5, WIDTH))
    trained(model, network)
    network.save_weights(str(file), torch.float32, {})
    directions, adapter = deft_keep.read_kept(str(keep)), deft_io.read_adapter(file)
    assert adapter.layers.keys() == directions.keys()
    for name, layer in adapter.layers.items():
        assert bool(layer.up.any()), name
        assert float((layer.down @ directions[name]).norm()) < 1e-5 * float(layer.down.norm()), name


def test_from_weights_says_what_is_missing():
    with pytest.raises(DeftError, match=r"give the model, unet="):
        deft.create_arch_network_from_weights(1.0, {})


@pytest.mark.parametrize(("text", "expected"), [
    ("a=4", {"a": 4}), ("a:4", {"a": 4}), ("(?:a|b):4", {"(?:a|b)": 4}), ("(?:a|b)=4", {"(?:a|b)": 4}),
    ("(?<=a):4", {"(?<=a)": 4}), (r".*\.0\..* : 8, x = 2", {r".*\.0\..*": 8, "x": 2}),
])  # fmt: skip
def test_a_colon_stands_for_the_equals_sign(text, expected):
    assert parse_options({"network_reg_dims": text}).network_reg_dims == expected


def test_a_pattern_without_a_number_is_told():
    with pytest.raises(DeftError, match="PATTERN=NUMBER or PATTERN:NUMBER"):
        parse_options({"network_reg_dims": "blocks"})


def test_flux_is_kontext_in_musubi_alone():
    """The class has one name in both trainers, and the two adapt other layers by default."""
    theirs = type("Flux", (nn.Module,), {"__module__": "musubi_tuner.flux.flux_models"})
    others = type("Flux", (nn.Module,), {"__module__": "library.flux_models"})
    assert recognise(theirs())[0].name == "FLUX.1 Kontext"
    assert recognise(others())[0].name == "FLUX.1 or Chroma"


class _Modulated(DoubleStreamBlock):
    def __init__(self) -> None:
        super().__init__()
        self.img_mod = nn.ModuleDict({"lin": nn.Linear(WIDTH, WIDTH)})
        self.img_norm = nn.Linear(WIDTH, WIDTH)


_Modulated.__name__ = "DoubleStreamBlock"


@pytest.mark.parametrize(("options", "mod", "norm", "attention"), [
    ({}, False, False, True),
    ({"exclude_patterns": "[]"}, True, False, True),  # takes the place of the default, but not of the norm's
    ({"exclude_patterns": "['.*attn.*']"}, True, False, False),
    ({"include_patterns": "['.*img_(mod|norm).*']"}, True, True, True),
    ({"exclude_patterns": "['.*']", "include_patterns": "['.*qkv']"}, False, False, True),
])  # fmt: skip
def test_patterns_of_flux(options, mod, norm, attention):
    model = Flux2(0)
    model.double_blocks.append(_Modulated())
    names = {m.lora_name for m in deft.create_arch_network(1.0, 4, 1, None, None, model, **options).all_modules}
    for word, expected in (("img_mod_lin", mod), ("img_norm", norm), ("qkv", attention)):
        assert any(word in name for name in names) == expected, word


def test_models_of_diffusers_with_the_same_classes():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.ZImageTransformer2DModel(
        dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 6, 6],
        axes_lens=[8, 8, 8], in_channels=4,
    )  # fmt: skip
    of_block = {"attention_to_q", "attention_to_k", "attention_to_v", "attention_to_out_0",
                "feed_forward_w1", "feed_forward_w2", "feed_forward_w3"}  # fmt: skip
    names = {m.lora_name for m in deft.create_arch_network(1.0, 4, 1, None, None, model).all_modules}
    assert names == {f"lora_unet_layers_{i}_{name}" for i in range(2) for name in of_block}
    model = diffusers.QwenImageTransformer2DModel(
        num_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6)
    )
    of_attention = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out_0", "to_add_out")
    of_block = {f"attn_{name}" for name in of_attention}
    of_block |= {f"{stream}_mlp_net_{part}" for stream in ("img", "txt") for part in ("0_proj", "2")}
    of_block |= {"img_mod_1", "txt_mod_1"}  # musubi-tuner's default pattern, `_mod_`, fits no path with dots
    names = {m.lora_name for m in deft.create_arch_network(1.0, 4, 1, None, None, model).all_modules}
    assert names == {f"lora_unet_transformer_blocks_0_{name}" for name in of_block}
    fused = deft.create_arch_network(1.0, 4, 1, None, None, model, fuse_qkv="true").all_modules
    together = sorted(len(m.target.places) for m in fused)
    assert together == [1] * 8 + [3, 3]


# --- weights that are moved about below the adapters ------------------------------------------------------------------


class Ring:
    """Frozen weights of blocks, streamed into one buffer that all of them share in turn: what musubi-tuner's
    `--block_swap_h2d_only` does with a layer's `weight`, on one device. A block has its master again after its turn.
    """

    def __init__(self, blocks: nn.ModuleList) -> None:
        self.layers = [[m for m in block.modules() if isinstance(m, nn.Linear)] for block in blocks]
        self.masters = [[layer.weight for layer in layers] for layers in self.layers]
        self.buffers = [nn.Parameter(torch.empty_like(w), requires_grad=False) for w in self.masters[0]]
        self.loaded: int | None = None
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *_, number=number: self.load(number))
            block.register_full_backward_pre_hook(lambda *_, number=number: self.load(number))

    def load(self, number: int) -> None:
        if self.loaded == number:
            return
        if self.loaded is not None:
            self.bind(self.loaded, self.masters[self.loaded])
        for buffer, master in zip(self.buffers, self.masters[number], strict=True):
            buffer.data.copy_(master)
        self.bind(number, self.buffers)
        self.loaded = number

    def bind(self, number: int, weights: list[nn.Parameter]) -> None:
        for layer, weight in zip(self.layers[number], weights, strict=True):
            layer.weight = weight


@pytest.mark.parametrize("removal", ["0", "1"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("batched", [False, True], ids=["", "batched"])
def test_weights_streamed_through_a_ring(tmp_path, removal, checkpointed, batched):
    """Each layer reads its own weight, in the backward pass too: what is learnt and saved is what it is without."""
    torch.manual_seed(0)
    model = Flux2()
    files = []
    for streamed in (False, True):
        own = copy.deepcopy(model)
        own.checkpointed = checkpointed
        torch.manual_seed(1)
        network = made(own, [f"removal={removal}"])
        network.batched = batched
        if streamed:
            Ring(own.double_blocks)
        trained(own, network, steps=3)
        files.append(tmp_path / f"{streamed}.safetensors")
        network.save_weights(str(files[-1]), torch.float32, {})
    still, moved = map(load_file, files)
    assert still.keys() == moved.keys()
    for key in still:
        assert torch.equal(still[key], moved[key]), key
    assert any(bool(tensor.any()) for key, tensor in still.items() if "up" in key)
    assert metadata(files[0])["deft_base_hash"] == metadata(files[1])["deft_base_hash"]


def test_a_mean_of_states_is_a_state():
    """flux_2_train_network_self_flow.py averages `state_dict()` over steps, and loads the mean."""
    model = Flux2()
    network = made(model, [])
    mean = {key: value.clone() for key, value in network.state_dict().items()}
    trained(model, network)
    for key, value in network.state_dict().items():
        mean[key].lerp_(value, 0.5)
    network.load_state_dict(mean)
    assert all(torch.equal(value, mean[key]) for key, value in network.state_dict().items())
    assert all(bool(torch.isfinite(up @ down).all()) for up, down in (m.lora_factors() for m in network.all_modules))


def test_gradients_are_added_up_by_hand():
    """Over `network.parameters()` after the backward pass: every trained parameter has its gradient there by then."""
    model = Flux2()
    network = made(model, [])
    x = torch.randn(2, 5, WIDTH)
    found = []
    for part in (x, x[:1], x[1:]):
        network.on_step_start()
        network.zero_grad(set_to_none=True)
        model(part).square().sum().backward()
        found.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    assert len(found[0]) == len(list(network.parameters()))
    for whole, first, second in zip(*found, strict=True):
        assert torch.allclose(whole, first + second, rtol=1e-4, atol=1e-6)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "layer", "expected"), [
    ("flux_2_dev", "double_blocks_0_img_attn_qkv", "FLUX.2"),
    ("flux_kontext", "double_blocks_0_img_attn_qkv", "FLUX.1 or Chroma"),
    ("", "double_blocks_0_img_attn_qkv", "FLUX.1 or Chroma"),
    ("hunyuan_video", "double_blocks_0_img_attn_qkv", "HunyuanVideo"),
    ("hunyuan_video_1_5", "double_blocks_0_img_attn_q", "HunyuanVideo 1.5"),
    ("framepack", "transformer_blocks_0_attn_to_q", "FramePack"),
    ("", "transformer_blocks_0_img_mlp_net_0_proj", "Qwen-Image"),
    ("qwen_image_edit", "transformer_blocks_0_attn_to_q", "Qwen-Image"),
    ("", "layers_0_attention_to_q", "Z-Image"),
    ("", "blocks_0_cross_attn_q", "Wan 2.1 or 2.2"),
    ("", "visual_transformer_blocks_0_self_attention_to_query", "Kandinsky 5"),
    ("krea2", "blocks_0_attn_wq", "Krea 2"),
    ("ideogram4", "layers_0_attention_qkv", "Ideogram 4"),
])  # fmt: skip
def test_what_a_file_is_for(version, layer, expected):
    found = deft_names.recognised([(deft_names.DENOISER, layer)], (), {"ss_base_model_version": version})
    assert found == expected
