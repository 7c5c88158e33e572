"""Stable Diffusion 1.x and 2.x, and what SDXL has in common with them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from library.models import clip, samplers
from library.models.family import Family, Text
from library.models.outline import Encoder, Outline, config_of, pixels_per_latent
from library.models.reading import (
    CONFIGS,
    blank_parts,
    check_tokenizer,
    check_whole,
    of_folder,
    shapes_of,
    tokenizer_from,
)
from library.models.vae import load_vae, own_vae
from library.options.rooms import ModelOptions
from networks.deft_config import DeftError, reason_of

logger = logging.getLogger(__name__)


class StableDiffusion(Family):
    """See `Family`; `hidden` of its texts is (captions, tokens + 2, width).

    :param readers: of captions, one a text encoder
    :param velocity: whether the model predicts velocity, instead of noise
    :param zero_snr: whether its last timestep has nothing but noise
    """

    objective = "diffusion"

    def __init__(
        self,
        path: Path,
        pipeline: DiffusionPipeline,
        options: ModelOptions,
        readers: list[clip.Reader],
        velocity: bool,
        zero_snr: bool,
    ):
        super().__init__(path, pipeline, options)
        self.readers, self.velocity, self.zero_snr = readers, velocity, zero_snr

    @property
    def denoiser(self) -> nn.Module:
        """See `Family`."""
        return self.pipeline.unet

    @property
    def text_encoders(self) -> list[nn.Module]:
        """See `Family`: CLIP-L's, or OpenCLIP-H's of 2.x; SDXL's two."""
        encoders = (getattr(self.pipeline, name, None) for name in ("text_encoder", "text_encoder_2"))
        return [encoder for encoder in encoders if encoder is not None]

    @property
    def is_v2(self) -> bool:
        """Whether its text encoder is Stable Diffusion 2's."""
        return self.pipeline.unet.config.cross_attention_dim == 1024

    def noise_scheduler(self) -> DDPMScheduler:
        """The training's noise schedule, from the model's own configuration."""
        return DDPMScheduler.from_config(
            self.pipeline.scheduler.config,
            clip_sample=False,
            prediction_type="v_prediction" if self.velocity else "epsilon",
            rescale_betas_zero_snr=self.zero_snr,
        )

    def encode_text(self, captions: list[str], inputs: Sequence[Sequence[Tensor]] = ()) -> Text:
        """See `Family`: `hidden`."""
        (encoder,), (reader,) = self.text_encoders, self.readers
        found = clip.states(encoder, reader.tokens(captions))
        hidden = clip.last_norm(encoder)(found.hidden_states[-(self.options.clip_skip or 1)])
        return {"hidden": clip.weighed(clip.joined(hidden, reader.windows), reader.weights(captions))}

    def reading(self) -> dict[str, Any]:
        """See `Family`."""
        readers = [[one.padding, one.window, one.windows, one.weighted] for one in self.readers]
        return {"family": type(self).__name__, "clip_skip": self.options.clip_skip, "readers": readers}

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Text, sizes: Tensor) -> Tensor:
        """See `Family`."""
        return self.pipeline.unet(noisy, timesteps, text["hidden"].to(noisy)).sample

    def beyond(self, caption: str) -> tuple[str, int]:
        """See `Family`."""
        return self.readers[0].beyond(caption)

    def drawing_inputs(self, prompt: Text, negative: Text | None) -> dict[str, Tensor]:
        """See `Family`."""
        inputs = {"prompt_embeds": prompt["hidden"]}
        return inputs if negative is None else inputs | {"negative_prompt_embeds": negative["hidden"]}

    def sampler(self, name: str | None) -> Any:
        """See `Family`."""
        return samplers.sampler(name, self.noise_scheduler().config)

    def names(self) -> dict[str, str]:
        """See `Family`."""
        architecture = "stable-diffusion-v1"
        if self.is_v2:
            architecture = "stable-diffusion-v2-768-v" if self.velocity else "stable-diffusion-v2-512"
        version = f"sd_{'v2' if self.is_v2 else 'v1'}{'_v' if self.velocity else ''}"
        return self._names(version, architecture, self.is_v2)

    def _names(self, version: str, architecture: str, v2: bool) -> dict[str, str]:
        options = self.options
        more = {} if options.vae is None else {"ss_vae_name": Path(options.vae).name}
        if options.clip_skip is not None:
            more["modelspec.encoder_layer"] = str(options.clip_skip)
        return more | {
            "ss_v2": str(v2),
            "ss_base_model_version": version,
            "ss_sd_model_name": self.path.name,
            "ss_zero_terminal_snr": str(self.zero_snr),
            "modelspec.architecture": f"{architecture}/lora",
            "modelspec.prediction_type": "v" if self.velocity else "epsilon",
        }


def load(location: Path, options: ModelOptions, dtype: torch.dtype, empty: bool = False) -> StableDiffusion:
    """See `library.models.loading.load`."""
    v2 = location.is_file() and any(key.startswith("cond_stage_model.model.") for key in shapes_of(location))
    config, others = (CONFIGS / "sd2", [clip.SD2]) if v2 else (CONFIGS / "sd15", [])
    given = tokenizers_of(location, options, ["tokenizer"], others) | {"safety_checker": None}
    pipeline = load_pipeline(StableDiffusionPipeline, location, config, options, dtype, given, empty)
    if not empty:
        check_whole(location, pipeline, {"unet": "", "text_encoder": "text_model."})
    encoder, unet = pipeline.text_encoder.config, pipeline.unet.config
    v2 = unet.cross_attention_dim == 1024
    if options.v2 and not v2:
        raise DeftError(f"--v2: {location} is of Stable Diffusion 1.x; leave the option out")
    if options.clip_skip is not None and options.clip_skip > encoder.num_hidden_layers:
        raise DeftError(f"--clip_skip={options.clip_skip}: the text encoder has {encoder.num_hidden_layers} layers")
    velocity, zero_snr = prediction_of(location, pipeline, options)
    if v2 and location.is_file() and not velocity:
        logger.info(f"{location.name}: taken as predicting noise; for 768-v models, give --v_parameterization")
    padding = clip.OPEN_CLIP_PADDING if v2 else pipeline.tokenizer.eos_token_id
    pipeline.tokenizer.pad_token_id = padding
    positions, length = encoder.max_position_embeddings, options.max_token_length
    reader = clip.Reader(pipeline.tokenizer, padding, positions, length, options.weighted_captions)
    return StableDiffusion(location, pipeline, options, [reader], velocity, zero_snr)


def outline(location: Path, options: ModelOptions) -> Outline:
    """See `library.models.loading.outline_of`."""
    v2 = location.is_file() and any(key.startswith("cond_stage_model.model.") for key in shapes_of(location))
    found = tokenizers_of(location, options, ["tokenizer"], [clip.SD2] if v2 else [])
    return Outline(pixels_per_latent(location), (clip_outline("CLIP", "text_encoder", found, location, options),))


def clip_outline(
    name: str, part: str, found: Mapping[str, PreTrainedTokenizerBase], location: Path, options: ModelOptions
) -> Encoder:
    """What a CLIP text encoder reads of a caption.

    :param part: its folder, which says how many positions it has
    :param found: tokenizers that are not the folder's own
    """
    tokenizer = found.get("tokenizer") or tokenizer_from(str(location / "tokenizer"))
    positions = config_of(location, part).get("max_position_embeddings", clip.WINDOW + 2)
    padding = 0  # counts for nothing
    return clip.Reader(tokenizer, padding, positions, options.max_token_length, options.weighted_captions).outline(name)


def load_pipeline(
    kind: Any,
    location: Path,
    config: Path,
    options: ModelOptions,
    dtype: torch.dtype,
    given: Mapping[str, Any],
    empty: bool,
) -> DiffusionPipeline:
    """A pipeline with its parts frozen and in evaluation mode: all in `dtype` from the start, the VAE in float32.

    :param kind: diffusers' class
    :param config: a folder of `configs/`, for single files
    :param given: parts and options of the pipeline
    :param empty: see `library.models.loading.load`
    :raises DeftError: when it cannot be read, or is for inpainting
    """
    folder = location if location.is_dir() else config
    try:
        if empty or location.is_dir():
            parts = blank_parts(folder, dtype) if empty else {"vae": own_vae(location, config)}
            how = (of_folder(folder) if location.is_dir() else {"local_files_only": True}) | parts | dict(given)
            pipeline = kind.from_pretrained(str(folder), dtype=dtype, **how)
        else:
            how = {"config": str(config), "local_files_only": True, "vae": own_vae(location, config)} | dict(given)
            pipeline = kind.from_single_file(str(location), dtype=dtype, **how)
        vae = pipeline.vae
    except Exception as error:  # what the libraries raise for files that are no model is of many kinds
        raise DeftError(f"{location}: not a readable Stable Diffusion model ({reason_of(error)})") from error
    for name in pipeline.components.keys() & {"tokenizer", "tokenizer_2"}:
        check_tokenizer(getattr(pipeline, name), location)
    if not empty:
        check_whole(location, pipeline, {"vae": ""})
    channels = pipeline.unet.config.in_channels
    if channels != vae.config.latent_channels:
        raise DeftError(
            f"{location}: its U-Net takes {channels} channels, as for inpainting, which is not trained here"
        )
    if options.vae and not empty:  # which is of the same sizes
        pipeline.vae = load_vae(options.vae, vae)
        logger.info(f"VAE: {options.vae}")
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    return pipeline


def tokenizers_of(
    location: Path, options: ModelOptions, names: Sequence[str], others: Sequence[clip.Place]
) -> dict[str, PreTrainedTokenizerBase]:
    """Those of --tokenizer or, for a single file, from where sd-scripts keeps them; one object each, since they pad
    differently."""
    if location.is_dir() and not options.tokenizer:
        return {}
    return {name: clip.find(options, others) for name in names}


def prediction_of(location: Path, pipeline: DiffusionPipeline, options: ModelOptions) -> tuple[bool, bool]:
    """Whether the model predicts velocity, and whether its last timestep has nothing but noise: by the folder's
    scheduler, marks in the single file, and the options; the pipeline's scheduler learns it.

    :raises DeftError: for a folder of another kind of model
    """
    config = pipeline.scheduler.config
    if "beta_start" not in config or config.prediction_type not in ("epsilon", "v_prediction"):
        raise DeftError(
            f"{location}: its {type(pipeline.scheduler).__name__} is not of Stable Diffusion's training; such models "
            f"are not trained here"
        )
    marks = shapes_of(location).keys() & {"v_pred", "ztsnr"} if location.is_file() else set()  # NoobAI's, and others'
    if marks:
        logger.info(f"{location.name} says {' and '.join(sorted(marks))} of itself: trained accordingly")
    velocity = config.prediction_type == "v_prediction" or "v_pred" in marks
    if options.v_parameterization and not velocity and location.is_dir():
        logger.warning(f"--v_parameterization is followed, though the scheduler of {location} says epsilon")
    velocity = velocity or options.v_parameterization
    zero_snr = bool(options.zero_terminal_snr or config.get("rescale_betas_zero_snr") or "ztsnr" in marks)
    if zero_snr and not velocity:
        logger.warning("--zero_terminal_snr is meant for models that predict velocity, which this one does not")
    pipeline.scheduler = type(pipeline.scheduler).from_config(
        config, prediction_type="v_prediction" if velocity else "epsilon", rescale_betas_zero_snr=zero_snr
    )
    return velocity, zero_snr
