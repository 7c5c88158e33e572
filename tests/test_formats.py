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
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from library.models.reading import CONFIGS
from networks import deft_formats, deft_names
from networks.deft_factors import Factors
from networks.deft_formats import tensors_as
from networks.deft_targets import ARCHITECTURES, targets
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
