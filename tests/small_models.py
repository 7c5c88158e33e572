"""Small models of Stable Diffusion 1.5's, 2's and SDXL's architecture with random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from library.models.reading import CONFIGS

TOKENIZER = Path(__file__).resolve().parents[1] / "library" / "world" / "model" / "tokenizer"
POSITIONS = 77
VAE = {"block_out_channels": [8, 16, 16, 16], "norm_num_groups": 8, "layers_per_block": 1, "sample_size": 64}
_UNET = {"block_out_channels": [16, 16, 32, 32], "norm_num_groups": 8, "sample_size": 8}
UNETS: dict[str, dict[str, Any]] = {
    "sd15": _UNET | {"attention_head_dim": 2, "cross_attention_dim": 16},
    "sd2": _UNET | {"attention_head_dim": [1, 1, 2, 2], "cross_attention_dim": 1024},
    "sdxl": {"block_out_channels": [16, 16, 32], "attention_head_dim": [1, 1, 2], "norm_num_groups": 8,
             "cross_attention_dim": 48, "transformer_layers_per_block": [1, 1, 2], "sample_size": 8,
             "projection_class_embeddings_input_dim": 6 * 256 + 32},
}  # fmt: skip
_CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
ENCODERS = {
    ("sd15", "text_encoder"): _CLIP,
    ("sd2", "text_encoder"): _CLIP | {"hidden_size": 1024, "num_hidden_layers": 3},
    ("sdxl", "text_encoder"): _CLIP,
    ("sdxl", "text_encoder_2"): _CLIP | {"hidden_size": 32, "num_hidden_layers": 11, "projection_dim": 32},
}


def config_of(kind: str, part: str) -> dict[str, Any]:
    """A configuration that ships, made small."""
    shipped = json.loads((CONFIGS / kind / part / "config.json").read_text(encoding="utf-8"))
    small = {"unet": UNETS[kind], "vae": VAE}.get(part) or ENCODERS[kind, part]
    return shipped | small


def tokenizer(folder: Path, **changes: Any) -> CLIPTokenizer:
    """The one that ships, for text encoders of 77 positions."""
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"model_max_length": POSITIONS} | changes
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return CLIPTokenizer.from_pretrained(str(folder))


def encoder(kind: str, part: str, tokens: CLIPTokenizer) -> CLIPTextModel | CLIPTextModelWithProjection:
    config = config_of(kind, part) | {"vocab_size": len(tokens), "max_position_embeddings": POSITIONS}
    config |= {"bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id, "initializer_factor": 4.0}
    made_by = CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection
    return made_by(CLIPTextConfig(**config)).eval()


def build(kind: str, folder: Path, seed: int = 0, **scheduler: Any) -> Path:
    """Writes a Diffusers folder in float32, the same for the same seed.

    :param kind: "sd15", "sd2" or "sdxl"
    :param scheduler: changes of its configuration
    """
    settings = json.loads((CONFIGS / kind / "scheduler" / "scheduler_config.json").read_text()) | scheduler
    tokens = tokenizer(folder / "tokenizer", **({"pad_token": "!"} if kind == "sd2" else {}))
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        parts: dict[str, Any] = {
            "unet": UNet2DConditionModel.from_config(config_of(kind, "unet")),
            "vae": AutoencoderKL.from_config(config_of(kind, "vae")),
            "text_encoder": encoder(kind, "text_encoder", tokens),
            "tokenizer": tokens,
        }
        if kind == "sdxl":
            parts["text_encoder_2"] = encoder(kind, "text_encoder_2", tokens)
            parts["tokenizer_2"] = tokenizer(folder / "tokenizer_2", pad_token="!")
            pipeline = StableDiffusionXLPipeline(
                **parts, scheduler=EulerDiscreteScheduler.from_config(settings), add_watermarker=False
            )
        else:
            pipeline = StableDiffusionPipeline(
                **parts, scheduler=DDIMScheduler.from_config(settings), safety_checker=None, feature_extractor=None,
                requires_safety_checker=False,
            )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(str(folder))
    return folder


# --- the original's names, as published checkpoints have them ---------------------------------------------------------


def single_file(pipeline: Any) -> dict[str, Tensor]:
    """Tensors of a checkpoint in the layout of Stability AI's files, float32."""
    xl = hasattr(pipeline, "text_encoder_2")
    first, _ = ("conditioner.embedders.0.", "") if xl else ("cond_stage_model.", "cond_stage_model.model.")
    parts = {
        "model.diffusion_model.": original_unet(pipeline.unet),
        "first_stage_model.": original_vae(pipeline.vae.state_dict()),
    }
    if xl:
        parts["conditioner.embedders.1.model."] = original_open_clip(pipeline.text_encoder_2)
    if pipeline.unet.config.cross_attention_dim == 1024:
        parts["cond_stage_model.model."] = original_open_clip(pipeline.text_encoder)
    else:
        first = "conditioner.embedders.0" if xl else "cond_stage_model"
        parts[f"{first}.transformer.text_model."] = _unwrapped(pipeline.text_encoder)
    return {prefix + key: value.contiguous() for prefix, part in parts.items() for key, value in part.items()}


def original_unet(unet: Any) -> dict[str, Tensor]:
    layers, blocks = unet.config.layers_per_block, len(unet.config.block_out_channels)
    names = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    for i, j in ((1, 0), (2, 2)):
        names |= {f"time_embedding.linear_{i}": f"time_embed.{j}", f"add_embedding.linear_{i}": f"label_emb.0.{j}"}
    for i in range(blocks):
        below, above = (layers + 1) * i, (layers + 1) * (i + 1)
        for j in range(layers):
            names[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{below + j + 1}.0"
            names[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{below + j + 1}.1"
        names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{above}.0.op"
        for j in range(layers + 1):
            names[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{below + j}.0"
            names[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{below + j}.1"
        attends = "Cross" in unet.config.up_block_types[i]
        names[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{below + layers}.{2 if attends else 1}.conv"
    for old, new in (("resnets.0", "0"), ("attentions.0", "1"), ("resnets.1", "2")):
        names[f"mid_block.{old}"] = f"middle_block.{new}"
    inside = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
              "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
    return _renamed(unet.state_dict(), names, inside, "resnets")


def original_vae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {}
    levels = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.down_blocks."))
    for half in ("encoder", "decoder"):
        names |= {f"{half}.mid_block.resnets.{i}": f"{half}.mid.block_{i + 1}" for i in range(2)}
        names |= {f"{half}.mid_block.attentions.0": f"{half}.mid.attn_1", f"{half}.conv_norm_out": f"{half}.norm_out"}
    for i in range(levels):
        for j in range(3):
            names[f"encoder.down_blocks.{i}.resnets.{j}"] = f"encoder.down.{i}.block.{j}"
            names[f"decoder.up_blocks.{i}.resnets.{j}"] = f"decoder.up.{levels - 1 - i}.block.{j}"
        names[f"encoder.down_blocks.{i}.downsamplers.0.conv"] = f"encoder.down.{i}.downsample.conv"
        names[f"decoder.up_blocks.{i}.upsamplers.0.conv"] = f"decoder.up.{levels - 1 - i}.upsample.conv"
    inside = {"conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v",
              "to_out.0": "proj_out"}  # fmt: skip
    found = _renamed(state, names, inside, "")
    attention = ("q.weight", "k.weight", "v.weight", "proj_out.weight")  # 1x1 convolutions there
    return {key: value[..., None, None] if ".attn_1." in key and key.endswith(attention) else value
            for key, value in found.items()}  # fmt: skip


def original_open_clip(encoder: Any) -> dict[str, Tensor]:
    names = {"embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final"}
    inside = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
              "self_attn.out_proj": "attn.out_proj"}  # fmt: skip
    state = _unwrapped(encoder)
    found = {"positional_embedding": state.pop("embeddings.position_embedding.weight")}
    if "text_projection.weight" in state:
        found["text_projection"] = state.pop("text_projection.weight").T
    for key in [key for key in state if ".q_proj." in key]:
        together = torch.cat([state.pop(key.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"])
        found[key.replace("encoder.layers", "transformer.resblocks").replace("self_attn.q_proj.", "attn.in_proj_")] = (
            together
        )
    renamed = _renamed(state, names, inside, "encoder.layers")
    return found | {key.replace("encoder.layers", "transformer.resblocks"): value for key, value in renamed.items()}


def _unwrapped(encoder: Any) -> dict[str, Tensor]:
    return {key.removeprefix("text_model."): value for key, value in encoder.state_dict().items()}


def _renamed(state: dict[str, Tensor], names: dict[str, str], inside: dict[str, str], within: str) -> dict[str, Tensor]:
    """:param names: of what begins a key
    :param inside: of what follows, in keys that have `within`
    """
    found = {}
    for key, value in state.items():
        start = max((name for name in names if key.startswith(f"{name}.")), key=len, default="")
        rest = key.removeprefix(start)
        if within in key:
            for old, new in inside.items():
                rest = rest.replace(f".{old}.", f".{new}.")
        found[names.get(start, "") + rest] = value
    return found
