"""Diffusers' own loading of adapter files, into models of the published sizes without their numbers."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from library.models.reading import CONFIGS

FOLDERS = {"sd1": "sd15", "sd2": "sd2", "sdxl": "sdxl", "flux": "flux"}
CLASSES: dict[str, tuple[Any, Any]] = {
    "unet": (None, UNet2DConditionModel),
    "transformer": (None, FluxTransformer2DModel),
    "text_encoder": (CLIPTextConfig, CLIPTextModel),
    "text_encoder_2": (CLIPTextConfig, CLIPTextModelWithProjection),
    "t5": (T5Config, T5EncoderModel),
}
COMPONENTS = {
    "sd1": {"unet": "unet", "te1": "text_encoder"},
    "sd2": {"unet": "unet", "te1": "text_encoder"},
    "sdxl": {"unet": "unet", "te1": "text_encoder", "te2": "text_encoder_2"},
    "flux": {"unet": "transformer", "te1": "text_encoder", "te3": "text_encoder_2"},
}


def built(name: str, part: str) -> nn.Module:
    """The real model of a published configuration, on the meta device."""
    folder = COMPONENTS[name][part]
    config = json.loads((CONFIGS / FOLDERS[name] / folder / "config.json").read_text(encoding="utf-8"))
    settings, model = CLASSES["t5" if part == "te3" else folder]
    with torch.device("meta"):
        return model.from_config(config) if settings is None else model(settings(**config))


@functools.cache
def pipeline(name: str) -> Any:
    """A pipeline of diffusers around meta models; to be unloaded after use."""
    parts = {COMPONENTS[name][part]: built(name, part) for part in COMPONENTS[name] if part != "te3"}
    if name == "flux":
        nothing = dict.fromkeys(("vae", "tokenizer", "text_encoder_2", "tokenizer_2"))
        return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), **parts, **nothing)
    if name == "sdxl":
        nothing = dict.fromkeys(("vae", "tokenizer", "tokenizer_2"))
        return StableDiffusionXLPipeline(scheduler=DDIMScheduler(), **parts, **nothing)
    nothing = dict.fromkeys(("vae", "tokenizer", "safety_checker", "feature_extractor"))
    return StableDiffusionPipeline(scheduler=DDIMScheduler(), **parts, **nothing, requires_safety_checker=False)


def loaded_by_diffusers(name: str, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Component and path -> (up, down, scale) of every layer that diffusers adapts. What it raises is passed on."""
    pipe = pipeline(name)
    try:
        pipe.load_lora_weights({key: tensor.clone() for key, tensor in tensors.items()}, adapter_name="x")
        return {
            f"{component}.{path.removeprefix('text_model.')}": (
                layer.lora_B["x"].weight.detach().clone(),
                layer.lora_A["x"].weight.detach().clone(),
                float(layer.scaling["x"]),
            )
            for component in COMPONENTS[name].values()
            if getattr(pipe, component, None) is not None
            for path, layer in getattr(pipe, component).named_modules()
            if isinstance(layer, BaseTunerLayer) and "x" in layer.lora_B
        }
    finally:
        pipe.unload_lora_weights()
