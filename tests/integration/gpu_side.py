"""Runs in sd-scripts' own Python and folder: `python gpu_side.py make WORLD FOLDER PIXELS [DOUBLE SINGLE]`, and
`python gpu_side.py train RECORD SCRIPT ARGUMENTS...`, which runs a trainer and writes down what it does."""

from __future__ import annotations

import json
import os
import resource
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch

T5_LAYERS = 2  # of 24: its outputs are cached before the training begins, and its 10 GB take longer than a training


def make(world: str, folder: Path, pixels: int, blocks: tuple[int, ...]) -> None:
    """A world of `sd_scripts_side.py`, with images of that size."""
    sys.path.append(str(Path(__file__).parent))  # sd-scripts has a `tests` of its own
    import sd_scripts_side

    if world == "flux":
        sd_scripts_side.make_flux(folder, (blocks[0], blocks[1]), T5_LAYERS, pixels)
    else:
        {"sd15": sd_scripts_side.make_model, "sdxl": sd_scripts_side.make_sdxl}[world](folder, pixels)
    for file in sorted((folder / "model").glob("*/*.safetensors")) if world == "sdxl" else ():
        os.link(file, file.with_suffix(".fp16.safetensors"))  # in fp16, sd-scripts looks for no other name


def train(file: Path, script: str, arguments: list[str]) -> None:
    """Runs the trainer as if started itself; `file` gets its losses, their times and the memory, after every step."""
    from library import flux_utils, train_util

    record: dict[str, Any] = {"torch": torch.__version__, "losses": [], "validation": [], "times": []}
    cuda = torch.cuda.is_available()
    if cuda:
        record["device"] = torch.cuda.get_device_name()

    def write(peak: str = "peak") -> None:
        record["main_memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
        if cuda:
            record[peak] = torch.cuda.max_memory_allocated()
            record["reserved"] = torch.cuda.max_memory_reserved()
        part = file.with_suffix(".part")
        part.write_text(json.dumps(record))
        part.replace(file)

    class Recorder(train_util.LossRecorder):
        """The first is the training's, made just before it; the others are the validation's."""

        made = 0

        def __init__(self) -> None:
            super().__init__()
            self.is_training = Recorder.made == 0
            Recorder.made += 1
            if self.is_training and cuda:
                record["peak_before"] = torch.cuda.max_memory_allocated()
                torch.cuda.reset_peak_memory_stats()

        def add(self, *, epoch: int, step: int, loss: float) -> None:
            super().add(epoch=epoch, step=step, loss=loss)
            record["losses" if self.is_training else "validation"].append(loss)
            if self.is_training:
                record["times"].append(time.monotonic())
                record["avr_loss"] = self.moving_average
            write()

    t5_config = flux_utils.T5Config
    flux_utils.T5Config = lambda **config: t5_config(**config | {"num_layers": T5_LAYERS})
    train_util.LossRecorder = Recorder
    train_util.calculate_sha256 = lambda name: "not computed"  # of 24 GB, for the metadata
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        write("peak_with_saving")


if __name__ == "__main__":
    sys.path[0] = str(Path.cwd())
    if sys.argv[1] == "make":
        make(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), tuple(map(int, sys.argv[5:])))
    else:
        train(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
