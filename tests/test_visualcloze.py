"""Graph200K as tasks: which rows, where their pictures lie, what is asked and what is given."""

import json
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import visualcloze
from benchmarks.paper import visualcloze_data
from benchmarks.paper.cuts import Cuts
from benchmarks.paper.visualcloze_data import Protocol, instruction_of, rerooted, rows_of, task_of
from networks.deft_config import DeftError
from tests import small_judges, small_omnigen, small_visualcloze


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return small_visualcloze.make(tmp_path / "graph")


@pytest.fixture
def cuts(tmp_path: Path) -> Cuts:
    return Cuts(tmp_path / "cuts", 32)


def images_in(prompt: str) -> list[int]:
    return [int(number) for number in re.findall(r"<img><\|image_(\d+)\|></img>", prompt)]


def change(data: Path, split: str, what: Callable[[list], None]) -> None:
    file = data / split / "data.json"
    rows = json.loads(file.read_text(encoding="utf-8"))
    what(rows)
    file.write_text(json.dumps(rows), encoding="utf-8-sig")


def test_each_task_is_a_subject(data: Path, cuts: Cuts):
    canny, depth = visualcloze_data.subjects(data, cuts, Protocol())
    assert (canny.name, depth.name, canny.group) == ("canny", "depth", "canny")
    assert [row.picture for row in canny.rows] == [data / "train" / "target" / f"{i}_target.jpg" for i in range(3)]
    assert [row.inputs for row in depth.rows] == [(data / "train" / "depth" / f"{i}_depth.jpg",) for i in range(3)]
    assert canny.rows[1].caption == "a café with train thing 1. Follow the canny of <img><|image_1|></img>."
    for index, asked in enumerate(canny.asked):
        assert asked.index == index
        assert asked.inputs == (data / "test" / "canny" / f"{index}_canny.jpg",)
        assert asked.references == (data / "test" / "target" / f"{index}_target.jpg",)
        assert asked.text == f"a café with test thing {index}."
    assert canny.references == tuple(asked.references[0] for asked in canny.asked)
    assert not cuts.missing()


@pytest.mark.parametrize(
    ("task", "context"), [("depth", 0), ("depth", 1), ("depth", 2), ("reference+depth", 0), ("reference+depth", 1)]
)
def test_every_picture_is_named_once_and_given_in_order(data: Path, cuts: Cuts, task: str, context: int):
    (subject,) = visualcloze_data.subjects(data, cuts, Protocol(tasks=(task,), context=context))
    for prompt, inputs in [(r.caption, r.inputs) for r in subject.rows] + [(a.prompt, a.inputs) for a in subject.asked]:
        assert images_in(prompt) == list(range(1, len(inputs) + 1))
        assert len(inputs) == context * (task.count("+") + 2) + task.count("+") + 1
        assert "{" not in prompt


def test_what_is_shown_is_of_other_rows_of_train(data: Path, cuts: Cuts, tmp_path: Path):
    (subject,) = visualcloze_data.subjects(data, cuts, Protocol(tasks=("depth",), context=2))
    cuts.make()
    for index, row in enumerate(subject.rows):
        shown = {path.stem.split("_")[0] for path in row.inputs[:4]}
        assert shown == {"0", "1", "2"} - {str(index)}
        assert [path.stem.split("_")[1] for path in row.inputs] == ["depth", "target"] * 2 + ["depth"]
    again = visualcloze_data.subjects(data, Cuts(tmp_path / "cuts", 32), Protocol(tasks=("depth",), context=2))
    assert again == [subject]
    everything = [path for asked in subject.asked for path in asked.inputs]
    assert all(path.is_file() for path in everything)
    assert {path.parent.name for path in everything} == {"context", "depth"}


def test_a_reference_that_shows_another_object_is_left_out(data: Path, cuts: Cuts):
    change(data, "train", lambda rows: rows[2].update(quality_assessment=None))
    subject, depth = visualcloze_data.subjects(data, cuts, Protocol(tasks=("reference+depth", "depth")))
    assert [row.picture.stem for row in subject.rows] == ["0_target"]
    assert len(depth.rows) == 3


def test_rows_without_a_picture_or_a_description_are_left_out(data: Path, cuts: Cuts):
    change(data, "train", lambda rows: (rows[0]["condition"].pop("depth"), rows[1].update(description=None)))
    canny, depth = visualcloze_data.subjects(data, cuts, Protocol())
    assert [row.picture.stem for row in canny.rows] == ["0_target", "2_target"]
    assert [row.picture.stem for row in depth.rows] == ["2_target"]


def test_the_first_rows(data: Path, cuts: Cuts):
    canny, tuning = visualcloze_data.subjects(data, cuts, Protocol(tasks=("canny",), rows=1, train_rows=2))
    assert (len(canny.rows), [asked.index for asked in canny.asked]) == (2, [0])
    assert (tuning.name, tuning.tuning, tuning.rows) == ("canny-tuning", True, canny.rows)
    assert [asked.index for asked in tuning.asked] == [1]


def test_other_targets_and_styles(data: Path, cuts: Cuts):
    depth, style = visualcloze_data.subjects(
        data, cuts, Protocol(tasks=("target:depth", "target+InstantStyle_ref:InstantStyle"))
    )
    assert depth.name == "target-to-depth"
    assert depth.rows[0].caption == "Show the depth of <img><|image_1|></img>."
    assert depth.rows[0].picture.parent.name == "depth"
    assert [path.name for path in style.rows[0].inputs] == ["0_target.jpg", "0_InstantStyle_ref_0.jpg"]
    assert style.rows[0].picture.name == "0_InstantStyle_image_0.jpg"


def test_paths_of_another_machine():
    folder = Path("here/train")
    assert rerooted("/home/train/x/train/canny/0.jpg", folder, 0) == Path("here/train/canny/0.jpg")
    assert rerooted("C:\\graph\\train\\canny\\0.jpg", folder, 0) == Path("here/train/canny/0.jpg")
    for foreign in ("/home/x/test/canny/0.jpg", "/x/train/../../0.jpg"):
        with pytest.raises(DeftError, match="row 7 names"):
            rerooted(foreign, folder, 7)


def test_rows_are_read_one_by_one_whatever_the_chunks(data: Path, monkeypatch: pytest.MonkeyPatch):
    file = data / "train" / "data.json"
    for indent, chunk in ((None, 7), (2, 50), (None, 1 << 20)):
        rows = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(rows, indent=indent), encoding="utf-8")
        monkeypatch.setattr(visualcloze_data, "CHUNK", chunk)
        assert list(rows_of(file, "train")) == rows


def test_only_the_rows_that_are_wanted_are_read(data: Path, cuts: Cuts, monkeypatch: pytest.MonkeyPatch):
    file = data / "train" / "data.json"
    file.write_text(file.read_text(encoding="utf-8")[:-200], encoding="utf-8")  # cut off
    monkeypatch.setattr(visualcloze_data, "CHUNK", 500)
    assert visualcloze_data.subjects(data, cuts, Protocol(train_rows=1))
    with pytest.raises(DeftError, match=r"cut off; python processing.py --split train"):
        visualcloze_data.subjects(data, cuts, Protocol())


def test_a_description_names_no_pictures_and_no_fields():
    protocol = Protocol(instruction="{text} {given}")
    prompt = instruction_of(task_of("canny"), "{given} and {x}", protocol)
    assert prompt == "{given} and {x} <img><|image_1|></img>"
    assert visualcloze_data._text({"description": {"description_0": "<img><|image_3|></img> a\n cat"}}) == "a cat"


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        ({"tasks": ("canni",)}, "--tasks canni: no row .* picture canni .did you mean 'canny'.*there are InstantStyle"),
        ({"tasks": ("",)}, "--tasks : give a condition"),
        ({"rows": 0}, "--rows 0: give at least 1"),
        ({"tasks": ("canny:",)}, "--tasks canny:: give a condition"),
        ({"tasks": ("depth",), "context": 3}, "--context 3: 3 rows"),
        ({"instruction": "{txt} {given}"}, "{txt}: allowed are .*did you mean 'text'"),
        ({"instruction": "{text}"}, "either {given} or {conditions}"),
        ({"instruction": "{text} {given} {examples}"}, "belongs to --context 1 and 2; this is --context 0"),
        ({"instruction": "{text} {given}", "context": 1}, "belongs to --context 1 and 2; this is --context 1"),
    ],
)
def test_mistakes_are_one_line(data: Path, cuts: Cuts, protocol: dict, message: str):
    with pytest.raises(DeftError, match=message) as error:
        visualcloze_data.subjects(data, cuts, Protocol(**protocol))
    assert "\n" not in str(error.value)


def test_missing_and_damaged_data_is_one_line(data: Path, cuts: Cuts, tmp_path: Path):
    def refused(match: str, folder: Path = data):
        with pytest.raises(DeftError, match=match) as error:
            visualcloze_data.subjects(folder, cuts, Protocol())
        assert "\n" not in str(error.value)

    refused("train.data.json: cannot be read; python processing.py --split train .*Graph200K", tmp_path / "none")
    (data / "test" / "depth" / "1_depth.jpg").unlink()
    refused("1_depth.jpg: missing, but row 1 of")
    change(data, "test", lambda rows: rows[1].update(condition=None))
    refused("data.json: row 1 has no condition")
    (data / "test" / "data.json").write_text("{}")
    refused("no list of rows")
    (data / "test" / "data.json").write_bytes(b"[\xff")
    refused("test.data.json: cannot be read")


def test_published_figures_stand_in_columns_of_their_tasks(tmp_path: Path):
    def benchmark(*tasks: str):
        options = {"tasks": tasks, "context": 0, "train_rows": 1, "rows": 1, "instruction": None}
        return visualcloze.benchmark_of(Namespace(**options, output=tmp_path, dry_run=True))

    both, depth, other = benchmark("canny", "depth"), benchmark("depth"), benchmark("hed")
    assert len(both.published) == 2 * len(depth.published) == 16
    assert not other.published
    for one in (both, depth):
        assert all(published.figures.keys() <= one.columns.keys() for published in one.published)
    assert ("f1" in both.metrics, "f1" in depth.metrics, "depth_rmse" in depth.metrics) == (True, False, True)
    assert {"f1", "depth_rmse"}.isdisjoint(other.metrics)


def options_of(data: Path, model: Path, out: Path, *more: object) -> list[str]:
    given = ["--data", data, "--model", model, "--output", out, "--device", "cpu", "--adapters", "lora", "--rank", "2",
             "--rates", "1e-3", "--steps", "1", "--size", "64", "--drawing_steps", "1", "--rows", "2", "--tasks",
             "canny", *more]  # fmt: skip
    return list(map(str, given))


def test_from_data_to_report_with_an_example_in_context(data: Path, tmp_path: Path):
    model, out = small_omnigen.build(tmp_path / "omnigen"), tmp_path / "out"
    judges = ("--clip", small_judges.clip(tmp_path / "clip"), "--dinov2", small_judges.dinov2(tmp_path / "dinov2"))
    assert visualcloze.main(options_of(data, model, out, "--context", 1, *judges)) == 0
    records, scores = (
        [json.loads(line) for line in (out / name).read_text(encoding="utf-8").splitlines()]
        for name in ("records.jsonl", "scores.jsonl")
    )
    assert {record["method"] for record in records} == {"base", "lora|2|0.001|1"}
    assert {images_in(record["prompt"])[-1] for record in records} == {3}
    drawn = {score["picture"]: score for score in scores if score.get("picture", "").startswith("pictures/")}
    assert drawn.keys() == {record["picture"] for record in records}
    assert all({"clip_i", "clip_t", "ssim", "f1"} <= score.keys() for score in drawn.values())
    sets = {(score["method"], score["subject"]) for score in scores if "fd_dinov2" in score}
    assert sets == {("base", "canny"), ("lora|2|0.001|1", "canny")}  # each task's own
    assert "F1, canny" in (out / "report.md").read_text(encoding="utf-8")


def test_other_models_are_refused_in_one_line(data: Path, model_folder: Path, tmp_path: Path, capsys):
    assert visualcloze.main(options_of(data, model_folder, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: --model .*: canny refers to pictures, .* OmniGen does\n", error)
    assert not list((tmp_path / "out").rglob("*.safetensors"))
