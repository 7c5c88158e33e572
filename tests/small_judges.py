"""Small CLIP, DINO, DINOv2 and depth models with random weights, as folders that metrics are given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    Dinov2Model,
    DPTImageProcessorPil,
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


def depth(folder: Path) -> Path:
    """`--depth_model`: Depth-Anything-V2's kind."""
    stages = [f"stage{i}" for i in range(1, 5)]
    four = _SMALL | {"num_hidden_layers": 4, "initializer_range": 0.3}
    backbone = Dinov2Config(**four, image_size=28, patch_size=14, out_features=stages, reshape_hidden_states=False)
    narrow = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "head_hidden_size": 8, "initializer_range": 0.3}
    config = DepthAnythingConfig(backbone_config=backbone, reassemble_hidden_size=32, **narrow)
    DepthAnythingForDepthEstimation(config).save_pretrained(folder)
    DPTImageProcessorPil(size={"height": 56, "width": 56}, ensure_multiple_of=14).save_pretrained(folder)
    return folder


def build(folder: Path, seed: int = 0) -> dict[str, Path]:
    """All of them, the same for the same seed: option's name -> folder."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        transformers.logging.disable_progress_bar()
        return {
            "clip": clip(folder / "clip"),
            "dino": vit(folder / "dino", 16, 64),
            "dino_vits8": vit(folder / "dino_vits8", 8, 224),
            "dinov2": dinov2(folder / "dinov2"),
            "depth_model": depth(folder / "depth_model"),
        }


def pictures(folder: Path) -> list[Path]:
    """Four to be judged, of several sizes, modes and formats; the first two of one size."""

    random = np.random.default_rng(0)
    files = []
    for i, (mode, size) in enumerate([("RGB", (80, 64)), ("RGB", (80, 64)), ("L", (300, 256)), ("RGBA", (70, 90))]):
        channels = {"RGB": (3,), "L": (), "RGBA": (4,)}[mode]
        small = random.integers(0, 256, (8, 8, *channels), np.uint8)
        files.append(folder / f"{i}.png")
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(files[-1])
    return files
