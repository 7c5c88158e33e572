"""What runs in sd-scripts' own Python, not in ours: `python sd_scripts_side.py model|sdxl|flux|compare|generate FOLDER
| names FILE`."""

from __future__ import annotations

import gc
import importlib.util
import json
import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where large random weights are made


def clip_tokenizer(folder: Path):
    """Our small CLIP tokenizer; loaded by its path, since `library` is sd-scripts' own here."""
    spec = importlib.util.spec_from_file_location("tokenizer", ROOT / "library" / "world" / "tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build(folder)


def make_model(folder: Path, pixels: int = 64) -> None:
    """A full-size SD 1.5 with random weights, a Diffusers folder in float16, and images with captions beside it."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    configs = ROOT / "library" / "models" / "configs" / "sd15"

    def config(part: str) -> dict:
        return json.loads(next((configs / part).glob("*.json")).read_text())

    torch.manual_seed(0)
    tokenizer = clip_tokenizer(folder / "tokenizers" / "openai_clip-vit-large-patch14")
    text_encoder = CLIPTextModel(CLIPTextConfig(**config("text_encoder")))
    # gen_img.py divides by the mean of the embeddings, which a fresh LayerNorm leaves at 0 but for rounding
    torch.nn.init.constant_(text_encoder.text_model.final_layer_norm.bias, 0.1)
    StableDiffusionPipeline(
        vae=AutoencoderKL.from_config(config("vae")).half(),
        text_encoder=text_encoder.half(),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel.from_config(config("unet")).half(),
        scheduler=PNDMScheduler.from_config(config("scheduler")),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(str(folder / "model"))
    make_images(folder, pixels)


def make_images(folder: Path, pixels: int) -> None:
    """Four square images of that many pixels a side, with captions."""
    from PIL import Image

    images = folder / "images" / "1_sks thing"
    images.mkdir(parents=True)
    for i in range(4):
        image = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4), (pixels, pixels), mode="bilinear")[0]
        Image.fromarray((image.permute(1, 2, 0) * 255).byte().numpy()).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(f"sks thing {i}")


def random_bf16(make) -> torch.nn.Module:
    """A model with small random weights in bfloat16, without its own start, which takes minutes at this size."""
    with torch.device("meta"):
        model = make()
    model = model.to(torch.bfloat16).to_empty(device=DEVICE)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.fill_(1.0) if "norm" in name and name.endswith("weight") else tensor.normal_(0, 0.02)
        elif name.endswith("position_ids"):
            tensor.copy_(torch.arange(tensor.numel()).view_as(tensor))
    return model


def make_sdxl(folder: Path, pixels: int = 64) -> None:
    """A full-size SDXL with random weights, a Diffusers folder in bfloat16 (7 GB), and images beside it."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    names = ("openai_clip-vit-large-patch14", "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k")
    tokenizers = [clip_tokenizer(folder / "tokenizers" / name) for name in names]
    configs = ROOT / "library" / "models" / "configs" / "sd15"
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
    make_images(folder, pixels)


def make_flux(folder: Path, blocks: tuple[int, int] = (2, 2), t5_layers: int = 24, pixels: int = 64) -> None:
    """FLUX.1 dev of real widths with so many double and single blocks; CLIP-L, T5-XXL (10 GB) and the autoencoder."""
    from dataclasses import replace

    from transformers import CLIPTextConfig, CLIPTextModel

    from library import flux_models, flux_utils, safetensors_utils

    torch.manual_seed(0)
    real = flux_models.configs["dev"]
    small = replace(real.params, depth=blocks[0], depth_single_blocks=blocks[1])
    config = json.loads(
        next((ROOT / "library" / "models" / "configs" / "sd15" / "text_encoder").glob("*.json")).read_text()
    )
    t5 = folder / "t5.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    parts = {
        "flux": random_bf16(lambda: flux_models.Flux(small)),
        "clip": random_bf16(lambda: CLIPTextModel(CLIPTextConfig(**config))),
        "ae": random_bf16(lambda: flux_models.AutoEncoder(real.ae_params)),
    }
    for name, model in parts.items():
        safetensors_utils.mem_eff_save_file(model.state_dict(), str(folder / f"{name}.safetensors"))
    with torch.device("meta"):
        encoder = flux_utils.T5EncoderModel(flux_utils.T5Config(
            d_model=4096, d_ff=10240, d_kv=64, num_layers=t5_layers, num_heads=64, vocab_size=32128,
            feed_forward_proj="gated-gelu", dense_act_fn="gelu_new", is_encoder_decoder=False, use_cache=False,
        ))  # fmt: skip
    shapes = {k: v.shape for k, v in encoder.state_dict().items() if k != "encoder.embed_tokens.weight"}
    random = {k: torch.empty(s, dtype=torch.bfloat16, device=DEVICE).normal_(0, 0.02) for k, s in shapes.items()}
    safetensors_utils.mem_eff_save_file(random, str(t5))
    build_t5_tokenizer(folder / "tokenizers" / "google_t5-v1_1-xxl")
    clip_tokenizer(folder / "tokenizers" / "openai_clip-vit-large-patch14")
    make_images(folder, pixels)


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


@contextmanager
def short_t5():
    """T5-XXL with one block, 0.6 instead of 10 GB; sd-scripts has the number of blocks written in its code."""
    from library import flux_utils

    config = flux_utils.T5Config
    with mock.patch.object(flux_utils, "T5Config", lambda **fields: config(**fields | {"num_layers": 1})):
        yield


def make_flux_lora(folder: Path, files: dict[str, str], options: dict[str, str]) -> tuple[str, dict[str, torch.Tensor]]:
    """The LoRA file and the state of a network that was moved as training would; ranks differ, T5 is adapted too."""
    from library import flux_utils
    from networks import deft

    with short_t5():
        clip = flux_utils.load_clip_l(files["clip_l"], torch.float32, "cpu")
        t5 = flux_utils.load_t5xxl(files["t5xxl"], torch.float32, "cpu")
    _, model = flux_utils.load_flow_model(files["ckpt_path"], torch.float32, "cpu")
    torch.manual_seed(0)
    network = deft.create_network(1.0, 4, 2, None, [clip, t5], model, **options)
    network.apply_to([clip, t5], model)
    with torch.no_grad():
        for parameter in network.parameters():
            size = parameter.std() if parameter.numel() > 1 and parameter.any() else torch.tensor(0.05)
            parameter += 0.3 * size * torch.randn_like(parameter)
    file = str(folder / "x.safetensors")
    network.save_weights(file, torch.float32, None)
    return file, {name: value.clone() for name, value in network.state_dict().items()}


def draw_flux(folder: Path, options: list[str], create: Callable | None) -> tuple[torch.Tensor, torch.Tensor]:
    """sd-scripts' own flux_minimal_inference.py, in this process: its picture, and the latents that it decodes.

    :param create: takes the place of networks.lora_flux' `create_network_from_weights`, if given
    """
    import numpy as np
    from PIL import Image

    from library import flux_models, flux_utils, strategy_flux
    from networks import lora_flux

    decode, latents = flux_models.AutoEncoder.decode, []

    def kept(self, z):
        latents.append(z.double())
        return decode(self, z)

    out = Path(tempfile.mkdtemp(dir=folder))
    command = ["flux_minimal_inference.py", "--prompt", "sks thing 1", "--seed", "1", "--steps", "4", "--width", "64"]
    command += ["--height", "64", "--dtype", "float32", "--output_dir", str(out), *options]
    tokenizers = (512, str(folder.parent / "tokenizers"))  # the script names no folder: it would download them
    patch = mock.patch.object
    with (
        short_t5(),
        patch(sys, "argv", command),
        patch(strategy_flux.FluxTokenizeStrategy.__init__, "__defaults__", tokenizers),
        patch(flux_models.AutoEncoder, "decode", kept),
        patch(lora_flux, "create_network_from_weights", create or lora_flux.create_network_from_weights),
    ):
        runpy.run_path(str(Path(flux_utils.__file__).parents[1] / command[0]), run_name="__main__")
    gc.collect()  # adapted models hold themselves in cycles
    (picture,) = out.glob("*.png")
    return torch.from_numpy(np.array(Image.open(picture)).astype("int16")), latents[0]


def generate_flux(folder: Path) -> None:
    """Pictures of flux_minimal_inference.py, with the network that was trained, with its file in networks.deft and in
    networks.lora_flux, applied and merged, and with none. Writes the distances from the first, of pixels (the largest
    of 255) and of the latents (relative), to generate.json."""
    from safetensors import safe_open

    from library import safetensors_utils
    from networks import deft

    names = {"ckpt_path": "flux", "clip_l": "clip", "t5xxl": "t5_short", "ae": "ae"}
    files = {option: str(folder / f"{name}.safetensors") for option, name in names.items()}
    if not Path(files["t5xxl"]).exists():
        with safe_open(str(folder / "t5.safetensors"), framework="pt") as file:
            kept = [key for key in file.keys() if ".block." not in key or ".block.0." in key]
            safetensors_utils.mem_eff_save_file({key: file.get_tensor(key) for key in kept}, files["t5xxl"])
    pictures = folder / "pictures"
    shutil.rmtree(pictures, ignore_errors=True)
    pictures.mkdir()
    options = {"train_t5xxl": "true", "single_dim": "8"}
    lora, state = make_flux_lora(pictures, files, options)
    gc.collect()

    def trained(multiplier, file, vae, encoders, model, weights_sd, for_inference):
        """The network itself, which takes nothing of the file that the script reads."""
        network = deft.create_network(multiplier, 4, 2, vae, encoders, model, **options)
        network.load_state_dict = lambda *_, **__: deft.DeftNetwork.load_state_dict(network, state)
        return network, None

    def read(multiplier, file, vae, encoders, model, weights_sd, for_inference):
        """As for further training, with the options in the file's metadata."""
        network, weights = deft.create_network_from_weights(multiplier, lora, vae, encoders, model)
        network.load_state_dict = lambda *_, **__: network.load_weights(lora)
        return network, weights

    with_lora, merged = ["--lora_weights", f"{lora};1.0"], ["--merge_lora_weights"]
    ways = {
        "trained": (with_lora, trained),
        "deft read": (with_lora, read),
        "deft applied": (with_lora, deft.create_network_from_weights),
        "deft merged": (with_lora + merged, deft.create_network_from_weights),
        "lora applied": (with_lora, None),
        "lora merged": (with_lora + merged, None),
        "none": ([], None),
    }
    models = [word for option, file in files.items() for word in (f"--{option}", file)]
    drawn = {way: draw_flux(pictures, models + given, create) for way, (given, create) in ways.items()}
    first = drawn["trained"]
    distances = {
        way: [int((pixels - first[0]).abs().max()), float((latents - first[1]).norm() / first[1].norm())]
        for way, (pixels, latents) in drawn.items()
    }
    (folder / "generate.json").write_text(json.dumps(distances))


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
                    next((ROOT / "library" / "models" / "configs" / "sd15" / "text_encoder").glob("*.json")).read_text()
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
    {"model": make_model, "sdxl": make_sdxl, "flux": make_flux, "compare": compare_flux, "generate": generate_flux,
     "names": write_names}[sys.argv[1]](Path(sys.argv[2]))  # fmt: skip
