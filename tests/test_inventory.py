"""The layers that `deft_inventory` knows without a model, against the real classes."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel
from transformers import CLIPTextModelWithProjection as Projected

from library.models.reading import CONFIGS
from networks import deft_architectures, deft_targets
from networks.deft_inventory import NAMES, inventory

FOLDERS = {"sd1": "sd15", "sd2": "sd2", "sdxl": "sdxl", "flux": "flux"}
CLIP = (CLIPTextConfig, CLIPTextModel)
MODELS = {
    "sd1": {"unet": ("unet", UNet2DConditionModel), "te1": ("text_encoder", *CLIP)},
    "sd2": {"unet": ("unet", UNet2DConditionModel), "te1": ("text_encoder", *CLIP)},
    "sdxl": {"unet": ("unet", UNet2DConditionModel), "te1": ("text_encoder", *CLIP),
             "te2": ("text_encoder_2", CLIPTextConfig, Projected)},
    "flux": {"unet": ("transformer", FluxTransformer2DModel), "te1": ("text_encoder", *CLIP),
             "te3": ("text_encoder_2", T5Config, T5EncoderModel)},
}  # fmt: skip
PARTS = [(name, part) for name, parts in MODELS.items() for part in parts]


def built(name: str, part: str) -> nn.Module:
    """The real model of a published configuration, without its numbers."""
    folder, *classes = MODELS[name][part]
    config = json.loads((CONFIGS / FOLDERS[name] / folder / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        return classes[0].from_config(config) if len(classes) == 1 else classes[1](classes[0](**config))


def weights(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Path -> shape of what an adapter can change. transformers 5 dropped CLIP's `text_model.`."""
    kinds = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)
    found = {
        p: tuple(m.weight.shape) for p, m in model.named_modules() if isinstance(m, kinds) and m.weight is not None
    }
    if "CLIP" in type(model).__name__:
        found = {p: s for p, s in found.items() if "layer_norm" not in p}
        found = {p if p.startswith("text_") else f"text_model.{p}": s for p, s in found.items()}
    return {p.replace("ff.net.0.linear", "ff.net.0.proj"): s for p, s in found.items()}


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_every_layer_of_the_real_model_is_known_by_path_and_shape(name, part):
    real = weights(built(name, part))
    known: dict[str, tuple[int, ...]] = {}
    for layer in inventory(name).layers:
        if layer.part == part:
            sizes = layer.rows or layer.shape[:1]
            known |= {p: (m, *layer.shape[1:]) for p, m in zip(layer.diffusers, sizes, strict=True)}
    assert known == {p: s for p, s in real.items() if "final_layer_norm" not in p}
    assert len(known) > 70


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_key_names_are_those_that_a_network_would_write(name, part):
    model = built(name, part)
    row = next(a for a in deft_architectures.ARCHITECTURES if a.name == inventory(name).architecture)
    if part == "unet":
        row, form = deft_architectures.recognise(model)
    else:
        form = row.text_encoders[{"te1": 0, "te2": 1, "te3": 1}[part]]
    made = {t.file_name for t in deft_targets.targets(model, form, with_convolutions=True)}
    known = inventory(name)
    assert made == {known.key(la) for la in known.layers if la.part == part and la.inside and not la.is_norm}


def test_original_paths_are_those_of_single_files():
    """Numbers of original paths published with the checkpoints: conv layers and transformer blocks of SDXL's U-Net."""
    paths = {layer.path for layer in inventory("sdxl").layers if layer.part == "unet"}
    assert {"output_blocks.2.2.conv", "output_blocks.5.2.conv", "input_blocks.3.0.op", "label_emb.0.2"} < paths
    assert "middle_block.1.transformer_blocks.9.attn2.to_k" in paths
    assert "output_blocks.2.1.conv" in {layer.path for layer in inventory("sd1").layers}


@pytest.mark.parametrize("name", NAMES)
def test_names_are_unique(name):
    known = inventory(name)
    keys = [known.key(layer) for layer in known.layers]
    assert len(keys) == len(set(keys)) == len({(la.part, la.path) for la in known.layers})
