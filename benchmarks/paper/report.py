"""What a run comes to: tables in the papers' form, as Markdown and JSON; a contact sheet; fidelity against editability.

Means are over subjects, each counted once, with intervals by a bootstrap over subjects. Where pictures are missing the
figure has a star and the report says how many. Figures of others stand in a table of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.paper import plots, sheet
from benchmarks.paper.bootstrap import COVERED, Interval, interval, paired
from benchmarks.paper.metrics import METRICS
from benchmarks.paper.plan import BASE, REAL, Benchmark, Published
from benchmarks.paper.scored import Method, Scored, read
from networks.deft_io import write_whole

REFERENCE = "lora"  # that the other adapters are compared with, where it was trained
ANCHORS = {REAL: "real pictures", BASE: "base model"}
FIDELITY, EDITABILITY = ("clip_i", "dino", "dinov1", "dinov2"), "clip_t"  # in the plot
SHOWN_SUBJECTS, SHOWN_PROMPTS = 6, 2  # on the contact sheet


class Column(NamedTuple):
    """A figure of each method.

    :param metric: name in METRICS
    :param of: the category of prompts, or group of subjects, of which it is the mean; "" for all
    """

    title: str
    metric: str
    of: str = ""

    @property
    def digits(self) -> int:
        """Behind the point."""
        return METRICS[self.metric].digits


class Figure(NamedTuple):
    """What stands in a cell.

    :param missing: how many pictures that were asked for are not in it
    """

    value: Interval
    missing: int = 0

    def text(self, digits: int) -> str:
        """Mean and interval, with a star where pictures are missing."""
        mean, low, high, *_ = self.value
        ends = "" if low is None or high is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
        return f"{mean:.{digits}f}{ends}" + "*" * (self.missing > 0)

    def hundredfold(self) -> Figure:
        """The same times 100."""
        low, high = (None if end is None else 100 * end for end in (self.value.low, self.value.high))
        return Figure(self.value._replace(mean=100 * self.value.mean, low=low, high=high), self.missing)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in (head, ["---"] * len(head), *rows)
    )


def columns_of(benchmark: Benchmark) -> list[Column]:
    """The metrics over all, and then of categories and groups."""
    whole = [Column(METRICS[name].title, name) for name in benchmark.metrics]
    return whole + [Column(title, metric, of) for title, (metric, of) in benchmark.columns.items()]


def found_columns(scored: Scored, benchmark: Benchmark) -> list[Column]:
    """Those of metrics that were computed: why others were not, the notes say."""
    there = {name for row in (*scored.scores, *scored.sets) for name in row}
    return [column for column in columns_of(benchmark) if column.metric in there]


def over_all(scored: Scored, benchmark: Benchmark) -> list[Column]:
    """Those of them that are over all prompts and subjects."""
    return [column for column in found_columns(scored, benchmark) if not column.of]


def shown(scored: Scored) -> list[Method]:
    """The rows of the tables: the anchors, and each adapter at its chosen rate.

    Without real pictures beside others: there are none where a subject has but one.
    """
    there = {BASE, *(row["method"] for row in scored.scores)}
    anchors = [scored.methods.get(key, Method(key, key)) for key in ANCHORS if key in there]
    return anchors + [m for key, m in scored.methods.items() if m.chosen and key not in ANCHORS]


def label(method: Method) -> str:
    """A method's name in tables and pictures."""
    return ANCHORS.get(method.key, method.adapter)


def figure(scored: Scored, method: str, column: Column, tuning: bool = False) -> Figure | None:
    """A cell's content; None without a score."""
    whole = None if column.of or tuning else scored.of_all(method, column.metric)
    missing = sum(scored.missing(method, column.metric, column.of, tuning).values())
    if whole is not None:
        return Figure(Interval(whole[0], None, None, len(scored.counted())), missing)
    means = scored.of_subjects(method, column.metric, column.of, tuning)
    return Figure(interval(means), missing) if means else None


def _cells(scored: Scored, method: Method, columns: Iterable[Column], tuning: bool = False) -> list[str]:
    found = [(column, figure(scored, method.key, column, tuning)) for column in columns]
    return [cell.text(column.digits) if cell else "–" for column, cell in found]


# --- tables ----------------------------------------------------------------------------------------------------------


def main_table(scored: Scored, benchmark: Benchmark) -> str:
    """Methods x metrics."""
    columns = over_all(scored, benchmark)
    head = ["method", "rank", "trained parameters", "rate", "steps", *(column.title for column in columns)]
    return table(head, ([*_described(m), *_cells(scored, m, columns)] for m in shown(scored)))


def _described(method: Method) -> list[str]:
    told = ((method.rank, "d"), (method.parameters, ",d"), (method.rate, "g"), (method.steps, "d"))
    return [label(method), *("" if value is None else format(value, form) for value, form in told)]


def hundredfold_table(scored: Scored, benchmark: Benchmark) -> str:
    """The same times 100, as the benchmark's own tables have it; "" where they do not."""
    columns = [column for column in over_all(scored, benchmark) if column.metric in benchmark.hundredfold]
    found = ((m, [figure(scored, m.key, column) for column in columns]) for m in shown(scored))
    rows = ([label(m), *(cell.hundredfold().text(2) if cell else "–" for cell in cells)] for m, cells in found)
    return table(["method", *(f"100 x {column.title}" for column in columns)], rows) if columns else ""


def part_tables(scored: Scored, benchmark: Benchmark) -> list[str]:
    """Means of categories of prompts and groups of subjects: a table a metric."""
    found = []
    parts = [column for column in found_columns(scored, benchmark) if column.of]
    for metric in dict.fromkeys(column.metric for column in parts):
        columns = [column for column in parts if column.metric == metric]
        rows = ([label(m), *_cells(scored, m, columns)] for m in shown(scored))
        found.append(table(["method", *(column.title for column in columns)], rows))
    return found


def reference_of(scored: Scored) -> Method | None:
    """What the adapters are compared with: LoRA, or where there is none the first."""
    adapters = [method for method in shown(scored) if method.key not in ANCHORS]
    return next((method for method in adapters if method.adapter == REFERENCE), adapters[0] if adapters else None)


def difference(scored: Scored, ours: str, theirs: str, column: Column) -> Interval | None:
    """How much one method's figure differs from another's on the same subject."""
    mine, others = (scored.of_subjects(key, column.metric, column.of) for key in (ours, theirs))
    return paired(mine, others)


def paired_table(scored: Scored, benchmark: Benchmark) -> str:
    """Each adapter beside the reference, subject by subject; "" where there is nothing to compare."""
    reference = reference_of(scored)
    others = [m for m in shown(scored) if m.key != REAL and m != reference]
    columns = over_all(scored, benchmark)
    if reference is None or not others:
        return ""

    def cell(method: Method, column: Column) -> str:
        found = difference(scored, method.key, reference.key, column)
        if found is None:
            return "–"
        digits = column.digits
        ends = "" if found.low is None else f" [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
        return f"{found.mean:+.{digits}f}{ends}; higher in {found.better} of {found.subjects}"

    rows = ([label(method), *(cell(method, column) for column in columns)] for method in others)
    return table([f"minus {label(reference)}", *(_arrow(column) for column in columns)], rows)


def _arrow(column: Column) -> str:
    return column.title + ("" if METRICS[column.metric].higher else " (lower is better)")


def rates_table(scored: Scored, benchmark: Benchmark) -> str:
    """Each adapter at each rate on the tuning subjects, the chosen in bold type; "" without tuning subjects."""
    columns = over_all(scored, benchmark)
    methods = [method for method in scored.methods.values() if method.rate]
    rows = [
        [m.adapter, f"**{m.rate:g}**" if m.chosen else f"{m.rate:g}", *cells]
        for m in methods
        if set(cells := _cells(scored, m, columns, tuning=True)) != {"–"}
    ]
    return table(["adapter", "rate", *(column.title for column in columns)], rows) if rows else ""


def published_table(benchmark: Benchmark, scored: Scored | None = None) -> str:
    """Figures of others, each beside one's own run, which is empty where there is none."""

    columns = {name: column for column in reversed(columns_of(benchmark)) for name in (column.metric, column.title)}

    def own(published: Published, column: Column) -> str:
        runs = [m for m in shown(scored) if m.adapter == published.adapter] if scored and published.adapter else []
        cell = figure(scored, runs[0].key, column) if scored and runs else None
        return cell.text(column.digits) if cell else ""

    rows = (
        [p.method, columns[name].title, f"{value:.{columns[name].digits}f}", own(p, columns[name]), p.source]
        for p in benchmark.published
        for name, value in p.figures.items()
    )
    return table(["published method", "figure", "published (not ours)", "own run", "source"], rows)


def missing_lines(scored: Scored, benchmark: Benchmark) -> list[str]:
    """What figures lack, a line a method and metrics."""
    lines: dict[str, list[str]] = {}
    for method in shown(scored):
        for column in over_all(scored, benchmark):
            lacking = scored.missing(method.key, column.metric)
            if not lacking or (method.key == REAL and not scored.of_subjects(REAL, column.metric)):
                continue
            subjects = sorted(lacking)
            named = ", ".join(subjects[:5]) + (f" and {len(subjects) - 5} more" if len(subjects) > 5 else "")
            text = f"{sum(lacking.values())} without a score, of {named}"
            lines.setdefault(f"{label(method)}: {text}", []).append(column.title)
    return [f"{text}: {', '.join(names)}" for text, names in lines.items()]


def set_lines(scored: Scored, benchmark: Benchmark) -> list[str]:
    """Of how many pictures the scores of sets are: those of few are biased."""
    names = [name for name in benchmark.metrics if METRICS[name].of_sets]
    return [
        f"{METRICS[name].title} of {label(m)}{' on ' + row['subject'] if row['subject'] else ''}: "
        f"{row.get('drawn')} drawn pictures beside {row.get('real')} real ones"
        for m in shown(scored)
        for row in scored.sets
        for name in names
        if row["method"] == m.key and name in row
    ]


# --- the whole -------------------------------------------------------------------------------------------------------


def markdown(scored: Scored, benchmark: Benchmark) -> str:
    """Everything in Markdown."""
    subjects, tuned = len(scored.counted()), len(scored.counted(tuning=True))
    basis = (
        f"Means over {subjects} subjects, each counted once, with {COVERED:.0%} intervals (bootstrap over subjects)."
    )
    missing = [f"* {line}" for line in missing_lines(scored, benchmark)]
    parts = [
        f"# {benchmark.name}",
        basis + (f" {tuned} more served to choose rates and do not count." if tuned else ""),
        main_table(scored, benchmark),
        "\n".join(["\\* Pictures are missing, and the mean is over the others:", "", *missing]) if missing else "",
        _titled("Times 100, as in the benchmark's own tables", hundredfold_table(scored, benchmark)),
        *(_titled("" if i else "By group and category", part)
          for i, part in enumerate(part_tables(scored, benchmark))),
        _titled("The same subjects, differences of their means", paired_table(scored, benchmark)),
        _titled("Rates, on the tuning subjects", rates_table(scored, benchmark)),
        _titled("Published by others", published_table(benchmark, scored) if benchmark.published else ""),
        _titled("Settings and notes", "\n".join(f"* {line}" for line in [
            *(f"{name}: {value}" for name, value in scored.settings.items()), *scored.notes,
            *set_lines(scored, benchmark)])),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def _titled(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if title and text else text


def as_json(scored: Scored, benchmark: Benchmark) -> dict[str, Any]:
    """The tables' figures as numbers, each subject's means, and the differences between all pairs of methods."""
    columns, methods = found_columns(scored, benchmark), shown(scored)
    pairs = [(a, b) for a in methods for b in methods if REAL not in (a.key, b.key) and a != b]
    found = {m.key: {c.title: figure(scored, m.key, c) for c in columns} for m in methods}
    differences = {(a.key, b.key): {c.title: difference(scored, a.key, b.key, c) for c in columns} for a, b in pairs}
    return {
        "benchmark": benchmark.name,
        "settings": dict(scored.settings),
        "methods": {m.key: m._asdict() for m in methods},
        "figures": {
            key: {name: {**f.value._asdict(), "missing": f.missing} for name, f in row.items() if f}
            for key, row in found.items()
        },
        "subjects": {
            m.key: {c.title: scored.of_subjects(m.key, c.metric) for c in columns if not c.of} for m in methods
        },
        "differences": [
            {"method": a, "minus": b, **{name: d._asdict() for name, d in row.items() if d}}
            for (a, b), row in differences.items()
        ],
        "published": [p.__dict__ | {"figures": dict(p.figures)} for p in benchmark.published],
    }


def panels(scored: Scored, benchmark: Benchmark) -> list[plots.Panel]:
    """Each measure of fidelity against CLIP-T, of all methods that drew."""
    columns = {column.metric: column for column in over_all(scored, benchmark)}
    editability, found = columns.get(EDITABILITY), []
    for fidelity in (columns[name] for name in FIDELITY if name in columns):
        if editability is None:
            break
        cells = {
            label(m): (figure(scored, m.key, editability), figure(scored, m.key, fidelity))
            for m in shown(scored)
            if m.key != REAL
        }
        points = {name: (x.value, y.value) for name, (x, y) in cells.items() if x and y}
        limit = figure(scored, REAL, fidelity)
        if points:
            found.append(plots.Panel(editability.title, fidelity.title, points, limit.value.mean if limit else None))
    return found


def sheet_of(scored: Scored) -> tuple[list[str], list[sheet.Line]]:
    """The contact sheet's columns and rows: a few subjects and prompts, spread over all."""
    drawn: dict[tuple[str, int], dict[str, Mapping[str, Any]]] = {}
    for record in sorted(scored.records.values(), key=lambda r: (r["subject"], r["index"], r["seed"], r["k"])):
        drawn.setdefault((record["subject"], record["index"]), {}).setdefault(record["method"], record)
    columns = [m for m in shown(scored) if any(m.key in row for row in drawn.values())]
    names = [name for name in scored.counted() if any(name == subject for subject, _ in drawn)]
    lines = []
    for name in (names[i] for i in sheet.spread(len(names), SHOWN_SUBJECTS)):
        indices = [index for subject, index in drawn if subject == name]
        for index in (indices[i] for i in sheet.spread(len(indices), SHOWN_PROMPTS)):
            row = drawn[name, index]
            prompt = next(iter(row.values()))["prompt"]
            cells = [scored.folder / row[m.key]["picture"] if m.key in row else None for m in columns]
            lines.append(sheet.Line(f"{name}\n{prompt}", [next(iter(scored.subjects[name].references), None), *cells]))
    return ["real", *(label(m) for m in columns)], lines


def report(benchmark: Benchmark, results: Path) -> None:
    """Prints the tables, and writes them as `report.md` and `report.json`, with `sheet.png` and `plot.png`, beside the
    results.

    :raises DeftError: where there are no results, or a folder cannot be written to
    """
    scored = read(results)
    text = markdown(scored, benchmark)
    print(text)
    folder = results.parent
    write_whole(folder / "report.md", text.encode())
    write_whole(folder / "report.json", json.dumps(as_json(scored, benchmark), indent=1, allow_nan=False).encode())
    columns, lines = sheet_of(scored)
    if lines:
        sheet.draw(columns, lines, folder / "sheet.png")
    drawn = panels(scored, benchmark)
    try:
        if drawn:
            plots.draw(drawn, folder / "plot.png", benchmark.name)
    except ImportError:
        print("no plot: matplotlib is missing (pip install matplotlib)")
