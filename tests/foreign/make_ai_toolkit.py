"""Makes ai_toolkit_*.safetensors with ai-toolkit's own code (27a03a9).

    cd AI_TOOLKIT_CHECKOUT && PYTHONPATH=. python .../tests/foreign/make_ai_toolkit.py .../tests/foreign

The packages that it imports and that are not used here are replaced by empty ones. What a layer does is the product of
its two matrices, or the Kronecker product that its module makes.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn


class Empty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds any package that is not installed."""

    def find_spec(self, name, path, target=None):
        wanted = (
            "optimum torchao oyaml cv2 torchvision albumentations kornia lpips bitsandbytes controlnet_aux flatten_json"
        )
        wanted += " pytorch_fid lycoris torchaudio prodigyopt open_clip dotenv toml k_diffusion timm av librosa"
        wanted += " pytorch_wavelets"
        if name.split(".")[0] in wanted.split():
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = MagicMock(name=spec.name, __path__=[], __spec__=spec)
        for kind in ("QTensor", "QBytesTensor", "AffineQuantizedTensor"):
            setattr(module, kind, type(kind, (), {}))
        return module

    def exec_module(self, module):
        pass


def flux() -> nn.Module:
    return FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=1,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def unet() -> nn.Module:
    return UNet2DConditionModel(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, attention_head_dim=2, cross_attention_dim=12
    )


def main(folder: Path) -> None:
    sys.meta_path.append(Empty())
    info = types.ModuleType("info")
    info.software_meta, info.version = {}, "0"
    sys.modules["info"] = info
    from toolkit.config_modules import NetworkConfig
    from toolkit.lora_special import LoRASpecialNetwork

    lokr = NetworkConfig(type="lokr", linear=2, linear_alpha=1, lokr_factor=2, lokr_full_rank=False)
    facts = {}
    of_flux = {"is_flux": True, "is_transformer": True, "target_lin_modules": ["FluxTransformer2DModel"]}
    for name, make, options in (
        ("flux_lora", flux, of_flux),
        ("flux_lokr", flux, of_flux | {"network_type": "lokr", "network_config": lokr}),
        ("sd_lora", unet, {"conv_lora_dim": 2, "conv_alpha": 1}),
    ):  # fmt: skip
        torch.manual_seed(0)
        denoiser = make()
        network = LoRASpecialNetwork(
            text_encoder=[], unet=denoiser, lora_dim=2, alpha=1.0, train_text_encoder=False, train_unet=True,
            transformer_only=True, only_if_contains=["down_blocks.0", "down_blocks_0"] if name == "sd_lora" else None,
            **options,
        )  # fmt: skip
        paths = {id(layer): path for path, layer in denoiser.named_modules()}
        adapted = [
            (module, module.org_module[0].weight.shape, paths[id(module.org_module[0])])
            for module in network.unet_loras
        ]
        network.apply_to([], denoiser, False, True)
        for parameter in network.parameters():
            parameter.data.normal_(std=0.3)
        save_file(network.get_state_dict(dtype=torch.float32), folder / f"ai_toolkit_{name}.safetensors")
        for module, shape, path in adapted:
            if hasattr(module, "lora_up"):
                up, down = module.lora_up.weight.flatten(1), module.lora_down.weight.flatten(1)
                delta = up @ down * float(module.alpha) / module.lora_dim
                if "flux" in name:  # the file has no alpha, which they set to the rank
                    delta = up @ down
            else:
                delta = module.get_weight(torch.zeros(shape)).flatten(1)
            facts[f"{name}.{path}"] = delta.detach().contiguous()
        print(name, len(network.unet_loras), next(iter(network.get_state_dict())))
    save_file(facts, folder / "ai_toolkit.expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
