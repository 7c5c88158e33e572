"""What benchmarks/tools.py measures with: checkpoints and adapters of real shapes and random values, and what is wrong.

    PYTHON-OF-SD-SCRIPTS benchmarks/tools_inputs.py shapes SHAPES.json --kind sdxl --sd_scripts DIR
    python benchmarks/tools_inputs.py checkpoint FILE --shapes SHAPES.json

`shapes` has sd-scripts make its own SDXL or FLUX.1 model on the meta device and write down the names and shapes that
its checkpoint has, and those of a LoRA for all of its layers. The other commands need torch and safetensors alone.
`merged` and `summed` compare what was written with float64 sums, in every tenth layer.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


def sdxl_shapes() -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Of a checkpoint as `save_stable_diffusion_checkpoint` writes it; and of the weights that a LoRA adapts."""
    from accelerate import init_empty_weights
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from library import model_util, sdxl_model_util, sdxl_original_unet  # sd-scripts' own

    def clip(width: int, inner: int, layers: int, heads: int, act: str) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=49408, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=heads, max_position_embeddings=77, hidden_act=act, projection_dim=width,
        )  # fmt: skip

    with init_empty_weights(include_buffers=True):
        unet = sdxl_original_unet.SdxlUNet2DConditionModel()
        first = CLIPTextModel._from_config(clip(768, 3072, 12, 12, "quick_gelu"))
        second = CLIPTextModelWithProjection(clip(1280, 5120, 32, 20, "gelu"))
        vae = model_util.AutoencoderKL(**model_util.create_vae_diffusers_config())
    for model in (unet, first, second, vae):
        model.to("meta", torch.float16)
    logit_scale = torch.empty((), device="meta")
    parts = {
        "model.diffusion_model.": unet.state_dict(),
        "conditioner.embedders.0.transformer.": first.state_dict(),
        "conditioner.embedders.1.model.": sdxl_model_util.convert_text_encoder_2_state_dict_to_sdxl(
            second.state_dict(), logit_scale
        ),
        "first_stage_model.": model_util.convert_vae_state_dict(vae.state_dict()),
    }
    shapes = {prefix + key: list(value.shape) for prefix, part in parts.items() for key, value in part.items()}
    return shapes, _adapted([first, second], unet)


def _adapted(text_encoders: list[torch.nn.Module], unet: torch.nn.Module) -> dict[str, list[int]]:
    """Layers by sd-scripts' own networks.lora, convolutions too."""
    from networks import lora

    network = lora.LoRANetwork(text_encoders, unet, lora_dim=4, alpha=4, conv_lora_dim=4, conv_alpha=4, is_sdxl=True)
    modules = [*network.text_encoder_loras, *network.unet_loras]
    return {module.lora_name: list(module.org_module.weight.shape) for module in modules}


def flux_shapes(double: int, single: int) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """FLUX.1-dev with so many of its 19 and 38 blocks; and all matrices in the blocks."""
    from dataclasses import replace

    from accelerate import init_empty_weights

    from library import flux_models

    with init_empty_weights(include_buffers=True):
        flux = flux_models.Flux(replace(flux_models.configs["dev"].params, depth=double, depth_single_blocks=single))
    shapes = {key: list(value.shape) for key, value in flux.state_dict().items()}
    return shapes, {
        "lora_unet_" + key.removesuffix(".weight").replace(".", "_"): shape
        for key, shape in shapes.items()
        if "_blocks." in key and len(shape) == 2
    }


KINDS = {
    "sdxl": sdxl_shapes,
    "flux": lambda: flux_shapes(4, 11),  # 6 GB in bfloat16
    "flux_whole": lambda: flux_shapes(19, 38),  # 24 GB
}


def write_shapes(kind: str, file: Path, sd_scripts: Path) -> None:
    """Run by sd-scripts' Python."""
    sys.path[:0] = [str(sd_scripts)]
    checkpoint, adapted = KINDS[kind]()
    file.write_text(json.dumps({"checkpoint": checkpoint, "adapted": adapted}))


def tensors_of(shapes: Mapping[str, list[int]], dtype: torch.dtype, seed: int) -> Iterator[torch.Tensor]:
    """Normal values with the variance of a trained layer of that width, one tensor at a time.

    They are cut from one row of them at random places, which takes a twentieth of the time of drawing them all.
    """
    randoms = torch.Generator().manual_seed(seed)
    drawn = torch.randn(1 << 24, generator=randoms)
    for shape in shapes.values():
        size, fan_in = math.prod(shape), math.prod(shape[1:]) if len(shape) > 1 else 1024
        first = int(torch.randint(len(drawn), (), generator=randoms))
        values = drawn[first : first + size]
        if len(values) < size:
            values = torch.cat([values, *[drawn] * (size // len(drawn) + 1)])[:size]
        yield (values / math.sqrt(max(fan_in, 1))).to(dtype).view(shape)


def write_streaming(file: Path, shapes: Mapping[str, list[int]], dtype: torch.dtype, seed: int) -> None:
    """A safetensors file, one tensor in memory at a time."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = file.with_suffix(".partial")
    with open(partial, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors_of(shapes, dtype, seed):
            out.write(tensor.flatten().view(torch.uint8).numpy().data)
    partial.replace(file)


def write_lora(file: Path, adapted: Mapping[str, list[int]], rank: int, dtype: torch.dtype, seed: int) -> None:
    """A kohya file for all layers, its delta a hundredth of the weight."""
    from safetensors.torch import save_file

    randoms = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, (m, *kernel) in adapted.items():
        n, ones = math.prod(kernel), [1] * (len(kernel) - 1)
        up = torch.randn(m, rank, *ones, generator=randoms) / math.sqrt(rank)
        down = 0.01 * torch.randn(rank, *kernel, generator=randoms) / math.sqrt(n)
        tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"] = up.to(dtype), down.to(dtype)
        tensors[f"{name}.alpha"] = torch.tensor(float(rank)).to(dtype)
    save_file(tensors, file, {"ss_network_module": "networks.lora"})


def keys_by_layer(keys: Iterator[str]) -> dict[str, str]:
    """Key name -> key of a checkpoint, by dots for underscores alone: the U-Net or transformer, and CLIP-L."""
    starts = {"model.diffusion_model.": "lora_unet_", "conditioner.embedders.0.transformer.": "lora_te1_"}
    found = {}
    for key in keys:
        start = next((start for start in starts if key.startswith(start)), "")
        name = starts.get(start, "lora_unet_") + key[len(start) :].removesuffix(".weight").replace(".", "_")
        found[name] = key
    return found


def factors_of(lora: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a layer of an open kohya file, float64, with its scale."""
    up, down = (lora.get_tensor(f"{name}.lora_{part}.weight").double().flatten(1) for part in ("up", "down"))
    return up, down * float(lora.get_tensor(f"{name}.alpha")) / len(down)


def merged_errors(base: Path, loras: list[Path], ratios: list[float], written: Mapping[str, Path]) -> dict[str, Any]:
    """Of each file, relative to the weights: the error in a layer at most and on average, and that of the rounding."""
    from safetensors import safe_open

    found: dict[str, Any] = {}
    with safe_open(base, "pt") as original:
        adapters = [safe_open(path, "pt") for path in loras]
        names = sorted({key.partition(".")[0] for key in adapters[0].keys()})
        places = keys_by_layer(original.keys())
        layers = [name for name in names if name in places][::10]
        for way, path in {**written, "rounded once": None}.items():
            errors = []
            with safe_open(path or base, "pt") as file:
                for name in layers:
                    W = original.get_tensor(places[name])
                    exact = W.double().flatten(1)
                    for adapter, ratio in zip(adapters, ratios, strict=True):
                        up, down = factors_of(adapter, name)
                        exact = exact + ratio * (up @ down)
                    is_there = file.get_tensor(places[name]) if path else exact.to(W.dtype)
                    errors.append(float((is_there.double().flatten(1) - exact).norm() / exact.norm()))
            found[way] = {"most": f"{max(errors):.2e}", "mean": f"{sum(errors) / len(errors):.2e}"}
    return {"layers": len(layers), "error_by_weights": found}


def summed_errors(loras: list[Path], ratios: list[float], written: Mapping[str, Path]) -> dict[str, Any]:
    """Of each file, relative to the sum of the deltas, in a layer at most and on average."""
    from safetensors import safe_open

    adapters = [safe_open(path, "pt") for path in loras]
    layers = sorted({key.partition(".")[0] for key in adapters[0].keys()})[::10]
    found: dict[str, Any] = {}
    for way, path in written.items():
        errors = []
        with safe_open(path, "pt") as file:
            for name in layers:
                parts = [factors_of(adapter, name) for adapter in adapters]
                exact = sum(ratio * (up @ down) for ratio, (up, down) in zip(ratios, parts, strict=True))
                up, down = factors_of(file, name)
                errors.append(float((up @ down - exact).norm() / exact.norm()))
        found[way] = {"most": f"{max(errors):.2e}", "mean": f"{sum(errors) / len(errors):.2e}"}
    return {"layers": len(layers), "error_by_sum": found}


def main() -> None:
    """One command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    made = {name: commands.add_parser(name) for name in ("shapes", "checkpoint", "lora")}
    for command in made.values():
        command.add_argument("file", type=Path)
    made["shapes"].add_argument("--kind", choices=[*KINDS], required=True)
    made["shapes"].add_argument("--sd_scripts", type=Path, required=True)
    for name in ("checkpoint", "lora"):
        made[name].add_argument("--shapes", type=Path, required=True)
        made[name].add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
        made[name].add_argument("--seed", type=int, default=0)
    made["lora"].add_argument("--rank", type=int, default=32)
    for name in ("merged", "summed"):
        compared = commands.add_parser(name)
        compared.add_argument("written", nargs="+", metavar="WAY=FILE")
        compared.add_argument("--base", type=Path, required=name == "merged")
        compared.add_argument("--loras", type=Path, nargs="+", required=True)
        compared.add_argument("--ratios", type=float, nargs="+", required=True)
    given = parser.parse_args()
    if given.command in made:
        make(given)
        return
    written = {way: Path(path) for way, _, path in (text.rpartition("=") for text in given.written)}
    if given.command == "merged":
        print(json.dumps(merged_errors(given.base, given.loras, given.ratios, written)))
    else:
        print(json.dumps(summed_errors(given.loras, given.ratios, written)))


def make(given: argparse.Namespace) -> None:
    """A file, unless it is there."""
    if given.file.exists():
        return
    if given.command == "shapes":
        write_shapes(given.kind, given.file, given.sd_scripts)
        return
    known, dtype = json.loads(given.shapes.read_text()), getattr(torch, given.dtype)
    if given.command == "checkpoint":
        write_streaming(given.file, known["checkpoint"], dtype, given.seed)
    else:
        write_lora(given.file, known["adapted"], given.rank, dtype, given.seed)


if __name__ == "__main__":
    main()
