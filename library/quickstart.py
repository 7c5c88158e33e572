"""The README's first command: sets everything up, trains on five pictures, and shows what came out.

`python -m library.quickstart [creature|photos]` makes `.venv`, then runs itself in it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from library.bootstrap import ROOT, ensure_environment, run_environment

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from PIL import Image

    from library.prompts import Prompt

CONFIGS = Path("configs/quickstart")
NAMES = ("creature", "photos")
CREATURE = 4  # the seed of the creature on the five pictures
MEASURED = 16  # pictures a side
THREADS = min(4, os.cpu_count() or 1)  # the model is tiny: more would wait for each other


def main(argv: list[str]) -> int:
    """Outside of `.venv`, enters it; inside, runs everything."""
    name = argv[0] if argv else NAMES[0]
    if argv[1:] or name not in NAMES:
        print(f"error: {' '.join(argv)}: give one of {', '.join(NAMES)}, or nothing for {NAMES[0]}", file=sys.stderr)
        return 2
    python = ensure_environment(ROOT / "requirements.txt")
    if Path(sys.prefix).resolve() != python.parent.parent.resolve():
        return subprocess.run(
            [python, "-m", "library.quickstart", name], cwd=ROOT, env=run_environment(THREADS)
        ).returncode
    return run(name)


def run(name: str) -> int:
    """Trains, loads the file through diffusers, draws before and after, prints the table."""
    import toml

    from library import sampling
    from library.models.loading import load
    from library.options.rooms import ModelOptions
    from library.prompts import read_prompts
    from library.world import tiny_model

    start = time.time()
    config = CONFIGS / f"{name}.toml"
    settings = {key: value for section in toml.load(config).values() for key, value in section.items()}
    output, model = Path(settings["output_dir"]), Path(settings["pretrained_model_name_or_path"])
    output.mkdir(parents=True, exist_ok=True)
    if name == "photos" and not (model / "model_index.json").is_file():
        print(f"building a small untrained model in {model}", flush=True)
        tiny_model.build(model)
    log = output / "train.log"
    if train(config, log):
        print(f"training failed, see {log}", file=sys.stderr)
        return 1

    lora = output / f"{settings['output_name']}.safetensors"
    samples = sorted((output / "sample").glob(f"*_{settings['max_train_steps']:06d}_*.png"))
    newest = {path.name.rsplit("_", 3)[1]: path for path in samples}
    size = int(settings["resolution"])
    prompts = read_prompts(settings["sample_prompts"], (size, size))
    pipeline = load(ModelOptions(str(model))).pipeline
    before = sampling.draw(pipeline, prompts)
    rows = check_layers(pipeline, lora)
    after = sampling.draw(pipeline, prompts)
    rows.append(("draws in diffusers:", f"what the trainer's own network draws, {difference(newest.values(), after)}"))
    if name == "creature":
        rows += judged(pipeline)
    picture = output / "before_and_after.png"
    draw_picture(prompts, before, after, Path(settings["train_data_dir"]), picture)
    report = output / f"{settings['output_name']}.html"
    rows += [
        ("adapter", lora),
        ("report", report),
        ("pictures", picture),
        ("log", log),
        ("time", f"{time.time() - start:.0f} s"),
    ]
    print()
    for label, value in rows:
        print(f"{label:20s} {value}")
    return 0


def train(config: Path, log: Path) -> int:
    """Runs the trainer as a user would, its output shown and kept; returns its exit code."""
    command = [sys.executable, "train_network_deft.py", "--config_file", str(config)]
    print("$", "python", *command[1:], flush=True)
    with (
        open(log, "wb") as file,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0) as process,
    ):
        assert process.stdout is not None
        while chunk := process.stdout.read(4096):
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
            file.write(chunk.replace(b"\r", b"\n"))
    return process.returncode


def check_layers(pipeline: StableDiffusionPipeline, lora: Path) -> list[tuple[str, object]]:
    """Loads the file into the pipeline by diffusers, and compares every layer's delta with ours.

    :returns: rows of the closing table
    """
    import torch

    from networks import deft
    from networks.deft_module import DeftModule

    text_encoder, unet = pipeline.text_encoder, pipeline.unet
    network, _ = deft.create_network_from_weights(1.0, str(lora), None, text_encoder, unet)
    network.apply_to(text_encoder, unet)
    network.load_weights(str(lora))
    network.remove()
    pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
    by_layer: dict[object, DeftModule] = {m.org_module: m for m in network.all_modules}
    errors = []
    for part in (unet, text_encoder):
        for layer in part.modules():
            ours = by_layer.get(getattr(layer, "base_layer", None))
            if ours is not None:
                with torch.no_grad():
                    up, down = ours.lora_factors()
                    delta, theirs = up @ down, layer.get_delta_weight(layer.active_adapters[0]).flatten(1)
                errors.append(float((theirs - delta).norm() / delta.norm().clamp(min=1e-12)))
    number = len(network.all_modules)
    return [
        ("modules adapted", number),
        ("parameters trained", f"{sum(p.numel() for p in network.parameters()):,}"),
        ("file size", f"{lora.stat().st_size / 2**20:.2f} MiB"),
        ("loads in diffusers:", f"{len(errors)} of {number} modules, largest relative error {max(errors):.1e}"),
    ]


def difference(files: Iterable[Path], images: Iterable[Image.Image]) -> str:
    """How far the pictures are from those in the files."""
    import numpy as np
    from PIL import Image

    pairs = [(Image.open(path), drawn) for path, drawn in zip(files, images, strict=True)]
    largest = max(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max() for a, b in pairs)
    return f"largest difference {largest} of 255"


def judged(pipeline: StableDiffusionPipeline) -> list[tuple[str, object]]:
    """What the judge says of pictures without and with the adapter, of the same prompts from the same noise.

    :returns: rows of the closing table
    """
    from library.world import concepts, judge, measure

    print(f"drawing {4 * MEASURED} pictures to measure", flush=True)
    net = judge.load()
    likeness = measure.Likeness(net, concepts.creature(CREATURE))
    concept, known = measure.concept_prompts("sks", MEASURED), measure.known_scenes(MEASURED)
    sides = []
    for switch in (pipeline.disable_lora, pipeline.enable_lora):
        switch()
        like = likeness(measure.draw(pipeline, concept, range(MEASURED)))
        sides.append({"likeness": like} | measure.agreements(net, pipeline, known))
    before, after = sides
    rows: list[tuple[str, object]] = [
        (
            "the creature",
            f"likeness {measure.change(before['likeness'], after['likeness'])}; "
            f"a render not trained on {likeness.of_renders:.2f}",
        )
    ]
    return rows + [
        (f"the old world's {name}", f"right in {measure.change(before[name], after[name])}")
        for name in ("colour", "shape", "background")
    ]


def draw_picture(
    prompts: list[Prompt], before: list[Image.Image], after: list[Image.Image], data: Path, picture: Path
) -> None:
    """The training pictures, and below them what was drawn before and after."""
    from library import sampling
    from library.data.folders import listed, picture_files
    from library.data.pixels import read_picture

    size = before[0].size
    trained_on = [read_picture(path).image.resize(size) for folder in listed(data) for path in picture_files(folder)]
    columns = {"before": before, "after": after}
    sampling.grid([prompt.text for prompt in prompts], columns, trained_on).save(picture)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
