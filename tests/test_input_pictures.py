"""Input pictures: instructions in JSON lines, batches, caches, conditions that are left out, losses, samples."""

from __future__ import annotations

import json
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
from torch import nn

from library.data import captions, instructions
from library.data.batches import Loader, Turn
from library.data.examples import Examples, drawn
from library.data.index import Index
from library.data.plan import Plan, divided, fingerprint, pictures, plan_of
from library.data.remarks import Remarks
from library.data.resizing import INPUT_STEPS, input_crop
from library.models.family import Family
from library.options.parse import parse
from library.options.rooms import CaptionOptions, DataOptions
from library.training import prepare
from networks.deft_config import DeftError
from tests.conftest import arguments

PLACES = "<img><|image_1|></img>"
TWO_PLACES = f"{PLACES} with the hat of <img><|image_2|></img>"
NEEDED = ["--pretrained_model_name_or_path", "m", "--output_dir", "o", "--resolution", "64"]


def picture(path: Path, size: tuple[int, int] = (64, 64), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8)
    Image.fromarray(values).resize(size).save(path)
    return path


def rows_of(folder: Path) -> list[dict]:
    """Of 0, 1 and 2 input pictures, of which one is used twice."""
    for i, size in enumerate([(64, 64), (96, 48), (64, 64)]):
        picture(folder / "out" / f"{i}.png", size, i)
        picture(folder / "in" / f"{i}.png", size, 10 + i)
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
    found = input_crop(size, most)
    for side, scaled, place in zip(found.size, found.resized, found.place, strict=True):
        assert side % INPUT_STEPS == 0
        assert 0 < side <= scaled < side + INPUT_STEPS
        assert place == (scaled - side) // 2
    assert max(found.size) <= most or min(found.size) == INPUT_STEPS


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
    assert {one.mirrored == other.mirrored for one, other in pairs} == {True}
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
