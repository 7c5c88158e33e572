"""A miniature of Graph200K as VisualCloze's processing.py writes it: three rows of train, two of test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PLACES = {"train": "/home/someone/train/graph/train", "test": "D:\\data\\graph\\test"}  # where it was made
NAMES = {"canny": "canny", "depth": "depth", "target": "target", "reference": "ref"}  # in data.json -> folder


def picture(seed: int, size: int = 64) -> Image.Image:
    """Random patches, another for every seed."""
    patches = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(patches).resize((size, size), Image.Resampling.NEAREST)


def make(root: Path) -> Path:
    """Paths are another machine's, as `processing.py` writes them; train's row 1 has a poor reference."""
    for split, number in (("train", 3), ("test", 2)):
        rows = [_row(root, split, index) for index in range(number)]
        if split == "train":
            rows[1]["quality_assessment"]["objectConsistency"] = 2
        (root / split / "data.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return root


def _row(root: Path, split: str, index: int) -> dict[str, Any]:
    condition: dict[str, Any] = {}
    for number, (name, folder) in enumerate(NAMES.items()):
        condition[name] = _write(root, split, folder, f"{index}_{folder}.jpg", 10 * index + number)
    condition["InstantStyle"] = {
        "image_path": [_write(root, split, "InstantStyle", f"{index}_InstantStyle_image_{i}.jpg", i) for i in range(3)],
        "style_path": [_write(root, split, "InstantStyle", f"{index}_InstantStyle_ref_{i}.jpg", i) for i in range(3)],
    }
    return {
        "quality_assessment": {"compositeStructure": 4, "objectConsistency": 4, "imageQuality": 5},
        "description": {"item": f"Thing {index}", "description_0": f"a café with {split} thing {index}."},
        "collection": "collection_1",
        "condition": condition,
    }


def _write(root: Path, split: str, folder: str, name: str, seed: int) -> str:
    file = root / split / folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    picture(seed + (100 if split == "test" else 0)).save(file, quality=95)
    slash = "\\" if "\\" in PLACES[split] else "/"
    return slash.join((PLACES[split], folder, name))
