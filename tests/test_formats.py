"""Adapter files of other programs, in and out: names, kinds, weights that some have in pieces."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from diffusers import (
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.lora_conversion_utils import (
    _convert_kohya_flux_lora_to_diffusers,
    _convert_xlabs_flux_lora_to_diffusers,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from library.models.reading import CONFIGS
from networks import deft_factors, deft_formats, deft_names, deft_sum
from networks.deft_architectures import ARCHITECTURES
from networks.deft_config import DeftError
from networks.deft_factors import Factors
from networks.deft_formats import tensors_as
from networks.deft_targets import targets
from tests import small_flux, small_models

SD, SDXL, FLUX = (a.name for a in ARCHITECTURES[:3])
MODELS = {
    "sd15": (SD, {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}),
    "sd2": (SD, {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}),
    "sdxl": (
        SDXL,
        {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection},
    ),
    "flux": (
        FLUX,
        {"transformer": FluxTransformer2DModel, "text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel},
    ),
}


NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def lora(name=NAME, m=6, n=8, rank=2, **more):
    return {f"{name}.lora_up.weight": torch.randn(m, rank), f"{name}.lora_down.weight": torch.randn(rank, n), **more}


def meta_model(kind: str, name: str) -> nn.Module:
    """A published model without its weights."""
    config = json.loads((CONFIGS / kind / name / "config.json").read_text(encoding="utf-8"))
    made_by = MODELS[kind][1][name]
    with torch.device("meta"):
        if hasattr(made_by, "from_config"):
            return made_by.from_config(config)
        return made_by((T5Config if made_by is T5EncoderModel else CLIPTextConfig)(**config))


def diffusers_path(model: nn.Module, path: str) -> str:
    return f"text_model.{path}" if "CLIP" in type(model).__name__ and not path.startswith("text_") else path


@pytest.mark.parametrize("kind", MODELS)
def test_name_to_path_to_name_is_the_identity_for_every_layer_of_the_published_models(kind):
    architecture, models = MODELS[kind]
    row = deft_names.named(architecture)
    seen = 0
    for number, name in enumerate(models):
        model = meta_model(kind, name)
        part = next(p for p in row.denoisers if p.form == "diffusers") if not number else row.text_encoders[number - 1]
        of = deft_names.DENOISER if not number else name
        paths = {layer: diffusers_path(model, path) for path, layer in model.named_modules()}
        for target in targets(model, part, True):
            path = paths[target.layer]
            key, piece = deft_names.key_name(row, of, path)
            assert (key, piece) == (target.file_name, target.name.partition("-")[2]), path
            assert deft_names.places(row, key, "diffusers")[int(piece or 0)] == (of, path, piece)
            for other in deft_names.places(row, key, "original"):
                assert deft_names.key_name(row, of, other[1]) == (key, ""), other
            assert deft_names.key_name(row, of, key.removeprefix(f"{part.prefix}_")) == (key, "")
            seen += 1
    assert seen > 250


@pytest.mark.parametrize(
    ("architecture", "path"),
    [
        ("Stable Diffusion 3", "joint_blocks.11.context_block.adaLN_modulation.1"),
        ("Stable Diffusion 3", "joint_blocks.0.x_block.attn2.qkv"),
        ("Lumina 2", "noise_refiner.1.feed_forward.w2"),
        ("Lumina 2", "layers.25.attention.qkv"),
        ("FLUX.1 or Chroma", "distilled_guidance_layer.layers.3.in_layer"),
        ("FLUX.1 or Chroma", "final_layer.adaLN_modulation.1"),
    ],
)
def test_paths_of_the_other_original_models_are_found_in_their_key_names(architecture, path):
    name = f"lora_unet_{path.replace('.', '_')}"
    row = deft_names.named(architecture)
    assert deft_names.places(row, name, "original") == [(deft_names.DENOISER, path, "")]
    assert deft_names.key_name(row, deft_names.DENOISER, path) == (name, "")
    changes = {name: Factors(torch.randn(6, 2), torch.randn(2, 8), (8,))}
    tensors = tensors_as("comfy", changes, torch.float32, True, architecture)
    assert set(tensors) == {f"diffusion_model.{path}.lora_{x}.weight" for x in "AB"}
    said = {"L": "lumina-2", "F": "flux-1-dev/lora", "S": "stable-diffusion-3-medium/lora"}[architecture[0]]
    assert set(deft_formats.parse(tensors, {"modelspec.architecture": said}, "f").changes) == {name}


def test_a_format_without_names_for_a_model_is_refused():
    changes = {"lora_unet_blocks_0_self_attn_q": Factors(torch.randn(6, 2), torch.randn(2, 8), (8,))}
    for format, architecture in (("comfy", ""), ("diffusers", "Stable Diffusion 3"), ("diffusers", FLUX), ("zip", SD)):
        with pytest.raises(DeftError, match=f"format {format}: "):
            tensors_as(format, changes, torch.float32, True, architecture)


def test_a_piece_that_is_not_there_does_not_change():
    h, layer = 6, "transformer.single_transformer_blocks.{}.{}"
    values = lora(layer.format(0, "attn.to_v"), h, h)
    mlp = lora(layer.format(1, "proj_mlp"), 2 * h, h)
    alone, beside = deft_formats.parse(values, {}, "f").changes, deft_formats.parse(values | mlp, {}, "f").changes
    v, m = (next(iter(parts.values())) @ next(reversed(parts.values())) for parts in (values, mlp))
    name = "lora_unet_single_blocks_{}_linear1".format
    zeros = torch.zeros(2 * h, h)
    assert torch.equal(alone[name(0)].delta(), torch.cat([zeros, v, zeros, zeros]))  # four times, as in FLUX.1
    assert torch.equal(beside[name(0)].delta(), torch.cat([zeros, v, zeros]))  # as the other block has it
    assert torch.equal(beside[name(1)].delta(), torch.cat([zeros, zeros[:h], m]))
    with pytest.raises(DeftError, match="no pieces of one weight"):
        deft_formats.parse(values | lora(layer.format(0, "attn.to_q"), h + 1, h), {}, "f")


def test_pieces_that_depend_on_the_base_are_put_together():
    h = 8
    W = torch.randn(5 * h, h)
    vectors = {piece: 0.3 * torch.randn(2, 6) for piece in ("to_q", "to_v")}
    layer = "transformer.single_transformer_blocks.0.attn."
    found = deft_formats.parse({f"{layer}{p}.oft_R.weight": v for p, v in vectors.items()}, {}, "f").changes
    alone = {p: deft_formats.parse({f"{NAME}.oft_R.weight": v}, {}, "f").changes[NAME] for p, v in vectors.items()}
    expected = torch.zeros_like(W)
    expected[:h], expected[2 * h : 3 * h] = alone["to_q"].delta(W[:h]), alone["to_v"].delta(W[2 * h : 3 * h])
    assert torch.equal(found["lora_unet_single_blocks_0_linear1"].delta(W), expected)


# --- what diffusers and peft read of what we write --------------------------------------------------------------------

PIPELINES = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline, "flux": FluxPipeline}


@pytest.fixture(scope="module", params=PIPELINES)
def pipeline(request, tmp_path_factory):
    """(kind, a small pipeline of diffusers)"""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    path = small_flux.build(folder).folder if kind == "flux" else small_models.build(kind, folder)
    return kind, PIPELINES[kind].from_pretrained(str(path))


def models_of(kind, pipeline):
    """(the model's name in Diffusers, its row, the model) of each model."""
    row = deft_names.named(MODELS[kind][0])
    for number, name in enumerate(MODELS[kind][1]):
        part = next(p for p in row.denoisers if p.form == "diffusers") if not number else row.text_encoders[number - 1]
        yield name, part, getattr(pipeline, name)


def random_changes(kind, pipeline, rank=3, convolutions=True, skipped=()):
    """A change of every layer that sd-scripts adapts, of different ranks, by kohya's key name."""
    wholes: dict[str, tuple[int, torch.Size]] = {}
    for name, part, model in models_of(kind, pipeline):
        for target in targets(model, part, convolutions) if name not in skipped else ():
            rows = wholes.get(target.file_name, (0,))[0]
            wholes[target.file_name] = (rows + target.shape[0], target.layer.weight.shape[1:])
    return {
        name: Factors(torch.randn(rows, r), torch.randn(r, kernel.numel()), tuple(kernel))
        for k, (name, (rows, kernel)) in enumerate(wholes.items())
        for r in [1 + (k + rank) % rank]
    }


def deltas(changes, kind, pipeline, skipped=()):
    """(model, Diffusers' path) -> what the layer's weight is to change by."""
    found = {}
    for name, part, model in models_of(kind, pipeline):
        paths = {layer: path for path, layer in model.named_modules()}
        for target in targets(model, part, True) if name not in skipped else ():
            if target.file_name in changes:
                first = (target.file_rows or (0, 0))[0]
                rows = changes[target.file_name].delta()[first : first + target.shape[0]]
                found[name, paths[target.layer]] = rows.reshape(target.layer.weight.shape)
    return found


def test_diffusers_loads_every_layer_of_what_we_write_and_makes_the_same_delta_of_it(pipeline, caplog):
    kind, pipe = pipeline
    skipped = ("text_encoder_2",) if kind == "flux" else ()  # diffusers has no LoRA for T5
    changes = random_changes(kind, pipe, skipped=skipped)
    expected = deltas(changes, kind, pipe, skipped)
    pipe.load_lora_weights(tensors_as("diffusers", changes, torch.float32, True, MODELS[kind][0]), adapter_name="a")
    try:
        seen = {}
        for name, _, model in models_of(kind, pipe):
            for path, layer in model.named_modules():
                if hasattr(layer, "lora_A") and "a" in layer.lora_A:
                    seen[name, path] = layer.get_delta_weight("a")
    finally:
        pipe.unload_lora_weights()
    assert seen.keys() == expected.keys()
    assert "unexpected" not in caplog.text
    for at, delta in seen.items():
        assert (delta - expected[at]).norm() <= 1e-6 * expected[at].norm(), at


@pytest.mark.parametrize("other", ["diffusers", "comfy"])
def test_a_file_goes_to_other_names_and_back_without_a_change(pipeline, other):
    kind, pipe = pipeline
    architecture = MODELS[kind][0]
    changes = random_changes(kind, pipe)
    kohya = deft_formats.parse(tensors_as("kohya", changes, torch.float32, False, architecture), {}, "k")
    there = tensors_as(other, dict(kohya.changes), torch.float32, False, architecture)
    back = deft_formats.parse(there, {}, "there")
    assert (back.format, back.architecture, kohya.format) == (other, architecture, "kohya")
    assert set(back.changes) == set(changes)
    for name, whole in changes.items():
        found = back.changes[name]
        assert (found.kernel, found.rank) == (whole.kernel, whole.rank), name
        assert torch.equal(found.delta(), whole.delta()), name
    again = tensors_as(other, dict(back.changes), torch.float32, False, architecture)
    assert again.keys() == there.keys()
    assert all(torch.equal(again[key], there[key]) for key in there)


# --- kinds of adapter, by the code that trains them -------------------------------------------------------------------

FOREIGN = Path(__file__).parent / "foreign"


def delta_of(change, W):
    """(m, n) of any change, by the weight's tensor."""
    return change.delta(W.flatten(1)) if isinstance(change, deft_formats.OnBase) else change.delta()


def test_every_algorithm_of_lycoris_does_what_lycoris_does():
    found = deft_formats.read(FOREIGN / "lycoris.safetensors")
    expected = load_file(FOREIGN / "lycoris.expected.safetensors")
    assert (found.format, found.architecture, len(found.changes), found.left) == ("kohya", SD, 71, {})
    kinds = {getattr(change, "kind", "factors") for change in found.changes.values()}
    assert kinds == {"factors", "DoRA", "LoHa", "LoKr", "full difference", "GLoRA", "(IA)^3", "OFT", "BOFT"}
    for name, change in found.changes.items():
        delta = expected[f"{name}.delta"]
        error = delta_of(change, expected.get(f"base.{delta.shape[1]}")) - delta
        assert error.norm() <= 1e-5 * delta.norm(), name  # theirs is a difference of float32 weights


def merged_rows(change, W, piece, hidden):
    """The rows of a change of a fused weight that are one of its pieces', by that piece's weight."""
    if piece == "swapped":
        return delta_of(change, W.roll(len(W) // 2, 0)).roll(len(W) // 2, 0)
    first = int(piece or 0) * hidden
    return delta_of(change, W)[first : first + len(W)]


@pytest.mark.parametrize(
    "file", sorted(FOREIGN.glob("onetrainer_*.expected.safetensors")), ids=lambda f: f.name[11:-21]
)
def test_every_file_of_onetrainer_does_what_onetrainer_does(file):
    facts = load_file(file)
    flux = "_flux_" in file.name
    row = deft_names.named(FLUX if flux else SD)
    stem = file.name.removesuffix(".expected.safetensors")
    paths = [key.removeprefix("base.").partition(".")[2] for key in facts if key.startswith("base.")]
    formats = ("diffusers", "kohya", "legacy", "comfy", "original")
    written_as = [file.with_name(f"{stem}_{format}.safetensors") for format in formats]
    for written in (path for path in written_as if path.exists()):
        found = deft_formats.read(written)
        fused = "fused." if flux and written.stem.endswith(("kohya", "comfy", "original")) else ""
        assert found.architecture == row.name
        assert found.left == {}
        names = {deft_names.key_name(row, deft_names.DENOISER, path)[0] for path in paths}
        assert set(found.changes) == names, written
        for path in paths:
            name, piece = deft_names.key_name(row, deft_names.DENOISER, path)
            part = "transformer" if flux else "unet"
            W, delta = facts[f"base.{part}.{path}"], facts[f"{fused}delta.{part}.{path}"]
            error = merged_rows(found.changes[name], W, piece, W.shape[1]) - delta
            assert error.norm() <= 1e-5 * delta.norm(), (written.name, path)


PEFT = {
    "lora": (peft.LoraConfig, {"r": 3, "lora_alpha": 5, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 7}}),
    "rslora": (peft.LoraConfig, {"r": 4, "lora_alpha": 3, "use_rslora": True}),
    "dora": (peft.LoraConfig, {"r": 3, "lora_alpha": 5, "use_dora": True}),
    "loha": (peft.LoHaConfig, {"r": 2, "alpha": 3}),
    "loha of higher rank": (peft.LoHaConfig, {"r": 6, "alpha": 3}),
    "loha with cores": (peft.LoHaConfig, {"r": 2, "alpha": 3, "use_effective_conv2d": True}),
    "lokr": (peft.LoKrConfig, {"r": 2, "alpha": 3, "decompose_factor": 4}),
    "lokr of whole matrices": (peft.LoKrConfig, {"r": 16, "alpha": 3, "decompose_factor": 4}),
    "lokr of four": (peft.LoKrConfig, {"r": 1, "alpha": 3, "decompose_both": True, "use_effective_conv2d": True}),
    "oft": (peft.OFTConfig, {"r": 0, "oft_block_size": 4}),
    "oft by solving": (peft.OFTConfig, {"r": 0, "oft_block_size": 4, "use_cayley_neumann": False}),
    "oft shared": (peft.OFTConfig, {"r": 0, "oft_block_size": 4, "block_share": True}),
    "oft near the identity": (peft.OFTConfig, {"r": 0, "oft_block_size": 4, "coft": True, "eps": 0.1}),
    "ia3": (peft.IA3Config, {"feedforward_modules": ["to_k"]}),
    "deft": (peft.DeftConfig, {"r": 3, "alpha": 2}),
    "deft by qr": (peft.DeftConfig, {"r": 3, "decomposition_method": "qr"}),
    "para": (peft.DeftConfig, {"r": 3, "decomposition_method": "qr", "para": True}),
}  # fmt: skip


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel.from_config(small_models.config_of("sd15", "unet"))


@pytest.mark.parametrize("kind", PEFT)
def test_a_folder_of_peft_does_what_peft_merges(kind, unet, tmp_path):
    made_by, options = PEFT[kind]
    layers = ["to_q", "to_k"] if "deft" in kind or kind == "para" else ["to_q", "to_k", "proj_in", "conv1"]
    model = peft.get_peft_model(copy.deepcopy(unet), made_by(target_modules=layers, **options))
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.normal_(std=0.2).abs_()
    model.save_pretrained(str(tmp_path / "unet"))
    found = deft_formats.read(tmp_path / "unet")
    assert (found.format, found.architecture) == ("peft", SD)
    merged = model.merge_and_unload()
    base = dict(unet.named_modules())
    changed = 0
    for path, layer in merged.named_modules():
        if path.endswith(tuple(f".{name}" for name in layers)) and hasattr(layer, "weight"):
            W = base[path].weight.detach()
            delta = (layer.weight.detach() - W).flatten(1)
            change = found.changes[f"lora_unet_{path}".replace(".", "_")]
            assert (delta_of(change, W) - delta).norm() <= 1e-5 * delta.norm(), (path, change)
            changed += 1
    assert changed == len(found.changes) > 20
    assert deft_formats.read(tmp_path / "unet" / "adapter_model.safetensors").changes.keys() == found.changes.keys()


def test_what_we_write_for_peft_is_loaded_by_peft_with_the_same_delta(pipeline, tmp_path):
    kind, pipe = pipeline
    changes = random_changes(kind, pipe)
    for name, part, model in models_of(kind, pipe):
        of_model = {key: change for key, change in changes.items() if key.startswith(f"{part.prefix}_")}
        tensors = tensors_as("peft", of_model, torch.float32, False, MODELS[kind][0])
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(deft_formats.peft_config(tensors)))
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder))
        expected = deltas(of_model, kind, pipe)
        seen = {
            p.removeprefix("base_model.model."): layer
            for p, layer in loaded.named_modules()
            if hasattr(layer, "lora_A")
        }
        assert seen.keys() == {path for of, path in expected if of == name}
        for path, layer in seen.items():
            delta = layer.get_delta_weight("default")
            assert (delta - expected[name, path]).norm() <= 1e-6 * delta.norm(), path
    back = deft_formats.read(tmp_path)
    assert (back.format, back.architecture, set(back.changes)) == ("peft", MODELS[kind][0], set(changes))
    for name, whole in changes.items():
        assert torch.equal(back.changes[name].delta(), whole.delta()), name


def test_every_file_of_ai_toolkit_does_what_ai_toolkit_does():
    facts = load_file(FOREIGN / "ai_toolkit.expected.safetensors")
    for name in ("flux_lora", "flux_lokr", "sd_lora"):
        found = deft_formats.read(FOREIGN / f"ai_toolkit_{name}.safetensors")
        row = deft_names.named(FLUX if name.startswith("flux") else SD)
        assert (found.architecture, found.left) == (row.name, {})
        expected = {key.partition(".")[2]: delta for key, delta in facts.items() if key.startswith(f"{name}.")}
        places = {path: deft_names.key_name(row, deft_names.DENOISER, path) for path in expected}
        assert set(found.changes) == {key for key, _ in places.values()}
        for path, delta in expected.items():
            key, piece = places[path]
            first = int(piece or 0) * delta.shape[1]
            rows = delta_of(found.changes[key], torch.zeros(0))[first : first + len(delta)]
            assert (rows - delta).norm() <= 1e-5 * delta.norm(), (name, path)


def test_the_names_of_xlabs_are_read_as_diffusers_converter_has_them():
    h = 8
    layers = {
        "double_blocks.0.processor.qkv_lora1": (3 * h, h),
        "double_blocks.0.processor.proj_lora2": (h, h),
        "single_blocks.3.processor.qkv_lora": (3 * h, h),
        "single_blocks.3.processor.proj_lora": (h, 5 * h),
    }
    tensors = {}
    for layer, (m, n) in layers.items():
        tensors |= {f"{layer}.up.weight": torch.randn(m, 2), f"{layer}.down.weight": torch.randn(2, n)}
    theirs = deft_formats.parse(_convert_xlabs_flux_lora_to_diffusers(dict(tensors)), {}, "theirs")
    ours = deft_formats.parse(tensors, {}, "ours")
    assert (ours.format, theirs.format, ours.architecture) == ("bare", "diffusers", FLUX)
    assert set(ours.changes) == set(theirs.changes)
    for name, change in ours.changes.items():
        assert torch.equal(change.delta(), theirs.changes[name].delta()), name


@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_kohyas_names_are_read_as_diffusers_reads_them(kind, pipeline):
    """The widths of their converter for FLUX.1 are those of the published model."""
    if pipeline[0] != kind:
        pytest.skip("the other model's turn")
    changes = random_changes(*pipeline, skipped=("text_encoder_2",) if kind == "flux" else ())
    kohya = tensors_as("kohya", changes, torch.float32, True, MODELS[kind][0])
    if kind == "flux":
        state = small_flux.of_small_width(_convert_kohya_flux_lora_to_diffusers)(dict(kohya))
    else:
        state, alphas, *_ = pipeline[1].lora_state_dict(dict(kohya), unet_config=pipeline[1].unet.config)
        assert set(alphas.values()) == {3.0}
    state = {key.replace(".default", ""): value for key, value in state.items() if not key.endswith(".alpha")}
    found = deft_formats.parse(state, {}, "diffusers'")
    assert set(found.changes) == set(changes)
    for name, change in changes.items():
        error = found.changes[name].delta() - change.delta()
        assert error.norm() <= 1e-6 * change.delta().norm(), name


# --- what else is read, cut, left and refused -------------------------------------------------------------------------


@pytest.mark.parametrize("removal", [0, 1])
def test_our_own_format_is_a_lora_where_nothing_is_taken_out_and_else_needs_the_base(removal):
    W = torch.randn(6, 8, dtype=torch.float64)
    P, R = torch.randn(6, 2, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    Q, T = torch.linalg.qr(P)
    Q = Q * T.diagonal().sign()
    E0 = Q if removal == 0 else torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64))[0]
    parts = {"deft_P": P, "deft_R": R, "deft_E0": E0, "alpha": torch.tensor(3.0)}
    found = deft_formats.parse({f"{NAME}.{k}": v.float() for k, v in parts.items()}, {}, "f").changes[NAME]
    assert isinstance(found, Factors if removal == 0 else deft_formats.OnBase)
    expected = Q @ (1.5 * R - (Q - E0).T @ W)
    assert (delta_of(found, W.float()) - expected).norm() <= 2e-6 * expected.norm()
    if removal:
        factors, error = deft_formats.to_factors(found, 2, None, lambda: W.float())
        assert error < 1e-5
        assert (factors.delta() - expected).norm() <= 1e-5 * expected.norm()
        with pytest.raises(ValueError, match="depends on the base"):
            deft_formats.to_factors(found, 2, None, None)


@pytest.mark.parametrize("method", ["qr", "svd", "None", "frozen", "additive_update"])
def test_the_authors_files_are_read_without_running_code(method, tmp_path):
    W, P = torch.randn(6, 8), torch.randn(6, 2)
    R, gate = torch.randn(2, 8), torch.tensor([0.3])
    state = {"P": P, "R_new": R, "gate": gate}
    config = {"r": 2, "injection_method": "residual_projection", "decomposition_method": method, "lora_alpha": 5.0}
    Q = {"qr": torch.linalg.qr(P)[0], "svd": torch.linalg.svd(P, full_matrices=False)[0]}.get(method, P)
    if method == "frozen":
        state["Q_P_cached"] = Q = torch.linalg.qr(torch.randn(6, 2))[0] * torch.tensor([1.0, -1.0])
        config["decomposition_method"] = "qr"
    eraser = torch.relu(Q) if method == "None" else Q
    expected = -Q @ (eraser.T @ W) + torch.sigmoid(gate) * (Q @ R)
    if method == "additive_update":
        A, B = torch.randn(6, 2), torch.randn(2, 8)
        state |= {"lora_A": A, "lora_B": B}
        config |= {"injection_method": method, "decomposition_method": "qr"}
        expected = torch.sigmoid(gate) * 2.5 * (A @ B)
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    torch.save({f"{layer}.{key}": value for key, value in state.items()}, tmp_path / "knowledge_injection_state.bin")
    torch.save({"layer_configs": {layer: config}}, tmp_path / "knowledge_injection_config.bin")
    for path in (tmp_path, tmp_path / "knowledge_injection_state.bin"):
        found = deft_formats.read(path)
        assert (found.format, found.architecture, set(found.changes)) == ("authors", SD, {NAME})
        assert (delta_of(found.changes[NAME], W) - expected).norm() <= 1e-5 * expected.norm()


class Runs:
    """Something whose unpickling runs code."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"layer.P": Runs()}, tmp_path / "knowledge_injection_state.bin")
    with pytest.raises(DeftError, match="without running code"):
        deft_formats.read(tmp_path)
    assert not Path("ran").exists()


def test_what_is_no_change_of_a_weight_is_left_with_the_reason():
    more = {"bundle_emb.cat.clip_l": torch.randn(2, 8), "lora_unet_down_blocks_0_norm.w_norm": torch.randn(8),
            f"{NAME}.diff_b": torch.randn(6), "lora_unet_conv_norm_out.diff": torch.randn(6)}  # fmt: skip
    found = deft_formats.parse(lora(**more), {}, "f")
    assert set(found.left) == set(more)
    assert all(found.left.values())
    assert set(found.changes) == {NAME}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (lora(**{f"{NAME}.lora_strange": torch.ones(1)}), "lora_strange"),
        (lora(**{f"{NAME}.hada_w1_b": torch.ones(2, 2)}), "hada_w1_b"),
        (lora(**{f"{NAME}.lora_mid.weight": torch.ones(3, 3, 3, 3)}), "damaged"),
        (lora(**{f"{NAME}.alpha": torch.tensor(torch.nan)}), "non-finite"),
        (lora(**{f"{NAME}.lora_A.weight": torch.ones(2, 8)}), "two tensors"),
        (lora("transformer.blocks.0.attn1.to_q"), "not known here"),
        (lora("transformer.single_transformer_blocks.0.strange") | lora("transformer.transformer_blocks.0.attn.to_q"),
         "strange is no layer of FLUX.1"),
        (lora(NAME) | lora("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"), "twice"),
        ({f"{NAME}.weight": torch.ones(3)}, "no kind of adapter"),
        ({"bundle_emb.cat.clip_l": torch.ones(2, 8)}, "no adapter layers"),
        ({f"{NAME}.lokr_w1": torch.ones(2, 2)}, "lokr_w2"),
        ({f"{NAME}.oft_blocks": torch.ones(2, 3)}, "damaged"),
        ({f"{NAME}.oft_R.weight": torch.ones(2, 4)}, "damaged"),
        ({f"{NAME}.lora_up.weight": torch.ones(()), f"{NAME}.lora_down.weight": torch.ones(())}, "damaged"),
        ({f"{NAME}.hada_w{w}": torch.ones(0, 0) for w in ("1_a", "1_b", "2_a", "2_b")}
         | {f"{NAME}.alpha": torch.ones(())}, "damaged"),
    ],
)  # fmt: skip
def test_other_files_are_refused_in_one_line_that_names_what_is_wrong(tensors, said):
    with pytest.raises(DeftError, match=said) as error:
        deft_formats.parse(tensors, {}, "some file")
    assert str(error.value).startswith("some file: ")
    assert "\n" not in str(error.value)


def test_a_dense_change_is_exact_at_its_rank_and_cut_below_it():
    delta = torch.randn(12, 3, dtype=torch.float64) @ torch.randn(3, 16, dtype=torch.float64)
    found = deft_formats.parse({f"{NAME}.diff": delta.float()}, {}, "f").changes[NAME]
    exact, error = deft_formats.to_factors(found, None, None, None)
    assert (exact.rank, exact.kernel) == (3, (16,))
    assert error < 1e-6
    assert (exact.delta() - delta).norm() <= 1e-6 * delta.norm()
    values = torch.linalg.svdvals(delta)
    for change in (found, exact):
        cut, error = deft_formats.to_factors(change, 2, None, None)
        assert cut.rank == 2
        assert error == pytest.approx(float(values[2] / values.norm()), rel=1e-4)
        share = float(values[0] ** 2 / values.square().sum())
        assert deft_formats.to_factors(change, None, share - 1e-3, None)[0].rank == 1
        assert deft_formats.to_factors(change, None, share + 1e-3, None)[0].rank == 2


@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 3)])
@pytest.mark.parametrize("on_input", [True, False])
def test_ia3_of_any_layer_is_approximated_and_fits_its_weight(kernel, on_input):
    layer = {(): "ff_net_2", (1, 1): "conv_shortcut", (3, 3): "conv1"}[kernel]
    W = torch.randn(6, 4, *kernel)
    factors = torch.rand(4 if on_input else 6)
    tensors = {f"lora_unet_down_blocks_0_resnets_0_{layer}.weight": factors,
               f"lora_unet_down_blocks_0_resnets_0_{layer}.on_input": torch.tensor(on_input)}  # fmt: skip
    (change,) = deft_formats.parse(tensors, {}, "a").changes.values()
    assert deft_sum.same_weight(change.shape, W.shape)
    found, error = deft_formats.to_factors(change, None, 1.0, lambda: W)
    expected = W * (
        factors.reshape(1, -1, *(1,) * len(kernel)) if on_input else factors.reshape(-1, *(1,) * (W.dim() - 1))
    )
    assert found.kernel == W.shape[1:]
    assert error < 1e-6
    assert torch.allclose(found.delta(), expected.flatten(1), atol=1e-6)


@pytest.mark.parametrize(("m", "n"), [(0, 8), (6, 0)])
@pytest.mark.parametrize("kind", ["lora", "hada"])
def test_a_layer_without_inputs_or_outputs_is_damaged(m, n, kind):
    names = {
        "lora": ("lora_up.weight", "lora_down.weight"),
        "hada": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    }
    sizes = [(m, 2), (2, n)] * 2
    tensors = {f"lora_unet_x.{name}": torch.ones(size) for name, size in zip(names[kind], sizes, strict=False)}
    with pytest.raises(DeftError, match=r"lora_unet_x is damaged \(.* holds nothing\)"):
        deft_formats.parse(tensors, {}, "a")


def test_all_the_energy_is_all_of_a_change():
    """Not what sums of squares in float32 can tell apart from all, which is 2e-4 less."""
    U, V = (torch.linalg.qr(torch.randn(80, 80))[0] for _ in range(2))
    D = U * torch.logspace(0, -5, 80) @ V
    found, error = deft_factors.approximated(D, (80,), None, 1.0)
    assert error < 2e-6
    assert (found.delta() - D).norm() < 2e-6 * D.norm()


def test_peft_ia3_says_that_biases_stay():
    tensors = {"base_model.model.mid_block.resnets.0.conv1.ia3_l": torch.ones(6, 1, 1, 1)}
    found = deft_formats.parse(tensors, {}, "a")
    assert list(found.left) == ["base_model.model.mid_block.resnets.0.conv1.bias"]
