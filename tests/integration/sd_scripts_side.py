"""What runs in sd-scripts' own Python, not in ours: `python sd_scripts_side.py model FOLDER | names FILE`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def make_model(folder: Path) -> None:
    """A full-size SD 1.5 with random weights, a Diffusers folder in float16, and images with captions beside it."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from PIL import Image
    from transformers import CLIPTextConfig, CLIPTextModel

    sys.path.insert(0, str(ROOT))
    from library.world.tokenizer import build as build_tokenizer

    configs = ROOT / "library" / "model_configs" / "sd15"

    def config(part: str) -> dict:
        return json.loads(next((configs / part).glob("*.json")).read_text())

    torch.manual_seed(0)
    tokenizer = build_tokenizer(folder / "tokenizers" / "openai_clip-vit-large-patch14")
    StableDiffusionPipeline(
        vae=AutoencoderKL.from_config(config("vae")).half(),
        text_encoder=CLIPTextModel(CLIPTextConfig(**config("text_encoder"))).half(),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel.from_config(config("unet")).half(),
        scheduler=PNDMScheduler.from_config(config("scheduler")),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(str(folder / "model"))
    images = folder / "images" / "1_sks thing"
    images.mkdir(parents=True)
    for i in range(4):
        pixels = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4), (64, 64), mode="bilinear")[0]
        Image.fromarray((pixels.permute(1, 2, 0) * 255).byte().numpy()).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(f"sks thing {i}")


def write_names(file: Path) -> None:
    """Layer names and shapes of networks.lora and networks.deft on the same SD 1.5, with and without convolutions."""
    from transformers import CLIPTextConfig, CLIPTextModel

    from library import model_util, original_unet
    from networks import deft, lora

    with torch.device("meta"):
        unet = original_unet.UNet2DConditionModel(**model_util.create_unet_diffusers_config(False))
        encoder = CLIPTextModel(
            CLIPTextConfig(
                **json.loads(
                    next((ROOT / "library" / "model_configs" / "sd15" / "text_encoder").glob("*.json")).read_text()
                )
            )
        )
    found = {}
    for options in ({}, {"conv_dim": "2", "conv_alpha": "1"}):
        theirs = lora.create_network(1.0, 4, 1, None, encoder, unet, **options)
        ours = deft.create_network(1.0, 4, 1, None, encoder, unet, **options)
        found[str(options)] = [
            {m.lora_name: m.lora_dim for m in theirs.text_encoder_loras + theirs.unet_loras},
            {m.lora_name: m.rank for m in ours.all_modules},
        ]
    file.write_text(json.dumps(found))


if __name__ == "__main__":
    {"model": make_model, "names": write_names}[sys.argv[1]](Path(sys.argv[2]))
