"""The README's first command: sets everything up, trains on five pictures, and shows what came out.

`python -m library.quickstart` makes `.venv`, then runs itself in it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from library.bootstrap import ROOT, ensure_environment, run_environment

CONFIG = Path("configs/quickstart/photos.toml")
PROMPTS = Path("configs/quickstart/prompts.txt")


def main() -> int:
    """Outside of `.venv`, enters it; inside, runs everything."""
    python = ensure_environment(ROOT / "requirements.txt")
    if Path(sys.prefix).resolve() != python.parent.parent.resolve():
        return subprocess.run([python, "-m", "library.quickstart"], cwd=ROOT, env=run_environment()).returncode
    return run()


def run() -> int:
    """Builds the model, trains, loads the file through diffusers, draws before and after, prints the table."""
    import toml

    from library import tiny_model

    start = time.time()
    settings = {key: value for section in toml.load(CONFIG).values() for key, value in section.items()}
    output, model = Path(settings["output_dir"]), Path(settings["pretrained_model_name_or_path"])
    output.mkdir(parents=True, exist_ok=True)
    if not (model / "model_index.json").is_file():
        print(f"building a small untrained model in {model}", flush=True)
        tiny_model.build(model)
    log = output / "train.log"
    if train(log):
        print(f"training failed, see {log}", file=sys.stderr)
        return 1
    lora = output / f"{settings['output_name']}.safetensors"
    picture = output / "before_and_after.png"
    trainers_own = {path.name.rsplit("_", 3)[1]: path for path in sorted((output / "sample").glob("*_000120_*.png"))}
    rows = check_in_diffusers(model, lora, list(trainers_own.values()), picture)
    rows += [("adapter", lora), ("pictures", picture), ("log", log)]
    rows.append(("time", f"{time.time() - start:.0f} s"))
    print()
    for name, value in rows:
        print(f"{name:20s} {value}")
    return 0


def train(log: Path) -> int:
    """Runs the trainer as a user would, its output shown and kept; returns its exit code."""
    command = [sys.executable, "train_network_deft.py", "--config_file", str(CONFIG)]
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


def check_in_diffusers(model: Path, lora: Path, trainers_own: list[Path], picture: Path) -> list[tuple[str, object]]:
    """Loads the file into a fresh diffusers pipeline; compares every layer's delta with ours, and its pictures with
    those that the trainer drew with its own network at the last step.

    :returns: rows of the closing table
    """
    import numpy as np
    import torch
    from PIL import Image

    from library import sampling, sd
    from networks import deft
    from networks.deft_module import DeftModule

    loaded = sd.load(str(model))
    pipeline = loaded.pipeline
    prompts = sampling.read_prompts(str(PROMPTS), (128, 128))
    network, _ = deft.create_network_from_weights(1.0, str(lora), None, loaded.text_encoder, loaded.unet)
    network.apply_to(loaded.text_encoder, loaded.unet)
    network.load_weights(str(lora))
    network.remove()
    before = sampling.draw(pipeline, prompts)
    pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
    after = sampling.draw(pipeline, prompts)

    by_layer: dict[object, DeftModule] = {m.org_module: m for m in network.all_modules}
    errors = []
    for part in (pipeline.unet, pipeline.text_encoder):
        for layer in part.modules():
            ours = by_layer.get(getattr(layer, "base_layer", None))
            if ours is not None:
                with torch.no_grad():
                    up, down = ours.lora_factors()
                    delta, theirs = up @ down, layer.get_delta_weight(layer.active_adapters[0]).flatten(1)
                errors.append(float((theirs - delta).norm() / delta.norm().clamp(min=1e-12)))
    sampling.grid([prompt.text for prompt in prompts], {"before": before, "after": after}).save(picture)
    pairs = [(Image.open(path), drawn) for path, drawn in zip(trainers_own, after, strict=True)]
    difference = max(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max() for a, b in pairs)
    parameters = sum(p.numel() for p in network.parameters())
    return [
        ("modules adapted", len(network.all_modules)),
        ("parameters trained", f"{parameters:,}"),
        ("file size", f"{lora.stat().st_size / 2**20:.2f} MiB"),
        (
            "loads in diffusers:",
            f"{len(errors)} of {len(network.all_modules)} modules, largest relative error {max(errors):.1e}",
        ),
        ("draws in diffusers:", f"what the trainer's own network draws, largest difference {difference} of 255"),
    ]


if __name__ == "__main__":
    sys.exit(main())
