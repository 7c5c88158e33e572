"""A small model of Stable Diffusion 1.5's architecture with random weights, for trying the trainer and for tests.

Every block and layer of the real one is there, under the same names, unless fewer are asked for: 192 attention layers
in the U-Net, 72 layers in the text encoder. Only the widths are small. It has learnt nothing: its images are coloured
noise.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from library.models.reading import CONFIGS
from library.world import tokenizer as clip_tokenizer

UNET = {"block_out_channels": [32, 64, 96, 96], "cross_attention_dim": 64, "norm_num_groups": 16, "sample_size": 16}
VAE = {"block_out_channels": [8, 16, 16, 16], "norm_num_groups": 8, "layers_per_block": 1, "sample_size": 128}
TEXT_ENCODER = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "projection_dim": 64}


def build(folder: Path, seed: int = 0, depths: tuple[int, int] = (2, 12)) -> Path:
    """Writes the model as a Diffusers folder in float32 (about 10 MB), the same for the same seed.

    :param depths: how many layers a block of the U-Net has, and how many the text encoder
    """
    transformers.logging.disable_progress_bar()
    tokenizer = clip_tokenizer.build(folder / "tokenizer")
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel.from_config(_config("unet") | UNET | {"layers_per_block": depths[0]})
        vae = AutoencoderKL.from_config(_config("vae") | VAE)
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        ids |= {"vocab_size": len(tokenizer), "num_hidden_layers": depths[1]}
        text = CLIPTextConfig(**_config("text_encoder") | TEXT_ENCODER | ids)
        text_encoder = CLIPTextModel(text)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler.from_config(_config("scheduler", "scheduler_config.json")),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(str(folder))
    return folder


def _config(part: str, file: str = "config.json") -> dict:
    return json.loads((CONFIGS / "sd15" / part / file).read_text(encoding="utf-8"))
