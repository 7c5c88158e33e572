"""kohya's image folders: `REPEATS_NAME/` with images and captions beside them."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from networks.deft_config import DeftError

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class TrainImage:
    """One readable image: its file, caption, repeats, and its folder's name."""

    path: Path
    caption: str
    repeats: int
    folder: str


def find_images(train_data_dir: str, caption_extension: str) -> list[TrainImage]:
    """All images of a kohya image folder, in the order of their names.

    :raises DeftError: when there is no such folder or no image in it, or a caption is empty
    """
    root = Path(train_data_dir)
    if not root.is_dir():
        raise DeftError(f"--train_data_dir: no such folder: {root}")
    images: list[TrainImage] = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        match = re.fullmatch(r"(\d+)_(.*)", folder.name)
        if not match or int(match[1]) == 0:
            logger.warning(f"{folder}: left out, its name does not begin with a number of repeats, as in 10_sks cat")
            continue
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in IMAGE_EXTENSIONS:
                caption = _caption(path, caption_extension, match[2])
                images.append(TrainImage(path, caption, int(match[1]), folder.name))
    if not images:
        raise DeftError(f"--train_data_dir {root}: no images; they belong into folders named as in {root}/10_sks cat/")
    return images


def _caption(image: Path, extension: str, folder_prompt: str) -> str:
    """The text beside the image, or else the folder's name."""
    path = image.with_suffix(extension)
    if not path.is_file():
        if not folder_prompt.strip():
            raise DeftError(f"{image}: no caption {path.name}, and its folder's name has no prompt behind the number")
        return folder_prompt.strip()
    try:
        lines = path.read_text(encoding="utf-8-sig").strip().splitlines()
    except UnicodeDecodeError:
        raise DeftError(f"{path}: the caption is not UTF-8 text") from None
    if not lines:
        raise DeftError(f"{path}: the caption is empty; write one, or delete the file to use the folder's name")
    return lines[0].strip()


def load_image(path: Path, size: tuple[int, int]) -> Tensor:
    """An image scaled and center-cropped to (width, height), as (3, height, width) in [-1, 1].

    :raises OSError: when the file is cut off or is no image
    """
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image).convert("RGB")
        image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32).copy())
    return pixels.permute(2, 0, 1) / 127.5 - 1


class CachedLatents(Dataset):
    """Every image as latents kept in memory, `repeats` times an epoch. Items are (latents (c, h, w), caption).

    :param encode: pixels (1, 3, height, width) to latents (1, c, h, w)
    :raises DeftError: when none of the images can be read; single ones are named and left out
    """

    def __init__(self, images: list[TrainImage], size: tuple[int, int], encode: Callable[[Tensor], Tensor]):
        self.images: list[TrainImage] = []
        self.latents: list[Tensor] = []
        for image in images:
            try:
                pixels = load_image(image.path, size)
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all of them Pillow's
                logger.warning(f"{image.path}: left out, it cannot be read ({error})")
                continue
            self.images.append(image)
            self.latents.append(encode(pixels[None])[0].float().cpu())
        if not self.images:
            raise DeftError(f"none of the {len(images)} images can be read, {images[0].path} for one")
        self.order = [i for i, image in enumerate(self.images) for _ in range(image.repeats)]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        i = self.order[index]
        return self.latents[i], self.images[i].caption

    def folder_counts(self) -> dict[str, dict[str, int]]:
        """Folder -> {"n_repeats", "img_count"}, as sd-scripts writes it into a file's metadata."""
        counts = Counter(image.folder for image in self.images)
        repeats = {image.folder: image.repeats for image in self.images}
        return {folder: {"n_repeats": repeats[folder], "img_count": n} for folder, n in counts.items()}

    def tag_frequency(self) -> dict[str, dict[str, int]]:
        """Folder -> tag -> number of captions with it, tags being separated by commas."""
        frequency: dict[str, Counter[str]] = {}
        for image in self.images:
            tags = (tag.strip() for tag in image.caption.split(","))
            frequency.setdefault(image.folder, Counter()).update(tag for tag in tags if tag)
        return {folder: dict(tags) for folder, tags in frequency.items()}
