"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from library.models.family import Family, Text
from library.models.reading import CONFIGS, check_tokenizer, check_whole, find_tokenizer, of_folder, tokenizer_from
from library.options.rooms import ModelOptions
from networks.deft_config import DeftError, reason_of


class StableDiffusion(Family):
    """See `Family`."""

    objective = "diffusion"

    @property
    def denoiser(self) -> nn.Module:
        """See `Family`."""
        return self.pipeline.unet

    @property
    def text_encoders(self) -> list[nn.Module]:
        """See `Family`: CLIP-L's, or OpenCLIP-H's of 2.x."""
        return [self.pipeline.text_encoder]

    @property
    def is_v2(self) -> bool:
        """Whether its text encoder is Stable Diffusion 2's."""
        return self.pipeline.unet.config.cross_attention_dim == 1024

    def noise_scheduler(self) -> DDPMScheduler:
        """The training's noise schedule, from the model's own configuration."""
        return DDPMScheduler.from_config(self.pipeline.scheduler.config, clip_sample=False)

    def encode_text(self, captions: list[str]) -> Text:
        """`hidden` (b, 77, width)."""
        encoder = self.pipeline.text_encoder
        tokens = self.pipeline.tokenizer(
            captions,
            padding="max_length",
            truncation=True,
            max_length=encoder.config.max_position_embeddings,
            return_tensors="pt",
        )
        return {"hidden": encoder(tokens.input_ids.to(encoder.device))[0]}

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Text, sizes: Tensor) -> Tensor:
        """See `Family`."""
        return self.pipeline.unet(noisy, timesteps, text["hidden"].to(noisy.dtype)).sample

    def beyond(self, caption: str) -> tuple[str, int]:
        """See `Family`."""
        read = self.pipeline.text_encoder.config.max_position_embeddings - 2
        ids = self.pipeline.tokenizer(caption, verbose=False).input_ids[1:-1]
        return str(self.pipeline.tokenizer.decode(ids[read:])).strip(), read

    def drawing_inputs(self, prompt: Text, negative: Text | None) -> dict[str, Tensor]:
        """See `Family`."""
        inputs = {"prompt_embeds": prompt["hidden"]}
        return inputs if negative is None else inputs | {"negative_prompt_embeds": negative["hidden"]}

    def sampler(self, name: str | None) -> Any:
        """See `Family`: DDIM."""
        return DDIMScheduler.from_config(self.pipeline.scheduler.config)

    def names(self) -> dict[str, str]:
        """See `Family`."""
        velocity = self.noise_scheduler().config.prediction_type == "v_prediction"
        architecture = "stable-diffusion-v1"
        if self.is_v2:
            architecture = "stable-diffusion-v2-768-v" if velocity else "stable-diffusion-v2-512"
        return {
            "ss_v2": str(self.is_v2),
            "ss_base_model_version": f"sd_{'v2' if self.is_v2 else 'v1'}",
            "ss_sd_model_name": self.path.name,
            "modelspec.architecture": f"{architecture}/lora",
            "modelspec.prediction_type": "v" if velocity else "epsilon",
        }


def load(location: Path, options: ModelOptions, dtype: torch.dtype) -> StableDiffusion:
    """See `library.models.loading.load`."""
    try:
        if location.is_dir():
            given = {"tokenizer": tokenizer_from(options.tokenizer)} if options.tokenizer else {}
            pipeline = StableDiffusionPipeline.from_pretrained(
                str(location), torch_dtype=dtype, **of_folder(location), **given
            )
        else:
            pipeline = StableDiffusionPipeline.from_single_file(
                str(location),
                config=str(CONFIGS / "sd15"),
                tokenizer=find_tokenizer(options.tokenizer, options.tokenizer_cache_dir),
                safety_checker=None,
                local_files_only=True,
            )
    except DeftError:
        raise
    except Exception as error:  # what the libraries raise for files that are no model is of many kinds
        raise DeftError(f"{location}: not a readable Stable Diffusion model ({reason_of(error)})") from error
    check_tokenizer(pipeline.tokenizer, location)
    check_whole(location, pipeline, {"unet": "", "vae": "", "text_encoder": "text_model."})
    channels = pipeline.unet.config.in_channels
    if channels != pipeline.vae.config.latent_channels:
        raise DeftError(
            f"{location}: its U-Net takes {channels} channels, as for inpainting, which is not trained here"
        )
    pipeline.set_progress_bar_config(disable=True)
    for part, its in ((pipeline.unet, dtype), (pipeline.vae, torch.float32), (pipeline.text_encoder, dtype)):
        part.requires_grad_(False).eval().to(dtype=its)
    return StableDiffusion(location, pipeline, options)
