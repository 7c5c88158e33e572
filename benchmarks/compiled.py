"""What --torch_compile costs once and saves in every step, on real architectures with random weights; no download.

    python benchmarks/compiled.py --model sdxl flux
    python benchmarks/compiled.py --model small-flux --device cpu --resolution 128 --adapters none deft deft-alone

Each adapter steps as it is and with the model's repeated blocks compiled, in turn, in one process on the same base
weights; steps, ratios and their intervals are those of benchmarks/train_step.py. `compiling_s` is what the first step
took longer than later ones, with an empty cache of inductor's; `cached_s` the same once more, with the cache that the
first left, as a second run on the same machine has it. Adapters are those of train_step.py; `deft-alone`, compiled,
forms its bases within the graphs. Prints tables and writes JSON under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.train_step import ADAPTERS, Case, Contestant, build, in_turn, ratio_of, released  # noqa: E402

COMPILED = ", compiled"
MODELS = ("sdxl", "flux", "sd15", "small", "small-flux")


def counts() -> dict[str, int]:
    """What dynamo has counted until now."""
    counters = torch._dynamo.utils.counters
    return {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}


def compiled(name: str, base: nn.Module, inputs: Callable, case: Case, args: argparse.Namespace) -> tuple[Any, dict]:
    """A contestant with compiled blocks after its first steps, and what they took."""
    contestant = Contestant(name, base, inputs, case, args)
    contestant.model.compile_repeated_blocks(backend=args.backend)
    seconds, found = [], {}
    for _ in range(2):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        first = contestant.timed(contestant.step)
        found = counts()
        seconds.append(first - statistics.median(contestant.timed(contestant.step) for _ in range(3)))
    later = {f"{key}_later": value - found[key] for key, value in counts().items()}
    return contestant, {"compiling_s": seconds[0], "cached_s": seconds[1]} | found | later


def measure(base: nn.Module, inputs: Callable, case: Case, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All adapters, each as it is and compiled, in turn."""
    rows: dict[str, dict[str, Any]] = {}
    contestants: dict[str, Contestant] = {}
    for name in args.adapters:
        contestants[name], rows[name] = Contestant(name, base, inputs, case, args), {}
        contestants[name + COMPILED], rows[name + COMPILED] = compiled(name, base, inputs, case, args)
    if args.device == "cuda":
        for name, contestant in contestants.items():
            torch.cuda.reset_peak_memory_stats()
            between = torch.cuda.memory_allocated()
            contestant.step()
            torch.cuda.synchronize()
            rows[name]["above_mib"] = (torch.cuda.max_memory_allocated() - between) / 2**20
    times = in_turn(contestants, args.steps, "step")
    for name, seconds in times.items():
        row = rows[name]
        row["median_ms"] = 1e3 * statistics.median(seconds)
        row["quartiles_ms"] = [1e3 * q for q in statistics.quantiles(seconds, n=4)[::2]]
        if name.endswith(COMPILED):
            row["of_eager"] = ratio_of(seconds, times[name.removesuffix(COMPILED)])
        if "lora" in times and name != "lora":
            row["of_lora"] = ratio_of(seconds, times["lora"])
    return rows


def show(rows: dict[str, dict[str, Any]]) -> None:
    """Prints one case as a table."""

    def told(ratio: dict[str, float] | None) -> str:
        return f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})" if ratio else ""

    print(
        "| adapter | step, ms | of eager's (95%) | of LoRA's (95%) | MiB a step | compiling, s: cold, cached | graphs |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        cells = [f"{row['median_ms']:.0f}", told(row.get("of_eager")), told(row.get("of_lora"))]
        cells.append(f"{row['above_mib']:.0f}" if "above_mib" in row else "")
        if name.endswith(COMPILED):
            cells += [f"{row['compiling_s']:.1f}, {row['cached_s']:.1f}"]
            cells += [f"{row['graphs']} (later {row['graphs_later']}), {row['breaks']} breaks"]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, nargs="+", default=["sdxl", "flux"])
    parser.add_argument("--adapters", nargs="+", choices=ADAPTERS, default=["lora", "deft"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--checkpointing", choices=["no", "yes"], help="default: yes for FLUX.1, no for others")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "compiled.json")
    args = parser.parse_args()
    if args.device == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward fails in FLUX with torch 2.11 on an H100
    torch._dynamo.config.recompile_limit = 64
    found: dict[str, Any] = {
        "torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or "cpu",
        "backend": args.backend, "rank": args.rank, "resolution": args.resolution, "cases": [],
    }  # fmt: skip
    for model in args.model:
        base, inputs = build(model, args.device, torch.bfloat16 if args.device == "cuda" else torch.float32)
        for batch in args.batch:
            checkpointing = args.checkpointing == "yes" if args.checkpointing else model == "flux"
            case = Case(args.rank, args.resolution, batch, checkpointing)
            with released(), tempfile.TemporaryDirectory() as cache:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
                rows = measure(base, inputs, case, args)
            print(f"\n{model}, batch {batch}, {'with' if checkpointing else 'without'} checkpointing\n")
            show(rows)
            found["cases"].append({"model": model, "batch": batch, "checkpointing": checkpointing, "rows": rows})
            args.output.parent.mkdir(exist_ok=True, parents=True)
            args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        del base, inputs


if __name__ == "__main__":
    main()
