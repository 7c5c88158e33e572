"""Stable Diffusion XL."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from library.models import clip
from library.models.family import Text
from library.models.outline import Outline, pixels_per_latent
from library.models.reading import CONFIGS, check_whole
from library.models.sd import StableDiffusion, clip_outline, load_pipeline, prediction_of, tokenizers_of
from library.options.rooms import ModelOptions
from networks.deft_config import DeftError

logger = logging.getLogger(__name__)


class StableDiffusionXL(StableDiffusion):
    """See `Family`; of its texts, `hidden` is (captions, tokens + 2, 2048), `pooled` (captions, 1280)."""

    def encode_text(self, captions: list[str], inputs: Sequence[Sequence[Tensor]] = ()) -> Text:
        """See `Family`: the last layer but one of both encoders, side by side, and the second's view of the whole."""
        hidden = []
        for encoder, reader in zip(self.text_encoders, self.readers, strict=True):
            tokens = reader.tokens(captions)
            found = clip.states(encoder, tokens)
            joined = clip.joined(found.hidden_states[-2], reader.windows)
            hidden.append(clip.weighed(joined, reader.weights(captions)))
        end = self.readers[-1].tokenizer.eos_token_id
        return {
            "hidden": torch.cat(hidden, -1),
            "pooled": clip.pooled(encoder, found.last_hidden_state, tokens, end),
        }

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Text, sizes: Tensor) -> Tensor:
        """See `Family`."""
        conditions = {"text_embeds": text["pooled"].to(noisy), "time_ids": sizes.to(noisy.device)}
        hidden = text["hidden"].to(noisy)
        return self.pipeline.unet(noisy, timesteps, hidden, added_cond_kwargs=conditions).sample

    def drawing_inputs(self, prompt: Text, negative: Text | None) -> dict[str, Tensor]:
        """See `Family`."""
        inputs = super().drawing_inputs(prompt, negative) | {"pooled_prompt_embeds": prompt["pooled"]}
        return inputs if negative is None else inputs | {"negative_pooled_prompt_embeds": negative["pooled"]}

    def names(self) -> dict[str, str]:
        """See `Family`."""
        implementation = {"modelspec.implementation": "https://github.com/Stability-AI/generative-models"}
        return self._names("sdxl_base_v1-0", "stable-diffusion-xl-v1-base", False) | implementation


def load(location: Path, options: ModelOptions, dtype: torch.dtype, empty: bool = False) -> StableDiffusionXL:
    """See `library.models.loading.load`."""
    if options.v2:
        raise DeftError(f"--v2: {location} is SDXL; leave the option out")
    if options.clip_skip not in (None, 1):
        logger.warning("--clip_skip has no effect: SDXL is always trained on the last layer but one, in sd-scripts too")
    given = tokenizers_of(location, options, ["tokenizer", "tokenizer_2"], [clip.BIG_G]) | {"add_watermarker": False}
    pipeline = load_pipeline(StableDiffusionXLPipeline, location, CONFIGS / "sdxl", options, dtype, given, empty)
    if not empty:
        check_whole(location, pipeline, {"unet": "", "text_encoder": "text_model.", "text_encoder_2": "text_model."})
    velocity, zero_snr = prediction_of(location, pipeline, options)
    pipeline.tokenizer_2.pad_token_id = clip.OPEN_CLIP_PADDING
    paddings = pipeline.tokenizer.eos_token_id, clip.OPEN_CLIP_PADDING
    encoders = pipeline.text_encoder, pipeline.text_encoder_2
    # of the first tokenizer for both, as in sd-scripts: the second takes the "!" of a caption for its padding
    length, weighted = options.max_token_length, options.weighted_captions
    readers = [
        clip.Reader(pipeline.tokenizer, padding, encoder.config.max_position_embeddings, length, weighted)
        for encoder, padding in zip(encoders, paddings, strict=True)
    ]
    return StableDiffusionXL(location, pipeline, options, readers, velocity, zero_snr)


def outline(location: Path, options: ModelOptions) -> Outline:
    """See `library.models.loading.outline_of`."""
    found = tokenizers_of(location, options, ["tokenizer"], [clip.BIG_G])
    encoders = (("CLIP-L", "text_encoder"), ("CLIP bigG", "text_encoder_2"))
    return Outline(pixels_per_latent(location), tuple(clip_outline(*one, found, location, options) for one in encoders))
