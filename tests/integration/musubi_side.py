"""Runs in musubi-tuner's own Python, for models with one block of each kind and random weights: of two heads, or with
MUSUBI_LARGE set in the environment of the real widths.

`python musubi_side.py world KIND FOLDER` writes the checkpoint, what its scripts cache of two pictures, by its own
functions, and the data set's TOML; `python musubi_side.py train KIND ...` is that kind's own training script, and
`python musubi_side.py read KIND FILE RESULT` what its own network makes of a file.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

if not torch.cuda.is_available():  # Wan's modules ask for it in the default of an argument
    torch.cuda.current_device = lambda: 0

from musubi_tuner.dataset import cache_io
from musubi_tuner.dataset.image_video_dataset import ItemInfo

# the letters of each architecture in names of cached files
KINDS = {"zimage": "zi", "flux_kontext": "fk", "flux_2": "f2k4b", "qwen_image": "qi", "wan": "wan"}
SIDE = 64  # of the pictures, in pixels
LARGE = bool(os.environ.get("MUSUBI_LARGE"))
HEADS, WIDTH = 2, 256


def make(kind: str) -> nn.Module:
    """The model as that kind's trainer makes it from now on, on the meta device."""
    with torch.device("meta"):
        if kind == "zimage":
            from musubi_tuner.zimage import zimage_config, zimage_model

            zimage_config.DEFAULT_TRANSFORMER_N_LAYERS = zimage_config.DEFAULT_TRANSFORMER_N_REFINER_LAYERS = 1
            if not LARGE:
                zimage_config.DEFAULT_TRANSFORMER_N_HEADS = zimage_config.DEFAULT_TRANSFORMER_N_KV_HEADS = HEADS
                zimage_config.DEFAULT_TRANSFORMER_DIM = WIDTH
            return zimage_model.create_model("torch", False, torch.bfloat16)
        if kind == "flux_kontext":
            from musubi_tuner.flux import flux_models

            params = flux_models.configs_flux_dev_context.params
            params.depth = params.depth_single_blocks = 1
            if not LARGE:
                params.hidden_size, params.num_heads = WIDTH, HEADS
            return flux_models.Flux(params, "torch").bfloat16()
        if kind == "flux_2":
            from musubi_tuner.flux_2 import flux2_models, flux2_utils

            params = flux2_utils.FLUX2_MODEL_INFO["klein-base-4b"].params
            params.depth = params.depth_single_blocks = 1
            if not LARGE:
                params.hidden_size, params.num_heads = WIDTH, HEADS
            return flux2_models.Flux2(params, "torch").bfloat16()
        if kind == "qwen_image":
            from musubi_tuner.qwen_image import qwen_image_model

            own = qwen_image_model.QwenImageTransformer2DModel
            if not LARGE and isinstance(own, type):  # that function's widths are fixed
                few: Any = lambda **sizes: own(**sizes | {"num_attention_heads": HEADS})  # noqa: E731
                qwen_image_model.QwenImageTransformer2DModel = few
            return qwen_image_model.create_model("torch", False, False, False, False, torch.bfloat16, 1)
        from musubi_tuner.wan.configs import WAN_CONFIGS
        from musubi_tuner.wan.modules.model import WanModel

        config = WAN_CONFIGS["t2v-1.3B"]
        config.num_layers = 1
        if not LARGE:
            config.dim, config.num_heads, config.ffn_dim = WIDTH, HEADS, 2 * WIDTH
        sizes = {name: config[name] for name in ("dim", "ffn_dim", "freq_dim", "num_heads", "num_layers")}
        return WanModel("t2v", **sizes)  # in float32: its embedding of times wants an autocast that CPUs do not have


def world(kind: str, folder: Path) -> None:
    torch.manual_seed(0)
    tensors = {}
    for key, tensor in make(kind).state_dict().items():
        new = torch.empty(tensor.shape, dtype=tensor.dtype)
        tensors[key] = new.fill_(1) if "norm" in key and tensor.dim() == 1 else new.normal_(0, 0.02)
    save_file(tensors, folder / f"{kind}.safetensors")
    (folder / "images").mkdir()
    for number in range(2):
        item = ItemInfo(f"{number}.png", "a cat", (SIDE, SIDE))
        cache = str(folder / "cache" / f"{number}_{SIDE:04d}x{SIDE:04d}_{KINDS[kind]}")
        item.latent_cache_path = f"{cache}.safetensors"
        item.text_encoder_output_cache_path = str(folder / "cache" / f"{number}_{KINDS[kind]}_te.safetensors")
        cached(kind, item)
    (folder / "data.toml").write_text(
        f"[general]\nresolution = [{SIDE}, {SIDE}]\nbatch_size = 1\n[[datasets]]\n"
        f'image_directory = "{(folder / "images").as_posix()}"\n'
        f'cache_directory = "{(folder / "cache").as_posix()}"\n'
    )


def cached(kind: str, item: Any) -> None:
    """What the two scripts of a kind that cache write of a picture of `SIDE` pixels and a caption of seven tokens."""
    words, size = 7, SIDE // 8

    def latents(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, size, size).bfloat16()

    def texts(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).bfloat16()

    if kind == "zimage":
        cache_io.save_latent_cache_z_image(item, latents(16))
        cache_io.save_text_encoder_output_cache_z_image(item, texts(words, 2560))
    elif kind == "flux_kontext":
        cache_io.save_latent_cache_flux_kontext(item, latents(16), latents(16))
        cache_io.save_text_encoder_output_cache_flux_kontext(item, texts(words, 4096), texts(768))
    elif kind == "flux_2":
        half = torch.randn(128, size // 2, size // 2).bfloat16()
        cache_io.save_latent_cache_flux_2(item, half, None, "flux_2_klein_4b")
        cache_io.save_text_encoder_output_cache_flux_2(item, texts(words, 7680), "flux_2_klein_4b")
    elif kind == "qwen_image":
        cache_io.save_latent_cache_qwen_image(item, latents(16, 1), None)
        cache_io.save_text_encoder_output_cache_qwen_image(item, texts(words, 3584))
    else:
        cache_io.save_latent_cache_wan(item, latents(16, 1), None, None, None)
        cache_io.save_text_encoder_output_cache_wan(item, texts(words, 4096))


def train(kind: str, arguments: list[str]) -> None:
    make(kind)
    sys.argv = [f"{kind}_train_network.py", *arguments]
    importlib.import_module(f"musubi_tuner.{kind}_train_network").main()


def of_zeros(kind: str) -> nn.Module:
    """HiDream-O1's is of the names alone: its own class has 36 layers."""
    if kind == "hidream_o1":
        from tests import small_musubi

        model = small_musubi.made("HiDream-O1")
    else:
        model = make(kind).to_empty(device="cpu").float()
    for parameter in model.parameters():
        parameter.data.zero_()
    return model


def read(kind: str, file: str, result: Path) -> None:
    """Names that musubi-tuner's own network does not know or misses, and what it merges into the weights."""
    own = {"zimage": "lora_zimage", "flux_kontext": "lora_flux", "flux_2": "lora_flux_2",
           "qwen_image": "lora_qwen_image", "wan": "lora_wan", "hidream_o1": "lora_hidream_o1"}[kind]  # fmt: skip
    module = importlib.import_module(f"musubi_tuner.networks.{own}")
    weights = load_file(file)
    model, plain = of_zeros(kind), of_zeros(kind)
    network = module.create_arch_network_from_weights(1.0, weights, unet=model)
    network.apply_to(None, model, apply_text_encoder=False, apply_unet=True)
    told = network.load_state_dict(weights, strict=False)
    merging = module.create_arch_network_from_weights(1.0, weights, unet=plain, for_inference=True)
    merging.merge_to(None, plain, weights, torch.float32, "cpu", non_blocking=True)
    save_file({key: value.contiguous() for key, value in plain.state_dict().items() if value.dim() == 2}, result)
    print("--- " + json.dumps([list(told.missing_keys), list(told.unexpected_keys)]))


if __name__ == "__main__":
    mode, kind, *rest = sys.argv[1:]
    if mode == "world":
        world(kind, Path(rest[0]))
    elif mode == "train":
        train(kind, rest)
    else:
        read(kind, rest[0], Path(rest[1]))
