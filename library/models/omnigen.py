"""OmniGen, version 1: one transformer that reads text and pictures, and makes a picture."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, OmniGenTransformer2DModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from library import placeholders
from library.models import omnigen_drawing, omnigen_sequence, samplers
from library.models.family import Family, Text
from library.models.outline import Encoder, Outline, config_of, pixels_per_latent
from library.models.reading import blank, check_whole, index_of, part_of_folder, shapes_of, tokenizer_from, whole
from library.models.vae import load_vae, own_vae
from library.options.rooms import ModelOptions
from library.prompts import Prompt
from networks import deft_architectures, deft_targets
from networks.deft_config import DeftError, read_text, reason_of
from networks.deft_names import renamed

logger = logging.getLogger(__name__)


class OmniGen(Family):
    """See `Family`. It has no text encoder: words and pictures go through the transformer that is trained."""

    objective = "flow"
    takes_pictures = True
    dropped = "<cfg>"
    timestep_sampling = "sigmoid"  # the original's train_helper/loss.py; its answer is taken as it is
    model_prediction_type = "raw"

    @property
    def denoiser(self) -> nn.Module:
        """See `Family`."""
        return self.pipeline.transformer

    @property
    def text_encoders(self) -> list[nn.Module]:
        """See `Family`."""
        return []

    @property
    def multiple_of(self) -> int:
        """See `Family`: a token is 2 x 2 latents."""
        return self.pipeline.transformer.config.patch_size * self.pixels_per_latent

    def encode_text(self, captions: list[str], inputs: Sequence[Sequence[Tensor]] = ()) -> Text:
        """See `Family`, and `omnigen_sequence.encoded`; an empty caption is a dropped one."""
        return self.pipeline.encoded([caption or self.dropped for caption in captions], inputs)

    def reading(self) -> dict[str, Any]:
        """See `Family`."""
        return {"family": type(self).__name__}

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Text, sizes: Tensor) -> Tensor:
        """See `Family`: noise - latents. The model's time is 1 where there is no noise, and it answers with the way
        there, latents - noise."""
        return -omnigen_sequence.answer(self.denoiser, noisy, 1 - timesteps.float() / 1000, text)

    def beyond(self, caption: str) -> tuple[str, int]:
        """See `Family`: nothing is cut."""
        return "", _tokens(dict(self.pipeline.transformer.config))

    def sampler(self, name: str | None) -> Any:
        """See `Family`: Euler's."""
        samplers.tell_euler_alone(name, "OmniGen")
        return FlowMatchEulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)

    def conditions(self, prompt: Prompt, text: Text, negative: Text | None, inputs: Sequence[Tensor]) -> dict[str, Any]:
        """See `Family`: `--l` is the guidance by the text, 2.5 by default, `--g` that by its pictures, 1.6; an empty
        negative prompt is that of diffusers' and the original's pipeline."""
        if not prompt.negative or negative is None:
            negative = self.pipeline.encoded([omnigen_drawing.NEGATIVE])
        alone = None
        if inputs:
            names = " ".join(placeholders.placeholder(k + 1) for k in range(len(inputs)))
            alone = self.pipeline.encoded([names], [inputs])
        own = omnigen_drawing.GUIDANCE, omnigen_drawing.PICTURE_GUIDANCE
        asked = prompt.guidance, prompt.embedded_guidance
        guidance = [default if given is None else given for given, default in zip(asked, own, strict=True)]
        return {"terms": omnigen_drawing.guided(text, negative, alone, *guidance)}

    def names(self) -> dict[str, str]:
        """See `Family`; sd-scripts has no such model, the fields are those that it gives to others."""
        _, part = deft_architectures.recognise(self.denoiser)
        return {
            **deft_architectures.base_metadata(self.denoiser, part),
            "ss_sd_model_name": self.path.name,
            "ss_model_type": "omnigen",
            "modelspec.implementation": "https://github.com/VectorSpaceLab/OmniGen",
        }


# --- loading ---------------------------------------------------------------------------------------------------------

# options that mean nothing here
_OF_OTHERS = ("v2", "v_parameterization", "zero_terminal_snr", "clip_skip", "max_token_length", "weighted_captions",
              "clip_l", "t5xxl", "ae", "t5xxl_max_token_length", "apply_t5_attn_mask", "xformers")  # fmt: skip
_ORIGINAL = "model.safetensors"
_THEIRS = next(
    part
    for row in deft_architectures.ARCHITECTURES
    if row.name == "OmniGen"
    for part in row.denoisers
    if part.form == "original"
)
_QKV = "llm.layers.0.self_attn.qkv_proj.weight"
# the original's paths of what is not in `deft_architectures`, to diffusers'
_RENAMES = (
    (r"^llm\.", ""),
    (r"^pos_embed$", "patch_embedding.pos_embed"),
    (r"^x_embedder\.proj\b", "patch_embedding.output_image_proj"),
    (r"^input_x_embedder\.proj\b", "patch_embedding.input_image_proj"),
    (r"^(time_token|t_embedder)\.mlp\.0\b", r"\1.linear_1"),
    (r"^(time_token|t_embedder)\.mlp\.2\b", r"\1.linear_2"),
    (r"^final_layer\.adaLN_modulation\.1\b", "norm_out.linear"),
    (r"^final_layer\.linear\b", "proj_out"),
)


def is_original(location: Path) -> bool:
    """Whether it is a folder of the original's, with all that it needs beside the transformer but perhaps its VAE."""
    file = location / _ORIGINAL
    if not location.is_dir() or (location / "model_index.json").exists() or not file.is_file():
        return False
    return _QKV in shapes_of(file)


def is_known(location: Path) -> bool:
    """Whether it is a folder of OmniGen's, in either form."""
    if (location / "model_index.json").is_file():
        return index_of(location).get("_class_name") == "OmniGenPipeline"
    return is_original(location)


def load(location: Path, options: ModelOptions, dtype: torch.dtype, empty: bool = False) -> OmniGen:
    """See `library.models.loading.load`; a Diffusers folder, or one of the original's."""
    unused = [f"--{name}" for name in _OF_OTHERS if getattr(options, name)]
    if unused:
        logger.warning(f"{', '.join(unused)}: without effect, OmniGen has nothing of the kind")
    options = replace(options, xformers=False)  # whose attention of diffusers' leaves positions out
    original = is_original(location)
    try:
        if empty:
            vae = blank(AutoencoderKL, location / "vae", torch.float32)
            sizes = _sizes(_config(location), shapes_of(location / _ORIGINAL)) if original else location / "transformer"
            transformer = blank(OmniGenTransformer2DModel, sizes, dtype)
        else:
            vae = own_vae(location, location)
            transformer = (
                _original_transformer(location, dtype)
                if original
                else part_of_folder(OmniGenTransformer2DModel, location / "transformer", dtype)
            )
        pipeline: DiffusionPipeline = omnigen_drawing.Pipeline(
            transformer=transformer,
            scheduler=_scheduler(location / "scheduler"),
            vae=load_vae(options.vae, vae) if options.vae and not empty else vae,
            tokenizer=_tokenizer(location, options),
        )
    except DeftError:
        raise
    except Exception as error:  # what the libraries raise for files that are no model is of many kinds
        raise DeftError(f"{location}: not a readable OmniGen model ({reason_of(error)})") from error
    if not empty:
        check_whole(location, pipeline, {"vae": ""})
    pipeline.set_progress_bar_config(disable=True)
    for name in ("transformer", "vae"):
        getattr(pipeline, name).requires_grad_(False).eval()
    return OmniGen(location, pipeline, options)


def outline(location: Path, options: ModelOptions) -> Outline:
    """See `library.models.loading.outline_of`."""
    tokenizer = _tokenizer(location, options)
    config = _config(location) if is_original(location) else config_of(location, "transformer")

    def ids(caption: str) -> list[int]:
        return list(tokenizer(caption, add_special_tokens=False, verbose=False).input_ids)

    return Outline(2 * pixels_per_latent(location), (Encoder("OmniGen", tokenizer, ids, _tokens(config)),), True)


def _tokens(config: dict[str, Any]) -> int:
    """The longest sequence that the model knows positions of."""
    return config.get("max_position_embeddings", 131072)


def _tokenizer(location: Path, options: ModelOptions) -> Any:
    """As its tokenizer.json says, which it was trained with; transformers 5 makes another of a LlamaTokenizer."""
    folder = location if is_original(location) else location / "tokenizer"
    return tokenizer_from(options.tokenizer or str(folder), PreTrainedTokenizerFast)


def _scheduler(folder: Path) -> FlowMatchEulerDiscreteScheduler:
    """Times from 0, noise, to 1."""
    own = {"invert_sigmas": True, "num_train_timesteps": 1}
    if not folder.is_dir():  # the original's
        return FlowMatchEulerDiscreteScheduler(**own)
    found = FlowMatchEulerDiscreteScheduler.from_pretrained(str(folder), local_files_only=True)
    return FlowMatchEulerDiscreteScheduler.from_config(found.config, **own)


def _config(location: Path) -> dict[str, Any]:
    """The original's configuration, of its language model.

    :raises DeftError: when it cannot be read
    """
    file = location / "config.json"
    try:
        found = json.loads(read_text(file, f"{file}:"))
    except (ValueError, RecursionError) as error:
        raise DeftError(f"{file}: no JSON ({reason_of(error)})") from None
    return found if isinstance(found, dict) else {}


def _original_transformer(location: Path, dtype: torch.dtype) -> nn.Module:
    """Of the original's file, in diffusers' form; tensors are read and cast one by one."""
    file, config = location / _ORIGINAL, _config(location)
    state: dict[str, Tensor] = {}
    with safe_open(str(file), "pt") as opened:
        for key in opened.keys():
            path, weight = key.removesuffix(".weight"), ".weight" if key.endswith(".weight") else ""
            paths = deft_targets.parts_of(path, _THEIRS) or [renamed(path, _THEIRS.renames)]
            for one, tensor in zip(paths, opened.get_tensor(key).to(dtype).chunk(len(paths)), strict=True):
                state[renamed(one + weight, _RENAMES)] = tensor
    with init_empty_weights():
        transformer = OmniGenTransformer2DModel(**_sizes(config, shapes_of(file)))
    found = transformer.load_state_dict(state, strict=False, assign=True)
    return whole(transformer, file, found.missing_keys)


def _sizes(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Diffusers' configuration, of the original's and of its tensors."""
    names = ("hidden_size", "rms_norm_eps", "num_attention_heads", "num_key_value_heads", "intermediate_size",
             "vocab_size", "pad_token_id", "max_position_embeddings", "original_max_position_embeddings")  # fmt: skip
    _, channels, patch, _ = shapes["x_embedder.proj.weight"]
    return {name: config[name] for name in names} | {
        "in_channels": channels,
        "patch_size": patch,
        "num_layers": config["num_hidden_layers"],
        "rope_base": config["rope_theta"],
        "rope_scaling": {name: config["rope_scaling"][name] for name in ("long_factor", "short_factor")},
        "pos_embed_max_size": math.isqrt(shapes["pos_embed"][1]),
        "time_step_dim": shapes["time_token.mlp.0.weight"][1],
    }
