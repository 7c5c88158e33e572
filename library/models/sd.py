"""Stable Diffusion 1.x and 2.x: loading, text and image encoding, prediction."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from library.options.rooms import ModelOptions
from networks.deft_config import DeftError, read_text, reason_of
from networks.deft_io import is_adapter_dict

CLIP_L = "openai/clip-vit-large-patch14"
CONFIGS = Path(__file__).parent / "configs" / "sd15"


# diffusers' names of single files' models, in words
_KINDS = {"v2": "a single file of Stable Diffusion 2.x", "xl_base": "SDXL", "xl_refiner": "SDXL's refiner",
          "inpainting": "an inpainting model", "flux-dev": "FLUX.1 dev", "flux-schnell": "FLUX.1 schnell",
          "sd3": "Stable Diffusion 3", "controlnet": "a ControlNet"}  # fmt: skip


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

    def names(self) -> dict[str, str]:
        """What a file's metadata calls it."""
        velocity = self.noise_scheduler().config.prediction_type == "v_prediction"
        architecture = "stable-diffusion-v1"
        if self.is_v2:
            architecture = "stable-diffusion-v2-768-v" if velocity else "stable-diffusion-v2-512"
        return {
            "ss_v2": str(self.is_v2),
            "ss_base_model_version": f"sd_{'v2' if self.is_v2 else 'v1'}",
            "ss_sd_model_name": self.name,
            "modelspec.architecture": f"{architecture}/lora",
            "modelspec.prediction_type": "v" if velocity else "epsilon",
        }

    def place(self, device: torch.device, dtype: torch.dtype, options: ModelOptions) -> None:
        """The frozen parts that every step needs, in the training's precision, with the memory options.

        :raises DeftError: when xformers is asked for and missing
        """
        self.unet.to(device, dtype)
        nn.Module.to(self.text_encoder, device, dtype)  # transformers hides its signature
        if options.xformers:
            try:
                self.unet.enable_xformers_memory_efficient_attention()
            except (ImportError, ValueError) as error:
                raise DeftError(f"--xformers: {reason_of(error)}; leave the option out") from None
        if options.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            self.unet.train()
            self.text_encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.text_encoder.train()

    @property
    def tokens(self) -> int:
        """That the text encoder reads of a caption, the two at its ends not counted."""
        return self.text_encoder.config.max_position_embeddings - 2

    def text_beyond(self, caption: str) -> str:
        """What of a caption is cut."""
        ids = self.tokenizer(caption, verbose=False).input_ids[1:-1]
        return str(self.tokenizer.decode(ids[self.tokens :])).strip()

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
    if not os.path.exists(path):
        raise DeftError(f"--pretrained_model_name_or_path: no such model: {path} (a Diffusers folder or .safetensors)")
    if location.is_dir() and not (location / "model_index.json").is_file():
        raise DeftError(f"{path}: no Diffusers model folder, since it has no model_index.json")
    if location.is_file() and location.suffix != ".safetensors":
        raise DeftError(f"{path}: only .safetensors checkpoints are read, since others can run code; convert it first")
    diffusers.utils.logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()
    _refuse_other_models(location)
    try:
        if location.is_dir():
            given = {"tokenizer": _tokenizer_from(tokenizer)} if tokenizer else {}
            pipeline = StableDiffusionPipeline.from_pretrained(str(location), **of_folder(location), **given)
        else:
            found = find_tokenizer(tokenizer, tokenizer_cache_dir)
            pipeline = StableDiffusionPipeline.from_single_file(
                str(location), config=str(CONFIGS), tokenizer=found, safety_checker=None, local_files_only=True
            )
    except DeftError:
        raise
    except Exception as error:  # what the libraries raise for files that are no model is of many kinds
        raise DeftError(f"{path}: not a readable Stable Diffusion 1.x or 2.x model ({reason_of(error)})") from error
    _check_tokenizer(pipeline.tokenizer, path)
    _check_whole(location, pipeline)
    channels = pipeline.unet.config.in_channels
    if channels != pipeline.vae.config.latent_channels:
        raise DeftError(f"{path}: its U-Net takes {channels} channels, as for inpainting, which is not trained here")
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval().float()
    return StableDiffusion(
        location.name, location, pipeline.tokenizer, pipeline.text_encoder, pipeline.vae, pipeline.unet, pipeline
    )


def of_folder(folder: Path) -> dict[str, Any]:
    """Options for a pipeline's `from_pretrained`: no hub and no pickles, none of the parts that only look at finished
    pictures, and the variant (such as fp16) where a part is there in no other."""
    index = _index_of(folder)
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
    options |= dict.fromkeys(index.keys() & {"safety_checker", "feature_extractor", "image_encoder"})
    for part in (folder / name for name in index):
        names = [path.name.removesuffix(".safetensors") for path in part.glob("*model*.safetensors")]
        if names and all("." in name for name in names):  # diffusion_pytorch_model.fp16-00001-of-00002
            options["variant"] = names[0].split(".")[1].split("-0")[0]
    return options


def _refuse_other_models(location: Path) -> None:
    """:raises DeftError: for a model that is something else than Stable Diffusion 1.x or 2.x, saying what"""
    if location.is_dir():
        kind = str(_index_of(location).get("_class_name"))
        known = kind == StableDiffusionPipeline.__name__
    else:
        try:
            with safe_open(str(location), "pt") as file:
                shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
        except (SafetensorError, OSError) as error:
            raise DeftError(f"{location}: not a whole safetensors file ({reason_of(error)})") from None
        kind = infer_diffusers_model_type({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
        known = kind == "v1" and not is_adapter_dict(shapes)
        kind = "an adapter, no model" if is_adapter_dict(shapes) else _KINDS.get(kind, kind)
    if not known:
        raise DeftError(
            f"{location}: this looks like {kind}; so far, Stable Diffusion 1.x is trained here, and 2.x from Diffusers "
            f"folders. sd-scripts trains others with --network_module networks.deft"
        )


def _check_whole(location: Path, pipeline: StableDiffusionPipeline) -> None:
    """:raises DeftError: when a weight is missing, which the libraries leave without a value, or draw at random"""
    for name in ("unet", "vae", "text_encoder"):
        expected = dict(getattr(pipeline, name).named_parameters())
        missing = [key for key, weight in expected.items() if weight.is_meta]
        if location.is_dir():
            held: set[str] = set()
            for file in (location / name).glob("*.safetensors"):
                with safe_open(str(file), "pt") as opened:
                    held |= {key.removeprefix("text_model.") for key in opened.keys()}
            # a VAE's attention has other names in older files
            missing += [
                key for key in expected if name == "text_encoder" and key.removeprefix("text_model.") not in held
            ]
        if missing:
            raise DeftError(f"{location}: {len(missing)} weights of its {name} are missing, {missing[0]} for one")


def _index_of(folder: Path) -> dict[str, Any]:
    """A Diffusers folder's list of parts.

    :raises DeftError: when it cannot be read
    """
    try:
        index = json.loads(read_text(folder / "model_index.json", f"{folder / 'model_index.json'}:"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DeftError(f"{folder / 'model_index.json'}: no JSON ({reason_of(error)})") from None
    return index if isinstance(index, dict) else {}


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
        raise DeftError(f"{folder}: no CLIP tokenizer there ({reason_of(error)})") from None
    _check_tokenizer(tokenizer, folder)
    return tokenizer


def _check_tokenizer(tokenizer: CLIPTokenizer, source: str) -> None:
    """transformers 5 makes an empty tokenizer, which knows no letter, where it finds no files."""
    if len(tokenizer) < 256:
        raise DeftError(f"{source}: no CLIP tokenizer there (vocab.json and merges.txt, or tokenizer.json)")
