"""Draws what `train_step.py` measured: `python benchmarks/plot_train_step.py [results/*.json]` (needs matplotlib)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

HERE = Path(__file__).parent
OUTPUT = HERE.parent / "docs" / "performance.png"
NAMES = {
    "deft": "networks.deft",
    "deft-paper": "networks.deft, removal=1",
    "peft-lora": "peft LoRA",
    "peft-deft": "peft DEFT",
}
COLOURS = {"deft": "#1f77b4", "deft-paper": "#9ecae1", "peft-lora": "#888888", "peft-deft": "#d98a3d"}


def bars(axis, found: list[tuple[str, dict]], value, low=None, high=None) -> None:
    """A group of bars for each configuration, one an adapter; 1 is LoRA."""
    for i, (_, rows) in enumerate(found):
        names = [name for name in NAMES if "median_ms" in rows.get(name, {})]
        for j, name in enumerate(names):
            row, lora = rows[name], rows["lora"]
            x, y = i + (j - (len(names) - 1) / 2) * 0.26, value(row, lora)
            label = None if NAMES[name] in axis.get_legend_handles_labels()[1] else NAMES[name]
            axis.bar(x, y, 0.24, color=COLOURS[name], label=label)
            if low is not None:
                axis.errorbar(x, y, [[y - low(row)], [high(row) - y]], color="black", linewidth=1, capsize=2)
            axis.text(x, 0.04, f"{y:.2f}", ha="center", va="bottom", fontsize=8, rotation=90, color="white")
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xticks(range(len(found)), [title for title, _ in found], fontsize=7)


def main() -> None:
    """Writes docs/performance.png."""
    files = [Path(file) for file in sys.argv[1:]]
    files = files or [
        HERE / "results" / f"train_step-{model}.json" for model in ("sdxl", "sdxl-peers", "flux", "flux-peers")
    ]
    found, device = [], ""
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))
        device = result["device"]
        for c in result["configurations"]:
            title = f"{result['model'].upper()}\nbatch {c['batch']}" + ("\ncheckp." if c["checkpointing"] else "")
            title += f"\nrank {c['rank']}" if c["rank"] != 16 else ""
            found.append((title, c["rows"]))
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(17, 3.8))
    ratio = {key: (lambda row, *_, key=key: row["of_lora"][key]) for key in ("median", "low", "high")}
    bars(left, found, *ratio.values())
    left.set_title("time of a step, of LoRA's (95%)", fontsize=9)
    bars(middle, found, lambda row, lora: row["busy_ms"] / lora["busy_ms"])
    middle.set_title("time that the GPU is busy, of LoRA's", fontsize=9)
    bars(right, found, lambda row, lora: row["peak_mib"] / lora["peak_mib"])
    right.set_title("peak memory, of LoRA's", fontsize=9)
    left.legend(fontsize=7)
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(0, axis.get_ylim()[1] * 1.08)
    figure.suptitle(f"rank 16 where no other is named, 1024 pixels, bfloat16, {device}", fontsize=9)
    figure.tight_layout()
    figure.savefig(OUTPUT, dpi=110)


if __name__ == "__main__":
    main()
