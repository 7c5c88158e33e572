"""A small model of Stable Diffusion 1.5's architecture with random weights, for trying the trainer and for tests.

Every block and layer of the real one is there, under the same names: 192 attention layers in the U-Net, 72 layers in
the text encoder. Only the widths are small. It has learnt nothing: its images are coloured noise.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from library.sd import CONFIGS

UNET = {"block_out_channels": [32, 64, 96, 96], "cross_attention_dim": 64, "norm_num_groups": 16, "sample_size": 16}
VAE = {"block_out_channels": [8, 16, 16, 16], "norm_num_groups": 8, "layers_per_block": 1, "sample_size": 128}
TEXT_ENCODER = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "projection_dim": 64}


def build(folder: Path, seed: int = 0) -> Path:
    """Writes the model as a Diffusers folder in float32 (about 10 MB), the same for the same seed."""
    transformers.logging.disable_progress_bar()
    tokenizer = byte_tokenizer(folder / "tokenizer")
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel.from_config(_config("unet") | UNET)
        vae = AutoencoderKL.from_config(_config("vae") | VAE)
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        text = CLIPTextConfig(**_config("text_encoder") | TEXT_ENCODER | ids | {"vocab_size": len(tokenizer)})
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
    return json.loads((CONFIGS / part / file).read_text(encoding="utf-8"))


def byte_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's byte-level tokenizer without merges: a token a letter."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    special = {
        "bos_token": "<|startoftext|>",
        **dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    }
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(str(folder))
