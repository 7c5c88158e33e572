"""One process of `trainer.py`: `python trainer_side.py RECORD SCRIPT T5_LAYERS ARGUMENTS...` runs a trainer's script as
if started itself, and writes down when its steps were done and what memory they took.

It knows no trainer: all it watches is the progress bar named "steps", which both have. With DETERMINISTIC in the
environment, torch takes deterministic kernels, where it has any; where RECORD is beside a file that ends in .end, the
training ends after the step under way. Of several processes, those behind the first write RECORD with their number.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm


def main(file: Path, script: Path, t5_layers: int, arguments: list[str]) -> None:
    """Writes `times` of steps, the first one, and peaks of allocated memory: until it was done, after that, of all."""
    cuda = torch.cuda.is_available()
    times: list[float] = []
    before, first = 0, 0.0

    def peak() -> int:
        return torch.cuda.max_memory_allocated() if cuda else 0

    def counted(bar: tqdm, n: float | None = 1) -> bool | None:
        nonlocal before, first
        if getattr(bar, "desc", "").startswith("steps"):  # one that is not shown has none
            times.append(time.perf_counter())
            if len(times) == 1:
                first = time.time() - bar.start_t
            if len(times) == 1 and cuda:
                before = peak()
                torch.cuda.reset_peak_memory_stats()
            if file.with_suffix(".end").exists():
                raise SystemExit
        return update(bar, n)

    def config(self: transformers.T5Config, *given: object, **named: object) -> None:
        make_config(self, *given, **named | {"num_layers": t5_layers})  # type: ignore[arg-type]

    if os.environ.get("DETERMINISTIC"):
        torch.use_deterministic_algorithms(True, warn_only=True)
    make_config, transformers.T5Config.__init__ = transformers.T5Config.__init__, config  # type: ignore[method-assign]
    update, tqdm.update = tqdm.update, counted
    sys.argv, sys.path[0] = [str(script), *arguments], str(script.parent)
    if script.name != "train_network_deft.py":  # it takes longer than the training, and goes into the metadata alone
        train_util: Any = importlib.import_module("library.train_util")  # sd-scripts'
        train_util.calculate_sha256 = lambda _: ""
    code: Any = 0
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as ended:
        code = ended.code
        raise
    finally:
        record = {
            "exit_code": code,
            "times": times,
            "first_s": round(first, 1),
            "peak_start": before,
            "peak_training": peak(),
            "peak_reserved": torch.cuda.max_memory_reserved() if cuda else 0,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": torch.cuda.get_device_name() if cuda else "cpu",
        }
        of_rank(file, int(os.environ.get("RANK", "0"))).write_text(json.dumps(record))


def of_rank(file: Path, rank: int) -> Path:
    return file.with_suffix(f".{rank}.json") if rank else file


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
