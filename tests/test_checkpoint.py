"""Checkpoints by layer, whatever their layout and dtype, and checkpoints written anew with changed weights."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.models.reading import CONFIGS
from networks import deft_layouts, deft_scaled
from networks.deft_architectures import ARCHITECTURES, Architecture, recognise
from networks.deft_checkpoint import Checkpoint, open_checkpoint
from networks.deft_config import DeftError
from networks.deft_factors import Factors
from networks.deft_rewrite import rewrite
from networks.deft_targets import outside_targets, targets
from tests import small_flux, small_models
from tests.conftest import relative_error

diffusers = pytest.importorskip("diffusers")
single_file_utils = pytest.importorskip("diffusers.loaders.single_file_utils")
transformers = pytest.importorskip("transformers")

Model = namedtuple("Model", "folder single modules architecture")
FLUX_INPUTS = ("_img_in", "_time_in", "_vector_in", "_guidance_in", "_txt_in")


# --- models to read --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Kind -> a Diffusers folder, a single file of the same weights, its modules by their parts, its architecture."""
    made: dict[str, Model] = {}

    def make(kind: str) -> Model:
        if kind not in made:
            made[kind] = _flux(tmp_path_factory) if kind == "flux" else _sd(kind, tmp_path_factory)
        return made[kind]

    return make


def _sd(kind: str, tmp_path_factory) -> Model:
    to = tmp_path_factory.mktemp(kind)
    folder = small_models.build(kind, to / "folder")
    kinds = {"sdxl": diffusers.StableDiffusionXLPipeline}
    pipeline = kinds.get(kind, diffusers.StableDiffusionPipeline).from_pretrained(
        str(folder), safety_checker=None, feature_extractor=None, requires_safety_checker=False, local_files_only=True
    )
    save_file(small_models.single_file(pipeline), to / "m.safetensors", {"modelspec.title": "small"})
    encoders = [pipeline.text_encoder] + ([pipeline.text_encoder_2] if kind == "sdxl" else [])
    return _with_parts(folder, to / "m.safetensors", pipeline.unet, encoders)


def _flux(tmp_path_factory) -> Model:
    small = small_flux.build(tmp_path_factory.mktemp("flux"))
    to = tmp_path_factory.mktemp("flux_single")
    tensors = {f"model.diffusion_model.{key}": value for key, value in small.parts["transformer"].items()}
    tensors |= {f"text_encoders.clip_l.transformer.{key}": value for key, value in small.parts["clip_l"].items()}
    tensors |= {f"text_encoders.t5xxl.transformer.{key}": value for key, value in small.parts["t5xxl"].items()}
    tensors |= {f"vae.{key}": value for key, value in small.parts["ae"].items()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, to / "m.safetensors")
    pipeline = diffusers.FluxPipeline.from_pretrained(str(small.folder), local_files_only=True)
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
    return _with_parts(small.folder, to / "m.safetensors", pipeline.transformer, encoders)


def _with_parts(folder: Path, single: Path, denoiser, encoders) -> Model:
    architecture, part = recognise(denoiser)
    modules = [(denoiser, part), *zip(encoders, architecture.text_encoders, strict=True)]
    return Model(folder, single, modules, architecture)


def weights_of(model: torch.nn.Module, part, architecture: Architecture) -> dict[str, Tensor]:
    """By key name, what the networks adapt in a model: parts of a weight in files are put together."""
    found = targets(model, part, True)
    if part in architecture.denoisers and architecture.name.startswith("FLUX"):
        found += [target for _, target in outside_targets(model, part, FLUX_INPUTS)]
    parts: dict[str, dict[str, Tensor]] = {}
    for target in found:
        parts.setdefault(target.file_name, {})[target.name] = target.layer.weight.detach()
    return {name: torch.cat([held[k] for k in sorted(held)]) for name, held in parts.items()}


def all_weights(model: Model) -> dict[str, Tensor]:
    return {
        name: value
        for module, part in model.modules
        for name, value in weights_of(module, part, model.architecture).items()
    }


KINDS = ("sd15", "sd2", "sdxl", "flux")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["folder", "single"])
def test_layers_are_what_the_networks_adapt_with_the_models_own_weights(models, kind, form):
    model = models(kind)
    expected = all_weights(model)
    with open_checkpoint(model.folder if form == "folder" else model.single) as checkpoint:
        assert checkpoint.architecture == model.architecture.name
        assert checkpoint.layers.keys() == expected.keys()
        for name, weight in expected.items():
            assert checkpoint.layers[name].shape == tuple(weight.shape)
            assert torch.equal(checkpoint.weight(name), weight), name
        held = {p.key for place in checkpoint.layers.values() for p in place.pieces}
        held |= {p.key for place in checkpoint.further.values() for p in place.pieces}
        assert held.isdisjoint(checkpoint.rest)
        assert held.union(checkpoint.rest) == set(checkpoint.keys())
        assert any("vae" in key or "first_stage" in key for key in checkpoint.rest)


@pytest.mark.parametrize("kind", KINDS)
def test_further_matrices_are_the_same_in_a_folder_and_in_a_file(models, kind):
    """Of which diffusers' converter, or its model, has made one from the other."""
    with open_checkpoint(models(kind).folder) as folder, open_checkpoint(models(kind).single) as single:
        assert folder.further.keys() == single.further.keys()
        assert len(folder.further) == {"sdxl": 6, "flux": 2}.get(kind, 4)
        for name in folder.further:
            assert torch.equal(folder.weight(name), single.weight(name)), name


def published(kind: str, part: str, of: type, config_of=None) -> torch.nn.Module:
    config = json.loads((CONFIGS / kind / part / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        return of.from_config(config) if config_of is None else of(config_of(**config))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_the_published_models(kind):
    """At full size, by keys and shapes alone."""
    if kind == "flux":
        model = published(kind, "transformer", diffusers.FluxTransformer2DModel)
        with torch.device("meta"):
            original = small_flux.transformer_tensors(True, 19, 38, 3072, 4096, 768)
        diffusers_start = "transformer/"
    else:
        model = published(kind, "unet", diffusers.UNet2DConditionModel)
        original, diffusers_start = small_models.original_unet(model), "unet/"
    architecture, part = recognise(model)
    expected = {name: tuple(weight.shape) for name, weight in weights_of(model, part, architecture).items()}
    assert len(expected) == {"sd15": 278, "sd2": 278, "sdxl": 788, "flux": 312}[kind]
    for start, tensors in (
        ("", original), ("model.diffusion_model.", original), ("diffusion_model.", original),
        ("", model.state_dict()), (diffusers_start, model.state_dict()),
    ):  # fmt: skip
        shapes = {start + key: tuple(value.shape) for key, value in tensors.items()}
        layout = deft_layouts.recognise(shapes, "", "it")
        assert layout.architecture == architecture.name
        layers, further = deft_layouts.places(layout, shapes, "it")
        assert {name: place.shape for name, place in layers.items()} == expected
        assert not further.keys() & layers.keys()


@pytest.mark.parametrize(
    ("kind", "part", "of", "config", "prefix", "number"),
    [
        ("flux", "text_encoder", "CLIPTextModel", "CLIPTextConfig", "lora_te1", 72),
        ("sdxl", "text_encoder_2", "CLIPTextModelWithProjection", "CLIPTextConfig", "lora_te2", 192),
        ("flux", "text_encoder_2", "T5EncoderModel", "T5Config", "lora_te3", 168),
    ],
)
def test_text_encoders_in_a_file_of_their_own(kind, part, of, config, prefix, number):
    model = published(kind, part, getattr(transformers, of), getattr(transformers, config))
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    layers, _ = deft_layouts.places(deft_layouts.recognise(shapes, "", "it"), shapes, "it")
    encoder = next(p for a in ARCHITECTURES for p in a.text_encoders if p.prefix == prefix)
    assert layers.keys() == {target.file_name for target in targets(model, encoder, True)}
    assert len(layers) == number


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        (
            "Stable Diffusion 3",
            {
                "model.diffusion_model.joint_blocks.0.x_block.attn.qkv": "lora_unet_joint_blocks_0_x_block_attn_qkv",
                "model.diffusion_model.t_embedder.mlp.2": "lora_unet_t_embedder_mlp_2",
                "model.diffusion_model.x_embedder.proj": "lora_unet_x_embedder_proj",
                "text_encoders.clip_g.transformer.text_model.encoder.layers.3.mlp.fc1":
                    "lora_te2_text_model_encoder_layers_3_mlp_fc1",
                "text_encoders.t5xxl.transformer.encoder.block.1.layer.0.SelfAttention.q":
                    "lora_te3_encoder_block_1_layer_0_SelfAttention_q",
                "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.relative_attention_bias": None,
                "first_stage_model.decoder.mid.attn_1.q": None,
            },
        ),
        (
            "Lumina 2",
            {
                "model.diffusion_model.layers.0.attention.qkv": "lora_unet_layers_0_attention_qkv",
                "model.diffusion_model.cap_embedder.1": "lora_unet_cap_embedder_1",
                "text_encoders.gemma2_2b.transformer.model.layers.3.mlp.up_proj": "lora_te_layers_3_mlp_up_proj",
                "text_encoders.gemma2_2b.transformer.model.embed_tokens": None,
            },
        ),
    ],
)  # fmt: skip
def test_layouts_of_models_that_only_sd_scripts_has(architecture, keys):
    shapes = {f"{key}.weight": (6, 2) for key in keys}
    layout = deft_layouts.recognise(shapes, "", "it")
    assert layout.architecture == architecture
    layers, further = deft_layouts.places(layout, shapes, "it")
    assert {name: place.pieces[0].key.removesuffix(".weight") for name, place in layers.items()} == {
        name: key for key, name in keys.items() if name
    }
    assert not further


@pytest.mark.parametrize("part", ["unet", "text_encoder", "text_encoder_2"])
def test_one_component_of_a_folder_is_named_by_the_whole(models, part):
    folder = models("sdxl").folder
    with open_checkpoint(folder) as whole, open_checkpoint(folder / part) as component:
        prefix = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[part]
        assert component.layers == {name: p for name, p in whole.layers.items() if name.startswith(f"{prefix}_")}
        assert component.architecture == whole.architecture
        name = next(iter(component.layers))
        assert torch.equal(component.weight(name), whole.weight(name))


# --- dtypes ----------------------------------------------------------------------------------------------------------


def flux_file(path: Path, change=lambda key, value: {key: value}, metadata=None) -> dict[str, Tensor]:
    """A small FLUX.1 file in the original's layout, and its tensors."""
    torch.manual_seed(0)
    tensors = small_flux.transformer_tensors(True, 1, 1, 128, 64, 32)
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        found |= change(key, value)
    save_file({key: value.contiguous() for key, value in found.items()}, path, metadata)
    return tensors


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_plain_dtypes(tmp_path, dtype):
    tensors = flux_file(tmp_path / "m.safetensors", lambda key, value: {key: value.to(dtype)})
    with open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
        for name, place in checkpoint.layers.items():
            stored = tensors[place.pieces[0].key].to(dtype)
            assert torch.equal(checkpoint.weight(name), stored.float())
            assert torch.equal(checkpoint.tensor(place.pieces[0].key).float(), stored.float())


@pytest.mark.parametrize("dtype", deft_scaled.FP8)
def test_every_number_of_eight_bits(dtype):
    stored = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(dtype)
    values = torch.empty(256)
    deft_scaled.to_float(stored, values)
    expected = stored.float()
    assert torch.equal(values.isnan(), expected.isnan())
    assert torch.equal(values.nan_to_num(), expected.nan_to_num())


def scaled(value: Tensor, dtype: torch.dtype, form: str, scales: torch.dtype) -> tuple[Tensor, Tensor]:
    """Stored numbers and scales as programs make them: the largest number of each share is the largest of fp8."""
    shares = {"tensor": value.reshape(1, -1), "row": value, "block": value.reshape(value.shape[0], -1, 32)}[form]
    scale = (shares.abs().amax(-1, keepdim=True) / torch.finfo(dtype).max).to(scales)
    stored = (shares / scale.float()).to(dtype).reshape(value.shape)
    return stored, scale


def unscaled(stored: Tensor, scale: Tensor) -> Tensor:
    """In float64: as musubi-tuner's fp8_linear_forward_patch does, which sees the form by the dimensions."""
    values = stored.double()
    if scale.dim() < 3:
        return values * scale.double()
    return (values.reshape(*scale.shape[:2], -1) * scale.double()).reshape(values.shape)


FORMS = [
    ("tensor", "scale_weight", (), torch.float32),  # ComfyUI, first form
    ("tensor", "weight_scale", (), torch.float32),  # ComfyUI, second form
    ("tensor", "scale_weight", (1,), torch.bfloat16),  # musubi-tuner
    ("row", "scale_weight", (-1, 1), torch.bfloat16),
    ("row", "weight_scale", (-1,), torch.float32),
    ("block", "scale_weight", None, torch.bfloat16),
]


def scaled_file(path: Path, form: str, ending: str, shape, scales: torch.dtype, dtype=torch.float8_e4m3fn):
    """Linear layers in scaled fp8, the rest in bf16: the tensors, and what the layers' weights are."""
    tensors, weights = {}, {}
    marks = {"scaled_fp8": torch.empty(0, dtype=dtype)} if ending == "scale_weight" else {}

    def change(key: str, value: Tensor) -> dict[str, Tensor]:
        if value.dim() < 2 or "final_layer" in key:
            tensors[key] = value.bfloat16()
            return {key: tensors[key]}
        base = key.removesuffix(".weight")
        stored, scale = scaled(value, dtype, form, scales)
        weights[key] = unscaled(stored, scale)
        found = {key: stored, f"{base}.{ending}": scale if shape is None else scale.reshape(shape)}
        if ending == "weight_scale":
            mark = json.dumps({"format": str(dtype).removeprefix("torch.")}).encode()
            found |= {
                f"{base}.input_scale": torch.tensor(1.5),
                f"{base}.comfy_quant": torch.tensor(list(mark), dtype=torch.uint8),
            }
        tensors.update(found)
        return found

    tensors.update(marks)
    flux_file(path, change)
    if marks:
        save_file(tensors, path)
    return tensors, weights


@pytest.mark.parametrize("dtype", deft_scaled.FP8)
@pytest.mark.parametrize(("form", "ending", "shape", "scales"), FORMS)
def test_scaled_weights(tmp_path, form, ending, shape, scales, dtype):
    _, weights = scaled_file(tmp_path / "m.safetensors", form, ending, shape, scales, dtype)
    with open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
        assert len(checkpoint.scales) == len(weights)
        for name, place in checkpoint.layers.items():
            assert relative_error(checkpoint.weight(name).double(), weights[place.pieces[0].key]) < 1e-7
        assert not any("scale" in name for name in {**checkpoint.layers, **checkpoint.further})


# --- written anew ----------------------------------------------------------------------------------------------------


def random_factors(shape: tuple[int, ...], seed: int, rank: int = 3, size: float = 0.1) -> Factors:
    g = torch.Generator().manual_seed(seed)
    n = math.prod(shape[1:])
    up, down = torch.randn(shape[0], rank, generator=g), torch.randn(rank, n, generator=g)
    return Factors(up * size, down / n**0.5, shape[1:])


def every_other(name: str, shape: tuple[int, ...]) -> Factors | None:
    """Changes of about half of the layers."""
    number = sum(name.encode())
    return random_factors(shape, number) if number % 2 else None


def product(factors: Factors) -> Tensor:
    return (factors.up.double() @ factors.down.double()).reshape(factors.shape)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def check_rewritten(before: Checkpoint, after: Checkpoint, change, tolerance: float) -> None:
    """Changed layers are the exact sums to within rounding; every other tensor has its bits, dtype and place."""
    assert before.keys() == after.keys()
    places = {**before.layers, **before.further}
    changed = {name: found for name, place in places.items() if (found := change(name, place.shape)) is not None}
    assert 3 < len(changed) < len(places)
    for name, factors in changed.items():
        exact = before.weight(name).double() + product(factors)
        assert relative_error(after.weight(name).double(), exact) < tolerance, name
    touched = {
        (p.key, row) for name in changed for p in places[name].pieces for row in range(p.first, p.first + p.rows)
    }
    keys = {key for key, _ in touched}
    for key in before.keys():
        a, b = before.tensor(key), after.tensor(key)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if key not in keys and key not in {before.scales[k].key for k in keys & before.scales.keys()}:
            assert bits(a) == bits(b), key
        elif key in keys and key not in before.scales:
            same = [row for row in range(len(a)) if (key, row) not in touched]
            assert bits(a[same]) == bits(b[same])
            assert bits(a) != bits(b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["folder", "single"])
def test_rewritten_in_its_own_layout(models, tmp_path, kind, form):
    model = models(kind)
    source = model.folder if form == "folder" else model.single
    output = tmp_path / ("out" if form == "folder" else "out.safetensors")
    with open_checkpoint(source) as before:
        rewrite(before, output, every_other)
        with open_checkpoint(output) as after:
            check_rewritten(before, after, every_other, 1e-6)
            assert after.metadata == before.metadata
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float32, 1e-6),
        (torch.float16, 4e-4),
        (torch.bfloat16, 3e-3),
        (torch.float8_e4m3fn, 5e-2),
        (torch.float8_e5m2, 1e-1),
    ],
)
def test_rewritten_in_its_own_dtype(tmp_path, dtype, tolerance):
    flux_file(tmp_path / "m.safetensors", lambda key, value: {key: value.to(dtype)})
    with open_checkpoint(tmp_path / "m.safetensors") as before:
        rewrite(before, tmp_path / "o.safetensors", every_other)
        with open_checkpoint(tmp_path / "o.safetensors") as after:
            check_rewritten(before, after, every_other, tolerance)
            for name, place in before.layers.items():  # and as near as the dtype can be
                factors = every_other(name, place.shape)
                if factors is not None and dtype not in deft_scaled.FP8:
                    exact = before.weight(name).double() + product(factors)
                    off = (after.weight(name).double() - exact).abs()
                    assert (off <= exact.abs() * torch.finfo(dtype).eps * 0.51 + 1e-7).all()


@pytest.mark.parametrize("dtype", deft_scaled.FP8)
@pytest.mark.parametrize(("form", "ending", "shape", "scales"), FORMS)
def test_rewritten_with_new_scales_of_the_same_form(tmp_path, form, ending, shape, scales, dtype):
    scaled_file(tmp_path / "m.safetensors", form, ending, shape, scales, dtype)

    def change(name: str, of: tuple[int, ...]) -> Factors | None:  # larger than the weights: old scales would not do
        return None if every_other(name, of) is None else random_factors(of, sum(name.encode()), size=4.0)

    with open_checkpoint(tmp_path / "m.safetensors") as before:
        rewrite(before, tmp_path / "o.safetensors", change)
        with open_checkpoint(tmp_path / "o.safetensors") as after:
            check_rewritten(before, after, change, 0.04 if dtype == torch.float8_e4m3fn else 0.08)
            for key, scale in after.scales.items():
                stored = after.tensor(key).float()
                largest = stored.abs().reshape(stored.shape[0] if scale.blocks else 1, scale.blocks or 1, -1).amax(2)
                top = torch.finfo(dtype).max
                assert (largest >= top * 0.9).all()  # each share uses the whole range
                assert not stored.isnan().any()


def test_stochastic_rounding_has_the_right_mean_and_comes_again_with_its_seed(tmp_path):
    flux_file(tmp_path / "m.safetensors", lambda key, value: {key: torch.ones_like(value).bfloat16()})
    name = "lora_unet_single_blocks_0_linear1"

    def tiny(found: str, shape: tuple[int, ...]) -> Tensor | None:
        return torch.full(shape, 0.001) if found == name else None  # an eighth of the step between numbers near 1

    means, contents = [], []
    for seed in (None, 1, 1, 2):
        with open_checkpoint(tmp_path / "m.safetensors") as before:
            rewrite(before, tmp_path / "o.safetensors", tiny, seed=seed)
        contents.append((tmp_path / "o.safetensors").read_bytes())
        with open_checkpoint(tmp_path / "o.safetensors") as after:
            weight = after.weight(name)
            means.append(float(weight.double().mean()) - 1)
            assert set(weight.unique().tolist()) <= {1.0, 1.0078125}
    assert means[0] == 0
    assert all(abs(mean - 0.001) < 5e-5 for mean in means[1:])
    assert contents[1] == contents[2] != contents[3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, *deft_scaled.FP8])
def test_stochastic_rounding_takes_the_two_neighbours(dtype):
    generator = torch.Generator().manual_seed(0)
    largest = torch.finfo(dtype).max
    for value in (0.1234, -0.1234, 0.0033, -2e-4, 0.0, 1.0, largest, -largest, 0.99 * largest):
        exact = torch.full((20000,), value)
        found = deft_scaled.rounded(exact, dtype, generator).float()
        around = found.unique()
        assert len(around) <= 2
        assert around[0] <= exact[0] <= around[-1]
        step = float(around[-1] - around[0])
        assert abs(float(found.double().mean()) - float(exact[0])) <= 0.02 * step


def test_rows_of_a_fused_weight_change_alone(models, tmp_path):
    """Queries of SDXL's second text encoder stand above keys and values in one tensor of a single file."""
    name = "lora_te2_text_model_encoder_layers_3_self_attn_q_proj"
    factors = None
    with open_checkpoint(models("sdxl").single) as before:
        factors = random_factors(before.layers[name].shape, 0)
        rewrite(before, tmp_path / "o.safetensors", lambda found, _: factors if found == name else None)
        key = "conditioner.embedders.1.model.transformer.resblocks.3.attn.in_proj_weight"
        with open_checkpoint(tmp_path / "o.safetensors") as after:
            a, b = before.tensor(key), after.tensor(key)
            width = a.shape[1]
            assert relative_error(b[:width].double(), a[:width].double() + product(factors)) < 1e-6
            assert torch.equal(a[width:], b[width:])


def test_a_weight_whose_halves_are_swapped_changes_by_its_rows(models, tmp_path):
    name = "lora_unet_final_layer_adaLN_modulation_1"
    with open_checkpoint(models("flux").folder) as before:
        factors = random_factors(before.further[name].shape, 1)
        rewrite(before, tmp_path / "o", lambda found, _: factors if found == name else None)
        with open_checkpoint(tmp_path / "o") as after:
            exact = before.weight(name).double() + product(factors)
            assert relative_error(after.weight(name).double(), exact) < 1e-6


@pytest.mark.parametrize("form", ["factors", "matrix", "weight-shaped", "on the weight"])
@pytest.mark.parametrize("layout", ["folder", "single"])
def test_forms_of_a_change(models, tmp_path, form, layout):
    name = {"folder": "lora_unet_single_blocks_1_linear1", "single": "lora_unet_double_blocks_0_txt_attn_qkv"}[layout]
    source = getattr(models("flux"), layout)
    with open_checkpoint(source) as before:
        shape = before.layers[name].shape
        factors = random_factors(shape, 1)
        delta = product(factors).float()
        weight = before.weight(name)
        made = {
            "factors": factors, "matrix": delta.flatten(1), "weight-shaped": delta,
            "on the weight": lambda W: W * 0.5 + delta.flatten(1) - 0.5 * weight.flatten(1),
        }[form]  # fmt: skip
        output = tmp_path / ("o" if layout == "folder" else "o.safetensors")
        rewrite(before, output, lambda found, _: made if found == name else None)
        with open_checkpoint(output) as after:
            assert relative_error(after.weight(name).double(), weight.double() + product(factors)) < 1e-6


@pytest.mark.parametrize("kind", ["sdxl", "flux"])
@pytest.mark.parametrize("form", ["folder", "single"])
def test_changes_are_asked_for_once(models, tmp_path, kind, form):
    asked: list[str] = []

    def change(name: str, shape: tuple[int, ...]) -> None:
        assert before.place(name).shape == shape
        asked.append(name)

    with open_checkpoint(getattr(models(kind), form)) as before:
        rewrite(before, tmp_path / ("o" if form == "folder" else "o.safetensors"), change)
        assert sorted(asked) == sorted({**before.layers, **before.further})


def test_a_new_dtype(models, tmp_path):
    with open_checkpoint(models("sdxl").single) as before:
        rewrite(before, tmp_path / "o.safetensors", every_other, dtype=torch.float16, metadata={"a": "b"})
        with open_checkpoint(tmp_path / "o.safetensors") as after:
            assert after.metadata == {"a": "b"}
            assert after.keys() == before.keys()
            for key in before.keys():
                floating = before.tensor(key).is_floating_point()
                assert after.tensor(key).dtype == (torch.float16 if floating else before.tensor(key).dtype)
            for name, place in before.layers.items():
                factors = every_other(name, place.shape)
                exact = before.weight(name).double() + (0 if factors is None else product(factors))
                assert (
                    torch.equal(after.weight(name), exact.half().float())
                    or relative_error(after.weight(name).double(), exact) < 4e-4
                )
            for key in before.rest:
                if before.tensor(key).is_floating_point():
                    assert torch.equal(after.tensor(key), before.tensor(key).half())


@pytest.mark.parametrize(("form", "ending", "shape", "scales"), FORMS)
def test_scaled_fp8_becomes_plain_in_a_new_dtype(tmp_path, form, ending, shape, scales):
    tensors, weights = scaled_file(tmp_path / "m.safetensors", form, ending, shape, scales)
    with open_checkpoint(tmp_path / "m.safetensors") as before:
        rewrite(before, tmp_path / "o.safetensors", lambda name, shape: None, dtype=torch.bfloat16)
    found = load_file(tmp_path / "o.safetensors")
    assert found.keys() == {key for key in tensors if key.endswith((".weight", ".bias", "_norm.scale"))}
    for key, value in found.items():
        assert torch.equal(value, weights[key].bfloat16() if key in weights else tensors[key])


def test_scaled_fp8_of_both_kinds_becomes_plain_fp8_of_one(tmp_path):
    """Where the dtype is that of some of the weights already, their scales go all the same."""
    scaled_file(tmp_path / "a.safetensors", *FORMS[0])
    other, _ = scaled_file(tmp_path / "b.safetensors", *FORMS[0], torch.float8_e5m2)
    names = ("double_blocks.0.img_mlp.0", "double_blocks.0.img_mlp.2")
    mixed = load_file(tmp_path / "a.safetensors") | {
        key: value for key, value in other.items() if key.startswith(names)
    }
    save_file(mixed, tmp_path / "m.safetensors")
    with open_checkpoint(tmp_path / "m.safetensors") as before:
        rewrite(before, tmp_path / "o.safetensors", lambda name, shape: None, dtype=torch.float8_e4m3fn)
        with open_checkpoint(tmp_path / "o.safetensors") as after:
            assert not after.scales
            for name in before.layers:
                assert torch.equal(
                    after.weight(name), deft_scaled.rounded(before.weight(name), torch.float8_e4m3fn, None).float()
                )


def test_fp8_is_for_the_layers_alone(tmp_path):
    flux_file(tmp_path / "m.safetensors", lambda key, value: {key: value.bfloat16()})
    with open_checkpoint(tmp_path / "m.safetensors") as before:
        rewrite(before, tmp_path / "o.safetensors", lambda name, shape: None, dtype=torch.float8_e4m3fn)
        layers = {piece.key for place in before.layers.values() for piece in place.pieces}
    for key, value in load_file(tmp_path / "o.safetensors").items():
        assert value.dtype == (torch.float8_e4m3fn if key in layers else torch.bfloat16)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_diffusers_converts_a_rewritten_file_to_the_rewritten_folder(models, tmp_path, kind):
    """Its own conversion is the judge of which layer is which."""
    model = models(kind)
    for source, output in ((model.folder, tmp_path / "o"), (model.single, tmp_path / "o.safetensors")):
        with open_checkpoint(source) as before:
            rewrite(before, output, every_other)
    config = json.loads((model.folder / "unet" / "config.json").read_text(encoding="utf-8"))
    config["num_class_embeds"] = config.get("num_class_embeds")
    converted = single_file_utils.convert_ldm_unet_checkpoint(load_file(tmp_path / "o.safetensors"), config)
    folder = load_file(tmp_path / "o" / "unet" / "diffusion_pytorch_model.safetensors")
    original = load_file(model.folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert converted.keys() == folder.keys()
    assert all(torch.equal(converted[key], folder[key]) for key in folder)
    assert any(not torch.equal(original[key], folder[key]) for key in folder)


# --- folders ---------------------------------------------------------------------------------------------------------


def test_shards_and_variants(models, tmp_path):
    source = tmp_path / "in"
    shutil.copytree(models("sd15").folder, source)
    part = source / "unet"
    tensors = load_file(part / "diffusion_pytorch_model.safetensors")
    (part / "diffusion_pytorch_model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"diffusion_pytorch_model-00001-of-00002.safetensors": names[::2],
              "diffusion_pytorch_model-00002-of-00002.safetensors": names[1::2]}  # fmt: skip
    for file, held in shards.items():
        save_file({key: tensors[key] for key in held}, part / file)
    index = {"metadata": {"total_size": 1}, "weight_map": {key: file for file, held in shards.items() for key in held}}
    (part / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"stale": torch.ones(3)}, part / "diffusion_pytorch_model.fp16.safetensors")  # is not what is changed
    (source / "text_encoder" / "model.safetensors").rename(source / "text_encoder" / "model.fp16.safetensors")
    with open_checkpoint(source) as before, open_checkpoint(models("sd15").folder) as whole:
        assert before.layers.keys() == whole.layers.keys()
        rewrite(before, tmp_path / "out", every_other)
        rewrite(whole, tmp_path / "whole", every_other)
        rewrite(before, tmp_path / "half", every_other, dtype=torch.float16)
    half = json.loads((tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert half["weight_map"] == index["weight_map"]
    assert half["metadata"]["total_size"] == sum(2 * value.numel() for value in tensors.values())
    diffusers.UNet2DConditionModel.from_pretrained(str(tmp_path / "half" / "unet"), local_files_only=True)
    with open_checkpoint(tmp_path / "out") as a, open_checkpoint(tmp_path / "whole") as b:
        assert all(torch.equal(a.weight(name), b.weight(name)) for name in b.layers)
    expected = {p.relative_to(source) for p in source.rglob("*") if p.is_file()}
    expected.remove(Path("unet/diffusion_pytorch_model.fp16.safetensors"))
    assert {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file()} == expected
    for path in expected:
        if path.suffix != ".safetensors":
            assert (tmp_path / "out" / path).read_bytes() == (source / path).read_bytes()


def test_a_rewritten_folder_loads(models, tmp_path):
    with open_checkpoint(models("sd15").folder) as before:
        rewrite(before, tmp_path / "out", every_other)
        unet = diffusers.UNet2DConditionModel.from_pretrained(str(tmp_path / "out" / "unet"), local_files_only=True)
        _, part = recognise(unet)
        changed = 0
        for target in targets(unet, part, True):
            factors = every_other(target.name, tuple(target.layer.weight.shape))
            weight = before.weight(target.name)
            exact = weight.double() + (0 if factors is None else product(factors))
            assert relative_error(target.layer.weight.detach().double(), exact) < 1e-6
            changed += not torch.equal(target.layer.weight, weight)
        assert changed > 10


# --- mistakes, damage, kills -----------------------------------------------------------------------------------------


def said(path: Path) -> str:
    with pytest.raises(DeftError) as caught:
        open_checkpoint(path).close()
    line = str(caught.value)
    assert "\n" not in line
    assert str(path) in line
    return line


def raw(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def test_damaged_files(tmp_path):
    good = tmp_path / "m.safetensors"
    flux_file(good)
    content = good.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    fields = json.loads(header)
    key = "img_in.weight"
    twice = header.rstrip()[:-1] + b"," + json.dumps(key).encode() + b":" + json.dumps(fields[key]).encode() + b"}"
    longer = json.dumps(fields | {key: fields[key] | {"shape": [9, 9]}}).encode()
    overlap = json.dumps(fields | {key: fields[key] | {"data_offsets": [0, fields[key]["data_offsets"][1]]}}).encode()
    said(raw(tmp_path / "cut.safetensors", header, data[:-1]))
    said(raw(tmp_path / "more.safetensors", header, data + b"0"))
    said(raw(tmp_path / "twice.safetensors", twice, data))
    said(raw(tmp_path / "shape.safetensors", longer, data))
    said(raw(tmp_path / "overlap.safetensors", overlap, data))
    said(raw(tmp_path / "no.safetensors", b"{}{}", data))
    for name, content in (("empty", b""), ("short", b"123"), ("huge", (1 << 62).to_bytes(8, "little") + b"{}"),
                          ("large", (101 << 20).to_bytes(8, "little") + b"{" * 100)):  # fmt: skip
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        said(tmp_path / f"{name}.safetensors")
    said(tmp_path / "missing.safetensors")


def test_fuzzed_headers(tmp_path):
    flux_file(tmp_path / "m.safetensors")
    content = (tmp_path / "m.safetensors").read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    chance = random.Random(0)
    path, refused = tmp_path / "f.safetensors", 0
    for _ in range(300):
        data = bytearray(content)
        for _ in range(chance.choice((1, 2, 8))):
            data[chance.randrange(length)] = chance.randrange(256)
        path.write_bytes(data[: chance.choice((len(data), length, length + 5))])
        try:
            with open_checkpoint(path) as checkpoint:
                for name in checkpoint.layers:
                    checkpoint.weight(name)
        except DeftError as error:
            refused += "\n" not in str(error)
    assert refused > 150


@pytest.mark.parametrize(
    ("tensors", "word"),
    [
        ({"double_blocks.0.img_attn.qkv.weight.absmax": torch.ones(3)}, "absmax"),
        ({"transformer_blocks.0.qkv_proj.qweight": torch.ones(3, 3, dtype=torch.int8)}, "qweight"),
        ({"img_in.weight": torch.ones(3, 3, dtype=torch.int8)}, "img_in.weight"),
        ({"img_in.weight_scale": torch.ones(7)}, "img_in.weight_scale"),
        ({"img_in.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)}, "nvfp4"),
        ({"img_in.comfy_quant": torch.tensor(list(b'{"format": '), dtype=torch.uint8)}, "marks"),
        ({"img_in.comfy_quant": torch.tensor(list(b"[1]"), dtype=torch.uint8)}, "marks"),
    ],
)
def test_unknown_quantised_forms_are_refused_by_name(tmp_path, tensors, word):
    flux_file(tmp_path / "m.safetensors")
    save_file(load_file(tmp_path / "m.safetensors") | tensors, tmp_path / "q.safetensors")
    assert word in said(tmp_path / "q.safetensors")


def test_other_files_are_refused_with_what_to_do(models, tmp_path):
    for ending in (".ckpt", ".pt", ".bin", ".pth"):
        (tmp_path / f"m{ending}").write_bytes(b"x")
        assert "convert" in said(tmp_path / f"m{ending}")
    (tmp_path / "m.txt").write_text("x")
    said(tmp_path / "m.txt")
    save_file({"lora_unet_x.lora_up.weight": torch.ones(2, 2)}, tmp_path / "lora.safetensors")
    assert "adapter" in said(tmp_path / "lora.safetensors")
    save_file({"x": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    assert "SDXL" in said(tmp_path / "x.safetensors")
    (tmp_path / "empty").mkdir()
    assert "folder" in said(tmp_path / "empty")
    shutil.copytree(models("sd15").folder, tmp_path / "pickled")
    (tmp_path / "pickled" / "unet" / "diffusion_pytorch_model.safetensors").rename(
        tmp_path / "pickled" / "unet" / "diffusion_pytorch_model.bin"
    )
    with pytest.raises(DeftError, match="pickle"):
        open_checkpoint(tmp_path / "pickled")
    index = tmp_path / "pickled" / "text_encoder" / "model.safetensors.index.json"
    for content in ("", "[]", '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {}}', '{"weight_map": 3}'):
        index.write_text(content)
        with pytest.raises(DeftError, match="index"):
            open_checkpoint(tmp_path / "pickled" / "text_encoder")


def test_a_layer_in_part_is_refused(models, tmp_path):
    shutil.copytree(models("flux").folder / "transformer", tmp_path / "t")
    file = tmp_path / "t" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for missing in ("transformer_blocks.1.attn.to_v.weight", "single_transformer_blocks.2.proj_mlp.weight"):
        save_file({key: value for key, value in tensors.items() if key != missing}, file)
        assert "lora_unet" in said(tmp_path / "t")


def test_what_cannot_be_written_is_said_and_nothing_is_left(models, tmp_path, monkeypatch):
    source = tmp_path / "m.safetensors"
    flux_file(source, lambda key, value: {key: value.half()})
    content = source.read_bytes()
    name = "lora_unet_img_in"

    def refused(word: str, change=every_other, output: Path = tmp_path / "o.safetensors") -> None:
        with open_checkpoint(source) as before, pytest.raises(DeftError, match=word) as caught:
            rewrite(before, output, change)
        assert "\n" not in str(caught.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "m.safetensors"]
        assert source.read_bytes() == content

    (tmp_path / "folder").mkdir()
    refused("never overwritten", output=source)
    refused("a folder", output=tmp_path / "folder")
    refused(name, lambda found, _: torch.ones(3, 3) if found == name else None)
    refused(name, lambda found, _: torch.ones(3) if found == name else None)
    refused(name, lambda found, _: (lambda W: W[:1]) if found == name else None)
    refused("img_in.weight would hold", lambda found, shape: torch.full(shape, 1e5) if found == name else None)
    refused("img_in.weight would hold", lambda found, shape: torch.full(shape, torch.nan) if found == name else None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("U", "free")(1000))
    refused("MB are free")
    monkeypatch.undo()
    if hasattr(os, "pwrite"):
        monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        refused("No space left")


def test_a_folder_is_not_written_over(models, tmp_path):
    with open_checkpoint(models("sd15").folder) as before:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("x")
        with pytest.raises(DeftError, match="there already"):
            rewrite(before, tmp_path / "out", every_other)
        with pytest.raises(DeftError, match="inside"):
            rewrite(before, models("sd15").folder / "out", every_other)
        (tmp_path / "out" / "mine").unlink()
        rewrite(before, tmp_path / "out", every_other)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_kill_leaves_no_target_and_the_next_run_cleans_up(tmp_path):
    flux_file(tmp_path / "m.safetensors")
    code = textwrap.dedent("""
        import sys, time
        from networks.deft_checkpoint import open_checkpoint
        from networks.deft_rewrite import rewrite

        def change(name, shape):
            print(name, flush=True)
            time.sleep(0.3)

        with open_checkpoint(sys.argv[1]) as checkpoint:
            rewrite(checkpoint, sys.argv[2], change)
    """)
    output = tmp_path / "o[1].safetensors"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "m.safetensors"), str(output)],
        stdout=subprocess.PIPE, cwd=Path(__file__).resolve().parents[1],
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 2
    assert output.name not in left
    with open_checkpoint(tmp_path / "m.safetensors") as before:
        rewrite(before, output, every_other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors", output.name]


@pytest.mark.skipif(os.name != "posix", reason="resource")
def test_memory_does_not_grow_with_the_file(tmp_path):
    path, key = tmp_path / "m.safetensors", "double_blocks.0.img_attn.qkv.weight"
    size = 200 << 20
    about = {"dtype": "BF16", "shape": [size // 4096, 2048]}
    other = {"single_blocks.0.linear1.weight": about | {"data_offsets": [size, 2 * size]}}
    header = json.dumps({key: about | {"data_offsets": [0, size]}} | other).encode()
    raw(path, header)
    os.truncate(path, 8 + len(header) + 2 * size)
    code = textwrap.dedent("""
        import resource, sys, torch
        from networks.deft_checkpoint import open_checkpoint
        from networks.deft_factors import Factors
        from networks.deft_rewrite import rewrite

        def change(name, shape):
            return Factors(torch.ones(shape[0], 2), torch.ones(2, shape[1]), shape[1:]) if "qkv" in name else None

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with open_checkpoint(sys.argv[1]) as checkpoint:
            rewrite(checkpoint, sys.argv[2], change)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """)
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(tmp_path / "o.safetensors")],
        capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parents[1],
    )  # fmt: skip
    grown = int(done.stdout) / (1 << (20 if sys.platform == "darwin" else 10))  # MiB
    assert grown < 100
    with safe_open(str(tmp_path / "o.safetensors"), "pt") as file:
        assert float(file.get_slice(key)[51199, 2047]) == 2


# --- GGUF ------------------------------------------------------------------------------------------------------------


def gguf_file(path: Path) -> dict[str, Tensor]:
    """As ComfyUI-GGUF's converter writes FLUX.1: matrices in blocks of 8 bits, the rest in float32, and one in bf16."""
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(0)
    tensors = small_flux.transformer_tensors(True, 1, 1, 128, 64, 32)
    writer, kinds = gguf.GGUFWriter(str(path), "flux"), gguf.GGMLQuantizationType
    for key, value in tensors.items():
        kind = kinds.F32 if value.dim() < 2 else kinds.BF16 if key == "txt_in.weight" else kinds.Q8_0
        writer.add_tensor(key, gguf.quants.quantize(value.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_gguf_is_read_and_not_written(tmp_path):
    tensors = gguf_file(tmp_path / "m.gguf")
    flux_file(tmp_path / "m.safetensors")
    with open_checkpoint(tmp_path / "m.gguf") as quantised, open_checkpoint(tmp_path / "m.safetensors") as plain:
        assert quantised.layers == plain.layers
        assert quantised.architecture == plain.architecture
        for name, place in quantised.layers.items():
            key = place.pieces[0].key
            value = tensors[key]
            if key == "txt_in.weight":
                assert torch.equal(quantised.weight(name), value.bfloat16().float())
            else:  # 127 steps to the largest of each block of 32
                blocks = value.reshape(-1, 32)
                off = (quantised.weight(name).reshape(-1, 32) - blocks).abs()
                assert (off <= blocks.abs().amax(1, keepdim=True) / 127 * 0.57).all()  # the scale is a float16
        assert torch.equal(quantised.tensor("img_in.bias"), tensors["img_in.bias"])
        with pytest.raises(DeftError, match="then quantise"):
            rewrite(quantised, tmp_path / "o.safetensors", every_other)
    content = (tmp_path / "m.gguf").read_bytes()
    for number, damaged in enumerate((b"", b"GGUF", content[:100], content[: len(content) // 2], b"x" + content[1:])):
        (tmp_path / f"{number}.gguf").write_bytes(damaged)
        said(tmp_path / f"{number}.gguf")


def test_gguf_without_its_package(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install gguf" in said(tmp_path / "m.gguf")
