"""Measures by networks of their own: LPIPS, depth, and quality without a reference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from benchmarks.paper.metrics.embeddings import backend_of, exact, installed, processor, reading, told_of, whole
from benchmarks.paper.metrics.pixels import rmse

Pair = Callable[[Image.Image, Image.Image], float]  # two pictures of one size
Alone = Callable[[Image.Image], float]
Told = Mapping[str, Any]


def _pixels(picture: Image.Image) -> Tensor:
    """(1, 3, h, w) float32 from 0 to 1."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


def load_lpips(file: Path, device: str) -> tuple[Pair, Told]:
    """LPIPS with AlexNet, version 0.1, of pictures from -1 to 1.

    :param file: AlexNet's weights, torchvision's; those of the layers above come with the package
    :raises DeftError: where they cannot be read
    """
    lpips = installed("lpips")
    with reading("alexnet", file):
        model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
        weights = torch.load(file, map_location="cpu", weights_only=True)
        for piece in (model.net.slice1, model.net.slice2, model.net.slice3, model.net.slice4, model.net.slice5):
            piece.load_state_dict({key: weights[f"features.{key}"] for key in piece.state_dict()})
    model = model.to(device)

    def distance(first: Image.Image, second: Image.Image) -> float:
        with exact():
            pictures = (_pixels(picture).to(device) * 2 - 1 for picture in (first, second))
            return model(*pictures).item()

    return distance, told_of(file, library=f"lpips {metadata.version('lpips')}")


def load_depth(folder: Path, device: str) -> tuple[Pair, Told]:
    """RMSE of two pictures' depth maps, each from its least value at 0 to its greatest at 255.

    :param folder: a depth estimator of transformers
    :raises DeftError: where it cannot be read
    """
    with reading("depth_model", folder):
        model = whole(transformers.AutoModelForDepthEstimation, folder).to(device)
        prepares = processor(folder)

    def depth(picture: Image.Image) -> np.ndarray:
        with exact():
            out = model(prepares(images=picture, return_tensors="pt")["pixel_values"].to(device))
            size = (picture.height, picture.width)
            found = prepares.post_process_depth_estimation(out, target_sizes=[size])[0]["predicted_depth"]
        values = found.double().cpu().numpy()
        values = values - values.min()
        return values * (255 / values.max()) if values.max() > 0 else values

    return lambda first, second: rmse(depth(first), depth(second)), told_of(folder, processor=backend_of(prepares))


def load_quality(name: str, file: Path, device: str) -> tuple[Alone, Told]:
    """MUSIQ or MANIQA as pyiqa has them, trained on KonIQ-10k.

    :param name: "musiq" or "maniqa"
    :raises DeftError: where the weights cannot be read
    """
    pyiqa = installed("pyiqa")
    with reading(name, file), _no_backbone():
        # pyiqa would unpickle whatever its file holds; the names of weights of parallel training have a prefix
        model = pyiqa.create_metric(name, device=torch.device(device), pretrained=False)
        weights = torch.load(file, map_location="cpu", weights_only=True)
        weights = weights.get("params", weights)
        model.net.load_state_dict({key.removeprefix("module."): value for key, value in weights.items()})

    def quality(picture: Image.Image) -> float:
        with exact():
            return model(_pixels(picture)).item()

    return quality, told_of(file, library=f"pyiqa {pyiqa.__version__}")


@contextlib.contextmanager
def _no_backbone() -> Iterator[None]:
    """MANIQA has timm fetch a backbone, whose weights MANIQA's own file then replaces."""
    import timm

    made_by = timm.create_model
    with mock.patch.object(timm, "create_model", lambda name, **given: made_by(name, **{**given, "pretrained": False})):
        yield
