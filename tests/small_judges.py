"""Small CLIP, DINO, DINOv2 and depth models with random weights, as folders that metrics are given."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from library.world import tokenizer

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
WORDS = ("a", "photo", "of", "cat", "dog", "red", "sks", "on", "the", "beach")


def clip(folder: Path) -> Path:
    """`--clip`: projections of 16 numbers, pictures of 32 pixels."""
    words = tokenizer.build(folder, WORDS)
    text = _SMALL | {"vocab_size": len(words), "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    vision = _SMALL | {"image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16, initializer_factor=4.0)
    CLIPModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessorPil(**size).save_pretrained(folder)
    return folder


def vit(folder: Path, patch: int, size: int) -> Path:
    """`--dino` with patches of 16, `--dino_vits8` with patches of 8 on 224 pixels."""
    config = ViTConfig(**_SMALL, image_size=size, patch_size=patch, initializer_range=0.3)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": size, "width": size}).save_pretrained(folder)
    return folder


def dinov2(folder: Path) -> Path:
    """`--dinov2`: pictures of 28 pixels."""
    Dinov2Model(Dinov2Config(**_SMALL, image_size=28, patch_size=14, initializer_range=0.3)).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    BitImageProcessorPil(**size).save_pretrained(folder)
    return folder


def build(folder: Path, seed: int = 0) -> dict[str, Path]:
    """All of them, the same for the same seed: option's name -> folder."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return {
            "clip": clip(folder / "clip"),
            "dino": vit(folder / "dino", 16, 64),
            "dino_vits8": vit(folder / "dino_vits8", 8, 224),
            "dinov2": dinov2(folder / "dinov2"),
        }
