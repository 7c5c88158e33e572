"""The papers' benchmarks: intervals over subjects, tables, contact sheet and plot, from made records and scores."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.paper import bootstrap, plots, report, scored, sheet, tables
from benchmarks.paper.plan import Benchmark, Published, Source
from networks.deft_config import DeftError

BENCHMARK = Benchmark(
    "Made", lambda folder: [], Source("", "", ""), ("clip_i", "clip_t", "pres", "fid"), steps=1, size=8,
    published=(Published("DEFT of the paper", {"clip_t": 0.361, "CLIP-I animal": 0.9}, "a note", "deft"),
               Published("another's", {"clip_i": 0.5}, "a table")),
    columns={"CLIP-I animal": ("clip_i", "animal"), "CLIP-T imaginative": ("clip_t", "imaginative")},
    hundredfold=("clip_i",),
)  # fmt: skip
LORA, DEFT, SLOW = "lora|4|0.0001|100", "deft|4|5e-05|100", "deft|4|1e-05|100"
SUBJECTS = {"cat": "animal", "dog": "animal", "can": "object", "vase": "object"}
PROMPTS = {0: "photorealistic", 7: "imaginative"}


def likeness(method: str, subject: str) -> float:
    """DEFT is above LoRA by 0.02 on every subject; subjects differ by far more."""
    return {"cat": 0.5, "dog": 0.6, "can": 0.8, "vase": 0.9}[subject] + {"base": -0.2, DEFT: 0.02}.get(method, 0.0)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run of three methods on four subjects and one tuning subject, two prompts each."""
    records, scores = [], []
    for name in [*SUBJECTS, "tuned"]:
        for method in ("base", LORA, DEFT, *([SLOW] if name == "tuned" else [])):
            for index, category in PROMPTS.items():
                place = f"out/{method.replace('|', '_')}/{name}/{index}.png"
                (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (200, 0, 0)).save(tmp_path / place)
                records.append({"method": method, "subject": name, "index": index, "k": 0, "seed": 0, "picture": place,
                                "prompt": f"a photo of {name}", "category": category})  # fmt: skip
                value = 0.1 if name == "tuned" else likeness(method, name)
                scores.append({"picture": place, "clip_i": value, "clip_t": 0.3 + 0.01 * index})
        scores.append({"method": "real", "subject": name, "clip_i": 0.95})
    Image.new("RGB", (16, 8), (0, 200, 0)).save(tmp_path / "real.png")
    subjects = {
        name: {"group": SUBJECTS.get(name, "animal"), "tuning": name == "tuned",
               "pictures": dict.fromkeys(PROMPTS.values(), 1), "references": [str(tmp_path / "real.png")]}
        for name in [*SUBJECTS, "tuned"]
    }  # fmt: skip
    methods = {
        key: {"adapter": key.split("|")[0], "rank": 4, "rate": float(key.split("|")[2]), "steps": 100,
              "parameters": 1234567, "rate_chosen": key != SLOW}
        for key in (LORA, DEFT, SLOW)
    }  # fmt: skip
    told = {"benchmark": "Made", "settings": {"steps": 100}, "subjects": subjects, "methods": methods,
            "notes": ["PRES is left out: no model"]}  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps(told), encoding="utf-8")
    write(tmp_path / "records.jsonl", records)
    write(tmp_path / "scores.jsonl", scores)
    return tmp_path / "results.json"


def write(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def cells(markdown: str, name: str) -> list[list[str]]:
    """The rows of a method in all tables."""
    lines = [line for line in markdown.split("\n") if line.startswith(f"| {name} |")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


# --- intervals -------------------------------------------------------------------------------------------------------


def named(values) -> dict[str, float]:
    return {f"{i:03}": float(value) for i, value in enumerate(values)}


def test_an_interval_covers_the_mean_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(bootstrap, "SAMPLES", 1000)
    rng = np.random.default_rng(1)
    found = [bootstrap.interval(named(rng.normal(0.7, 0.1, 30)), seed % 20) for seed in range(400)]
    covered = np.mean([interval.low <= 0.7 <= interval.high for interval in found])
    assert 0.90 < covered < 0.97
    widths = np.mean([interval.high - interval.low for interval in found])
    assert widths == pytest.approx(2 * 1.96 * 0.1 / 30**0.5, rel=0.05)


def test_intervals_that_are_known():
    assert bootstrap.interval({"a": 0.0, "b": 1.0})[:4] == (0.5, 0.0, 1.0, 2), "a quarter of the draws is 0, another 1"
    assert bootstrap.interval({"a": 0.25}) == (0.25, None, None, 1, 1)
    assert bootstrap.interval(named([0.5] * 9))[:3] == (0.5, 0.5, 0.5)
    values = named(np.random.default_rng(0).normal(size=20))
    assert bootstrap.interval(values) == bootstrap.interval(dict(reversed(values.items()))), "order does not matter"
    with pytest.raises(ValueError, match="no subjects"):
        bootstrap.interval({})


def test_a_paired_difference_is_narrower_than_two_means():
    rng = np.random.default_rng(2)
    easy = rng.normal(0.7, 0.1, 25)
    ours, theirs = named(easy + 0.02 + rng.normal(0, 0.005, 25)), named(easy + rng.normal(0, 0.005, 25))
    found, alone = bootstrap.paired(ours, theirs), [bootstrap.interval(values) for values in (ours, theirs)]
    assert found.mean == pytest.approx(alone[0].mean - alone[1].mean)
    assert 0 < found.low < 0.02 < found.high + 0.005
    assert found.high - found.low < 0.2 * min(interval.high - interval.low for interval in alone)
    assert bootstrap.paired(ours, theirs | {"more": 9.0}) == found, "of the subjects that both have"
    assert bootstrap.paired(ours, {"other": 1.0}) is None


def test_more_pictures_of_the_same_subjects_do_not_narrow_an_interval(run):
    before = report.as_json(scored.read(run), BENCHMARK)["figures"][LORA]["CLIP-I"]
    for name in ("records", "scores"):
        rows = [row for row in rows_of(run.with_name(f"{name}.jsonl")) if "picture" in row]
        more = [row | {"picture": f"{row['picture']}.{i}"} for row in rows for i in range(20)]
        write(run.with_name(f"{name}.jsonl"), rows + more)
    after = report.as_json(scored.read(run), BENCHMARK)["figures"][LORA]["CLIP-I"]
    assert after == pytest.approx(before)


# --- tables ----------------------------------------------------------------------------------------------------------


def test_tables_say_what_is_known(run, capsys):
    report.report(BENCHMARK, run)
    printed = capsys.readouterr().out.partition("\nno plot: ")[0]  # which a machine without matplotlib says
    assert (run.parent / "report.md").read_text(encoding="utf-8").strip() == printed.strip()
    main, hundredfold, animal, imaginative, rates = cells(printed, "deft")[:5]
    assert main[:5] == ["deft", "4", "1,234,567", "5e-05", "100"]
    assert main[5].startswith("0.720 [")
    assert hundredfold[1].startswith("72.00 [")
    assert animal[1].startswith("0.570 [")
    assert imaginative[1] == "0.370 [0.370, 0.370]"
    assert rates == ["deft", "**5e-05**", "0.100", "0.335"]
    assert cells(printed, "real pictures")[0][5:] == ["0.950 [0.950, 0.950]", "–"]
    assert cells(printed, "base model")[0][5].startswith("0.500 [")
    assert [cells(printed, f"{name} minus lora")[0][1] for name in ("deft", "base model")] == [
        "+0.020 [+0.020, +0.020]; higher in 4 of 4", "-0.200 [-0.200, -0.200]; higher in 0 of 4"]  # fmt: skip
    assert "too narrow for so few" in printed
    assert "1 more served to choose rates" in printed
    assert "* PRES is left out: no model" in printed
    assert "PRES |" not in printed, "a column without figures is left out"


def test_published_figures_stand_apart_and_beside_ones_own(run):
    found = tables.published_table(BENCHMARK, scored.read(run)).split("\n")
    assert found[0] == "| published method | figure | published (not ours) | own run | source |"
    assert found[2] == "| DEFT of the paper | CLIP-T | 0.361 | 0.335 [0.335, 0.335] | a note |"
    assert found[3].startswith("| DEFT of the paper | CLIP-I animal | 0.900 | 0.570 [")
    assert found[4] == "| another's | CLIP-I | 0.500 |  | a table |"
    alone = tables.published_table(BENCHMARK).split("\n")
    assert [line.split(" | ")[3] for line in alone[2:]] == [""] * 3


def test_missing_pictures_are_said(run):
    file = run.with_name("scores.jsonl")
    rows = rows_of(file)
    lost = [i for i, row in enumerate(rows) if "lora" in row.get("picture", "") and "/vase/" in row["picture"]]
    rows[lost[0]]["clip_i"] = None
    rows[lost[1]]["clip_i"] = float("nan")
    del rows[next(i for i, row in enumerate(rows) if "lora" in row.get("picture", "") and "/cat/0" in row["picture"])]
    write(file, rows)
    found = scored.read(run)
    assert found.missing(LORA, "clip_i") == {"vase": 2, "cat": 1}
    assert found.missing(LORA, "clip_t") == {"cat": 1}
    assert found.missing(LORA, "clip_t", "imaginative") == {}
    assert found.missing(DEFT, "clip_i") == {}
    text = report.markdown(found, BENCHMARK)
    assert cells(text, "lora")[0][5].startswith("0.633 [")
    assert cells(text, "lora")[0][5].endswith("]*")
    assert cells(text, "deft")[0][5].endswith("]")
    assert "* lora: 3 without a score, of cat, vase: CLIP-I" in text
    assert "higher in 3 of 3" in cells(text, "deft minus lora")[0][1], "where both have a score"
    assert report.as_json(found, BENCHMARK)["figures"][LORA]["CLIP-I"]["missing"] == 3


def test_a_mean_over_fewer_prompts_than_anothers_has_a_star(run):
    """As after a command line with a lower --limit_prompts: results.json then asks for no more than that."""
    told = json.loads(run.read_text(encoding="utf-8"))
    for subject in told["subjects"].values():
        del subject["pictures"]["imaginative"]
    run.write_text(json.dumps(told), encoding="utf-8")
    file = run.with_name("records.jsonl")
    write(file, [row for row in rows_of(file) if (row["method"], row["category"]) != (DEFT, "imaginative")])
    found = scored.read(run)
    assert found.missing(LORA, "clip_t") == {}
    assert found.missing(DEFT, "clip_t") == dict.fromkeys(SUBJECTS, 1)
    text = report.markdown(found, BENCHMARK)
    assert cells(text, "deft")[0][6].endswith("*")
    assert "]*; higher" in cells(text, "deft minus lora")[0][2]


def test_a_method_of_which_nothing_is_there_is_missing_altogether(run):
    write(run.with_name("scores.jsonl"), [r for r in rows_of(run.with_name("scores.jsonl")) if "deft" not in str(r)])
    found = scored.read(run)
    assert sum(found.missing(DEFT, "clip_i").values()) == 8
    text = report.markdown(found, BENCHMARK)
    assert cells(text, "deft")[0][5:] == ["–", "–"]
    assert "* deft: 8 without a score, of can, cat, dog, vase: CLIP-I, CLIP-T" in text


def test_prompts_of_the_class_alone_are_in_no_other_mean(run):
    """PRES is of them, and the other metrics are not: neither waits for the other's pictures."""
    told = json.loads(run.read_text(encoding="utf-8"))
    for subject in told["subjects"].values():
        subject["pictures"]["prior"] = 1
    run.write_text(json.dumps(told), encoding="utf-8")
    files = run.with_name("records.jsonl"), run.with_name("scores.jsonl")
    records, scores = map(rows_of, files)
    for method in (LORA, DEFT):
        for name in SUBJECTS:
            picture = f"{method}/{name}/prior.png"
            records.append({"method": method, "subject": name, "index": 50, "k": 0, "seed": 0, "picture": picture,
                            "prompt": "a cat", "category": "prior"})  # fmt: skip
            scores.append({"picture": picture, "pres": 0.25})
    for file, rows in zip(files, (records, scores), strict=True):
        write(file, rows)
    found = scored.read(run)
    assert not any(found.missing(LORA, metric) for metric in ("clip_i", "clip_t", "pres"))
    text = report.markdown(found, BENCHMARK)
    assert cells(text, "lora")[0][7] == "0.250 [0.250, 0.250]"
    assert "PRES (lower is better)" in text


def test_methods_of_several_ranks_are_told_apart_and_compared_with_their_own(run):
    told = json.loads(run.read_text(encoding="utf-8"))
    for key in (LORA, DEFT):
        told["methods"][key.replace("|4|", "|8|")] = told["methods"][key] | {"rank": 8}
    run.write_text(json.dumps(told), encoding="utf-8")
    for name in ("records.jsonl", "scores.jsonl"):
        rows = [row for row in rows_of(run.with_name(name)) if "_4_" in row.get("picture", "")]
        more = json.loads(json.dumps(rows).replace("_4_", "_8_").replace("|4|", "|8|"))
        more = [row | {"clip_i": row["clip_i"] + 0.05} if "clip_i" in row else row for row in more]
        write(run.with_name(name), rows_of(run.with_name(name)) + more)
    text = report.markdown(scored.read(run), BENCHMARK)
    assert cells(text, "deft, rank 8")[0][5].startswith("0.770 [")
    assert cells(text, "deft, rank 4")[0][5].startswith("0.720 [")
    for rank in ("4", "8"):
        assert cells(text, f"deft, rank {rank} minus lora, rank {rank}")[0][1].startswith("+0.020 [")


def test_scores_of_sets(run):
    file = run.with_name("scores.jsonl")
    more = [{"method": DEFT, "subject": "", "fid": 12.345, "drawn": 7, "real": 4},
            {"method": LORA, "subject": "", "fid": 20.0, "drawn": 8, "real": 4}]  # fmt: skip
    write(file, rows_of(file) + more)
    text = report.markdown(scored.read(run), BENCHMARK)
    assert cells(text, "deft")[0][7] == "12.35*"
    assert cells(text, "lora")[0][7] == "20.00"
    assert "* FID of deft: 7 drawn pictures beside 4 real ones" in text


def test_what_is_read_does_not_depend_on_order_and_the_last_line_counts(run):
    before = report.as_json(scored.read(run), BENCHMARK)
    for name in ("records", "scores"):
        file = run.with_name(f"{name}.jsonl")
        write(file, rows_of(file)[::-1])
    assert report.as_json(scored.read(run), BENCHMARK) == before
    file = run.with_name("scores.jsonl")
    again = [row | {"clip_i": 1.0} for row in rows_of(file) if "deft" in row.get("picture", "")]
    write(file, rows_of(file) + again)
    with open(file, "a", encoding="utf-8") as lines:
        lines.write('{"picture": "out/de')  # killed while it wrote
    assert scored.read(run).of_subjects(DEFT, "clip_i") == dict.fromkeys(SUBJECTS, 1.0)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("scores.jsonl", '{"picture"\n{}\n', "line 1 is no JSON object"),
        ("records.jsonl", "[]\n", "line 1 is no JSON object"),
        ("results.json", "{", "no JSON"),
        ("results.json", "{}", "there are no results yet"),
        ("results.json", '{"methods": {}}', "holds no results"),
    ],
)
def test_damaged_files_are_named(run, name, text, said):
    run.with_name(name).write_text(text, encoding="utf-8")
    with pytest.raises(DeftError, match=said) as error:
        scored.read(run)
    assert name in str(error.value)


# --- pictures --------------------------------------------------------------------------------------------------------


def test_the_sheet_shows_each_picture_in_its_place(run):
    found = scored.read(run)
    (run.parent / f"out/{LORA.replace('|', '_')}/cat/0.png").unlink()
    columns, lines = report.sheet_of(found)
    assert columns == ["real", "base model", "lora", "deft"]
    assert [line.label.split("\n")[0] for line in lines] == [name for name in SUBJECTS for _ in PROMPTS]
    sheet.draw(columns, lines, run.parent / "sheet.png")
    with Image.open(run.parent / "sheet.png") as picture:
        assert picture.size == (sheet.LABEL + 4 * (sheet.CELL + sheet.GAP), sheet.HEAD + 8 * (sheet.CELL + sheet.GAP))

        def seen(row: int, column: int, down: float = 0.5) -> tuple:
            left, top = (at * (sheet.CELL + sheet.GAP) for at in (column, row))
            return picture.getpixel((sheet.LABEL + left + 10, sheet.HEAD + top + int(down * sheet.CELL)))

        assert seen(0, 0) == (0, 200, 0)
        assert seen(0, 0, 0.1) == (255, 255, 255), "it is twice as wide as high"
        assert seen(0, 2) == (220, 220, 220), "missing"
        assert seen(0, 1) == seen(0, 3) == seen(1, 2) == (200, 0, 0)


def test_labels_are_broken_where_they_end():
    text = "live_subject_animal_04_red_panda\na red panda in a jungle"
    found = sheet.wrapped(text, lambda part: len(part) <= 12)
    assert found == ["live_subject", "_animal_04_r", "ed_panda", "a red panda", "in a jungle"]
    assert sheet.wrapped("ab", lambda part: False) == ["a", "b"], "no width at all still ends"


@pytest.mark.parametrize(("number", "most", "expected"), [(3, 6, [0, 1, 2]), (9, 2, [0, 8]), (150, 3, [0, 74, 149])])
def test_rows_are_spread(number, most, expected):
    assert sheet.spread(number, most) == expected


def test_the_plot_stands_where_the_means_are(run):
    (panel,), (apart,) = report.panels(scored.read(run), BENCHMARK)
    assert apart.points.keys() == {"base model", "deft"}
    assert apart.points["deft"][1][:3] == pytest.approx((0.02, 0.02, 0.02))
    assert panel.points.keys() == {"base model", "lora", "deft"}
    x, y = panel.points["deft"]
    assert (x.mean, y.mean) == pytest.approx((0.335, 0.72))
    assert panel.limit == pytest.approx(0.95)
    pytest.importorskip("matplotlib")
    plots.draw([[panel], [apart]], run.parent / "plot.png", "Made")
    with Image.open(run.parent / "plot.png") as picture:
        assert picture.width > 300


def test_without_matplotlib_there_is_a_line(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.report(BENCHMARK, run)
    assert "no plot: matplotlib is missing" in capsys.readouterr().out
    assert (run.parent / "sheet.png").is_file()
    assert not (run.parent / "plot.png").exists()
