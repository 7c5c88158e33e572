"""Every picture as latents, encoded once and kept in memory."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from library.data.folders import Remarks, TrainImage
from library.data.pixels import WHITE, Colour, read_picture
from networks.deft_config import DeftError, reason_of
from networks.deft_progress import progress

logger = logging.getLogger(__name__)


class Batch(NamedTuple):
    """What a step is made of, b pictures; or one, without the first dimension.

    :param latents: (b, c, h, w), float32
    :param sizes: (b, 6) in pixels: height and width of the file, top and left of the crop in the scaled picture, height
        and width of what is left
    """

    latents: Tensor
    captions: list[str]
    sizes: Tensor


def sizes_of(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """`Batch.sizes` (6,) of a picture that `pixels_of` scales and crops to (width, height)."""
    scale = max(size[0] / image.width, size[1] / image.height)
    left, top = ((round(side * scale) - kept) // 2 for side, kept in zip(image.size, size, strict=True))
    return torch.tensor([image.height, image.width, top, left, size[1], size[0]], dtype=torch.float32)


def pixels_of(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """An RGB image scaled and center-cropped to (width, height), as (3, height, width) in [-1, 1]."""
    fitted = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


class CachedLatents(Dataset):
    """Every image as latents kept in memory, `repeats` times an epoch. Items are `Batch`es of one.

    :param size: (width, height) that all are scaled and cropped to
    :param encode: pixels (1, 3, height, width) to latents (1, c, h, w)
    :param background: behind transparent pictures
    :raises DeftError: when none of the images can be read; single ones are named and left out
    """

    def __init__(
        self,
        images: list[TrainImage],
        size: tuple[int, int],
        encode: Callable[[Tensor], Tensor],
        background: Colour = WHITE,
    ):
        self.images: list[TrainImage] = []
        self.latents: list[Tensor] = []
        self.sizes: list[Tensor] = []
        remarks = Remarks()
        for image in progress(images, "caching latents"):
            try:
                picture = read_picture(image.path, background)
                pixels = pixels_of(picture.image, size)
            except Exception as error:  # whatever Pillow raises for a file costs that file at most
                logger.warning(f"{image.path}: left out, it cannot be read ({reason_of(error)})")
                continue
            if picture.transparent:
                remarks.add("{n} transparent picture{s} ({one}) on --transparent_background", image.path)
            if picture.frames > 1:
                remarks.add("{n} picture{s} of several frames ({one}): only the first is used", image.path)
            self.images.append(image)
            self.sizes.append(sizes_of(picture.image, size))
            self.latents.append(encode(pixels[None])[0].float().cpu())
        for line in remarks.lines():
            logger.warning(line)
        if not self.images:
            raise DeftError(f"none of the {len(images)} images can be read, {images[0].path} for one")
        self.order = [i for i, image in enumerate(self.images) for _ in range(image.repeats)]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Batch:
        i = self.order[index]
        return Batch(self.latents[i], self.images[i].caption, self.sizes[i])  # type: ignore[arg-type]

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
