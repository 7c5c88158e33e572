"""Models that turn pictures, or texts, into vectors, each read from a local folder or file. Scores are of float32."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn import functional

from benchmarks.paper.metrics.cache import digest_of
from benchmarks.paper.metrics.table import MODELS, files_of
from networks.deft_config import DeftError, reason_of

TOKENS = 77  # of CLIP's text encoder
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


@dataclass(frozen=True)
class Texts:
    """How a model reads texts.

    :param embed: texts -> (b, d) float32
    :param cut: those of some texts of which it reads the beginning alone
    """

    embed: Callable[[Sequence[str]], Tensor]
    cut: Callable[[Sequence[str]], list[str]]


@dataclass(frozen=True)
class Embedder:
    """A model that embeds.

    :param prepare: a picture as the model takes it, (c, h, w)
    :param embed: (b, c, h, w) -> (b, d) float32
    :param identity: of what decides an embedding: weights, settings, how pictures are prepared
    :param told: what results say of it
    :param texts: where the model reads texts too
    """

    prepare: Callable[[Image.Image], Tensor]
    embed: Callable[[Tensor], Tensor]
    identity: str
    told: Mapping[str, Any]
    texts: Texts | None = None


def load(option: str, path: Path, device: str) -> Embedder:
    """The model of that option of `MODELS`.

    :raises DeftError: where it cannot be read
    """
    transformers.logging.disable_progress_bar()
    with reading(option, path):
        return LOADERS[option](path, device)


@contextlib.contextmanager
def reading(option: str, path: Path) -> Iterator[None]:
    """What goes wrong inside becomes a user's error that names the option and where its model is published."""
    try:
        yield
    except DeftError:
        raise
    except Exception as error:  # transformers' and torch's are of many kinds
        source = MODELS[option].source
        told = f"it cannot be read as {source.what} ({reason_of(error)}); {source.published}"
        raise DeftError(f"--{option} {path}: {told}") from error


def installed(module: str) -> Any:
    """An optional library's module.

    :raises DeftError: where it cannot be imported
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # libraries built for another torch fail in many ways
        package = module.partition(".")[0].replace("_", "-")
        raise DeftError(f"{package} cannot be imported ({reason_of(error)}): pip install {package}") from error


def whole(kind: Any, folder: Path, **options: Any) -> Any:
    """A model of transformers in float32, in evaluation, all of whose weights are in the folder.

    :raises ValueError: where some are not: transformers would draw them at random
    """
    given = {"dtype": torch.float32, "local_files_only": True, "output_loading_info": True} | options
    model, loaded = kind.from_pretrained(str(folder), **given)
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(f"it lacks {missing[0]}")
    return model.eval().requires_grad_(False)


def processor(folder: Path) -> Any:
    """The folder's image processor; Pillow's, where there is one: the published figures were made with that."""
    return transformers.AutoImageProcessor.from_pretrained(str(folder), backend="pil", local_files_only=True)


def backend_of(prepares: Any) -> str:
    """By which library an image processor scales."""
    return "pil" if type(prepares).__name__.endswith("Pil") else "torchvision"


def told_of(path: Path, **more: Any) -> dict[str, Any]:
    """What results say of a model: hashes of its weights and its processor's settings, no path."""
    return {"sha256": {file.name: digest_of(file) for file in files_of(path)}} | more


def _identity(told: Mapping[str, Any]) -> str:
    return hashlib.sha256(repr(sorted(told.items())).encode()).hexdigest()


# --- CLIP ------------------------------------------------------------------------------------------------------------


def _clip(folder: Path, device: str) -> Embedder:
    model = whole(transformers.CLIPModel, folder).to(device)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    prepares = processor(folder)
    length = min(TOKENS, model.config.text_config.max_position_embeddings)

    def read(lines: Sequence[str]) -> Tensor:
        tokens = tokenizer(list(lines), padding=True, truncation=True, max_length=length, return_tensors="pt").to(
            device
        )
        return _projected(model.get_text_features(tokens["input_ids"], tokens["attention_mask"]))

    told = told_of(folder, processor=backend_of(prepares))
    return Embedder(
        lambda picture: _prepared(prepares, picture),
        lambda pixels: _projected(model.get_image_features(pixels)),
        _identity(told),
        told,
        Texts(
            read, lambda lines: [line for line in lines if len(tokenizer(line, verbose=False)["input_ids"]) > length]
        ),
    )


def _prepared(prepares: Any, picture: Image.Image) -> Tensor:
    return prepares(images=picture, return_tensors="pt")["pixel_values"][0]


def _projected(features: Any) -> Tensor:
    """transformers 5 returns the embedding in an output of its own, 4 by itself."""
    return features if isinstance(features, Tensor) else features.pooler_output


# --- DINO ------------------------------------------------------------------------------------------------------------


def _vit(folder: Path, device: str) -> Embedder:
    model = whole(transformers.ViTModel, folder, add_pooling_layer=False).to(device)
    prepares = processor(folder)
    return _first_token(model, lambda picture: _prepared(prepares, picture), folder, backend_of(prepares))


def _dinov2(folder: Path, device: str) -> Embedder:
    model = whole(transformers.Dinov2Model, folder).to(device)
    prepares = processor(folder)
    return _first_token(model, lambda picture: _prepared(prepares, picture), folder, backend_of(prepares))


def _dino_vits8(folder: Path, device: str) -> Embedder:
    """As the authors' own code runs it; their port in transformers differs in this number and in what it prepares."""
    config = transformers.ViTConfig.from_pretrained(str(folder), local_files_only=True)
    config.layer_norm_eps = 1e-6
    model = whole(transformers.ViTModel, folder, config=config, add_pooling_layer=False).to(device)
    return _first_token(model, centre_of_imagenet, folder, "pil")


def _first_token(model: Any, prepare: Callable[[Image.Image], Tensor], folder: Path, backend: str) -> Embedder:
    told = told_of(folder, processor=backend)
    return Embedder(prepare, lambda pixels: model(pixels).last_hidden_state[:, 0], _identity(told), told)


def centre_of_imagenet(picture: Image.Image) -> Tensor:
    """(3, 224, 224): torchvision's Resize(256, bicubic), CenterCrop(224), ToTensor, Normalize, on a Pillow picture."""
    short = min(picture.size)
    width, height = (256 if side == short else int(256 * side / short) for side in picture.size)
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - 224) / 2), round((height - 224) / 2)
    pixels = _bytes(resized.crop((left, top, left + 224, top + 224))).float() / 255
    return (pixels - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_STD)[:, None, None]


def _bytes(picture: Image.Image) -> Tensor:
    """(3, h, w) uint8."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


# --- Inception -------------------------------------------------------------------------------------------------------


def _inception(file: Path, device: str) -> Embedder:
    """FID's: TensorFlow's graph, which scales to 299 pixels itself."""
    extractors = installed("torch_fidelity.feature_extractor_inceptionv3")
    safe = io.BytesIO()  # torch-fidelity unpickles whatever it is given; this has been read as tensors alone
    torch.save(torch.load(file, map_location="cpu", weights_only=True), safe)
    safe.seek(0)
    model = extractors.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=safe
    ).to(device)
    told = told_of(file, processor="torch-fidelity")
    return Embedder(_bytes, lambda pixels: model(pixels)[0], _identity(told), told)


LOADERS: Mapping[str, Callable[[Path, str], Embedder]] = {
    "clip": _clip,
    "dino": _vit,
    "dino_vits8": _dino_vits8,
    "dinov2": _dinov2,
    "inception": _inception,
}


# --- embedding -------------------------------------------------------------------------------------------------------


def embedded(embedder: Embedder, pictures: Sequence[Image.Image], device: str) -> Tensor:
    """(b, d) float32 on the CPU; pictures of one size at a time where the model takes several."""
    prepared = [embedder.prepare(picture) for picture in pictures]
    rows: list[Tensor] = [torch.empty(0)] * len(prepared)
    for shape in dict.fromkeys(pixels.shape for pixels in prepared):
        places = [i for i, pixels in enumerate(prepared) if pixels.shape == shape]
        with exact():
            found = embedder.embed(torch.stack([prepared[i] for i in places]).to(device)).float().cpu()
        for i, row in zip(places, found, strict=True):
            rows[i] = row
    return torch.stack(rows)


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Without gradients, and in full float32: GPUs would convolve with 10 bits of it, and multiply so where told to."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """Of every row of the one (n, d) with every row of the other (m, d): (n, m) float64."""
    return functional.normalize(first.double(), dim=-1) @ functional.normalize(second.double(), dim=-1).T
