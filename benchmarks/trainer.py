"""The stand-alone trainer beside sd-scripts' own with its LoRA, on full-size models with random weights; no download.

    python benchmarks/trainer.py --sd_scripts DIR --folder /dev/shm/trainer

Each case is trained by one, the other, the other, the one, each a process of its own, with the same options, pictures
and files. A step's time is of the second half of the steps; memory is what torch had allocated at most once the first
step was done. For `..._alternating`, all are there from beginning to end and train in turn, a few seconds each, while
the others are stopped: what the host does meets all alike. `compiled` is ours with --torch_compile; `first_s` is what
its first step took, with what it compiles. Then ours alone: saved, continued from the state and compared, beside a
second training that nothing disturbs, and with torch's deterministic kernels; each 8-bit optimizer; fp16;
configs/sdxl.toml and flux.toml. Needs 45 GB in the folder and 80 GB of a GPU. Writes benchmarks/results/trainer.json
anew after each process.

`--tiny` tries the same on a CPU, without sd-scripts' SDXL, whose size is written in its code.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

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
CONFIGURED = (
    "--config_file {root}/configs/{kind}.toml --pretrained_model_name_or_path {world}/model.safetensors "
    "--tokenizer_cache_dir {world}/tokenizers --train_data_dir {world}/images --output_dir {world}/out "
    "--output_name {name} --logging_dir {world}/logs --max_train_steps {steps} --save_every_n_steps 3"
)
CONFIGURED_PARTS = {
    "sdxl": "",
    "flux": "--clip_l {world}/clip_l.safetensors --t5xxl {world}/t5xxl.safetensors --ae {world}/ae.safetensors",
}
BF16, CHECKPOINTING = "--mixed_precision bf16 --full_bf16 --optimizer_type AdamW", "--gradient_checkpointing"
BITS_8 = ("AdamW8bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit", "Lion8bit", "PagedLion8bit",
          "SGDNesterov8bit")  # fmt: skip
FP8 = "--mixed_precision bf16 --fp8_base --optimizer_type AdamW"
ALTERNATING = "_alternating"
WARM = 5  # steps before those of an alternating case take turns
SETTLING = 2  # first steps of a turn: the others' last kernels still run, and ours has none queued
WHO = {"o": "ours", "c": "compiled", "t": "theirs"}


@dataclass(frozen=True)
class Training:
    """One process.

    :param who: of WHO
    :param case: of those whose rates are compared; empty for those that are only shown to run
    :param beside: the training whose file is compared with this one's
    :param deterministic: with torch's deterministic kernels, where there are any
    :param config: with the options of that file of configs/, places alone being given
    """

    name: str
    world: str
    options: str
    steps: int
    who: str = "ours"
    case: str = ""
    beside: str = ""
    deterministic: bool = False
    config: bool = False

    @property
    def ours(self) -> bool:
        return self.who != "theirs"


def compared(case: str, world: str, options: str, steps: int, order: str) -> list[list[Training]]:
    """:param order: letters of WHO"""
    return [[Training(f"{case}_{i}_{who}", world, options, steps, WHO[who], case)] for i, who in enumerate(order)]


def alternating(world: str, who: str, batch: int = 1) -> list[list[Training]]:
    """:param who: letters of WHO"""
    case = f"{world}_batch{batch}{ALTERNATING}"
    options = f"{BF16} {CHECKPOINTING} --train_batch_size {batch}"
    return [[Training(f"{case}_{letter}", world, options, 10**6, WHO[letter], case) for letter in who]]


def continued(world: str, steps: int) -> list[list[Training]]:
    """Trainings that leave a state half-way, and what goes on from there; kernels as they are, and deterministic."""
    half, options = steps // 2, f"{BF16} {CHECKPOINTING}"
    first, then = [], []
    for kind, deterministic in (("", False), ("_deterministic", True)):
        whole, again = f"{world}_whole{kind}", f"{world}_again{kind}"
        state = f"{{world}}/out/{whole}-step{half:08d}-state"
        saving = f"{options} --save_state --save_every_n_steps {half}"
        first += [Training(whole, world, saving, steps, deterministic=deterministic),
                  Training(again, world, options, steps, deterministic=deterministic, beside=whole)]  # fmt: skip
        then += [Training(f"{world}_continued{kind}", world, f"{options} --resume {state}", steps,
                          deterministic=deterministic, beside=whole)]  # fmt: skip
    return [first, then]


def plan(order: str) -> dict[str, list[list[Training]]]:
    """Trainings in a list of their own run side by side."""
    eight_bit = [
        Training(f"sdxl_{name}", "sdxl", f"--mixed_precision bf16 {CHECKPOINTING} --optimizer_type {name}", 6)
        for name in BITS_8
    ]
    fp16 = Training("sdxl_fp16", "sdxl", f"--mixed_precision fp16 {CHECKPOINTING} --optimizer_type AdamW", 12)
    return {
        "sdxl_checkpointing": compared("sdxl_checkpointing", "sdxl", f"{BF16} {CHECKPOINTING}", 40, order),
        "sdxl_alternating": alternating("sdxl", "oct"),
        "sdxl_batch4_alternating": alternating("sdxl", "oct", 4),
        "flux_alternating": alternating("flux", "ot"),  # the third would not fit
        "sdxl": compared("sdxl", "sdxl", BF16, 40, order),
        "flux_checkpointing": compared("flux_checkpointing", "flux", f"{BF16} {CHECKPOINTING}", 16, order),
        "flux_batch4": compared("flux_batch4", "flux", f"{BF16} {CHECKPOINTING} --train_batch_size 4", 10, order),
        "sdxl_fp8": compared("sdxl_fp8", "sdxl", f"{FP8} {CHECKPOINTING}", 12, order),
        "flux_fp8": compared("flux_fp8", "flux", f"{FP8} {CHECKPOINTING}", 12, order),
        "sdxl_continued": continued("sdxl", 6),
        "flux_continued": continued("flux", 6),
        "optimizers": [[*eight_bit, fp16]],
        "sdxl_config": [[Training("sdxl_config", "sdxl", "", 6, config=True)]],
        "flux_config": [[Training("flux_config", "flux", "", 6, config=True)]],
    }


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Any]:
    """Of two adapter files: the largest relative distance of a tensor, and that of all deltas together."""
    if one.keys() != other.keys():
        return {"same_names": False}
    tensors = {
        k: float((one[k].float() - other[k].float()).norm() / other[k].float().norm())
        for k in other
        if k.endswith("weight")
    }
    squares = [0.0, 0.0]
    for key in other:
        if key.endswith("lora_up.weight"):
            deltas = [
                of[key].double().flatten(1) @ of[key.replace("lora_up", "lora_down")].double().flatten(1)
                for of in (one, other)
            ]
            squares[0] += float((deltas[0] - deltas[1]).square().sum())
            squares[1] += float(deltas[1].square().sum())
    return {
        "same_names": True,
        "equal": all(one[k].equal(other[k]) for k in other),
        "largest_of_a_tensor": max(tensors.values()),
        "where": max(tensors, key=lambda key: tensors[key]),
        "median_of_tensors": statistics.median(tensors.values()),
        "all_deltas": (squares[0] / squares[1]) ** 0.5,
    }


def compare(case: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """:returns: the summary of a case; a time's ratio is of ours to theirs"""
    times = [statistics.mean(run["s_per_step"] for run in who) for who in (ours, theirs)]
    peaks = [max(run["peak_training"] for run in who) for who in (ours, theirs)]
    allowed = peaks[1] + 12 * ours[0]["parameters"]  # of float32: the adapter and AdamW's two
    ratios = [a["s_per_step"] / b["s_per_step"] for a in ours for b in theirs]
    if case.endswith(ALTERNATING):  # of turns that followed one another
        ratios = [a / b for a, b in zip(ours[0]["turns_s"], theirs[0]["turns_s"], strict=True)]
    batch = re.search(r"--train_batch_size (\d+)", ours[0]["options"])

    def named(values: list[float]) -> dict[str, float]:
        return {name: round(value, 3) for name, value in zip(("ours", "theirs"), values, strict=True)}

    return {
        "images_per_s": named([int(batch[1] if batch else 1) / s for s in times]),
        "images_per_s_ratio": round(times[1] / times[0], 4),
        "time_ratio": round(times[0] / times[1], 4),
        "time_ratios_of_pairs": [round(ratio, 4) for ratio in (min(ratios), max(ratios))],
        "standard_error": round(statistics.stdev(ratios) / len(ratios) ** 0.5, 4) if len(ratios) > 1 else None,
        "first_s": max(run["first_s"] for run in ours),
        "peak_gib": named([peak / 2**30 for peak in peaks]),
        "allowed_gib": round(allowed / 2**30, 3),
        "holds": times[0] <= times[1] and peaks[0] <= allowed,
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
        given = f"{COMMON} {WORLDS[training.world]}"
        if training.config:
            given = f"{CONFIGURED} {CONFIGURED_PARTS[training.world]}"
            if self.args.tiny:
                options = "--resolution {pixels}"
        if not training.ours:
            name, network = THEIRS[training.world]
            script, options = self.args.sd_scripts / name, f"{options} {network} --max_data_loader_n_workers 2"
        elif self.args.tiny:
            options = options.replace("fp16", "bf16")
        if training.ours and not training.config:
            options = f"{options} --meter_every_n_steps 0"  # theirs has none
        if training.who == "compiled":
            options = f"{options} --torch_compile"
        words = f"{given} {options}".format(
            world=self.args.folder / training.world, name=training.name, pixels=self.pixels, root=ROOT,
            kind=training.world, steps=min(training.steps, 6) if self.args.tiny and not self.alternates(training)
            else training.steps,
        )  # fmt: skip
        python = sys.executable if training.ours else self.args.sd_python
        record = self.record(training)
        return [python, str(SIDE), str(record), str(script), str(self.t5_layers), *words.split()]

    def record(self, training: Training) -> Path:
        return self.args.folder / f"{training.name}.json"

    def environment(self, training: Training) -> dict[str, str]:
        paths = [] if training.ours else [self.args.sd_path]
        paths.append(os.environ.get("PYTHONPATH", ""))
        found = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
        if training.deterministic:
            found |= {"DETERMINISTIC": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        return found

    def start(self, trainings: list[Training]) -> dict[Training, subprocess.Popen]:
        running = {}
        for training in trainings:
            self.end(training).unlink(missing_ok=True)
            log = (self.args.folder / f"{training.name}.log").open("w")
            folder = ROOT if training.ours else self.args.sd_scripts
            running[training] = subprocess.Popen(
                self.command(training), cwd=folder, env=self.environment(training), stdout=log, stderr=log
            )
        return running

    def run(self, trainings: list[Training]) -> None:
        """Side by side, or in turn."""
        start, running = time.monotonic(), self.start(trainings)
        turns = self.take_turns(list(running.items())) if self.alternates(trainings[0]) else {}
        for training, process in running.items():
            code = process.wait()
            found = {"exit": code, "seconds": round(time.monotonic() - start, 1),
                     **self.read(training, code, turns.get(training))}  # fmt: skip
            self.found[training.name] = found
            told = {
                key: value for key, value in found.items() if key not in ("steps_s", "turns_s", "peak_start", "torch")
            }
            print(f"--- {training.name} {json.dumps(told)}", flush=True)
        self.write()

    def alternates(self, training: Training) -> bool:
        return training.case.endswith(ALTERNATING)

    def end(self, training: Training) -> Path:
        """A file that a process ends at."""
        return self.record(training).with_suffix(".end")

    def take_turns(self, running: list[tuple[Training, subprocess.Popen]]) -> dict[Training, list[tuple[float, float]]]:
        """When each training had the machine alone, there and back again; ends all."""
        turns: dict[Training, list[tuple[float, float]]] = {training: [] for training, _ in running}
        alive = True
        while alive and not all(map(self.is_warm, turns)):
            alive = all(process.poll() is None for _, process in running)
            time.sleep(0.5)
        for i in range(self.args.turns if alive else 0):
            for training, process in running if i % 2 == 0 else reversed(running):
                for _, other in running:
                    other.send_signal(signal.SIGCONT if other is process else signal.SIGSTOP)
                begin = time.perf_counter()  # one clock for all processes of Linux
                time.sleep(self.args.turn)
                turns[training].append((begin, time.perf_counter()))
        for training, process in running:
            self.end(training).touch()
            process.send_signal(signal.SIGCONT)
        return turns

    def is_warm(self, training: Training) -> bool:
        found = re.findall(r"steps:[^\n]*?(\d+)/\d+", self.log(training))
        return bool(found) and int(found[-1]) >= WARM

    def log(self, training: Training) -> str:
        log = (self.args.folder / f"{training.name}.log").read_text(errors="replace")
        return log.replace("\r", "\n")

    def read(self, training: Training, code: int, turns: list[tuple[float, float]] | None = None) -> dict[str, Any]:
        """What a process has left.

        :param turns: in which alone its steps are looked at, whole ones
        """
        log = self.log(training)
        found: dict[str, Any] = {"case": training.case, "who": training.who, "options": training.options}
        if code:
            return found | {"tail": log[-2500:]}
        record = json.loads(self.record(training).read_text())
        spans = list(itertools.pairwise(record.pop("times")))
        steps = [later - before for before, later in spans]
        if turns is not None:
            within = [[b - a for a, b in spans if begin <= a and b <= end][SETTLING:] for begin, end in turns]
            found["turns_s"] = [round(statistics.mean(of_turn or [math.nan]), 5) for of_turn in within]
            found |= {"s_per_step": round(statistics.mean(found["turns_s"]), 5), "steps": sum(map(len, within))}
        else:
            second_half = steps[len(steps) // 2 :]
            found["s_per_step"] = round(statistics.median(second_half), 4)
        found["steps_s"] = [round(s, 4) for s in steps]
        if parameters := re.search(r"training ([\d,]+) parameters", log):
            found["parameters"] = int(parameters[1].replace(",", ""))
        found["log"] = [line[:200] for line in log.splitlines() if re.search(r"WARNING|non-finite|create LoRA", line)][
            :8
        ]
        return found | record | ({} if turns is not None else self.read_file(training))

    def read_file(self, training: Training) -> dict[str, Any]:
        from safetensors.torch import load_file

        folder = self.args.folder / training.world / "out"
        tensors = load_file(folder / f"{training.name}.safetensors")
        found: dict[str, Any] = {
            "modules": sum(key.endswith("lora_up.weight") for key in tensors),
            "moved": sum(bool(value.any()) for key, value in tensors.items() if key.endswith("lora_up.weight")),
            "finite": all(bool(value.isfinite().all()) for value in tensors.values()),
        }
        if training.beside:
            found["beside"] = apart(tensors, load_file(folder / f"{training.beside}.safetensors"))
        return found

    def summary(self) -> dict[str, Any]:
        """Of each case: ours against theirs, and ours with compiled blocks."""
        found = {}
        runs = [run for run in self.found.values() if run["exit"] == 0]
        for case in dict.fromkeys(run["case"] for run in runs if run["case"]):
            of = {who: [run for run in runs if run["case"] == case and run["who"] == who] for who in WHO.values()}
            for who in ("ours", "compiled"):
                if of[who] and of["theirs"]:
                    found[case if who == "ours" else f"{case}, {who}"] = compare(case, of[who], of["theirs"])
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
    parser.add_argument("--order", default="otto", help="letters: ours, theirs, compiled")
    parser.add_argument("--turns", type=int, default=10, help="of each, where they alternate")
    parser.add_argument("--turn", type=float, default=10, help="seconds of one")
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
