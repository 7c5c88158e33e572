"""Files that are neither an adapter nor a checkpoint that is known: what they are is told, and where they belong."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from networks import deft_formats
from networks.deft_checkpoint import open_checkpoint
from networks.deft_config import DeftError

# Keys as these kinds of files have them, written from memory: sd-vae-ft-mse in both forms, Wan's VAE, EasyNegative and
# SDXL embeddings, diffusers' textual inversion, control_v11p_sd15_canny in both forms, FLUX.1's by InstantX,
# ip-adapter_sd15, t2iadapter_canny, 4x-UltraSharp, RealESRGAN_x4plus, SwinIR_4x, CLIP-ViT-H, Stable Diffusion 3's
# unknown sisters.
OTHERS = [
    ("a VAE", "models/vae", ["decoder.up.0.block.0.conv1.weight", "encoder.conv_in.weight"]),
    ("a VAE", "models/VAE", ["first_stage_model.encoder.down.0.block.0.conv1.weight"]),
    ("a VAE", "models/vae", ["encoder.down_blocks.0.resnets.0.conv1.weight", "quant_conv.weight"]),
    ("a VAE", "models/vae", ["encoder.middle.0.residual.2.weight", "conv1.weight"]),
    ("an embedding", "models/embeddings", ["emb_params"]),
    ("an embedding", "embeddings", ["clip_l", "clip_g"]),
    ("an embedding", "models/embeddings", ["<cat-toy>"]),
    ("a ControlNet", "models/controlnet", ["control_model.input_hint_block.0.weight", "control_model.x.weight"]),
    ("a ControlNet", "models/ControlNet", ["controlnet_cond_embedding.conv_in.weight", "conv_in.weight"]),
    ("a ControlNet", "models/controlnet", ["controlnet_blocks.0.weight", "x_embedder.weight"]),
    ("an IP-Adapter", "models/ipadapter", ["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"]),
    ("a T2I-Adapter", "models/controlnet", ["adapter.body.0.resnets.0.block1.weight", "conv_in.weight"]),
    ("an upscaler", "models/upscale_models", ["model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"]),
    ("an upscaler", "models/ESRGAN", ["params_ema.body.0.rdb1.conv1.weight"]),
    ("an upscaler", "models/ESRGAN", ["layers.0.residual_group.blocks.0.attn.qkv.weight"]),
    ("a CLIP vision model", "models/clip_vision", ["vision_model.encoder.layers.0.mlp.fc1.weight"]),
    ("a model's checkpoint of a kind", "models/checkpoints", ["model.diffusion_model.some_block.0.weight"]),
]


@pytest.mark.parametrize(("name", "place", "keys"), OTHERS)
def test_what_a_file_is_and_where_it_belongs(tmp_path, name, place, keys):
    path = tmp_path / "a.safetensors"
    save_file({key: torch.ones(2, 2) for key in keys}, path)
    for read, wanted in ((deft_formats.read, "an adapter"), (open_checkpoint, "a model's checkpoint")):
        with pytest.raises(DeftError) as told:
            read(path)
        assert f"{path}: this is {name}" in str(told.value)
        assert f"where {wanted}" in str(told.value)
        assert f"{place} of " in str(told.value) or f"{place} or " in str(told.value)


def test_an_adapter_with_embeddings_in_it_is_read(tmp_path):
    path, layer = tmp_path / "a.safetensors", "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    lora = {f"{layer}.lora_up.weight": torch.ones(4, 2), f"{layer}.lora_down.weight": torch.ones(2, 4)}
    save_file({**lora, "clip_l": torch.ones(1, 768)}, path)
    assert list(deft_formats.read(path).changes) == [layer]
