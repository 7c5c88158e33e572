"""What is changed at random in a picture, with sd-scripts' own draws: given its generator's state, its results."""

from __future__ import annotations

import random

import cv2
import numpy as np

LARGEST_HUE_SHIFT = 8  # of the 180 that a circle has in OpenCV


def flips(randoms: random.Random) -> bool:
    """Whether a picture is mirrored."""
    return randoms.random() < 0.5


def flip(image: np.ndarray) -> np.ndarray:
    """(h, w) or (h, w, c), left and right exchanged."""
    return np.ascontiguousarray(image[:, ::-1])


def change_colours(image: np.ndarray, randoms: random.Random) -> np.ndarray:
    """(h, w, 3) uint8 with another hue or another gamma, one picture in six each.

    As in sd-scripts, OpenCV is told that red and blue are the other way round, and gamma is applied to values from 0
    to 255: a gamma of 1.05 makes a picture much brighter.
    """
    if randoms.random() > 0.33:
        return image
    if randoms.random() > 0.5:
        shift = randoms.uniform(-LARGEST_HUE_SHIFT, LARGEST_HUE_SHIFT) % 180
        hues = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        hues[:, :, 0] = (hues[:, :, 0] + shift) % 180
        return cv2.cvtColor(hues, cv2.COLOR_HSV2BGR)
    return np.clip(image ** randoms.uniform(0.95, 1.05), 0, 255).astype(np.uint8)
