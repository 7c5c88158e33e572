"""Input pictures: instructions in JSON lines, batches, caches, conditions that are left out, losses, samples."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from torch import nn

from library.data import augment, captions, instructions
from library.data.batches import Loader, Turn, joined
from library.data.examples import Examples, drawn
from library.data.index import Index
from library.data.plan import Plan, divided, fingerprint, pictures, plan_of
from library.data.remarks import Remarks
from library.data.resizing import INPUT_STEPS, input_crop
from library.data.streams import Purpose, stream
from library.models.family import Family
from library.models.omnigen import OmniGen
from library.options.parse import parse
from library.options.rooms import CaptionOptions, DataOptions
from library.prompts import Prompt, read_prompts
from library.training import inputs, prepare
from library.training.randoms import Randoms
from networks.deft_config import DeftError
from tests.conftest import ROOT, arguments, in_two_processes, loaded
from tests.processes import code_of, start
from tests.small_omnigen import build
from tests.test_data_sets import losses_of
from tests.test_resume import RECORD, SCRIPT, assert_equal, tensors, wait_until
from tests.test_resume import run as run_apart

PLACES = "<img><|image_1|></img>"
TWO_PLACES = f"{PLACES} with the hat of <img><|image_2|></img>"
CPU = torch.device("cpu")
NEEDED = ["--pretrained_model_name_or_path", "m", "--output_dir", "o", "--resolution", "64"]


def picture(path: Path, size: tuple[int, int] = (64, 64), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8)
    Image.fromarray(values).resize(size).save(path)
    return path


def rows_of(folder: Path) -> list[dict]:
    """Of 0, 1 and 2 input pictures, of which one is used twice."""
    for i, (size, of_input) in enumerate([((64, 64), (64, 64)), ((80, 64), (96, 48)), ((64, 64), (64, 64))]):
        picture(folder / "out" / f"{i}.png", size, i)
        picture(folder / "in" / f"{i}.png", of_input, 10 + i)
    return [
        {"task_type": "text_to_image", "instruction": "a cat", "input_images": [], "output_image": "out/0.png"},
        {"instruction": f"{PLACES} in snow", "input_images": ["in/1.png"], "output_image": "out/1.png"},
        {"instruction": TWO_PLACES, "input_images": ["in/0.png", "in/1.png"], "output_image": "out/2.png"},
    ]


def written(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def options_of(file: Path, *more: str) -> DataOptions:
    return parse([*NEEDED, "--train_jsonl", str(file), *more]).data


def planned(options: DataOptions, remarks: Remarks | None = None) -> Plan:
    return plan_of(options, Index(), Remarks() if remarks is None else remarks)


@pytest.fixture
def rows(tmp_path) -> Path:
    return written(tmp_path / "data" / "rows.jsonl", rows_of(tmp_path / "data"))


# --- the file --------------------------------------------------------------------------------------------------------


def test_rows_of_no_one_and_two_pictures(rows):
    found = list(pictures(planned(options_of(rows))))
    assert [one.caption for one in found] == ["a cat", f"{PLACES} in snow", TWO_PLACES]
    assert [[one.path.name for one in row.inputs] for row in found] == [[], ["1.png"], ["0.png", "1.png"]]
    assert [one.crop.size for one in found[2].inputs] == [(64, 64), (96, 48)]


def test_files_as_people_have_them(tmp_path):
    """A mark at the beginning, Windows' line ends and paths, blank lines, any script, paths from elsewhere."""
    picture(tmp_path / "bilder" / "für" / "猫.png")
    row = {"instruction": "eine\nkatze, 猫\u2028", "output_images": ["für\\猫.png"], "input_images": None}
    file = tmp_path / "elsewhere" / "rows.jsonl"
    file.parent.mkdir()
    text = f"\ufeff\r\n{json.dumps(row, ensure_ascii=False)}\r\n  \r\n{json.dumps(row)}\r\n"
    file.write_bytes(text.encode())
    one, two = instructions.read(file, str(tmp_path / "bilder"))
    assert one == two
    assert one.instruction == "eine katze, 猫"
    assert one.output == tmp_path / "bilder" / "für" / "猫.png"
    absolute = {"instruction": "", "output_image": str(one.output)}
    assert instructions.read(written(tmp_path / "b.jsonl", [absolute]), None)[0].output == one.output


def mistakes() -> dict[str, tuple[object, str]]:
    good = {"instruction": f"{PLACES} red", "input_images": ["in/0.png"], "output_image": "out/0.png"}
    return {
        "no JSON": ('{"instruction": "a"', "not JSON"),
        "a path of Windows": (r'{"output_image": "C:\data\x.png"}', "backslashes have to be doubled"),
        "a path of Windows that is JSON": (
            r'{"instruction": "a", "output_image": "C:\new.png"}', "backslashes have to be doubled",
        ),
        "a list": ([good], "must be an object"),
        "a number": ("1" * 5000, "not JSON"),
        "no instruction": ({"output_image": "out/0.png"}, "no instruction"),
        "no output": ({"instruction": "a"}, "no output_image"),
        "an unknown key": (good | {"input_image": []}, "unknown key 'input_image' (did you mean 'input_images'?)"),
        "an instruction that is none": (good | {"instruction": 3}, "instruction = 3: must be a text"),
        "half a character": (good | {"instruction": "\ud83d"}, "half a character"),
        "an empty path": (good | {"output_image": ""}, "output_image = '': must be a path"),
        "inputs that are no list": (good | {"input_images": "in/0.png"}, "must be a list of paths"),
        "several outputs": ({"instruction": "a", "output_images": ["out/0.png"] * 2}, "must be a list of one path"),
        "both outputs": (good | {"output_images": ["out/0.png"]}, "without output_image beside it"),
        "a missing input": (good | {"input_images": ["in/9.png"]}, "no such file:"),
        "a missing output": (good | {"output_image": "out/9.png"}, "no such file:"),
        "a name that is too long": (good | {"output_image": "x" * 5000}, "no such file:"),
        "a name with a zero": (good | {"output_image": "\0"}, "no such file:"),
        "too many pictures": (good | {"input_images": ["in/0.png"] * 2}, "as in <img><|image_2|></img>"),
        "too few pictures": (good | {"input_images": []}, "it names <|image_1|>, and there are 0 input pictures"),
        "no place": (good | {"instruction": "red"}, "it has to name its input pictures, as in <img><|image_1|></img>"),
        "counted from 0": (good | {"instruction": "<img><|image_0|></img>"}, "it names <|image_0|>, and there is 1"),
        "a place without its frame": (good | {"instruction": "<|image_1|> red"}, "has to be written <img><|image_1|>"),
    }  # fmt: skip


@pytest.mark.parametrize("name", mistakes())
def test_every_mistake_is_one_line_that_names_file_and_line(rows, name):
    row, told = mistakes()[name]
    with rows.open("a", encoding="utf-8") as file:
        file.write("\n" + (row if isinstance(row, str) else json.dumps(row)) + "\n")
    with pytest.raises(DeftError) as error:
        instructions.read(rows, None)
    assert str(error.value).startswith(f"{rows}, line 5: ")
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_further_faulty_lines_are_named(rows):
    with rows.open("a", encoding="utf-8") as file:
        file.write("1\n" * 9)
    with pytest.raises(DeftError, match=r"line 4: must be .* \(8 more lines are wrong: 5, 6, 7, 8, 9, \.\.\.\)"):
        instructions.read(rows, None)


def test_files_that_are_none(tmp_path, rows):
    for content, told in ((b"\n", "has no rows"), ('{"a": "ä"}'.encode("latin-1"), "not UTF-8"),
                          ("[]".encode("utf-16"), "not UTF-8")):  # fmt: skip
        (tmp_path / "b.jsonl").write_bytes(content)
        with pytest.raises(DeftError, match=told):
            instructions.read(tmp_path / "b.jsonl", None)
    with pytest.raises(DeftError, match="train_jsonl: no such file"):
        instructions.read(tmp_path / "no.jsonl", None)
    with pytest.raises(DeftError, match="image_path: no such folder"):
        instructions.read(rows, str(tmp_path / "nowhere"))


# --- options ---------------------------------------------------------------------------------------------------------


def test_instructions_beside_folders_and_in_a_data_set(tmp_path, rows):
    picture(tmp_path / "kohya" / "3_sks cat" / "a.png", (64, 64), 5)
    (dataset,) = planned(options_of(rows, "--train_data_dir", str(tmp_path / "kohya"), "--dataset_repeats", "2"))
    assert [(one.caption, one.repeats) for one in dataset.pictures][:2] == [("sks cat", 3), ("a cat", 2)]
    config = tmp_path / "sets.toml"
    config.write_text(
        f"""
[general]
resolution = 64
[[datasets]]
batch_size = 2
  [[datasets.subsets]]
  train_jsonl = '{rows.parent / "moved" / "rows.jsonl"}'
  image_path = '{rows.parent}'
  num_repeats = 4
  condition_dropout_prob = 0.5
  [[datasets.subsets]]
  image_dir = '{tmp_path / "kohya" / "3_sks cat"}'
  class_tokens = "a cat"
  shuffle_caption = true
"""
    )
    (rows.parent / "moved").mkdir()
    rows.rename(rows.parent / "moved" / "rows.jsonl")
    (dataset,) = planned(parse([*NEEDED, "--dataset_config", str(config)]).data)
    assert [one.repeats for one in dataset.pictures] == [4, 4, 4, 1]
    assert dataset.pictures[0].subset.captions.condition_dropout_prob == 0.5


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--shuffle_caption"], "--shuffle_caption and --train_jsonl do not go together: instructions are sentences"),
        (["--flip_aug"], "--flip_aug and --train_jsonl do not go together: the input pictures would stay"),
        (["--caption_dropout_rate", "0.1", "--condition_dropout_prob", "0.1"], "give one of them"),
        (["--in_json", "x.json"], "--in_json and --train_jsonl do not go together"),
        (["--condition_dropout_prob", "1.5"], "must be from 0 to 1"),
        (["--max_input_image_size", "100"], "must be a multiple of 16"),
    ],
)
def test_what_does_not_go_together_is_refused(more, told):
    with pytest.raises(DeftError) as error:
        parse([*NEEDED, "--train_jsonl", "rows.jsonl", *more])
    assert told in str(error.value)


def test_what_has_no_effect_is_told(tmp_path, caplog):
    parse([*NEEDED, "--train_data_dir", "x", "--image_path", "y"])
    assert "--image_path: no effect without --train_jsonl" in caplog.text
    subset = "  [[datasets.subsets]]\n"
    for lines, told in (
        ("train_jsonl = 'a'\nimage_dir = 'b'", "leave image_dir out"),
        ("train_jsonl = 'a'\nis_reg = true", "is_reg means nothing with a train_jsonl"),
        ("image_dir = 'a'\nimage_path = 'b'", "image_path is what paths in a train_jsonl"),
    ):
        (tmp_path / "c.toml").write_text(f"[[datasets]]\n{subset}{lines}\n")
        with pytest.raises(DeftError, match=told):
            parse([*NEEDED, "--dataset_config", str(tmp_path / "c.toml")])


# --- sizes and batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "most", "resized", "cut"),
    [
        ((1024, 1024), 1024, (1024, 1024), (1024, 1024)),
        ((1000, 750), 1024, (1000, 750), (992, 736)),
        ((4032, 3024), 1024, (1024, 768), (1024, 768)),
        ((3000, 2001), 512, (512, 341), (512, 336)),
        ((100, 30), 64, (64, 19), (64, 16)),
        ((17, 9), 1024, (30, 16), (16, 16)),
        ((1025, 600), 1024, (1024, 599), (1024, 592)),
    ],
)
def test_sizes_are_those_of_omnigens_own_training(size, most, resized, cut):
    """Computed with `crop_arr` of VectorSpaceLab/OmniGen."""
    found = input_crop(size, most)
    assert (found.resized, found.size) == (resized, cut)


@settings(deadline=None)
@given(st.tuples(st.integers(1, 9000), st.integers(1, 9000)), st.integers(1, 128).map(lambda steps: steps * 16))
def test_input_pictures_are_cut_in_the_middle_to_whole_steps(size, most):
    try:
        found = input_crop(size, most)
    except DeftError:
        assert max(size) * INPUT_STEPS > min(size) * most
        return
    for side, scaled, place in zip(found.size, found.resized, found.place, strict=True):
        assert side % INPUT_STEPS == 0
        assert 0 < side <= scaled < side + INPUT_STEPS
        assert place == (scaled - side) // 2
    assert max(found.size) <= most


def test_an_input_picture_of_the_wanted_ones_size_shows_the_same(tmp_path):
    """And one of the drawn picture's proportions, as the samples have it."""
    for name, size in (("edges", (300, 200)), ("wanted", (300, 200)), ("other", (300, 208))):
        picture(tmp_path / f"{name}.png", size)
    row = {"instruction": TWO_PLACES, "input_images": ["edges.png", "other.png"], "output_image": "wanted.png"}
    options = options_of(written(tmp_path / "rows.jsonl", [row]), "--max_input_image_size", "32")
    (found,) = pictures(planned(options))
    edges, other = found.inputs
    assert (edges.crop.resized, edges.crop.size) == (found.fit.resized, found.fit.bucket) == ((96, 64), (64, 64))
    assert edges.crop.place == (16, 0)
    assert other.crop.size == (32, 16)
    files = tuple(str(tmp_path / name) for name in ("edges.png", "other.png"))
    (drawn_with,) = inputs.encoded([Prompt("", width=96, height=64, inputs=files)], Model(), options, CPU)
    assert [tuple(one.shape) for one in drawn_with] == [(3, 64, 96), (3, 16, 32)]


def test_a_batchs_rows_are_equally_long(tmp_path):
    rng, rows = random.Random(1), []
    sizes = [(64, 64), (96, 48), (48, 96), (64, 128)]
    for i in range(40):
        names = [f"in/{rng.randrange(4)}.png" for _ in range(rng.randrange(3))]
        picture(tmp_path / "out" / f"{i}.png", rng.choice(sizes), i)
        text = " ".join(f"<img><|image_{k}|></img>" for k in range(1, len(names) + 1))
        rows.append({"instruction": text, "input_images": names, "output_image": f"out/{i}.png"})
    for i, size in enumerate(sizes):
        picture(tmp_path / "in" / f"{i}.png", size, 90 + i)
    more = ["--enable_bucket", "--min_bucket_reso", "32", "--bucket_reso_steps", "32", "--train_batch_size", "3"]
    plan = planned(options_of(written(tmp_path / "rows.jsonl", rows), *more))
    loader, found = Loader(plan, None, seed=3), plan[0].pictures
    assert len({one.alike for one in found}) > 6
    for epoch in (1, 2):
        batches = loader.order(epoch)
        assert sorted(place for batch in batches for _, place in batch) == list(range(40))
        for batch in batches:
            rows_of_it = [found[place] for _, place in batch]
            assert len({one.fit.bucket for one in rows_of_it}) == 1
            assert len({sum(np.prod(one.crop.size) for one in row.inputs) for row in rows_of_it}) == 1
    assert sum(plan[0].batches().values()) == len(loader) == len(loader.order(1))


# --- latents ---------------------------------------------------------------------------------------------------------


class Model:
    """What of a model the reading of pictures needs, whose latents are the pixels."""

    multiple_of = pixels_per_latent = 1
    vae = nn.Identity()
    takes_pictures, dropped = True, "<cfg>"

    def __init__(self):
        self.encoded = 0

    def encode_image(self, pixels, generators):
        self.encoded += len(pixels)
        return pixels


@pytest.fixture
def accelerator(fresh_accelerator):
    return Accelerator(cpu=True)


def test_a_picture_is_encoded_once_and_anew_only_when_it_changes(rows, tmp_path, accelerator):
    """Of five files, of which one is used in two rows; and one is input and wanted picture alike."""
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    found.append({"instruction": PLACES, "input_images": ["out/0.png"], "output_image": "out/0.png"})
    written(rows, found)
    options = options_of(rows, "--cache_latents_to_disk", "--cache_dir", str(tmp_path / "cache"))
    counts = []
    for change in (False, False, True, False):
        if change:
            picture(rows.parent / "in" / "1.png", (96, 48), 77)
        model = Model()
        plan, latents = prepare.read_pictures(options, planned(options), model, accelerator)
        counts.append(model.encoded)
    assert counts == [5, 0, 1, 0]
    for row in pictures(plan):
        for one in row.inputs:
            pixels = np.asarray(Image.open(one.path)).astype(np.float32) / 127.5 - 1
            assert torch.allclose(latents.read(one)[0], torch.from_numpy(pixels).permute(2, 0, 1), atol=1e-6)
    row = plan[0].pictures[2]
    prompt = Prompt(row.caption, width=64, height=64, inputs=tuple(str(one.path) for one in row.inputs))
    (found,) = inputs.encoded([prompt], Model(), options, CPU)
    assert all(torch.equal(one, latents.read(other)[0]) for one, other in zip(found, row.inputs, strict=True))
    in_memory = Model()
    prepare.read_pictures(options_of(rows), planned(options), in_memory, accelerator)
    assert in_memory.encoded == 5


def test_an_input_picture_that_cannot_be_read_costs_its_rows_alone(rows, accelerator, caplog):
    whole = (rows.parent / "in" / "1.png").read_bytes()
    (rows.parent / "in" / "1.png").write_bytes(whole[: len(whole) // 2])  # its header is good
    options = options_of(rows)
    plan, _ = prepare.read_pictures(options, planned(options), Model(), accelerator)
    assert [one.caption for one in pictures(plan)] == ["a cat"]
    (line,) = (line for line in caplog.messages if "left out" in line)
    assert "1.png: left out, it cannot be read" in line
    assert line.endswith("an input picture of 2 rows, left out with it")
    (rows.parent / "in" / "1.png").write_bytes(b"nothing")
    remarks = Remarks()
    assert [one.caption for one in pictures(planned(options, remarks))] == ["a cat"]
    assert remarks.lines()[0].endswith("an input picture of 2 rows, left out with it")


def test_an_input_picture_that_is_too_elongated_costs_its_row(rows):
    picture(rows.parent / "in" / "0.png", (400, 8))
    remarks = Remarks()
    found = pictures(planned(options_of(rows, "--max_input_image_size", "128"), remarks))
    assert [one.caption for one in found] == ["a cat", f"{PLACES} in snow"]
    assert remarks.lines() == [
        f"{rows.parent / 'out' / '2.png'}: left out, an input picture of 400x8 is too elongated for "
        "--max_input_image_size 128"
    ]


def test_the_plans_hash_knows_input_pictures(rows):
    (dataset,) = plan = planned(options_of(rows))
    contents = {file: str(file) for one in pictures(plan) for file in one.files}
    before = fingerprint(plan, contents)
    assert fingerprint(plan, contents | {rows.parent / "in" / "0.png": "another"}) != before
    swapped = [replace(one, inputs=one.inputs[::-1]) for one in dataset.pictures]
    assert fingerprint((replace(dataset, pictures=tuple(swapped)),), contents) != before
    smaller = planned(options_of(rows, "--max_input_image_size", "32"))
    assert fingerprint(smaller, contents) != before


def test_validation_keeps_rows_apart(tmp_path):
    picture(tmp_path / "a.png")
    rows = [{"instruction": f"{PLACES} {i}", "input_images": ["a.png"], "output_image": "a.png"} for i in range(10)]
    file = written(tmp_path / "rows.jsonl", rows)
    trained, kept = divided(planned(options_of(file, "--validation_split", "0.3")), 1)
    captions_of = [{one.caption for one in pictures(part)} for part in (trained, kept)]
    assert [len(found) for found in captions_of] == [7, 3]
    assert not captions_of[0] & captions_of[1]


# --- conditions that are left out ------------------------------------------------------------------------------------


def turn(place: int, epoch: int = 1) -> Turn:
    return Turn(0, 0, epoch, place, 0, 1)


def test_the_share_of_conditions_that_are_left_out(rows):
    row = list(pictures(planned(options_of(rows, "--condition_dropout_prob", "0.2"))))[2]
    for epoch in (1, 2):
        found = [drawn(row, turn(place, epoch), 7, True) for place in range(3000)]
        assert Counter((one.caption, one.inputs) for one in found).keys() == {("", ()), (row.caption, row.inputs)}
        assert sum(not one.caption for one in found) == pytest.approx(600, abs=90)  # 4 deviations
        assert found[5] == drawn(row, turn(5, epoch), 7, True)
    assert all(drawn(row, turn(place), 7, False).inputs for place in range(100))


def test_what_is_left_out_moves_no_other_draw(tmp_path, rows):
    picture(tmp_path / "kohya" / "1_a, b, c, d" / "1.png")
    given = ["--train_data_dir", str(tmp_path / "kohya"), "--shuffle_caption", "--flip_aug"]
    with_it, without_it = (
        next(pictures(planned(parse([*NEEDED, *given, "--condition_dropout_prob", share]).data)))
        for share in ("0.5", "0")
    )
    pairs = [(drawn(with_it, turn(i), 1, True), drawn(without_it, turn(i), 1, True)) for i in range(200)]
    alone = [augment.flips(stream(Purpose.MIRROR, 1, 1, i)) for i in range(200)]
    assert [one.mirrored for one, _ in pairs] == [other.mirrored for _, other in pairs] == alone
    assert {one.caption for one, other in pairs if one.caption != other.caption} == {""}
    assert len({other.caption for _, other in pairs}) > 10


def test_what_is_left_out_where_nothing_is_asked_for():
    """A hundredth, as in OmniGen's own training; captions that kohya's options drop take their pictures along."""
    assert captions.condition_dropout(CaptionOptions(), True) == 0.01
    assert captions.condition_dropout(CaptionOptions(condition_dropout_prob=0.0), True) == 0
    assert captions.condition_dropout(CaptionOptions(caption_dropout_rate=0.3), True) == 0
    assert captions.condition_dropout(CaptionOptions(), False) == 0


def test_a_dropped_caption_takes_its_pictures_along_and_is_the_familys(rows, accelerator):
    options = options_of(rows, "--caption_dropout_rate", "0.5")
    plan, latents = prepare.read_pictures(options, planned(options), Model(), accelerator)
    examples = Examples(plan, latents, 1.0, 1, 3, True, "<cfg>")
    found = [examples[Turn(0, 2, 1, place, 0, 1)] for place in range(40)]
    seen = {(one.caption, len(one.inputs)) for one in found}
    assert seen == {("<cfg>", 0), (TWO_PLACES, 2)}
    assert all([tuple(one.shape) for one in e.inputs] == [(3, 64, 64), (3, 48, 96)] for e in found if e.inputs)


# --- losses ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def omnigen_folder(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("omnigen"))


@pytest.fixture
def omnigen(omnigen_folder, fresh_accelerator) -> Family:
    return loaded(omnigen_folder)


def batch_of(file: Path, model: Family, *more: str):
    """Its rows, of one size, in the file's order."""
    options = options_of(file, "--condition_dropout_prob", "0", *more)
    plan, latents = prepare.read_pictures(options, planned(options), model, Accelerator(cpu=True))
    examples = Examples(plan, latents, 1.0, model.pixels_per_latent, 1, model.takes_pictures, model.dropped)
    return joined([examples[Turn(0, number, 1, number, 0, 1)] for number in range(len(plan[0].pictures))])


def test_one_step_lowers_the_loss_on_one_pair(rows, omnigen):
    """And it is the input pictures' answer that is learnt: with others, the loss is another."""
    written(rows, [json.loads(rows.read_text().splitlines()[2])])
    batch, randoms = batch_of(rows, omnigen), Randoms(1, 0, range(1))
    losses = losses_of(omnigen, False)
    before = losses(batch, randoms).mean()
    before.backward()
    with torch.no_grad():
        for parameter in losses.adapter.module.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
        after = losses(batch, randoms).mean()
        swapped = losses(replace(batch, inputs=(batch.inputs[0][::-1],)), randoms).mean()
    assert after < before.detach() - 1e-6
    assert abs(swapped - after) > 1e-6


@torch.no_grad()
def test_every_caption_has_its_own_pictures_wherever_it_is_asked(rows, omnigen, monkeypatch):
    """Preserved rows and those with the class's words included; a row's loss is the same alone and in a batch."""
    asked = []
    encode = OmniGen.encode_text

    def noted(self, texts, inputs=()):
        asked.extend(zip(texts, inputs or [()] * len(texts), strict=True))
        return encode(self, texts, inputs)

    monkeypatch.setattr(OmniGen, "encode_text", noted)
    batch = batch_of(rows, omnigen)
    losses = losses_of(omnigen, True, trigger_word="snow", diff_output_preservation_class="rain")
    together = losses(replace(batch, preserved=(2,)), Randoms(1, 0, range(3)))
    own = dict(zip(batch.captions, batch.inputs, strict=True))
    own[f"{PLACES} in rain"] = own[f"{PLACES} in snow"]
    assert {text for text, _ in asked} == own.keys()
    for text, given_with_it in asked:
        assert len(given_with_it) == len(own[text])
        assert all(torch.equal(one, other) for one, other in zip(given_with_it, own[text], strict=True))
    for i in range(3):
        alone = replace(
            batch, latents=batch.latents[i : i + 1], captions=batch.captions[i : i + 1], sizes=batch.sizes[i : i + 1],
            weights=None, inputs=(batch.inputs[i],) if batch.inputs[i] else (), preserved=(0,) if i == 2 else (),
        )  # fmt: skip
        assert torch.allclose(losses(alone, Randoms(1, 0, range(i, i + 1))), together[i], rtol=1e-4)


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_pictures_of_prompts_in_every_format(tmp_path):
    def read(name: str, text: str) -> list[Prompt]:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return read_prompts(str(tmp_path / name), (64, 64))

    expected = [("two", ("a b.png", "c.png")), ("one", ("d.png",)), ("none", ())]
    lines = read("p.txt", "two --i a b.png --w 64 --i c.png\none --i d.png\nnone\n")
    table = [{"prompt": "two", "image": ["a b.png", "c.png"]}, {"prompt": "one", "image": "d.png"}, "none"]
    toml = "".join(f"[[prompt.subset]]\nprompt = '{text}'\nimage = {list(files)}\n" for text, files in expected)
    for found in (lines, read("p.json", json.dumps(table)), read("p.toml", f"[prompt]\n{toml}")):
        assert [(one.text, one.inputs) for one in found] == expected
    with pytest.raises(DeftError, match="image = 3 is no file"):
        read("q.json", json.dumps([{"prompt": "x", "image": 3}]))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (f"{PLACES} --i nowhere.png", "nowhere.png: no such file, in"),
        (f"{PLACES} --i broken.png", "broken.png: cannot be read"),
        (f"{PLACES} --i long.png", "an input picture of 4000x8 is too elongated"),
        (f"{PLACES} red", "it names <|image_1|>, and there are 0 input pictures, in"),
        ("red --i in.png", "it has to name its input pictures, as in <img><|image_1|></img>, in 'red'"),
    ],
)
def test_mistakes_in_prompts_are_told_before_the_model_is_loaded(rows, omnigen_folder, tmp_path, capsys, line, told):
    picture(tmp_path / "in.png")
    picture(tmp_path / "long.png", (4000, 8))
    (tmp_path / "broken.png").write_bytes(b"nothing")
    (tmp_path / "p.txt").write_text(line)
    assert trained(omnigen_folder, rows, tmp_path, sample_prompts=tmp_path / "p.txt", sample_at_first=True) == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    assert told in error


def trained(folder: Path, rows: Path | None, tmp_path: Path, **changes) -> int:
    """Runs the trainer in this process; loading ends it where nothing but mistakes are looked for."""
    import train_network_deft

    return train_network_deft.main(given_to(folder, rows, tmp_path, **changes))


def given_to(folder: Path, rows: Path | None, tmp_path: Path, **changes) -> list[str]:
    common = {"train_data_dir": None, "train_jsonl": rows, "learning_rate": 1e-3, "train_batch_size": 2}
    return arguments(folder, tmp_path / "none", tmp_path, **common | changes)


# --- trainings -------------------------------------------------------------------------------------------------------


def test_models_that_read_no_pictures_refuse_them_before_they_are_loaded(
    rows, model_folder, tmp_path, capsys, caplog, monkeypatch, fresh_accelerator
):
    import train_network_deft

    with monkeypatch.context() as patched:
        patched.setattr(train_network_deft, "load", None)
        assert trained(model_folder, rows, tmp_path) == 2
        assert "rows.jsonl: 1.png has input pictures, and" in capsys.readouterr().err
        written(rows, [json.loads(rows.read_text().splitlines()[0])])
        assert trained(model_folder, rows, tmp_path, condition_dropout_prob=0.1) == 2
        assert "reads no input pictures; --caption_dropout_rate leaves captions out" in capsys.readouterr().err
    (tmp_path / "p.txt").write_text("a cat --i nowhere.png --w 64 --h 64 --s 1")
    assert trained(model_folder, rows, tmp_path, sample_prompts=tmp_path / "p.txt", sample_at_first=True) == 0
    assert "image not used; other models have it" in caplog.text
    with safe_open(tmp_path / "out" / "cat.safetensors", "pt") as file:
        assert not {"ss_condition_dropout_prob", "ss_max_input_image_size"} & file.metadata().keys()


def test_a_training_with_samples_of_their_own_pictures(rows, omnigen_folder, tmp_path, monkeypatch, fresh_accelerator):
    """Every file is encoded once; what is drawn is drawn with the prompt's picture."""
    encoded, shown = [], []
    encode, draw = Family.encode_image, OmniGen.draw

    def noted(self, pixels, generators):
        encoded.extend(tuple(one.shape[1:]) for one in pixels)
        return encode(self, pixels, generators)

    def watched(self, prompt, text, negative, sampler=None, bar=None, inputs=()):
        shown.append([tuple(one.shape) for one in inputs])
        return draw(self, prompt, text, negative, sampler, bar, inputs)

    monkeypatch.setattr(Family, "encode_image", noted)
    monkeypatch.setattr(OmniGen, "draw", watched)
    picture(tmp_path / "mine.png", (48, 80), 3)
    (tmp_path / "p.txt").write_text(f"{PLACES} red --i mine.png --s 1 --d 1\na cat --s 1 --d 1\n")
    changes = {"sample_prompts": tmp_path / "p.txt", "sample_every_n_steps": 1, "max_train_steps": 2}
    assert trained(omnigen_folder, rows, tmp_path, **changes) == 0
    assert len(encoded) == 6
    assert (80, 48) in encoded
    assert shown == [[(4, 10, 6)], []] * 2
    assert len(list((tmp_path / "out" / "sample").iterdir())) == 4
    with safe_open(tmp_path / "out" / "cat.safetensors", "pt") as file:
        fields = file.metadata()
    assert fields["ss_condition_dropout_prob"] == "0.01"
    assert fields["ss_max_input_image_size"] == "1024"
    assert json.loads(fields["ss_dataset_dirs"]) == {"rows.jsonl": {"n_repeats": 1, "img_count": 3}}


def test_the_page_shows_input_pictures(rows, omnigen_folder, tmp_path, fresh_accelerator):
    assert trained(omnigen_folder, rows, tmp_path, debug_dataset=True) == 0
    (page,) = (tmp_path / "out").glob("*.html")
    text = page.read_text(encoding="utf-8")
    assert text.count('alt="input picture 1"') == 2
    assert text.count('alt="input picture 2"') == 1
    assert "input picture 2: " in text
    assert "96 × 48" in text


def alike(tmp_path: Path, number: int) -> Path:
    """Pairs of one size."""
    rows = []
    for i in range(number):
        picture(tmp_path / "pairs" / f"{i}.png", (64, 64), i)
        picture(tmp_path / "pairs" / f"in{i}.png", (32, 32), 50 + i)
        rows.append({"instruction": f"{PLACES} {i}", "input_images": [f"in{i}.png"], "output_image": f"{i}.png"})
    return written(tmp_path / "pairs" / "rows.jsonl", rows)


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL there")
def test_killed_and_resumed_bit_for_bit(omnigen_folder, tmp_path):
    changes = {"condition_dropout_prob": 0.4, "gradient_accumulation_steps": 2, "max_train_steps": 9,
               "save_state": True, "save_every_n_steps": 1, "network_dropout": 0.1}  # fmt: skip
    given_once = given_to(omnigen_folder, alike(tmp_path, 7), tmp_path, **changes)
    out = tmp_path / "out"
    run_apart([*given_once, "--output_name", "undisturbed"])
    child = start([SCRIPT, *given_once])
    wait_until(lambda: any(out.glob("cat-step0000000[4-9]-state")))
    child.kill()
    child.join()
    (out / "cat.safetensors").unlink(missing_ok=True)
    run_apart([*given_once, "--resume", str(out / "cat-step00000003-state")])
    assert_equal(tensors(out), tensors(out, "undisturbed"))


def test_one_process_and_two_have_the_same_losses(omnigen_folder, tmp_path):
    file = alike(tmp_path, 4)
    changes = {"condition_dropout_prob": 0.3, "train_batch_size": 1, "max_train_steps": 5}
    commands = {
        number: given_to(omnigen_folder, file, tmp_path, **changes, gradient_accumulation_steps=2 // number)
        for number in (1, 2)
    }
    script = tmp_path / "one.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{RECORD}", encoding="utf-8")
    assert code_of(start([str(script), str(tmp_path / "1.json"), *commands[1]])) == 0
    in_two_processes(tmp_path, RECORD, str(tmp_path / "2.json"), *commands[2])
    one, two = (json.loads((tmp_path / f"{number}.json").read_text()) for number in (1, 2))
    assert len(one) == 5
    assert one == pytest.approx(two, rel=1e-5)
