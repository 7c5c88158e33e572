"""The input directions that a model uses for what it can do already, as a file for `--network_args keep=FILE`.

    python -m library.keep --pretrained_model_name_or_path MODEL --output keep.safetensors

Draws a picture for each line of a prompts file (in the format of --sample_prompts; default: configs/keep.txt) with the
model as it is, and finds the directions that the inputs of every layer lie in. An adapter that stays out of them
answers to them as the model did. MODEL is a Diffusers folder of any model that networks.deft adapts, or what our
trainer loads. Once a model; our trainer does it by itself with `--network_args keep=configs/keep.txt`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import Tensor

from library import prompts as prompts_file
from library.models import omnigen
from library.models.loading import load as load_model
from library.models.reading import of_folder
from library.options.rooms import ModelOptions
from library.prompts import GUIDANCE, Prompt
from library.sampling import counted_by
from networks import deft_architectures, deft_io, deft_targets
from networks.deft_config import DeftError, reason_of
from networks.deft_keep import DIRECTIONS, Watch
from networks.deft_progress import Bar

PROMPTS = Path(__file__).resolve().parents[1] / "configs" / "keep.txt"
STEPS = 10  # of a picture
PIXELS = 2 * 512 * 512  # drawn at once, for 8 GB


def read_prompts(path: str | os.PathLike, size: tuple[int, int], option: str = "--prompts") -> list[Prompt]:
    """A prompts file's lines; `STEPS` of those that do not say how many, and the same seeds every time.

    :param size: width and height of lines without --w and --h
    :raises DeftError: when it cannot be read, or has a wrong line
    """
    found = prompts_file.told_unused(prompts_file.read_prompts(str(path), size, option, STEPS), f"{option} {path}:")
    return [prompt if prompt.seed is not None else replace(prompt, seed=i) for i, prompt in enumerate(found)]


def directions_to_keep(pipeline: DiffusionPipeline, prompts: Sequence[Prompt], k: int) -> dict[str, Tensor]:
    """Key name -> directions (n, k) of every layer that can be adapted, from drawing these prompts with the pipeline's
    own scheduler; those that differ in text and seed only are drawn together.

    :raises DeftError: for a layer whose inputs are not finite
    """
    denoiser = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    architecture, denoising = deft_architectures.recognise(denoiser)
    encoders = [getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")]
    models = [(denoiser, denoising), *zip(filter(None, encoders), architecture.text_encoders, strict=False)]
    layers = [
        target for model, its in models for target in deft_targets.targets(model, its, True, its.optional_containers)
    ]
    total, usual = sum(prompt.steps for prompt in prompts), getattr(pipeline, "default_guidance", GUIDANCE)
    with Watch(layers, k) as watch, torch.no_grad(), Bar(total, "drawing what to keep", "steps") as bar:
        for alike, group in itertools.groupby(prompts, lambda p: replace(p, text="", seed=None)):
            together = list(group)
            number = max(1, PIXELS // (alike.width * alike.height))
            for part in (together[i : i + number] for i in range(0, len(together), number)):
                pipeline(
                    [prompt.text for prompt in part],
                    width=alike.width,
                    height=alike.height,
                    num_inference_steps=alike.steps,
                    guidance_scale=usual if alike.guidance is None else alike.guidance,
                    generator=[prompt.generator() for prompt in part],
                    output_type="latent",
                    callback_on_step_end=counted_by(bar, len(part)),
                    **({"negative_prompt": [alike.negative] * len(part)} if alike.negative else {}),
                )
    return watch.directions()


def write(directions: Mapping[str, Tensor], path: str | os.PathLike) -> int:
    """Writes the file for the option `keep`; returns how many bytes its tensors have.

    :param directions: key name -> (n, k)
    :raises DeftError: when it cannot be written
    """
    tensors, metadata = deft_io.kept_tensors(directions)
    deft_io.write_safetensors(tensors, path, metadata)
    return sum(tensor.nbytes for tensor in tensors.values())


def load(path: str, device: str, dtype: torch.dtype) -> DiffusionPipeline:
    """A pipeline, without a hub.

    :raises DeftError: when there is none
    """
    if Path(path).is_file():
        try:
            return load_model(ModelOptions(path)).pipeline.to(device, dtype)
        except DeftError as error:
            raise DeftError(f"{error}; models of other kinds have to be Diffusers folders here") from error
    if omnigen.is_known(Path(path)):  # which diffusers makes with torchvision alone
        return load_model(ModelOptions(path)).pipeline.to(device, dtype)
    if not (Path(path) / "model_index.json").is_file():
        raise DeftError(
            f"--pretrained_model_name_or_path {path}: no Diffusers model folder (model_index.json) and no file"
        )
    diffusers.utils.logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()
    try:
        pipeline = DiffusionPipeline.from_pretrained(path, torch_dtype=dtype, **of_folder(Path(path)))
    except Exception as error:  # of many kinds
        raise DeftError(f"{path}: not a readable Diffusers folder ({reason_of(error)})") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def own_resolution(pipeline: DiffusionPipeline) -> int:
    """Pixels a side of the pictures that the model draws when it is not told."""
    latent = pipeline.unet.config.sample_size if hasattr(pipeline, "unet") else pipeline.default_sample_size
    return latent * pipeline.vae_scale_factor


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 2 for a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--prompts", default=PROMPTS, help="a text file; a line a picture: what the model is to keep")
    parser.add_argument("--output", required=True)
    parser.add_argument("--directions", type=int, default=DIRECTIONS, help="a layer; at most a quarter of its inputs")
    parser.add_argument("--resolution", type=int, help="of lines without --w and --h; default: the model's own")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    try:
        if args.directions < 1:
            raise DeftError(f"--directions {args.directions}: give at least 1")
        if args.resolution is not None and (args.resolution < 8 or args.resolution % 8):
            raise DeftError(f"--resolution {args.resolution}: give a multiple of 8")
        read_prompts(args.prompts, (512, 512))  # mistakes in it, before the model is loaded
        pipeline = load(args.pretrained_model_name_or_path, args.device, _dtype(args.device))
        side = args.resolution or own_resolution(pipeline)
        prompts = read_prompts(args.prompts, (side, side))
        found = directions_to_keep(pipeline, prompts, args.directions)
        size = write(found, args.output)
    except DeftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: {len(found)} layers, {size / 2**20:.1f} MiB")
    return 0


def _dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16  # T5 does not fit into float16


if __name__ == "__main__":
    sys.exit(main())
