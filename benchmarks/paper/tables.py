"""Tables in the papers' form, in Markdown: methods x metrics with intervals, parts of them, differences, figures of
others, and what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from benchmarks.paper.bootstrap import Interval, interval, paired
from benchmarks.paper.metrics import METRICS
from benchmarks.paper.plan import BASE, REAL, Benchmark, Published
from benchmarks.paper.scored import Method, Scored

REFERENCE = "lora"  # that the other adapters are compared with, where it was trained
ANCHORS = {REAL: "real pictures", BASE: "base model"}


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


def label(scored: Scored, method: Method) -> str:
    """A method's name in tables and pictures: its adapter's, and what tells it from others of the same."""
    same = [other for other in shown(scored) if other.adapter == method.adapter]
    told = [ANCHORS.get(method.key, method.adapter)]
    told += [f"rank {method.rank}"] * (len({other.rank for other in same}) > 1)
    told += [f"{method.steps} steps"] * (len({other.steps for other in same}) > 1)
    return ", ".join(told)


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


def main_table(scored: Scored, benchmark: Benchmark) -> str:
    """Methods x metrics."""
    columns = over_all(scored, benchmark)
    head = ["method", "rank", "trained parameters", "rate", "steps", *(column.title for column in columns)]
    return table(head, ([*_described(scored, m), *_cells(scored, m, columns)] for m in shown(scored)))


def _described(scored: Scored, method: Method) -> list[str]:
    told = ((method.rank, "d"), (method.parameters, ",d"), (method.rate, "g"), (method.steps, "d"))
    return [label(scored, method), *("" if value is None else format(value, form) for value, form in told)]


def hundredfold_table(scored: Scored, benchmark: Benchmark) -> str:
    """The same times 100, as the benchmark's own tables have it; "" where they do not."""
    columns = [column for column in over_all(scored, benchmark) if column.metric in benchmark.hundredfold]
    found = ((m, [figure(scored, m.key, column) for column in columns]) for m in shown(scored))
    rows = ([label(scored, m), *(cell.hundredfold().text(2) if cell else "–" for cell in cells)] for m, cells in found)
    return table(["method", *(f"100 x {column.title}" for column in columns)], rows) if columns else ""


def part_tables(scored: Scored, benchmark: Benchmark) -> list[str]:
    """Means of categories of prompts and groups of subjects: a table a metric."""
    found = []
    parts = [column for column in found_columns(scored, benchmark) if column.of]
    for metric in dict.fromkeys(column.metric for column in parts):
        columns = [column for column in parts if column.metric == metric]
        rows = ([label(scored, m), *_cells(scored, m, columns)] for m in shown(scored))
        found.append(table(["method", *(column.title for column in columns)], rows))
    return found


def reference_of(scored: Scored, method: Method) -> Method | None:
    """What a method is compared with: LoRA, if it can be of the same rank and steps; where there is none, the first
    adapter; None for itself."""
    adapters = [other for other in shown(scored) if other.key not in ANCHORS]
    ranked = sorted(adapters, key=lambda m: (m.adapter != REFERENCE, (m.rank, m.steps) != (method.rank, method.steps)))
    return ranked[0] if ranked and ranked[0] != method and method.key != REAL else None


def difference(scored: Scored, ours: str, theirs: str, column: Column) -> Interval | None:
    """How much one method's figure differs from another's on the same subject."""
    mine, others = (scored.of_subjects(key, column.metric, column.of) for key in (ours, theirs))
    return paired(mine, others)


def paired_table(scored: Scored, benchmark: Benchmark) -> str:
    """Each method minus its reference, subject by subject; "" where there is nothing to compare."""
    columns = over_all(scored, benchmark)
    pairs = [(m, reference) for m in shown(scored) if (reference := reference_of(scored, m))]
    rows = (
        [f"{label(scored, m)} minus {label(scored, other)}", *(_difference(scored, m, other, c) for c in columns)]
        for m, other in pairs
    )
    return table(["difference", *(_arrow(column) for column in columns)], rows) if pairs else ""


def _difference(scored: Scored, method: Method, reference: Method, column: Column) -> str:
    found, digits = difference(scored, method.key, reference.key, column), column.digits
    if found is None:
        return "–"
    ends = "" if found.low is None else f" [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
    star = "*" * any(scored.missing(one.key, column.metric, column.of) for one in (method, reference))
    return f"{found.mean:+.{digits}f}{ends}{star}; higher in {found.better} of {found.subjects}"


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
            lines.setdefault(f"{label(scored, method)}: {text}", []).append(column.title)
    return [f"{text}: {', '.join(names)}" for text, names in lines.items()]


def set_lines(scored: Scored, benchmark: Benchmark) -> list[str]:
    """Of how many pictures the scores of sets are: those of few are biased."""
    names = [name for name in benchmark.metrics if METRICS[name].of_sets]
    return [
        f"{METRICS[name].title} of {label(scored, m)}{' on ' + row['subject'] if row['subject'] else ''}: "
        f"{row.get('drawn')} drawn pictures beside {row.get('real')} real ones"
        for m in shown(scored)
        for row in scored.sets
        for name in names
        if row["method"] == m.key and name in row
    ]
