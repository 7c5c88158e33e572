"""Metrics by optional libraries, beside those libraries themselves: with random weights in the place of published ones.

pip install lpips torch-fidelity pyiqa
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")

from benchmarks.paper import metrics
from benchmarks.paper.metrics import Drawn, outside
from benchmarks.paper.metrics.scorer import Scorer
from networks.deft_config import DeftError
from tests import small_judges
from tests.conftest import PHOTOS


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    return small_judges.pictures(tmp_path)


def array(file: Path) -> np.ndarray:
    return np.array(Image.open(file).convert("RGB"))


def tensor(file: Path) -> torch.Tensor:
    """(3, h, w) uint8."""
    return torch.from_numpy(array(file)).permute(2, 0, 1)


@pytest.fixture
def alexnet(tmp_path) -> Path:
    models = pytest.importorskip("torchvision.models")
    pytest.importorskip("lpips")
    torch.save(models.alexnet(weights=None).state_dict(), tmp_path / "alexnet.pth")
    return tmp_path / "alexnet.pth"


def test_lpips_is_its_own_and_div_the_mean_of_pairs(alexnet, pictures, tmp_path):
    import lpips
    from torchvision.models import alexnet as made

    net = made(weights=None)
    net.load_state_dict(torch.load(alexnet, weights_only=True))
    theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    for i, layer in enumerate(net.features):
        for name in ("slice1", "slice2", "slice3", "slice4", "slice5"):
            if str(i) in dict(getattr(theirs.net, name).named_children()):
                getattr(theirs.net, name)[list(dict(getattr(theirs.net, name).named_children())).index(str(i))] = layer
    first, second = pictures[:2]
    third = tmp_path / "third.png"
    Image.fromarray(255 - array(first)).save(third)

    def distance(one: Path, two: Path) -> float:
        with torch.no_grad():
            return theirs(*(tensor(file)[None].float() / 255 for file in (one, two)), normalize=True).item()

    same = (first, second, third)
    models = {"alexnet": alexnet}
    judge = Scorer(metrics.choose(["div", "lpips"], models), models, tmp_path / "cache.sqlite")
    drawn = [Drawn(file, (file, first), siblings=tuple(other for other in same if other != file)) for file in same]
    found = judge.scores(drawn)
    assert distance(first, third) > 1e-3
    assert [scores["lpips"] for scores in found] == pytest.approx(
        [distance(file, first) / 2 for file in same], abs=1e-6
    )
    pairs = [distance(first, second), distance(first, third), distance(second, third)]
    assert np.mean([scores["div"] for scores in found]) == pytest.approx(np.mean(pairs), rel=1e-4)
    assert judge.scores([Drawn(first)]) == [{}]
    torch.save({"wrong": torch.zeros(1)}, alexnet)
    with pytest.raises(DeftError, match=r"--alexnet .*https"):
        outside.load_lpips(alexnet, "cpu")


def test_inception_is_torch_fidelitys(pictures, tmp_path):
    fidelity = pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    file, random = tmp_path / "inception.pth", np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:  # made without weights: none can be downloaded
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.save({}, file)
        made = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(file))
    torch.save(made.state_dict(), file)
    for name in ("drawn", "real"):
        (tmp_path / name).mkdir()
        for i in range(6):
            shift = 60 if name == "real" else 0
            small = random.integers(shift, 190 + shift, (6, 6, 3)).astype(np.uint8)
            Image.fromarray(small).resize((80, 70)).save(tmp_path / name / f"{i}.png")
    theirs = fidelity.calculate_metrics(
        input1=str(tmp_path / "drawn"), input2=str(tmp_path / "real"), cuda=False, cache=False, verbose=False,
        fid=True, kid=True, kid_subset_size=6, kid_subsets=1, feature_extractor_weights_path=str(file),
    )  # fmt: skip
    models = {"inception": file}
    judge = Scorer(metrics.choose(["fid", "kid"], models), models, tmp_path / "cache.sqlite", batch=4)
    real = tuple(sorted((tmp_path / "real").iterdir()))
    found = judge.set_scores([Drawn(drawn, real) for drawn in sorted((tmp_path / "drawn").iterdir())])
    assert found["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert found["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    judge.set_scores([Drawn(file, real) for file in pictures])  # of several sizes


@pytest.mark.parametrize("name", ["musiq", "maniqa"])
def test_quality_is_pyiqas(name, tmp_path, monkeypatch):
    pyiqa = pytest.importorskip("pyiqa")
    if name == "maniqa":  # two crops of a picture, not twenty: each is a ViT-B
        monkeypatch.setattr(pyiqa, "create_metric", functools.partial(pyiqa.create_metric, test_sample=2))
    file = tmp_path / "weights.pth"
    with outside._no_backbone():
        theirs = pyiqa.create_metric(name, device=torch.device("cpu"), pretrained=False)
    torch.save({"params": {f"module.{key}": value for key, value in theirs.net.state_dict().items()}}, file)
    picture = Image.open(PHOTOS / "8_sks cat" / "chelsea_1.jpg").convert("RGB")
    picture.save(tmp_path / "picture.png")
    models = {name: file}
    judge = Scorer(metrics.choose([name], models), models, tmp_path / "cache.sqlite")
    [found] = judge.scores([Drawn(tmp_path / "picture.png")])
    with torch.no_grad():
        assert found[name] == pytest.approx(theirs(str(tmp_path / "picture.png")).item(), rel=1e-5)
    torch.save({"wrong": torch.zeros(1)}, file)
    with pytest.raises(DeftError, match=f"--{name} .*https"):
        outside.load_quality(name, file, "cpu")
