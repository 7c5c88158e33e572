"""Small models of SDXL's and Stable Diffusion 2's architecture with random weights, as Diffusers folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from library.models.reading import CONFIGS

TOKENIZER = Path(__file__).resolve().parents[1] / "library" / "world" / "model" / "tokenizer"
POSITIONS = 77
VAE = {"block_out_channels": [8, 16, 16, 16], "norm_num_groups": 8, "layers_per_block": 1, "sample_size": 64}
UNETS: dict[str, dict[str, Any]] = {
    "sd2": {"block_out_channels": [16, 16, 32, 32], "attention_head_dim": [1, 1, 2, 2], "cross_attention_dim": 1024,
            "norm_num_groups": 8, "sample_size": 8},
    "sdxl": {"block_out_channels": [16, 16, 32], "attention_head_dim": [1, 1, 2], "norm_num_groups": 8,
             "cross_attention_dim": 48, "transformer_layers_per_block": [1, 1, 2], "addition_time_embed_dim": 8,
             "projection_class_embeddings_input_dim": 80, "sample_size": 8},
}  # fmt: skip
ENCODERS = {
    ("sd2", "text_encoder"): {"hidden_size": 1024, "intermediate_size": 32, "num_attention_heads": 2,
                              "num_hidden_layers": 3},
    ("sdxl", "text_encoder"): {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2},
    ("sdxl", "text_encoder_2"): {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2,
                                 "num_hidden_layers": 11, "projection_dim": 32},
}  # fmt: skip


def config_of(kind: str, part: str) -> dict[str, Any]:
    """A configuration that ships, made small."""
    shipped = json.loads((CONFIGS / kind / part / "config.json").read_text(encoding="utf-8"))
    small = {"unet": UNETS[kind], "vae": VAE}.get(part) or ENCODERS[kind, part]
    return shipped | small


def tokenizer(folder: Path, **changes: Any) -> CLIPTokenizer:
    """The one that ships, for text encoders of 77 positions."""
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"model_max_length": POSITIONS} | changes
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return CLIPTokenizer.from_pretrained(str(folder))


def encoder(kind: str, part: str, tokens: CLIPTokenizer) -> CLIPTextModel | CLIPTextModelWithProjection:
    config = config_of(kind, part) | {"vocab_size": len(tokens), "max_position_embeddings": POSITIONS}
    config |= {"bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id}
    made_by = CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection
    return made_by(CLIPTextConfig(**config)).eval()


def build(kind: str, folder: Path, seed: int = 0, **scheduler: Any) -> Path:
    """Writes a Diffusers folder in float32, the same for the same seed.

    :param kind: "sd2" or "sdxl"
    :param scheduler: changes of its configuration
    """
    settings = json.loads((CONFIGS / kind / "scheduler" / "scheduler_config.json").read_text()) | scheduler
    tokens = tokenizer(folder / "tokenizer")
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        parts: dict[str, Any] = {
            "unet": UNet2DConditionModel.from_config(config_of(kind, "unet")),
            "vae": AutoencoderKL.from_config(config_of(kind, "vae")),
            "text_encoder": encoder(kind, "text_encoder", tokens),
            "tokenizer": tokens,
        }
        if kind == "sdxl":
            parts["text_encoder_2"] = encoder(kind, "text_encoder_2", tokens)
            parts["tokenizer_2"] = tokenizer(folder / "tokenizer_2", pad_token="!")
            pipeline = StableDiffusionXLPipeline(
                **parts, scheduler=EulerDiscreteScheduler.from_config(settings), add_watermarker=False
            )
        else:
            pipeline = StableDiffusionPipeline(
                **parts, scheduler=DDIMScheduler.from_config(settings), safety_checker=None, feature_extractor=None,
                requires_safety_checker=False,
            )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(str(folder))
    return folder
