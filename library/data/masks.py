"""Where a picture is trained on: masks in files of their own, or the picture's transparency."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from library.data.buckets import Size
from library.data.pixels import Picture, read_picture, readable_formats
from networks.deft_config import DeftError, reason_of

logger = logging.getLogger(__name__)

BLACK = (0, 0, 0)


def find_masks(conditioning_data_dir: str | Path, images: Sequence[Path]) -> list[Path]:
    """The mask of every picture: the file of its name, whatever the extension; what is left over is told.

    :raises DeftError: when there is no such folder, or a picture has no mask
    """
    folder = Path(conditioning_data_dir)
    if not folder.is_dir():
        raise DeftError(f"--conditioning_data_dir: no such folder: {folder}")
    formats = readable_formats()
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in formats and path.is_file())
    by_name = {path.stem.lower(): path for path in reversed(files)}  # as Windows and macOS find them
    by_name |= {path.stem: path for path in reversed(files)}
    masks = [by_name.get(image.stem) or by_name.get(image.stem.lower()) for image in images]
    missing = [image.name for image, mask in zip(images, masks, strict=True) if mask is None]
    if missing:
        raise DeftError(
            f"--conditioning_data_dir {folder}: no mask for {_some(missing)}; add pictures of the same name, white "
            "where it is to be trained on"
        )
    unused = [path.name for path in files if path.stem.lower() not in {image.stem.lower() for image in images}]
    if unused:
        logger.warning(f"--conditioning_data_dir {folder}: no picture for {_some(unused)}")
    return [mask for mask in masks if mask is not None]


def _some(names: Sequence[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


def read_mask(path: Path, picture: Size) -> np.ndarray:
    """(h, w) uint8, 255 where it is trained on: the red channel, upright, black where the file is transparent.

    :param picture: the picture's size, whose aspect ratio the mask has to have; `Crop.of` brings it to its size
    :raises DeftError: when it has another, or cannot be read
    """
    try:
        mask = np.asarray(read_picture(path, BLACK).image)[:, :, 0]
    except Exception as error:  # whatever Pillow raises
        raise DeftError(f"{path}: the mask cannot be read ({reason_of(error)})") from None
    check_size(path, (mask.shape[1], mask.shape[0]), picture)
    return mask


def check_size(path: Path, mask: Size, picture: Size) -> None:
    """:raises DeftError: when a mask's aspect ratio is not the picture's, but for a pixel"""
    if abs(mask[0] * picture[1] - picture[0] * mask[1]) > max(*mask, *picture) / 2 * (mask != picture):
        raise DeftError(
            f"{path}: the mask has {mask[0]}x{mask[1]} pixels, its picture {picture[0]}x{picture[1]}; give it the "
            "same size, or the same proportions"
        )


def alpha_mask(picture: Picture) -> np.ndarray:
    """(h, w) uint8 as `read_mask` gives: the picture's opacity, 255 everywhere where it has none."""
    if picture.alpha is not None:
        return picture.alpha
    return np.full(picture.image.size[::-1], 255, np.uint8)


def in_latents(mask: np.ndarray, size: tuple[int, int]) -> Tensor:
    """(h, w) uint8 as what multiplies the loss: (1, height, width) float32 from 0 to 1, the mean of what each covers.

    :param size: height and width of the latents
    """
    values = torch.from_numpy(np.array(mask)).float().div(255)
    return torch.nn.functional.interpolate(values[None, None], size, mode="area")[0]


def stacked(masks: Iterable[Tensor | None], size: tuple[int, int]) -> Tensor | None:
    """(b, 1, height, width) of a batch's masks, 1 for pictures without; None when none has one."""
    found = list(masks)
    one = next((mask for mask in found if mask is not None), None)
    if one is None:
        return None
    return torch.stack([one.new_ones(1, *size) if mask is None else mask for mask in found])
