"""Models of `trainer.py`: `python trainer_world.py sdxl|flux FOLDER PIXELS [tiny]` writes single files with random
weights of the published sizes in bfloat16, tokenizers under the names of --tokenizer_cache_dir, and pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.train_step import random_model
from library.models.reading import CONFIGS
from tests import small_flux, small_models

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16
CLIP_L, BIG_G, T5_XXL = (
    "openai_clip-vit-large-patch14",
    "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k",
    "google_t5-v1_1-xxl",
)
FLUX_BLOCKS, T5_LAYERS = (19, 38), 24
TINY_BLOCKS, TINY_T5_LAYERS = (1, 1), 1  # of the published widths, which sd-scripts' FLUX.1 has in its code
PICTURES, REPEATS = 8, 100


def main(world: str, folder: Path, pixels: int, tiny: bool) -> None:
    torch.manual_seed(0)
    (folder / "tokenizers").mkdir(parents=True)
    small_models.tokenizer(folder / "tokenizers" / CLIP_L)
    if world == "sdxl":
        small_models.tokenizer(folder / "tokenizers" / BIG_G, pad_token="!")
        if tiny:  # a folder, since single files are read in the published sizes alone
            small_models.build("sdxl", folder / "model.safetensors")
        else:
            write(sdxl(folder), folder / "model.safetensors")
    else:
        small_flux.t5_tokenizer(folder / "tokenizers" / T5_XXL)
        for name, tensors in flux(tiny).items():
            write(tensors, folder / f"{name}.safetensors")
    pictures(folder / "images" / f"{REPEATS}_sks thing", pixels)


def write(tensors: dict[str, Tensor], file: Path) -> None:
    save_file({name: tensor.to(DTYPE).contiguous() for name, tensor in tensors.items()}, file)


def config(world: str, part: str) -> dict:
    return json.loads((CONFIGS / world / part / "config.json").read_text(encoding="utf-8"))


def sdxl(folder: Path) -> dict[str, Tensor]:
    """In Stability AI's names."""
    first, second = (CLIPTextConfig(**config("sdxl", f"text_encoder{which}")) for which in ("", "_2"))
    tokenizer = small_models.tokenizer(folder / "tokenizers" / CLIP_L)
    pipeline = StableDiffusionXLPipeline(
        unet=random_model(lambda: UNet2DConditionModel.from_config(config("sdxl", "unet")), DEVICE, DTYPE),
        vae=random_model(lambda: AutoencoderKL.from_config(config("sdxl", "vae")), DEVICE, DTYPE),
        text_encoder=random_model(lambda: CLIPTextModel(first), DEVICE, DTYPE),
        text_encoder_2=random_model(lambda: CLIPTextModelWithProjection(second), DEVICE, DTYPE),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    return small_models.single_file(pipeline)


def flux(tiny: bool) -> dict[str, dict[str, Tensor]]:
    """The transformer in black-forest-labs' names, and dev's other parts, each a file."""
    clip = random_model(lambda: CLIPTextModel(CLIPTextConfig(**config("flux", "text_encoder"))), DEVICE, DTYPE)
    layers = TINY_T5_LAYERS if tiny else T5_LAYERS
    t5_config = T5Config(**config("flux", "text_encoder_2") | {"num_layers": layers})
    t5 = random_model(lambda: T5EncoderModel(t5_config), DEVICE, DTYPE)
    ae = random_model(lambda: AutoencoderKL.from_config(config("flux", "vae")), DEVICE, DTYPE)
    parts = {
        "clip_l": {f"text_model.{k.removeprefix('text_model.')}": value for k, value in clip.state_dict().items()},
        "t5xxl": {k: value for k, value in t5.state_dict().items() if "embed_tokens" not in k},
        "ae": small_models.original_vae(ae.state_dict()),
    }
    torch.set_default_dtype(DTYPE)
    with torch.device(DEVICE):
        parts["model"] = small_flux.transformer_tensors(
            True, *(TINY_BLOCKS if tiny else FLUX_BLOCKS), w=3072, text=4096, pooled=768
        )
    torch.set_default_dtype(torch.float32)
    return parts


def pictures(folder: Path, pixels: int) -> None:
    folder.mkdir(parents=True)
    for i in range(PICTURES):
        image = torch.nn.functional.interpolate(torch.rand(1, 3, 8, 8), (pixels, pixels), mode="bilinear")[0]
        Image.fromarray((image.permute(1, 2, 0) * 255).byte().numpy()).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a photo of sks thing {i}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), "tiny" in sys.argv[4:])
