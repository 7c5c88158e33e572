"""Pictures by OmniGen. Its pipeline in diffusers needs torchvision to be made at all; this one does not."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.omnigen.processor_omnigen import OmniGenMultiModalProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from library.models import omnigen_sequence
from library.models.family import Text

GUIDANCE, PICTURE_GUIDANCE = 2.5, 1.6  # of diffusers' pipeline
# of the original's and of diffusers' pipeline, which have no other
NEGATIVE: str = inspect.signature(OmniGenMultiModalProcessor.__call__).parameters["negative_prompt"].default


class Pipeline(DiffusionPipeline):
    """The parts of an OmniGenPipeline; called as one, for latents."""

    default_sample_size = 128  # latents a side
    default_guidance = GUIDANCE

    def __init__(self, transformer: Any, scheduler: Any, vae: Any, tokenizer: Any):
        super().__init__()
        self.register_modules(vae=vae, tokenizer=tokenizer, transformer=transformer, scheduler=scheduler)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=2 * self.vae_scale_factor)

    def encoded(self, captions: Sequence[str], inputs: Sequence[Sequence[Tensor]] = ()) -> Text:
        """See `omnigen_sequence.encoded`."""
        patch, device = self.transformer.config.patch_size, self.transformer.device
        return omnigen_sequence.encoded(self.tokenizer, patch, captions, inputs, device)

    @torch.no_grad()
    def __call__(
        self,
        prompt: Sequence[str] | None = None,
        *,
        width: int,
        height: int,
        num_inference_steps: int,
        generator: torch.Generator | Sequence[torch.Generator],
        terms: Sequence[tuple[float, Text]] = (),
        negative_prompt: Sequence[str] | None = None,
        guidance_scale: float = GUIDANCE,
        output_type: str = "latent",
        callback_on_step_end: Callable[..., Any] | None = None,
    ) -> ImagePipelineOutput:
        """`images`: latents (b, c, h, w), float32.

        :param prompt: captions without pictures; else `terms`
        :param width: in pixels, as `height`; of whole tokens, what is more is left out
        :param generator: on the CPU, one a picture
        :param terms: weight and condition, in place of all that is said by words
        """
        if prompt is not None:
            negative = self.encoded(negative_prompt or [NEGATIVE] * len(prompt))
            terms = guided(self.encoded(prompt), negative, None, guidance_scale, PICTURE_GUIDANCE)
        generators = [generator] if isinstance(generator, torch.Generator) else generator
        patch, channels = self.transformer.config.patch_size, self.transformer.config.in_channels
        rows, columns = (side // (patch * self.vae_scale_factor) * patch for side in (height, width))
        noise = [torch.randn(channels, rows, columns, generator=one) for one in generators]
        latents = torch.stack(noise).to(self.transformer.device)
        sigmas = np.linspace(1, 0, num_inference_steps, endpoint=False)
        self.scheduler.set_timesteps(sigmas=sigmas, device=latents.device)
        for i, time in enumerate(self.scheduler.timesteps):
            times = time.expand(len(latents))
            answers = [
                weight * omnigen_sequence.answer(self.transformer, latents, times, text).float()
                for weight, text in terms
            ]
            latents = self.scheduler.step(sum(answers, torch.zeros_like(latents)), time, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                callback_on_step_end(self, i, time, {})
        return ImagePipelineOutput(images=latents)


def guided(
    text: Text, negative: Text, pictures: Text | None, guidance: float, picture_guidance: float
) -> list[tuple[float, Text]]:
    """The conditions whose answers, with these weights, add up to the guided one.

    negative + picture_guidance (pictures - negative) + guidance (text - pictures), as in arXiv 2211.09800; without
    pictures, negative + guidance (text - negative). What has no weight is not asked for.

    :param pictures: the text's pictures, without its words
    """
    if pictures is None:
        terms = [(guidance, text), (1 - guidance, negative)]
    else:
        terms = [(guidance, text), (picture_guidance - guidance, pictures), (1 - picture_guidance, negative)]
    return [(weight, condition) for weight, condition in terms if weight]
