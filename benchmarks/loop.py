"""A step of the stand-alone trainer, before and after a change to it: full-size SDXL or FLUX.1 with random weights.

    git archive 0ec5051 | (mkdir -p /tmp/before && tar -x -C /tmp/before)
    python benchmarks/loop.py --before /tmp/before --folder /dev/shm/loop

Each version trains in a process of its own, with the same options, models and pictures: checkpointing, batch 1, latents
and texts cached, no adapter of a text encoder. Printed of each: ms a step over `STEPS` steps; of `PROFILED` more, under
torch's profiler, how long some kernel of the GPU's ran, how long the CPU waited for it, how often, and what is left of
the time, which is the CPU's own. Needs 12 GB in the folder; for FLUX.1 (`--world flux`) 45. Writes
benchmarks/results/loop.json. `--tiny` tries it on a CPU, where there is nothing to wait for.
"""

from __future__ import annotations

import argparse
import json
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
WARM, STEPS, PROFILED = 6, 24, 6
WAITING = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaMemcpy")
SIDE = "--side"


class Watch:
    """Of one training: it knows nothing of the trainer but its bar named "steps"."""

    def __init__(self) -> None:
        self.cuda, self.step, self.begin = torch.cuda.is_available(), 0, 0.0
        self.found: dict[str, Any] = {"device": torch.cuda.get_device_name() if self.cuda else "cpu"}

    def counted(self) -> None:
        """Behind each step."""
        self.step += 1
        if self.step == WARM:
            self.begin, self.cpu = self._now(), time.process_time()
        elif self.step == WARM + STEPS:
            self.found["ms"] = 1e3 * (self._now() - self.begin) / STEPS
            self.found["process_ms"] = 1e3 * (time.process_time() - self.cpu) / STEPS
            if self.cuda:
                self.found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
                self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                self.profile.start()
                self.begin = self._now()
        elif self.step == WARM + STEPS + PROFILED and self.cuda:
            wall = 1e3 * (self._now() - self.begin) / PROFILED
            self.profile.stop()
            self.found |= profiled(self.profile, wall)

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def profiled(profile: Any, wall: float) -> dict[str, float]:
    """Milliseconds a step.

    :param wall: of a step under the profiler
    """
    events = profile.events()
    spans = sorted((e.time_range.start, e.time_range.end) for e in events if "CUDA" in str(e.device_type))
    busy, until = 0.0, float("-inf")
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    waits = [e.time_range.elapsed_us() for e in events if e.name in WAITING and "CUDA" not in str(e.device_type)]
    waited = sum(waits) / 1e3 / PROFILED
    return {"profiled_ms": wall, "busy_ms": busy / 1e3 / PROFILED, "waited_ms": waited, "cpu_ms": wall - waited,
            "waits": (len(waits) - 1) / PROFILED, "kernels": len(spans) / PROFILED}  # fmt: skip


def side(file: Path, script: Path, arguments: list[str]) -> None:
    """One training."""
    watch, update = Watch(), tqdm.update

    def counted(bar: tqdm, n: float | None = 1) -> bool | None:
        if getattr(bar, "desc", "").startswith("steps"):
            watch.counted()
        return update(bar, n)

    tqdm.update = counted  # type: ignore[method-assign]
    sys.argv, sys.path[0] = [str(script), *arguments], str(script.parent)
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        file.write_text(json.dumps(watch.found), encoding="utf-8")


def main() -> int:
    sys.path.insert(0, str(ROOT))
    from benchmarks.trainer import BF16, CHECKPOINTING, COMMON, WORLD, WORLDS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a folder with the older sources")
    parser.add_argument("--folder", type=Path, required=True, help="of the model; one that is there stays")
    parser.add_argument("--world", choices=list(WORLDS), default="sdxl")
    parser.add_argument("--order", default="ba", help="b for before, a for after")
    parser.add_argument("--options", default="", help="more of the trainer's")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "loop.json")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    world, pixels = folder / args.world, 64 if args.tiny else 1024
    if not (world / "images").is_dir():
        tiny = ["tiny"] if args.tiny else []
        subprocess.run([sys.executable, str(WORLD), args.world, str(world), str(pixels), *tiny], check=True)
    found: list[dict[str, Any]] = []
    for which in args.order:
        script = (args.before.resolve() if which == "b" else ROOT) / "train_network_deft.py"
        words = f"{COMMON} {WORLDS[args.world]} {BF16} {CHECKPOINTING} --no_report {args.options}".format(
            world=world, name="loop", pixels=pixels, steps=WARM + STEPS + PROFILED + 1
        )
        record = folder / "loop.json"
        record.unlink(missing_ok=True)
        begin = time.monotonic()
        command = [sys.executable, str(Path(__file__).resolve()), SIDE, str(record), str(script), *words.split()]
        code = subprocess.run(command, cwd=script.parent).returncode
        told = json.loads(record.read_text()) if record.exists() else {}
        found.append({"which": "after" if which == "a" else "before", "exit": code,
                      "seconds": time.monotonic() - begin, **told})  # fmt: skip
        print(json.dumps(found[-1]), flush=True)
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    columns = ("ms", "profiled_ms", "cpu_ms", "waited_ms", "waits", "busy_ms", "kernels", "process_ms", "peak_gib")
    print("| | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for one in found:
        print(f"| {one['which']} | " + " | ".join(f"{one[c]:.1f}" if c in one else "" for c in columns) + " |")
    return int(any(one["exit"] for one in found))


if __name__ == "__main__":
    if sys.argv[1:2] == [SIDE]:
        side(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    else:
        sys.exit(main())
