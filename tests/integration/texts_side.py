"""Runs in sd-scripts' own Python: `python texts_side.py FOLDER`, FOLDER having the models, tokenizers/, rows.json.

Makes each model's text encoders anew, by its configurations, and writes what sd-scripts' own strategies make of the
captions with them, SDXL's sizes as embeddings, and each model as a single file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from library import model_util, sdxl_model_util, sdxl_train_util, strategy_sd, strategy_sdxl


def encoders_of(model: Path) -> list[torch.nn.Module]:
    """New ones with random weights, saved in place."""
    found = []
    for kind, part in ((CLIPTextModel, "text_encoder"), (CLIPTextModelWithProjection, "text_encoder_2")):
        if (model / part).is_dir():
            encoder = kind(CLIPTextConfig.from_pretrained(str(model / part))).eval()
            encoder.save_pretrained(str(model / part))
            found.append(encoder)
    return found


def write_single_file(model: Path, encoders: list[torch.nn.Module], file: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(str(model / "unet"))
    vae = AutoencoderKL.from_pretrained(str(model / "vae"))
    if len(encoders) == 1:
        v2 = model.name == "sd2"
        model_util.save_stable_diffusion_checkpoint(v2, str(file), encoders[0], unet, None, 0, 0, None, vae=vae)
        return
    state = sdxl_model_util.convert_diffusers_unet_state_dict_to_sdxl(unet.state_dict())
    as_original = torch.nn.Module()
    as_original.state_dict = lambda: state  # type: ignore[method-assign]
    sdxl_model_util.save_stable_diffusion_checkpoint(str(file), *encoders, as_original, 0, 0, None, vae, None, None)


@torch.no_grad()
def main(folder: Path) -> None:
    torch.manual_seed(0)
    rows = json.loads((folder / "rows.json").read_text())
    cache = str(folder / "tokenizers")
    models = {name: encoders_of(folder / name) for name in ("sd15", "sd2", "sdxl")}
    found = {}
    for name, (kind, clip_skip, length) in rows["options"].items():
        if kind == "sdxl":
            tokenizing = strategy_sdxl.SdxlTokenizeStrategy(length, cache)
            encoding = strategy_sdxl.SdxlTextEncodingStrategy()
        else:
            tokenizing = strategy_sd.SdTokenizeStrategy(kind == "sd2", length, cache)
            encoding = strategy_sd.SdTextEncodingStrategy(clip_skip)
        tokens = tokenizing.tokenize(rows["captions"])
        states = encoding.encode_tokens(tokenizing, models[kind], tokens)
        found[f"{name}/hidden"] = torch.cat(states[:2], -1)
        if kind == "sdxl":
            found[f"{name}/pooled"] = states[2]
    sizes = torch.tensor(rows["sizes"])
    found["sizes"] = sdxl_train_util.get_size_embeddings(*sizes.split(2, 1), torch.device("cpu"))
    save_file({key: value.contiguous() for key, value in found.items()}, folder / "found.safetensors")
    for name, encoders in models.items():
        write_single_file(folder / name, encoders, folder / f"{name}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
