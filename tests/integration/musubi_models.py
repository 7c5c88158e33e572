"""The transformers of musubi-tuner, of its own classes: used by the scripts that run in its Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
from torch import nn
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig

if not torch.cuda.is_available():  # Wan's and FramePack's modules ask for it in the default of an argument
    torch.cuda.current_device = lambda: 0

from musubi_tuner.flux import flux_models
from musubi_tuner.flux_2 import flux2_models
from musubi_tuner.frame_pack.hunyuan_video_packed import HunyuanVideoTransformer3DModelPacked
from musubi_tuner.hidream_o1.qwen3_vl_transformers import Qwen3VLForConditionalGeneration
from musubi_tuner.hunyuan_model import models as hunyuan
from musubi_tuner.hunyuan_video_1_5.hunyuan_video_1_5_models import HunyuanVideo_1_5_DiffusionTransformer
from musubi_tuner.ideogram4.ideogram4_model import Ideogram4Config, Ideogram4Transformer
from musubi_tuner.kandinsky5.configs import TASK_CONFIGS
from musubi_tuner.kandinsky5.models.dit import DiffusionTransformer3D
from musubi_tuner.krea2.krea2_mmdit import SingleStreamDiT
from musubi_tuner.krea2.krea2_utils import single_mmdit_large_wide
from musubi_tuner.qwen_image.qwen_image_model import QwenImageTransformer2DModel
from musubi_tuner.wan.modules.model import WanModel
from musubi_tuner.zimage.zimage_model import ZImageTransformer2DModel


def hidream_o1(task: str) -> nn.Module:
    """As its trainer has it for a task, "t2i" or "i2i"."""
    rope = {"rope_type": "default", "mrope_section": [24, 20, 20]}
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config={"rope_scaling": rope}))
    model.hidream_o1_task = task
    return model


WAN = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}
WAN_5B = {"dim": 3072, "ffn_dim": 14336, "num_heads": 24, "num_layers": 30, "in_dim": 48, "out_dim": 48}

# (the network of musubi-tuner, the model at its real size)
REAL: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "kontext": ("lora_flux", lambda: flux_models.Flux(flux_models.configs_flux_dev_context.params)),
    "flux 2 dev": ("lora_flux_2", lambda: flux2_models.Flux2(flux2_models.Flux2Params())),
    "flux 2 klein 9b": ("lora_flux_2", lambda: flux2_models.Flux2(flux2_models.Klein9BParams())),
    "flux 2 klein 4b": ("lora_flux_2", lambda: flux2_models.Flux2(flux2_models.Klein4BParams())),
    "qwen image": ("lora_qwen_image", QwenImageTransformer2DModel),
    "qwen image edit 2511": ("lora_qwen_image", partial(QwenImageTransformer2DModel, zero_cond_t=True)),
    "z image": ("lora_zimage", ZImageTransformer2DModel),
    "wan t2v 14b": ("lora_wan", partial(WanModel, "t2v", **WAN)),
    "wan i2v 14b": ("lora_wan", partial(WanModel, "i2v", in_dim=36, **WAN)),
    "wan 2.2 5b": ("lora_wan", partial(WanModel, "t2v", model_version="2.2", **WAN_5B)),
    "hunyuan video": (
        "lora",
        lambda: hunyuan.HYVideoDiffusionTransformer(
            4096, 768, in_channels=16, out_channels=16, **hunyuan.HUNYUAN_VIDEO_CONFIG["HYVideo-T/2-cfgdistill"]
        ),
    ),
    "hunyuan video 1.5": ("lora_hv_1_5", partial(HunyuanVideo_1_5_DiffusionTransformer, "i2v")),
    "framepack": (
        "lora_framepack",
        partial(HunyuanVideoTransformer3DModelPacked, has_image_proj=True, has_clean_x_embedder=True),
    ),
    "kandinsky 5": (
        "lora_kandinsky",
        lambda: DiffusionTransformer3D(**asdict(TASK_CONFIGS["k5-lite-t2i-hd"].dit_params)),
    ),
    "krea 2": ("lora_krea2", lambda: SingleStreamDiT(single_mmdit_large_wide)),
    "ideogram 4": ("lora_ideogram4", lambda: Ideogram4Transformer(Ideogram4Config())),
    "hidream o1": ("lora_hidream_o1", partial(hidream_o1, "t2i")),
    "hidream o1 edit": ("lora_hidream_o1", partial(hidream_o1, "i2i")),
}
