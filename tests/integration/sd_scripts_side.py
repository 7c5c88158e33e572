"""What runs in sd-scripts' own Python, not in ours: `python sd_scripts_side.py model|sdxl|flux FOLDER | names FILE`."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def clip_tokenizer(folder: Path):
    """Our small CLIP tokenizer; loaded by its path, since `library` is sd-scripts' own here."""
    spec = importlib.util.spec_from_file_location("tokenizer", ROOT / "library" / "world" / "tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build(folder)


def make_model(folder: Path) -> None:
    """A full-size SD 1.5 with random weights, a Diffusers folder in float16, and images with captions beside it."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    configs = ROOT / "library" / "model_configs" / "sd15"

    def config(part: str) -> dict:
        return json.loads(next((configs / part).glob("*.json")).read_text())

    torch.manual_seed(0)
    tokenizer = clip_tokenizer(folder / "tokenizers" / "openai_clip-vit-large-patch14")
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
    make_images(folder)


def make_images(folder: Path) -> None:
    """Four images of 64 x 64 pixels with captions."""
    from PIL import Image

    images = folder / "images" / "1_sks thing"
    images.mkdir(parents=True)
    for i in range(4):
        pixels = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4), (64, 64), mode="bilinear")[0]
        Image.fromarray((pixels.permute(1, 2, 0) * 255).byte().numpy()).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(f"sks thing {i}")


def random_bf16(make) -> torch.nn.Module:
    """A model with small random weights in bfloat16, without its own start, which takes minutes at this size."""
    with torch.device("meta"):
        model = make()
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.fill_(1.0) if "norm" in name and name.endswith("weight") else tensor.normal_(0, 0.02)
        elif name.endswith("position_ids"):
            tensor.copy_(torch.arange(tensor.numel()).view_as(tensor))
    return model


def make_sdxl(folder: Path) -> None:
    """A full-size SDXL with random weights, a Diffusers folder in bfloat16 (7 GB), and images beside it."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    names = ("openai_clip-vit-large-patch14", "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k")
    tokenizers = [clip_tokenizer(folder / "tokenizers" / name) for name in names]
    configs = ROOT / "library" / "model_configs" / "sd15"
    first = CLIPTextConfig(**json.loads(next((configs / "text_encoder").glob("*.json")).read_text()))
    second = CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280,
        hidden_act="gelu", vocab_size=49408,
    )  # fmt: skip
    unet = {
        "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2, "cross_attention_dim": 2048,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }  # fmt: skip
    vae = json.loads(next((configs / "vae").glob("*.json")).read_text())
    StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_config(vae).to(torch.bfloat16),
        text_encoder=random_bf16(lambda: CLIPTextModel(first)),
        text_encoder_2=random_bf16(lambda: CLIPTextModelWithProjection(second)),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=random_bf16(lambda: UNet2DConditionModel(**unet)),
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    ).save_pretrained(str(folder / "model"))
    make_images(folder)


def make_flux(folder: Path) -> None:
    """FLUX.1 dev of real widths, two double and two single blocks; CLIP-L, T5-XXL (10 GB) and the autoencoder."""
    from dataclasses import replace

    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    from library import flux_models, flux_utils

    torch.manual_seed(0)
    real = flux_models.configs["dev"]
    small = replace(real.params, depth=2, depth_single_blocks=2)
    config = json.loads(next((ROOT / "library" / "model_configs" / "sd15" / "text_encoder").glob("*.json")).read_text())
    t5 = folder / "t5.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    parts = {
        "flux": random_bf16(lambda: flux_models.Flux(small)),
        "clip": random_bf16(lambda: CLIPTextModel(CLIPTextConfig(**config))),
        "ae": random_bf16(lambda: flux_models.AutoEncoder(real.ae_params)),
    }
    for name, model in parts.items():
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / f"{name}.safetensors")
    with torch.device("meta"):
        encoder = flux_utils.T5EncoderModel(flux_utils.T5Config(
            d_model=4096, d_ff=10240, d_kv=64, num_layers=24, num_heads=64, vocab_size=32128,
            feed_forward_proj="gated-gelu", dense_act_fn="gelu_new", is_encoder_decoder=False, use_cache=False,
        ))  # fmt: skip
    shapes = {k: v.shape for k, v in encoder.state_dict().items() if k != "encoder.embed_tokens.weight"}
    save_file({k: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02) for k, shape in shapes.items()}, t5)
    build_t5_tokenizer(folder / "tokenizers" / "google_t5-v1_1-xxl")
    clip_tokenizer(folder / "tokenizers" / "openai_clip-vit-large-patch14")
    make_images(folder)


def build_t5_tokenizer(folder: Path) -> None:
    """T5's kind of tokenizer, with a token for each letter."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import T5TokenizerFast

    letters = [chr(code) for code in range(33, 127)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((letter, -1.0) for letter in ("▁", *letters))]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0).save_pretrained(str(folder))


def compare_flux(folder: Path) -> None:
    """Outputs of the transformer with `out/base.safetensors`: of networks.lora_flux and networks.deft, applied and
    merged. Writes their relative distances from the first to compare.json."""
    from safetensors.torch import load_file

    from library import flux_utils
    from networks import deft, lora_flux

    file = str(folder / "out" / "base.safetensors")
    torch.manual_seed(1)
    img, txt, y = torch.randn(1, 16, 64), torch.randn(1, 8, 4096), torch.randn(1, 768)
    ids = torch.zeros(1, 16, 3), torch.zeros(1, 8, 3)
    outputs = {}
    for way in ("lora applied", "lora merged", "deft applied", "deft merged", "base"):
        _, model = flux_utils.load_flow_model(str(folder / "flux.safetensors"), torch.float32, "cpu")
        module = lora_flux if "lora" in way else deft
        if way != "base":
            network, weights = module.create_network_from_weights(
                1.0, file, None, [None, None], model, for_inference="merged" in way
            )
            if "merged" in way:
                network.merge_to([None, None], model, weights or load_file(file), torch.float32, "cpu")
            else:
                network.apply_to([None, None], model, False, True)
                network.load_weights(file) if module is deft else network.load_state_dict(load_file(file), False)
        with torch.no_grad():
            t, guidance = torch.tensor([0.5]), torch.tensor([3.5])
            outputs[way] = model(img, ids[0], txt, ids[1], t, y, guidance=guidance).double()
    first = outputs["lora applied"]
    errors = {way: float((out - first).norm() / first.norm()) for way, out in outputs.items()}
    (folder / "compare.json").write_text(json.dumps(errors))


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
    {"model": make_model, "sdxl": make_sdxl, "flux": make_flux, "compare": compare_flux, "names": write_names}[
        sys.argv[1]
    ](Path(sys.argv[2]))
