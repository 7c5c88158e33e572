"""The metrics and the models that they need, as data. Nothing heavy is imported here."""

from __future__ import annotations

import importlib.util
import json
from argparse import ArgumentParser
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from benchmarks.paper.plan import Source
from networks.deft_config import DeftError

PRIOR = (
    "prior"  # category of prompts for the class without its identifier: PRES scores those alone, all others the rest
)
WEIGHTS = ("*.safetensors", "*.bin")


class Compares(Enum):
    """What a metric is a number of."""

    REFERENCES = "picture x references"  # the mean over the references
    TEXT = "picture x text"
    SIBLINGS = "picture x other pictures of its prompt"  # their mean over a prompt's pictures: of all pairs
    ALONE = "picture"
    SETS = "drawn pictures x real pictures"


@dataclass(frozen=True)
class Model:
    """A model that metrics need from the user's disk.

    :param option: which names it on the command line, without its dashes
    :param settings: what its config.json has to say; None for a single file of weights
    :param library: to be installed for it beside requirements.txt, as pip knows it; "" for none
    """

    option: str
    source: Source
    settings: Mapping[str, Any] | None = None
    library: str = ""

    @property
    def place(self) -> str:
        """What the option takes."""
        return "FILE" if self.settings is None else "DIR"

    def missing(self) -> str:
        """What the user is told."""
        return (
            f"--{self.option} {'FILE' if self.settings is None else 'DIR'}: {self.source.what}, {self.source.published}"
        )

    def check(self, path: Path) -> None:
        """Finds out whether this can be the model, without loading it.

        :raises DeftError: where it cannot
        """
        wrong = self._file_wrong(path) if self.settings is None else self._folder_wrong(path, self.settings)
        if wrong:
            raise DeftError(f"--{self.option} {path}: {wrong}; {self.source.what} is wanted, {self.source.published}")

    def _file_wrong(self, path: Path) -> str:
        return "" if path.is_file() else "there is no such file"

    def _folder_wrong(self, path: Path, settings: Mapping[str, Any]) -> str:
        if not path.is_dir():
            return "there is no such folder"
        for name in ("config.json", "preprocessor_config.json"):
            if not (path / name).is_file():
                return f"it has no {name}"
        if not any(next(path.glob(pattern), None) for pattern in WEIGHTS):
            return "it has no weights"
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8-sig"))
        except ValueError:
            return "its config.json cannot be read"
        found = config if isinstance(config, dict) else {}
        for key, value in settings.items():
            if found.get(key) != value and (key in found or key == "model_type"):  # defaults need not be written
                return f"its config.json has {key} {found.get(key)}, not {value}"
        return ""


def files_of(path: Path) -> list[Path]:
    """A model's, which decide what it measures: of its folder, or itself."""
    if not path.is_dir():
        return [path]
    weights = sorted(found for pattern in WEIGHTS for found in path.glob(pattern))
    return [*weights, *(path / name for name in ("config.json", "preprocessor_config.json") if (path / name).is_file())]


@dataclass(frozen=True)
class Metric:
    """One column of the tables.

    :param title: as tables head it
    :param measure: by which `scorer` computes it
    :param model: key of `MODELS`; "" for none
    :param higher: whether more is better
    :param unit: of the value, and its range
    :param source: where its definition was read
    :param digits: behind the point, in tables
    :param prior: whether it is of pictures of the class without its identifier, and of those alone
    """

    title: str
    compares: Compares
    measure: str
    model: str
    higher: bool
    unit: str
    source: str
    digits: int = 3
    prior: bool = False

    @property
    def of_sets(self) -> bool:
        """Whether it is a number of many pictures, and not of each."""
        return self.compares is Compares.SETS

    @property
    def library(self) -> str:
        """What has to be installed for it beside requirements.txt, as pip knows it; "" for nothing."""
        return MODELS[self.model].library if self.model else ""


@dataclass(frozen=True)
class Drawn:
    """A picture to be scored; metrics for which it lacks something are left out of its scores.

    :param picture: the file
    :param references: real pictures that it is compared with
    :param text: that it is compared with, without placeholders of pictures
    :param siblings: the other pictures of the same prompt, subject and method
    :param prior: whether its prompt was the class without its identifier
    """

    picture: Path
    references: tuple[Path, ...] = ()
    text: str = ""
    siblings: tuple[Path, ...] = ()
    prior: bool = False


def _hub(what: str, name: str, licence: str) -> Source:
    return Source(what, f"https://huggingface.co/{name}", licence)


def _file(option: str, what: str, published: str, licence: str, library: str) -> Model:
    return Model(option, Source(what, published, licence), library=library)


_IQA = "https://huggingface.co/chaofengc/IQA-PyTorch-Weights"
_IQA_LICENCE = "Apache-2.0; pyiqa itself PolyForm-Noncommercial-1.0.0"


MODELS: Mapping[str, Model] = {
    model.option: model
    for model in (
        Model("clip", _hub("CLIP ViT-B/32", "openai/clip-vit-base-patch32", "MIT"), {"model_type": "clip"}),
        Model("dino", _hub("DINO ViT-S/16", "facebook/dino-vits16", "Apache-2.0"),
              {"model_type": "vit", "patch_size": 16}),
        Model("dino_vits8", _hub("DINO ViT-S/8", "facebook/dino-vits8", "Apache-2.0"),
              {"model_type": "vit", "patch_size": 8, "image_size": 224}),
        Model("dinov2", _hub("DINOv2 ViT-S/14", "facebook/dinov2-small", "Apache-2.0"), {"model_type": "dinov2"}),
        Model("depth_model", _hub("Depth-Anything-V2, or another depth estimator of transformers",
                                  "depth-anything/Depth-Anything-V2-Small-hf", "Apache-2.0"), {}),
        _file("alexnet", "AlexNet's weights, torchvision's alexnet-owt-7be5be79.pth",
              "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "BSD-3-Clause", "lpips"),
        _file("inception", "FID's Inception, torch-fidelity's weights-inception-2015-12-05-6726825d.pth",
              "https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0", "Apache-2.0", "torch-fidelity"),
        _file("musiq", "MUSIQ's weights, pyiqa's musiq_koniq_ckpt-e95806b9.pth", _IQA, _IQA_LICENCE, "pyiqa"),
        _file("maniqa", "MANIQA's weights, pyiqa's ckpt_koniq10k.pt", _IQA, _IQA_LICENCE, "pyiqa"),
    )
}  # fmt: skip

_COSINE = "cosine, -1 to 1; DreamBench++ prints 100 times that"
_DREAMBOOTH, _DREAMBENCH, _CLOZE = "DreamBooth (Ruiz 2023)", "DreamBench++'s metrics/", "VisualCloze's Table 1"

METRICS: Mapping[str, Metric] = {
    "clip_i": Metric("CLIP-I", Compares.REFERENCES, "cosine", "clip", True, _COSINE, _DREAMBENCH + "clip_score.py"),
    "clip_t": Metric("CLIP-T", Compares.TEXT, "cosine", "clip", True, _COSINE, _DREAMBENCH + "clip_score.py"),
    "dino": Metric("DINO", Compares.REFERENCES, "cosine", "dino", True, _COSINE, _DREAMBOOTH),
    "dinov1": Metric("DINOv1", Compares.REFERENCES, "cosine", "dino_vits8", True, _COSINE,
                     _DREAMBENCH + "dino_score.py"),
    "dinov2": Metric("DINOv2", Compares.REFERENCES, "cosine", "dinov2", True, _COSINE, _DREAMBENCH + "dino_score.py"),
    "pres": Metric("PRES", Compares.REFERENCES, "cosine", "dino", False, _COSINE, _DREAMBOOTH, prior=True),
    "div": Metric("DIV", Compares.SIBLINGS, "lpips", "alexnet", True, "LPIPS, 0 and more", _DREAMBOOTH),
    "lpips": Metric("LPIPS", Compares.REFERENCES, "lpips", "alexnet", False, "LPIPS, 0 and more", "lpips 0.1.4"),
    "fid": Metric("FID", Compares.SETS, "frechet", "inception", False, "squared distance", "torch-fidelity", 2),
    "kid": Metric("KID", Compares.SETS, "kernel", "inception", False, "squared distance; may be below 0",
                  "torch-fidelity, all pictures in one subset", 5),
    "fd_dinov2": Metric("FD-DINOv2", Compares.SETS, "frechet", "dinov2", False, "squared distance",
                        "FID's formula on DINOv2's features", 2),
    "ssim": Metric("SSIM", Compares.REFERENCES, "ssim", "", True, "-1 to 1", "Wang 2004; as torchmetrics"),
    "rmse": Metric("RMSE", Compares.REFERENCES, "rmse", "", False, "grey levels, 0 to 255", _CLOZE, 2),
    "f1": Metric("F1", Compares.REFERENCES, "edges", "", True, "0 to 1", _CLOZE),
    "depth_rmse": Metric("RMSE (depth)", Compares.REFERENCES, "depth", "depth_model", False,
                         "0 to 255, each map from its least to its greatest value", _CLOZE, 2),
    "musiq": Metric("MUSIQ", Compares.ALONE, "quality", "musiq", True, "0 to 100", _CLOZE, 2),
    "maniqa": Metric("MANIQA", Compares.ALONE, "quality", "maniqa", True, "0 to 1", _CLOZE),
}  # fmt: skip


def models_of(names: Iterable[str]) -> list[Model]:
    """The models that these metrics need, each once, in their order."""
    return [MODELS[key] for key in dict.fromkeys(METRICS[name].model for name in names) if key]


def add_options(parser: ArgumentParser, names: Iterable[str]) -> None:
    """An option for every model that these metrics need."""
    for model in models_of(names):
        told = f"{model.source.what}: {model.source.published} ({model.source.licence})"
        parser.add_argument(f"--{model.option}", metavar=model.place, type=Path, help=told.replace("%", "%%"))


@dataclass(frozen=True)
class Choice:
    """Which of the metrics asked for can be computed here.

    :param names: those, in the order in which they were asked for
    :param left_out: the others, with a line that says what each lacks
    """

    names: tuple[str, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)


def choose(names: Iterable[str], models: Mapping[str, Path | None]) -> Choice:
    """Which metrics can be computed with these models and what is installed.

    :param models: option's name -> folder or file; None where it was not given
    :raises DeftError: for a folder or file that is given and cannot be what it should be
    """
    names = list(names)
    for model in models_of(names):
        path = models.get(model.option)
        if path is not None:
            model.check(path)
    left_out = {name: reason for name in names if (reason := _lacking(METRICS[name], models))}
    return Choice(tuple(name for name in names if name not in left_out), left_out)


def _lacking(metric: Metric, models: Mapping[str, Path | None]) -> str:
    if metric.library and importlib.util.find_spec(metric.library.replace("-", "_")) is None:
        return f"{metric.title} is left out: pip install {metric.library}"
    if metric.model and models.get(metric.model) is None:
        return f"{metric.title} is left out: {MODELS[metric.model].missing()}"
    return ""
