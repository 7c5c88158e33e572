"""A small OmniGen learns a condition that it does not know, in context: DEFT beside a LoRA of as many parameters.

    python benchmarks/condition_model.py output/condition/model    # first, a GPU: the model
    python benchmarks/condition.py --model output/condition/model --output output/condition

What is learnt is to make a picture of its edges, behind one example of edges and their picture: the prompt names
pictures and says nothing of what they show. Training is the trainer's own on a JSONL file of pairs. Measured are the
loss on scenes that were never shown, at fixed noise; what the judge finds in pictures of their edges; and what the
model could do before: captions, and a condition that it knows. A rate is chosen by the first seed's loss on scenes that
are not those it is told on. Writes results.json, and a sheet of pictures.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image, ImageDraw
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_network_deft  # noqa: E402
from benchmarks.condition_model import BEHIND_EXAMPLE, CONDITIONS, HELD_OUT  # noqa: E402
from benchmarks.paper import adapters  # noqa: E402
from library.models import loading  # noqa: E402
from library.models.family import Family, Text  # noqa: E402
from library.options.parse import parse  # noqa: E402
from library.options.rooms import ModelOptions  # noqa: E402
from library.world import draw, judge, measure, scenes  # noqa: E402
from library.world.scenes import Scene  # noqa: E402

logger = logging.getLogger(__name__)

KNOWN = "grey"  # a condition that the model was trained on
NEAR = 6.0  # pixels from its place that a thing is found there
GUIDANCE, STEPS, LEVELS = 2.0, 25, 8
ADAPTERS = ("lora", "deft")


@dataclass(frozen=True)
class Pair:
    """A scene, and the scene that is its example."""

    scene: Scene
    example: Scene


def pairs(number: int, seed: str, held_out: bool) -> list[Pair]:
    """:param held_out: whether scenes are of the combinations that no training has shown; examples never are"""
    rng = random.Random(seed)
    return [Pair(scenes.draw_scene(rng, held_out=held_out), scenes.draw_scene(rng)) for _ in range(number)]


def rendered(found: Sequence[Scene]) -> Tensor:
    """Pixels (b, 3, 64, 64) in [-1, 1]."""
    return draw.render([scene.picture() for scene in found])


def write_data(folder: Path, given: Sequence[Pair]) -> Path:
    """The trainer's JSONL of these, with its pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    change = CONDITIONS[HELD_OUT]
    pictures, examples = rendered([one.scene for one in given]), rendered([one.example for one in given])
    lines = []
    for i in range(len(given)):
        names = {}
        for name, pixels in (
            ("first", change(examples[i : i + 1])), ("second", examples[i : i + 1]),
            ("third", change(pictures[i : i + 1])), ("target", pictures[i : i + 1]),
        ):  # fmt: skip
            names[name] = f"{i}-{name}.png"
            draw.to_image(pixels[0]).save(folder / names[name])
        *inputs, target = names.values()
        lines.append({"instruction": BEHIND_EXAMPLE, "input_images": inputs, "output_image": target})
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


class Asked:
    """What a model is measured with: prompts, and what should come of them."""

    def __init__(self, model: Family, given: Sequence[Pair], condition: str):
        device = model.denoiser.device
        change = CONDITIONS[condition]
        pictures, examples = rendered([one.scene for one in given]), rendered([one.example for one in given])

        def latents(pixels: Tensor) -> Tensor:
            generators = [torch.Generator().manual_seed(i) for i in range(len(pixels))]
            return model.encode_image(pixels.to(device), generators).float()

        self.scenes = [one.scene for one in given]
        self.conditions, self.pictures = change(pictures), pictures
        self.latents = latents(pictures)
        shown = zip(latents(change(examples)), latents(examples), latents(self.conditions), strict=True)
        self.text = model.encode_text([BEHIND_EXAMPLE] * len(given), [list(one) for one in shown])


class Bench:
    """Measures a model as it is."""

    def __init__(self, model: Family, number: int):
        self.model, self.number = model, number
        self.new = Asked(model, pairs(number, "condition measured", held_out=True), HELD_OUT)
        self.tuning = Asked(model, pairs(number, "condition tuned", held_out=True), HELD_OUT)
        self.known = Asked(model, pairs(number, "condition known", held_out=True), KNOWN)
        self.captions = measure.known_scenes(number)
        self.judge = judge.load()

    @torch.no_grad()
    def loss(self, asked: Asked) -> list[float]:
        """Of each scene: the mean square error of velocities, at `LEVELS` evenly spread times of fixed noise."""
        noise = torch.randn(asked.latents.shape, generator=torch.Generator().manual_seed(0)).to(asked.latents)
        total = torch.zeros(len(noise), device=noise.device)
        for k in range(LEVELS):
            sigma = (k + 0.5) / LEVELS
            noisy = (1 - sigma) * asked.latents + sigma * noise
            timesteps = torch.full((len(noise),), 1000 * sigma, device=noise.device)
            answer = self.model.predict(noisy, timesteps, asked.text, torch.zeros(len(noise), 6, device=noise.device))
            total += (answer.float() - (noise - asked.latents)).square().flatten(1).mean(1) / LEVELS
        return total.tolist()

    @torch.no_grad()
    def drawn(self, text: Text, number: int) -> Tensor:
        """Pixels (b, 3, 64, 64) in [-1, 1], the same noise every time."""
        empty = self.model.encode_text(["<cfg>"] * number)
        latents = self.model.pipeline(
            terms=[(GUIDANCE, text), (1 - GUIDANCE, empty)], width=draw.SIZE, height=draw.SIZE,
            num_inference_steps=STEPS, generator=[torch.Generator().manual_seed(i) for i in range(number)],
        ).images  # fmt: skip
        vae = self.model.vae
        return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample.float().clamp(-1, 1).cpu()

    def __call__(self) -> dict[str, list[float]]:
        """Name -> of each picture or scene."""
        found = self.drawn(self.new.text, self.number)
        known = self.drawn(self.known.text, self.number)
        words = self.drawn(self.model.encode_text([text for _, text in self.captions]), self.number)
        agreed = [
            judge.agreement(scene, reading)
            for (scene, _), reading in zip(self.captions, judge.read(self.judge, words), strict=True)
        ]
        return {
            "loss": self.loss(self.new),
            "right": self._right(self.new, found),
            "edges": _edge_error(self.new, found),
            "known": self._right(self.known, known),
            "captions": [statistics.mean(one.values()) for one in agreed],
        }

    def _right(self, asked: Asked, pixels: Tensor) -> list[float]:
        """Whether a picture shows as many things as its scene, each with its shape in its place."""
        return [
            float(_shows(reading, scene))
            for scene, reading in zip(asked.scenes, judge.read(self.judge, pixels), strict=True)
        ]


def _shows(reading: judge.Reading, scene: Scene) -> bool:
    def found(thing: scenes.Thing) -> bool:
        return any(
            one.shape == thing.shape and (one.x - thing.x) ** 2 + (one.y - thing.y) ** 2 <= NEAR**2
            for one in reading.things
        )

    return len(reading.things) == len(scene.things) and all(map(found, scene.things))


def _edge_error(asked: Asked, pixels: Tensor) -> list[float]:
    """Mean absolute difference of a picture's edges from those that were asked for, from 0 to 1."""
    return ((CONDITIONS[HELD_OUT](pixels) - asked.conditions).abs() / 2).flatten(1).mean(1).tolist()


def train(args: argparse.Namespace, data: Path, adapter: str, rate: float, seed: int) -> tuple[Path, float]:
    """The file of a trained adapter, and the seconds that it took."""
    name = f"{adapter}-{rate:g}-{seed}"
    file = args.output / "adapters" / f"{name}.safetensors"
    start = time.perf_counter()
    if not file.is_file():
        run = parse([
            "--pretrained_model_name_or_path", str(args.model), "--train_jsonl", str(data), "--image_path",
            str(data.parent), "--resolution", "64", "--output_dir", str(file.parent), "--output_name", name,
            "--max_train_steps", str(args.steps), "--train_batch_size", str(args.batch), "--seed", str(seed),
            "--learning_rate", str(rate), "--unet_lr", str(rate), "--lr_scheduler", "constant", "--network_dim",
            str(args.rank), "--network_alpha", str(args.rank), "--save_precision", "float", "--console_log_level",
            "WARNING", "--mixed_precision", args.precision, "--condition_dropout_prob", "0.1",
            "--meter_every_n_steps", "0", "--no_report",
        ])  # fmt: skip
        train_network_deft.train(run, adapters.adapter_of(adapter))
    return file, time.perf_counter() - start


def told(values: Sequence[float]) -> dict[str, float]:
    """Mean and half the width of its 95% interval."""
    return {name: round(value, 5) for name, value in measure.share(values).items()}


def sheet(bench: Bench, columns: Mapping[str, Tensor], file: Path, rows: int = 8, scale: int = 2) -> None:
    """Pictures side by side: a column a name, a row a scene."""
    side, label = draw.SIZE * scale, 18
    made = Image.new("RGB", (len(columns) * (side + 4), label + rows * (side + 4)), "white")
    pen = ImageDraw.Draw(made)
    for x, (name, pixels) in enumerate(columns.items()):
        pen.text((x * (side + 4) + 2, 3), name, fill="black")
        for y in range(rows):
            one = draw.to_image(pixels[y]).resize((side, side), Image.Resampling.NEAREST)
            made.paste(one, (x * (side + 4), label + y * (side + 4)))
    made.save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=400, help="that are trained on")
    parser.add_argument("--number", type=int, default=128, help="scenes that are measured")
    parser.add_argument("--precision", default="bf16" if torch.cuda.is_available() else "no")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = write_data(args.output / "data", pairs(args.pairs, "condition trained", held_out=False))
    model = loading.load(ModelOptions(str(args.model)))
    model.place(device, torch.float32, encoders=False)
    model.vae.to(device)
    bench = Bench(model, args.number)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "torch": torch.__version__,
        "diffusers": diffusers.__version__, "rank": args.rank, "steps": args.steps, "batch": args.batch,
        "pairs": args.pairs, "scenes": args.number, "runs": [],
    }  # fmt: skip
    base = bench()
    result["base"] = {name: told(values) for name, values in base.items()}
    print("base", json.dumps(result["base"]), flush=True)
    columns = {"edges": bench.new.conditions, "scene": bench.new.pictures,
               "before": bench.drawn(bench.new.text, args.number)}  # fmt: skip

    def run(adapter: str, rate: float, seed: int, whole: bool) -> dict[str, Any]:
        file, seconds = train(args, data, adapter, rate, seed)
        with adapters.attached(model, file):
            tuned = told(bench.loss(bench.tuning))
            values = bench() if whole else {}
            if whole and seed == 1:
                columns[adapter] = bench.drawn(bench.new.text, args.number)
        found = {"adapter": adapter, "rate": rate, "seed": seed, "seconds": round(seconds, 1), "tuning_loss": tuned,
                 "values": values}  # fmt: skip
        print(adapter, rate, seed, round(seconds), tuned, {k: told(v) for k, v in values.items()}, flush=True)
        return found

    for adapter in ADAPTERS:
        tried = [run(adapter, rate, 1, whole=False) for rate in args.rates]
        best = min(tried, key=lambda one: one["tuning_loss"]["share"])["rate"]
        kept = [run(adapter, best, seed + 1, whole=True) for seed in range(args.seeds)]
        means = {
            name: told(
                [statistics.mean(of_scene) for of_scene in zip(*(one["values"][name] for one in kept), strict=True)]
            )
            for name in base
        }
        for one in kept:
            one["values"] = {name: told(values) for name, values in one["values"].items()}
        result["runs"] += tried + kept
        result[adapter] = {"rate": best, **means}
        (args.output / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sheet(bench, columns, args.output / "sheet.png")


if __name__ == "__main__":
    main()
