"""Scores of drawn pictures."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import transformers
from PIL import Image
from torch import Tensor

from benchmarks.paper.metrics import outside, pixels, sets
from benchmarks.paper.metrics.cache import Store, digest_of
from benchmarks.paper.metrics.embeddings import Embedder, cosine, embedded, exact, load
from benchmarks.paper.metrics.table import METRICS, Choice, Compares, Drawn, Metric
from library.data.pixels import read_picture
from networks.deft_config import DeftError, reason_of
from networks.deft_progress import Bar, progress

logger = logging.getLogger(__name__)

OPENED = 32  # pictures that are kept decoded

_ARRAYS: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "ssim": pixels.ssim,
    "rmse": pixels.rmse,
    "edges": pixels.edge_f1,
}
_SETS: Mapping[str, Callable[[Tensor, Tensor], float]] = {
    "frechet": sets.frechet,
    "kernel": sets.kernel_distance,
}


class Scorer:
    """Computes metrics of pictures, and of sets of them. Models are loaded when they are first needed.

    :param choice: which metrics; `table.choose` makes it
    :param models: option's name -> folder or file
    :param cache: file in which embeddings are kept, under the run's output folder
    :param batch: pictures that a model sees at once
    """

    def __init__(
        self, choice: Choice, models: Mapping[str, Path | None], cache: Path, device: str = "cpu", batch: int = 16
    ) -> None:
        self.choice = choice
        self._models = {name: path for name, path in models.items() if path is not None}
        self._store = Store(cache)
        self._device, self._batch = device, batch
        self._digests: dict[Path, str] = {}
        self._told: dict[str, Mapping[str, Any]] = {}
        self._read = functools.lru_cache(OPENED)(_read)
        self._embedder = functools.cache(self._load_embedder)
        self._pair = functools.cache(self._load_pair)
        self._quality = functools.cache(self._load_quality)

    def scores(self, pictures: Sequence[Drawn]) -> list[dict[str, float]]:
        """Each picture's scores by name of metric; what a picture lacks something for is not there.

        :raises DeftError: for a picture or model that cannot be read
        """
        found: list[dict[str, float]] = [{} for _ in pictures]
        for name in self.choice.names:
            metric = METRICS[name]
            if metric.of_sets:
                continue
            able = [i for i, picture in enumerate(pictures) if _able(metric, picture)]
            for i, value in zip(able, self._measured(metric, [pictures[i] for i in able]), strict=True):
                found[i][name] = value
        return found

    def set_scores(self, pictures: Sequence[Drawn]) -> dict[str, float]:
        """Of metrics that compare sets: the drawn pictures with all their references, each of those once.

        Beside them "drawn" and "real", the numbers of pictures. Nothing where either is below two.
        """
        metrics = {name: METRICS[name] for name in self.choice.names if METRICS[name].of_sets}
        drawn = [picture.picture for picture in pictures if not picture.prior]
        real = {self._digest(file): file for picture in pictures if not picture.prior for file in picture.references}
        if not metrics or min(len(drawn), len(real)) < 2:
            return {}
        found: dict[str, float] = {"drawn": len(drawn), "real": len(real)}
        for name, metric in metrics.items():
            vectors = self._pictures(metric.model, [*drawn, *real.values()])
            both = (torch.stack([vectors[file] for file in files]) for files in (drawn, real.values()))
            found[name] = _SETS[metric.measure](*both)
        return found

    def described(self) -> dict[str, Any]:
        """What a result has to say of how it was measured so far: models by hash, processors' backends, versions."""
        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "pillow": PIL.__version__}
        return {"models": dict(self._told), "versions": versions, "left_out": dict(self.choice.left_out)}

    # --- by what a metric compares ---

    def _measured(self, metric: Metric, pictures: Sequence[Drawn]) -> Iterable[float]:
        if not pictures:
            return []
        if metric.measure == "cosine" and metric.compares is Compares.TEXT:
            return self._with_texts(metric.model, pictures)
        if metric.measure == "cosine":
            return self._with_references(metric.model, pictures)
        if metric.compares is Compares.ALONE:
            quality = self._quality(metric.model)
            return [quality(self._read(picture.picture)) for picture in progress(pictures, metric.title)]
        return [self._mean_pair(metric, picture) for picture in progress(pictures, metric.title)]

    def _with_references(self, model: str, pictures: Sequence[Drawn]) -> list[float]:
        files = [file for picture in pictures for file in (picture.picture, *picture.references)]
        vectors = self._pictures(model, files)
        return [
            cosine(vectors[picture.picture][None], torch.stack([vectors[file] for file in picture.references]))
            .mean()
            .item()
            for picture in pictures
        ]

    def _with_texts(self, model: str, pictures: Sequence[Drawn]) -> list[float]:
        vectors = self._pictures(model, [picture.picture for picture in pictures])
        texts = self._texts(model, [picture.text for picture in pictures])
        return [cosine(vectors[p.picture][None], texts[p.text][None]).item() for p in pictures]

    def _mean_pair(self, metric: Metric, picture: Drawn) -> float:
        others = picture.siblings if metric.compares is Compares.SIBLINGS else picture.references
        pair = self._pair(metric.measure, metric.model)
        first = self._read(picture.picture)
        return float(np.mean([pair(first, pixels.fitted(self._read(other), *first.size)) for other in others]))

    # --- embeddings, each once ---

    def _pictures(self, model: str, files: Iterable[Path]) -> dict[Path, Tensor]:
        embedder = self._embedder(model)
        keys = {file: f"{model}:{embedder.identity}:{self._digest(file)}" for file in dict.fromkeys(files)}
        by_key = self._store.get(keys.values())
        lacking = {key: file for file, key in keys.items() if key not in by_key}
        with Bar(len(lacking), f"pictures through --{model}", "picture") as bar:
            for some in _batches(list(lacking.items()), self._batch):
                opened = [_read(file) for _, file in some]
                new = dict(zip((key for key, _ in some), embedded(embedder, opened, self._device), strict=True))
                self._store.put(new)
                by_key |= new
                bar.add(len(some))
        return {file: by_key[key] for file, key in keys.items()}

    def _texts(self, model: str, texts: Iterable[str]) -> dict[str, Tensor]:
        embedder = self._embedder(model)
        reads = embedder.texts
        assert reads is not None, model
        keys = {text: f"{model}:{embedder.identity}:text:{hashlib.sha256(text.encode()).hexdigest()}" for text in texts}
        if cut := reads.cut(list(keys)):
            logger.warning("--%s reads the beginning alone of %d texts: %.60s…", model, len(cut), cut[0])
        by_key = self._store.get(keys.values())
        for some in _batches([(key, text) for text, key in keys.items() if key not in by_key], self._batch):
            with exact():
                rows = reads.embed([text for _, text in some]).float().cpu()
            new = dict(zip((key for key, _ in some), rows, strict=True))
            self._store.put(new)
            by_key |= new
        return {text: by_key[key] for text, key in keys.items()}

    def _digest(self, file: Path) -> str:
        if file not in self._digests:
            try:
                self._digests[file] = digest_of(file)
            except OSError as error:
                raise DeftError(f"{file}: the picture cannot be read ({reason_of(error)})") from None
        return self._digests[file]

    # --- models, each once ---

    def _load_embedder(self, model: str) -> Embedder:
        embedder = load(model, self._models[model], self._device)
        self._told[model] = embedder.told
        return embedder

    def _load_pair(self, measure: str, model: str) -> outside.Pair:
        if measure in _ARRAYS:
            return lambda first, second: _ARRAYS[measure](np.array(first), np.array(second))
        loaded = {"lpips": outside.load_lpips, "depth": outside.load_depth}[measure]
        pair, self._told[model] = loaded(self._models[model], self._device)
        return pair

    def _load_quality(self, model: str) -> outside.Alone:
        quality, self._told[model] = outside.load_quality(model, self._models[model], self._device)
        return quality


def _able(metric: Metric, picture: Drawn) -> bool:
    """Whether the picture has what the metric compares it with."""
    needed: Mapping[Compares, Any] = {
        Compares.REFERENCES: picture.references,
        Compares.TEXT: picture.text,
        Compares.SIBLINGS: picture.siblings,
    }
    return metric.prior == picture.prior and bool(needed.get(metric.compares, True))


def _batches(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _read(file: Path) -> Image.Image:
    try:
        return read_picture(file).image
    except Exception as error:  # Pillow's are of many kinds
        raise DeftError(f"{file}: the picture cannot be read ({reason_of(error)})") from None
