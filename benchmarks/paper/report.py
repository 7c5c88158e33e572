"""What a run comes to: tables in the papers' form, as Markdown and JSON; a contact sheet; fidelity against editability.

Means are over subjects, each counted once, with intervals by a bootstrap over subjects. Where pictures are missing the
figure has a star and the report says how many. Figures of others stand in a table of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.paper import plots, sheet
from benchmarks.paper.bootstrap import COVERED
from benchmarks.paper.plan import REAL, Benchmark
from benchmarks.paper.scored import Scored, read
from benchmarks.paper.tables import (
    difference,
    figure,
    found_columns,
    hundredfold_table,
    label,
    main_table,
    missing_lines,
    over_all,
    paired_table,
    part_tables,
    published_table,
    rates_table,
    reference_of,
    set_lines,
    shown,
)
from networks.deft_io import write_whole

FIDELITY, EDITABILITY = ("clip_i", "dino", "dinov1", "dinov2"), "clip_t"  # in the plot
SHOWN_SUBJECTS, SHOWN_PROMPTS = 6, 2  # on the contact sheet
FEW = 10  # subjects, below which a bootstrap's intervals are too narrow


def markdown(scored: Scored, benchmark: Benchmark) -> str:
    """Everything in Markdown."""
    subjects, tuned = len(scored.counted()), len(scored.counted(tuning=True))
    few = ", too narrow for so few" if subjects < FEW else ""
    basis = f"Means over {subjects} subjects, each counted once; {COVERED:.0%} intervals (bootstrap over them{few})."
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
            *(f"{name}: {value}" for name, value in scored.settings.items() if value != ""), *scored.notes,
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


def panels(scored: Scored, benchmark: Benchmark) -> list[list[plots.Panel]]:
    """Each measure of fidelity against CLIP-T: where all methods that drew stand, and how far from their references."""
    columns = {column.metric: column for column in over_all(scored, benchmark)}
    editability, where, apart = columns.get(EDITABILITY), [], []
    if editability is None:
        return []
    for fidelity in (columns[name] for name in FIDELITY if name in columns):
        points, steps = {}, {}
        for m in shown(scored):
            x, y = (figure(scored, m.key, column) for column in (editability, fidelity))
            if x and y and m.key != REAL:
                points[label(scored, m)] = x.value, y.value
            if reference := reference_of(scored, m):
                dx, dy = (difference(scored, m.key, reference.key, column) for column in (editability, fidelity))
                if dx and dy:
                    steps[label(scored, m)] = dx, dy
        limit = figure(scored, REAL, fidelity)
        titles = editability.title, fidelity.title
        where.append(plots.Panel(*titles, points, limit.value.mean if limit else None))
        apart.append(plots.Panel(*titles, steps, apart=True))
    return [row for row in (where, apart) if any(panel.points for panel in row)]


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
    return ["real", *(label(scored, m) for m in columns)], lines


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
