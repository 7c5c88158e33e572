"""What a frozen base in fewer bits costs and saves: memory and time of steps, and how far it moves what is trained.

    python benchmarks/quantised.py steps --model flux sdxl
    python benchmarks/quantised.py files

`steps`: real architectures with random weights, no download; one after the other in bf16, as --fp8_base has it, and as
each value of --quantize_base. The denoiser alone, with gradient checkpointing, a DEFT of `--rank` and fused AdamW; text
outputs are given. The model starts on the CPU and goes to the GPU as in the trainer; `arriving_gib` is the GPU's peak
until it is there. A form that cannot be trained is told with its error. `files`: the model that ships, trained with the
same seeds; a delta's distance from the float32 run's, over all layers together, and that of a second float32 run with
another seed, to compare with. Prints a line each and writes JSON under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.train_step import build, synchronize  # noqa: E402
from library.models.quantised import PACKAGES, keep_in_fp8, quantise, read_anew  # noqa: E402
from networks import deft  # noqa: E402
from networks.deft_config import DeftError, reason_of  # noqa: E402

HELD = ("bf16", "fp8_base", *PACKAGES)
GIB = 2**30


def peak(device: str) -> float:
    """GiB that the GPU's tensors took at most since the last time that this was asked."""
    if device == "cpu":
        return 0.0
    found = torch.cuda.max_memory_allocated() / GIB
    torch.cuda.reset_peak_memory_stats()
    return found


def steps(name: str, held: str, args: argparse.Namespace) -> dict[str, Any]:
    """One model in one form: a few steps, each from the first to the last kernel."""
    torch.manual_seed(0)
    model, inputs = build(name, args.device, torch.bfloat16)
    nn.Module.to(model, "cpu")
    gc.collect()
    peak(args.device)
    start = time.perf_counter()
    if held in PACKAGES:
        quantise(model, held, torch.device(args.device), torch.bfloat16)
    found: dict[str, Any] = {"model": name, "held": held, "quantising_s": time.perf_counter() - start}
    network = deft.create_network(1.0, args.rank, args.rank, None, [], model)
    network.apply_to([], model, False, True)
    network.to(args.device).train()
    torch.backends.cuda.enable_cudnn_sdp(False)  # as `Family.place` does
    if held != "bf16":
        read_anew(model)
    if held == "fp8_base":
        keep_in_fp8(model, torch.bfloat16)
    nn.Module.to(model, args.device)
    found |= {"arriving_gib": peak(args.device)}
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)
    model.enable_gradient_checkpointing()
    model.train()
    times, losses = [], []
    for _ in range(args.steps + 2):
        synchronize(args.device)
        start = time.perf_counter()
        network.on_step_start(None, model)
        with torch.autocast(args.device, torch.bfloat16):
            loss = model(**inputs(args.batch, args.resolution), return_dict=False)[0].float().square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss))
        times.append(time.perf_counter() - start)
    found |= {"step_s": statistics.median(times[2:]), "peak_gib": peak(args.device), "last_loss": losses[-1]}
    print(json.dumps(found), flush=True)
    return found


def trained(held: str, seed: int, args: argparse.Namespace, folder: Path) -> dict[str, torch.Tensor]:
    """Layer -> delta of a training of the model that ships."""
    import train_network_deft

    name = f"{held}-{seed}"
    given = {
        "pretrained_model_name_or_path": ROOT / "library" / "world" / "model", "output_dir": folder,
        "train_data_dir": ROOT / "configs" / "quickstart" / "photos", "output_name": name, "resolution": 64,
        "max_train_steps": args.steps, "seed": seed, "save_precision": "float", "network_dim": args.rank,
        "network_alpha": args.rank, "learning_rate": 1e-3, "network_train_unet_only": None,
    } | ({"quantize_base": held} if held in PACKAGES else {})  # fmt: skip
    line = [part for key, value in given.items() for part in ([f"--{key}"] if value is None else [f"--{key}", value])]
    if train_network_deft.main([str(part) for part in line]):
        raise SystemExit(f"{name}: not trained")
    tensors = load_file(folder / f"{name}.safetensors")
    return {
        key.removesuffix(".lora_up.weight"): up.flatten(1) @ tensors[key.replace("lora_up", "lora_down")].flatten(1)
        for key, up in tensors.items()
        if key.endswith("lora_up.weight")
    }


def files(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Each form's distance from float32."""
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        reference = trained("float32", 1, args, Path(temporary))
        size = torch.cat([delta.flatten() for delta in reference.values()])
        for held, seed in (*((held, 1) for held in args.held if held in PACKAGES), ("float32", 2)):
            deltas = trained(held, seed, args, Path(temporary))
            other = torch.cat([deltas[name].flatten() for name in reference])
            cosine = float(torch.nn.functional.cosine_similarity(other, size, dim=0))
            apart = float((other - size).norm() / size.norm())
            found.append({"held": held, "seed": seed, "steps": args.steps, "apart": apart, "cosine": cosine})
            print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("steps", "files"))
    parser.add_argument("--model", nargs="+", default=["flux", "sdxl"], choices=("small", "sd15", "sdxl", "flux"))
    parser.add_argument("--held", nargs="+", default=HELD, choices=HELD)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=5, help="that are measured, behind two others; all for `files`")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="where the JSON is written to")
    args = parser.parse_args()
    if args.what == "files":
        found = files(args)
    else:
        found = []
        for name in args.model:
            for held in args.held:
                try:
                    found.append(steps(name, held, args))
                except (DeftError, RuntimeError) as error:  # a package that is missing, kernels, memory
                    found.append({"model": name, "held": held, "error": reason_of(error)})
                    print(json.dumps(found[-1]), flush=True)
                gc.collect()
                if args.device == "cuda":
                    torch.cuda.empty_cache()
    out = args.out or ROOT / "benchmarks" / "results" / f"quantised-{args.what}.json"
    card = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    out.write_text(json.dumps({"device": card, "torch": torch.__version__, "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
