"""Makes onetrainer_*.safetensors and what their layers are to do, with OneTrainer's own code (23df383).

    cd ONETRAINER_CHECKOUT && PYTHONPATH=. python .../tests/foreign/make_onetrainer.py .../tests/foreign

Its savers write LoRAs of a small U-Net and a small FLUX.1 in each of its formats, and its other kinds of adapter in one
each. What a layer does is found by running it on unit inputs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from modules.model.FluxModel import FluxModel
from modules.model.StableDiffusionModel import StableDiffusionModel
from modules.modelSaver.flux.FluxLoRASaver import FluxLoRASaver
from modules.modelSaver.stableDiffusion.StableDiffusionLoRASaver import StableDiffusionLoRASaver
from modules.module.LoRAModule import LoRAModuleWrapper
from modules.util.config.TrainConfig import TrainConfig
from modules.util.enum.ModelFormat import ModelFormat
from modules.util.enum.ModelType import ModelType, PeftType
from safetensors.torch import load_file, save_file
from torch import nn

SD_LAYERS = r"^down_blocks\.0\.(attentions\.0\.(proj_in|.*attn1\.to_q)|resnets\.0\.conv1)$"
FLUX_LAYERS = r"^(single_)?transformer_blocks\.0\.(attn\.(to|add)_\w+|proj_mlp|norm\.linear|ff\.net\.2)|norm_out"
KINDS = {
    "lora": {"peft_type": PeftType.LORA},
    "dora": {"peft_type": PeftType.LORA, "lora_decompose": True, "lora_decompose_output_axis": True},
    "dora_in": {"peft_type": PeftType.LORA, "lora_decompose": True},
    "loha": {"peft_type": PeftType.LOHA},
    "lokr": {"peft_type": PeftType.LOKR, "lokr_dim": 2, "lokr_decompose_factor": 2},
    "oft": {"peft_type": PeftType.OFT_2, "oft_block_size": 4},
    "oft_scaled": {"peft_type": PeftType.OFT_2, "oft_block_size": 4, "oft_scaled": True, "oft_block_share": True},
}
LORA_FORMATS = (ModelFormat.DIFFUSERS_LORA, ModelFormat.KOHYA_LORA, ModelFormat.LEGACY_LORA, ModelFormat.COMFY_LORA,
                ModelFormat.ORIGINAL_LORA)  # fmt: skip


def small_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, attention_head_dim=2, cross_attention_dim=12
    )


def small_flux() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=1,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def effective(layer: nn.Module) -> torch.Tensor:
    """The weight (m, n) that a layer has in effect."""
    weight = layer.weight
    unit = torch.eye(weight[0].numel()).reshape(-1, *weight.shape[1:])
    if weight.dim() > 2:
        layer.padding = (0, 0)
    return (layer(unit) - (0 if layer.bias is None else layer(torch.zeros_like(unit)))).flatten(1).T.contiguous()


def run(name: str, kind: str, folder: Path) -> dict[str, torch.Tensor]:
    """Writes the files of one kind of adapter; returns what the layers do, and their weights."""
    torch.manual_seed(0)
    config = TrainConfig.default_values()
    config.lora_rank, config.lora_alpha, config.layer_filter_regex, config.train_device = 3, 2.0, True, "cpu"
    for option, value in KINDS[kind].items():
        setattr(config, option, value)
    facts: dict[str, torch.Tensor] = {}
    for format in LORA_FORMATS if kind == "lora" else LORA_FORMATS[:2] if name == "sd" else ():
        torch.manual_seed(0)
        model = StableDiffusionModel(ModelType.STABLE_DIFFUSION_15) if name == "sd" else FluxModel(ModelType.FLUX_DEV_1)
        denoiser = small_unet() if name == "sd" else small_flux()
        for layer in denoiser.modules():
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
                layer.padding = (0, 0)
        part, layers = ("unet", SD_LAYERS) if name == "sd" else ("transformer", FLUX_LAYERS)
        wrapper = LoRAModuleWrapper(
            denoiser, part, config, [layers], model.fusion_groups(), fuse=format.needs_qkv_fusion()
        )
        generator = torch.Generator().manual_seed(1)
        for parameter in wrapper.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
            if kind.startswith("dora") and parameter.dim() >= 2 and parameter.numel() == max(parameter.shape):
                parameter.data = parameter.data.abs() + 0.5
        setattr(model, part, denoiser)
        setattr(model, f"{part}_lora", wrapper)
        model.train_config = config
        saver = StableDiffusionLoRASaver() if name == "sd" else FluxLoRASaver()
        file = folder / f"onetrainer_{name}_{kind}_{format.name.removesuffix('_LORA').lower()}.safetensors"
        try:
            saver._save(model, format, str(file), torch.float32)
        except (NotImplementedError, RuntimeError) as error:
            print("no", file.name, error)
            continue
        save_file(load_file(file), file)  # without its header of the training's options
        wrapper.hook_to_module()
        fused = "fused." if format.needs_qkv_fusion() else ""
        with torch.no_grad():
            for path, layer in denoiser.named_modules():
                if isinstance(layer, nn.Linear | nn.Conv2d) and any(f.matches(path) for f in wrapper.module_filters):
                    W = layer.weight.detach().flatten(1)
                    facts[f"{fused}delta.{part}.{path}"] = effective(layer) - W
                    facts[f"base.{part}.{path}"] = W.clone()
    return facts


if __name__ == "__main__":
    to = Path(sys.argv[1])
    for name in ("sd", "flux"):
        for kind in KINDS:
            facts = run(name, kind, to)
            if facts:
                save_file(facts, to / f"onetrainer_{name}_{kind}.expected.safetensors")
