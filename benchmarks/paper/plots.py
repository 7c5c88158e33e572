"""Fidelity against editability, with intervals over subjects: one panel a measure of fidelity."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.paper.bootstrap import Interval
from networks.deft_io import write_whole

MARKERS = "oDsv^Pp<>hX"


class Panel(NamedTuple):
    """One plot.

    :param points: method -> where it stands: (editability, fidelity); without intervals for fewer than two subjects
    :param limit: fidelity of real pictures beside real ones
    """

    editability: str
    fidelity: str
    points: Mapping[str, tuple[Interval, Interval]]
    limit: float | None = None


def draw(panels: Sequence[Panel], file: Path, title: str = "") -> None:
    """Writes the plot as PNG.

    :raises ImportError: without matplotlib
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for panel in panels for name in panel.points))
    colours = pyplot.get_cmap("tab10")
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.2 * len(panels), 5), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        for number, name in enumerate(names):
            if name not in panel.points:
                continue
            x, y = panel.points[name]
            axis.errorbar(
                x.mean, y.mean, xerr=_arms(x), yerr=_arms(y), label=name, capsize=3, markersize=7, elinewidth=1,
                marker=MARKERS[number % len(MARKERS)], color=colours(number % 10), linestyle="none",
            )  # fmt: skip
        if panel.limit is not None:
            axis.axhline(panel.limit, color="black", linewidth=0.8, linestyle=":", label="real pictures")
        axis.set_xlabel(f"{panel.editability} (follows the prompt)")
        axis.set_ylabel(f"{panel.fidelity} (looks like the subject)")
        axis.grid(alpha=0.3)
    handles = {
        label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    rows = -(-len(handles) // 4)
    figure.suptitle(title)
    figure.tight_layout(rect=(0, 0.06 * rows, 1, 1))
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=4, frameon=False)
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=120)
    pyplot.close(figure)
    write_whole(file, written.getvalue())


def _arms(value: Interval) -> list[list[float]] | None:
    if value.low is None or value.high is None:
        return None
    return [[max(0.0, value.mean - value.low)], [max(0.0, value.high - value.mean)]]
