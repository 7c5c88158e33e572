"""DreamBooth's layout in small: google/dreambooth's `dataset/` with other prompts, few subjects and small pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import dreambooth

SUBJECTS = {"can": "can", "dog": "dog", "vase": "vase"}  # the first serves to choose rates
PICTURES = 2
HEAD = "Classes\n\nsubject_name,class\n{}\n\nPrompts\n\nObject Prompts\n\nprompt_list = [\n{}\n]\n\n"
REST = "Live Subject Prompts\n\nprompt_list = [\n{}\n]\n"


def build(folder: Path, subjects: dict[str, str] = SUBJECTS) -> Path:
    """Writes it, the same every time."""
    rng = np.random.default_rng(0)
    for name in subjects:
        (folder / name).mkdir(parents=True)
        for i in range(PICTURES):
            pixels = rng.integers(0, 256, (72, 72, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:02d}.jpg")
    lists = (
        ",\n".join(f"'a {{0}} {{1}} {kind} {i}'.format(unique_token, class_token)" for i in range(25))
        for kind in ("at", "wearing")
    )
    classes = "\n".join(f"{name},{kind}" for name, kind in subjects.items())
    text = HEAD.format(classes, next(lists)) + REST.format(next(lists))
    (folder / "prompts_and_classes.txt").write_text(text, encoding="utf-8")
    (folder / "references_and_licenses.txt").write_text("of nobody\n", encoding="utf-8")
    return folder


def run(folder: Path, model: Path, judges: dict[str, Path], output: Path, *options: str) -> int:
    """`benchmarks/dreambooth.py` in this process, as small as it can be."""
    argv = ["--data", folder, "--model", model, "--output", output, "--size", 64, "--steps", 2, "--drawing_steps", 1,
            "--limit_prompts", 1, "--images_per_prompt", 1, "--device", "cpu", *options]  # fmt: skip
    for name in ("clip", "dino"):
        argv += [f"--{name}", judges[name]]
    return dreambooth.main([str(one) for one in argv])
