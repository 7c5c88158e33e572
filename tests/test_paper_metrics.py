"""The papers' metrics: known answers, the libraries' own figures on the same pictures, and no dependence on order."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")
torchmetrics = pytest.importorskip("torchmetrics")

import cv2  # noqa: E402
import transformers  # noqa: E402
from torchmetrics.functional.classification import binary_f1_score  # noqa: E402
from torchmetrics.functional.image import structural_similarity_index_measure  # noqa: E402
from torchmetrics.functional.multimodal import clip_score  # noqa: E402
from torchmetrics.image.fid import _compute_fid  # noqa: E402
from torchmetrics.image.kid import poly_mmd  # noqa: E402

from benchmarks.paper import metrics  # noqa: E402
from benchmarks.paper.metrics import METRICS, Drawn, embeddings, outside, pixels, sets  # noqa: E402
from benchmarks.paper.metrics.scorer import Scorer  # noqa: E402
from networks.deft_config import DeftError  # noqa: E402
from tests import small_judges  # noqa: E402
from tests.conftest import ROOT  # noqa: E402

EQUAL_IS_ONE = ("clip_i", "dino", "dinov1", "dinov2", "ssim", "f1")
EQUAL_IS_ZERO = ("rmse", "depth_rmse")
HERE = (*EQUAL_IS_ONE, "clip_t", *EQUAL_IS_ZERO, "pres", "fd_dinov2")  # what needs no more than requirements.txt


@pytest.fixture(scope="session")
def judges(tmp_path_factory) -> dict[str, Path]:
    return small_judges.build(tmp_path_factory.mktemp("judges"))


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    return small_judges.pictures(tmp_path)


@pytest.fixture
def scorer(judges, tmp_path):
    """Makes a scorer with a cache of its own."""

    def make(*names: str, batch: int = 16, cache: str = "embeddings.sqlite") -> Scorer:
        return Scorer(metrics.choose(names or HERE, judges), judges, tmp_path / cache, batch=batch)

    return make


def array(file: Path) -> np.ndarray:
    return np.array(Image.open(file).convert("RGB"))


def tensor(file: Path) -> torch.Tensor:
    """(3, h, w) uint8."""
    return torch.from_numpy(array(file)).permute(2, 0, 1)


# --- known answers ---------------------------------------------------------------------------------------------------


def test_a_picture_equals_itself(scorer, pictures):
    names = (*EQUAL_IS_ONE, *EQUAL_IS_ZERO)
    for scores in scorer(*names).scores([Drawn(file, (file,)) for file in pictures]):
        assert scores == pytest.approx(dict.fromkeys(EQUAL_IS_ONE, 1.0) | dict.fromkeys(EQUAL_IS_ZERO, 0.0), abs=1e-6)


def test_black_and_white_are_255_grey_levels_apart():
    black, white = np.zeros((20, 30, 3), np.uint8), np.full((20, 30, 3), 255, np.uint8)
    assert pixels.rmse(black, white) == pixels.rmse(white, black) == 255  # bytes would wrap: 1
    assert pixels.ssim(black, white) == pytest.approx(1e-4 / (1 + 1e-4))


def test_a_mean_over_references_and_none_without_them(scorer, pictures):
    names = ("clip_i", "dinov2", "rmse", "f1", "depth_rmse")
    first, *others = pictures
    both, *single, none = scorer(*names).scores(
        [Drawn(first, tuple(others)), *(Drawn(first, (other,)) for other in others), Drawn(first)]
    )
    for name in names:
        assert both[name] == pytest.approx(np.mean([scores[name] for scores in single]), abs=1e-9)
    assert none == {}


def test_edges_are_compared_where_canny_finds_them():
    square = np.zeros((512, 512, 3), np.uint8)
    square[100:400, 100:400] = 255
    moved = np.roll(square, 50, axis=1)
    blank = np.zeros_like(square)
    found, true = (cv2.Canny(picture, 100, 200).ravel() > 0 for picture in (square, moved))
    expected = binary_f1_score(torch.from_numpy(found).int(), torch.from_numpy(true).int()).item()
    assert 0 < expected < 1
    assert pixels.edge_f1(square, moved) == pytest.approx(expected)
    assert pixels.edge_f1(square, blank) == pixels.edge_f1(blank, square) == 0
    assert pixels.edge_f1(blank, blank) == pixels.edge_f1(square, square) == 1
    half = square[::2, ::2].copy()
    assert pixels.edge_f1(half, square) > 0.5  # brought to 512 pixels


@pytest.mark.parametrize("size", [(64, 64), (100, 40), (40, 100), (33, 35)])
def test_what_is_compared_is_cut_at_the_centre_and_not_squeezed(size):
    ramp = np.zeros((60, 90, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(90)[None] * 2, np.arange(60)[:, None] * 2
    width, height = size
    fitted = np.array(pixels.fitted(Image.fromarray(ramp), width, height)).astype(float)
    assert fitted.shape[:2] == (height, width)
    step = min(90 / width, 60 / height) * 2  # the same along and across
    inner = fitted[4:-4, 4:-4]
    assert np.diff(inner[..., 0], axis=1).mean() == pytest.approx(step, rel=0.05)
    assert np.diff(inner[..., 1], axis=0).mean() == pytest.approx(step, rel=0.05)
    assert inner[..., 0].mean() == pytest.approx(89, abs=1.5)
    assert inner[..., 1].mean() == pytest.approx(59, abs=1.5)


def test_siblings_and_prior_pictures(scorer, pictures):
    """PRES is of pictures of the class alone, all others of the rest."""
    first, second, *_ = pictures
    prior, usual = scorer("dino", "pres", "clip_t").scores(
        [Drawn(first, (second,), "a dog", prior=True), Drawn(first, (second,), "a sks dog")]
    )
    assert prior.keys() == {"pres"}
    assert usual.keys() == {"dino", "clip_t"}
    assert prior["pres"] == usual["dino"]


# --- sets ------------------------------------------------------------------------------------------------------------


def normal(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Rows whose mean is 0 and whose covariance is the identity, exactly."""
    rows_of = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows_of -= rows_of.mean(0)
    covariance = rows_of.T @ rows_of / (rows - 1)
    return rows_of @ torch.linalg.inv(torch.linalg.cholesky(covariance)).T


def test_frechet_of_two_normal_distributions():
    first, second = normal(60, 5, 1), normal(90, 5, 2)
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0], dtype=torch.float64)
    assert sets.frechet(first, second + shift) == pytest.approx(shift.square().sum().item(), rel=1e-9)
    scale = torch.tensor([1.0, 2.0, 3.0, 0.5, 0.1], dtype=torch.float64)  # tr(1 + s² - 2s)
    assert sets.frechet(first, second * scale) == pytest.approx((scale - 1).square().sum().item(), rel=1e-9)
    assert sets.frechet(first, first.flip(0)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("rows", "columns"), [(40, 12), (200, 12), (5, 12)])
def test_set_distances_are_torchmetrics(rows, columns):
    generator = torch.Generator().manual_seed(rows)
    first, second = (torch.randn(rows, columns, generator=generator, dtype=torch.float64) for _ in range(2))
    second = second @ torch.randn(columns, columns, generator=generator, dtype=torch.float64) + 1
    theirs = _compute_fid(first.mean(0), first.T.cov(), second.mean(0), second.T.cov()).item()
    assert sets.frechet(first, second) == pytest.approx(theirs, rel=1e-5)
    assert sets.frechet(second, first) == pytest.approx(theirs, rel=1e-5)
    assert sets.kernel_distance(first, second) == pytest.approx(poly_mmd(first, second).item(), rel=1e-9)


def test_sets_count_each_real_picture_once_and_no_prior_ones(scorer, pictures, tmp_path):
    copied = tmp_path / "copy.png"
    shutil.copy(pictures[2], copied)
    real = (pictures[1], pictures[2])
    drawn = [Drawn(pictures[0], real), Drawn(pictures[3], (copied, pictures[2])), Drawn(pictures[1], real, prior=True)]
    judge = scorer("fd_dinov2", "clip_i")
    found = judge.set_scores(drawn)
    assert found == judge.set_scores(drawn[:2])
    assert (found["drawn"], found["real"]) == (2, 2)
    vectors = judge._pictures("dinov2", pictures)
    rows = [torch.stack([vectors[pictures[i]] for i in places]).double() for places in ((0, 3), (1, 2))]
    theirs = _compute_fid(rows[0].mean(0), rows[0].T.cov(), rows[1].mean(0), rows[1].T.cov()).item()
    assert found["fd_dinov2"] == pytest.approx(theirs, rel=1e-4)
    assert judge.set_scores(drawn[:1]) == {}
    assert judge.set_scores([Drawn(pictures[0], real[:1]), Drawn(pictures[3], real[:1])]) == {}


def test_a_set_equals_itself(scorer, pictures):
    found = scorer("fd_dinov2").set_scores([Drawn(file, tuple(reversed(pictures))) for file in pictures])
    assert found["fd_dinov2"] == pytest.approx(0, abs=1e-3)


# --- others' figures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (37, 81)])
def test_ssim_is_torchmetrics(size):
    random = np.random.default_rng(3)
    first = random.integers(0, 256, (*size, 3), np.uint8)
    second = (first * 0.7 + random.integers(0, 60, first.shape)).astype(np.uint8)
    one, two = (torch.from_numpy(picture).permute(2, 0, 1)[None].double() / 255 for picture in (first, second))
    theirs = structural_similarity_index_measure(one, two, data_range=1.0).item()
    assert pixels.ssim(first, second) == pytest.approx(theirs, abs=1e-9)


def pillow(folder: Path):
    """A folder's image processor, which would scale by torchvision where that is installed."""
    return transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")


class OldCLIP(transformers.CLIPModel):
    """Returns embeddings as transformers 4 did, and as torchmetrics expects."""

    def get_image_features(self, *args, **named):
        return super().get_image_features(*args, **named).pooler_output

    def get_text_features(self, *args, **named):
        return super().get_text_features(*args, **named).pooler_output


def test_clip_is_torchmetrics(judges, scorer, pictures, monkeypatch):
    folder = judges["clip"]
    tokens = transformers.CLIPTokenizer.from_pretrained(folder)
    model, processor = OldCLIP.from_pretrained(folder), transformers.CLIPProcessor(pillow(folder), tokens)
    texts = ["a photo of sks cat", "a red dog on the beach", "cat", "the beach, with many letters of no word"]
    drawn = [Drawn(file, (pictures[0],), text) for file, text in zip(pictures[:2] * 2, texts, strict=True)]
    found = scorer("clip_i", "clip_t").scores(drawn)
    assert max(scores["clip_t"] for scores in found) > 0.01  # torchmetrics cuts at 0
    for one, scores in zip(drawn, found, strict=True):
        with torch.no_grad():
            text = clip_score(tensor(one.picture), one.text, lambda: (model, processor)).item()
            image = clip_score(tensor(one.picture), tensor(pictures[0]), lambda: (model, processor)).item()
        assert max(100 * scores["clip_t"], 0) == pytest.approx(text, abs=1e-3)
        assert 100 * scores["clip_i"] == pytest.approx(image, abs=1e-3)
    monkeypatch.setattr(transformers, "CLIPModel", OldCLIP)  # embeddings by themselves are taken as well
    again = scorer("clip_i", "clip_t", cache="old.sqlite").scores(drawn)
    assert [list(scores.values()) for scores in again] == [pytest.approx(list(s.values()), abs=1e-6) for s in found]


@pytest.mark.parametrize(
    ("name", "option", "kind"), [("dino", "dino", "ViTModel"), ("dinov2", "dinov2", "Dinov2Model")]
)
def test_dino_is_the_first_token(judges, scorer, pictures, name, option, kind):
    model = getattr(transformers, kind).from_pretrained(judges[option]).eval()
    processor = pillow(judges[option])
    opened = [Image.open(file).convert("RGB") for file in pictures[:3]]
    with torch.no_grad():
        tokens = model(processor(images=opened, return_tensors="pt")["pixel_values"]).last_hidden_state[:, 0]
    theirs = torch.nn.functional.cosine_similarity(tokens[0], tokens[1:], dim=-1).mean().item()
    [found] = scorer(name).scores([Drawn(pictures[0], tuple(pictures[1:3]))])
    assert found[name] == pytest.approx(theirs, abs=1e-5)


def test_dinov1_takes_the_centre_of_256_pixels():
    ramp = Image.fromarray(np.stack([np.tile(np.arange(256, dtype=np.uint8), (256, 1))] * 3, -1))
    prepared = embeddings.centre_of_imagenet(ramp)
    assert prepared.shape == (3, 224, 224)
    expected = (torch.arange(16, 240) / 255 - 0.485) / 0.229
    assert torch.allclose(prepared[0, 100], expected)
    transforms = pytest.importorskip("torchvision.transforms")
    theirs = transforms.Compose([
        transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224),
        transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip
    for size in [(64, 80), (301, 299), (1000, 600), (255, 700), (512, 512)]:
        picture = Image.effect_noise(size, 80).convert("RGB")
        assert torch.equal(embeddings.centre_of_imagenet(picture), theirs(picture)), size


def test_depth_is_transformers_own(judges, pictures):
    model = transformers.AutoModelForDepthEstimation.from_pretrained(judges["depth_model"]).eval()
    processor = pillow(judges["depth_model"])
    estimate = transformers.pipeline("depth-estimation", model=model, image_processor=processor)
    opened = [Image.open(file) for file in pictures[:2]]
    maps = [estimate(picture)["predicted_depth"].double().numpy() for picture in opened]
    first, second = (255 * (depth - depth.min()) / (depth.max() - depth.min()) for depth in maps)
    distance, told = outside.load_depth(judges["depth_model"], "cpu")
    assert distance(*opened) == pytest.approx(np.sqrt(((first - second) ** 2).mean()), rel=1e-4)
    assert distance(*opened) > 1
    assert told["processor"] == "pil"


# --- order, batches, cache -------------------------------------------------------------------------------------------


def drawn_of(pictures: list[Path]) -> list[Drawn]:
    texts = ["a photo of sks cat", "dog", "the red beach, from above, at night", ""]
    return [Drawn(file, tuple(pictures[i:]), text) for i, (file, text) in enumerate(zip(pictures, texts, strict=True))]


def test_scores_depend_on_no_order_and_no_batch(scorer, pictures):
    drawn = drawn_of(pictures)
    one_by_one = scorer(batch=1, cache="1.sqlite")
    found = one_by_one.scores(drawn)
    sets_found = one_by_one.set_scores(drawn)
    backwards = scorer(batch=16, cache="2.sqlite")
    again = backwards.scores(drawn[::-1])[::-1]
    assert [scores.keys() for scores in found] == [scores.keys() for scores in again]
    for before, after in zip(found, again, strict=True):
        assert before == pytest.approx(after, abs=1e-5)
    assert sets_found == pytest.approx(backwards.set_scores(drawn[::-1]), rel=1e-4)
    alone = scorer(cache="3.sqlite").scores(drawn[2:3])
    assert alone[0] == pytest.approx(found[2], abs=1e-5)


def test_a_model_sees_each_picture_once(scorer, pictures, monkeypatch):
    seen: list[int] = []
    embedded = embeddings.embedded
    counted = lambda embedder, some, device: seen.append(len(some)) or embedded(embedder, some, device)  # noqa: E731
    monkeypatch.setattr("benchmarks.paper.metrics.scorer.embedded", counted)
    names = ("clip_i", "clip_t", "dinov2", "fd_dinov2")
    drawn = drawn_of(pictures)
    found = scorer(*names).scores(drawn)
    assert sum(seen) == 2 * len(pictures)  # CLIP and DINOv2
    second = scorer(*names)
    assert second.scores(drawn) == found
    second.set_scores(drawn)
    assert sum(seen) == 2 * len(pictures)
    shutil.copy(pictures[1], pictures[0])  # another content by the same name
    changed = scorer(*names).scores(drawn)
    assert sum(seen) == 2 * len(pictures)
    assert changed[0]["clip_i"] != found[0]["clip_i"]
    assert changed[0]["dinov2"] != found[0]["dinov2"]


def test_another_model_has_its_own_embeddings(judges, scorer, pictures, tmp_path):
    drawn = [Drawn(pictures[0], (pictures[1],))]
    [first] = scorer("dinov2").scores(drawn)
    other = judges | {"dinov2": small_judges.dinov2(tmp_path / "other")}
    [second] = Scorer(metrics.choose(["dinov2"], other), other, tmp_path / "embeddings.sqlite").scores(drawn)
    assert first != second


def test_a_damaged_cache_is_named(scorer, pictures, tmp_path):
    (tmp_path / "bad.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(DeftError, match=r"bad\.sqlite.*may be deleted"):
        scorer("dino", cache="bad.sqlite")


def test_what_is_told_of_a_run(scorer, pictures, judges):
    judge = scorer("clip_i", "dinov1", "lpips")
    judge.scores([Drawn(pictures[0], (pictures[1],))])
    told = json.loads(json.dumps(judge.described()))
    assert told["models"].keys() == {"clip", "dino_vits8"}
    assert told["models"]["clip"]["processor"] == "pil"
    assert "model.safetensors" in told["models"]["clip"]["sha256"]
    assert str(judges["clip"]) not in json.dumps(told)


# --- what users are told ---------------------------------------------------------------------------------------------


def test_what_is_missing_is_left_out_with_a_line(judges):
    choice = metrics.choose(METRICS, judges | {"clip": None})
    assert choice.names == tuple(name for name in METRICS if name in HERE and not name.startswith("clip"))
    assert "--clip DIR" in choice.left_out["clip_i"]
    assert "https://huggingface.co/openai/clip-vit-base-patch32" in choice.left_out["clip_t"]
    for line in choice.left_out.values():
        assert "\n" not in line
        assert "left out" in line


def test_a_missing_library_is_named(judges, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert metrics.choose(["lpips", "fid"], judges).left_out == {
        "lpips": "LPIPS is left out: pip install lpips",
        "fid": "FID is left out: pip install torch-fidelity",
    }


def test_the_rooms_table_names_every_metric_and_its_model():
    rows = [[cell.strip() for cell in row.split("|")] for row in (metrics.__doc__ or "").splitlines() if row[:1] == "|"]
    told = {row[1]: (row[3].partition("`--")[2].rstrip("`"), row[-2]) for row in rows[2:]}
    assert told == {m.title: (m.model, "higher" if m.higher else "lower") for m in METRICS.values()}


def test_every_model_has_an_option(judges):
    parser = argparse.ArgumentParser()
    metrics.add_options(parser, METRICS)
    given = vars(parser.parse_args([word for option in metrics.MODELS for word in (f"--{option}", "X")]))
    assert given == dict.fromkeys(metrics.MODELS, Path("X"))
    assert {model.option for model in metrics.models_of(["clip_i", "clip_t", "rmse", "pres"])} == {"clip", "dino"}


@pytest.mark.parametrize(
    ("option", "other", "said"),
    [
        ("clip", "dino", "model_type vit, not clip"),
        ("dinov2", "clip", "model_type clip, not dinov2"),
        ("dino_vits8", "dino", "patch_size 16, not 8"),
        ("dino", "dino_vits8", "patch_size 8, not 16"),
    ],
)
def test_another_model_is_refused_before_anything_is_loaded(judges, option, other, said):
    with pytest.raises(DeftError, match=rf"--{option} .*{said}.*https://huggingface\.co/"):
        metrics.choose(METRICS, judges | {option: judges[other]})


def spoilt(folder: Path, how: str) -> None:
    if how == "no such folder":
        shutil.rmtree(folder)
    elif how == "no weights":
        (folder / "model.safetensors").unlink()
    else:
        (
            folder / {"no preprocessor_config.json": "preprocessor_config.json", "no config.json": "config.json"}[how]
        ).unlink()


@pytest.mark.parametrize("how", ["no such folder", "no config.json", "no preprocessor_config.json", "no weights"])
def test_an_incomplete_folder_is_named(judges, tmp_path, how):
    folder = Path(shutil.copytree(judges["dinov2"], tmp_path / "copy"))
    spoilt(folder, how)
    with pytest.raises(DeftError, match=rf"--dinov2 .*{how}.*dinov2-small"):
        metrics.choose(["dinov2"], {"dinov2": folder})


def test_an_estimator_of_no_depth_is_refused(judges, tmp_path, pictures):
    models = {"depth_model": judges["dino"]}
    judge = Scorer(metrics.choose(["depth_rmse"], models), models, tmp_path / "cache.sqlite")
    with pytest.raises(DeftError, match=r"--depth_model .*https"):
        judge.scores([Drawn(pictures[0], (pictures[1],))])


def test_weights_that_lack_a_layer_are_refused(judges, tmp_path, pictures):
    """transformers would draw it at random, and score with that."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(judges["clip"], tmp_path / "copy"))
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    models = {"clip": folder}
    judge = Scorer(metrics.choose(["clip_i"], models), models, tmp_path / "cache.sqlite")
    with pytest.raises(DeftError, match=r"--clip .*visual_projection.*https"):
        judge.scores([Drawn(pictures[0], (pictures[1],))])


def test_settings_as_older_folders_have_them(judges, tmp_path, pictures):
    """CLIP's and DINO's were published before processors were called so, and sizes had a side each."""
    models = {name: Path(shutil.copytree(judges[name], tmp_path / name)) for name in ("clip", "dino")}
    for name, extractor in (("clip", "CLIPFeatureExtractor"), ("dino", "ViTFeatureExtractor")):
        file = models[name] / "preprocessor_config.json"
        settings = json.loads(file.read_text())
        del settings["image_processor_type"]
        side = {"size": 32, "crop_size": 32} if name == "clip" else {"size": 64}
        file.write_text(json.dumps(settings | side | {"feature_extractor_type": extractor}))
    drawn = [Drawn(pictures[0], tuple(pictures[1:]))]
    found, expected = (
        Scorer(metrics.choose(["clip_i", "dino"], given), given, tmp_path / f"{i}.sqlite").scores(drawn)
        for i, given in enumerate((models, judges))
    )
    assert found == expected


def test_a_library_that_is_broken_is_named():
    with pytest.raises(DeftError, match=r"^no-such-library cannot be imported .*: pip install no-such-library$"):
        embeddings.installed("no_such_library.part")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_pickles_are_read_as_tensors_alone(judges, tmp_path, pictures, monkeypatch):
    from safetensors.torch import load_file

    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(judges["dino"], tmp_path / "copy"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")  # as older models are published
    drawn = [Drawn(pictures[0], (pictures[1],))]

    def score(models: dict[str, Path], cache: str) -> list[dict[str, float]]:
        return Scorer(metrics.choose(["dino"], models), models, tmp_path / cache).scores(drawn)

    assert score({"dino": folder}, "1.sqlite") == score(judges, "2.sqlite")
    torch.save(weights | {"evil": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(DeftError, match="--dino "):
        score({"dino": folder}, "3.sqlite")
    assert not Path("executed").exists()


def test_a_picture_that_cannot_be_read_is_named(scorer, pictures, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(pictures[0].read_bytes()[:60])
    for name in ("dino", "rmse"):
        with pytest.raises(DeftError, match=r"broken\.png"):
            scorer(name).scores([Drawn(broken, (pictures[0],))])
        with pytest.raises(DeftError, match=r"gone\.png"):
            scorer(name).scores([Drawn(pictures[0], (tmp_path / "gone.png",))])


def test_texts_of_more_than_77_tokens_are_cut_and_told(scorer, pictures, caplog):
    start = "a photo of " * 30
    drawn = [Drawn(pictures[0], text=start + end) for end in ("cat", "dog", "")] + [Drawn(pictures[0], text="cat")]
    with caplog.at_level(logging.WARNING):
        found = [scores["clip_t"] for scores in scorer("clip_t").scores(drawn)]
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert found[0] == pytest.approx(found[2], abs=1e-6)
    assert found[3] != pytest.approx(found[0], abs=1e-3)
    assert [record.message for record in caplog.records if "beginning" in record.message] == [
        f"--clip reads the beginning alone of 3 texts: {(start + 'cat')[:60]}…"
    ]


def test_nothing_is_asked_of_a_network(scorer, pictures, monkeypatch):
    def refused(*_: object) -> None:
        raise AssertionError("a network was asked")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    assert len(scorer().scores(drawn_of(pictures))) == len(pictures)


def test_help_needs_no_torch():
    code = "import sys, benchmarks.paper.metrics; sys.exit(bool({'torch', 'transformers', 'cv2'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_several_processes_share_a_cache(scorer, pictures, tmp_path):
    """One that is writing is waited for, and what it has written is taken."""
    drawn = [Drawn(pictures[0], (pictures[1],))]
    expected = scorer("dino").scores(drawn)
    with sqlite3.connect(tmp_path / "embeddings.sqlite") as connection:
        assert connection.execute("SELECT COUNT(*) FROM embeddings").fetchone() == (2,)
    assert scorer("dino").scores(drawn) == expected
