"""Which family a model is of, seen from its tensors or its folder's index, and the one place that loads it."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import diffusers
import torch
import transformers
from diffusers.loaders.single_file_utils import infer_diffusers_model_type

from library.models import flux, omnigen, sd, sdxl
from library.models.family import Family
from library.models.outline import Outline
from library.models.reading import index_of, other_than, shapes_of
from library.options.rooms import ModelOptions
from networks.deft_config import DeftError

# diffusers' name of a single file's model, or of a folder's pipeline -> the module with its `load` and `outline`
FAMILIES: dict[str, ModuleType] = {
    "v1": sd,
    "v2": sd,
    "StableDiffusionPipeline": sd,
    "xl_base": sdxl,
    "StableDiffusionXLPipeline": sdxl,
    **dict.fromkeys(("flux-dev", "flux-schnell", "FluxPipeline"), flux),
    "OmniGenPipeline": omnigen,
}

# diffusers' names of models that are not trained here, in words
_OTHERS = {
    **dict.fromkeys(("xl_refiner", "StableDiffusionXLImg2ImgPipeline"), "SDXL's refiner"),
    **dict.fromkeys(
        ("inpainting", "inpainting_v2", "xl_inpaint", "StableDiffusionInpaintPipeline",
         "StableDiffusionXLInpaintPipeline"),
        "an inpainting model",
    ),
    **dict.fromkeys(("sd3", "sd35_medium", "sd35_large", "StableDiffusion3Pipeline"), "Stable Diffusion 3"),
    **dict.fromkeys(("controlnet", "controlnet_xl_small", "controlnet_xl_mid", "controlnet_xl_large"), "a ControlNet"),
    "playground-v2-5": "Playground 2.5",
    "upscale": "an upscaler",
    "chroma": "Chroma",
    "flux-fill": "FLUX.1 Fill",
    "flux-depth": "FLUX.1 Canny or Depth",
    "flux-2-dev": "FLUX.2",
    "flux-3-image": "FLUX.3",
}  # fmt: skip


def load(options: ModelOptions, dtype: torch.dtype = torch.float32, empty: bool = False) -> Family:
    """A Diffusers folder or a single-file checkpoint, frozen, on the CPU, asking no hub.

    :param dtype: of all parts but the VAE, which has float32
    :param empty: made of its configurations alone, in a second or two; its weights are on the meta device

    :raises DeftError: when the model or, for a single file, its tokenizer cannot be found or read, or its family is not
        trained here
    """
    family, location = _recognised(options)
    return family.load(location, options, dtype, empty)


def outline_of(options: ModelOptions) -> Outline:
    """What is known of the same without reading its weights.

    :raises DeftError: as `load`, but for what only the weights show
    """
    family, location = _recognised(options)
    return family.outline(location, options)


def _recognised(options: ModelOptions) -> tuple[ModuleType, Path]:
    path = options.pretrained_model_name_or_path
    location = Path(path)
    if not os.path.exists(path):
        raise DeftError(f"--pretrained_model_name_or_path: no such model: {path} (a Diffusers folder or .safetensors)")
    diffusers.utils.logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()
    if omnigen.is_original(location):
        return omnigen, location
    if location.is_dir() and not (location / "model_index.json").is_file():
        raise DeftError(f"{path}: no Diffusers model folder, since it has no model_index.json")
    if location.is_file() and location.suffix not in (".safetensors", ".sft"):
        raise DeftError(f"{path}: only .safetensors checkpoints are read, since others can run code; convert it first")
    kind = str(index_of(location).get("_class_name")) if location.is_dir() else _kind_of_file(location)
    if kind not in FAMILIES:
        raise DeftError(
            f"{path}: this looks like {_OTHERS.get(kind, kind)}, which is not trained here; sd-scripts may, with "
            f"--network_module networks.deft"
        )
    return FAMILIES[kind], location


def _kind_of_file(location: Path) -> str:
    shapes = shapes_of(location)
    other = other_than("pretrained_model_name_or_path", shapes)
    if other:
        raise DeftError(f"--pretrained_model_name_or_path {location}: {other}; give the model")
    return infer_diffusers_model_type({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
