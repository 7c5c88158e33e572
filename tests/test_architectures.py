"""SDXL, FLUX.1 and OmniGen as diffusers has them, fused weights, the options that choose layers, ranks and rates."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from networks import deft, deft_formats, deft_io, deft_report
from networks.deft_architectures import base_metadata, recognise
from networks.deft_config import DeftError, parse_options
from networks.deft_names import looks_made_for
from networks.deft_ranks import numbers_of, weights_of
from tests.conftest import deltas, file_factors, largest_error, perturb, relative_error

diffusers = pytest.importorskip("diffusers")


def sd_unet(text_width: int) -> nn.Module:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, sample_size=16, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=text_width,
    )  # fmt: skip


def sdxl_unet() -> nn.Module:
    """All blocks of SDXL's U-Net, narrow, and with fewer transformer blocks."""
    return diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32, 32), layers_per_block=2, norm_num_groups=8, sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2, 2), transformer_layers_per_block=(1, 1, 2), cross_attention_dim=24,
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    ).requires_grad_(False)  # fmt: skip


def flux_transformer(double: int = 2, single: int = 2, heads: int = 2, guidance: bool = True) -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=double, num_single_layers=single, attention_head_dim=128 // 8 * heads,
        num_attention_heads=heads, joint_attention_dim=20, pooled_projection_dim=12, axes_dims_rope=(8, 12, 12),
        guidance_embeds=guidance,
    ).requires_grad_(False)  # fmt: skip


class SelfAttention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)


class Modulation(nn.Module):
    def __init__(self, dim: int, number: int) -> None:
        super().__init__()
        self.lin = nn.Linear(dim, number * dim)


class DoubleStreamBlock(nn.Module):
    """Layers and names of the original's block; its forward only uses them all."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        for stream in ("img", "txt"):
            self.add_module(f"{stream}_mod", Modulation(dim, 6))
            self.add_module(f"{stream}_attn", SelfAttention(dim))
            mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))
            self.add_module(f"{stream}_mlp", mlp)


class SingleStreamBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(dim, 7 * dim), nn.Linear(5 * dim, dim)
        self.modulation = Modulation(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear1(x)
        return x + self.linear2(torch.tanh(y[..., : self.linear2.in_features]))


class Flux(nn.Module):
    """As the original's transformer, with qkv in one layer."""

    def __init__(self, dim: int = 24, double: int = 2, single: int = 2) -> None:
        super().__init__()
        self.img_in, self.txt_in = nn.Linear(4, dim), nn.Linear(20, dim)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(dim) for _ in range(double))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(dim) for _ in range(single))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.img_in(x)
        for block in self.double_blocks:
            q, k, v = block.img_attn.qkv(x).chunk(3, -1)
            x = x + block.img_attn.proj(torch.softmax(q @ k.mT, -1) @ v)
        for block in self.single_blocks:
            x = block(x)
        return x


def omnigen_transformer(layers: int = 2) -> nn.Module:
    """Four heads of four numbers."""
    return diffusers.OmniGenTransformer2DModel(
        hidden_size=16, num_attention_heads=4, num_key_value_heads=4, intermediate_size=32, num_layers=layers,
        time_step_dim=4, rope_scaling={"long_factor": [1, 2], "short_factor": [1, 2]}, pad_token_id=0, vocab_size=40,
        pos_embed_max_size=8,
    ).requires_grad_(False)  # fmt: skip


class Phi3Attention(nn.Module):
    """Layers and names of the original's."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.o_proj, self.qkv_proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, 3 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(x).chunk(3, -1)
        return self.o_proj(torch.softmax(q @ k.mT, -1) @ v)


class Phi3MLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(up * nn.functional.silu(gate))


class OmniGen(nn.Module):
    """As the original's transformer, with qkv in one layer."""

    def __init__(self, dim: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.llm = nn.Module()
        blocks = [{"self_attn": Phi3Attention(dim), "mlp": Phi3MLP(dim)} for _ in range(layers)]
        self.llm.layers = nn.ModuleList(nn.ModuleDict(block) for block in blocks)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.llm.layers:
            x = x + block["self_attn"](x)
            x = x + block["mlp"](x)
        return x


def network(model: nn.Module, dim: int = 4, encoders: list | None = None, trained: bool = True, **options):
    options = {"removal": "1"} | options  # so that W takes part
    net = deft.create_network(1.0, dim, dim, None, encoders or [], model, **options)
    net.apply_to(encoders or [], model)
    if trained:
        perturb(net)
    return net.eval()


def layers_of(net: deft.DeftNetwork, model: nn.Module) -> dict[str, Tensor]:
    """Path of every adapted layer -> its delta."""
    paths = {layer: path for path, layer in model.named_modules()}
    with torch.no_grad():
        return {paths[m.org_module]: torch.matmul(*m.lora_factors()) for m in net.all_modules}


def of_converted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Path -> delta, of a LoRA in diffusers' own form."""
    downs = {key: down for key, down in state.items() if ".lora_A." in key}
    ups = {key: state[key.replace("lora_A", "lora_B")] for key in downs}
    return {
        key.removeprefix("transformer.").removesuffix(".lora_A.weight"): ups[key].float() @ down.float()
        for key, down in downs.items()
    }


@pytest.mark.parametrize("options", [{}, {"conv_dim": "2", "conv_alpha": "1"}], ids=["attention", "convolutions"])
def test_sdxl_file_in_diffusers(tmp_path, options):
    """Diffusers' own reader finds every layer of the U-Net that was trained, with its delta."""
    unet = sdxl_unet()
    net = network(unet, **options)
    net.save_weights(str(tmp_path / "x.safetensors"), torch.float32, None)
    assert all(re.match("lora_unet_(input_blocks|middle_block|output_blocks)_", name) for name in deltas(net))
    state, alphas = diffusers.StableDiffusionXLPipeline.lora_state_dict(
        str(tmp_path), weight_name="x.safetensors", unet_config=unet.config
    )
    ours = layers_of(net, unet)
    net.remove()
    diffusers.StableDiffusionXLPipeline.load_lora_into_unet(state, alphas, unet)
    loaded = {path: layer.get_delta_weight(layer.active_adapters[0]).flatten(1)
              for path, layer in unet.named_modules() if hasattr(layer, "base_layer")}  # fmt: skip
    assert largest_error(loaded, ours) < 1e-6
    assert len(ours) == len(net.all_modules)


def test_sdxl_names_are_the_originals():
    """The layers that Diffusers' names are most easily taken for others of, by sd-scripts' list for SDXL."""
    found = {m.target.file_name: path for m, path in zip(*_modules_and_paths(sdxl_unet()), strict=True)}
    expected = {
        "lora_unet_input_blocks_4_1_proj_in": "down_blocks.1.attentions.0.proj_in",
        "lora_unet_input_blocks_6_0_op": "down_blocks.1.downsamplers.0.conv",
        "lora_unet_input_blocks_7_0_skip_connection": None,  # as wide as the block before it in this small model
        "lora_unet_middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
        "lora_unet_output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
        "lora_unet_output_blocks_5_1_transformer_blocks_0_ff_net_0_proj":
            "up_blocks.1.attentions.2.transformer_blocks.0.ff.net.0.proj",
        "lora_unet_output_blocks_8_0_emb_layers_1": "up_blocks.2.resnets.2.time_emb_proj",
    }  # fmt: skip
    for name, path in expected.items():
        assert found.get(name) == path, name


def _modules_and_paths(model):
    net = network(model, conv_dim="2")
    paths = {layer: path for path, layer in model.named_modules()}
    return net.all_modules, [paths[m.org_module] for m in net.all_modules]


def test_flux_file_in_diffusers(tmp_path):
    """Queries, keys and values that were trained apart stand fused in the file; diffusers' own reader, at the real
    width that it takes for granted, gives every layer its own delta back."""
    transformer = flux_transformer(double=1, single=0, heads=2)
    net = network(transformer)
    net.save_weights(str(tmp_path / "x.safetensors"), torch.float32, None)
    state = diffusers.FluxPipeline.lora_state_dict(str(tmp_path), weight_name="x.safetensors")
    assert largest_error(of_converted(state), layers_of(net, transformer)) < 1e-6


def test_flux_single_block_in_diffusers(tmp_path):
    with torch.device("meta"):
        transformer = diffusers.FluxTransformer2DModel(num_layers=0, num_single_layers=1)
    transformer = transformer.to(torch.bfloat16).to_empty(device="cpu").requires_grad_(False)
    for parameter in transformer.parameters():
        parameter.fill_(0.01)
    net = network(transformer, dim=2)
    net.save_weights(str(tmp_path / "x.safetensors"), torch.float32, None)
    state = diffusers.FluxPipeline.lora_state_dict(str(tmp_path), weight_name="x.safetensors")
    ours = layers_of(net, transformer)
    assert set(ours) == {f"single_transformer_blocks.0.{name}" for name in
                         ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out", "norm.linear")}  # fmt: skip
    assert largest_error(of_converted(state), ours) < 1e-6


def test_split_qkv_is_the_model_that_its_file_says(tmp_path):
    """The forward pass with split weights is that of the base model with the file's fused deltas added."""
    model, x = Flux(), torch.randn(2, 5, 4)
    base = model(x)
    net = network(model, split_qkv="true")
    trained = model(x)
    net.save_weights(str(tmp_path / "x.safetensors"), torch.float32, None)
    net.remove()
    assert torch.equal(model(x), base)
    tensors = load_file(tmp_path / "x.safetensors")
    assert tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"].shape[0] == 16  # padded to 4 parts of 4
    for path, layer in model.named_modules():
        name = f"lora_unet_{path.replace('.', '_')}"
        if f"{name}.lora_up.weight" in tensors:
            up, down = (tensors[f"{name}.lora_{side}.weight"] for side in ("up", "down"))
            layer.weight += tensors[f"{name}.alpha"] / up.shape[1] * up @ down
    assert relative_error(model(x), trained) < 1e-5
    assert relative_error(base, trained) > 1e-3


@pytest.mark.parametrize("split", ["true", "false"])
def test_split_file_is_read_into_either_form(tmp_path, split):
    model, file = Flux(), str(tmp_path / "x.safetensors")
    net = network(model, split_qkv="true")
    net.save_weights(file, torch.float32, None)
    wanted = {name: factors.delta() for name, factors in file_factors(net).items()}
    net.remove()
    again, _ = deft.create_network_from_weights(1.0, file, None, [], model, split_qkv=split)
    again.apply_to([], model)
    assert again.load_weights(file).left_at_start == 0
    assert len(again.all_modules) == (40 if split == "true" else 26)
    if split == "true":
        assert {m.rank for m in again.all_modules} == {4}
    got = {name: factors.delta() for name, factors in file_factors(again).items()}
    assert largest_error(got, wanted) < 1e-6


def test_both_forms_of_flux_write_the_same_file(tmp_path):
    """One adapter, trained on diffusers' layers, read by the original's with split weights."""
    theirs, ours = flux_transformer(), Flux(dim=64)
    net = network(theirs)
    net.save_weights(str(tmp_path / "x.safetensors"), torch.float32, None)
    other, _ = deft.create_network_from_weights(1.0, str(tmp_path / "x.safetensors"), None, [], ours, split_qkv="true")
    other.apply_to([], ours)
    assert other.load_weights(str(tmp_path / "x.safetensors")).left_at_start == 0
    assert largest_error(deltas(other), deltas(net)) < 1e-6


OMNIGEN_NAMES = [
    f"lora_unet_layers_{i}_self_attn_{name}" for i in range(2) for name in ("to_q", "to_k", "to_v", "to_out_0")
]


@pytest.mark.parametrize("make", [omnigen_transformer, OmniGen])
def test_attention_of_omnigen_and_its_mlp_where_it_is_asked_for(make):
    names = [m.target.file_name for m in network(make()).all_modules]
    assert sorted(names) == sorted(OMNIGEN_NAMES)
    more = [m.target.file_name for m in network(make(), train_mlp="true", train_block_indices="1").all_modules]
    mlp = [f"lora_unet_layers_1_mlp_{name}" for name in ("gate_up_proj", "down_proj")]
    assert sorted(more) == sorted(OMNIGEN_NAMES[4:] + mlp)


def test_original_omnigen_with_its_fused_weights_is_the_model_that_its_file_says(tmp_path):
    """The file has queries, keys and values apart; diffusers' form reads it, and the fused base with the file's deltas
    added answers as the trained one."""
    model, x, file = OmniGen(), torch.randn(2, 5, 16), str(tmp_path / "x.safetensors")
    base = model(x)
    net = network(model, train_mlp="true")
    trained = model(x)
    net.save_weights(file, torch.float32, None)
    theirs = omnigen_transformer()
    other, _ = deft.create_network_from_weights(1.0, file, None, [], theirs)
    other.apply_to([], theirs)
    assert other.load_weights(file).left_at_start == 0
    assert {m.rank for m in other.all_modules} == {4}
    assert largest_error(deltas(other), deltas(net)) < 1e-6
    changes = deltas(net)
    net.remove()
    assert torch.equal(model(x), base)
    for i, block in enumerate(model.llm.layers):
        name = f"lora_unet_layers_{i}"
        qkv = torch.cat([changes[f"{name}_self_attn_to_{kind}"] for kind in "qkv"])
        block["self_attn"].qkv_proj.weight += qkv
        block["self_attn"].o_proj.weight += changes[f"{name}_self_attn_to_out_0"]
        for layer in ("gate_up_proj", "down_proj"):
            getattr(block["mlp"], layer).weight += changes[f"{name}_mlp_{layer}"]
    assert relative_error(model(x), trained) < 1e-5
    assert relative_error(base, trained) > 1e-3


@pytest.mark.parametrize("start", ["base_model.model.llm.layers.0.self_attn.", "lora_unet_llm_layers_0_self_attn_"])
def test_changes_of_fused_weights_of_omnigen_are_read(start):
    """A LoRA, as the original's own training with peft writes it, and a whole difference: each layer's own rows."""
    up, down, whole = torch.randn(48, 5), torch.randn(5, 16), torch.randn(48, 16)
    lora = {f"{start}qkv_proj.lora_A.weight": down, f"{start}qkv_proj.lora_B.weight": up}
    for tensors, delta in ((lora, up @ down), ({f"{start}qkv_proj.diff": whole}, whole)):
        found = deft_formats.parse(tensors, {}, "x")
        assert found.architecture == "OmniGen"
        assert list(found.changes) == OMNIGEN_NAMES[:3]
        assert relative_error(torch.cat([change.delta() for change in found.changes.values()]), delta) < 1e-6
    oft = {f"{start}qkv_proj.oft_R.weight": torch.randn(4, 6)}
    with pytest.raises(DeftError, match="of several layers in one"):
        deft_formats.parse(oft, {}, "x").changes[OMNIGEN_NAMES[0]].delta(torch.randn(16, 16))
    damaged = {f"{start}qkv_proj.lora_A.weight": down, f"{start}qkv_proj.lora_B.weight": up[:, :4]}
    with pytest.raises(DeftError, match="damaged"):
        deft_formats.parse(damaged, {}, "x")


@pytest.mark.parametrize("form", ["kohya", "diffusers", "peft"])
def test_every_form_of_an_omnigen_file_is_read_again(tmp_path, form):
    net = network(omnigen_transformer(), train_mlp="true")
    changes = file_factors(net)
    tensors = deft_formats.tensors_as(form, changes, torch.float32, True, "OmniGen")
    again = deft_formats.parse(tensors, {}, "x")
    assert again.architecture == "OmniGen"
    assert largest_error({name: change.delta() for name, change in again.changes.items()}, deltas(net)) < 1e-6
    with pytest.raises(DeftError, match="has no name in it that is known here"):
        deft_formats.tensors_as("comfy", changes, torch.float32, True, "OmniGen")


def test_no_client_is_said_to_read_an_omnigen_file(tmp_path):
    net = network(omnigen_transformer())
    net.save_weights(str(tmp_path / "x.safetensors"), torch.float32, base_metadata(*_recognised(omnigen_transformer())))
    found = deft_report.report(str(tmp_path / "x.safetensors"), None)
    assert found.known is None
    assert found.adapter.architecture == "OmniGen"
    assert looks_made_for(load_file(tmp_path / "x.safetensors")) == "OmniGen"


def _recognised(model):
    return model, recognise(model)[1]


def test_a_fused_lora_of_another_program_is_read_exactly(tmp_path):
    theirs = flux_transformer(double=1, single=0)
    up, down = torch.randn(192, 5), torch.randn(5, 64)
    name = "lora_unet_double_blocks_0_txt_attn_qkv"
    deft_io.write_safetensors(
        {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(2.5)},
        tmp_path / "x.safetensors", {},
    )  # fmt: skip
    net, _ = deft.create_network_from_weights(1.0, str(tmp_path / "x.safetensors"), None, [], theirs)
    net.apply_to([], theirs)
    net.load_weights(str(tmp_path / "x.safetensors"))
    modules = sorted(net.all_modules, key=lambda m: m.lora_name)  # older diffusers have them in another order
    assert [m.lora_name[-2:] for m in modules] == ["-0", "-1", "-2"]
    parts = [torch.matmul(*m.lora_factors()) for m in modules]
    assert relative_error(torch.cat(parts), up @ down / 2) < 1e-6


def test_a_negative_alpha_is_read(tmp_path):
    """Some programs subtract an adapter that way."""
    file, name = str(tmp_path / "x.safetensors"), "lora_unet_single_blocks_0_linear2"
    up, down = torch.randn(24, 3), torch.randn(3, 120)
    tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(-1.5)}
    deft_io.write_safetensors(tensors, file, {})
    model = Flux()
    net, _ = deft.create_network_from_weights(1.0, file, None, [], model)
    net.apply_to([], model)
    net.load_weights(file)
    assert relative_error(deltas(net)[name], -up @ down / 2) < 1e-6


def test_gradients_of_split_weights():
    """Those of float64 autograd through W + the block-diagonal delta, entry by entry of P and R."""
    model, x = Flux(double=1, single=0), torch.randn(2, 5, 4)
    net = network(model, split_qkv="true", train_double_block_indices="0", img_mod_dim="0")
    model(x).square().sum().backward()
    modules = [m for m in net.all_modules if "img_attn_qkv" in m.lora_name]
    layer = modules[0].org_module
    leaves = [[t.detach().double().requires_grad_() for t in (m.P, m.R)] for m in modules]
    rows = []
    for m, (P, R) in zip(modules, leaves, strict=True):
        W = layer.weight[slice(*m.target.rows)].double()
        Q = torch.linalg.qr(P).Q
        Q = Q * (Q * P).sum(0).sign()
        rows.append(W + Q @ (m.scale * m.R_rate * R - (Q - m.E0.double()).T @ W))
    qkv = torch.cat(rows)
    proj = next(m for m in net.all_modules if m.lora_name.endswith("img_attn_proj"))
    with torch.no_grad():
        out = (proj.org_module.weight + torch.matmul(*proj.lora_factors())).double()
    h = torch.nn.functional.linear(x.double(), model.img_in.weight.double(), model.img_in.bias.double())
    q, k, v = (h @ qkv.T + layer.bias.double()).chunk(3, -1)
    y = h + (torch.softmax(q @ k.mT, -1) @ v) @ out.T + proj.org_module.bias.double()
    y.square().sum().backward()
    for m, (P, R) in zip(modules, leaves, strict=True):
        assert relative_error(m.P.grad.double(), P.grad) < 1e-4, m.lora_name
        assert relative_error(m.R.grad.double(), R.grad) < 1e-4, m.lora_name


@pytest.mark.parametrize(
    ("build", "option", "value", "line"),
    [
        (sdxl_unet, "img_attn_dim", "4", "network_args img_attn_dim: an option for FLUX.1 or Chroma, not for SDXL"),
        (Flux, "block_dims", "1,2", "block_dims: an option for Stable Diffusion 1.x or 2.x, SDXL, not for FLUX"),
        (sdxl_unet, "block_dims", "1,2", "block_dims: SDXL needs 23 numbers, not 2"),
        (Flux, "train_blocks", "twice", "train_blocks=twice: allowed are all, double, single"),
        (Flux, "ggpo_sigma", "0.03", "ggpo_sigma=0.03: GGPO"),
        (Flux, "network_reg_dims", "((=4", "network_reg_dims: (( is no regular expression"),
        (Flux, "in_dims", "4,4", "in_dims: needs 5 ranks"),
    ],
)
def test_options_of_other_architectures_are_refused(build, option, value, line):
    with pytest.raises(DeftError, match=re.escape(line)):
        network(build(), **{option: value})


def test_patterns_and_selections_together():
    """As in networks.lora_flux: a pattern brings back a block that its number left out, not one of the other kind, and
    goes before `in_dims`."""
    ranks = {m.lora_name: m.rank for m in network(
        Flux(), train_blocks="double", train_double_block_indices="1", in_dims="4,0,0,0,4",
        network_reg_dims="linear2=8,double_blocks_0_img_mod=3,img_in=2",
    ).all_modules}  # fmt: skip
    assert not any("single_blocks" in name for name in ranks)
    assert {name: rank for name, rank in ranks.items() if "double_blocks_1_" not in name} == {
        "lora_unet_double_blocks_0_img_mod_lin": 3, "lora_unet_img_in": 2, "lora_unet_txt_in": 4,
    }  # fmt: skip
    with pytest.raises(DeftError, match="train_double_block_indices=2: this model's blocks are 0 to 1"):
        network(Flux(), train_double_block_indices="2")


def test_threshold_counts_for_the_weights_that_are_given():
    names = {m.lora_name for m in network(sdxl_unet(), down_lr_weight="2", block_lr_zero_threshold="1").all_modules}
    assert not any("_input_blocks_4_" in name for name in names)  # filled up with 1
    assert any("_output_blocks_0_" in name for name in names)


@pytest.mark.parametrize("value", [".*mlp.*", "'.*mlp.*'", "['.*mlp.*']"])
def test_patterns_quoted_or_not(value):
    assert parse_options({"exclude_patterns": value}).exclude_patterns == (".*mlp.*",)


def test_encoders_that_are_not_there(tmp_path):
    """FLUX trainers hand over None or a dummy for an encoder that is not used: the file's part for it stays aside."""
    file = str(tmp_path / "x.safetensors")
    net = network(Flux(), encoders=[_clip(), None])
    net.save_weights(file, torch.float32, None)
    for encoders in ([None, None], [nn.Module(), None], []):
        again, _ = deft.create_network_from_weights(1.0, file, None, encoders, Flux())
        assert not again.text_encoder_modules
        again.apply_to(encoders, Flux())
        assert again.load_weights(file).other_half == 6


@pytest.mark.parametrize(("options", "said"), [
    ({}, []), ({"in_dims": "4,4,4,4,4"}, ["in_dims"]), ({"train_t5xxl": "true"}, ["T5"]),
    ({"train_t5xxl": "true", "in_dims": "4,4,4,4,4", "split_qkv": "true"}, ["T5", "in_dims"]),
    ({"train_t5xxl": "true", "save_format": "deft"}, []),
])  # fmt: skip
def test_layers_that_not_every_client_reads_are_told(tmp_path, caplog, options, said):
    net = network(Flux(), encoders=[_clip(), _t5()], **options)
    caplog.clear()
    net.save_weights(str(tmp_path / "x.safetensors"), torch.float32, None)
    lines = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == len(said)
    assert all(word in line and "InvokeAI" in line for word, line in zip(said, lines, strict=True))


@pytest.mark.parametrize(("saved", "loaded"), [("false", "true"), ("true", "false")])
def test_the_methods_own_matrices_are_not_split_or_joined(tmp_path, saved, loaded):
    """Silence would lose them."""
    file = str(tmp_path / "x.safetensors")
    network(Flux(), split_qkv=saved, save_format="deft").save_weights(file, None, None)
    with pytest.raises(DeftError, match=r"qkv are (not )?split"):
        network(Flux(), split_qkv=loaded).load_weights(file)
    again, _ = deft.create_network_from_weights(1.0, file, None, [], Flux())
    assert again.config.split_qkv == (saved == "true")


def test_selections_and_weights():
    assert numbers_of("x", "0, 3-5") == {0, 3, 4, 5}
    assert numbers_of("x", "all") is None
    assert numbers_of("x", "none") == set()
    assert weights_of("x", "linear+.5", 3) == [0.5, 1.0, 1.5]
    assert weights_of("x", "1,,2", 5) == [1, 0, 2, 1, 1]
    for wrong in ("5-3", "a", "1;2"):
        with pytest.raises(DeftError, match="x="):
            numbers_of("x", wrong)
    for wrong in ("tan", "1,2,3,4", "cosine+a"):
        with pytest.raises(DeftError, match="x="):
            weights_of("x", wrong, 3)


def test_rates_by_layer_and_half():
    """Groups by encoder, by block, by pattern, and P's own rate under LoRA+."""
    encoders = [_clip(), _clip()]
    net = network(
        sdxl_unet(), encoders=encoders, down_lr_weight="linear", mid_lr_weight="0,0,0", loraplus_lr_ratio="4",
        network_reg_lrs="output_blocks_3_=0.7",
    )  # fmt: skip
    groups, names = net.prepare_optimizer_params_with_multiple_te_lrs([0.1, 0.2], 1.0, 0.5)
    rates = dict(zip(names, (group["lr"] for group in groups), strict=True))
    assert len(rates) == len(names)
    assert rates["textencoder 1"] == 0.1
    assert rates["textencoder 2 plus"] == 0.8
    assert rates["unet_block9"] == 1.0  # the last of nine on the way down
    assert rates["unet_block5 plus"] == 4 * 4 / 8
    assert rates["unet reg_lr_0"] == 0.7
    assert not any("middle_block" in m.lora_name for m in net.all_modules)
    grouped = [p for group in groups for p in group["params"]]
    assert len({id(p) for p in grouped}) == len(grouped) == sum(p.requires_grad for p in net.parameters())
    plus = next(group for group, name in zip(groups, names, strict=True) if name == "unet_block9 plus")
    assert all(any(p is m.P for m in net.unet_modules) for p in plus["params"])


def _clip() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=40,
    )).requires_grad_(False)  # fmt: skip


def _t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(
        d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2, vocab_size=40, feed_forward_proj="gated-gelu",
    )).requires_grad_(False)  # fmt: skip


def test_sdxl_encoders_have_their_own_names():
    net = network(sdxl_unet(), encoders=[_clip(), _clip()])
    names = [m.lora_name for m in net.text_encoder_modules]
    assert [name.split("_")[1] for name in names] == ["te1"] * 6 + ["te2"] * 6
    assert names[0] == "lora_te1_text_model_encoder_layers_0_self_attn_k_proj"


@pytest.mark.parametrize(
    ("make", "v2", "version", "architecture"),
    [
        (lambda: sd_unet(768), "False", "sd_v1", "stable-diffusion-v1/lora"),
        (lambda: sd_unet(1024), "True", "sd_v2", None),  # whether it predicts v cannot be seen
        (sdxl_unet, "False", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
        (flux_transformer, "False", "flux1", "flux-1-dev/lora"),
        (lambda: flux_transformer(guidance=False), "False", "flux1", "flux-1-schnell/lora"),
        (omnigen_transformer, "False", "omnigen1", "omnigen-1/lora"),
        (OmniGen, "False", "omnigen1", "omnigen-1/lora"),
    ],
    ids=["1.x", "2.x", "sdxl", "dev", "schnell", "omnigen", "original omnigen"],
)
def test_files_say_what_model_they_are_for(make, v2, version, architecture):
    """In the words of sd-scripts' own trainers; for its own classes see test_layers_and_ranks_of_every_architecture."""
    unet = make()
    found = base_metadata(unet, recognise(unet)[1])
    assert (found["ss_v2"], found["ss_base_model_version"]) == (v2, version)
    assert found.get("modelspec.architecture") == architecture


def test_norms_only_for_trackers():
    model = Flux()
    net = network(model)
    net.update_grad_norms()
    assert net.weight_norms() is None
    assert net.combined_weight_norms() is None
    net.prepare_network(type("Args", (), {"logging_dir": "logs"}))
    model(torch.randn(2, 5, 4)).square().sum().backward()
    net.update_grad_norms()
    module = next(m for m in net.all_modules if m.lora_name.endswith("single_blocks_0_linear1"))
    i = net.all_modules.index(module)
    with torch.no_grad():
        delta = torch.matmul(*module.lora_factors())
    W = module.org_module.weight
    assert float(net.weight_norms()[i]) == pytest.approx(float(delta.norm()), rel=1e-4)
    assert float(net.combined_weight_norms()[i]) == pytest.approx(float(torch.cat([W, delta]).norm()), rel=1e-4)
    gradient = torch.cat([module.P.grad.flatten(), module.R.grad.flatten()]).norm()
    assert float(net.grad_norms()[i]) == pytest.approx(float(gradient), rel=1e-4)
    unused = next(m for m in net.all_modules if "txt_mlp" in m.lora_name)
    assert float(net.grad_norms()[net.all_modules.index(unused)]) == 0


def test_options_survive_the_metadata():
    """What a training from the file takes over is the adapter's own; the rest is on record."""
    config = parse_options(
        {"network_reg_dims": "a=4,b.*=2", "block_dims": "1,2", "ratio": "0.5", "up_lr_weight": "sine"}
    )
    import json

    from networks.deft_config import options_of_file

    again = json.loads(config.to_json())
    assert parse_options(again) == config
    assert options_of_file(again).keys() >= {"ratio", "basis", "dim"}
    assert not options_of_file(again).keys() & {"network_reg_dims", "block_dims", "up_lr_weight"}
