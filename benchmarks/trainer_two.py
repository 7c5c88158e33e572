"""Our trainer on two GPUs beside one: full-size SDXL with random weights, by configs/two_gpus.yaml; no download.

    python benchmarks/trainer_two.py --folder /dev/shm/two --output two.json

Of one process that accumulates two batches a step, and of two processes: the average losses, in float32 (512 pixels, no
TF32) and in bf16, beside those of the same training twice. What two processes save and resume. SIGTERM at the launcher:
exit codes, and the printed command. Pictures a second of two and of one. `--tiny` tries the same on a CPU, by torchrun.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.trainer import BF16, CHECKPOINTING, COMMON, SIDE, WORLD, WORLDS, apart  # noqa: E402
from benchmarks.trainer_side import of_rank  # noqa: E402

STEPS, HALF, BATCH, WARM = 12, 6, 4, 4
TIMED = {BATCH: 32, 16: 16}  # steps at so many pictures a process
FLOAT32 = f"--mixed_precision no --optimizer_type AdamW {CHECKPOINTING} --save_precision float"
HALVES = f"{BF16} {CHECKPOINTING} --meter_every_n_steps 0 --train_batch_size"
ACCUMULATED = "--gradient_accumulation_steps 2"


@dataclass(frozen=True)
class Run:
    """A training.

    :param gpu: of one process
    """

    name: str
    processes: int
    options: str
    pixels: int = 512
    steps: int = STEPS
    gpu: int = 0


class Bench:
    """Starts trainings and reads what they leave."""

    def __init__(self, folder: Path, tiny: bool):
        self.folder, self.tiny = folder, tiny

    def make(self) -> None:
        if not (self.folder / "images").is_dir():
            pixels, tiny = ("64", ["tiny"]) if self.tiny else ("1024", [])
            subprocess.run([sys.executable, str(WORLD), "sdxl", str(self.folder), pixels, *tiny], check=True)

    def start(self, run: Run) -> subprocess.Popen:
        words = f"{COMMON} {WORLDS['sdxl']} --logging_dir {{world}}/logs/{run.name} {run.options}".format(
            world=self.folder, name=run.name, pixels=64 if self.tiny else run.pixels, steps=run.steps
        )
        launcher, more = [sys.executable], {"HF_HUB_OFFLINE": "1"}
        if run.processes == 2 and self.tiny:
            launcher = [*launcher, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
            launcher, more["ACCELERATE_USE_CPU"] = [*launcher, str(self.port(run))], "true"
        elif run.processes == 2:
            launcher = ["accelerate", "launch", "--config_file", str(ROOT / "configs" / "two_gpus.yaml")]
            launcher += ["--main_process_port", str(self.port(run))]
        else:
            more["CUDA_VISIBLE_DEVICES"] = str(run.gpu)
        if run.options.startswith(FLOAT32):
            more["NVIDIA_TF32_OVERRIDE"] = "0"
        script = str(ROOT / "train_network_deft.py")
        command = [*launcher, str(SIDE), str(self.record(run.name)), script, "24", *words.split()]
        with self.log(run.name).open("w") as log:
            return subprocess.Popen(command, cwd=ROOT, env=os.environ | more, stdout=log, stderr=log)

    def port(self, run: Run) -> int:
        """Of its own, so that two can be there at a time."""
        return 29500 + sum(run.name.encode()) % 400

    def record(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def told(self, name: str) -> str:
        return self.log(name).read_text(errors="replace").replace("\r", "\n")

    def run(self, *runs: Run) -> None:
        """Side by side."""
        begin = time.monotonic()
        for run, process in [(run, self.start(run)) for run in runs]:
            code = process.wait()
            print(f"--- {run.name}: exit {code}, {time.monotonic() - begin:.0f} s", flush=True)
            if code:
                print(self.told(run.name)[-3000:], flush=True)

    def losses(self, name: str) -> list[float]:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (file,) = (self.folder / "logs" / name).rglob("events.out.tfevents.*")
        events = EventAccumulator(str(file))
        events.Reload()
        return [event.value for event in events.Scalars("loss/average")]

    def losses_apart(self, one: str, other: str) -> dict[str, Any]:
        """The largest relative difference, at the first step and of all that both have."""
        pairs = list(zip(self.losses(one), self.losses(other), strict=False))
        found = [abs(a - b) / abs(b) for a, b in pairs]
        return {"steps": len(found), "first": found[0], "largest": max(found), "losses": pairs}

    def files_apart(self, one: str, other: str) -> dict[str, Any]:
        from safetensors.torch import load_file

        return apart(*(load_file(self.folder / "out" / f"{name}.safetensors") for name in (one, other)))

    def rate(self, name: str) -> dict[str, Any]:
        record = json.loads(self.record(name).read_text())
        steps = [b - a for a, b in itertools.pairwise(record["times"])][WARM:-1]  # the last is told at once
        return {"s_per_step": statistics.mean(steps), "spread": statistics.stdev(steps),
                "steps_s": [round(step, 4) for step in steps],
                "peak_gib": record["peak_training"] / 2**30, "device": record["device"]}  # fmt: skip

    def end(self, run: Run) -> dict[str, Any]:
        """SIGTERM at the launcher, and what comes of it; then the printed command."""
        process = self.start(run)
        wait_for(lambda: bool(re.search(r"[2-9]/\d+ \[[^\n]*avr_loss", self.told(run.name))), process)
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        found: dict[str, Any] = {"launcher": process.wait(), "seconds": round(time.monotonic() - begin, 1)}
        records = [of_rank(self.record(run.name), rank) for rank in range(2)]
        found["processes"] = [json.loads(file.read_text())["exit_code"] if file.exists() else None for file in records]
        lines = self.told(run.name).splitlines()
        found["printed"] = [line for line in lines if line.startswith("interrupted")]
        commands = [line for line in lines if " --resume " in line]
        states = [path.name for path in (self.folder / "out").glob(f"{run.name}-step*-state")]
        return found | {"commands": len(commands), "command": commands[0] if commands else "", "states": states}

    def go_on(self, command: str, name: str) -> int:
        """As it was printed, from another terminal."""
        with self.log(name).open("w") as log:
            more = {"HF_HUB_OFFLINE": "1", "NVIDIA_TF32_OVERRIDE": "0"}
            words = shlex.split(command)
            return subprocess.run(words, cwd=ROOT, env=os.environ | more, stdout=log, stderr=log).returncode


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    while not condition() and process.poll() is None:
        time.sleep(0.05)


Keep = Callable[[str, Any], None]


def in_float32(bench: Bench, keep: Keep) -> None:
    """Losses, files, states, SIGTERM."""
    bench.run(
        Run("one_float32", 1, f"{FLOAT32} {ACCUMULATED}"), Run("again_float32", 1, f"{FLOAT32} {ACCUMULATED}", gpu=1)
    )
    bench.run(Run("two_float32", 2, f"{FLOAT32} --save_state --save_every_n_steps {HALF}"))
    keep("losses, float32: one process twice", bench.losses_apart("again_float32", "one_float32"))
    keep("losses, float32: two processes and one", bench.losses_apart("two_float32", "one_float32"))
    keep("files, float32: one process twice", bench.files_apart("again_float32", "one_float32"))
    keep("files, float32: two processes and one", bench.files_apart("two_float32", "one_float32"))
    state = bench.folder / "out" / f"two_float32-step{HALF:08d}-state"
    resumed = Run("resumed_float32", 2, f"{FLOAT32} --resume {state}")
    process = bench.start(resumed)
    ended = bench.end(Run("ended_float32", 2, FLOAT32))
    print(f"--- {resumed.name}: exit {process.wait()}", flush=True)
    keep("SIGTERM", ended)
    keep("files, float32: resumed and undisturbed", bench.files_apart("resumed_float32", "two_float32"))
    if ended["command"]:
        keep("exit code of the printed command", bench.go_on(ended["command"], "went_on"))
        keep("files, float32: went on and undisturbed", bench.files_apart("ended_float32", "two_float32"))


def in_bf16(bench: Bench, keep: Keep) -> None:
    """Pictures a second, and losses."""
    for batch, steps in TIMED.items():
        options = f"{HALVES} {batch}"
        bench.run(Run(f"alone{batch}", 1, options, 1024, steps))
        bench.run(Run(f"two{batch}", 2, options, 1024, steps))
        bench.run(Run(f"beside{batch}", 1, options, 1024, steps), Run(f"other{batch}", 1, options, 1024, steps, gpu=1))
        rates = {who: bench.rate(f"{who}{batch}") for who in ("alone", "two", "beside", "other")}
        keep(f"batch {batch} each", rates)
        alone, two, *others = (rate["s_per_step"] for rate in rates.values())
        keep(f"batch {batch} each, pictures a second of one's", {
            "two processes": 2 * alone / two, "two trainings side by side": sum(alone / s for s in others)
        })  # fmt: skip
    options = f"{HALVES} {BATCH} {ACCUMULATED}"
    bench.run(Run("one_bf16", 1, options, 1024), Run("again_bf16", 1, options, 1024, gpu=1))
    bench.run(Run("two_bf16", 2, f"{HALVES} {BATCH}", 1024))
    keep("losses, bf16: one process twice", bench.losses_apart("again_bf16", "one_bf16"))
    keep("losses, bf16: two processes and one", bench.losses_apart("two_bf16", "one_bf16"))


PARTS: dict[str, Callable[[Bench, Keep], None]] = {"float32": in_float32, "bf16": in_bf16}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"both, if none is given: {', '.join(PARTS)}")
    parser.add_argument("--folder", type=Path, required=True, help="of the model; one that is there stays")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "trainer-two.json")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.parts) - PARTS.keys():
        parser.error(f"unknown: {', '.join(unknown)}")
    args.folder = args.folder.resolve()
    bench = Bench(args.folder, args.tiny)
    found = json.loads(args.output.read_text(encoding="utf-8")) if args.output.is_file() else {}  # of other parts

    def keep(name: str, value: Any) -> None:
        found[name] = value
        short = {k: v for k, v in value.items() if k != "losses"} if isinstance(value, dict) else value
        print(f"{name}: {json.dumps(short)}", flush=True)
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    bench.make()
    for part in args.parts or PARTS:
        PARTS[part](bench, keep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
