"""What a training step of FLUX.2 klein (4B) and Z-Image costs with DEFT and with musubi-tuner's own LoRA.

    MUSUBI_DIR=/path/to/musubi-tuner python benchmarks/musubi_step.py

musubi-tuner's own classes at their full sizes, random weights, 1024 x 1024; its own networks, which adapt the same
layers. Both adapters are alive in one process, on the same base weights; their steps are taken in turn, and ratios are
of steps that followed one another. A step is as in train_step.py: forward, backward, clipping, fused AdamW; bfloat16
base, float32 adapters and autocast. Peak memory is of whole steps with one adapter alone. Prints tables and writes JSON
under benchmarks/results/. diffusers, accelerate and transformers need not be there: a step uses nothing of them;
einops has to be. --small is for a CPU.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
for package in ("diffusers", "transformers", "accelerate"):
    if importlib.util.find_spec(package) is None:
        sys.modules[package] = MagicMock()

from benchmarks import train_step  # noqa: E402
from benchmarks.train_step import Case, Contestant, in_turn, ratio_of, released  # noqa: E402

MODELS = {"klein": "lora_flux_2", "zimage": "lora_zimage"}
ADAPTERS = ("musubi", "lora", "deft", "deft-keep", "deft-paper", "deft-alone")  # the others as in train_step.py
TEXT = 512  # tokens
SMALL_KLEIN = {"hidden_size": 64, "num_heads": 2, "depth": 1, "depth_single_blocks": 2, "axes_dim": [8, 8, 8, 8]}
SMALL_ZIMAGE = {
    "dim": 64,
    "n_heads": 2,
    "n_kv_heads": 2,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "axes_dims": [8, 12, 12],
}


def musubi(name: str) -> ModuleType:
    """One of musubi-tuner's modules."""
    folder = str(Path(os.environ["MUSUBI_DIR"]) / "src")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(f"musubi_tuner.{name}")


def build(name: str, small: bool, device: str, dtype: torch.dtype) -> tuple[nn.Module, Callable[[int, int], Any]]:
    """The transformer, and what makes its inputs for a batch of pictures of so many pixels a side."""
    if name == "klein":
        models = musubi("flux_2.flux2_models")
        kind = models.Flux2
        params = models.Klein4BParams(**SMALL_KLEIN if small else {})
        make: Callable[[], nn.Module] = lambda: _answering(kind)(params, "torch")  # noqa: E731
    else:
        kind = musubi("zimage.zimage_model").ZImageTransformer2DModel
        make = lambda: _answering(kind)(**SMALL_ZIMAGE if small else {})  # noqa: E731
    model = train_step.random_model(make, device, dtype)

    def inputs(batch: int, resolution: int) -> dict[str, Any]:
        def noise(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, device=device, dtype=dtype)

        time = torch.rand(batch, device=device, dtype=dtype)
        if name == "zimage":
            side = resolution // 8
            return {"x": noise(16, 1, side, side), "t": time, "cap_feats": noise(TEXT, 2560), "cap_mask": None}
        tokens = (resolution // 16) ** 2
        ids = torch.zeros(batch, tokens + TEXT, 4, device=device)
        return {
            "x": noise(tokens, params.in_channels), "x_ids": ids[:, TEXT:], "timesteps": time, "guidance": None,
            "ctx": noise(TEXT, params.context_in_dim), "ctx_ids": ids[:, :TEXT],
        }  # fmt: skip

    return model, inputs


def _answering(kind: type[nn.Module]) -> type[nn.Module]:
    """The class, whose answers are diffusers', a tuple."""

    def forward(self: nn.Module, *, return_dict: bool, **inputs: Any) -> tuple[Tensor]:
        return (kind.forward(self, **inputs),)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def adapters(model: str) -> Callable[..., Any]:
    """`train_step.adapt`, with this model's own network of musubi-tuner by the name "musubi"."""

    def adapt(name: str, made: nn.Module, rank: int, device: str) -> tuple[list[nn.Parameter], Callable[[], None]]:
        if name != "musubi":
            return train_step.adapt(name, made, rank, device)
        network = musubi(f"networks.{MODELS[model]}").create_arch_network(1.0, rank, rank, None, None, made)
        network.apply_to(None, made, apply_text_encoder=False, apply_unet=True)
        network.to(device).train()
        made.network = [network]
        return list(network.parameters()), lambda: None

    return adapt


def measure(name: str, base: nn.Module, inputs: Callable, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """One model with both adapters."""
    adapt, rows = adapters(name), {which: dict[str, Any]() for which in args.adapters}
    for which in args.adapters if args.device == "cuda" else ():
        with released():
            rows[which] |= train_step.peak_memory(which, base, inputs, case, args, adapt)
    made = {which: Contestant(which, base, inputs, case, args, adapt) for which in args.adapters}
    times = in_turn(made, args.steps, "step")
    for which, contestant in made.items():
        rows[which] |= {
            "median_ms": 1e3 * statistics.median(times[which]),
            "quartiles_ms": [1e3 * q for q in statistics.quantiles(times[which], n=4)[::2]],
            "parameters": sum(p.numel() for p in contestant.parameters),
        }
        if which != "musubi" and "musubi" in times:
            rows[which]["of_musubi"] = ratio_of(times[which], times["musubi"])
    return {"model": name, "rank": case.rank, "checkpointing": case.checkpointing, "rows": rows}


def show(found: dict[str, Any]) -> None:
    """Prints one case as a table."""
    print(
        f"\n{found['model']}, rank {found['rank']}, {'with' if found['checkpointing'] else 'without'} checkpointing\n"
    )
    print("| adapter | step, ms (quartiles) | of musubi-tuner's (95%) | peak, MiB | above its, MiB | adapter, MiB |")
    print("|---|---|---|---|---|---|")
    theirs = found["rows"].get("musubi", {}).get("peak_mib")
    for which, row in found["rows"].items():
        low, high = row["quartiles_ms"]
        cells = [f"{row['median_ms']:.1f} ({low:.1f} to {high:.1f})"]
        ratio, peak = row.get("of_musubi"), row.get("peak_mib")
        cells.append(f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})" if ratio else "")
        cells.append(f"{peak:.0f}" if peak else "")
        cells.append(f"{peak - theirs:+.1f}" if peak and theirs else "")
        print(f"| {which} | {' | '.join(cells)} | {row['parameters'] * 4 / 2**20:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--adapters", nargs="+", default=["musubi", "deft"], choices=ADAPTERS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--checkpointing", nargs="+", choices=["no", "yes"], default=["yes", "no"])
    parser.add_argument("--steps", type=int, default=20, help="of each adapter, in turn")
    parser.add_argument("--small", action="store_true", help="models of a few small layers")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "musubi_step.json")
    args = parser.parse_args()
    if args.device == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # as train_step.py
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    card = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    result: dict[str, Any] = {"device": card, "torch": torch.__version__, "steps": args.steps, "configurations": []}
    for name in args.model:
        with released():
            base, inputs = build(name, args.small, args.device, dtype)
            billions = sum(p.numel() for p in base.parameters()) / 1e9
            print(f"{name}: {billions:.2f} billion parameters, {len(train_step.layers_of(base, 1))} layers, {card}")
            for checkpointing in args.checkpointing:
                case = Case(args.rank, args.resolution, args.batch, checkpointing == "yes")
                with released():
                    found = measure(name, base, inputs, case, args)
                show(found)
                result["configurations"].append(found)
                args.output.parent.mkdir(exist_ok=True, parents=True)
                args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            del base


if __name__ == "__main__":
    main()
