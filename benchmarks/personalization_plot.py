"""Tables, plots and contact sheet of `personalization.py`: `python benchmarks/personalization_plot.py [RESULTS]`."""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = {
    "likeness": "likeness_share", "prompt followed": "follow", "old world": "old", "old pairs": "old_pair",
    "drift": "drift", "two files": "compose", "both at once": "compose_both", "mixed up": "compose_mixed",
}  # fmt: skip
PARTS = ("background", "count", "known", "relation", "style", "edit_likeness", "old_colour", "old_shape",
         "old_background")  # fmt: skip
AT_LIKENESS = {"old world": "old", "old pairs": "old_pair", "prompt followed": "follow", "drift": "drift",
               "two files": "compose"}  # fmt: skip
PLOTS = {"old": "old-world accuracy", "follow": "prompt following with the concept", "drift": "drift"}
SAMPLES = 1000  # of the bootstrap
REFERENCE = "lora"  # that the others are compared with at their own likeness, between its rates
CURVES = (REFERENCE, "deft")  # in colours, in the plot
SUMMARY = {"deft": 1e-2, "deft keep=64": 4e-2, "deft keep=32": 4e-2, "deft keep=16": 4e-2,
           "deft removal=1": 1e-2}  # rates of the short table, the contact sheet and the plot  # fmt: skip
CHOSEN_ON = 10  # of the test concepts, the first, were there when defaults and advised rates were chosen
SHOWN_CONCEPTS = 2  # on the contact sheet
SHOWN = 0.7  # likeness at the best rate from which an adapter is in the plot

Run = dict[str, Any]
Unit = tuple[tuple[int, ...], int]  # a concept, or two whose adapters are in one model; and a seed


def select(runs: Mapping[str, Run], adapter: str, rate: float | None, concepts: Sequence[int]) -> list[Run]:
    """An adapter's runs on these concepts, at one rate or all; those of two composed concepts too."""
    wanted = set(concepts)
    return [
        run
        for run in runs.values()
        if run["adapter"] == adapter
        and (rate is None or run["rate"] == rate)
        and wanted.issuperset(run.get("concepts") or [run["concept"]])
    ]


def mean_of(runs: Mapping[str, Run], adapter: str, rate: float, concepts: Sequence[int], name: str) -> float:
    """The mean of a figure; NaN where there is none."""
    return _mean([run[name] for run in select(runs, adapter, rate, concepts) if name in run])


def rates_of(runs: Mapping[str, Run], adapter: str, concepts: Sequence[int]) -> list[float]:
    """At which an adapter was trained on these concepts, in rising order."""
    return sorted({run["rate"] for run in select(runs, adapter, None, concepts)})


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def with_interval(values: Sequence[float]) -> str:
    """Mean and half the width of its 95% interval (normal approximation)."""
    if not values:
        return "–"
    if len(values) < 2:
        return f"{values[0]:.3f}"
    mean = _mean(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return f"{mean:.3f} ± {1.96 * spread / math.sqrt(len(values)):.3f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


# --- curves ----------------------------------------------------------------------------------------------------------


def reference_of(data: Mapping[str, Any], adapter: str) -> str:
    """What an adapter is compared with: LoRA; where there is none, the same without removal."""
    return REFERENCE if REFERENCE in data["best"] else adapter.replace(" removal=1", "")


def points(
    data: Mapping[str, Any], adapter: str, rate: float, name: str, concepts: Sequence[int]
) -> dict[Unit, tuple[float, float]]:
    """(likeness, figure) of each unit; of two concepts, their mean likeness before their adapters are put together."""
    runs = select(data["runs"], adapter, rate, concepts)
    likeness = {(run["concept"], run["seed"]): run["likeness_share"] for run in runs if "concept" in run}
    return {
        (group, run["seed"]): (_mean([likeness[concept, run["seed"]] for concept in group]), run[name])
        for run in runs
        if name in run
        for group in [tuple(run.get("concepts") or [run["concept"]])]
    }


def mean_point(found: Mapping[Unit, tuple[float, float]], units: Sequence[Unit]) -> tuple[float, float]:
    """The mean over units."""
    return _mean([found[unit][0] for unit in units]), _mean([found[unit][1] for unit in units])


def curve(data: Mapping[str, Any], adapter: str, name: str, concepts: Sequence[int]) -> list[dict[Unit, Any]]:
    """The points of the base model, which is rate 0, and of the rates at which all concepts were trained, up to the one
    of highest likeness: nobody would go further, but in a few samples of a bootstrap likeness still rises there."""
    base = points(data, "none", 0.0, name, concepts)
    rates = [points(data, adapter, rate, name, concepts) for rate in rates_of(data["runs"], adapter, concepts)]
    found = [base, *(at_rate for at_rate in rates if at_rate.keys() >= base.keys())]
    likeness = [mean_point(at_rate, list(base))[0] for at_rate in found]
    return found[: likeness.index(max(likeness)) + 1] if base else []


def at(points: Sequence[tuple[float, float]], likeness: float) -> float:
    """The figure where a curve of rising rates first reaches a likeness; at the nearest point where it never does."""
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= likeness <= x1 and x1 > x0:
            return y0 + (y1 - y0) * (likeness - x0) / (x1 - x0)
    return min(points, key=lambda point: abs(point[0] - likeness))[1]


def beside(data: Mapping[str, Any], adapter: str, rate: float, name: str, concepts: Sequence[int]) -> str:
    """A figure at a rate, and how much it differs from the reference's at the same likeness, which is interpolated
    along its rates; with its 95% interval by a bootstrap over concepts. With a star: beside the reference's highest
    likeness, which is lower."""
    ours, reference = points(data, adapter, rate, name, concepts), reference_of(data, adapter)
    theirs = curve(data, reference, name, concepts)
    units = sorted(theirs[0].keys() & ours.keys()) if theirs else []
    if adapter == reference or not units:
        return f"{mean_point(ours, list(ours))[1]:.3f}" if ours else "–"

    def difference(chosen: Sequence[Unit]) -> float:
        likeness, mine = mean_point(ours, chosen)
        return mine - at([mean_point(at_rate, chosen) for at_rate in theirs], likeness)

    likeness, mine = mean_point(ours, units)
    star = "*" if likeness > max(mean_point(at_rate, units)[0] for at_rate in theirs) else ""
    clusters: dict[tuple[int, ...], list[Unit]] = {}
    for unit in units:
        clusters.setdefault(unit[0], []).append(unit)
    rng = random.Random(0)
    drawn = [rng.choices(list(clusters), k=len(clusters)) for _ in range(SAMPLES if len(clusters) > 1 else 0)]
    found = sorted(difference([unit for cluster in sample for unit in clusters[cluster]]) for sample in drawn)
    interval = f" [{found[int(0.025 * SAMPLES)]:+.3f}, {found[int(0.975 * SAMPLES) - 1]:+.3f}]" if found else ""
    return f"{mine:.3f} ({difference(units):+.3f}{interval}){star}"


# --- report ----------------------------------------------------------------------------------------------------------


def tables(data: Mapping[str, Any]) -> str:
    """Everything in Markdown."""
    runs, test, best = data["runs"], data["concepts"]["test"], data["best"]
    names = [name for name in data["adapters"] if name in best]
    tested = [name for name in names if select(runs, name, best[name], test)]
    parts = []

    def values(adapter: str, rate: float, name: str) -> list[float]:
        return [run[name] for run in select(runs, adapter, rate, test) if name in run]

    def row(adapter: str, rate: float, columns: Sequence[str]) -> list[str]:
        return [with_interval(values(adapter, rate, name)) for name in columns]

    units = len(values("none", 0.0, "likeness"))
    chosen = "the tuning concepts" if data["concepts"]["tuning"] else "the tested concepts themselves"
    parts.append(f"At each adapter's best rate in bold type, chosen on {chosen}, and at others: mean over {units} of "
                 "concept x seed, 95% interval. Likeness, and that of two files in one model, as a share of a "
                 "render's.")  # fmt: skip
    head = ["adapter", "size", "parameters", "rate", *COLUMNS]
    rows = [["base model", "", "", "", *row("none", 0.0, list(COLUMNS.values()))]]
    for name in tested:
        size, count = (str(data["adapters"][name][key]) for key in ("size", "parameters"))
        for rate in rates_of(runs, name, test):
            shown = f"**{rate:g}**" if rate == best[name] else f"{rate:g}"
            rows.append([name, size, f"{int(count):,}", shown, *row(name, rate, list(COLUMNS.values()))])
    parts.append(table(head, rows))
    if data["concepts"]["tuning"]:
        tuned = data["concepts"]["tuning"]
        parts.append(f"The choice of rates, on {len(tuned)} concepts, one seed: likeness, old world, drift.")
        rates = sorted({run["rate"] for name in data["adapters"] for run in select(runs, name, None, tuned)})
        cells = [
            [", ".join(f"{mean_of(runs, name, rate, tuned, key):.2f}" for key in ("likeness_share", "old", "drift"))
             if select(runs, name, rate, tuned) else "" for rate in rates]
            for name in names
        ]  # fmt: skip
        parts.append(table(["adapter", *(f"{rate:g}" for rate in rates)],
                           [[name, *row] for name, row in zip(names, cells, strict=True)]))  # fmt: skip
    parts.append("What the means are made of:")
    rows = [[name, *row(name, rate, PARTS)] for name, rate in [("none", 0.0), *((n, best[n]) for n in tested)]]
    parts.append(table(["adapter", *PARTS], rows))
    parts.append("Beside LoRA (where there is none: the same without removal) at the same likeness, interpolated from "
                 "the base model along its rates up to its highest likeness: in brackets the difference and its 95% "
                 "interval (bootstrap over concepts); * where it has such a likeness at no rate: beside its "
                 "highest:")  # fmt: skip
    parts.append(_beside_table(data, [(n, rate) for n in tested for rate in rates_of(runs, n, test)], test))
    short = [(n, rate) for n, rate in SUMMARY.items() if REFERENCE in best and select(runs, n, rate, test)]
    if short and len(test) > CHOSEN_ON:
        parts.append(f"The same of the last {len(test) - CHOSEN_ON} concepts alone, by which nothing was chosen:")
        parts.append(_beside_table(data, short, test[CHOSEN_ON:]))
    notes = sorted({f"{run['adapter']} at {run['rate']:g}: diverged" for run in runs.values() if "diverged" in run})
    worst = max((run.get("merge_error", 0.0) for run in runs.values()), default=0.0)
    notes.append(f"merged models' predictions differ from the trained adapters' by at most {worst:.1e}")
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in notes)])


def _beside_table(data: Mapping[str, Any], rows: Sequence[tuple[str, float]], concepts: Sequence[int]) -> str:
    return table(
        ["adapter", "rate", "likeness", *AT_LIKENESS],
        [[name, f"{rate:g}", f"{mean_of(data['runs'], name, rate, concepts, 'likeness_share'):.3f}",
          *(beside(data, name, rate, key, concepts) for key in AT_LIKENESS.values())]
         for name, rate in rows],
    )  # fmt: skip


def report(data: Mapping[str, Any], folder: Path, pictures: Path) -> None:
    """Prints the tables; draws the plot (where matplotlib is) and the contact sheet."""
    print("\n" + tables(data))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        draw_plot(data, folder / "personalization.png")
    except ImportError:
        print("no plot: matplotlib is missing")
    if pictures.is_file():
        draw_sheet(data, pictures, folder / "personalization_sheet.png")


def shown_rates(data: Mapping[str, Any]) -> dict[str, float]:
    """Each adapter's best rate, or the short tables'."""
    test = data["concepts"]["test"]
    tested = {name: rate for name, rate in SUMMARY.items() if select(data["runs"], name, rate, test)}
    return {name: tested.get(name, rate) for name, rate in data["best"].items()}


def draw_plot(data: Mapping[str, Any], file: Path) -> None:
    """Likeness against old-world accuracy, prompt following and drift: a curve an adapter, a point a rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs, test, marked = data["runs"], data["concepts"]["test"], shown_rates(data)
    tested = [n for n in data["adapters"] if n in data["best"] and select(runs, n, data["best"][n], test)]
    likeness = {n: mean_of(runs, n, data["best"][n], test, "likeness_share") for n in tested}
    shown = [n for n in tested if likeness[n] >= SHOWN] or tested
    keeping, others = ([n for n in shown if ("keep=" in n) == is_so] for is_so in (True, False))
    others = [n for n in others if n not in CURVES]
    styles = {n: {"color": pyplot.get_cmap("Dark2")(i % 8), "linewidth": 1, "alpha": 0.7} for i, n in enumerate(others)}
    styles |= {n: {"color": "black", "linewidth": 2, "marker": m} for n, m in zip(keeping, "sD^", strict=False)}
    styles |= {n: {"color": colour, "linewidth": 3} for n, colour in zip(CURVES, ("tab:blue", "tab:red"), strict=True)}
    figure, axes = pyplot.subplots(1, len(PLOTS), figsize=(15, 5.5))
    for axis, (name, title) in zip(axes, PLOTS.items(), strict=True):
        lowest, highest = [], []
        for adapter in shown:
            rates = rates_of(runs, adapter, test)
            points = [
                tuple(mean_of(runs, adapter, rate, test, key) for key in ("likeness_share", name)) for rate in rates
            ]
            style = {"marker": "o", "markersize": 4} | styles.get(adapter, {})
            axis.plot(*zip(*points, strict=True), label=adapter, **style)
            large = points[rates.index(marked[adapter])]
            axis.plot(*large, marker=style["marker"], markersize=9, color=axis.lines[-1].get_color())
            lowest, highest = [*lowest, large[1]], [*highest, large[1]]
        base = mean_of(runs, "none", 0.0, test, name)
        axis.axhline(base, color="black", linewidth=0.8, linestyle=":")
        margin = 0.1 * (max(*highest, base) - min(*lowest, base)) + 1e-3
        axis.set_ylim(min(*lowest, base) - margin, max(*highest, base) + margin)
        if shown != tested:
            axis.set_xlim(SHOWN - 0.05)
        axis.set_xlabel("likeness, of a render's")
        axis.set_title(title + (" (lower is better)" if name == "drift" else "") + "; dotted: base model", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8)
    less = [n for n in tested if n not in shown]
    note = f"; likeness below {SHOWN:g}: {', '.join(less)}" if less else ""
    figure.suptitle(
        f"a curve an adapter, a point a rate, large: the one of the contact sheet; {len(test)} concepts{note}",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    print(f"plot: {file}")


def draw_sheet(data: Mapping[str, Any], pictures: Path, file: Path) -> None:
    """For each of `SHOWN_CONCEPTS`, in rows: its training pictures, the base model, each adapter at one rate."""
    import torch
    from personalization_measure import SHEET, WORDS
    from personalization_train import training_pictures
    from PIL import Image, ImageDraw
    from safetensors.torch import load_file

    kept, size, left, gap = load_file(pictures), 96, 150, 4
    shown = data["concepts"]["test"][:SHOWN_CONCEPTS]
    rows: list[tuple[str, list[Any]]] = []
    for which, concept in enumerate(shown):
        rows.append((f"trained on, {WORDS[which]}", list(training_pictures(concept, "")[0])))
        for name, rate in [("none", 0.0), *shown_rates(data).items()]:
            found = kept.get(f"{name}|{rate:g}|{concept}|0")
            if found is not None:
                rows.append(("base model" if name == "none" else f"{name}\n{rate:g}", list(found / 127.5 - 1)))
    width = left + len(SHEET) * (size + gap)
    sheet = Image.new("RGB", (width, 34 + len(rows) * (size + gap)), "white")
    canvas = ImageDraw.Draw(sheet)
    for column, text in enumerate(SHEET):
        words = text.format("sks").replace(" background", "\nbackground").replace(" left", "\nleft")
        canvas.text((left + column * (size + gap), 2), words.replace("sketch of", "sketch of\n"), fill="black")
    for i, (label, cells) in enumerate(rows):
        canvas.text((4, 34 + i * (size + gap) + size // 3), label.replace(" ", "\n", 1), fill="black")
        for column, pixels in enumerate(cells[: len(SHEET)]):
            bytes_ = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
            place = left + column * (size + gap), 34 + i * (size + gap)
            sheet.paste(Image.fromarray(bytes_).resize((size, size), Image.Resampling.NEAREST), place)
    sheet.save(file)
    print(f"contact sheet: {file}")


def pictures_of(results: Path) -> Path:
    """Where the pictures for the contact sheet lie."""
    return ROOT / "output" / "personalization" / f"pictures{results.stem.removeprefix('personalization')}.safetensors"


def figures_of(results: Path) -> Path:
    """The folder of plot and contact sheet: the full form's are the documentation's."""
    return ROOT / "docs" if results.stem == "personalization" else pictures_of(results).parent


def main() -> None:
    """From a results file alone."""
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results" / "personalization.json"
    report(json.loads(file.read_text(encoding="utf-8")), figures_of(file), pictures_of(file))


if __name__ == "__main__":
    main()
