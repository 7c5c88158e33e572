"""The page of --debug_dataset: what it shows is what is trained on; and the advice, both ways."""

from __future__ import annotations

import base64
import io
import re
import shutil
import time
from collections import Counter, defaultdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import train_network_deft
from library import pages
from library.data import advice, page
from library.data.advice import Facts
from library.data.batches import Loader
from library.data.buckets import Buckets, Fit
from library.data.examples import Examples
from library.data.plan import Dataset, Picture
from library.models.loading import outline_of
from library.options.rooms import BucketOptions, CaptionOptions, DatasetOptions, ModelOptions, SubsetOptions
from tests import small_flux, small_models
from tests.conftest import ROOT, loaded

VOID = {"meta", "img", "br"}


class Read(HTMLParser):
    """A page's articles: the file, its captions by epoch, its pictures, and all of its text."""

    def __init__(self, source: str):
        super().__init__()
        self.open: list[tuple[str, dict]] = []
        self.articles: list[dict] = []
        self.words: list[str] = []
        self.tags: Counter = Counter()
        self.addresses: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags[tag] += 1
        assert not any(name.startswith("on") for name in found)
        self.addresses += [found[name] for name in ("src", "href") if name in found]
        if tag == "article":
            self.articles.append({"title": None, "epochs": [], "images": [], "text": ""})
        if tag == "bdi" and self._in("article") and self.articles[-1]["title"] is None:
            self.articles[-1]["title"] = found["title"]
        if tag == "img":
            content = base64.b64decode(found["src"].split(",", 1)[1])
            self.articles[-1]["images"].append(Image.open(io.BytesIO(content)))
        if (tag == "li" and self._in("ol")) or (tag == "p" and found.get("class") == "caption"):
            self.articles[-1]["epochs"].append([])
        if (tag == "span" and "dir" in found) or (tag == "i" and self._in("article")):
            self.articles[-1]["epochs"][-1].append("")
        if tag not in VOID:
            self.open.append((tag, found))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.words.append(data)
        if self._in("article"):
            self.articles[-1]["text"] += data
            if self.open[-1][0] == "span" and "dir" in self.open[-1][1]:
                self.articles[-1]["epochs"][-1][-1] += data

    def _in(self, tag: str) -> bool:
        return any(name == tag for name, _ in self.open)

    @property
    def text(self) -> str:
        return "".join(self.words)


def page_of(tmp_path: Path, name: str = "cat") -> Read:
    return Read((tmp_path / "out" / f"{name}-dataset.html").read_text(encoding="utf-8"))


def picture_files(folder: Path, sizes, caption="a cat, {}, two, three, four") -> list[Path]:
    """Noise of these sizes, all different, with captions beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    made, drawn = [], np.random.default_rng(0)
    for i, (width, height) in enumerate(sizes):
        made.append(folder / f"p{i:04}.png")
        small = Image.fromarray(drawn.integers(0, 256, (4, 4, 3), np.uint8))
        small.resize((width, height), Image.Resampling.BICUBIC).save(made[-1])
        made[-1].with_suffix(".txt").write_text(caption.format(i), encoding="utf-8")
    return made


@pytest.fixture
def trained_on(monkeypatch):
    """Every `Example` of a training, with its turn and picture."""
    found, original = [], Examples.__getitem__

    def spied(self, turn):
        example = original(self, turn)
        found.append((turn, self.plan[turn.dataset].pictures[turn.picture], example))
        return example

    monkeypatch.setattr(Examples, "__getitem__", spied)
    return found


# --- what is shown is what is trained on ------------------------------------------------------------------------------


def test_captions_and_crops_are_those_of_the_training(run, tmp_path, trained_on):
    root = tmp_path / "data"
    picture_files(root / "3_a cat", [(64, 64), (80, 64), (64, 96), (70, 70), (90, 64)])
    picture_files(root / "1_b dog", [(64, 80), (100, 64)], "b dog, {}, {{x}}")
    broken = root / "3_a cat" / "p0009.png"
    broken.write_bytes((root / "3_a cat" / "p0002.png").read_bytes()[:-40])
    options = {
        "train_data_dir": root, "max_train_epochs": 4, "train_batch_size": 2, "gradient_accumulation_steps": 2,
        "shuffle_caption": True, "keep_tokens": 1, "caption_tag_dropout_rate": 0.2, "token_warmup_step": 5,
        "caption_dropout_rate": 0.1, "flip_aug": True, "random_crop": True,
    }  # fmt: skip
    assert run(**options, debug_dataset=True) == 0
    shown = page_of(tmp_path)
    assert trained_on == []
    assert run(**options) == 0
    captions = defaultdict(set)
    for turn, picture, example in trained_on:
        captions[str(picture.path), turn.epoch].add(example.caption)
    assert len(captions) == 7 * 4
    assert len({caption for found in captions.values() for caption in found}) > 20
    assert {one["title"] for one in shown.articles} == {path for path, _ in captions}
    for article in shown.articles:
        expected = [captions[article["title"], epoch] for epoch in (1, 2, 3)]
        epochs = article["epochs"] * (3 if len(article["epochs"]) == 1 else 1)
        assert list(map(set, epochs)) == expected
        turn, example = min(
            ((turn, example) for turn, p, example in trained_on if str(p.path) == article["title"]),
            key=lambda one: (one[0].epoch, one[0].place),
        )
        pixels = ((example.pixels.permute(1, 2, 0).numpy() + 1) * 127.5).round()
        pictures = [np.asarray(image, np.float32) for image in article["images"]]
        assert len(pictures) == 2
        nearest = min(np.abs(one - pixels).mean() for one in pictures if one.shape == pixels.shape)
        assert nearest < 4
        assert np.abs(pictures[0][:, ::-1] - pictures[1]).mean() < 4


def test_nothing_is_trained_and_no_weights_are_read(run, model_folder, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    weights = list(model.glob("**/*.safetensors"))
    assert len(weights) == 3
    for file in weights:
        file.unlink()
    assert run(pretrained_model_name_or_path=model, debug_dataset=True) == 0
    names = ["cat-dataset.html", "cat-dataset.jpg"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / name) for name in names]
    assert Image.open(tmp_path / "out" / "cat-dataset.jpg").width > 600


def test_what_is_left_out_is_named_with_its_reason(run, photos, tmp_path, caplog):
    files = picture_files(photos, [(64, 64)] * 3)
    files[0].write_bytes(files[0].read_bytes()[:-30])
    files[1].write_bytes(b"")
    shutil.copy(photos / "chelsea_1.jpg", photos / "copy.jpg")
    jpeg = photos / "cut.jpg"
    jpeg.write_bytes((photos / "chelsea_2.jpg").read_bytes()[:2000])
    assert run(debug_dataset=True) == 0
    shown = page_of(tmp_path)
    names = {Path(one["title"]).name for one in shown.articles}
    assert names == {*(f"chelsea_{i}.jpg" for i in range(1, 6)), "p0002.png", "copy.jpg"}
    for path in (files[0], files[1], jpeg):
        assert f"{path}: left out, it cannot be read (" in shown.text
        assert f"{path}: left out, it cannot be read (" in caplog.text
    assert "the file is empty" in shown.text
    assert "Duplicates" in shown.text
    assert shown.tags["h2"] >= 6


def test_the_log_of_a_training_names_copies_once(run, photos, caplog):
    shutil.copy(photos / "chelsea_1.jpg", photos / "copy.jpg")
    assert run() == 0
    told = [record.getMessage() for record in caplog.records if "more than once" in record.getMessage()]
    assert len(told) == 1
    assert "chelsea_1.jpg and copy.jpg" in told[0]


def test_a_mask_lies_over_its_picture(run, tmp_path):
    root, masks = tmp_path / "data", tmp_path / "masks"
    (file,) = picture_files(root / "1_a", [(64, 64)])
    masks.mkdir()
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :32] = 255
    Image.fromarray(mask).save(masks / file.name)
    assert run(train_data_dir=root, masked_loss=True, conditioning_data_dir=masks, debug_dataset=True) == 0
    (article,) = page_of(tmp_path).articles
    shown, original = (np.asarray(one, np.float32) for one in (article["images"][0], Image.open(file)))
    assert np.abs(shown - original)[:, :24].mean() < 6
    assert np.abs(shown - original)[:, 40:].mean() > 25


def test_sizes_and_tokens_are_told(run, tmp_path, model):
    root = tmp_path / "data"
    picture_files(root / "1_a", [(32, 40), (64, 64), (128, 256)], "cat " * 90)
    assert run(train_data_dir=root, debug_dataset=True) == 0
    small, same, large = (one["text"] for one in page_of(tmp_path).articles)
    assert "32 × 40, scaled to 64 × 80, cut to 64 × 64" in small
    assert "enlarged 2.0 times" in small
    assert "enlarged" not in same + large
    assert "scaled" not in same
    caption = "cat " * 90
    assert f"{len(model.tokenizers[0](caption).input_ids) - 2} of 75 tokens" in same
    rest, _ = model.beyond(caption)
    assert f"not read: {rest[:100]}" in same


def test_pictures_to_validate_on_stand_apart(run, tmp_path, photos):
    picture_files(photos, [(64, 64)] * 15)
    assert run(validation_split=0.25, debug_dataset=True, max_train_epochs=2) == 0
    source = (tmp_path / "out" / "cat-dataset.html").read_text(encoding="utf-8")
    trained, kept = (Read(f"{part}") for part in _parted(source))
    assert (len(trained.articles), len(kept.articles)) == (15, 5)
    assert not {one["title"] for one in trained.articles} & {one["title"] for one in kept.articles}


def _parted(source: str) -> tuple[str, str]:
    before, behind = source.split("<section><h2>Kept apart")
    return f"{before}</body></html>", f"<html><body><section><h2>{behind}"


# --- what users' files may be -----------------------------------------------------------------------------------------

HOSTILE = ["<script>alert(1)</script>", "</span></p></article>", '"><img src=x onerror=alert(1)>', "&lt;b&gt; & <b>"]


def test_nothing_of_the_users_is_taken_for_the_pages_own(run, tmp_path):
    root = tmp_path / "data"
    folder = root / "1_<b>'x' & \"y\""
    files = picture_files(folder, [(64, 64)] * len(HOSTILE))
    for file, words in zip(files, HOSTILE, strict=True):
        renamed = file.rename(file.with_name(words.replace("/", "") + ".png"))
        file.with_suffix(".txt").rename(renamed.with_suffix(".txt")).write_text(words, encoding="utf-8")
    assert run(train_data_dir=root, output_name="<i>&amp;", debug_dataset=True) == 0
    shown = page_of(tmp_path, "<i>&amp;")
    assert {"script", "b", "i"}.isdisjoint(shown.tags)
    assert shown.tags["img"] == shown.tags["article"] == len(HOSTILE)
    assert {one["epochs"][0][0] for one in shown.articles} == set(HOSTILE)
    assert {Path(one["title"]).stem for one in shown.articles} == {words.replace("/", "") for words in HOSTILE}
    assert all(address.startswith("data:image/jpeg;base64,") for address in shown.addresses)
    assert "What <i>&amp; would be trained on" in shown.text


@pytest.mark.parametrize("words", ["кот, 猫、 قطة", "e\u0301 \U0001f408\u200d\u2b1b", "a\u3000b"])
def test_captions_in_any_script(run, tmp_path, words):
    root = tmp_path / "data"
    (file,) = picture_files(root / "1_猫", [(64, 64)])
    file.with_suffix(".txt").write_text(words, encoding="utf-8")
    assert run(train_data_dir=root, debug_dataset=True) == 0
    (article,) = page_of(tmp_path).articles
    assert article["epochs"] == [[words]]


def test_undecodable_names_do_not_keep_the_page_from_being_written(run, tmp_path):
    root = tmp_path / "data"
    (file,) = picture_files(root / "1_a", [(64, 64)])
    try:
        file.rename(file.with_name("\udce4\x01.png"))
    except OSError:
        pytest.skip("not on this file system")
    assert run(train_data_dir=root, debug_dataset=True) == 0
    assert "\N{REPLACEMENT CHARACTER}" * 2 + ".png" in page_of(tmp_path).text


@given(st.text())
def test_text_is_what_a_browser_shows(value):
    found: list[str] = []
    parser = HTMLParser()
    parser.handle_data = found.append
    parser.handle_starttag = lambda *rest: pytest.fail("a tag")
    parser.feed(f"{pages.text(value)}\n")
    parser.close()
    kept = "".join(found)[:-1]
    assert len(kept) == len(value)
    assert all(a == b or b in "\n\t" or a == "\N{REPLACEMENT CHARACTER}" for a, b in zip(kept, value, strict=True))


def test_what_was_there_stays_when_nothing_can_be_written(run, tmp_path, monkeypatch, capsys):
    assert run(debug_dataset=True) == 0
    before = (tmp_path / "out" / "cat-dataset.html").read_bytes()

    def full(*rest):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("networks.deft_io.os.replace", full)
    assert run(debug_dataset=True, max_train_steps=9) == 2
    assert "could not be saved, what was there is untouched" in capsys.readouterr().err
    assert (tmp_path / "out" / "cat-dataset.html").read_bytes() == before
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_other_processes_write_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(debug_dataset=True) == 0
    assert not (tmp_path / "out").exists()


# --- bounds -----------------------------------------------------------------------------------------------------------


def test_two_thousand_pictures_are_a_page_of_bounded_size(run, tmp_path):
    root, drawn = tmp_path / "data" / "1_a", np.random.default_rng(0)
    root.mkdir(parents=True)
    for width in range(64, 129, 8):
        noise = Image.fromarray(drawn.integers(0, 256, (64, width, 3), np.uint8))
        noise.save(root / f"{width}.jpg")
        content = (root / f"{width}.jpg").read_bytes()
        for i in range(222):
            (root / f"{width}_{i}.jpg").write_bytes(content + i.to_bytes(2, "big"))
    buckets = {
        "enable_bucket": True,
        "bucket_no_upscale": True,
        "bucket_reso_steps": 32,
        "resolution": 128,
        "min_bucket_reso": 64,
    }
    start = time.monotonic()
    assert run(train_data_dir=root.parent, debug_dataset=True, **buckets) == 0
    assert time.monotonic() - start < 60
    assert (tmp_path / "out" / "cat-dataset.html").stat().st_size < 8e6
    shown = page_of(tmp_path)
    assert len(shown.articles) == page.SHOWN
    more = [int(number.replace(",", "")) for number in re.findall(r"and ([\d,]+) more pictures? of ", shown.text)]
    assert page.SHOWN + sum(more) == 9 * 223


@settings(max_examples=50)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 60))
def test_the_buckets_share_the_room(counts, most):
    pictures = [made(bucket=(64 * (i + 1), 64)) for i, count in enumerate(counts) for _ in range(count)]
    shown = page.chosen((Dataset(DatasetOptions((), BUCKETS), tuple(pictures)),), most)
    assert len(shown) == len(set(shown)) == min(most, len(pictures))
    found = Counter(pictures[place].fit.bucket[0] // 64 - 1 for _, place in shown)
    fullest = max(found.values())
    assert all(found[i] >= min(count, fullest - 1) for i, count in enumerate(counts))


# --- advice -----------------------------------------------------------------------------------------------------------

BUCKETS = BucketOptions((512, 512), enable_bucket=True)
SUBSET = SubsetOptions("10_sks cat", class_tokens="sks cat", num_repeats=10)
REG = SubsetOptions("1_cat", class_tokens="cat", is_reg=True)
_FITTED = Buckets(BUCKETS)


def made(number=0, caption="sks cat, {}", subset=SUBSET, repeats=10, size=(800, 800), bucket=(512, 512), **rest):
    resized = rest.pop("resized", bucket)
    return Picture(Path(f"{subset.name}/{number}.png"), caption.format(number), subset, repeats, size,
                   Fit(bucket, resized), rest.pop("buckets", _FITTED))  # fmt: skip


def said(pictures, steps=1500, batch=1, **rest) -> list[str]:
    """The rules that speak up."""
    plan = (Dataset(DatasetOptions((), BUCKETS, batch), tuple(pictures)),)
    facts = Facts(Loader(plan, None, 0, steps=steps), **rest)
    found = [rule.found.__name__ for rule in advice.RULES if rule.found(facts, rule.limit)]
    assert len(found) == len(list(advice.advice(facts)))
    return found


GOOD = [made(i) for i in range(15)]
OTHER = SubsetOptions("b", class_tokens="dog")


@pytest.mark.parametrize(
    ("rule", "bad", "good"),
    [
        ("few_pictures", {"pictures": GOOD[:3], "steps": 200}, {"pictures": GOOD[:5], "steps": 500}),
        ("ends_early", {"pictures": [made(i, repeats=100) for i in range(15)], "steps": 1400}, {"steps": 300}),
        ("few_views", {"pictures": [made(i, repeats=1) for i in range(15)], "steps": 150}, {"steps": 700}),
        ("many_views", {"steps": 9000}, {"steps": 3000}),
        ("without_trigger", {"pictures": [*GOOD, made(15, "a cat")]},
         {"pictures": [made(i, "on a chair, {}") for i in range(15)]}),
        ("without_trigger", {"trigger": "xyz"}, {"trigger": "sks"}),
        ("same_captions", {"pictures": [made(i, "a sks cat here") for i in range(15)]},
         {"pictures": [made(i, "sks cat") for i in range(15)]}),
        ("cut_captions", {"cut": [Path("a"), Path("b")]}, {"cut": []}),
        ("alone_in_bucket", {"pictures": [*GOOD, made(15, bucket=(640, 384))], "batch": 2},
         {"pictures": [*GOOD, made(15, bucket=(640, 384))]}),
        ("batches_never_full", {"pictures": [made(i, repeats=1) for i in range(15)], "batch": 16, "steps": 100},
         {"pictures": GOOD, "batch": 15, "steps": 100}),
        ("drowned", {"pictures": [*GOOD, *(made(i, "dog {}", OTHER, 1) for i in range(12))], "steps": 3000},
         {"pictures": [*GOOD, *(made(i, "dog {}", OTHER, 1) for i in range(100))], "steps": 9000}),
        ("enlarged", {"pictures": [*GOOD, made(15, size=(300, 300))]},
         {"pictures": [*GOOD, made(15, size=(400, 400))]}),
        ("cut_off", {"pictures": [made(i, resized=(1024, 512), buckets=Buckets(BucketOptions((512, 512))))
                                  for i in range(15)]},
         {"pictures": [made(i, resized=(768, 512), buckets=Buckets(BucketOptions((512, 512)))) for i in range(15)]}),
        ("few_regular", {"pictures": [*GOOD, *(made(i, "cat", REG) for i in range(8))], "steps": 3000},
         {"pictures": [*GOOD, *(made(i, "cat", REG, 1) for i in range(150))], "steps": 3000}),
        ("few_kept", {"kept": (Dataset(DatasetOptions((), BUCKETS), (made(20),)),)},
         {"kept": (Dataset(DatasetOptions((), BUCKETS), (made(20), made(21))),)}),
        ("copies", {"duplicates": [[Path("a"), Path("b")]]}, {"duplicates": []}),
    ],
)  # fmt: skip
def test_a_rule_speaks_of_what_it_is_for_and_of_nothing_else(rule, bad, good):
    assert said(**({"pictures": GOOD} | bad)) == [rule]
    assert said(**({"pictures": GOOD} | good)) == []


def test_every_rule_is_tried():
    tried = {mark.args[1][i][0] for mark in test_a_rule_speaks_of_what_it_is_for_and_of_nothing_else.pytestmark
             for i in range(len(mark.args[1]))}  # fmt: skip
    assert tried == {rule.found.__name__ for rule in advice.RULES}


@pytest.mark.parametrize("number", [20, 150, 3000])
@pytest.mark.parametrize("batch", [1, 4])
def test_good_data_sets_are_not_spoken_of(number, batch):
    sizes = [(512, 512), (448, 576), (576, 448)]
    pictures = [made(i, "sks cat, {}, a tag", repeats=1, bucket=sizes[i % 3]) for i in range(number)]
    assert said(pictures, steps=max(number * 100 // batch, 1) if number < 1000 else number * 5, batch=batch) == []


def test_regularisation_pictures_alone_are_no_reason_to_stop():
    """Where all others could not be read."""
    assert "few_pictures" in said([made(i, "cat", REG) for i in range(3)])


def test_tag_dropout_and_prefixes_do_not_count_as_missing_triggers():
    options = CaptionOptions(caption_prefix="sks cat", caption_tag_dropout_rate=0.9, caption_dropout_rate=0.9)
    subset = SubsetOptions("1_sks cat", class_tokens="sks cat", captions=options)
    assert said([made(i, "on a chair, {}", subset) for i in range(15)]) == []


def test_the_quickstarts_are_good_examples(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(ROOT)
    for name in ("creature", "photos"):
        more = ["--pretrained_model_name_or_path", "library/world/model", "--output_dir", str(tmp_path)]
        file = f"configs/quickstart/{name}.toml"
        assert train_network_deft.main(["--config_file", file, "--debug_dataset", *more]) == 0
    assert len(list(tmp_path.iterdir())) == 4
    assert not [file for file in tmp_path.glob("*.html") if "Before you train" in file.read_text(encoding="utf-8")]


def test_advice_is_in_the_log_of_a_training_too(run, caplog):
    caplog.set_level("INFO")
    assert run(train_batch_size=8) == 0
    assert "--train_batch_size 8: no size of pictures comes more than 5 times in an epoch: batches are" in caplog.text


# --- models without their weights -------------------------------------------------------------------------------------

CAPTIONS = ["a cat", "", "a (cat:1.3) of <b>, with “quotes”", "dog " * 300]


@pytest.mark.parametrize("kind", ["sd15", "sd2", "sdxl"])
@pytest.mark.parametrize("options", [{}, {"max_token_length": 225, "weighted_captions": True}])
def test_stable_diffusion_is_known_without_its_weights(tmp_path, kind, options):
    folder = small_models.build(kind, tmp_path / "model")
    _assert_known(folder, **options)
    file, tokenizer = tmp_path / "model.safetensors", str(folder / "tokenizer")
    save_file(small_models.single_file(loaded(folder).pipeline), file)
    of_folder, of_file = (
        outline_of(ModelOptions(str(path), tokenizer=tokenizer, **options)) for path in (folder, file)
    )
    assert of_file.multiple_of == 8
    assert len(of_file.encoders) == len(of_folder.encoders)
    for one, other in zip(of_file.encoders, of_folder.encoders, strict=True):
        assert (one.name, one.length) == (other.name, other.length)
        assert [one.ids(caption) for caption in CAPTIONS] == [other.ids(caption) for caption in CAPTIONS]


@pytest.mark.parametrize("dev", [True, False])
def test_flux_is_known_without_its_weights(tmp_path, dev):
    small = small_flux.build(tmp_path, dev)
    _assert_known(small.folder)
    files = small.files(tmp_path)
    given_files = {name: str(path) for name, path in files.items() if name != "pretrained_model_name_or_path"}
    given_files["tokenizer_cache_dir"] = str(small.tokenizers)
    found = outline_of(ModelOptions(str(files["pretrained_model_name_or_path"]), **given_files))
    assert [(one.name, one.length) for one in found.encoders] == [("CLIP-L", 75), ("T5", 511 if dev else 255)]
    assert found.multiple_of == 16


def _assert_known(path: Path, **options) -> None:
    outline, model = outline_of(ModelOptions(str(path), **options)), loaded(path, **options)
    assert outline.multiple_of == model.multiple_of
    assert len(outline.encoders) == len(model.text_encoders)
    last = outline.encoders[-1]
    for caption in CAPTIONS:
        assert (last.beyond(caption), last.length) == model.beyond(caption)
    for encoder, reader in zip(outline.encoders, getattr(model, "readers", []), strict=False):
        for caption in CAPTIONS[:3]:
            ids = torch.tensor(encoder.ids(caption), dtype=torch.int64)
            assert torch.equal(reader.tokens([caption])[0, 0, 1 : len(ids) + 1], ids)


def test_a_preview_is_the_same_for_the_same_seed(tmp_path, run):
    given_options = {"shuffle_caption": True, "flip_aug": True, "debug_dataset": True}
    pages = []
    for seed in (1, 1, 2):
        assert run(**given_options, seed=seed) == 0
        pages.append((tmp_path / "out" / "cat-dataset.html").read_bytes())
    assert pages[0] == pages[1] != pages[2]
