"""The stand-alone trainer beside sd-scripts' own with its LoRA, on full-size models with random weights; no download.

    python benchmarks/trainer.py --sd_scripts DIR --folder /dev/shm/trainer

Each case is trained by one, the other, the other, the one, each a process of its own, with the same options, pictures
and files. A step's time is of the second half of the steps; memory is what torch had allocated at most once the first
step was done. Then ours alone: saved, continued from the state and compared; each 8-bit optimizer; fp16. Needs 45 GB
in the folder and 80 GB of a GPU. Writes benchmarks/results/trainer.json anew after each process.

`--tiny` tries the same on a CPU, without sd-scripts' SDXL, whose size is written in its code.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SIDE, WORLD = Path(__file__).with_name("trainer_side.py"), Path(__file__).with_name("trainer_world.py")
COMMON = (
    "--pretrained_model_name_or_path {world}/model.safetensors --tokenizer_cache_dir {world}/tokenizers "
    "--train_data_dir {world}/images --caption_extension .txt --output_dir {world}/out --output_name {name} "
    "--train_batch_size 1 --network_dim 16 --network_alpha 16 --network_train_unet_only --learning_rate 1e-4 --seed 1 "
    "--sdpa --cache_latents --cache_text_encoder_outputs --save_precision bf16 --save_model_as safetensors "
    "--no_metadata --resolution {pixels} --max_train_steps {steps}"
)
WORLDS = {
    "sdxl": "--no_half_vae",
    "flux": "--clip_l {world}/clip_l.safetensors --t5xxl {world}/t5xxl.safetensors --ae {world}/ae.safetensors "
    "--timestep_sampling shift --discrete_flow_shift 3.1582 --model_prediction_type raw --guidance_scale 1",
}
THEIRS = {
    "sdxl": ("sdxl_train_network.py", "--network_module networks.lora"),
    "flux": ("flux_train_network.py", "--network_module networks.lora_flux"),
}
BF16, CHECKPOINTING = "--mixed_precision bf16 --full_bf16 --optimizer_type AdamW", "--gradient_checkpointing"
BITS_8 = ("AdamW8bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit", "Lion8bit", "PagedLion8bit",
          "SGDNesterov8bit")  # fmt: skip


@dataclass(frozen=True)
class Training:
    """One process.

    :param case: of those whose rates are compared; empty for those that are only shown to run
    """

    name: str
    world: str
    options: str
    steps: int
    ours: bool = True
    case: str = ""


def compared(case: str, world: str, options: str, steps: int, order: str) -> list[list[Training]]:
    """:param order: "o" for ours and "t" for theirs"""
    return [[Training(f"{case}_{i}_{who}", world, options, steps, who == "o", case)] for i, who in enumerate(order)]


def continued(world: str, steps: int) -> list[list[Training]]:
    """A training that leaves a state half-way, and what goes on from there."""
    half, options = steps // 2, f"{BF16} {CHECKPOINTING}"
    whole = Training(f"{world}_whole", world, f"{options} --save_state --save_every_n_steps {half}", steps)
    state = f"{{world}}/out/{whole.name}-step{half:08d}-state"
    return [[whole], [Training(f"{world}_continued", world, f"{options} --resume {state}", steps)]]


def plan(order: str) -> dict[str, list[list[Training]]]:
    """Trainings in a list of their own run side by side."""
    eight_bit = [
        Training(f"sdxl_{name}", "sdxl", f"--mixed_precision bf16 {CHECKPOINTING} --optimizer_type {name}", 6)
        for name in BITS_8
    ]
    fp16 = Training("sdxl_fp16", "sdxl", f"--mixed_precision fp16 {CHECKPOINTING} --optimizer_type AdamW", 12)
    return {
        "sdxl_checkpointing": compared("sdxl_checkpointing", "sdxl", f"{BF16} {CHECKPOINTING}", 40, order),
        "sdxl": compared("sdxl", "sdxl", BF16, 40, order),
        "flux_checkpointing": compared("flux_checkpointing", "flux", f"{BF16} {CHECKPOINTING}", 16, order),
        "sdxl_continued": continued("sdxl", 6),
        "flux_continued": continued("flux", 6),
        "optimizers": [[*eight_bit, fp16]],
    }


class Bench:
    """Runs trainings and keeps what is found of them."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.found: dict[str, Any] = {}
        self.pixels, self.t5_layers = (64, 1) if args.tiny else (1024, 24)

    def make(self, world: str) -> None:
        """The models, unless they are there."""
        folder = self.args.folder / world
        if (folder / "images").is_dir():
            return
        start = time.monotonic()
        subprocess.run(
            [sys.executable, str(WORLD), world, str(folder), str(self.pixels), *(["tiny"] if self.args.tiny else [])],
            check=True,
        )
        print(f"--- made {world} in {time.monotonic() - start:.0f} s", flush=True)

    def command(self, training: Training) -> list[str]:
        script, options = ROOT / "train_network_deft.py", training.options
        if not training.ours:
            name, network = THEIRS[training.world]
            script, options = self.args.sd_scripts / name, f"{options} {network} --max_data_loader_n_workers 2"
        elif self.args.tiny:
            options = options.replace("fp16", "bf16")
        words = f"{COMMON} {WORLDS[training.world]} {options}".format(
            world=self.args.folder / training.world, name=training.name, pixels=self.pixels,
            steps=min(training.steps, 6) if self.args.tiny else training.steps,
        )  # fmt: skip
        python = sys.executable if training.ours else self.args.sd_python
        record = self.record(training)
        return [python, str(SIDE), str(record), str(script), str(self.t5_layers), *words.split()]

    def record(self, training: Training) -> Path:
        return self.args.folder / f"{training.name}.json"

    def environment(self, training: Training) -> dict[str, str]:
        paths = [] if training.ours else [self.args.sd_path]
        paths.append(os.environ.get("PYTHONPATH", ""))
        return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}

    def run(self, trainings: list[Training]) -> None:
        """Side by side."""
        start, running = time.monotonic(), {}
        for training in trainings:
            log = (self.args.folder / f"{training.name}.log").open("w")
            folder = ROOT if training.ours else self.args.sd_scripts
            running[training] = subprocess.Popen(
                self.command(training), cwd=folder, env=self.environment(training), stdout=log, stderr=log
            )
        for training, process in running.items():
            code = process.wait()
            found = {"exit": code, "seconds": round(time.monotonic() - start, 1), **self.read(training, code)}
            self.found[training.name] = found
            told = {key: value for key, value in found.items() if key not in ("steps_s", "peak_start", "torch")}
            print(f"--- {training.name} {json.dumps(told)}", flush=True)
        self.write()

    def read(self, training: Training, code: int) -> dict[str, Any]:
        """What a process has left."""
        log = (self.args.folder / f"{training.name}.log").read_text(errors="replace").replace("\r", "\n")
        found: dict[str, Any] = {"case": training.case, "ours": training.ours, "options": training.options}
        if code:
            return found | {"tail": log[-2500:]}
        record = json.loads(self.record(training).read_text())
        steps = [later - before for before, later in itertools.pairwise(record.pop("times"))]
        second_half = steps[len(steps) // 2 :]
        found |= {"s_per_step": round(statistics.median(second_half), 4), "steps_s": [round(s, 4) for s in steps]}
        if parameters := re.search(r"training ([\d,]+) parameters", log):
            found["parameters"] = int(parameters[1].replace(",", ""))
        found["log"] = [line[:200] for line in log.splitlines() if re.search(r"WARNING|non-finite|create LoRA", line)][
            :8
        ]
        return found | record | self.read_file(training)

    def read_file(self, training: Training) -> dict[str, Any]:
        from safetensors.torch import load_file

        tensors = load_file(self.args.folder / training.world / "out" / f"{training.name}.safetensors")
        found: dict[str, Any] = {
            "modules": sum(key.endswith("lora_up.weight") for key in tensors),
            "moved": sum(bool(value.any()) for key, value in tensors.items() if key.endswith("lora_up.weight")),
            "finite": all(bool(value.isfinite().all()) for value in tensors.values()),
        }
        whole = self.args.folder / training.world / "out" / f"{training.world}_whole.safetensors"
        if training.name.endswith("_continued"):
            other = load_file(whole)
            same = tensors.keys() == other.keys()
            apart = [float((tensors[k].float() - other[k].float()).norm() / other[k].float().norm()) for k in other]
            found |= {"same_names_as_whole": same, "largest_distance_to_whole": max(apart)}
        return found

    def summary(self) -> dict[str, Any]:
        """Of each case: ours against theirs."""
        found = {}
        runs = [run for run in self.found.values() if run["exit"] == 0]
        for case in dict.fromkeys(run["case"] for run in runs if run["case"]):
            ours, theirs = (
                [run for run in runs if run["case"] == case and run["ours"] == who] for who in (True, False)
            )
            if not (ours and theirs):
                continue
            ratios = [a["s_per_step"] / b["s_per_step"] for a in ours for b in theirs]
            times = {
                name: statistics.mean(run["s_per_step"] for run in who)
                for name, who in (("ours", ours), ("theirs", theirs))
            }
            peaks = {
                name: max(run["peak_training"] for run in who) for name, who in (("ours", ours), ("theirs", theirs))
            }
            allowed = peaks["theirs"] + 12 * ours[0]["parameters"]  # of float32: the adapter and AdamW's two
            found[case] = {
                "images_per_s": {name: round(1 / s, 3) for name, s in times.items()},
                "time_ratio": round(times["ours"] / times["theirs"], 4),
                "time_ratios_of_pairs": [round(ratio, 4) for ratio in (min(ratios), max(ratios))],
                "peak_gib": {name: round(peak / 2**30, 3) for name, peak in peaks.items()},
                "allowed_gib": round(allowed / 2**30, 3),
                "holds": times["ours"] <= times["theirs"] and peaks["ours"] <= allowed,
            }
        return found

    def write(self) -> None:
        content = {"summary": self.summary(), "runs": self.found}
        self.args.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"all, if none is given: {', '.join(plan('o'))}")
    parser.add_argument("--sd_scripts", type=Path, required=True, help="a checkout of kohya-ss/sd-scripts")
    parser.add_argument("--sd_python", default=sys.executable, help="the Python that sd-scripts runs in")
    parser.add_argument("--sd_path", default="", help="folders of PYTHONPATH for sd-scripts alone")
    parser.add_argument("--folder", type=Path, required=True, help="of the models; those that are there stay")
    parser.add_argument("--order", default="otto", help="of ours and theirs")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "trainer.json")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    args.sd_scripts, args.folder = args.sd_scripts.resolve(), args.folder.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    bench, parts = Bench(args), plan(args.order)
    if unknown := set(args.parts) - parts.keys():
        parser.error(f"unknown: {', '.join(unknown)}")
    for name in args.parts or parts:
        for trainings in parts[name]:
            bench.make(trainings[0].world)
            if args.tiny and trainings[0].world == "sdxl":
                trainings = [training for training in trainings if training.ours]
            bench.run(trainings)
    print(json.dumps(bench.summary(), indent=1))
    return int(any(run["exit"] for run in bench.found.values()))


if __name__ == "__main__":
    sys.exit(main())
