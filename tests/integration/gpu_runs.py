"""sd-scripts' real trainers with networks.deft on full-size models with random weights, on a GPU of 80 GB.

    python tests/integration/gpu_runs.py --sd_scripts DIR --python PYTHON --folder /dev/shm/x [--out FILE] [RUN ...]

About nine minutes on an H100, 40 GB in the folder and 90 GB of memory. Every trainer is a process of its own; the file
of results is written anew after each. `--small` tries the same on a CPU: one FLUX.1 block of each kind, 64 pixels, two
steps, and without the options that a CPU has not. No pytest: so it runs where only sd-scripts is installed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
SIDE = Path(__file__).with_name("gpu_side.py")


@dataclass(frozen=True)
class Run:
    """One process: a training with `options` behind its world's, or, with `make`, the world itself."""

    name: str
    world: str
    options: str = ""
    network: str = "networks.deft"
    steps: int = 6
    seconds: float = 180
    make: bool = False


COMMON = """--caption_extension .txt --max_data_loader_n_workers 0 --train_batch_size 1 --network_dim 16
--network_alpha 16 --learning_rate 1e-4 --optimizer_type AdamW --save_model_as safetensors --seed 1 --sdpa
--cache_latents --tokenizer_cache_dir {world}/tokenizers --train_data_dir {world}/images --output_dir {world}/out"""
SCRIPTS = {"sd15": "train_network.py", "sdxl": "sdxl_train_network.py", "flux": "flux_train_network.py"}
PIXELS = {"sd15": 512, "sdxl": 1024, "flux": 1024}
WORLDS = {
    "sd15": "--pretrained_model_name_or_path {world}/model --mixed_precision fp16 "
    "--unet_lr 1e-4 --text_encoder_lr 5e-5",
    "sdxl": "--pretrained_model_name_or_path {world}/model --no_half_vae --gradient_checkpointing "
    "--network_train_unet_only --cache_text_encoder_outputs",
    "flux": "--pretrained_model_name_or_path {world}/flux.safetensors --clip_l {world}/clip.safetensors "
    "--t5xxl {world}/t5.safetensors --ae {world}/ae.safetensors --network_train_unet_only --mixed_precision bf16 "
    "--gradient_checkpointing --cache_text_encoder_outputs --timestep_sampling shift --discrete_flow_shift 3.1582 "
    "--model_prediction_type raw --guidance_scale 1",
}
SDXL_12GB = "--mixed_precision bf16 --full_bf16"  # behind the world's options: the recipes of docs/sd-scripts.md
FLUX_16GB = "--fp8_base --blocks_to_swap 18"
SD15_6GB = "--gradient_checkpointing"
PHASES = [  # one after the other; the runs of one phase side by side, so a phase of one run is what is timed
    [Run("make_sd15", "sd15", make=True), Run("make_sdxl", "sdxl", make=True)],
    [
        Run("make_flux", "flux", make=True),
        Run("sd15_schedulefree", "sd15", "--optimizer_type AdamWScheduleFree"),
        Run("sd15_prodigy", "sd15", "--optimizer_type Prodigy --learning_rate 1 --unet_lr 1 --text_encoder_lr 1"),
        Run("sd15_validation", "sd15", "--validation_split 0.25 --validate_every_n_steps 2"),
        Run("sdxl_fp16", "sdxl", "--mixed_precision fp16"),
    ],
    [Run("sd15_deft", "sd15", SD15_6GB, steps=12)],
    [Run("sd15_lora", "sd15", SD15_6GB, "networks.lora", steps=12)],
    [Run("sdxl_deft", "sdxl", SDXL_12GB, steps=10)],
    [Run("sdxl_lora", "sdxl", SDXL_12GB, "networks.lora", steps=10)],
    [Run("flux_bf16", "flux", "--full_bf16")],
    [Run("flux_deft", "flux", FLUX_16GB)],
    [Run("flux_lora", "flux", FLUX_16GB, "networks.lora_flux")],
    [
        Run("flux_continued", "flux", "--fp8_base --network_weights {world}/out/flux_bf16.safetensors"),
        Run("sd15_compile", "sd15", "--network_train_unet_only --torch_compile --dynamo_backend inductor", seconds=420),
    ],
    [Run("flux_base_weights", "flux", "--full_bf16 --base_weights {world}/out/flux_bf16.safetensors")],
    [Run("flux_offload", "flux", "--fp8_base --cpu_offload_checkpointing", steps=3)],
]
NOT_ON_A_CPU = ("--blocks_to_swap 18", "--cpu_offload_checkpointing", "inductor", "fp16")


def command(run: Run, args: argparse.Namespace) -> list[str]:
    world = args.folder / run.world
    side = [args.python, str(SIDE)]
    if run.make:
        blocks = (["1", "1"] if args.small else ["19", "38"]) if run.world == "flux" else []
        return [*side, "make", run.world, str(world), str(64 if args.small else PIXELS[run.world]), *blocks]
    options = f"{COMMON} {WORLDS[run.world]} {run.options}".format(world=world)
    steps, pixels = (2, 64) if args.small else (run.steps, PIXELS[run.world])
    if args.small:
        for what, instead in zip(NOT_ON_A_CPU, ("", "", "aot_eager", "bf16"), strict=True):
            options = options.replace(what, instead)
        options += " --t5xxl_max_token_length 32" if run.world == "flux" else ""
    options += (
        f" --network_module {run.network} --output_name {run.name} --resolution {pixels} --max_train_steps {steps}"
    )
    return [*side, "train", str(args.folder / f"{run.name}.json"), SCRIPTS[run.world], *options.split()]


def environment(args: argparse.Namespace, processes: int) -> dict[str, str]:
    paths = [str(args.sd_scripts), str(ROOT), os.environ.get("PYTHONPATH", "")]
    threads = max(1, (os.cpu_count() or 1) // processes)
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path), "PYTHONIOENCODING": "utf-8",
        "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "USE_FLAX": "0", "USE_TF": "0",
    }  # fmt: skip


def deltas(file: Path) -> dict[str, Any]:
    """How many modules a file holds, how many deltas are not 0, and whether all is finite."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = load_file(file, device=device)
    ups = [key for key in found if key.endswith("lora_up.weight")]
    downs = [key.replace("lora_up", "lora_down") for key in ups]
    norms = [float((found[up].flatten(1) @ found[down].flatten(1)).norm()) for up, down in zip(ups, downs, strict=True)]
    finite = all(bool(value.isfinite().all()) for value in found.values())
    return {"modules": len(ups), "moved": sum(norm > 0 for norm in norms), "finite": finite, "largest": max(norms)}


def found(run: Run, args: argparse.Namespace, code: int | None, seconds: float) -> dict[str, Any]:
    """What is known of a run that has ended; `code` None where it was stopped."""
    result: dict[str, Any] = {
        "options": run.options,
        "network": run.network,
        "exit": code,
        "seconds": round(seconds, 1),
    }
    output = (args.folder / f"{run.name}.log").read_text(errors="replace").replace("\r", "\n")
    if code != 0:
        result["tail"] = output[-2500:]
    if run.make:
        return result
    said = ("modules loaded", "weights are merged", "DEFT:", "create LoRA for", "Error", "rror:")
    result["said"] = [line.strip()[:300] for line in output.splitlines() if any(part in line for part in said)][:12]
    record_file = args.folder / f"{run.name}.json"
    record = json.loads(record_file.read_text()) if record_file.exists() else {}
    times = record.pop("times", [])
    if len(times) > 2:
        steps = [later - before for before, later in itertools.pairwise(times)]
        result["seconds_per_step"] = round(statistics.median(steps), 4)
        result["steps"] = [round(step, 3) for step in steps]
    for key in [key for key in record if key.startswith("peak") or key in ("reserved", "main_memory")]:
        record[key] = f"{record[key] / 2**30:.2f} GiB"
    saved = args.folder / run.world / "out" / f"{run.name}.safetensors"
    return result | record | (deltas(saved) if code == 0 else {})


def run_phase(runs: list[Run], args: argparse.Namespace, end: float, results: dict[str, Any]) -> None:
    """Runs side by side, each until its own time or `end` is over."""
    running = {}
    for run in runs:
        log = (args.folder / f"{run.name}.log").open("w")
        running[run] = subprocess.Popen(
            command(run, args), cwd=args.sd_scripts, env=environment(args, len(runs)), stdout=log, stderr=log
        )
    start = time.monotonic()
    while running:
        time.sleep(0.2)
        for run, process in list(running.items()):
            seconds = time.monotonic() - start
            if process.poll() is None and seconds < run.seconds * (5 if args.small else 1) and time.monotonic() < end:
                continue
            code = process.poll()
            if code is None:
                process.kill()
                process.wait()
            del running[run]
            results[run.name] = found(run, args, code, seconds)
            args.out.write_text(json.dumps(results, indent=1))
            kept = {key: value for key, value in results[run.name].items() if key not in ("steps", "said", "options")}
            print(f"--- {run.name} {json.dumps(kept)}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="names, or beginnings of names (flux); all, if none is given")
    parser.add_argument("--sd_scripts", type=Path, default=Path(os.environ.get("SD_SCRIPTS_DIR", ".")))
    parser.add_argument("--python", default=os.environ.get("SD_SCRIPTS_PYTHON", sys.executable))
    parser.add_argument("--folder", type=Path, required=True, help="of the models; one that is there is not made again")
    parser.add_argument("--out", type=Path, default=Path("results.json"))
    parser.add_argument("--limit", type=float, default=3600, help="seconds, after which what still runs is stopped")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    if not (args.sd_scripts / "train_network.py").exists():
        parser.error("--sd_scripts or SD_SCRIPTS_DIR: a checkout of kohya-ss/sd-scripts")
    args.sd_scripts, args.folder = args.sd_scripts.resolve(), args.folder.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.limit
    results: dict[str, Any] = {}

    def wanted(run: Run) -> bool:
        if run.make:
            return not (args.folder / run.world / "images").is_dir() and any(
                wanted(other) for phase in PHASES for other in phase if other.world == run.world and not other.make
            )
        return not args.runs or run.name.startswith(tuple(args.runs))

    for phase in PHASES:
        run_phase([run for run in phase if time.monotonic() < end and wanted(run)], args, end, results)
    return int(any(result["exit"] != 0 for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
