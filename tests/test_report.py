"""NAME.html: what it shows is what the record has, it needs nothing else, and no text of a user's gets out of its
place."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import logging
import re
import shlex
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from library.options.parse import parse
from library.options.rooms import ReportOptions
from library.pages import plain
from library.prompts import Prompt
from library.report import rounds
from library.report.report import Report
from library.report.told import MOST, Told
from library.training import interrupts
from library.training.loop import TrainingLoop
from library.training.record import Drawn, Record, Saved
from library.training.state import Length, Position
from networks import deft_io

VOID = {"meta", "img", "input"}
HOSTILE = ["</script><script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "<!-- {{ 7 * 7 }} {% raw %}",
           "a \U0001f408\u200d\u2b1b قطة", "lone \udce4 surrogate\x00", "&lt;b&gt; &amp;", "]]></style>"]  # fmt: skip


class Read(HTMLParser):
    """A page as a browser has it; checks on the way that it is sound and asks for nothing from elsewhere."""

    def __init__(self, source: str):
        super().__init__()
        self.source = source
        self.open: list[tuple[str, dict, list[str]]] = []
        self.tags: Counter = Counter()
        self.ids: list[str] = []
        self.all: list[tuple[str, dict, list[str]]] = []  # tag, attributes, and its text by and by
        self.images: dict[tuple[int, int], np.ndarray] = {}  # article and round -> its colour
        self.feed(source)
        self.close()
        assert self.open == []
        assert len(self.ids) == len(set(self.ids))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        assert len(found) == len(attrs), "an attribute twice"
        assert not any(name.startswith("on") or name in ("style", "href", "srcset", "xlink:href") for name in found)
        assert "src" not in found or (tag == "img" and found["src"].startswith("data:image/jpeg;base64,"))
        assert "url(" not in "".join(value or "" for value in found.values())
        self.tags[tag] += 1
        self.ids += [found["id"]] if "id" in found else []
        self.all.append((tag, found, []))
        if tag == "img":
            image = Image.open(io.BytesIO(base64.b64decode(found["src"].split(",", 1)[1])))
            assert (str(image.width), str(image.height)) == (found["width"], found["height"])
            shown = [attributes for _, attributes, _ in self.open if "data-round" in attributes]
            if shown:
                place = self.tags["article"] - 1, int(shown[-1]["data-round"])
                self.images[place] = np.asarray(image).reshape(-1, 3).mean(0)
        if tag not in VOID:
            self.open.append((tag, found, self.all[-1][2]))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, _, text in self.open:
            text.append(data)

    def of(self, tag: str, **attributes: str) -> list[str]:
        """The texts of these elements."""
        wanted = {key.rstrip("_"): value for key, value in attributes.items()}
        return ["".join(text) for name, found, text in self.all if name == tag and wanted.items() <= found.items()]

    def attributes(self, tag: str) -> list[dict]:
        return [found for name, found, _ in self.all if name == tag]

    @property
    def text(self) -> str:
        return self.of("html")[0]

    @property
    def steps(self) -> list[int]:
        """Of the slider."""
        spans = [text for tag, found, text in self.all if tag == "span" and "data-at" in found]
        return [int("".join(text).split()[0].replace(",", "")) for text in spans]

    @property
    def files(self) -> list[list[str]]:
        """Rows of the table."""
        body = self.source.partition("<thead>")[2].partition("</table>")[0]
        cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in body.split("<tr")[2:]]
        return [[re.sub("<.*?>", "", cell) for cell in row] for row in cells]

    @property
    def settings(self) -> dict[str, str]:
        return dict(re.findall(r'<tr><th scope="row">(\w+)</th><td dir="auto">(.*?)</td>', self.source))


def page_of(file: Path) -> Read:
    shown = Read(file.read_text(encoding="utf-8"))
    policy = next(found["content"] for found in shown.attributes("meta") if "http-equiv" in found)
    allowed = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert allowed["default-src"] == "'none'"
    assert allowed["img-src"] == "data:"
    for tag in ("style", "script"):
        (content,) = shown.of(tag)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert allowed[f"{tag}-src"] == f"'sha256-{digest}'"
        assert not re.search(r"url\(|@import|https?:|//", content)
    return shown


def report_of(folder: Path, record: Record, **changes) -> Report:
    facts = {
        "options": ReportOptions(), "folder": folder, "name": "cat", "model": "model", "prompts": [], "pictures": [],
        "length": Length(1000, 4), "position": Position(10, 1), "record": record, "told": Told(),
        "writes": True,
    }  # fmt: skip
    return Report(**facts | changes)


def written(folder: Path, record: Record, ended: str = "", **changes) -> Read:
    report = report_of(folder, record, **changes)
    report.write(ended)
    assert not report.failed
    return page_of(report.file)


def draw(folder: Path, steps, prompts: int = 2, size: int = 24) -> Record:
    """Samples, each of a colour that says which it is."""
    (folder / "sample").mkdir(parents=True, exist_ok=True)
    record = Record()
    for number, step in enumerate(steps):
        for prompt in range(prompts):
            name = f"sample/{step}_{prompt}.png"
            Image.new("RGB", (size, size), colour_of(number, prompt)).save(folder / name)
            record.samples.append(Drawn(name, step, prompt))
    return record


def colour_of(number: int, prompt: int) -> tuple[int, int, int]:
    return 20 + 40 * (number % 6), 20 + 90 * (prompt % 3), 128


# --- curves -----------------------------------------------------------------------------------------------------------


def read_off(source: str) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and values of each line, as a person reads them: by the numbers beside the axes alone."""
    found = {}
    for figure in re.findall(r'<figure class="panel">.*?</figure>', source, re.S):
        labels = re.findall(r'<text x="([\d.]+)%?" y="([\d.]+)%" dy="(.*?)"[^>]*>([^<]*)</text>', figure)
        number = lambda text: float(text.rstrip("%").replace(",", "")) / (100 if text.endswith("%") else 1)  # noqa: E731
        across = [(float(x) * 10, number(text)) for x, y, dy, text in labels if dy == "1.3em"]
        up = [(float(y) * 10, number(text)) for x, y, dy, text in labels if dy != "1.3em"]
        logarithmic = "(logarithmic)" in figure
        if len(across) < 2 or len(up) < 2:
            continue
        values = [np.log10(value) if logarithmic else value for _, value in up]
        to_step = np.polyfit(*zip(*across, strict=True), 1)
        to_value = np.polyfit([y for y, _ in up], values, 1)
        for name, points in re.findall(r'data-name="([^"]*)" points="([^"]*)"', figure):
            pairs = np.array([list(map(float, pair.split(","))) for pair in points.split()])
            read = np.polyval(to_value, pairs[:, 1])
            found[name] = np.polyval(to_step, pairs[:, 0]), 10**read if logarithmic else read
    return found


SIZES = st.sampled_from([1e-7, 1e-3, 0.1, 1.0, 300.0])


@settings(deadline=None, max_examples=30)
@given(SIZES, st.lists(st.floats(0.5, 5.0), min_size=2, max_size=60), st.integers(1, 300), st.booleans())
def test_values_read_off_the_axes_are_the_records(tmp_path_factory, size, factors, every, far):
    record = Record()
    for number, factor in enumerate(factors):
        value = size * factor * (10 ** (3 * number / len(factors)) if far else 1)
        record.log({"loss/current": value, "loss/average": size, "meter/drift": value, "meter/learnt": factor / 6,
                    "lr/unet": size, "lr/text_encoder": size * factor}, (number + 1) * every)  # fmt: skip
    file = tmp_path_factory.getbasetemp() / "cat.html"
    shown = written(file.parent, record, position=Position(len(factors) * every, 1))
    found = read_off(shown.source)
    assert "meter/drift" in found
    for name, (steps, values) in found.items():
        curve = record.curves[name]
        assert np.abs(steps - np.array(curve.steps)).max() <= 2e-3 * curve.steps[-1] + 0.01
        tolerance = 0.01 * max(curve.values) if name.startswith(("meter", "lr")) or not far else np.inf
        assert np.abs(values - np.array(curve.values)).max() <= tolerance
        if name.startswith("loss") and far and len(factors) > 20:
            assert np.abs(np.log10(values / np.array(curve.values))).max() < 0.05


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=20),
       st.lists(st.floats(0, allow_infinity=False), min_size=1, max_size=20))  # fmt: skip
def test_any_values_are_drawn_within_their_frame(tmp_path_factory, values, losses):
    record = Record()
    for step, value in enumerate(values):
        record.log({"meter/drift": value, "lr/a": value, "lr/b": 1.0}, step)
    for step, value in enumerate(losses):
        record.log({"loss/current": value, "loss/validation/step_average": value}, step)
    shown = written(tmp_path_factory.getbasetemp(), record)
    lines = [found["points"] for found in shown.attributes("polyline")]
    assert len(lines) == len([curve for curve in record.curves.values() if curve.values])
    points = np.array([list(map(float, pair.split(","))) for line in lines for pair in line.split()])
    assert ((points >= 0) & (points <= 1000)).all()


def test_figures_and_table_have_the_values_of_their_steps(tmp_path):
    record = Record()
    for step, learnt in ((10, 0.1), (20, 0.3123), (30, 0.32)):
        record.log({"meter/learnt": learnt, "meter/drift": learnt**2, "loss/average": 1 - learnt}, step)
        record.saved(Saved(f"cat-{step}.safetensors", step, step // 10, learnt**2, learnt))
    record.saved(Saved("cat-31.safetensors", 31, 4))
    (tmp_path / "cat-20.safetensors").write_bytes(b"0" * 2_500_000)
    shown = written(tmp_path, record, "finished")
    assert shown.files == [
        ["cat-10.safetensors", "10", "1", "10%", "0.01", "gone"],
        ["cat-20.safetensors (take this one)", "20", "2", "31.2%", "0.0975", "2.5 MB"],
        ["cat-30.safetensors", "30", "3", "32%", "0.102", "gone"],
        ["cat-31.safetensors", "31", "4", "", "", "gone"],
    ]
    assert "Take cat-20.safetensors" in shown.text
    assert dict(zip(shown.of("dt"), shown.of("dd"), strict=True)) | {"time": ""} == {
        "learnt": "32%", "drift": "0.102", "loss, mean of 100": "0.68", "time": "",
    }  # fmt: skip


@pytest.mark.parametrize("earlier", [0, 500])
def test_a_named_file_is_in_the_table_however_many_came_later(tmp_path, earlier):
    record = Record()
    (tmp_path / "0.safetensors").touch()
    for step in range(earlier + 1):
        record.saved(Saved(f"{step}.safetensors", step, 1, 0.1, 0.5))
    shown = written(tmp_path, record)
    assert shown.of("tr", class_="best")[0].startswith("0.safetensors (take this one)")
    assert len(shown.files) == min(earlier, 200) + 1


# --- samples ----------------------------------------------------------------------------------------------------------


def test_the_slider_has_the_samples_steps_and_each_picture_stands_at_its_own(tmp_path):
    record = draw(tmp_path, [0, 50, 100, 150], 3)
    record.saved(Saved("cat-100.safetensors", 100, 2))
    prompts = [Prompt("one", seed=1), Prompt("two"), Prompt("three")]
    shown = written(tmp_path, record, prompts=prompts)
    assert shown.steps == [0, 50, 100, 150]
    (slider,) = shown.attributes("input")
    assert (slider["min"], slider["max"], slider["value"], slider["step"]) == ("0", "3", "3", "1")
    assert shown.of("p", id="steps")[0].split() == ["0", "50", "100", "cat-100.safetensors", "150"]
    assert set(shown.images) == set(itertools.product(range(3), range(4)))
    for (prompt, number), colour in shown.images.items():
        assert np.abs(colour - colour_of(number, prompt)).max() < 6
    for words, article in zip(("one", "two", "three"), shown.of("article"), strict=True):
        assert words in article


def test_pictures_that_are_gone_or_broken_are_passed_over(tmp_path):
    record = draw(tmp_path, [10, 20, 30, 40])
    (tmp_path / "sample" / "10_0.png").unlink()
    (tmp_path / "sample" / "20_0.png").unlink()
    (tmp_path / "sample" / "20_1.png").unlink()
    (tmp_path / "sample" / "30_1.png").write_bytes(b"no picture")
    shown = written(tmp_path, record)
    assert shown.steps == [10, 30, 40]
    assert set(shown.images) == {(1, 0), (0, 1), (0, 2), (1, 2)}
    assert shown.text.count("no picture") == 2
    assert "3 of 4 rounds" in shown.text


def test_of_what_was_drawn_twice_the_later_one_is_shown(tmp_path):
    record = draw(tmp_path, [10], 1)
    Image.new("RGB", (24, 24), (250, 250, 250)).save(tmp_path / "sample" / "later.png")
    record.samples.append(Drawn("sample/later.png", 10, 0))
    assert written(tmp_path, record).images[0, 0].min() > 240


def test_a_page_of_many_samples_stays_small_and_reads_each_once(tmp_path, monkeypatch):
    (tmp_path / "sample").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "sample" / "noise.jpg", quality=95)
    content, read = (tmp_path / "sample" / "noise.jpg").read_bytes(), Counter()
    original = rounds.read_picture
    monkeypatch.setattr(rounds, "read_picture", lambda path: (read.update([path]), original(path))[1])
    record = Record()
    report = report_of(tmp_path, record)
    for step in range(10, 1010, 10):
        (tmp_path / "sample" / f"{step}.jpg").write_bytes(content)
        record.samples.append(Drawn(f"sample/{step}.jpg", step, 0))
        if step % 200 == 0 or step == 310:
            report.write()
            shown = page_of(report.file)
            assert report.file.stat().st_size < 8_000_000
            assert shown.steps[-1] == step
            gaps = {b - a for a, b in itertools.pairwise(shown.steps[:-1])}
            assert len(gaps) == 1
            room = rounds.BYTES // len(shown.attributes("img")[0]["src"])
            assert len(shown.steps) >= min(step // 10, room // 2)
    assert max(read.values()) == 1
    held = sum(len(one.url) for one in report.pictures._read.values() if one)
    assert held <= rounds.BYTES


def test_more_prompts_than_there_is_room_for_are_told(tmp_path):
    record = draw(tmp_path, [1, 2], 40)
    shown = written(tmp_path, record, prompts=[Prompt(f"p{number}") for number in range(40)])
    assert shown.tags["article"] == rounds.PROMPTS
    assert f"{rounds.PROMPTS} of 40 prompts" in shown.text


def test_pictures_that_are_trained_on_stand_beside_the_samples(tmp_path):
    record = draw(tmp_path, [1], 1)
    files = []
    for number in range(20):
        files.append(tmp_path / f"{number}.png")
        Image.new("RGB", (900, 300), "red").save(files[-1])
    files[0].unlink()
    shown = written(tmp_path, record, pictures=files)
    sizes = [found["width"] for found in shown.attributes("img") if found["alt"] == "trained on"]
    assert sizes == ["160"] * 6


# --- what a user writes -----------------------------------------------------------------------------------------------


def hostile_page(folder: Path, words: list[str]) -> Read:
    record = draw(folder, [1], 1)
    record.saved(Saved(words[0], 1, 1, 0.1, 0.5))
    told = Told()
    told.first = [words[1]]
    options = ReportOptions(settings={"network_args": [words[2]], "trigger_word": words[3]}, arguments=(words[4],))
    return written(folder, record, ended=words[5], options=options, told=told, model=words[6],
                   prompts=[Prompt(words[0])])  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(st.lists(st.one_of(st.text(min_size=1), st.sampled_from(HOSTILE)), min_size=7, max_size=7))
def test_no_text_gets_out_of_its_place(tmp_path_factory, words):
    folder = tmp_path_factory.getbasetemp() / "hostile"
    plainly, shown = hostile_page(folder, ["x"] * 7), hostile_page(folder, words)
    for tag in ("p", "span"):  # of the verdict, and of "gone", which a folder of that name is not
        del plainly.tags[tag], shown.tags[tag]
    assert shown.tags == plainly.tags
    assert plain(words[1]) in shown.of("li")
    assert [plain(words[2]), plain(words[3])] == shown.of("td", dir="auto")
    assert shown.of("title") == ["cat: step 10 of 1000"]
    for script in ("script", "style"):
        assert shown.of(script) == plainly.of(script)


def test_no_secret_is_shown(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("library.training.start.start_trackers", lambda *rest: None)
    assert run(wandb_api_key="s3cret-1", max_train_steps=1) == 0
    shown = page_of(tmp_path / "out" / "cat.html")
    assert "s3cret" not in shown.source
    assert "wandb_api_key" not in shown.of("th", scope="row")
    assert "--wandb_api_key '***'" in shown.of("code")[-1]
    config = tmp_path / "c.toml"
    config.write_text('wandb_api_key = "s3cret-2"\n')
    needed = ["--pretrained_model_name_or_path", "m", "--train_data_dir", str(tmp_path / "photos"), "--output_dir", "o"]
    for words in (["--config_file", str(config)], ["--wandb_api_key=s3cret-3"]):
        found = parse([*needed, *words])
        assert "s3cret" in found.logs.wandb_api_key
        assert "s3cret" not in repr(found.report)


# --- a training -------------------------------------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("a <b>cat</b> --w 64 --h 64 --s 1 --d 1\na dog --w 64 --h 64 --s 1 --d 2\n")
    return file


def test_a_training_leaves_one(run, tmp_path, prompts):
    changes = {"sample_prompts": prompts, "sample_every_n_steps": 1, "sample_at_first": True, "save_every_n_steps": 1,
               "save_last_n_steps": 0, "save_state": True, "learning_rate": "2e-3"}  # fmt: skip
    assert run(**changes) == 0
    out = tmp_path / "out"
    shown, record = page_of(out / "cat.html"), Record.read(out / "cat-state")
    assert shown.steps == sorted({one.step for one in record.samples}) == [0, 1, 2, 3]
    assert "cat has been trained" in shown.text
    assert "a <b>cat</b>" in shown.of("article")[0]
    named = {found["data-name"] for found in shown.attributes("polyline")}
    assert named == {name for name in record.curves if name.startswith(("loss/current", "loss/average", "lr/"))}
    there = {path.name for path in out.glob("*.safetensors")}
    names = [one.name for one in record.files] + ["cat.safetensors"]  # which is written after the last state
    assert {row[0]: row[-1] != "gone" for row in shown.files} == {name: name in there for name in names}
    assert len(there) < len(shown.files) == 3
    assert "--learning_rate 2e-3" in shown.of("code")[-1]
    assert shown.settings["learning_rate"] == "0.002"
    assert "max_grad_norm" not in shown.settings


def test_one_that_goes_on_shows_all_of_it(run, tmp_path, prompts, model_folder, photos):
    changes = {"sample_prompts": prompts, "sample_every_n_steps": 1, "save_every_n_steps": 1, "save_state": True}
    assert run(**changes, max_train_steps=2) == 0
    state = tmp_path / "out" / "cat-step00000001-state"
    assert run(**changes, max_train_steps=3, resume=state) == 0
    shown = page_of(tmp_path / "out" / "cat.html")
    assert shown.steps == [1, 2, 3]
    assert [row[0] for row in shown.files] == [
        "cat-step00000001.safetensors",
        "cat-step00000002.safetensors",
        "cat.safetensors",
    ]
    line = next(found for found in shown.attributes("polyline") if found["data-name"] == "loss/current")
    assert len(line["points"].split()) == 3


def test_no_report_and_one_step(run, tmp_path):
    assert run(max_train_steps=1, no_report=True) == 0
    assert not list((tmp_path / "out").glob("*.html"))
    assert run(max_train_steps=1) == 0
    shown = page_of(tmp_path / "out" / "cat.html")
    assert shown.tags["input"] == shown.tags["article"] == 0
    assert "The file is cat.safetensors" in shown.text


def test_a_training_that_ends_early_says_why(run, tmp_path, monkeypatch):
    after = TrainingLoop._after_step

    def interrupted(self):
        self.ending = 15 if self.position.step == 2 else 0
        after(self)

    monkeypatch.setattr(TrainingLoop, "_after_step", interrupted)
    assert run(max_train_steps=4) == 143
    shown = page_of(tmp_path / "out" / "cat.html")
    assert "cat has ended early" in shown.text
    assert f"--resume {tmp_path / 'out' / 'cat-step00000002-state'} goes on" in " ".join(shown.text.split())
    assert [row[0] for row in shown.files] == ["cat-step00000002.safetensors"]


def test_warnings_of_the_run_are_shown(run, tmp_path, monkeypatch):
    monkeypatch.setattr("library.training.loop.TrainingLoop._update", lambda self: torch.tensor(torch.inf))
    assert run(max_train_steps=2, max_nan_steps=9) == 0
    shown = page_of(tmp_path / "out" / "cat.html").of("li")
    assert "step 1: non-finite gradient inf, left out (1 in a row)" in shown
    assert not any(isinstance(one, Told) for one in logging.getLogger().handlers)


def test_one_that_cannot_be_written_is_told_once_and_ends_nothing(run, tmp_path, caplog):
    (tmp_path / "out" / "cat.html").mkdir(parents=True)
    assert run(save_every_n_steps=1) == 0
    lines = [one for one in caplog.records if "the report is not written" in one.getMessage()]
    assert len(lines) == 1
    assert str(tmp_path / "out" / "cat.html") in lines[0].getMessage()
    assert (tmp_path / "out" / "cat.safetensors").is_file()


def test_what_was_there_stays_whole_when_a_page_cannot_be_written(tmp_path, monkeypatch):
    report = report_of(tmp_path, Record())
    report.write()
    before = report.file.read_bytes()
    monkeypatch.setattr(deft_io.os, "replace", lambda *rest: (_ for _ in ()).throw(OSError(28, "No space left")))
    report.write("finished")
    assert report.failed
    assert report.file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["cat.html"]


def test_only_the_main_process_writes(tmp_path):
    report_of(tmp_path, draw(tmp_path, [1]), writes=False).write()
    assert not (tmp_path / "cat.html").exists()


# --- pieces -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 200), max_size=400))
def test_of_many_warnings_the_first_and_the_last_are_kept_and_the_rest_counted(numbers):
    told = Told()
    with told:
        for number in numbers:
            logging.getLogger("library.x").warning(f"line {number}")
            logging.getLogger("elsewhere").warning("not ours")
    lines = told.lines()
    assert len(lines) <= 2 * MOST + 1
    distinct = list(dict.fromkeys(f"line {number}" for number in numbers))
    assert lines[:MOST] == distinct[:MOST]
    if numbers:
        assert f"line {numbers[-1]}" in lines


def test_the_command_is_one_for_the_platforms_shell(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_network_deft.py"])
    words = ["--output_name", "a cat's $HOME", "--x=;rm"]
    assert shlex.split(interrupts.command(words, windows=False)) == ["python", "train_network_deft.py", *words]
    assert '"a cat\'s $HOME"' in interrupts.command(words, windows=True)
