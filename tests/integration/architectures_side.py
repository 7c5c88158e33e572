"""Runs in sd-scripts' own Python: `python architectures_side.py FILE` writes, for every architecture and many options,
the layers and ranks that sd-scripts' own network and networks.deft adapt on a model of real shapes (meta device), and
what both call the model in metadata."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from networks import deft, deft_architectures


def clip(width: int, layers: int, projection: bool = False) -> torch.nn.Module:
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5() -> torch.nn.Module:
    return T5EncoderModel(
        T5Config(
            d_model=4096, d_ff=10240, d_kv=64, num_layers=24, num_heads=64, vocab_size=32128,
            feed_forward_proj="gated-gelu", dense_act_fn="gelu_new", is_encoder_decoder=False, use_cache=False,
        )
    )  # fmt: skip


def models() -> dict[str, tuple[list[torch.nn.Module | None], torch.nn.Module]]:
    """Text encoders and denoiser of each architecture."""
    from transformers import Gemma2Config, Gemma2Model, Qwen3Config, Qwen3Model

    from library import (
        anima_models,
        chroma_models,
        flux_models,
        hunyuan_image_models,
        lumina_models,
        model_util,
        original_unet,
        sd3_models,
        sdxl_original_unet,
    )

    unet_config = model_util.create_unet_diffusers_config
    anima = {
        "max_img_h": 512, "max_img_w": 512, "max_frames": 128, "in_channels": 16, "out_channels": 16,
        "patch_spatial": 2, "patch_temporal": 1, "model_channels": 2048, "concat_padding_mask": True,
        "crossattn_emb_channels": 1024, "pos_emb_cls": "rope3d", "use_adaln_lora": True, "adaln_lora_dim": 256,
        "num_blocks": 28, "num_heads": 16, "use_llm_adapter": True,
    }  # fmt: skip
    medium = {
        "patch_size": 2, "in_channels": 16, "depth": 24, "adm_in_channels": 2048, "context_embedder_in_features": 4096,
        "context_embedder_out_features": 1536, "pos_embed_max_size": 384, "num_patches": 384 * 384, "qk_norm": "rms",
        "x_block_self_attn_layers": list(range(13)), "model_type": "5-medium",
    }  # fmt: skip
    te = clip(768, 12), clip(1280, 32, projection=True)
    return {
        "sd15": ([te[0]], original_unet.UNet2DConditionModel(**unet_config(False))),
        "sd21": ([clip(1024, 23)], original_unet.UNet2DConditionModel(**unet_config(True))),
        "sdxl": ([*te], sdxl_original_unet.SdxlUNet2DConditionModel()),
        "flux": ([te[0], t5()], flux_models.Flux(flux_models.configs["dev"].params)),
        "schnell": ([te[0], None], flux_models.Flux(flux_models.configs["schnell"].params)),
        "chroma": ([torch.nn.Module(), t5()], chroma_models.Chroma(chroma_models.chroma_params)),
        "sd3": ([*te, t5()], sd3_models.MMDiT(**medium)),
        "lumina": ([Gemma2Model(Gemma2Config())], lumina_models.NextDiT_2B_GQA_patch2_Adaln_Refiner()),
        "hunyuan": ([None, None], hunyuan_image_models.HYImageDiffusionTransformer()),
        "anima": ([Qwen3Model(Qwen3Config(hidden_size=1024, num_hidden_layers=28))], anima_models.Anima(**anima)),
    }


MODULES = {"sd15": "lora", "sd21": "lora", "sdxl": "lora", "flux": "lora_flux", "schnell": "lora_flux",
           "chroma": "lora_flux", "sd3": "lora_sd3", "lumina": "lora_lumina", "hunyuan": "lora_hunyuan_image",
           "anima": "lora_anima"}  # fmt: skip
CONV: dict[str, Any] = {"conv_dim": "2", "conv_alpha": "1"}
SD_BLOCKS = {"block_dims": ",".join(str(i % 5) for i in range(25))}
SDXL_BLOCKS = {"block_dims": ",".join(str(i % 5) for i in range(23))}
OPTIONS: dict[str, list[dict[str, str]]] = {
    "sd15": [
        {}, CONV, SD_BLOCKS, SD_BLOCKS | CONV | {"conv_block_dims": ",".join(str(i % 3) for i in range(25))},
        {"down_lr_weight": "zeros", "up_lr_weight": "sine"}, CONV | {"mid_lr_weight": "0", "up_lr_weight": "1,0,1"},
        {"down_lr_weight": "cosine+.25", "block_lr_zero_threshold": "0.5"},
    ],
    "sd21": [{}, CONV],
    "sdxl": [{}, CONV, SDXL_BLOCKS, SDXL_BLOCKS | CONV, {"down_lr_weight": "zeros", "mid_lr_weight": "0,1,0"},
             {"up_lr_weight": "reverse_linear", "block_lr_zero_threshold": "0.3"}],
    "flux": [
        {}, {"train_t5xxl": "True"}, {"train_blocks": "double"}, {"train_blocks": "single"},
        {"train_double_block_indices": "0-2,5", "train_single_block_indices": "none"},
        {"img_attn_dim": "8", "txt_attn_dim": "2", "img_mlp_dim": "0", "single_dim": "3", "single_mod_dim": "1"},
        {"in_dims": "[4,2,2,2,4]"}, {"in_dims": "4,0,0,0,4", "txt_mod_dim": "0"},
        {"network_reg_dims": "single_blocks_3_=7,_txt_=0"},
        {"network_reg_dims": "double_blocks_1_=9", "train_double_block_indices": "3"},
    ],
    "schnell": [{}],
    "chroma": [{}, {"train_blocks": "single"}],
    "sd3": [
        {}, {"train_t5xxl": "True"}, {"context_attn_dim": "8", "x_mlp_dim": "0", "x_mod_dim": "1"},
        {"emb_dims": "[1,2,3,4,5,6]"}, {"train_block_indices": "0,3-4"},
    ],
    "lumina": [{}, {"attn_dim": "8", "refiner_dim": "2"}, {"train_blocks": "transformer"}, {"train_blocks": "refiners"},
               {"train_blocks": "noise_refiner"}, {"embedder_dims": "[0,2,3]"}],
    "hunyuan": [{}, {"network_reg_dims": "single_blocks_3_=7"}],
    "anima": [
        {}, {"train_llm_adapter": "True"}, {"exclude_patterns": "['.*mlp.*']"},
        {"include_patterns": "['.*final_layer.*']", "network_reg_dims": r"blocks\.0\..*=8"},
    ],
}  # fmt: skip


def bases() -> dict[str, tuple[str, str]]:
    """What sd-scripts' trainers write as `ss_base_model_version` and `modelspec.architecture` of each."""
    from library.sai_model_spec import determine_architecture

    from library import flux_utils, hunyuan_image_utils, lumina_util, model_util, sdxl_model_util

    kinds = {"flux": {"flux": "dev"}, "schnell": {"flux": "schnell"}, "chroma": {"flux": "chroma"},
             "sd3": {"sd3": "5-medium"}, "lumina": {"lumina": "lumina2"}, "hunyuan": {"hunyuan_image": "2.1"},
             "anima": {"anima": "preview"}}  # fmt: skip
    versions = {
        "sd15": model_util.get_model_version_str_for_sd1_sd2(False, False),
        "sd21": model_util.get_model_version_str_for_sd1_sd2(True, False),
        "sdxl": sdxl_model_util.MODEL_VERSION_SDXL_BASE_V1_0,
        "flux": flux_utils.MODEL_VERSION_FLUX_V1, "schnell": flux_utils.MODEL_VERSION_FLUX_V1,
        "chroma": flux_utils.MODEL_VERSION_CHROMA, "sd3": "5-medium", "lumina": lumina_util.MODEL_VERSION_LUMINA_V2,
        "hunyuan": hunyuan_image_utils.MODEL_VERSION_2_1, "anima": "anima",
    }  # fmt: skip
    return {
        name: (version, determine_architecture(False, False, name == "sdxl", True, False, kinds.get(name)))
        for name, version in versions.items()
    }


def main(file: Path) -> None:
    with torch.device("meta"):
        made = models()
    found: dict[str, Any] = {}
    known = bases()
    for name, (encoders, denoiser) in made.items():
        ours = deft_architectures.base_metadata(denoiser, deft_architectures.recognise(denoiser)[1])
        named = ours["ss_base_model_version"], ours.get("modelspec.architecture", "")
        found[f"{name} metadata"] = [known[name] if name != "sd21" else (known[name][0], ""), named]
        module = __import__(f"networks.{MODULES[name]}", fromlist=["x"])
        for options in OPTIONS[name]:
            if MODULES[name] == "lora":  # building a network with convolutions changes the class for those after it
                module.LoRANetwork.UNET_TARGET_REPLACE_MODULE = ["Transformer2DModel"]
            given = encoders[0] if MODULES[name] == "lora" and len(encoders) == 1 else encoders
            theirs = module.create_network(1.0, 4, 1, None, given, denoiser, **options)
            network = deft.create_network(1.0, 4, 1, None, given, denoiser, **options)
            modules = theirs.text_encoder_loras + theirs.unet_loras
            found[f"{name} {options}"] = [
                [[m.lora_name, m.lora_dim, float(m.scale)] for m in modules],
                [[m.lora_name, m.rank, m.scale] for m in network.all_modules],
            ]
    file.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
