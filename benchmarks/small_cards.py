"""What fits in which card: whole trainings with the memory capped; published sizes, random weights, no download.

    python benchmarks/small_cards.py [CASE ...]

Each case is a training of `train_network_deft.py` from its pictures to its file, with texts and latents cached, a
sample and a save, in as much memory as a card of its size leaves: its GiB less 0.8 GB for CUDA itself. Only the reading
of weights is left out: the model is made of the published configuration. Peaks are torch's of allocated memory, phase
by phase; `host_gib` is the process's largest resident size. Where a case of the same model in bf16 without a cap is run
beside it, `apart` is how far all deltas together are from its file's. Writes benchmarks/results/small_cards.json anew
after each case. FLUX.1 takes about two minutes a case on an H100, and 60 GB of the host's memory.

`--tiny` tries it on a CPU with small models, without a cap and peaks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import dry_run  # noqa: E402

from library.models.family import Family  # noqa: E402
from library.models.loading import load  # noqa: E402

CUDA = torch.cuda.is_available()
STEPS = 8
OWN = 0.8e9  # bytes that CUDA's context takes of a card
SMALL = f"{dry_run.UNET_ONLY} --gradient_checkpointing"
KEEP = "--network_args keep={keep}"
CASES: dict[str, tuple[str, int, int, str]] = {  # model, pixels, GiB of the card (0: no cap), options
    "sd15-6": ("sd15", 512, 6, SMALL),
    "sdxl-8": ("sdxl", 1024, 8, SMALL),
    "flux": ("flux", 1024, 0, SMALL),
    "flux-16-fp8_base": ("flux", 1024, 16, f"{SMALL} --fp8_base"),
    "flux-16-fp8_base-8bit": ("flux", 1024, 16, f"{SMALL} --fp8_base --optimizer_type AdamW8bit"),
    "flux-16-fp8_base-offload": ("flux", 1024, 16, f"{SMALL} --fp8_base --cpu_offload_checkpointing"),
    "flux-16-fp8_base-swap": ("flux", 1024, 16, f"{SMALL} --fp8_base --blocks_to_swap 4"),
    "flux-16-int8-swap": ("flux", 1024, 16, f"{SMALL} --quantize_base int8 --blocks_to_swap 4"),
    "flux-12-nf4": ("flux", 1024, 12, f"{SMALL} --quantize_base nf4"),
    "flux-12-fp8_base-swap": ("flux", 1024, 12, f"{SMALL} --fp8_base --blocks_to_swap 18"),
    "flux-12-int8-swap": ("flux", 1024, 12, f"{SMALL} --quantize_base int8 --blocks_to_swap 18"),
    "flux-16-swap": ("flux", 1024, 16, f"{SMALL} --blocks_to_swap 24"),
    "flux-8-fp8_base-swap": ("flux", 1024, 8, f"{SMALL} --fp8_base --blocks_to_swap 34"),
    "flux-12-keep": ("flux", 1024, 12, f"{SMALL} --fp8_base --blocks_to_swap 18 {KEEP}"),
    "flux-24-swap": ("flux", 1024, 24, f"{SMALL} --blocks_to_swap 12"),
}


def made(options: Any, dtype: torch.dtype) -> Family:
    """In place of a model's reading: a few random numbers, again and again."""
    model = load(options, dtype, empty=True)
    noise = torch.randn(2**22 + 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    for part in model.pipeline.components.values():
        if isinstance(part, nn.Module):
            dry_run.zeros(part)
            fill(part, noise)
    return model


@torch.no_grad()
def fill(part: nn.Module, noise: Tensor) -> None:
    for name, weight in part.named_parameters():
        if weight.dim() > 1:
            flat = weight.view(-1)
            for piece in flat.split(len(noise)):
                piece.copy_(noise[: len(piece)])
            weight.mul_(math.prod(weight.shape[1:]) ** -0.5)
        elif "norm" in name and name.endswith("weight"):
            weight.fill_(1.0)


def deltas(file: Path) -> dict[str, Tensor]:
    found = load_file(file)
    names = [key.removesuffix(".lora_up.weight") for key in found if key.endswith(".lora_up.weight")]
    return {
        name: found[f"{name}.lora_up.weight"].float().flatten(1) @ found[f"{name}.lora_down.weight"].float().flatten(1)
        for name in names
    }


def apart(file: Path, other: Path) -> float:
    """The norm of the difference of all deltas, of the other file's."""
    own, wanted = deltas(file), deltas(other)
    difference = sum(float((own[name] - wanted[name]).square().sum()) for name in wanted)
    return math.sqrt(difference / sum(float(one.square().sum()) for one in wanted.values()))


def capped(size: int) -> Any:
    """What the program sees of a card of so many GiB."""
    if not CUDA:
        return contextlib.nullcontext()
    free, whole = torch.cuda.mem_get_info()
    room = size * 2**30 - OWN if size else whole
    torch.cuda.set_per_process_memory_fraction(min(1.0, room / whole))

    def seen(device: Any = None) -> tuple[int, int]:
        return int(min(free, room - torch.cuda.memory_reserved())), int(min(whole, size * 2**30 or whole))

    return mock.patch.object(torch.cuda, "mem_get_info", seen)


def forget_the_largest() -> None:
    """Linux counts the largest resident size anew."""
    Path("/proc/self/clear_refs").write_text("5")


def largest() -> float:
    """GiB of the process that were resident at most."""
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM"))
    return round(int(line.split()[1]) / 2**20, 1)


def run(name: str, args: argparse.Namespace, world: Path) -> None:
    """One case, in a process of its own, since a training that has failed may leave something on the card."""
    kind, pixels, size, options = CASES[name]
    pixels = 64 if args.tiny else pixels
    out = world / "out" / name
    dry_run.STEPS = STEPS
    words = dry_run.words_of(world, name, (kind, pixels, options), args.tiny, keep=world / "keep.txt")
    dry_run.made = made
    forget_the_largest()
    with capped(0 if args.tiny else size):
        found = dry_run.tried(lambda: dry_run.measured(words))
    found = {"card_gib": size, "options": options, "pixels": pixels, **found, "host_gib": largest()}
    if CUDA:
        found["device"] = torch.cuda.get_device_name()
    file = out / "last.safetensors"
    plain = world / "out" / kind / "last.safetensors"
    if size and KEEP not in options and file.is_file() and plain.is_file():
        found["apart"] = round(apart(file, plain), 4)
    found["samples"] = len(list((out / "sample").glob("*.png"))) if (out / "sample").is_dir() else 0
    (world / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"all, if none is given: {', '.join(CASES)}")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "small_cards.json")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.cases) - CASES.keys():
        parser.error(f"unknown: {', '.join(unknown)}")
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}  # as the trainer does
    result: dict[str, Any] = {
        "device": "", "torch": torch.__version__, "diffusers": dry_run.diffusers.__version__, "cases": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        (world / "keep.txt").write_text("a red ball --w 512 --h 512 --s 2\na house by the sea --w 512 --h 512 --s 2\n")
        for name in args.cases or CASES:
            process = multiprocessing.get_context("spawn").Process(target=run, args=(name, args, world))
            process.start()
            process.join()
            file = world / f"{name}.json"
            found = (
                json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"error": "the process has died"}
            )
            result["device"] = found.pop("device", "") or result["device"]
            result["cases"][name] = found
            print(f"--- {name} {json.dumps(found)}", flush=True)
            args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
