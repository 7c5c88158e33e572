"""The quickstart's claim, on more pictures: `python benchmarks/quickstart.py [--pictures 500] [--device cuda]`.

Trains the quickstart's configuration from five seeds. Draws, without and with each adapter, the same prompts from the
same noise: pictures of the creature, and as many of single things of the model's own world. Writes quickstart.json
beside this file. Further options go to the trainer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import diffusers
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from library.quickstart import CONFIGS, CREATURE  # noqa: E402
from library.world import concepts, judge, measure  # noqa: E402

CONFIG = CONFIGS / "creature.toml"


def train(seed: int, folder: Path, overrides: list[str]) -> Path:
    """The quickstart's training from another seed; returns the adapter."""
    command = [sys.executable, "train_network_deft.py", "--config_file", str(CONFIG), "--seed", str(seed)]
    command += ["--output_dir", str(folder), "--output_name", f"seed{seed}", "--logging_dir", str(folder / "logs")]
    subprocess.run([*command, *overrides], cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    return folder / f"seed{seed}.safetensors"


def draw(pipeline, likeness: measure.Likeness, number: int, first: int) -> dict[str, list[float]]:
    """What the judge says of `number` pictures of the creature and as many of the old world."""
    prompts = measure.concept_prompts("sks", number)
    values = {"likeness": likeness(measure.draw(pipeline, prompts, range(first, first + number)))}
    known = measure.known_scenes(number, seed=first)
    return values | {
        name: [float(v) for v in right] for name, right in measure.agreements(likeness.judge, pipeline, known).items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=500, help="a side, over all seeds")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    args, overrides = parser.parse_known_args()
    likeness = measure.Likeness(judge.load(), concepts.creature(CREATURE))
    number = args.pictures // args.seeds
    sides: list[dict[str, list[float]]] = [{}, {}]
    per_seed = []
    for seed in range(args.seeds):
        pipeline = measure.load(measure.MODEL, args.device)
        values = [draw(pipeline, likeness, number, seed * number)]
        with tempfile.TemporaryDirectory() as folder:
            lora = train(seed, Path(folder), overrides)
            pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
        values.append(draw(pipeline, likeness, number, seed * number))
        for side, new in zip(sides, values, strict=True):
            for name, seen in new.items():
                side.setdefault(name, []).extend(seen)
        per_seed.append({name: [measure.share(side[name])["share"] for side in values] for name in values[0]})
        print(f"seed {seed}: {per_seed[-1]}", flush=True)
    before, after = sides
    print(f"render not trained on: likeness {likeness.of_renders:.3f}")
    for name in before:
        print(f"{name:12s} {measure.change(before[name], after[name])}")
    means = [measure.share(side["likeness"])["share"] for side in sides]
    way = (means[1] - means[0]) / (likeness.of_renders - means[0])
    print(f"the creature: {way:.2f} of the way from the base model to a render")
    result = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "pictures a side": number * args.seeds,
        "likeness of renders": likeness.of_renders,
        "way": way,
        "before": {name: measure.share(values) for name, values in before.items()},
        "after": {name: measure.share(values) for name, values in after.items()},
        "change": {
            name: measure.share([b - a for a, b in zip(before[name], after[name], strict=True)]) for name in before
        },
        "seeds": per_seed,
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
