"""Files of musubi-tuner's models, saved once: ComfyUI, diffusers, musubi-tuner's names and networks.deft find in them
what was trained. tests/integration/test_comfyui.py has ComfyUI's own code, tests/small_musubi.py its names as data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from networks import convert_deft, deft, deft_formats, deft_names, merge_deft, resize_deft
from tests import small_musubi
from tests.conftest import perturb, relative_error
from tests.small_musubi import MODELS, NOT_IN_COMFYUI, WIDTH

ALL_LAYERS = {"exclude_patterns": "[]", "include_patterns": "['.*']"}
FUSED = [name for name in MODELS if name in ("FLUX.2", "Qwen-Image", "Z-Image", "Wan 2.1 or 2.2", "HunyuanVideo 1.5")]
IN_COMFYUI = [name for name in MODELS if name not in NOT_IN_COMFYUI]
ENDS = {"lora_up.weight": 0, "lora_B.weight": 0, "lora_down.weight": 1, "lora_A.weight": 1}


def network_on(model: nn.Module, **options: str) -> deft.DeftNetwork:
    network = deft.create_arch_network(1.0, 3, 2.0, None, None, model, **options)
    network.apply_to(None, model, apply_text_encoder=False, apply_unet=True)
    return network


def trained(name: str, **options: str) -> deft.DeftNetwork:
    network = network_on(small_musubi.made(name), **options)
    perturb(network)
    return network


@torch.no_grad()
def changes(network: deft.DeftNetwork) -> dict[str, Tensor]:
    """By the model's own paths, float64."""
    found: dict[str, Tensor] = {}
    for module in network.all_modules:
        up, down = (factor.double() for factor in module.lora_factors())
        rows = (up @ down).split([place.shape[0] for place in module.target.places])
        for place, some in zip(module.target.places, rows, strict=True):
            whole = found.setdefault(place.path, torch.zeros(place.layer.weight.shape, dtype=torch.float64))
            whole[slice(*place.rows or (None,))] += some
    return found


def saved(network: deft.DeftNetwork, file: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    name = network.ranks.architecture.name
    network.save_weights(str(file), dtype, {"ss_base_model_version": MODELS[name].key})
    return load_file(file)


def products(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What stands before a layer's matrices in a file -> up @ down * alpha / rank, float64."""
    pairs: dict[str, list[Tensor]] = {}
    for key, tensor in tensors.items():
        stem, _, end = re.fullmatch(r"(.*?)(\.)(alpha|lora_\w+\.weight)", key).groups()
        if end != "alpha":
            pairs.setdefault(stem, [tensor, tensor])[ENDS[end]] = tensor.double()
    scales = {s: float(tensors[f"{s}.alpha"]) / len(p[1]) if f"{s}.alpha" in tensors else 1 for s, p in pairs.items()}
    return {stem: scales[stem] * (up @ down) for stem, (up, down) in pairs.items()}


def seen_by_comfyui(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a file makes of ComfyUI's weights, by its paths; a KeyError for what it does not know."""
    names = small_musubi.comfy_names(name)
    found = small_musubi.in_comfyui(name, {})
    for stem, change in products(tensors).items():
        place, part = names[stem]
        rows = slice(None) if part is None else slice(part * len(change), (part + 1) * len(change))
        found[place][rows] += change
    return found


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], limit: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        assert relative_error(found[name], change) < limit or not (change.any() or found[name].any()), name


@pytest.mark.parametrize("options", [{}, ALL_LAYERS, {"pad": "false"}], ids=["default", "all", "unpadded"])
@pytest.mark.parametrize("name", IN_COMFYUI)
def test_comfyui_finds_every_key(name, options, tmp_path):
    network = trained(name, **options)
    by_path = changes(network)
    assert set(by_path) == set(MODELS[name].layers) - (MODELS[name].outside if options is not ALL_LAYERS else set())
    found = seen_by_comfyui(name, saved(network, tmp_path / "x.safetensors"))
    assert_equal(found, small_musubi.in_comfyui(name, by_path))


@pytest.mark.parametrize("name", FUSED)
def test_comfyui_reads_what_is_adapted_as_one(name, tmp_path):
    option = {"split_qkv": "true"} if name == "FLUX.2" else {"fuse_qkv": "true"}
    network = trained(name, **option)
    tensors = saved(network, tmp_path / "x.safetensors")
    assert_equal(seen_by_comfyui(name, tensors), small_musubi.in_comfyui(name, changes(network)))
    again = network_on(small_musubi.made(name), **option)
    again.load_weights(str(tmp_path / "x.safetensors"))
    assert_equal(changes(again), changes(network), 1e-5)


@pytest.mark.parametrize(("options", "dtype", "limit"), [
    ({}, torch.float32, 1e-5), ({"basis": "relu"}, torch.float16, 2e-3), ({"save_format": "deft"}, torch.float32, 1e-5),
    ({"network_reg_dims": ".*(q|qkv|wq|to_query|q_proj):2"}, torch.float32, 1e-5),
], ids=["", "half", "deft", "ranks"])  # fmt: skip
@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_is_read_again(name, options, dtype, limit, tmp_path):
    """By a network that goes on, by one that is made of the tensors alone, and merged, as `--base_weights` does it."""
    network, file = trained(name, **options), tmp_path / "x.safetensors"
    tensors, expected = saved(network, file, dtype), changes(network)
    again = network_on(small_musubi.made(name), **options)
    assert again.load_weights(str(file)).loaded == len(again.all_modules)
    assert_equal(changes(again), expected, limit)
    model = small_musubi.made(name)
    before = {path: model.get_submodule(path).weight.double() for path in expected}
    deft.create_arch_network_from_weights(1.0, tensors, unet=model, for_inference=True).merge_to(None, model, tensors)
    after = {path: model.get_submodule(path).weight.double() - weight for path, weight in before.items()}
    assert_equal(after, expected, max(limit, 1e-4))


def as_musubi_names_them(by_path: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What musubi-tuner's own networks would save of changes: by singular vectors, with an alpha that is no rank."""
    tensors = {}
    for path, change in by_path.items():
        U, S, V = torch.linalg.svd(change.float())
        name, rank = f"lora_unet_{path.replace('.', '_')}", 3
        tensors |= {f"{name}.lora_up.weight": 2 * U[:, :rank] * S[:rank], f"{name}.lora_down.weight": V[:rank].clone(),
                    f"{name}.alpha": torch.tensor(rank / 2)}  # fmt: skip
    return tensors


@pytest.mark.parametrize("name", MODELS)
def test_files_of_musubis_own_networks_are_read(name):
    expected = changes(trained(name))
    again = network_on(small_musubi.made(name))
    again.load_state_dict(as_musubi_names_them(expected))
    assert_equal(changes(again), expected, 1e-5)


def metadata(file: Path) -> dict[str, str]:
    with safe_open(str(file), framework="pt") as opened:
        return opened.metadata()


@pytest.mark.parametrize("name", ["Z-Image", "HunyuanVideo", "HunyuanVideo 1.5", "FLUX.2", "HiDream-O1"])
def test_tools_keep_the_names(name, tmp_path):
    """What they write has the names that the network saves; converted to kohya's it has musubi-tuner's."""
    network, file, output = trained(name), tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    tensors = saved(network, file)
    whole = small_musubi.in_comfyui(name, changes(network))
    for run, arguments in (
        (convert_deft, [str(file)]), (resize_deft, ["--model", str(file), "--new_rank", "40"]),
        (merge_deft, ["--models", str(file), "--ratios", "1"]),
    ):  # fmt: skip
        assert run.main([*arguments, "--save_to", str(output)]) == 0
        made = load_file(output)
        assert {key for key in made if "alpha" not in key} == {key for key in tensors if "alpha" not in key}
        assert_equal(seen_by_comfyui(name, made), whole, 1e-5)
        output.unlink()
    if MODELS[name].dotted or name == "HiDream-O1":
        assert convert_deft.main([str(file), "--save_to", str(output), "--to", "kohya"]) == 0
        expected = {f"lora_unet_{path.replace('.', '_')}": change for path, change in changes(network).items()}
        assert_equal(products(load_file(output)), expected, 1e-5)
        again = network_on(small_musubi.made(name))
        again.load_weights(str(output))
        assert_equal(changes(again), changes(network), 1e-5)
        assert convert_deft.main([str(output), "--save_to", str(tmp_path / "z.safetensors")]) == 0
        assert_equal(seen_by_comfyui(name, load_file(tmp_path / "z.safetensors")), whole, 1e-5)
    if name in ("Z-Image", "HiDream-O1"):  # of the others' layers, metadata alone says whose they are
        save_file(tensors, bare := tmp_path / "bare.safetensors")
        assert convert_deft.main([str(bare), "--save_to", str(tmp_path / "b.safetensors"), "--to", "kohya"]) == 0
        assert_equal(products(load_file(tmp_path / "b.safetensors")), expected, 1e-5)
        assert resize_deft.main(["--model", str(tmp_path / "b.safetensors"), "--new_rank", "40",
                                 "--save_to", str(tmp_path / "c.safetensors")]) == 0  # fmt: skip
        assert_equal(seen_by_comfyui(name, load_file(tmp_path / "c.safetensors")), whole, 1e-5)
    read = deft_formats.read(file)
    assert read.architecture == name
    assert deft_names.said(metadata(file)) == name


# --- diffusers --------------------------------------------------------------------------------------------------------

IMAGE, TEXT = "attn.to_q|attn.to_k|attn.to_v", "attn.add_q_proj|attn.add_k_proj|attn.add_v_proj"
BLOCKS = [("double_blocks", "transformer_blocks"), ("single_blocks", "single_transformer_blocks")]
FLUX_ATTENTION = [
    (r"img_attn\.qkv", IMAGE), (r"txt_attn\.qkv", TEXT), (r"img_attn\.proj", "attn.to_out.0"),
    (r"txt_attn\.proj", "attn.to_add_out"), *BLOCKS,
]  # fmt: skip
# its pipeline, and patterns from musubi-tuner's path to diffusers'; `|` between the equal parts of a weight
DIFFUSERS: dict[str, tuple[str, list[tuple[str, str]], dict[str, str]]] = {
    "FLUX.2": ("Flux2Pipeline", [
        *FLUX_ATTENTION, (r"img_mlp\.0", "ff.linear_in"), (r"img_mlp\.2", "ff.linear_out"),
        (r"txt_mlp\.0", "ff_context.linear_in"), (r"txt_mlp\.2", "ff_context.linear_out"),
        ("linear1", "attn.to_qkv_mlp_proj"), ("linear2", "attn.to_out"),
    ], {}),
    "FLUX.1 Kontext": ("FluxKontextPipeline", [
        *FLUX_ATTENTION, (r"img_mlp\.0", "ff.net.0.proj"), (r"img_mlp\.2", "ff.net.2"),
        (r"txt_mlp\.0", "ff_context.net.0.proj"), (r"txt_mlp\.2", "ff_context.net.2"), ("linear2", "proj_out"),
    ], {"exclude_patterns": r"['.*linear1','.*\\.lin']"}),  # its parts are split at the real width: below
    "Qwen-Image": ("QwenImagePipeline", [], {}),
    "Z-Image": ("ZImagePipeline", [], {}),
    "Wan 2.1 or 2.2": ("WanPipeline", [
        ("self_attn", "attn1"), (r"cross_attn\.k_img", "attn2.add_k_proj"), (r"cross_attn\.v_img", "attn2.add_v_proj"),
        ("cross_attn", "attn2"), (r"\.([qkv])$", r".to_\1"), (r"\.o$", ".to_out.0"), (r"ffn\.0", "ffn.net.0.proj"),
        (r"ffn\.2", "ffn.net.2"),
    ], {}),
    "HunyuanVideo": ("HunyuanVideoPipeline", [
        ("img_attn_qkv", IMAGE), ("txt_attn_qkv", TEXT), ("img_attn_proj", "attn.to_out.0"),
        ("txt_attn_proj", "attn.to_add_out"), ("img_mlp", "ff"), ("txt_mlp", "ff_context"), ("fc1", "net.0.proj"),
        ("fc2", "net.2"), ("linear2", "proj_out"), *BLOCKS,
    ], {"exclude_patterns": "['.*linear1']"}),
}  # fmt: skip


def in_diffusers(path: str, renames: list[tuple[str, str]]) -> list[str]:
    for pattern, new in renames:
        path = re.sub(pattern, new, path)
    first, *others = path.split("|")
    root = re.match(r".*?\.\d+\.", first)
    return [f"transformer.{first}", *(f"transformer.{root[0] if root else ''}{other}" for other in others)]


@pytest.mark.parametrize("name", DIFFUSERS)
def test_diffusers_reads_every_key(name, tmp_path):
    diffusers = pytest.importorskip("diffusers", minversion="0.42")
    pipeline, renames, options = DIFFUSERS[name]
    network = trained(name, **options)
    tensors = saved(network, tmp_path / "x.safetensors")
    found = getattr(diffusers, pipeline).lora_state_dict(dict(tensors))
    found, alphas = found if isinstance(found, tuple) else (found, None)
    assert not alphas
    expected = {}
    for path, change in changes(network).items():
        paths = in_diffusers(path, renames)
        expected |= dict(zip(paths, change.chunk(len(paths)), strict=True))
    assert_equal(products(found), expected)


KREA = [
    (r"^tmlp\.0", "time_embed.linear_1"), (r"^tmlp\.2", "time_embed.linear_2"), (r"^tproj\.1", "time_mod_proj"),
    (r"^txtmlp\.1", "txt_in.linear_1"), (r"^txtmlp\.3", "txt_in.linear_2"), ("^first", "img_in"),
    ("^last", "final_layer"), ("^blocks", "transformer_blocks"), ("^txtfusion", "text_fusion"), ("wq", "to_q"),
    ("wk", "to_k"), ("wv", "to_v"), ("wo", "to_out.0"), (r"attn\.gate", "attn.to_gate"), (r"\.mlp\.", ".ff."),
]  # fmt: skip
IDEOGRAM = [
    (r"attention\.qkv", "attention.to_q|attention.to_k|attention.to_v"),
    (r"attention\.o", "attention.to_out.0"),
]


@pytest.mark.parametrize(("name", "pipeline", "renames"), [("Krea 2", "Krea2Pipeline", KREA),
                                                           ("Ideogram 4", "Ideogram4Pipeline", IDEOGRAM)])  # fmt: skip
def test_diffusers_reads_what_is_converted_to_dots(name, pipeline, renames, tmp_path):
    diffusers = pytest.importorskip("diffusers", minversion="0.42")
    network, file, output = trained(name), tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    saved(network, file)
    assert convert_deft.main([str(file), "--save_to", str(output), "--to", "comfy"]) == 0
    expected = {}
    for path, change in changes(network).items():
        paths = in_diffusers(path, renames)
        expected |= dict(zip(paths, change.chunk(len(paths)), strict=True))
    assert_equal(products(getattr(diffusers, pipeline).lora_state_dict(load_file(output))), expected)


@pytest.mark.parametrize(("name", "key"), [("HunyuanVideo", "lora_unet_single_blocks_0_linear1"),
                                           ("FLUX.1 Kontext", "lora_unet_single_blocks_0_linear1")])  # fmt: skip
def test_diffusers_splits_linear1_at_the_real_width(name, key):
    diffusers = pytest.importorskip("diffusers", minversion="0.42")
    width, attention = 3072, "lora_unet_double_blocks_0_img_attn_qkv"  # which a file always has
    tensors = {}
    for layer, rows in ((key, 7 * width), (attention, 3 * width)):
        tensors |= {f"{layer}.lora_up.weight": torch.randn(rows, 2), f"{layer}.lora_down.weight": torch.randn(2, width),
                    f"{layer}.alpha": torch.tensor(2.0)}  # fmt: skip
    found = getattr(diffusers, DIFFUSERS[name][0]).lora_state_dict(deft_names.with_dots(tensors, name))
    found = found[0] if isinstance(found, tuple) else found
    up, down = tensors[f"{key}.lora_up.weight"], tensors[f"{key}.lora_down.weight"]
    block = "transformer.single_transformer_blocks.0"
    for part, rows in (("attn.to_q", 0), ("attn.to_k", 1), ("attn.to_v", 2), ("proj_mlp", slice(3 * width, 7 * width))):
        rows = slice(rows * width, (rows + 1) * width) if isinstance(rows, int) else rows
        assert torch.equal(found[f"{block}.{part}.lora_B.weight"], up[rows])
        assert torch.equal(found[f"{block}.{part}.lora_A.weight"], down)


def test_a_layer_that_is_not_known_keeps_its_names():
    tensors = {"lora_unet_layers_0_something_else.lora_up.weight": torch.ones(WIDTH, 1)}
    assert deft_names.with_dots(tensors, "Z-Image") == tensors
