"""Fidelity against editability, with intervals over subjects: one panel a measure of fidelity."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.paper.bootstrap import Interval
from networks.deft_io import write_whole

MARKERS = "oDsv^Pp<>hX"


class Panel(NamedTuple):
    """One plot.

    :param points: method -> where it stands: (editability, fidelity); without intervals for fewer than two subjects
    :param limit: fidelity of real pictures beside real ones
    :param apart: whether points are differences from a reference, on the same subjects
    """

    editability: str
    fidelity: str
    points: Mapping[str, tuple[Interval, Interval]]
    limit: float | None = None
    apart: bool = False


def draw(rows: Sequence[Sequence[Panel]], file: Path, title: str = "") -> None:
    """Writes the plots as one PNG.

    :param rows: all of the same length
    :raises ImportError: without matplotlib
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for row in rows for panel in row for name in panel.points))
    styles = {
        name: {"marker": MARKERS[i % len(MARKERS)], "color": pyplot.get_cmap("tab10")(i % 10)}
        for i, name in enumerate(names)
    }
    shape = len(rows), len(rows[0])
    figure, axes = pyplot.subplots(*shape, figsize=(5.2 * shape[1], 4.6 * shape[0] + 0.6), squeeze=False)
    handles: dict[str, Any] = {}
    for row, line in zip(rows, axes, strict=True):
        for panel, axis in zip(row, line, strict=True):
            _draw_panel(axis, panel, styles)
            drawn, labels = axis.get_legend_handles_labels()
            handles |= dict(zip(labels, drawn, strict=True))
    lines = -(-len(handles) // 4)
    figure.suptitle(title)
    figure.tight_layout(rect=(0, 0.05 * lines / shape[0], 1, 1))
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=4, frameon=False)
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=120)
    pyplot.close(figure)
    write_whole(file, written.getvalue())


def _draw_panel(axis: Any, panel: Panel, styles: Mapping[str, Mapping[str, Any]]) -> None:
    for name, (x, y) in panel.points.items():
        axis.errorbar(
            x.mean, y.mean, xerr=_arms(x), yerr=_arms(y), label=name, capsize=3, markersize=7, elinewidth=1,
            linestyle="none", **styles[name],
        )  # fmt: skip
    if panel.limit is not None:
        axis.axhline(panel.limit, color="black", linewidth=0.8, linestyle=":", label="real pictures")
    if panel.apart:
        axis.axhline(0, color="black", linewidth=0.8)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title("minus the reference, same subjects", fontsize=10)
    axis.set_xlabel(f"{panel.editability} (follows the prompt)")
    axis.set_ylabel(f"{panel.fidelity} (looks like the subject)")
    axis.grid(alpha=0.3)


def _arms(value: Interval) -> list[list[float]] | None:
    if value.low is None or value.high is None:
        return None
    return [[max(0.0, value.mean - value.low)], [max(0.0, value.high - value.mean)]]
