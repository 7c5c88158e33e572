"""Tables and figure of `meters.py`: `python benchmarks/meters_plot.py [RESULTS [FIGURE]]`."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LEARNT, DRIFT = "meter/learnt", "meter/drift"  # in the trainer's logs
TITLES = {
    "default": "the default", "high": "three times the rate", "keep": "with keep (the quickstart)",
    "constant": "constant rate",
}  # fmt: skip
ENOUGH = 0.03  # of likeness, that a save may be below the last one
DRIFTED = 0.05
NAMED, LAST, JUDGE = "named by the trainer", "last", f"first within {ENOUGH} by the judge"
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # 97.5%

Run = Mapping[str, Any]


def key_of(kind: str, creature: int) -> str:
    """A training's name in the results."""
    return f"{kind}|{creature}"


def at(run: Run, curve: str, step: int) -> float:
    """A meter's value at a step: the latest that was measured by then."""
    steps, values = run["curves"][curve]["steps"], run["curves"][curve]["values"]
    return max((s, v) for s, v in zip(steps, values, strict=True) if s <= step)[1]


def rules(run: Run) -> dict[str, int]:
    """Step of the save that each rule takes; `JUDGE` is none that a user has."""
    saves = run["saves"]
    steps = [save["step"] for save in saves]
    learnt = {step: at(run, LEARNT, step) for step in steps}

    def first(share: float) -> int:
        return next(step for step in steps if learnt[step] >= share * max(learnt.values()))

    return {
        NAMED: run["named"],
        "first with 90% of the largest `learnt`": first(0.9),
        "first with 95%, losses of timesteps summed": by_losses(run, of_sum),
        "first with 95%, mean of timesteps' shares": by_losses(run, of_each),
        "first with 97%": first(0.97),
        "first with 99%": first(0.99),
        "largest `learnt`": max(steps, key=lambda step: learnt[step]),
        "a third of the steps": min(steps, key=lambda step: abs(step - steps[-1] / 3)),
        f"last with a drift of {DRIFTED}": max((s for s in steps if at(run, DRIFT, s) <= DRIFTED), default=steps[0]),
        JUDGE: next(s["step"] for s in saves if s["likeness_less"]["share"] <= ENOUGH),
        LAST: steps[-1],
    }


def by_losses(run: Run, gone: Callable[[Sequence[float], Sequence[float]], float]) -> int:
    """The step with 95% of what is gone of the bench's own losses, which are apart for each timestep.

    :param gone: from the losses of a save, and the base model's
    """
    found = {save["step"]: gone(save["losses"], run["base"]["losses"]) for save in run["saves"]}
    most = max(found.values())
    return next(step for step, share in found.items() if share >= most - 0.05 * abs(most))


def of_sum(losses: Sequence[float], base: Sequence[float]) -> float:
    """Which timesteps with little noise rule: the base model errs most there."""
    return 1 - sum(losses) / sum(base)


def of_each(losses: Sequence[float], base: Sequence[float]) -> float:
    """Every timestep's own share, from -1, as the trainer's `learnt`."""
    return statistics.mean(max(-1.0, 1 - loss / before) for loss, before in zip(losses, base, strict=True))


def figures(run: Run, step: int) -> dict[str, float]:
    """Of a save."""
    save = next(save for save in run["saves"] if save["step"] == step)
    named = {name: save[name]["share"] for name in ("likeness", "old", "likeness_less", "old_more")}
    return named | {"step": step, "drift": at(run, DRIFT, step), "learnt": at(run, LEARNT, step)}


def over(values: Sequence[float]) -> str:
    """Mean over seeds and half the width of its 95% interval, by Student's t."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = STUDENT.get(len(values), 1.96) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.3f} ± {half:.3f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def of_kind(data: Mapping[str, Any], kind: str) -> list[Run]:
    """Its trainings."""
    return [run for run in data["runs"].values() if run["kind"] == kind]


def table_of_rules(runs: Sequence[Run]) -> str:
    """Means over seeds."""
    head = ("save", "step", "likeness", "below the last", "most", "old world", "above the last", "least", "drift")
    rows = []
    for rule in rules(runs[0]):
        of = [figures(run, rules(run)[rule]) for run in runs]
        less, more = ([one[name] for one in of] for name in ("likeness_less", "old_more"))
        rows.append([
            rule, f"{statistics.mean(one['step'] for one in of):.0f}", over([one["likeness"] for one in of]),
            over(less), f"{max(less):.3f}", over([one["old"] for one in of]), over(more), f"{min(more):.3f}",
            over([one["drift"] for one in of]),
        ])  # fmt: skip
    return table(head, rows)


def table_of_seeds(runs: Sequence[Run]) -> str:
    """The named save beside the last one, for each seed; intervals are over pictures."""
    head = ("creature", "named", "likeness", "last", "below it", "old world", "last", "above it", "drift", "last")
    rows = []
    for run in runs:
        saves = {save["step"]: save for save in run["saves"]}
        save, last = saves[run["named"]], run["saves"][-1]
        less, more = (f"{save[n]['share']:.3f} ± {save[n]['interval']:.3f}" for n in ("likeness_less", "old_more"))
        rows.append([
            str(run["creature"]), str(save["step"]), f"{save['likeness']['share']:.3f}",
            f"{last['likeness']['share']:.3f}", less, f"{save['old']['share']:.3f}", f"{last['old']['share']:.3f}",
            more, f"{at(run, DRIFT, save['step']):.3f}", f"{at(run, DRIFT, last['step']):.3f}",
        ])  # fmt: skip
    return table(head, rows)


def told(run: Run) -> str:
    """A line for a finished training."""
    found, last = figures(run, run["named"]), figures(run, run["saves"][-1]["step"])
    return (
        f"{run['kind']} {run['creature']}: named {found['step']}, likeness {found['likeness']:.3f} "
        f"(last {last['likeness']:.3f}), old world {found['old']:.3f} ({last['old']:.3f}), drift {found['drift']:.3f} "
        f"({last['drift']:.3f}); {run['training_seconds']:.0f} s, judged in {run['judging_seconds']:.0f} s"
    )


def draw(data: Mapping[str, Any], figure: Path) -> None:
    """A row a kind of training, a line a seed, a dot where the trainer has named the save."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = [kind for kind in TITLES if of_kind(data, kind)]
    panels = ((("learnt", "tab:blue"), ("likeness", "tab:green")), (("old", "tab:orange"),), (("drift", "tab:red"),))
    names = {"learnt": "learnt (trainer)", "likeness": "likeness (judge)", "old": "old world right (judge)",
             "drift": "drift (trainer)"}  # fmt: skip
    size = (11.5, 3.3 * len(kinds) + 0.6)
    made, axes = pyplot.subplots(len(kinds), len(panels), figsize=size, sharex=True, sharey="col", squeeze=False)
    for row, kind in enumerate(kinds):
        for axis, curves in zip(axes[row], panels, strict=True):
            for name, colour in curves:
                for i, run in enumerate(of_kind(data, kind)):
                    points = [figures(run, save["step"]) for save in run["saves"]]
                    label = names[name] if i == 0 else None
                    axis.plot([p["step"] for p in points], [p[name] for p in points], color=colour, alpha=0.55, lw=1.2,
                              label=label)  # fmt: skip
                    named = figures(run, run["named"])
                    axis.plot(named["step"], named[name], "o", color=colour, ms=5, mec="black", mew=0.8, zorder=3)
            axis.grid(alpha=0.25)
            axis.legend(fontsize=8)
            axis.set_title(TITLES[kind] if len(kinds) > 1 else "", fontsize=10)
            axis.set_xlabel("step" if row == len(kinds) - 1 else "")
    made.suptitle(
        "Trainings three times too long; a line a creature; dots: the save that the trainer names", fontsize=12
    )
    made.tight_layout()
    made.savefig(figure, dpi=90)


def report(data: Mapping[str, Any], figure: Path) -> None:
    """Prints the tables and draws the figure, where matplotlib is."""
    for kind in TITLES:
        if runs := of_kind(data, kind):
            print(f"\n{TITLES[kind]}\n\n{table_of_rules(runs)}\n\n{table_of_seeds(runs)}")
    if found := data.get("cost"):
        shares = {part: f"{100 * s['share']:+.1f}% ± {100 * s['interval']:.1f}" for part, s in found["share"].items()}
        print(f"\nmeters cost {shares['steps']} of {found['steps']} steps, {shares['all']} of the whole training")
    try:
        draw(data, figure)
    except ImportError:
        print("no figure: matplotlib is missing")


if __name__ == "__main__":
    given = [Path(word) for word in sys.argv[1:]]
    source = given[0] if given else Path(__file__).parent / "results" / "meters.json"
    report(json.loads(source.read_text(encoding="utf-8")), given[1] if len(given) > 1 else ROOT / "docs" / "meters.png")
