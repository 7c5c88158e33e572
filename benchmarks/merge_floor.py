"""What bounds the merge of an adapter into a checkpoint: ours beside ever less of the same work, by wall clock.

    python benchmarks/merge_floor.py --folder /tmp/tools --shapes /tmp/tools/sdxl.json --workers 2 4 8 16

Each way is a process of its own and ends when the file is on the disk; they run in turns, as in benchmarks/tools.py:
`cp and sync`; the bytes read and written by threads, without torch; the same with each value turned into float32 and
back (the least that a merge in float32 does), with torch's start and without; ours, with some numbers of threads, and
how long its stages took. Writes benchmarks/results/merge_floor.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tools
from tools import OURS, Way

CHUNK = 1 << 20


def chunks(source: Path, output: Path, threads: int, work: Callable[[memoryview], memoryview]) -> None:
    """A file's bytes through `work` into another, which is on the disk then."""
    size = source.stat().st_size
    reading, writing = os.open(source, os.O_RDONLY), os.open(output, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.ftruncate(writing, size)

    def some(k: int) -> None:
        data = memoryview(bytearray(CHUNK))
        for start in range(k * CHUNK, size, threads * CHUNK):
            number = os.preadv(reading, [data], start)
            os.pwrite(writing, work(data[:number]), start)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(some, range(threads)))
    os.fsync(writing)


def converting() -> Callable[[memoryview], memoryview]:
    """float16 to float32 and back, by torch with one thread."""
    import torch

    torch.set_num_threads(1)

    def convert(data: memoryview) -> memoryview:
        values = torch.frombuffer(data, dtype=torch.float16).float()
        return memoryview(values.half().view(torch.uint8).numpy()).cast("B")

    return convert


def merge(workers: int, arguments: list[str]) -> None:
    """Ours, with what its stages took on the last line."""
    start = time.perf_counter()
    sys.path[:0] = [str(tools.ROOT)]
    from networks import deft_rewrite, deft_sum, merge_deft

    marks = {"imports": time.perf_counter() - start}
    deft_rewrite._WORKERS = workers
    read, close = deft_sum.read_parts, deft_rewrite._Output.close
    merged = deft_rewrite._Run._write

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            began = time.perf_counter()
            found = call(*args)
            marks[name] = time.perf_counter() - began
            return found

        return run

    deft_sum.read_parts = timed("adapter", read)
    deft_rewrite._Output.close = timed("sync", close)  # type: ignore[method-assign]
    deft_rewrite._Run._write = timed("computing and writing", merged)  # type: ignore[method-assign]
    code = merge_deft.main(arguments)
    marks["whole"] = time.perf_counter() - start
    with open(os.environ["MARKS"], "a", encoding="utf-8") as file:
        file.write(json.dumps({"workers": workers, **{name: round(value, 2) for name, value in marks.items()}}) + "\n")
    sys.exit(code)


def ways(folder: Path, workers: list[int]) -> dict[str, Way]:
    """By name."""
    source, lora, output = (folder / f"{name}.safetensors" for name in ("sdxl", "sdxl_lora_1", "floor"))
    this = [sys.executable, Path(__file__)]
    environment = {"OMP_NUM_THREADS": "1", "MARKS": str(folder / "marks.jsonl")}
    most = str(max(workers))
    given = ["--sd_model", source, "--models", lora, "--ratios", "0.8", "--save_to", output]
    return {
        "cp and sync": tools.copied(source, output)["cp and sync"],
        "threads copy": Way([*this, "copy", source, output, most], [output], environment),
        "threads convert": Way([*this, "convert", source, output, most], [output], environment),
        "import torch": Way([sys.executable, "-c", "import torch"], [], environment),
        **{
            OURS if n == max(workers) else f"{OURS}, {n} threads": Way(
                [*this, "merge", str(n), *given], [output], environment
            )
            for n in workers
        },
    }


def main() -> None:
    """Measures, or is one of the ways."""
    command, *arguments = sys.argv[1:] or [""]
    if command in ("copy", "convert"):
        work = converting() if command == "convert" else lambda data: data
        chunks(Path(arguments[0]), Path(arguments[1]), int(arguments[2]), work)
        return
    if command == "merge":
        merge(int(arguments[0]), arguments[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shapes", type=Path, required=True, help="of tools_inputs.py")
    parser.add_argument("--workers", type=int, nargs="+", default=[os.cpu_count() or 1])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for words in (["lora", "sdxl_lora_1", "--seed", "1"], ["checkpoint", "sdxl"]):
        file = given.folder / f"{words[1]}.safetensors"
        made = [sys.executable, tools.INPUTS, words[0], file, "--shapes", given.shapes, *words[2:]]
        subprocess.run([str(word) for word in made], check=True)
    marks = given.folder / "marks.jsonl"
    marks.unlink(missing_ok=True)
    costs = tools.interleaved(ways(given.folder, given.workers), given.rounds)
    found = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "rounds": given.rounds,
        "load": [round(value, 1) for value in os.getloadavg()],
        **tools.summary(costs),
        "stages": [json.loads(line) for line in marks.read_text(encoding="utf-8").splitlines()],
    }
    tools.write_result("merge_floor", found)


if __name__ == "__main__":
    main()
