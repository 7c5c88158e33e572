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
from networks.deft_architectures import recognise
from networks.deft_config import DeftError, parse_options
from tests import small_musubi
from tests.conftest import perturb, relative_error
from tests.test_fused import plain_delta

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
    """Frozen weights of blocks, streamed into buffers that they share in turn: what musubi-tuner's
    `--block_swap_h2d_only` does with a layer's `weight`, on one device. A block has its master again after its turn.

    :param slots: buffers; with two, the next block is there before its turn
    :param by_data: `weight.data` is put in place instead of the weight
    :param forgetful: a block keeps the buffer, whatever is in it
    """

    def __init__(self, blocks: nn.ModuleList, slots: int = 1, by_data: bool = False, forgetful: bool = False) -> None:
        self.by_data, self.forgetful = by_data, forgetful
        self.layers = [[m for m in block.modules() if isinstance(m, nn.Linear)] for block in blocks]
        self.masters = [[own(layer.weight.data) for layer in layers] for layers in self.layers]
        self.buffers = [[own(torch.empty_like(w)) for w in self.masters[0]] for _ in range(slots)]
        self.loaded: list[int | None] = [None] * slots
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *_, number=number: self.turn_of(number, 1))
            block.register_full_backward_pre_hook(lambda *_, number=number: self.turn_of(number, -1))

    def turn_of(self, number: int, step: int) -> None:
        self.load(number, None)
        if len(self.buffers) > 1 and 0 <= number + step < len(self.layers):
            self.load(number + step, number)

    def load(self, number: int, in_use: int | None) -> None:
        if number in self.loaded:
            return
        slot = next(k for k, held in enumerate(self.loaded) if held is None or held != in_use)
        evicted = self.loaded[slot]
        if evicted is not None and not self.forgetful:
            self.bind(evicted, self.masters[evicted])
        for buffer, master in zip(self.buffers[slot], self.masters[number], strict=True):
            buffer.data.copy_(master)
        self.bind(number, self.buffers[slot])
        self.loaded[slot] = number

    def bind(self, number: int, weights: list[nn.Parameter]) -> None:
        for layer, weight in zip(self.layers[number], weights, strict=True):
            if self.by_data:
                layer.weight.data = weight.data
            else:
                layer.weight = weight


def own(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.clone(), requires_grad=False)


@pytest.mark.parametrize("removal", ["0", "1"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("batched", [False, True], ids=["", "batched"])
@pytest.mark.parametrize(("slots", "by_data"), [(1, False), (2, True)], ids=["weight", "two buffers, data"])
def test_weights_streamed_through_a_ring(tmp_path, removal, checkpointed, batched, slots, by_data):
    """Each layer reads its own weight, in the backward pass too: what is learnt and saved is what it is without."""
    torch.manual_seed(0)
    model = Flux2(4)
    files, kept = [], []
    for streamed in (False, True):
        copied = copy.deepcopy(model)
        copied.checkpointed = checkpointed
        torch.manual_seed(1)
        network = made(copied, [f"removal={removal}"])
        network.batched = batched
        if streamed:
            Ring(copied.double_blocks, slots, by_data)
        trained(copied, network, steps=3)
        files.append(tmp_path / f"{streamed}.safetensors")
        network.save_weights(str(files[-1]), torch.float32, {})
        kept.append([module.base_weight().clone() for module in network.all_modules])
    still, moved = map(load_file, files)
    assert still.keys() == moved.keys()
    for key in still:
        assert torch.equal(still[key], moved[key]), key
    assert any(bool(tensor.any()) for key, tensor in still.items() if "up" in key)
    assert metadata(files[0])["deft_base_hash"] == metadata(files[1])["deft_base_hash"]
    assert all(map(torch.equal, *kept))


@pytest.mark.parametrize("by_data", [False, True])
def test_weights_that_are_another_blocks_are_told(tmp_path, by_data, caplog):
    """A ring that leaves its buffer to all: no hash of a base that is not there, and no removal of it, which is said at
    the second step, before anything is lost."""
    file = tmp_path / "x.safetensors"
    for removal in ("0", "1"):
        model = Flux2()
        network = made(model, [f"removal={removal}"])
        Ring(model.double_blocks, by_data=by_data, forgetful=True)
        if removal == "1":
            told = r"removal and para need .* lora_unet_double_blocks_\d_\w+ has another layer's"
            with pytest.raises(DeftError, match=told):
                trained(model, network)
            with pytest.raises(DeftError, match=told):
                network.save_weights(str(file), torch.float32, {})
            continue
        trained(model, network)
        network.save_weights(str(file), torch.float32, {})
        assert "without a hash of the base model" in caplog.text
        assert "deft_base_hash" not in metadata(file)
        file.unlink()
    assert not file.exists()


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


# --- gradients --------------------------------------------------------------------------------------------------------


def answer(model: nn.Module, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """Of every layer of a small model, side by side, each to the first of the inputs."""
    layers = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    answers = []
    for path, layer in layers:
        some = x[..., : layer.in_features]
        found = nn.functional.linear(some, weights[path], layer.bias.to(x)) if path in weights else layer(some)
        answers.append(torch.tanh(found))
    return torch.cat(answers, -1)


@pytest.mark.parametrize("options", [{}, {"removal": "1"}, {"fuse_qkv": "true"}, {"split_qkv": "true"}], ids=str)
@pytest.mark.parametrize("name", small_musubi.MODELS)
def test_gradients_of_every_architecture_are_those_of_float64(name, options):
    model = small_musubi.made(name)
    if not set(options) <= {*recognise(model)[0].options(), "removal"}:
        pytest.skip("its queries, keys and values are one layer already, or three")
    network = deft.create_arch_network(1.0, 3, 2.0, None, None, model, **options)
    network.apply_to(None, model, apply_text_encoder=False, apply_unet=True)
    perturb(network)
    network.train()
    network.on_step_start()
    x = torch.randn(2, 5, 4 * 5 * small_musubi.WIDTH)
    answer(model, {}, x).square().sum().backward()

    leaves, weights = {}, {}
    for m in network.all_modules:
        leaves[m] = [p.detach().double().requires_grad_() for p in (m.P, m.R)]
        rows = plain_delta(m, m.base_weight().double(), *leaves[m], None).split([p.shape[0] for p in m.target.places])
        for place, some in zip(m.target.places, rows, strict=True):
            whole = weights.get(place.path, place.layer.weight.double())
            first, end = place.rows or (0, len(whole))
            weights[place.path] = torch.cat([whole[:first], whole[first:end] + some, whole[end:]])
    exact = copy.deepcopy(model).double()
    for layer in exact.modules():
        layer.__dict__.pop("forward", None)
    answer(exact, weights, x.double()).square().sum().backward()
    assert len(weights) == len(small_musubi.MODELS[name].layers) - len(small_musubi.MODELS[name].outside)
    for m, leaf in leaves.items():
        for parameter, wanted in zip((m.P, m.R), leaf, strict=True):
            assert relative_error(parameter.grad.double(), wanted.grad) < 1e-5, m.lora_name


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
    ("hidream_o1_image", "language_model_layers_0_self_attn_q_proj", "HiDream-O1"),
])  # fmt: skip
def test_what_a_file_is_for(version, layer, expected):
    found = deft_names.recognised([(deft_names.DENOISER, layer)], (), {"ss_base_model_version": version})
    assert found == expected
