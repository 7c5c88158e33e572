"""Captions, metadata files, token ids and weights, against sd-scripts' own data sets and strategies, each side in its
own Python.

SD_SCRIPTS_DIR=... SD_SCRIPTS_PYTHON=... pytest tests/integration/test_captions.py -s

SD_SCRIPTS_CLIP_TOKENIZER: a folder with CLIP's published tokenizer, to compare with that one too.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from library.data import captions, metadata_file
from library.data.remarks import Remarks
from library.models import clip
from library.options.rooms import CaptionOptions
from tests import small_flux, small_models
from tests.conftest import loaded, relative_error
from tests.integration.conftest import needs_sd_scripts, run_script

pytestmark = needs_sd_scripts

ROWS, TEXTS, ENCODED = 20_000, 400, 60
LENGTHS = (None, 75, 150, 225)
T5, CLIP_SKIP = 64, 2
PUBLISHED = os.environ.get("SD_SCRIPTS_CLIP_TOKENIZER")
CACHES = ("tokenizers", "published") if PUBLISHED else ("tokenizers",)
CLIP_L = "openai_clip-vit-large-patch14"
SD2 = "stabilityai_stable-diffusion-2"
TOKENIZERS: dict[str, dict] = {CLIP_L: {}, "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k": {}, SD2: {"pad_token": "!"}}
PADDINGS = {"sd15": (None,), "sd2": (0,), "sdxl": (None, 0)}  # of each encoder's tokens; None: the end

WORDS = (
    *("cat", "a red house", "1girl", "", " ", "sks  dog ", "日本", "é", "\u2028", "(w:1.2)", "|||", "|||", ";;", ";;"),
    *("{a|b}", "{x|}", "{{brace}}", "{", "}", "{a|{b|c}}", "{one}", "{ c | d d | é }"),
)
PIECES = (
    *("cat", "a dog", " ", ", ", "!", "é", "日", "x" * 30, "\n", "1.5", "(", ")", "[", "]", "(", ")"),
    *(
        "“quoted”",
        "’s",
        "…",
        "ﬁne",
        "ＡＢＣ ",
        "&amp;",
        "\ufeff",
        "\u200b",
        "İ",
        "ΑΣ ",
        "e\u0301",
        "Ã©",
        "\t",
        "½",
        "😀",
    ),
    *(":1.3)", ":0.5)", ":-2)", ":+.5)", ":", "\\", "\\(", "\\)", "\\[", "\\]", "\\\\"),
)
EDGES = (
    *("", "a cat", "hello! no humans!", f"{'x' * 74}(yy:1.5)[z]", f"({'x' * 149}:0.7)yy", f"({'x' * 300}:2)"),
    *("(!:1.5)", f"{'x' * 75}(!!:1.5)", *("x" * n for n in (74, 75, 76, 77, 149, 150, 151, 152, 224, 225, 226, 300))),
)  # a letter of the small tokenizer's is a token


def some_options(draw: random.Random) -> CaptionOptions:
    def one(*values: Any) -> Any:
        return draw.choice(values)

    return CaptionOptions(
        caption_separator=one(",", ",", ", ", ";", "。", " "),
        shuffle_caption=one(True, False),
        keep_tokens=one(0, 0, 1, 2, 5, -1),
        keep_tokens_separator=one(None, "", "|||", ","),
        secondary_separator=one(None, "", ";;", ","),
        enable_wildcard=one(True, False),
        caption_prefix=one(None, "", "photo of", "{p|q},"),
        caption_suffix=one(None, "", ", end", "||| last"),
        caption_dropout_rate=one(0, 0, 0.1, 0.5, 1.0),
        caption_dropout_every_n_epochs=one(0, 0, 1, 2, 3),
        caption_tag_dropout_rate=one(0, 0, 0.1, 0.7, 1),
        token_warmup_min=one(0, 1, 1, 3, 10),
        token_warmup_step=one(0, 0, 0.001, 0.5, 0.99, 1, 2.5, 7, 100),
    )


def some_caption(draw: random.Random) -> str:
    separator = draw.choice((",", ", ", ";", " ", "。"))
    lines = [separator.join(draw.choices(WORDS, k=draw.randrange(9))) for _ in range(draw.choice((1, 1, 1, 2, 4)))]
    return "\n".join(lines)


def some_text(draw: random.Random) -> str:
    """A weighted caption: brackets, backslashes and numbers anywhere."""
    return "".join(draw.choices(PIECES, k=draw.choice((0, 1, 3, 8, 20, 60))))


def rows() -> list[dict[str, Any]]:
    draw = random.Random(0)
    return [
        {"caption": some_caption(draw), "options": asdict(some_options(draw)), "epoch": draw.randrange(1, 7),
         "step": draw.randrange(12), "steps": draw.choice((10, 11, 1000)), "seed": number, "times": 3}
        for number in range(ROWS)
    ]  # fmt: skip


def texts() -> list[str]:
    """The first ones are encoded, too."""
    draw = random.Random(1)
    return [*EDGES, *(some_text(draw) for _ in range(TEXTS - len(EDGES)))]


def flux_texts() -> list[str]:
    """In one line: for the small T5 tokenizer, transformers' versions do not agree on what whitespace is."""
    return [" ".join(text.split()) for text in texts()]


def write_pictures(folder: Path) -> dict[str, dict[str, Any]]:
    """Pictures with metadata files and captions beside them; returns each data set's arguments."""
    images = folder / "images"
    (images / "sub").mkdir(parents=True)
    names = ["a.png", "b.jpg", "long name, with (signs).png", "日本.webp", "sub/c.png", "d.e.png", "one_1_2_3_4.png"]
    for name in names:
        Image.new("RGB", (16, 24)).save(images / name)
    captions_beside = {"a": "  first \n\nsecond\r\nthird\x0bfourth\r", "b": "one, line\u2028still", "日本": "日本\n二",
                       "d.e": "dots", "one": "of the face"}  # fmt: skip
    for name, text in captions_beside.items():
        (images / f"{name}.txt").write_bytes(text.encode())
    values = [{"caption": "a cat", "tags": "1girl, solo"}, {"tags": "only, tags"}, {"caption": "only a caption"},
              {"caption": "two\n\nlines", "tags": "more\ntags"}, {"caption": "x", "image_size": [16, 24]},
              {"caption": "", "tags": ""}, {"caption": "c", "tags": "", "train_resolution": [64, 64]}]  # fmt: skip
    relative = dict(zip(names, values, strict=True))
    absolute = {str(images / name): value for name, value in relative.items()}
    for name, found in (("relative.json", relative), ("absolute.json", absolute)):
        (folder / name).write_text(json.dumps(found), encoding="utf-8")
    lines = [json.dumps({"image_path": key} | value, ensure_ascii=False) for key, value in absolute.items()]
    (folder / "lines.jsonl").write_text("\n".join(lines), encoding="utf-8")
    sets: dict[str, dict[str, Any]] = {}
    for wildcard in (False, True):
        for separator in (",", " | "):
            more = {"enable_wildcard": wildcard, "caption_separator": separator}
            for file in ("relative.json", "absolute.json", "lines.jsonl"):
                sets[f"{file} {more}"] = more | {"metadata_file": str(folder / file), "image_dir": str(images)}
        sets[f"beside {wildcard}"] = {"enable_wildcard": wildcard, "caption_separator": ",", "image_dir": str(images),
                                      "caption_extension": ".txt", "class_tokens": "a class"}  # fmt: skip
    return sets


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("captions")
    for kind in small_models.UNETS:
        small_models.build(kind, folder / kind)
    small_flux.build(folder / "flux")
    for name, changes in TOKENIZERS.items():
        small_models.tokenizer(folder / "tokenizers" / name, **changes)
        if PUBLISHED:
            shutil.copytree(PUBLISHED, folder / "published" / name)
            for file in ("tokenizer_config.json", "special_tokens_map.json"):
                settings = folder / "published" / name / file
                settings.write_text(json.dumps(json.loads(settings.read_text(encoding="utf-8")) | changes))
    asked = {"rows": rows(), "texts": texts(), "encoded": ENCODED, "lengths": LENGTHS, "tokenizers": CACHES,
             "clip_skip": CLIP_SKIP, "t5": T5, "flux": flux_texts()}  # fmt: skip
    asked["pictures"] = write_pictures(folder / "pictures")
    (folder / "rows.json").write_text(json.dumps(asked), encoding="utf-8")
    run_script(Path(__file__).with_name("captions_side.py"), folder, with_deft=False)
    return folder


@pytest.fixture(scope="module")
def theirs(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "found.safetensors")


def test_captions(folder):
    """Identical, and the random source is left in the same state."""
    found = json.loads((folder / "found.json").read_text(encoding="utf-8"))["captions"]
    changed = 0
    for row, (wanted, following) in zip(rows(), found, strict=True):
        draw = random.Random(row["seed"])
        times = {key: row[key] for key in ("epoch", "step", "steps")}
        options = CaptionOptions(**row["options"])
        ours = [captions.process(row["caption"], options, **times, random=draw) for _ in range(row["times"])]
        assert ours == wanted, row
        assert draw.random() == following, row
        changed += sum(one not in ("", row["caption"]) for one in ours)
    print(f"--- {len(found)} rows, {3 * len(found)} captions identical; {changed} of them neither as given nor dropped")
    assert changed > len(found)


def test_pictures_and_captions_of_files(folder):
    asked = json.loads((folder / "rows.json").read_text(encoding="utf-8"))["pictures"]
    found = json.loads((folder / "found.json").read_text(encoding="utf-8"))["pictures"]
    assert found.keys() == asked.keys()
    for name, row in asked.items():
        options = CaptionOptions(enable_wildcard=row["enable_wildcard"], caption_separator=row["caption_separator"])
        if "metadata_file" in row:
            entries = metadata_file.read(Path(row["metadata_file"]), row["image_dir"], options, Remarks())
            ours = [[str(one.path), one.caption, one.size and list(one.size)] for one in entries]
            assert ours == [wanted[1:] for wanted in found[name]], name
        else:
            for _, path, caption, _ in found[name]:
                there = [file for file in captions.beside(Path(path), ".txt") if file.is_file()]
                assert (captions.read(there[0], options, Remarks()) if there else "a class") == caption, path
    print(f"--- {len(asked)} data sets, {sum(map(len, found.values()))} captions identical")


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", PADDINGS)
def test_ids_and_weights(folder, theirs, kind, length, cache):
    tokenizer = CLIPTokenizer.from_pretrained(str(folder / cache / (SD2 if kind == "sd2" else CLIP_L)))
    for i, padding in enumerate(PADDINGS[kind]):
        padding = tokenizer.eos_token_id if padding is None else padding
        name = f"{cache} {kind} {length}"
        plain = clip.Reader(tokenizer, padding, 77, length)
        assert torch.equal(plain.tokens(texts()), theirs[f"{name} plain {i}"].view(TEXTS, -1, 77))
        assert plain.weights(texts()) is None
        reader = clip.Reader(tokenizer, padding, 77, length, weighted=True)
        assert torch.equal(reader.tokens(texts()), theirs[f"{name} ids {i}"].view(TEXTS, -1, 77))
        ours, wanted = reader.weights(texts()), theirs[f"{name} weights {i}"].view(TEXTS, -1, 77)
        assert torch.equal(ours[:, 1:-1], wanted[:, :, 1:-1].flatten(1))
        assert (wanted[:, :, [0, -1]] == 1).all()
        assert (ours[:, [0, -1]] == 1).all()
        other = (ours != 1).sum()
        print(f"--- {name}, encoder {i}: ids and weights of {TEXTS} captions identical, {other} weights other than 1")
        assert other > 1000


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", PADDINGS)
def test_weighted_states(folder, theirs, kind, length):
    skip = None if kind == "sdxl" else CLIP_SKIP
    model = loaded(folder / kind, clip_skip=skip, max_token_length=length, weighted_captions=True)
    with torch.no_grad():
        ours = model.encode_text(texts()[:ENCODED])
        plain = loaded(folder / kind, clip_skip=skip, max_token_length=length).encode_text(texts()[:ENCODED])
    assert float((ours["hidden"] - plain["hidden"]).abs().max()) > 0.1
    for part, value in ours.items():
        wanted = theirs[f"tokenizers {kind} {length} {part}"]
        assert value.shape == wanted.shape
        error = max(relative_error(a, b) for a, b in zip(value, wanted, strict=True))
        print(f"--- {kind} {length} {part}: largest relative error {error:.1e}")
        assert error < 1e-5


def test_flux_ids_and_masks(folder, theirs):
    """What the family hands its encoders."""
    model = loaded(folder / "flux" / "model", t5xxl_max_token_length=T5, apply_t5_attn_mask=True)
    pipeline = model.pipeline
    seen: dict[str, Any] = {}
    pipeline.text_encoder.register_forward_pre_hook(lambda _, given: seen.update(short=given[0]))
    pipeline.text_encoder_2.register_forward_pre_hook(lambda _, given: seen.update(long=given[0], mask=given[1]))
    model.encode_text(flux_texts())
    assert torch.equal(seen["short"], theirs["flux 0"])
    assert torch.equal(seen["long"], theirs["flux 1"])
    assert torch.equal(seen["mask"], theirs["flux 2"])
    print(f"--- FLUX: ids of both tokenizers and masks of {TEXTS} captions identical")
