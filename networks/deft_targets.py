"""Architectures as data: which layers are adapted, under which names, and how their files are recognised.

Key names are those of sd-scripts' networks.lora (commit 48d368fa): prefix, module path, dots as underscores.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeGuard

from torch import Tensor, nn

from networks.deft_config import DeftError

Layer: TypeAlias = nn.Linear | nn.Conv2d


@dataclass(frozen=True)
class Part:
    """One model of an architecture.

    :param prefix: of the key names
    :param model_classes: class names by which the model is recognised
    :param containers: class names of the modules whose Linear and 1x1 Conv2d layers are adapted
    :param conv_containers: those whose layers are adapted too when k x k convolutions are
    :param path_root: beginning of every module path in the file; transformers 5 dropped CLIP's `text_model.`
    """

    prefix: str
    model_classes: tuple[str, ...]
    containers: tuple[str, ...]
    conv_containers: tuple[str, ...] = ()
    path_root: str = ""


@dataclass(frozen=True)
class Architecture:
    """A family of models that share one set of key names; `unet` is the denoiser, whatever its kind."""

    name: str
    unet: Part
    text_encoders: tuple[Part, ...]


_CLIP_CONTAINERS = ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP")

SD = Architecture(
    name="Stable Diffusion 1.x or 2.x",
    unet=Part(
        prefix="lora_unet",
        model_classes=("UNet2DConditionModel", "InferUNet2DConditionModel"),  # the second wraps it in gen_img.py
        containers=("Transformer2DModel",),
        conv_containers=("ResnetBlock2D", "Downsample2D", "Upsample2D"),
    ),
    text_encoders=(Part("lora_te", ("CLIPTextModel",), _CLIP_CONTAINERS, path_root="text_model."),),
)

ARCHITECTURES = (SD,)

# What a foreign file looks made for: the first row whose pattern is found in one of its keys.
_FILE_SIGNS = (
    ("FLUX.1", r"lora_unet_(double|single)_blocks_|^transformer\.(single_)?transformer_blocks"),
    ("Stable Diffusion 3", r"joint_blocks_"),
    ("SDXL", r"lora_te2_|lora_unet_(input|middle|output)_blocks?_|add_embedding|transformer_blocks_[2-9]_"),
    ("Stable Diffusion 1.x or 2.x in Diffusers' key names", r"^(unet|text_encoder)\.|\.processor\."),
    ("Stable Diffusion 1.x or 2.x", r"lora_unet_(down_blocks|up_blocks|mid_block)_|lora_te_text_model"),
)
_CROSS_ATTENTION_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x"}


def recognise(unet: nn.Module) -> Architecture:
    """The architecture of a denoiser, by its class.

    :raises DeftError: for one that is not in `ARCHITECTURES`
    """
    class_name = type(unet).__name__
    sdxl = getattr(getattr(unet, "config", None), "addition_embed_type", None) == "text_time"
    for architecture in ARCHITECTURES:
        if class_name in architecture.unet.model_classes and not sdxl:
            return architecture
    known = ", ".join(a.name for a in ARCHITECTURES)
    raise DeftError(f"networks.deft does not adapt {class_name}{' of SDXL' if sdxl else ''}; it adapts {known}")


def adaptable_layers(model: nn.Module, part: Part, with_convolutions: bool) -> Iterator[tuple[str, Layer]]:
    """(key name, layer) of every layer of `model` that can be adapted, in the order of `named_modules`.

    :param with_convolutions: whether k x k convolutions, and the layers of `conv_containers`, are included
    """
    containers = part.containers + (part.conv_containers if with_convolutions else ())
    for path, container in model.named_modules():
        if type(container).__name__ not in containers:
            continue
        for child_path, layer in container.named_modules():
            if not is_adaptable(layer) or not (with_convolutions or is_pointwise(layer)):
                continue
            full_path = ".".join(filter(None, (path, child_path)))
            if not full_path.startswith(part.path_root):
                full_path = part.path_root + full_path
            yield f"{part.prefix}_{full_path}".replace(".", "_"), layer


def is_adaptable(layer: nn.Module) -> TypeGuard[Layer]:
    """Linear layers and ungrouped, zero-padded Conv2d layers, by class name as quantised subclasses are not."""
    if type(layer).__name__ == "Linear":
        return True
    if not isinstance(layer, nn.Conv2d) or type(layer).__name__ != "Conv2d":
        return False
    return layer.groups == 1 and layer.padding_mode == "zeros"


def is_pointwise(layer: nn.Module) -> bool:
    """Linear layers and 1x1 convolutions, which follow `dim`; the others follow `conv_dim`."""
    return not isinstance(layer, nn.Conv2d) or layer.kernel_size == (1, 1)


def looks_made_for(tensors: Mapping[str, Tensor]) -> str:
    """The model that an adapter file looks made for, in words, by its key names and widths."""
    for name, pattern in _FILE_SIGNS:
        if any(re.search(pattern, key) for key in tensors):
            for key, value in tensors.items():
                if re.search(r"attn2_to_k\.(lora_down|lora_A|deft_R)", key) and "1.x or 2.x" in name:
                    return _CROSS_ATTENTION_WIDTHS.get(value.shape[1], name)
            return name
    return "a model that is not known here"


def as_list(models: nn.Module | Sequence[nn.Module] | None) -> list[nn.Module]:
    """sd-scripts passes SD 1.5's text encoder bare and others' in a list."""
    if models is None:
        return []
    return [models] if isinstance(models, nn.Module) else list(models)
