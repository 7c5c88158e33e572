"""Runs ComfyUI's own code on adapter files: `python comfyui_side.py COMFYUI_DIR FOLDER`.

FOLDER has NAME.safetensors and NAME.json, the shapes of ComfyUI's weights by path. NAME.patched.safetensors is written
beside: what its load_lora and calculate_weight make of weights that are zero. Printed are the keys that it did not
find, and the paths that its own model of that kind, made small, does not have. Packages that are not installed, of
which only generating needs something, have a stand-in.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

STAND_INS = ("comfy_aimdo", "comfy_kitchen", "einops", "torchsde", "av", "aiohttp", "yaml", "sentencepiece", "scipy",
             "torchaudio", "tokenizers", "comfy_api", "spandrel", "folder_paths", "node_helpers", "cv2",
             "torchvision")  # fmt: skip


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        known = name.partition(".")[0] in STAND_INS
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module: Any = MagicMock(name=spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


sys.meta_path.append(_StandIns())
sys.path.insert(0, sys.argv[1])
arguments, sys.argv = sys.argv[2:], [sys.argv[0], "--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.lora  # noqa: E402
import comfy.lora_convert  # noqa: E402
import comfy.model_base as base  # noqa: E402
import comfy.ops  # noqa: E402
from comfy.ldm.flux.model import Flux  # noqa: E402
from comfy.ldm.hidream_o1.model import HiDreamO1Transformer  # noqa: E402
from comfy.ldm.hunyuan_video.model import HunyuanVideo  # noqa: E402
from comfy.ldm.ideogram4.model import Ideogram4Transformer2DModel  # noqa: E402
from comfy.ldm.kandinsky5.model import Kandinsky5  # noqa: E402
from comfy.ldm.krea2.model import SingleStreamDiT  # noqa: E402
from comfy.ldm.lumina.model import NextDiT  # noqa: E402
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel  # noqa: E402
from comfy.ldm.wan.model import WanModel  # noqa: E402

MADE: dict[str, Any] = {"dtype": torch.float32, "device": "meta", "operations": comfy.ops.disable_weight_init}
FLUX = {"in_channels": 16, "out_channels": 16, "vec_in_dim": 8, "context_in_dim": 8, "hidden_size": 32, "mlp_ratio": 4,
        "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": [4, 6, 6], "theta": 1, "patch_size": 2,
        "qkv_bias": True, "guidance_embed": True}  # fmt: skip
HUNYUAN = {**FLUX, "patch_size": [1, 2, 2], "byt5": False, "meanflow": False, "use_cond_type_embedding": False,
           "vision_in_dim": None, "meanflow_sum": False}  # fmt: skip
# its class of the whole, its transformer
MODELS: dict[str, tuple[Any, Any]] = {
    "FLUX.1 Kontext": (base.Flux, lambda: Flux(txt_ids_dims=[], **FLUX, **MADE)),
    "FLUX.2": (base.Flux2, lambda: Flux(
        txt_ids_dims=[3], global_modulation=True, mlp_silu_act=True, ops_bias=False,
        **{**FLUX, "vec_in_dim": None}, **MADE
    )),
    "Qwen-Image": (base.QwenImage, lambda: QwenImageTransformer2DModel(
        num_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
        **MADE
    )),
    "Z-Image": (base.Lumina2, lambda: NextDiT(
        dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, qk_norm=True, cap_feat_dim=16,
        axes_dims=(4, 6, 6), z_image_modulation=True, pad_tokens_multiple=32, **MADE
    )),
    "Wan 2.1 or 2.2": (base.WAN21, lambda: WanModel("i2v", dim=32, ffn_dim=64, num_heads=2, num_layers=1, **MADE)),
    "HunyuanVideo": (base.HunyuanVideo, lambda: HunyuanVideo(**HUNYUAN, **MADE)),
    "HunyuanVideo 1.5": (base.HunyuanVideo15, lambda: HunyuanVideo(
        **{**HUNYUAN, "vec_in_dim": None, "use_cond_type_embedding": True, "depth_single_blocks": 0}, **MADE
    )),
    "Kandinsky 5": (base.Kandinsky5, lambda: Kandinsky5(
        model_dim=64, ff_dim=64, num_text_blocks=1, num_visual_blocks=1, **MADE
    )),
    "Krea 2": (base.Krea2, lambda: SingleStreamDiT(
        features=32, txtdim=16, heads=2, kvheads=1, layers=1, txtheads=2, txtkvheads=2, **MADE
    )),
    "Ideogram 4": (base.Ideogram4, lambda: Ideogram4Transformer2DModel(
        num_layers=1, num_attention_heads=2, attention_head_dim=16, intermediate_size=64, llm_features_dim=32, **MADE
    )),
    "HiDream-O1": (base.HiDreamO1, lambda: HiDreamO1Transformer(
        text_config_overrides={"num_hidden_layers": 1, "vocab_size": 8}, vision_config_overrides={"depth": 1}, **MADE
    )),
}  # fmt: skip


def patched(name: str, folder: Path) -> tuple[list[str], list[str]]:
    """The keys that are not found, and the paths that its own model does not have."""
    kind, make = MODELS[name]
    shapes = json.loads((folder / f"{name}.json").read_text())
    weights = {f"diffusion_model.{path}.weight": torch.zeros(shape) for path, shape in shapes.items()}
    missing = sorted(set(weights) - {f"diffusion_model.{key}" for key in make().state_dict()})
    width = shapes.get("layers.0.attention.out", [0])[0]
    config = {"n_layers": 1, "n_refiner_layers": 1, "dim": width, "layers": 1, "depth": 1, "depth_single_blocks": 1}
    stub = type("Stub", (kind,), {"__init__": lambda self: None, "state_dict": lambda self: weights})()
    stub.model_config = SimpleNamespace(unet_config=config)
    file = comfy.lora_convert.convert_lora(load_file(folder / f"{name}.safetensors"))
    found = comfy.lora.load_lora(file, comfy.lora.model_lora_keys_unet(stub, {}))
    used: set[str] = set()
    for place, patch in found.items():
        key, offset, function = (place, None, None) if isinstance(place, str) else (*place, None)[:3]
        used |= patch.loaded_keys
        weights[key] = comfy.lora.calculate_weight([(1.0, patch, 1.0, offset, function)], weights[key], key)
    made: dict[str, Tensor] = {key: weight.contiguous() for key, weight in weights.items()}
    save_file(made, folder / f"{name}.patched.safetensors")
    return sorted(set(file) - used), missing


if __name__ == "__main__":
    results = {file.stem: patched(file.stem, Path(arguments[0])) for file in sorted(Path(arguments[0]).glob("*.json"))}
    print("--- " + json.dumps(results))
