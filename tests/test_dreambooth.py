"""`benchmarks/dreambooth.py` on a miniature of its data's real layout: read, run, killed, resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from benchmarks import dreambooth
from benchmarks.paper import generating, stages, training
from library.training.loop import TrainingLoop
from networks.deft_config import DeftError
from tests import small_dreambooth, small_flux, small_judges, small_models, small_omnigen


class Killed(BaseException):
    """As if the process were gone: nothing that is done for an Exception is done."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return small_dreambooth.build(tmp_path_factory.mktemp("dreambooth") / "dataset")


@pytest.fixture(scope="module")
def judges(tmp_path_factory) -> dict[str, Path]:
    return small_judges.build(tmp_path_factory.mktemp("judges"))


@pytest.fixture
def run(data, judges, model_folder):
    def run(output: Path, *options: str) -> int:
        return small_dreambooth.run(data, model_folder, judges, output, *options)

    return run


def results_of(output: Path) -> dict:
    """All that a run comes to: adapters, pictures and scores."""
    adapters = {file.name: load_file(file) for file in output.glob("adapters/*.safetensors")}
    pictures = {str(file.relative_to(output)): file.read_bytes() for file in output.rglob("pictures/**/*.png")}
    scores = [json.loads(line) for line in (output / "scores.jsonl").read_text().splitlines()]
    return {"adapters": adapters, "pictures": pictures, "scores": sorted(scores, key=lambda one: one["picture"])}


def assert_same(one: dict, other: dict) -> None:
    assert one["pictures"] == other["pictures"]
    assert one["scores"] == other["scores"]
    assert one["adapters"].keys() == other["adapters"].keys()
    for name, tensors in one["adapters"].items():
        assert all(torch.equal(tensor, other["adapters"][name][key]) for key, tensor in tensors.items())


def forbid(monkeypatch, *what: tuple[object, str]) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("done once more")

    for place, name in what:
        monkeypatch.setattr(place, name, never)


# --- the data ---


def without(folder: Path, *names: str) -> None:
    file = folder / "prompts_and_classes.txt"
    rows = file.read_text().split("\n")
    file.write_text("\n".join(row for row in rows if row.split(",")[0] not in names))


def test_subjects_of_the_real_layout(data):
    found = {one.name: one for one in dreambooth.subjects_of(data, "zwx")}
    assert list(found) == ["can", "dog", "vase"]
    assert [one.name for one in found.values() if one.tuning] == ["can"]
    assert found["dog"].group, found["vase"].group == ("live", "object")
    dog = found["dog"]
    assert [row.caption for row in dog.rows] == ["a photo of zwx dog"] * small_dreambooth.PICTURES
    assert dog.asked[7].prompt == "a zwx dog wearing 7"
    assert found["vase"].asked[7].prompt == "a zwx vase at 7"
    assert [one.category for one in dog.asked] == ["scene"] * 10 + ["outfit"] * 10 + ["property"] * 5 + ["prior"]
    assert dog.asked[-1].prompt == "a dog"
    assert {one.number for one in dog.asked} == {4}
    assert dog.references == tuple(row.picture for row in dog.rows)


def test_prompts_are_read_and_never_run(tmp_path):
    folder = small_dreambooth.build(tmp_path / "data")
    file = folder / "prompts_and_classes.txt"
    evil = f"'a {{0.__class__}} {{1}}{{2}}' + open({str(tmp_path / 'run')!r}, 'w').name"
    text = file.read_text().replace("'a {0} {1} at 3'", evil)
    file.write_text(text)
    with pytest.raises(DeftError, match="49 prompts"):
        dreambooth.subjects_of(folder, "sks")
    file.write_text(text.replace(evil, "'a {0.__class__} {1}'"))
    vase = next(one for one in dreambooth.subjects_of(folder, "sks") if one.name == "vase")
    assert vase.asked[3].prompt == "a {0.__class__} vase"
    assert not (tmp_path / "run").exists()


def test_windows_line_ends_and_a_byte_order_mark(tmp_path):
    folder = small_dreambooth.build(tmp_path / "data")
    file = folder / "prompts_and_classes.txt"
    as_it_was = dreambooth.subjects_of(folder, "sks")
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert dreambooth.subjects_of(folder, "sks") == as_it_was


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (lambda folder: (folder / "prompts_and_classes.txt").unlink(), "has no prompts_and_classes.txt"),
        (lambda folder: [file.unlink() for file in (folder / "dog").iterdir()], "no pictures of dog"),
        (lambda folder: (folder / "vase" / "00.jpg").write_bytes(b"no picture"), "not a readable picture"),
        (lambda folder: without(folder, "dog", "vase"), "no subject is left to train on: can serve"),
    ],
)
def test_what_is_wrong_with_the_data_is_one_line(tmp_path, model_folder, judges, capsys, break_it, told):
    folder = small_dreambooth.build(tmp_path / "data")
    break_it(folder)
    assert small_dreambooth.run(folder, model_folder, judges, tmp_path / "out", "--rates", "1e-3") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert told in error


# --- a run ---


@pytest.fixture(scope="module")
def whole(data, judges, model_folder, tmp_path_factory) -> Path:
    """A run from beginning to end, with two rates to choose from."""
    output = tmp_path_factory.mktemp("whole")
    options = ("--adapters", "deft", "--rates", "1e-3", "1e-2", "--limit_subjects", "1")
    assert small_dreambooth.run(data, model_folder, judges, output, *options) == 0
    return output


def test_a_run_from_beginning_to_end(whole):
    results = json.loads((whole / "results.json").read_text())
    best = results["best"]["deft"]
    chosen = [key for key, one in results["methods"].items() if one.get("rate_chosen")]
    assert chosen == [f"deft|4|{best:g}|2"]
    assert results["subjects"]["can"]["tuning"]
    assert not results["subjects"]["dog"]["tuning"]
    assert "without prior preservation" in " ".join(results["notes"])
    assert f"deft: the best of the rates is at the edge of the grid, {best:g}" in results["notes"]
    records = [json.loads(line) for line in (whole / "records.jsonl").read_text().splitlines()]
    drawn = {(one["method"], one["subject"]) for one in records}
    rates = {f"deft|4|{rate}|2" for rate in ("0.001", "0.01")}
    assert drawn == {(key, "can") for key in rates | {"base"}} | {(key, "dog") for key in (chosen[0], "base")}
    assert all((whole / one["picture"]).is_file() for one in records)
    scores = [json.loads(line) for line in (whole / "scores.jsonl").read_text().splitlines()]
    kinds = {one["picture"]: one["category"] for one in records}
    assert {one["picture"] for one in scores if "method" not in one} == kinds.keys()
    for one in scores:
        wanted = {"pres"} if kinds.get(one["picture"]) == "prior" else {"dino", "clip_i"}
        assert wanted <= one.keys()
        assert ("clip_t" in one) == (kinds.get(one["picture"], "prior") != "prior")
    assert {one["subject"] for one in scores if one.get("method") == "real"} == {"can", "dog"}
    assert "| deft | 4 |" in (whole / "report.md").read_text()


def test_a_rerun_repeats_nothing(whole, run, monkeypatch, capsys):
    before = results_of(whole)
    times = {file: file.stat().st_mtime_ns for file in whole.rglob("adapters/*")}
    forbid(monkeypatch, (training, "train"), (generating, "Painter"), (stages.Scorer, "scores"))
    assert run(whole, "--adapters", "deft", "--rates", "1e-3", "1e-2", "--limit_subjects", "1") == 0
    assert_same(results_of(whole), before)
    assert times == {file: file.stat().st_mtime_ns for file in whole.rglob("adapters/*")}
    assert "| deft | 4 |" in capsys.readouterr().out


def test_killed_and_resumed_is_as_never_killed(whole, run, tmp_path, monkeypatch):
    """Killed in the midst of a training, and of a picture that is drawn and not yet recorded."""
    options = ("--adapters", "deft", "--rates", "1e-3", "1e-2", "--limit_subjects", "1")
    trained, steps, done = [], TrainingLoop._after_step, training.train

    def train(settings, one):
        record = done(settings, one)
        trained.append(one.key)
        return record

    def killed_at_its_second_step(loop):
        if len(trained) == 1 and loop.position.step == 2:
            raise Killed
        steps(loop)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train", train)
        patch.setattr(TrainingLoop, "_after_step", killed_at_its_second_step)
        with pytest.raises(Killed):
            run(tmp_path, *options)
    write, drawn = generating.write, []

    def killed_behind_the_fourth(image, file):
        write(image, file)
        drawn.append(file)
        if len(drawn) == 4:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training, "train", train)
        patch.setattr(generating, "write", killed_behind_the_fourth)
        with pytest.raises(Killed):
            run(tmp_path, *options)
    with open(tmp_path / "records.jsonl", "a") as file:
        file.write('{"method": "base", "subj')  # what is left of a line that was being written
    with monkeypatch.context() as patch:
        patch.setattr(training, "train", train)
        patch.setattr(generating, "write", lambda image, file: (drawn.append(file), write(image, file)))
        assert run(tmp_path, *options) == 0
    assert len(trained) == len(set(trained)) == 3
    assert len(drawn) == len(set(drawn)) + 1, "but for the picture that no record told of"
    assert_same(results_of(tmp_path), results_of(whole))


@pytest.mark.parametrize(("family", "guidance"), [("sdxl", 7.5), ("flux", None), ("omnigen", None)])
def test_other_models_from_beginning_to_end(data, judges, tmp_path, monkeypatch, family, guidance):
    """Killed behind the second picture and resumed; FLUX.1 and OmniGen have a guidance of their own."""
    build = {
        "sdxl": lambda: small_models.build("sdxl", tmp_path / "model"),
        "flux": lambda: small_flux.build(tmp_path).folder,
        "omnigen": lambda: small_omnigen.build(tmp_path),
    }
    model, output, write, drawn = build[family](), tmp_path / "out", generating.write, []
    options = ("--adapters", "lora", "deft", "--rates", "1e-2", "--limit_subjects", "1")

    def killed_behind_the_second(image, file):
        write(image, file)
        drawn.append(file)
        if len(drawn) == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(generating, "write", killed_behind_the_second)
        with pytest.raises(Killed):
            small_dreambooth.run(data, model, judges, output, *options)
    with monkeypatch.context() as patch:
        forbid(patch, (training, "train"))
        assert small_dreambooth.run(data, model, judges, output, *options) == 0
    records = [json.loads(line) for line in (output / "records.jsonl").read_text().splitlines()]
    assert {one["guidance"] for one in records} == {guidance}
    by_method = {(one["method"], one["index"]): (output / one["picture"]).read_bytes() for one in records}
    prompts = {index for _, index in by_method}
    assert len(by_method) == len(records) == 3 * len(prompts)
    for index in prompts:
        assert len({by_method[key, index] for key in ("base", "lora|4|0.01|2", "deft|4|0.01|2")}) == 3
    told = json.loads((output / "report.json").read_text())
    assert len({one["parameters"] for one in told["methods"].values() if one["parameters"]}) == 1
    assert all(told["figures"][key]["CLIP-I"]["missing"] == 0 for key in ("base", "lora|4|0.01|2", "deft|4|0.01|2"))


def test_a_signal_saves_a_training_which_then_goes_on(run, tmp_path, monkeypatch, capsys):
    options = ("--adapters", "lora", "--rates", "1e-3", "--limit_subjects", "1", "--stage", "train")
    assert run(tmp_path / "whole", *options) == 0
    steps, seen = TrainingLoop._after_step, []

    def asked_to_end(loop):
        seen.append(loop.position.step)
        if len(seen) == 1:
            loop.ending = signal.SIGTERM
        steps(loop)

    monkeypatch.setattr(TrainingLoop, "_after_step", asked_to_end)
    assert run(tmp_path / "ended", *options) == 128 + signal.SIGTERM
    assert "goes on from here" in capsys.readouterr().err
    assert run(tmp_path / "ended", *options) == 0
    assert seen == [1, 2], "no step is done twice"
    names = [sorted(os.listdir(tmp_path / which / "adapters")) for which in ("whole", "ended")]
    assert names[0] == names[1], "nothing of the state is left"
    one, other = (load_file(tmp_path / which / "adapters" / names[0][0]) for which in ("whole", "ended"))
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_results_of_other_settings_are_not_mixed(whole, run, capsys):
    options = ("--adapters", "deft", "--rates", "1e-3", "1e-2", "--limit_subjects", "1")
    for more in (("--drawing_steps", "3"), ("--token", "zwx"), ("--guidance", "0")):
        assert run(whole, *options, *more) == 2
        assert "give another --output" in capsys.readouterr().err


def test_the_same_folder_is_the_same_from_wherever_it_is_named(whole, data, judges, model_folder, monkeypatch):
    options = ("--adapters", "deft", "--rates", "1e-3", "1e-2", "--limit_subjects", "1", "--stage", "prepare")
    monkeypatch.chdir(data.parent)
    assert small_dreambooth.run(Path(data.name), model_folder, judges, whole, *options) == 0


def test_scores_of_two_models_are_not_mixed(whole, data, judges, model_folder, tmp_path, capsys):
    output = shutil.copytree(whole, tmp_path / "out")
    options = ("--adapters", "deft", "--rates", "1e-3", "1e-2", "--limit_subjects", "1")
    others = judges | {"dino": small_judges.build(tmp_path / "others", seed=1)["dino"]}
    assert small_dreambooth.run(data, model_folder, others, output, *options) == 2
    error = capsys.readouterr().err.strip()
    assert f"--dino {others['dino']}: another has scored {output}" in error
    assert "remove scores.jsonl" in error
    (output / "scores.jsonl").unlink()
    assert small_dreambooth.run(data, model_folder, others, output, *options) == 0
    before, after = ({one["picture"]: one for one in results_of(out)["scores"]} for out in (whole, output))
    both = [(before[name], after[name]) for name in before.keys() & after.keys() if "dino" in before[name]]
    assert both
    assert all(one["clip_i"] == other["clip_i"] and one["dino"] != other["dino"] for one, other in both)


def test_a_guidance_of_nothing_is_told_as_such(run, tmp_path):
    assert run(tmp_path, "--guidance", "0", "--rates", "1e-3", "--stage", "prepare") == 0
    assert run(tmp_path, "--guidance", "0", "--rates", "1e-3", "--stage", "score", "--limit_subjects", "1") == 0
    assert json.loads((tmp_path / "results.json").read_text())["settings"]["guidance"] == 0


def test_a_dry_run_tells_what_there_is_to_do(whole, run, tmp_path, capsys):
    assert run(tmp_path, "--dry_run", "--rates", "1e-3", "1e-2", "--seeds", "2", "--alexnet", "nowhere") == 0
    told = capsys.readouterr().out
    assert "https://github.com/google/dreambooth" in told
    assert "CC-BY-4.0" in told
    assert "MISSING (not given" in told, "DINOv2"
    assert "MISSING (--alexnet nowhere: there is no such file" in told
    # one subject to choose on, by two adapters at two rates; two that count, from two seeds
    assert "trainings of 2 steps: 12, of which 12 are missing" in told
    # 3 kinds of prompts of objects and 4 of what lives: base and 4 methods on can; base and 2 on both, twice
    assert f"pictures of 64 x 64: {3 * 5 + 2 * 7 * 3}, of which {3 * 5 + 2 * 7 * 3} are missing" in told
    assert "not measured yet" in told
    assert not any(tmp_path.iterdir())
    assert run(whole, "--dry_run", "--adapters", "deft", "--rates", "1e-3", "1e-2", "--limit_subjects", "1") == 0
    told = capsys.readouterr().out
    assert "3, of which 0 are missing" in told
    assert "measured on 3 trainings" in told
    assert run(tmp_path, "--dry_run", "--model", "nowhere") == 0
    assert "huggingface.co/stable-diffusion-v1-5" in capsys.readouterr().out
