"""Measures of two pictures' pixels. All take (h, w, 3) uint8 of one size."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

WINDOW, SIGMA = 11, 1.5  # of SSIM
EDGES, SIDE = (100, 200), 512  # Canny's thresholds and the shorter side, as Graph200K's canny_100_200_512


def fitted(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Scaled to cover that size and cut at the centre, as training pictures are."""
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


def ssim(first: np.ndarray, second: np.ndarray) -> float:
    """Structural similarity (Wang 2004) of values from 0 to 1, mean over places and colours.

    As torchmetrics: mirrored at the edges, where Wang leaves those places out.
    """
    x, y = (torch.from_numpy(picture).permute(2, 0, 1).double() / 255 for picture in (first, second))
    mean_x, mean_y = _blurred(x), _blurred(y)
    var_x, var_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    small1, small2 = 0.01**2, 0.03**2
    likeness = (2 * mean_x * mean_y + small1) * (2 * covariance + small2)
    return (likeness / ((mean_x**2 + mean_y**2 + small1) * (var_x + var_y + small2))).mean().item()


def _blurred(values: Tensor) -> Tensor:
    """(c, h, w), under a Gaussian window."""
    places = torch.arange(WINDOW, dtype=values.dtype) - WINDOW // 2
    weights = torch.exp(-(places**2) / (2 * SIGMA**2))
    weights /= weights.sum()
    values = functional.pad(values, [WINDOW // 2] * 4, mode="reflect")
    rows = functional.conv2d(values[:, None], weights[None, None, :, None])
    return functional.conv2d(rows, weights[None, None, None, :])[:, 0]


def rmse(first: np.ndarray, second: np.ndarray) -> float:
    """Root of the mean squared difference, in grey levels."""
    return float(np.sqrt(np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2)))


def edge_f1(first: np.ndarray, second: np.ndarray) -> float:
    """F1 of the first picture's edge pixels, the second's being the truth; 1 where neither has any."""
    found, true = _edges(first), _edges(second)
    total = found.sum() + true.sum()
    return float(2 * (found & true).sum() / total) if total else 1.0


def _edges(picture: np.ndarray) -> np.ndarray:
    """Canny's, of the picture with its shorter side at 512 pixels."""
    height, width = picture.shape[:2]
    scale = SIDE / min(height, width)
    if scale != 1:
        size = (round(width * scale), round(height * scale))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_LANCZOS4 if scale > 1 else cv2.INTER_AREA)
    return cv2.Canny(picture, *EDGES) > 0
