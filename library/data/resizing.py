"""How a picture is scaled and what is cut out of it, and the sizes that SDXL is told: sd-scripts' pixels.

Facts of kohya-ss/sd-scripts at 48d368fa and v0.11.1; docs/data.md says where this differs.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from library.data.augment import flip
from library.data.buckets import Buckets, Size
from library.options.rooms import AugmentOptions
from networks.deft_config import DeftError, nearest

PILLOW = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}
OPENCV = {
    "area": cv2.INTER_AREA,
    "bilinear": cv2.INTER_LINEAR,
    "linear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
    "cubic": cv2.INTER_CUBIC,
}
NEAREST = "nearest"
INPUT_STEPS = 16  # pixels: a side of what OmniGen reads as one position


def resize(image: np.ndarray, size: Size, interpolation: str | None = None) -> np.ndarray:
    """(h, w) or (h, w, c) uint8 scaled to (width, height).

    :param interpolation: --resize_interpolation; None is area where neither side grows, else lanczos
    :raises DeftError: for another name
    """
    height, width = image.shape[:2]
    if (width, height) == size:
        return image
    if interpolation is None:
        interpolation = "area" if width >= size[0] and height >= size[1] else "lanczos"
    check_interpolation(interpolation)
    if interpolation == NEAREST:
        return image[_nearest(height, size[1])][:, _nearest(width, size[0])]
    if interpolation in PILLOW:
        return np.asarray(Image.fromarray(image).resize(size, PILLOW[interpolation]))
    return cv2.resize(image, size, interpolation=OPENCV[interpolation])


def check_interpolation(name: str) -> None:
    """:raises DeftError: for what is no value of --resize_interpolation"""
    known = sorted({*PILLOW, *OPENCV, NEAREST})
    if name not in known:
        raise DeftError(f"--resize_interpolation {name}: allowed are {', '.join(known)}{nearest(name, known)}")


def _nearest(length: int, size: int) -> np.ndarray:
    """The place of each new pixel among the old ones, as INTER_NEAREST_EXACT of the OpenCV that sd-scripts pins (4.10)
    rounds it; OpenCV 5 rounds otherwise."""
    step = ((length << 16) + size // 2) // size
    return np.minimum((step * np.arange(size) + step // 2 - length % 2) >> 16, length - 1)


def in_tensor(image: np.ndarray) -> Tensor:
    """(h, w, 3) uint8 as (3, h, w) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255).sub(0.5).div(0.5)


@dataclass(frozen=True)
class Crop:
    """What is done with a picture and its mask alike.

    :param original: size of the file's picture
    :param resized: what it is scaled to
    :param place: left and top of what is cut out of that
    :param size: of what is cut out
    :param told_of_file: whether SDXL is told the file's size and the margins of its aspect ratio in the bucket, or only
        what was cut out: sd-scripts tells the latter of random and face crops without buckets
    """

    original: Size
    resized: Size
    place: tuple[int, int]
    size: Size
    told_of_file: bool = True

    def of(self, image: np.ndarray, interpolation: str | None = None, flipped: bool = False) -> np.ndarray:
        """(h, w) or (h, w, c) uint8, of the file's aspect ratio; what is cut out of it."""
        (left, top), (width, height) = self.place, self.size
        cut = resize(image, self.resized, interpolation)[top : top + height, left : left + width]
        return flip(cut) if flipped else np.ascontiguousarray(cut)

    def conditioning(self, flipped: bool = False) -> tuple[int, int, int, int, int, int]:
        """Original height and width, top and left of the crop, target height and width, as sd-scripts tells SDXL.

        Top and left are those of the picture laid into the bucket as a whole, margins around it, wherever it was cut.
        """
        width, height = self.size
        original, left, top, right = self.original, 0.0, 0.0, 0.0
        if self.told_of_file:
            aspect = original[0] / original[1]
            wider = width / height > aspect  # the bucket
            within = (height * aspect, height) if wider else (width, width / aspect)
            left, top = (width - within[0]) // 2, (height - within[1]) // 2
            right = left + within[0]
        else:
            original = self.size
        left = width - right if flipped else left
        return original[1], original[0], int(top), int(left), height, width


@dataclass(frozen=True)
class Face:
    """Where a face is in a picture, in pixels: its middle and its size."""

    x: int
    y: int
    width: int
    height: int


def face_of(path: str | Path) -> Face | None:
    """The face that a file's name gives, as in `name_X_Y_WIDTH_HEIGHT.png`."""
    parts = Path(path).stem.split("_")
    if len(parts) < 5:
        return None
    try:
        face = Face(*map(int, parts[-4:]))
    except ValueError:
        return None
    return face if face.x > 0 and max(face.width, face.height) > 0 else None


def crop_of(
    size: Size, buckets: Buckets, augment: AugmentOptions, randoms: random.Random, face: Face | None = None
) -> Crop:
    """The crop of a picture of that size.

    Faces count without buckets alone. A picture without buckets that is too large is scaled to cover the resolution,
    unless it is cropped at random; one that is too small is so in any case.

    :param randoms: what random crops are drawn from; others draw nothing
    :raises DeftError: as `Buckets.fit`
    """
    fit = buckets.fit(*size)
    if not buckets.options.enable_bucket and min(size[0] - fit.bucket[0], size[1] - fit.bucket[1]) >= 0:
        if face is not None and augment.face_crop_aug_range is not None and size != fit.bucket:
            return face_crop(size, fit.bucket, face, augment.face_crop_aug_range, augment.random_crop, randoms)
        if augment.random_crop:
            top = _drawn(size[1] - fit.bucket[1], randoms)
            return Crop(size, size, (_drawn(size[0] - fit.bucket[0], randoms), top), fit.bucket, told_of_file=False)
    if augment.random_crop:
        return random_crop(size, fit.resized, fit.bucket, randoms)
    return center_crop(size, fit.resized, fit.bucket)


def center_crop(original: Size, resized: Size, bucket: Size) -> Crop:
    """The middle of what is scaled to cover the bucket."""
    place = (resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2
    return Crop(original, resized, place, bucket)


def input_crop(size: Size, most: int) -> Crop:
    """Of an input picture alone, in the sizes of OmniGen's own training (`crop_arr` of its utils.py): as large as it
    is, but at most so long, and cut in the middle to whole steps.

    :param most: --max_input_image_size
    :raises DeftError: when it is too elongated for that
    """
    width, height = size
    while min(width, height) >= 2 * most:
        width, height = width // 2, height // 2
    if max(width, height) > most:
        width, height = _scaled((width, height), most / max(width, height))
    if min(width, height) < INPUT_STEPS:
        width, height = _scaled((width, height), INPUT_STEPS / min(width, height))
    left, top = width % INPUT_STEPS, height % INPUT_STEPS
    if max(width - left, height - top) > most:
        raise DeftError(f"an input picture of {size[0]}x{size[1]} is too elongated for --max_input_image_size {most}")
    return Crop(size, (width, height), (left // 2, top // 2), (width - left, height - top))


def _scaled(size: Size, scale: float) -> Size:
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def random_crop(original: Size, resized: Size, bucket: Size, randoms: random.Random) -> Crop:
    """Anywhere in what is scaled to cover the bucket."""
    left = _drawn(resized[0] - bucket[0], randoms)
    return Crop(original, resized, (left, _drawn(resized[1] - bucket[1], randoms)), bucket)


def _drawn(most: int, randoms: random.Random) -> int:
    return randoms.randint(0, most) if most else 0


def face_crop(
    original: Size, size: Size, face: Face, sizes: tuple[float, float], anywhere: bool, randoms: random.Random
) -> Crop:
    """The face in the middle, as far as the picture reaches.

    :param size: of what is cut out, nowhere larger than the picture
    :param sizes: --face_crop_aug_range: least and most of the shorter side's length in lengths of the face
    :param anywhere: --random_crop: the face is rather off the middle
    """
    largest, side = max(face.width, face.height), min(size)
    least = max(size[0] / original[0], size[1] / original[1])
    least = min(1.0, max(least, side / (largest * sizes[1])))
    most = min(1.0, max(least, side / (largest * sizes[0])))
    scale = least if least >= most else randoms.uniform(least, most)
    resized = int(original[0] * scale + 0.5), int(original[1] * scale + 0.5)
    shift = largest // 20 if sizes[0] != sizes[1] and largest > side // 10 and largest >= 40 else 0
    places = []
    for target, length, middle in zip(size[::-1], resized[::-1], (face.y, face.x), strict=True):
        middle = int(middle * scale + 0.5)
        place = middle - target // 2
        if anywhere:
            reach = max(length - middle, middle)
            place += randoms.randint(0, reach) + randoms.randint(0, reach) - reach
        elif shift:
            place += randoms.randint(-largest // 20, shift)
        places.append(max(0, min(place, length - target)))
    top, left = places
    return Crop(original, resized, (left, top), size, told_of_file=False)
