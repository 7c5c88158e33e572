"""What a training takes of a card, beside what --dry_run says of it: published sizes, random weights, no download.

    python benchmarks/dry_run.py

Each case is a training of `train_network_deft.py` from its pictures to its file, of which only the reading of weights
is left out: the model is made of the published configuration. Peaks are torch's of allocated memory, phase by phase.
Then the same options go to `library.estimate`. Writes benchmarks/results/dry_run.json anew after each case. A case
takes 20 to 60 seconds on an H100, and FLUX.1 29 GB of its memory.

`--tiny` tries it on a CPU with small models, without peaks.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import diffusers
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_network_deft  # noqa: E402
from library.estimate import phases, rates  # noqa: E402
from library.models.family import Family  # noqa: E402
from library.models.loading import load  # noqa: E402
from library.models.reading import CONFIGS  # noqa: E402
from library.options.parse import parse  # noqa: E402
from library.training import given, prepare  # noqa: E402
from library.training.loop import TrainingLoop  # noqa: E402
from library.training.samples import Samples  # noqa: E402
from library.training.state import Length  # noqa: E402
from library.training.texts import Texts  # noqa: E402
from tests import small_flux, small_models  # noqa: E402

CUDA = torch.cuda.is_available()
STEPS = 6
UNET_ONLY = "--network_train_unet_only --cache_text_encoder_outputs --mixed_precision bf16"
CASES = {
    "sd15": ("sd15", 512, "--mixed_precision bf16"),
    "sd15_batch_4": ("sd15", 512, "--mixed_precision bf16 --train_batch_size 4"),
    "sd15_float32": ("sd15", 512, ""),
    "sdxl_checkpointing": ("sdxl", 1024, f"{UNET_ONLY} --gradient_checkpointing"),
    "sdxl": ("sdxl", 1024, UNET_ONLY),
    "sdxl_encoders_checkpointing": ("sdxl", 1024, "--mixed_precision bf16 --gradient_checkpointing"),
    "flux_checkpointing": ("flux", 1024, f"{UNET_ONLY} --gradient_checkpointing"),
}
COMMON = (
    "--pretrained_model_name_or_path {model} --train_data_dir {images} --caption_extension .txt --output_dir {out} "
    "--output_name last --network_dim 16 --network_alpha 16 --seed 1 --cache_latents --resolution {pixels} "
    "--max_train_steps {steps} --sample_prompts {prompts} --sample_every_n_steps {steps} --save_precision bf16"
)
FLUX_INDEX = {
    "_class_name": "FluxPipeline", "_diffusers_version": "0.42.1",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"], "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"], "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"],
}  # fmt: skip


@dataclass
class Peaks:
    """What torch had allocated at most, in bytes, by phase; and when steps were done."""

    of: dict[str, int] = field(default_factory=dict)
    reserved: int = 0  # with what lies between, in all phases
    times: list[float] = field(default_factory=list)

    def end(self, phase: str) -> None:
        """Of what has run since the last one."""
        if CUDA:
            torch.cuda.synchronize()
            self.of[phase] = max(self.of.get(phase, 0), torch.cuda.max_memory_allocated())
            self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())
            torch.cuda.reset_peak_memory_stats()

    def around(self, place: Any, name: str, phase: str, before: str = "") -> Any:
        """A patch of a function that is a phase.

        :param before: the phase that it interrupts
        """
        call = getattr(place, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.end(before or "other")
            try:
                return call(*args, **kwargs)
            finally:
                self.end(phase)

        return mock.patch.object(place, name, watched)

    def steps(self) -> Any:
        after = TrainingLoop._after_step

        def watched(loop: TrainingLoop) -> None:
            if CUDA:
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())
            after(loop)

        return mock.patch.object(TrainingLoop, "_after_step", watched)


@functools.cache
def folder_of(kind: str, world: Path, tiny: bool) -> Path:
    """A Diffusers folder without weights, or a small one with them."""
    folder = world / "small_flux" / "model" if tiny and kind == "flux" else world / kind
    if folder.exists():
        return folder
    if tiny:
        return small_flux.build(folder.parent).folder if kind == "flux" else small_models.build(kind, folder)
    shutil.copytree(CONFIGS / kind, folder)
    small_models.tokenizer(folder / "tokenizer")
    if kind == "sdxl":
        small_models.tokenizer(folder / "tokenizer_2", pad_token="!")
    if kind == "flux":
        small_flux.t5_tokenizer(folder / "tokenizer_2")
        (folder / "model_index.json").write_text(json.dumps(FLUX_INDEX))
    return folder


def pictures(world: Path, pixels: int) -> Path:
    folder = world / f"images{pixels}"
    if not folder.exists():
        (folder / "10_sks thing").mkdir(parents=True)
        for i in range(8):
            image = Image.effect_noise((pixels, pixels), 40 + i).convert("RGB")
            image.save(folder / "10_sks thing" / f"{i}.png")
            (folder / "10_sks thing" / f"{i}.txt").write_text(f"a photo of sks thing {i}")
    return folder


def made(options: Any, dtype: torch.dtype) -> Family:
    """In place of a model's reading: zeros on the CPU, which cost nothing; random numbers once they are on the card."""
    model = load(options, dtype, empty=True)
    for part in model.pipeline.components.values():
        if isinstance(part, nn.Module):
            zeros(part)
    place = model.place

    def placed(*args: Any, **kwargs: Any) -> None:
        place(*args, **kwargs)
        randomly(model.denoiser)
        for encoder in model.text_encoders:
            randomly(encoder)

    model.place = placed  # type: ignore[method-assign]
    return model


def zeros(part: nn.Module) -> None:
    """Off the meta device; weights that are one stay one."""
    there: dict[int, Any] = {}

    def of(tensor: torch.Tensor) -> torch.Tensor:
        return there.setdefault(id(tensor), torch.zeros(tensor.shape, dtype=tensor.dtype))

    part._apply(of)
    for module in part.modules():  # of transformers', whose values are no weights
        if "position_ids" in module._buffers:
            ids = module._buffers["position_ids"]
            module._buffers["position_ids"] = torch.arange(ids.shape[-1]).expand(ids.shape)


@torch.no_grad()
def randomly(part: nn.Module) -> None:
    for name, weight in part.named_parameters():
        if weight.dim() > 1:
            weight.normal_(0, math.prod(weight.shape[1:]) ** -0.5)
        elif "norm" in name and name.endswith("weight"):
            weight.fill_(1.0)


def measured(arguments: list[str]) -> dict[str, Any]:
    """A real training's peaks."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
    peaks, start = Peaks(), time.perf_counter()
    peaks.end("before")
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(train_network_deft, "load", made))
        for patch in (
            peaks.around(prepare, "read_pictures", phases.LATENTS),
            peaks.around(Texts, "keep", phases.TEXTS),
            peaks.around(Samples, "draw", phases.SAMPLES, phases.TRAINING),
            peaks.around(TrainingLoop, "run", phases.TRAINING),
            peaks.steps(),
        ):
            stack.enter_context(patch)
        train_network_deft.train(parse(arguments))
    spans = [b - a for a, b in zip(peaks.times[1:], peaks.times[2:], strict=False)]
    file = Path(arguments[arguments.index("--output_dir") + 1]) / "last.safetensors"
    return {
        "peaks_mib": {name: round(size / 2**20) for name, size in peaks.of.items()},
        "reserved_mib": round(peaks.reserved / 2**20),
        "s_per_step": round(sorted(spans)[len(spans) // 2], 4) if spans else None,
        "file_bytes": file.stat().st_size,
        "seconds": round(time.perf_counter() - start, 1),
    }


def estimated(arguments: list[str]) -> dict[str, Any]:
    start, run = time.perf_counter(), parse(arguments)
    files = given.read(run)
    found = rates.measured(prepare.WEIGHT_DTYPES[run.process.mixed_precision])
    result = phases.estimate(run, files, phases.empty_model(run), found, Length(run.loop.max_train_steps, 1))
    training = next(phase for phase in result.phases if phase.name == phases.TRAINING)
    return {
        "peaks_mib": {phase.name: round(phase.peak / 2**20) for phase in result.phases},
        "parts_mib": {p.name: {name: round(size / 2**20) for name, size in p.parts.items()} for p in result.phases},
        "step": {
            "busy_s": round(training.work.busy, 4), "operations": training.work.operations,
            "tflop": {str(dtype): round(number / 1e12, 3) for dtype, number in training.work.flops.items()},
            "gbytes": round(training.work.bytes / 1e9, 2),
        },
        "rates": found and {"flops": {str(k): v for k, v in found.flops.items()}, "bytes": found.bytes,
                            "operations": found.operations},
        "file_bytes": result.file, "parameters": result.parameters, "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def words_of(world: Path, name: str, case: tuple[str, int, str], tiny: bool, **more: Any) -> list[str]:
    """A case's command line, with its model, pictures and prompts.

    :param case: model, pixels, options
    :param more: of what the options name in braces
    """
    kind, pixels, options = case
    prompts = world / f"prompts{pixels}.txt"
    prompts.write_text(f"a photo of sks thing --w {pixels} --h {pixels} --s 4\n")
    words = f"{COMMON} {options}".format(
        model=folder_of(kind, world, tiny), images=pictures(world, pixels), out=world / "out" / name, pixels=pixels,
        prompts=prompts, steps=STEPS, **more,
    )  # fmt: skip
    return words.split()


def tried(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return call()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: the other cases go on
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:2000], "trace": traceback.format_exc()[-3000:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"all, if none is given: {', '.join(CASES)}")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "dry_run.json")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.cases) - CASES.keys():
        parser.error(f"unknown: {', '.join(unknown)}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if CUDA else platform.processor(),
        "torch": torch.__version__, "diffusers": diffusers.__version__, "transformers": transformers.__version__,
        "accelerate": accelerate.__version__, "cases": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        for name in args.cases or CASES:
            kind, pixels, options = CASES[name]
            pixels = 64 if args.tiny else pixels
            words = words_of(world, name, (kind, pixels, options), args.tiny)
            found: dict[str, Any] = {"options": options, "pixels": pixels}
            found["measured"] = tried(lambda words=words: measured(words))
            found["estimated"] = tried(lambda words=words: estimated(words))
            shown = found["measured"].get("peaks_mib", {}), found["estimated"].get("peaks_mib", {})
            found["estimated_of_measured"] = {
                phase: round(size / shown[0][phase], 4) for phase, size in shown[1].items() if shown[0].get(phase)
            }
            result["cases"][name] = found
            print(f"--- {name} {json.dumps(found)}", flush=True)
            args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
