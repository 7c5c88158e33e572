"""Stable Diffusion 1.x and 2.x: loading, text and image encoding, prediction."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from networks.deft_config import DeftError

CLIP_L = "openai/clip-vit-large-patch14"
CONFIGS = Path(__file__).parent / "model_configs" / "sd15"


@dataclass
class StableDiffusion:
    """The parts of a model. `name` is its file's or folder's name."""

    name: str
    path: Path
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    pipeline: StableDiffusionPipeline

    @property
    def is_v2(self) -> bool:
        """Whether its text encoder is Stable Diffusion 2's."""
        return self.unet.config.cross_attention_dim == 1024

    @property
    def pixels_per_latent(self) -> int:
        """8 for the published models."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def noise_scheduler(self) -> DDPMScheduler:
        """The training's noise schedule, from the model's own configuration."""
        return DDPMScheduler.from_config(self.pipeline.scheduler.config, clip_sample=False)

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensor:
        """Latents (b, c, h, w) of pixels (b, 3, height, width) in [-1, 1], where the VAE is."""
        pixels = pixels.to(self.vae.device, self.vae.dtype)
        return self.vae.encode(pixels).latent_dist.sample() * self.vae.config.scaling_factor

    def encode_text(self, captions: list[str]) -> Tensor:
        """The text encoder's output (b, 77, width); longer captions are cut."""
        tokens = self.tokenizer(
            captions,
            padding="max_length",
            truncation=True,
            max_length=self.text_encoder.config.max_position_embeddings,
            return_tensors="pt",
        )
        return self.text_encoder(tokens.input_ids.to(self.text_encoder.device))[0]

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """The U-Net's prediction, in the shape of the latents."""
        return self.unet(noisy_latents, timesteps, text.to(noisy_latents.dtype)).sample


def load(path: str, tokenizer: str | None = None, tokenizer_cache_dir: str | None = None) -> StableDiffusion:
    """Loads a Diffusers folder or a single-file checkpoint, in float32, on the CPU, asking no hub.

    :param tokenizer: folder of a CLIP tokenizer, used instead of the model's own
    :param tokenizer_cache_dir: sd-scripts' layout, `openai_clip-vit-large-patch14/` inside
    :raises DeftError: when the model or, for a single file, its tokenizer cannot be found or read
    """
    location = Path(path)
    if not location.exists():
        raise DeftError(f"--pretrained_model_name_or_path: no such model: {path} (a Diffusers folder or .safetensors)")
    if location.is_dir() and not (location / "model_index.json").is_file():
        raise DeftError(f"{path}: no Diffusers model folder, since it has no model_index.json")
    if location.is_file() and location.suffix != ".safetensors":
        raise DeftError(f"{path}: only .safetensors checkpoints are read, since others can run code; convert it first")
    diffusers.utils.logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()
    shared = {"safety_checker": None, "local_files_only": True}
    try:
        if location.is_dir():
            given = {"tokenizer": _tokenizer_from(tokenizer)} if tokenizer else {}
            pipeline = StableDiffusionPipeline.from_pretrained(str(location), use_safetensors=True, **shared, **given)
        else:
            found = find_tokenizer(tokenizer, tokenizer_cache_dir)
            pipeline = StableDiffusionPipeline.from_single_file(
                str(location), config=str(CONFIGS), tokenizer=found, **shared
            )
    except DeftError:
        raise
    except Exception as error:  # what the libraries raise for files that are no model is of many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DeftError(f"{path}: not a readable Stable Diffusion 1.x or 2.x model ({reason})") from error
    _check_tokenizer(pipeline.tokenizer, path)
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval().float()
    return StableDiffusion(
        location.name, location, pipeline.tokenizer, pipeline.text_encoder, pipeline.vae, pipeline.unet, pipeline
    )


def find_tokenizer(tokenizer: str | None, cache_dir: str | None) -> CLIPTokenizer:
    """CLIP-L's tokenizer from a folder, sd-scripts' cache folder or the local hub cache, in this order.

    :raises DeftError: naming the three places
    """
    if tokenizer:
        return _tokenizer_from(tokenizer)
    cached = Path(cache_dir or "", CLIP_L.replace("/", "_"))
    if cache_dir and cached.is_dir():
        return _tokenizer_from(str(cached))
    try:
        return _tokenizer_from(CLIP_L)
    except DeftError:
        raise DeftError(
            f"a single-file checkpoint holds no tokenizer: give --tokenizer FOLDER, or --tokenizer_cache_dir FOLDER "
            f"with {cached.name}/ in it, or put {CLIP_L} into the local hub cache"
        ) from None


def _tokenizer_from(folder: str) -> CLIPTokenizer:
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of many kinds, by transformers' version
        raise DeftError(f"{folder}: no CLIP tokenizer there ({str(error).splitlines()[0]})") from None
    _check_tokenizer(tokenizer, folder)
    return tokenizer


def _check_tokenizer(tokenizer: CLIPTokenizer, source: str) -> None:
    """transformers 5 makes an empty tokenizer, which knows no letter, where it finds no files."""
    if len(tokenizer) < 256:
        raise DeftError(f"{source}: no CLIP tokenizer there (vocab.json and merges.txt, or tokenizer.json)")
