"""A miniature of InsDet's tree: two objects of six views, one scene of four frames; odd names, a mask missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

VIEW, BOX = (48, 40), (10, 8, 30, 24)  # width and height; what the masks show


def picture(seed: int, size: tuple[int, int] = VIEW) -> Image.Image:
    """Noise, another for every seed."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def mask() -> Image.Image:
    pixels = np.zeros((VIEW[1], VIEW[0]), np.uint8)
    pixels[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 255
    return Image.fromarray(pixels)


def make(root: Path) -> Path:
    """As InsDet-mini unpacks, with an upper-case file, a PNG among JPEGs, and no mask of 000's third view."""
    for number, name in enumerate(("000_aveda_shampoo", "001_binder_clips_median")):
        images, masks = (root / "Objects" / name / kind for kind in ("images", "masks"))
        images.mkdir(parents=True)
        masks.mkdir()
        for view in range(6):
            file = f"{view + 1:03}.{'png' if view == 4 else 'JPG' if view == 1 else 'jpg'}"
            picture(10 * number + view).save(images / file, format="PNG" if view == 4 else "JPEG", quality=95)
            if (number, view) != (0, 2):
                mask().save(masks / f"{view + 1:03}.png")
    scene = root / "Scenes" / "easy" / "leisure_zone_001"
    scene.mkdir(parents=True)
    for frame in range(4):
        picture(100 + frame, (60, 80)).save(scene / f"rgb_{frame:03}.jpg", quality=95)
        (scene / f"rgb_{frame:03}.xml").write_text("<annotation><object/></annotation>")
    (root / "Background").mkdir()
    return root
