"""What the training knows of a model: one interface, behind which each family has its file."""

from __future__ import annotations

import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from library.models.compiling import compile_blocks
from library.models.quantised import keep_in_fp8, quantise, read_anew
from library.models.swapping import Swapping, blocks_of, spread
from library.options.rooms import ModelOptions
from library.prompts import GUIDANCE, Prompt
from library.sampling import counted_by
from library.transfer import sent
from networks.deft_config import reason_of
from networks.deft_progress import Bar

logger = logging.getLogger(__name__)

_SHARED = ("cpu", "mps")  # devices whose memory is the host's
TILE = 64  # latents a side, of what the VAE decodes at once where memory is short

Text = dict[str, Tensor]  # a family's own names -> what the text encoders make of captions, (captions, ...) each


class Family(ABC):
    """A loaded model: its parts are frozen, in evaluation mode, on the CPU until `place`.

    :param path: its file or folder
    :param pipeline: of diffusers, that draws with the same parts; its progress bar is off
    """

    objective: ClassVar[Literal["diffusion", "flow"]]  # see `library.training.objective`
    takes_pictures: ClassVar[bool] = False  # beside a caption, which says where they belong
    dropped: ClassVar[str] = ""  # the caption of a condition that is dropped; it has no pictures
    # options of flow matching where they are not given; these are sd-scripts'
    timestep_sampling: ClassVar[str] = "sigma"
    model_prediction_type: ClassVar[str] = "sigma_scaled"

    def __init__(self, path: Path, pipeline: DiffusionPipeline, options: ModelOptions):
        self.path, self.pipeline, self.options = path, pipeline, options

    @property
    @abstractmethod
    def denoiser(self) -> nn.Module:
        """The U-Net or transformer."""

    @property
    @abstractmethod
    def text_encoders(self) -> list[nn.Module]:
        """In the order of sd-scripts' `--text_encoder_lr`."""

    @property
    def tokenizers(self) -> list[Any]:
        """Of transformers', in the order of their names."""
        parts = self.pipeline.components
        return [parts[name] for name in sorted(parts) if name.startswith("tokenizer")]

    @property
    def vae(self) -> AutoencoderKL:
        """In float32, always: others overflow in float16."""
        return self.pipeline.vae

    @property
    def pixels_per_latent(self) -> int:
        """Of a side; 8 for the published models."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def multiple_of(self) -> int:
        """Pixels that a picture's sides have to be a multiple of."""
        return self.pixels_per_latent

    @torch.no_grad()
    def encode_image(self, pixels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Latents (b, c, h, w) in the model's own scale, of pixels (b, 3, height, width) in [-1, 1].

        :param generators: on the CPU, one a picture, that draw from the VAE's distribution
        """
        config = self.vae.config
        found = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        noise = [torch.randn(found.mean.shape[1:], generator=generator) for generator in generators]
        latents = found.mean + found.std * sent(torch.stack(noise), found.mean.device)
        return (latents - (config.get("shift_factor") or 0)) * config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Image.Image:
        """A picture of latents (1, c, h, w), in float32 under autocast too: SDXL's VAE overflows in float16. One that
        is too large for the device's memory is put together of tiles."""
        config = self.vae.config
        with torch.autocast(self.vae.device.type, enabled=False):
            latents = latents.to(self.vae.device, self.vae.dtype) / config.scaling_factor
            latents = latents + (config.get("shift_factor") or 0)
            try:
                pixels = self.vae.decode(latents).sample
            except torch.OutOfMemoryError:
                pixels = None  # and not here, where the error holds what had been computed
            if pixels is None:
                pixels = self._of_tiles(latents)
        return self.pipeline.image_processor.postprocess(pixels, output_type="pil")[0]

    def _of_tiles(self, latents: Tensor) -> Tensor:
        """What the VAE makes of latents (1, c, h, w), part by part; each goes over into the next."""
        torch.cuda.empty_cache()
        self.vae.tile_latent_min_size, self.vae.tile_sample_min_size = TILE, TILE * self.pixels_per_latent
        self.vae.enable_tiling()
        try:
            return self.vae.decode(latents).sample
        finally:
            self.vae.disable_tiling()

    def free_text_encoders(self) -> None:
        """Drops them, once what they make of all texts is kept; `text_encoders` is empty then."""
        for name in [name for name in self.pipeline.components if name.startswith("text_encoder")]:
            setattr(self.pipeline, name, None)

    @abstractmethod
    def encode_text(self, captions: list[str], inputs: Sequence[Sequence[Tensor]] = ()) -> Text:
        """What `predict` takes, with gradients where the text encoders are adapted.

        :param inputs: each caption's pictures, as latents (c, h, w), in the order in which it names them; empty where
            no caption has any, as always where `takes_pictures` is not so
        """

    @abstractmethod
    def reading(self) -> Mapping[str, Any]:
        """What decides how captions are encoded, beside encoders and tokenizers; plain values, for keys of caches."""

    @abstractmethod
    def predict(self, noisy: Tensor, timesteps: Tensor, text: Text, sizes: Tensor) -> Tensor:
        """The denoiser's answer, in the shape of the latents.

        :param noisy: (b, c, h, w)
        :param timesteps: (b,) from 0 to 1000, whole ones for the objective "diffusion"
        :param sizes: (b, 6) of each picture in pixels: height and width of the file, top and left of the crop, height
            and width of what is trained
        """

    @abstractmethod
    def beyond(self, caption: str) -> tuple[str, int]:
        """What of a caption is cut, and the number of tokens that are read."""

    def drawing_inputs(self, prompt: Text, negative: Text | None) -> dict[str, Tensor]:
        """What the pipeline's call takes instead of `prompt` and `negative_prompt`; of families without own
        `conditions`."""
        raise NotImplementedError

    def guidance(self, prompt: Prompt) -> dict[str, float]:
        """The pipeline's arguments for it."""
        return {"guidance_scale": GUIDANCE if prompt.guidance is None else prompt.guidance}

    def conditions(
        self, prompt: Prompt, text: Text, negative: Text | None, inputs: Sequence[Tensor]
    ) -> Mapping[str, Any]:
        """The pipeline's arguments for what is asked for and how strongly; parameters as `draw` has them."""
        return {**self.drawing_inputs(text, negative), **self.guidance(prompt)}

    @abstractmethod
    def names(self) -> Mapping[str, str]:
        """What a file's metadata calls it: `ss_...` and `modelspec....`."""

    def quantise(self, device: torch.device, dtype: torch.dtype) -> None:
        """--quantize_base, on the CPU again behind it. What is to be merged into the denoiser has been by now.

        :raises DeftError: where the package for it does not do it here
        """
        if self.options.quantize_base:
            quantise(self.denoiser, self.options.quantize_base, device, dtype)

    def swappable(self) -> list[tuple[nn.Module, ...]]:
        """The denoiser's blocks that --blocks_to_swap counts, in their order; what counts as one is together."""
        return [(block,) for block in blocks_of(self.denoiser)]

    def place(self, device: torch.device, dtype: torch.dtype, encoders: bool) -> None:
        """The frozen parts that every step needs, in the training's precision, with the memory options.

        :param encoders: whether the text encoders are needed in every step
        :raises DeftError: where blocks are to be swapped, and cannot be
        """
        # cuDNN's attention, torch's first choice on an H100 since 2.11, fails in its backward pass: with some masks
        # (pytorch 196678), and in FLUX.1, whose single and double blocks give it gradients of two layouts
        torch.backends.cuda.enable_cudnn_sdp(False)
        parts = [self.denoiser, *(self.text_encoders if encoders else ())]
        checkpointing: Any = _checkpointed
        if self.options.torch_compile:
            checkpointing = functools.partial(checkpoint, use_reentrant=False)  # the same graph both times
        for part in parts:
            nn.Module.to(part, dtype=dtype)  # transformers hides its signature
            if part is self.denoiser and (self.options.fp8_base or self.options.quantize_base):
                read_anew(self.denoiser)
            if part is self.denoiser and self.options.fp8_base:
                keep_in_fp8(part, dtype)
            if part is self.denoiser and (waiting := self._waiting(device)):
                checkpointing = functools.partial(_swapped_or_not, Swapping(part, waiting, device))
            else:
                nn.Module.to(part, device)
            if part is self.denoiser and self._checkpoints_wait(device):
                checkpointing = functools.partial(_kept_by_the_host, checkpointing)
        if self.options.xformers:
            try:
                self.denoiser.enable_xformers_memory_efficient_attention()  # type: ignore[operator]
            except Exception as error:  # not installed, not for this torch or device
                logger.warning(f"--xformers: torch's own attention is used instead ({reason_of(error)})")
        if self.options.gradient_checkpointing:
            for part in parts:
                part.train()
                if hasattr(part, "enable_gradient_checkpointing"):
                    part.enable_gradient_checkpointing(checkpointing)
                else:
                    part.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.options.torch_compile:
            compile_blocks(self.denoiser, self.options.torch_compile)

    def _checkpoints_wait(self, device: torch.device) -> bool:
        """Whether --cpu_offload_checkpointing has an effect."""
        if self.options.cpu_offload_checkpointing and device.type in _SHARED:
            logger.warning(f"--cpu_offload_checkpointing: no effect on {device.type}, whose memory is the host's")
        return self.options.cpu_offload_checkpointing and device.type not in _SHARED

    def _waiting(self, device: torch.device) -> list[nn.Module]:
        """The blocks of --blocks_to_swap."""
        number = self.options.blocks_to_swap
        if number and device.type in _SHARED:
            logger.warning(f"--blocks_to_swap: no effect on {device.type}, whose memory is the host's")
            return []
        return spread(self.swappable(), number)

    @abstractmethod
    def sampler(self, name: str | None) -> Any:
        """A scheduler of diffusers' for pictures.

        :param name: of sd-scripts' `--sample_sampler`; None for the default
        :raises DeftError: for one that the family does not have
        """

    @torch.no_grad()
    def drawn(
        self,
        prompt: Prompt,
        text: Text,
        negative: Text | None,
        sampler: str | None = None,
        bar: Bar | None = None,
        inputs: Sequence[Tensor] = (),
    ) -> Tensor:
        """The latents (1, c, h, w) of one picture, by the family's own pipeline. All parts have to be on one device.

        :param text: of the prompt, and of its pictures
        :param negative: of the negative prompt, which a guidance above 1 needs
        :param sampler: see `sampler`
        :param bar: that counts the prompt's steps
        :param inputs: the prompt's pictures, as `encode_text` takes them; only where `takes_pictures` is so
        """
        trained_with = self.pipeline.scheduler
        self.pipeline.scheduler = self.sampler(sampler)
        try:
            latents = self.pipeline(
                **self.conditions(prompt, text, negative, inputs),
                width=prompt.width,
                height=prompt.height,
                num_inference_steps=prompt.steps,
                generator=prompt.generator(),
                output_type="latent",
                callback_on_step_end=None if bar is None else counted_by(bar),
            ).images
        finally:
            self.pipeline.scheduler = trained_with
        return latents

    def draw(
        self,
        prompt: Prompt,
        text: Text,
        negative: Text | None,
        sampler: str | None = None,
        bar: Bar | None = None,
        inputs: Sequence[Tensor] = (),
    ) -> Image.Image:
        """One picture; parameters as `drawn` has them."""
        return self.decode(self.drawn(prompt, text, negative, sampler, bar, inputs))


def _kept_by_the_host(checkpointing: Any, block: nn.Module, *given: Any) -> Any:
    """A checkpoint whose inputs are in the host's memory until the backward pass."""
    with save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpointing(block, *given)


def _swapped_or_not(swapping: Swapping, block: nn.Module, *given: Any) -> Any:
    return swapping.checkpointed(block, *given) if block in swapping else _checkpointed(block, *given)


def _checkpointed(block: nn.Module, *given: Any) -> Any:
    """A block whose inputs alone are kept for the backward pass. The reentrant way takes a seventh less of the
    processor's time, which bounds SDXL's steps; it needs an input that has gradients."""
    reentrant = any(isinstance(one, Tensor) and one.requires_grad for one in given)
    return checkpoint(block, *given, use_reentrant=reentrant)
