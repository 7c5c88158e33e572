"""DreamBench++: its layout, the tree of samples, and ratings, on a miniature of the published data.

Set DREAMBENCH_PLUS_DIR to a checkout of yuangpeng/dreambench_plus to compare with what its own code reads, sends and
counts (it wants fire, openai, megfile, loguru, omegaconf, pendulum and requests, in this Python or on PYTHONPATH).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import dreambench_plus
from benchmarks.paper import dreambench_plus_data as data
from benchmarks.paper import dreambench_plus_samples as samples
from benchmarks.paper import ratings, scored
from benchmarks.paper.plan import BASE
from networks.deft_config import DeftError

UPSTREAM = os.environ.get("DREAMBENCH_PLUS_DIR")
SIDE = Path(__file__).with_name("dreambench_plus_side.py")
SUBJECTS = {  # as the published data has them: hyphens, spaces, and upper case in the first line
    "live_subject/animal/00": "kitten",
    "live_subject/animal/01": "cotton-top tamarin",
    "live_subject/human/00": "Spider-Man",
    "object/00": "t-shirt",
    "object/01": "Rolls-Royce hood ornament",
    "style/00": "ukiyo-e",
}
NAMES = ["live_subject_animal_00_kitten", "live_subject_animal_01_cotton-top_tamarin",
         "live_subject_human_00_spider-man", "object_00_t-shirt", "object_01_rolls-royce_hood_ornament",
         "style_00_ukiyo-e"]  # fmt: skip
PUBLIC = "live_subject/animal/01"


@pytest.fixture
def folder(tmp_path) -> Path:
    """The data in miniature, with what an archive made on a Mac leaves beside it."""
    root = tmp_path / "dreambench_plus" / "data"
    rng = np.random.default_rng(0)
    for stem, subject in SUBJECTS.items():
        for place in ("images", "captions"):
            (root / place / stem).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 32, 3), dtype=np.uint8)).save(root / "images" / f"{stem}.jpg")
        prompts = [f"a photo of a {subject} number {i}, in the jungle " for i in range(9)]
        (root / "captions" / f"{stem}.txt").write_text("\n".join([subject, *prompts]) + "\n", encoding="utf-8")
    (root / "images" / "object" / "._00.jpg").write_bytes(b"junk")
    return root


@pytest.fixture
def run(folder, tmp_path):
    """A run's records, of a method and the base model, on all subjects but one that rates were chosen on."""
    subjects = data.subjects(folder)
    rng, records = np.random.default_rng(1), []
    method = samples.Method("deft removal=1|4|1e-05|100", "deft removal=1", 4, 1e-5, 100, 10)
    for key in (method.key, BASE):
        for subject in subjects:
            for asked in subject.asked:
                place = f"out/{'base' if key == 'base' else 'deft'}/{subject.name}/{asked.index}.png"
                (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(tmp_path / place)
                records.append({"method": key, "subject": subject.name, "index": asked.index, "k": 0, "seed": 0,
                                "picture": place, "prompt": asked.prompt, "category": asked.category,
                                "guidance": 7.5})  # fmt: skip
    told = {
        "methods": {method.key: {"adapter": method.adapter, "rank": 4, "rate": 1e-5, "steps": 100}},
        "subjects": {s.name: {"group": s.group, "tuning": False, "pictures": {}} for s in subjects},
    }
    (tmp_path / "results.json").write_text(json.dumps(told), encoding="utf-8")
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return tmp_path, method, subjects


def trees_of(run, precision: str = "fp16") -> dict[str, Path]:
    root, method, subjects = run
    drawing = samples.Drawing(100, precision)
    return samples.write_samples(scored.read(root / "results.json"), [method], subjects, drawing, root / "samples")


# --- data ------------------------------------------------------------------------------------------------------------


def test_the_layout_is_read(folder):
    subjects = data.subjects(folder)
    assert [subject.name for subject in subjects] == NAMES
    assert [subject.group for subject in subjects] == ["animal", "animal", "human", "object", "object", "style"]
    tamarin = subjects[1]
    assert [row.caption for row in tamarin.rows] == ["a photo of cotton-top tamarin"]
    assert tamarin.rows[0].picture == folder / "images" / f"{PUBLIC}.jpg"
    assert tamarin.references == (tamarin.rows[0].picture,)
    assert [asked.index for asked in tamarin.asked] == list(range(9))
    assert tamarin.asked[3].prompt == "a photo of a cotton-top tamarin number 3, in the jungle"
    assert [asked.category for asked in tamarin.asked] == (
        ["photorealistic"] * 4 + ["style transfer"] * 3 + ["imaginative"] * 2
    )
    assert [s.name for s in subjects if s.tuning] == [NAMES[0], NAMES[2], NAMES[3], NAMES[5]], "one of each group"
    assert not any(s.tuning for s in data.subjects(folder, tuning=False))
    assert data.subjects(folder.parent) == subjects, "the folder above will do"


def spoiled(folder: Path, name: str) -> None:
    caption = folder / "captions" / f"{PUBLIC}.txt"
    text = caption.read_text(encoding="utf-8")
    if name == "no caption":
        caption.unlink()
    elif name == "no picture":
        (folder / "images" / f"{PUBLIC}.jpg").unlink()
    elif name == "eight prompts":
        caption.write_text("\n".join(text.split("\n")[:9]), encoding="utf-8")
    elif name == "ten prompts":
        caption.write_text(f"{text}one more", encoding="utf-8")
    elif name == "no subject":
        caption.write_text(text.replace("cotton-top tamarin\n", "\n", 1), encoding="utf-8")
    elif name == "latin-1":
        caption.write_bytes("Äffchen\n".encode("latin-1"))
    elif name == "another category":
        for place in ("images", "captions"):
            (folder / place / "object").rename(folder / place / "things")
    elif name == "twice":
        for place in ("images", "captions"):
            shutil.copytree(folder / place / "object", folder / place / "more" / "object")
    elif name == "nothing":
        shutil.rmtree(folder / "images")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no caption", "captions/live_subject/animal/01.txt is missing"),
        ("no picture", "images/live_subject/animal/01.jpg is missing"),
        ("eight prompts", "there are 8 prompts"),
        ("ten prompts", "there are 10 prompts"),
        ("no subject", "names no subject"),
        ("latin-1", "not UTF-8"),
        ("another category", "its folder is none of animal, human, object, style"),
        ("twice", "object_00_t-shirt is there twice"),
        ("nothing", "huggingface.co/datasets/yuangpeng/dreambench_plus"),
    ],
)
def test_what_does_not_fit_is_one_line(folder, name, said):
    spoiled(folder, name)
    with pytest.raises(DeftError, match=said.replace(".", r"\.")) as error:
        data.subjects(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ending", ["\r\n", "\n\n\n"])
def test_ends_of_lines_do_not_matter(folder, ending):
    before = data.subjects(folder)
    caption = folder / "captions" / f"{PUBLIC}.txt"
    text = caption.read_text(encoding="utf-8")
    changed = text.replace("\n", ending) if ending == "\r\n" else text + ending
    caption.write_bytes(b"\xef\xbb\xbf" + changed.encode())
    assert data.subjects(folder) == before


# --- the tree --------------------------------------------------------------------------------------------------------


def test_samples_are_written_as_upstream_has_them(run):
    root, _, subjects = run
    name = "deft_removal_1_r4_1e_05_100_gs7_5_step100_seed0_torch_float16"
    tree = trees_of(run)[name]
    assert tree == root / "samples" / name
    found = sorted(path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file())
    kinds = (("src_image", "jpg"), ("text", "txt"), ("tgt_image", "jpg"))
    assert found == sorted(
        ["negative_prompt.txt", *(f"{kind}/{n}/{i}_0.{end}" for kind, end in kinds for n in NAMES for i in range(9))]
    )
    assert (tree / "negative_prompt.txt").read_bytes() == b""
    assert (tree / "text" / NAMES[3] / "4_0.txt").read_text() == "a photo of a t-shirt number 4, in the jungle"
    with Image.open(tree / "tgt_image" / NAMES[3] / "4_0.jpg") as picture:
        assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (24, 24))
    with Image.open(tree / "src_image" / NAMES[3] / "4_0.jpg") as picture, Image.open(subjects[3].references[0]) as own:
        assert np.abs(np.asarray(picture, float) - np.asarray(own, float)).mean() < 20


def test_samples_follow_what_is_drawn_anew_and_leave_out_what_is_missing(run):
    root, *_ = run
    (tree,) = trees_of(run).values()
    drawn, sample = (root / "out/deft" / NAMES[0] / "0.png", tree / "tgt_image" / NAMES[0] / "0_0.jpg")
    before, kept = sample.stat().st_mtime_ns, (tree / "tgt_image" / NAMES[0] / "1_0.jpg").stat().st_mtime_ns
    Image.new("RGB", (24, 24), "red").save(drawn)
    os.utime(drawn, ns=(before + 10**10, before + 10**10))
    shutil.rmtree(tree / "tgt_image" / NAMES[1])
    (root / "out/deft" / NAMES[1] / "0.png").unlink()
    trees_of(run)
    with Image.open(sample) as picture:
        assert picture.getpixel((5, 5))[0] > 250
    assert (tree / "tgt_image" / NAMES[0] / "1_0.jpg").stat().st_mtime_ns == kept
    assert len(list((tree / "tgt_image" / NAMES[1]).iterdir())) == 8


def test_subjects_that_rates_were_chosen_on_are_no_samples(run):
    file = run[0] / "results.json"
    told = json.loads(file.read_text())
    told["subjects"][NAMES[2]]["tuning"] = True
    file.write_text(json.dumps(told))
    (tree,) = trees_of(run).values()
    assert sorted(path.name for path in (tree / "tgt_image").iterdir()) == sorted({*NAMES} - {NAMES[2]})


# --- ratings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "score"),
    [
        ("Analysis: alike.\nScore: 3", 3),
        ("score: 0", 0),
        ("Score: Good 3", 3),
        ("Score:4", 4),
        ("Score: 3\n\nScore: 4", None),
        ("Score: 3, and again score: 3", None),
        ("Score: very good 3", None),
        ("Score: 7", None),
        ("Score: **3**", None),
        ("SCORE: 3", None),
        ("I cannot rate this.", None),
        ("", None),
        (None, None),
    ],
)
def test_a_score_is_read_by_upstreams_rule(content, score):
    assert ratings.score_of(content) == score


@pytest.fixture
def checkout(tmp_path) -> Path:
    """Prompts as a checkout of upstream has them."""
    folder = tmp_path / "checkout" / "dreambench_plus" / "prompts"
    folder.mkdir(parents=True)
    for about in ("subject", "style", "text"):
        for who in ("user", "gpt"):
            (folder / f"{who}_prompt_{about}_full.txt").write_text(f"{who} {about}\n")
    return folder.parent.parent


def test_requests_are_lines_of_the_batch_interface(run, checkout, monkeypatch):
    monkeypatch.setattr(ratings, "SIDE", 32)
    (tree,) = trees_of(run).values()
    file = run[0] / "requests.jsonl"
    assert ratings.write_requests([tree], checkout, "rater", file) == [file]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    found = {line["custom_id"]: line for line in lines}
    assert len(found) == len(lines) == 6 * 9 * 2 * 3
    assert {line["url"] for line in lines} == {"/v1/chat/completions"}
    for name, about, number in ((f"cp/{NAMES[1]}/4/full2", "subject", 2), (f"cp/{NAMES[5]}/0/full", "style", 2),
                                (f"pf/{NAMES[5]}/8/full3", "text", 1)):  # fmt: skip
        body = found[f"{tree.name}/{name}"]["body"]
        assert (body["model"], body["temperature"]) == ("rater", 1)
        asked, planned, shown = body["messages"]
        assert (asked["content"], planned["content"]) == (f"user {about}", f"gpt {about}")
        assert [part["type"] for part in shown["content"]].count("image_url") == number
    assert shown["content"][0] == {"type": "text", "text": "a photo of a ukiyo-e number 8, in the jungle"}
    assert len({line["body"]["seed"] for line in lines}) > 300
    monkeypatch.setattr(ratings, "MOST", 100)
    files = ratings.write_requests([tree], checkout, "rater", file)
    assert [path.name for path in files] == ["requests.jsonl", "requests-2.jsonl", "requests-3.jsonl",
                                             "requests-4.jsonl"]  # fmt: skip
    assert [json.loads(line) for path in files for line in path.read_text().splitlines()] == lines
    with pytest.raises(DeftError, match="no pictures are drawn"):
        ratings.write_requests([], checkout, "rater", file)
    with pytest.raises(DeftError, match=r"--upstream .*give a checkout"):
        ratings.read_prompts(run[0])


def content_of(kind: str, name: str, index: int, run: str) -> str:
    """A made rater: each answer depends on all of what it is for, and a few have no score."""
    number = sum(map(ord, kind + name + run)) + 3 * index
    return "Score: 3\nScore: 1" if number % 17 == 0 else f"Score: {number % 5}"


def answers_of(tree: Path) -> dict[str, str]:
    return {item.custom_id: content_of(item.kind, item.collection, item.prompt, item.run)
            for item in ratings.items_of(tree)}  # fmt: skip


def batch(file: Path, answers: dict[str, str]) -> Path:
    """What the batch interface gives back."""
    lines = [
        {"id": "x", "custom_id": key, "error": None,
         "response": {"status_code": 200, "body": {"choices": [{"message": {"role": "assistant", "content": text}}]}}}
        for key, text in answers.items()
    ]  # fmt: skip
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def test_ratings_are_means_of_what_was_answered(run, tmp_path):
    (tree,) = trees_of(run).values()
    given = {item.custom_id: "Score: 4" for item in ratings.items_of(tree)}
    for item in ratings.items_of(tree):
        if item.kind == "pf":
            given[item.custom_id] = f"Score: {1 + ratings.RUNS.index(item.run)}"
        elif item.collection == NAMES[5]:
            given[item.custom_id] = "Score: 0"
    given[f"{tree.name}/cp/{NAMES[0]}/0/full"] = "Score: 9"
    file = batch(tmp_path / "answers.jsonl", given)
    lines = file.read_text().splitlines()
    lines[-1] = json.dumps({"custom_id": json.loads(lines[-1])["custom_id"], "response": None, "error": {"code": "x"}})
    file.write_text("\n".join(lines) + "\n")
    rated = ratings.rated("a model of mine", [tree], ratings.read_answers([file]))
    row = rated.table()[tree.name]
    assert row["CP animal"].mean == 1
    assert (row["CP animal"].missing, row["CP animal"].asked) == (1, 2 * 9 * 3)
    assert row["CP style"].mean == 0
    assert row["CP"].mean == pytest.approx((44 / 53 + 45 / 54 * 2) / 3)
    assert row["PF photorealistic"].mean == pytest.approx(0.5)
    assert row["PF photorealistic"].deviation == pytest.approx(0.25)
    assert row["CP x PF"] == pytest.approx(row["CP"].mean * row["PF"].mean)
    text = ratings.markdown(rated)
    assert "## Ratings by a model of mine" in text
    assert "gpt" not in text.lower()
    assert f"* {tree.name}, CP: 1 of 162 ratings are missing" in text
    assert "0.500 ± 0.250 |" in text
    json.dumps(ratings.as_json(rated), allow_nan=False)
    again = batch(tmp_path / "again.jsonl", given | {f"{tree.name}/cp/{NAMES[0]}/0/full": "Score: 2"})
    asked_again = ratings.read_answers([file, again])
    assert asked_again[ratings.Item(tree.name, "cp", NAMES[0], 0, "full")] == 2, "asked again, it has a score"
    assert asked_again == ratings.read_answers([again, batch(file, dict.fromkeys(given, "Score: 1"))]), "the first"


def test_answers_to_something_else_are_refused(run, tmp_path):
    (tree,) = trees_of(run).values()
    with pytest.raises(DeftError, match="'request-1' is no request's custom_id"):
        ratings.read_answers([batch(tmp_path / "a.jsonl", {"request-1": "Score: 1"})])
    other = ratings.read_answers([batch(tmp_path / "b.jsonl", {"other/cp/cat/0/full": "Score: 1"})])
    with pytest.raises(DeftError, match="no answer is of the samples"):
        ratings.rated("x", [tree], other)
    with pytest.raises(DeftError, match="there is no such"):
        ratings.read_answers([tmp_path / "none.jsonl"])
    with pytest.raises(DeftError, match="concept_preservation_full"):
        ratings.read_answers([tree])


def cells(markdown: str, name: str) -> list[list[str]]:
    """The rows of a method in all tables."""
    lines = [line for line in markdown.split("\n") if line.startswith(f"| {name} |")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


# --- upstream itself -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not UPSTREAM, reason="set DREAMBENCH_PLUS_DIR to a checkout of yuangpeng/dreambench_plus")
def test_upstreams_own_code_reads_sends_and_counts_the_same(folder, run, tmp_path):
    (folder / "images" / "object" / "._00.jpg").unlink()
    (tree,) = trees_of(run).values()
    given = answers_of(tree)
    (tmp_path / "answers.json").write_text(json.dumps({key.split("/", 1)[1]: text for key, text in given.items()}))
    out = tmp_path / "upstream"
    out.mkdir()
    paths = [UPSTREAM, os.environ.get("PYTHONPATH", "")]
    side = subprocess.run(
        [sys.executable, SIDE, folder, tree, tmp_path / "answers.json", out], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert side.returncode == 0, side.stderr[-3000:]
    theirs = json.loads(side.stdout.splitlines()[-1])

    subjects = data.subjects(folder)
    assert {s.name: [s.group, s.rows[0].caption.removeprefix("a photo of "), [a.prompt for a in s.asked]]
            for s in subjects} == theirs["collections"]  # fmt: skip
    assert theirs["pairs"] == [54, 54], "source and sample, prompt and sample"

    prompts = ratings.read_prompts(Path(UPSTREAM))
    for item in ratings.items_of(tree):
        body = ratings.request_of(item, ratings.messages_of(item, tree, prompts), "rater")["body"]
        sent = theirs["sent"][item.custom_id.split("/", 1)[1]]
        assert {name: body[name] for name in ("messages", "temperature", "model")} == sent

    (out / "data_gpt_rating").rename(out / "ratings")
    for folder_ in (out / "ratings").iterdir():
        (folder_ / "made_lora").rename(folder_ / ratings.short_name(tree.name))
    of_batch = ratings.read_answers([batch(tmp_path / "answers.jsonl", given)])
    of_folder = ratings.read_answers([out / "ratings"])
    one, other = (ratings.rated("rater", [tree], answers) for answers in (of_batch, of_folder))
    assert one.table() == other.table()
    row = one.table()[tree.name]
    assert row["CP"].missing > 0, "some answers have no score"
    for title, (kind, of) in ratings.COLUMNS.items():
        runs = theirs["means"][ratings.FOLDERS[kind]][of.replace(" ", "_") or "None"]
        assert row[title].mean == pytest.approx(np.mean(runs))
        assert row[title].deviation == pytest.approx(np.std(runs, ddof=1))
    shown = [float(cell) for cell in theirs["printed"].splitlines()[-1].split("|")[1:-1]]
    mine = [row[title] for title in (*ratings.COLUMNS, ratings.PRODUCT)]
    assert [cell if isinstance(cell, float) else cell.mean for cell in mine] == pytest.approx(shown, abs=1.1e-3)


# --- the script ------------------------------------------------------------------------------------------------------


def test_both_protocols_are_upstreams():
    from argparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_argument("--stage", default="all")
    dreambench_plus.add_options(parser)
    sd, sdxl = (dreambench_plus.benchmark_of(parser.parse_args(["--protocol", name])) for name in ("sd15", "sdxl"))
    assert (sd.steps, sd.size, sdxl.steps, sdxl.size) == (100, 512, 500, 1024)
    assert (sd.guidance, sd.drawing_steps) == (7.5, 100)
    assert {p.method: p.adapter for p in sdxl.published}["DEFT SDXL"] == "deft-none"
    assert not any(p.adapter for p in sd.published), "figures of SDXL are not laid beside runs on SD 1.5"
    assert sd.columns["CLIP-T style transfer"] == ("clip_t", "style transfer")
    assert {5e-5, 1e-4} <= set(parser.parse_args([]).rates)
    late = ["--ratings", "x", "--rater", "y", "--stage", "score"]
    for options, said in ((["--requests", "x"], "give --upstream"), (["--ratings", "x"], "give --rater"),
                          (late, "at the report")):  # fmt: skip
        with pytest.raises(DeftError, match=said):
            dreambench_plus.benchmark_of(parser.parse_args(options))


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    small_judges = pytest.importorskip("tests.small_judges")
    return small_judges.build(tmp_path_factory.mktemp("judges"))


def test_a_run_from_beginning_to_end(folder, judges, model_folder, checkout, tmp_path, monkeypatch, capsys):
    """The shared stages; samples, requests and ratings behind them; a rerun adds nothing."""
    monkeypatch.setattr(ratings, "SIDE", 32)
    out = tmp_path / "run"
    command = ["--data", folder, "--model", model_folder, "--output", out, "--size", 64, "--steps", 1,
               "--drawing_steps", 1, "--limit_prompts", 1, "--limit_subjects", 2, "--device", "cpu",
               "--adapters", "lora", "deft-none", "--rates", "1e-3", "--protocol", "sdxl"]  # fmt: skip
    for name in ("clip", "dino_vits8", "dinov2"):
        command += [f"--{name}", judges[name]]

    def run(*more: object) -> str:
        assert dreambench_plus.main([str(part) for part in (*command, *more)]) == 0
        return capsys.readouterr().out

    printed = run("--requests", tmp_path / "requests.jsonl", "--upstream", checkout)
    trees = sorted(path.name for path in (out / "samples").iterdir())
    assert len(trees) == 3
    assert [name.split("_r4_")[0] for name in trees] == [
        "base_gs7_5_step1_seed0_torch_float32", "deft_none", "lora"]  # fmt: skip
    counted = NAMES[:2]  # with one rate, none is taken to choose one
    for name in trees:
        assert sorted(p.name for p in (out / "samples" / name / "tgt_image").iterdir()) == counted
        assert len(list((out / "samples" / name).glob("text/*/*.txt"))) == 3 * len(counted), "a prompt of each"
    main, hundredfold, animal = cells(printed, "lora")[:3]
    assert len(main) == 9
    assert all("[" in cell for cell in main[5:])
    assert float(hundredfold[1].split()[0]) == pytest.approx(100 * float(main[5].split()[0]), abs=0.06)
    assert animal[1] == main[5]
    assert animal[2:] == ["–", "–", "–"]
    assert "| real pictures |" not in printed, "there is but one picture of a subject"
    assert "* a subject has one picture" in printed
    own = next(line for line in printed.splitlines() if line.startswith("| DreamBooth LoRA SDXL | CLIP-T | 0.341 |"))
    assert main[8] in own
    assert {path.name for path in out.glob("report.*")} == {"report.md", "report.json"}
    assert (out / "sheet.png").is_file()

    asked = [json.loads(line)["custom_id"] for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert len(asked) == 3 * len(counted) * 3 * 2 * 3
    answers = batch(tmp_path / "answers.jsonl", dict.fromkeys(asked, "Score: 3"))
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.jpg")}
    printed = run("--stage", "report", "--ratings", answers, "--rater", "a local model")
    assert "## Ratings by a local model" in printed
    assert json.loads((out / "ratings.json").read_text())["figures"][trees[0]]["CP x PF"] == pytest.approx(0.75**2)
    assert before == {file: file.stat().st_mtime_ns for file in out.rglob("*.jpg")}
    assert dreambench_plus.main([*map(str, command), "--ratings", str(answers)]) == 2
    assert "give --rater" in capsys.readouterr().err
