"""The VAE: the model's own, or that of --vae; always in float32, since SDXL's overflows in float16."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import load_file

from library.models.reading import shapes_of, variant_of
from networks.deft_config import DeftError, reason_of


def own_vae(model: Path, config: Path) -> AutoencoderKL:
    """The VAE of a Diffusers folder or single file.

    :param config: a folder of `configs/`, for single files
    """
    if model.is_dir():
        return _of_folder(model / "vae")
    return AutoencoderKL.from_single_file(
        str(model), config=str(config), subfolder="vae", dtype=torch.float32, local_files_only=True
    )


def load_vae(path: str, like: AutoencoderKL) -> AutoencoderKL:
    """The VAE of --vae: a .safetensors file in the original's or diffusers' layout, which may hold a whole model, or a
    folder, the VAE's or a whole model's.

    :param like: the model's own: its shape and its scale of latents, in which the U-Net was trained
    :raises DeftError: when it cannot be read or does not fit
    """
    location = Path(path)
    option = f"--vae {path}"
    if not location.exists():
        raise DeftError(f"{option}: no such file or folder")
    if location.is_file() and location.suffix != ".safetensors":
        raise DeftError(f"{option}: only .safetensors files are read, since others can run code; convert it first")
    try:
        vae = _of_folder(_vae_folder(location)) if location.is_dir() else _of_file(location, like)
    except DeftError:
        raise
    except Exception as error:  # of many kinds
        raise DeftError(f"{option}: not a readable VAE ({reason_of(error)})") from None
    missing = [name for name, weight in vae.named_parameters() if weight.is_meta]
    if missing:
        raise DeftError(f"{option}: {len(missing)} of its weights are missing, {missing[0]} for one")
    if vae.config.latent_channels != like.config.latent_channels:
        raise DeftError(f"{option}: its latents have {vae.config.latent_channels} channels, the model's others")
    vae.register_to_config(scaling_factor=like.config.scaling_factor)
    return vae


def _vae_folder(location: Path) -> Path:
    return location if (location / "config.json").is_file() else location / "vae"


def _of_folder(folder: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(
        str(folder), dtype=torch.float32, variant=variant_of(folder), use_safetensors=True, local_files_only=True
    )


def _of_file(file: Path, like: AutoencoderKL) -> AutoencoderKL:
    shapes_of(file)  # whether it is whole
    vae = AutoencoderKL.from_config(like.config)
    tensors = load_file(file)
    if any(".mid_block." in key for key in tensors):  # diffusers' layout
        tensors = {_renamed(key): tensor for key, tensor in tensors.items()}
    else:
        tensors = convert_ldm_vae_checkpoint(tensors, vae.config)
    own = vae.state_dict()
    missing = [key for key in own if key not in tensors]
    if missing:
        raise DeftError(f"--vae {file}: {len(missing)} of its weights are missing, {missing[0]} for one")
    vae.load_state_dict({key: tensors[key].float() for key in own})
    return vae


def _renamed(key: str) -> str:
    """Of an attention in older files."""
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        key = key.replace(f".{old}.", f".{new}.")
    return key
