"""How far a weight moves in the first steps, DEFT against LoRA at one learning rate: `python benchmarks/rates.py`.

For every layer shape of SD 1.5, at alpha 1 and alpha = rank, after 1 and 100 AdamW steps: the Frobenius norm of the
delta, divided by that of a LoRA started as sd-scripts starts it. Both learn the same target from the same inputs.
Then, on one shape of each kind, with other optimizers; some are in tests/requirements.txt.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prodigyopt
import schedulefree
import torch
from torch import nn
from transformers.optimization import Adafactor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from networks.deft_config import DeftConfig  # noqa: E402
from networks.deft_module import DeftModule  # noqa: E402
from networks.deft_targets import Target  # noqa: E402

RANK, RATE, STEPS = 16, 1e-4, (1, 100)

# (m, n) of every adapted layer of SD 1.5, k x k convolutions flattened; the largest convolution is 23040 wide
SHAPES = {
    "U-Net attention": [(320, 320), (640, 640), (1280, 1280)],
    "U-Net cross attention k, v": [(320, 768), (640, 768), (1280, 768)],
    "U-Net feed forward in": [(2560, 320), (5120, 640), (10240, 1280)],
    "U-Net feed forward out": [(320, 1280), (640, 2560), (1280, 5120)],
    "time embedding": [(320, 1280), (640, 1280), (1280, 1280)],
    "shortcut 1x1": [
        (640, 320),
        (320, 640),
        (320, 960),
        (640, 960),
        (640, 1920),
        (1280, 640),
        (1280, 1920),
        (1280, 2560),
    ],
    "convolution 3x3": [(320, 2880), (320, 8640), (640, 5760), (640, 17280), (1280, 11520), (1280, 23040)],
    "text encoder": [(768, 768), (3072, 768), (768, 3072)],
}

Make = Callable[[list[nn.Parameter]], Any]
# as sd-scripts makes them, at rates that its users take
OPTIMIZERS: dict[str, Make] = {
    "AdamW, 1e-4": lambda parameters: torch.optim.AdamW(parameters, lr=RATE),
    "Adafactor, 1e-4, relative_step=False scale_parameter=False": lambda parameters: Adafactor(
        parameters, lr=RATE, relative_step=False, scale_parameter=False
    ),
    "Adafactor, 1e-2, relative_step=False": lambda parameters: Adafactor(parameters, lr=1e-2, relative_step=False),
    "AdamWScheduleFree, 1e-4": lambda parameters: schedulefree.AdamWScheduleFree(parameters, lr=RATE),
    "Prodigy, 1": lambda parameters: prodigyopt.Prodigy(parameters, lr=1.0),
    "SGD, 1": lambda parameters: torch.optim.SGD(parameters, lr=1.0),
}


def movement(
    kind: str,
    m: int,
    n: int,
    rank: int,
    alpha: float,
    steps: tuple[int, ...],
    make: Make = OPTIMIZERS["AdamW, 1e-4"],
    removal: float = 0.0,
) -> list[float]:
    """||delta|| after each number of steps.

    :param kind: `lora`, started as sd-scripts' networks.lora, or `deft`, this project's module
    :param make: the optimizer
    :param removal: of `deft`
    """
    torch.manual_seed(0)
    layer = nn.Linear(n, m, bias=False).requires_grad_(False)
    target = torch.randn(m, n) * layer.weight.std() / 2
    if kind == "lora":
        down = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, n), a=math.sqrt(5)))
        up = nn.Parameter(torch.zeros(m, rank))
        parameters, factors = [up, down], lambda: (up * (alpha / rank), down)
    else:
        config = DeftConfig(dim=rank, alpha=alpha, removal=removal)
        module = DeftModule(Target("x", "x", layer), 1.0, rank, config.scale, config)
        parameters, factors = list(module.parameters()), module.lora_factors
    optimizer = make(parameters)
    if hasattr(optimizer, "train"):
        optimizer.train()
    norms = []
    for step in range(1, max(steps) + 1):
        x = torch.randn(n, 16)
        a, b = factors()
        (a @ (b @ x) - target @ x).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in steps:
            with torch.no_grad():
                a, b = factors()
                norms.append(float((a @ b).norm()))
    return norms


def ratios(m: int, n: int, alpha: float, make: Make, removal: float = 0.0) -> list[float]:
    """How far DEFT has moved by how far a LoRA has, after each number of `STEPS`."""
    lora, deft = (movement(kind, m, n, RANK, alpha, STEPS, make, removal) for kind in ("lora", "deft"))
    return [b / a for a, b in zip(lora, deft, strict=True)]


def main() -> None:
    """Prints the table and writes `rates.json` beside this file."""
    rows = []
    print("| layer | m x n | alpha 1, step 1 | alpha 1, step 100 | alpha 16, step 1 | alpha 16, step 100 |")
    print("|---|---|---|---|---|---|")
    for name, shapes in SHAPES.items():
        for m, n in shapes:
            found, removing = (
                [ratio for alpha in (1, RANK) for ratio in ratios(m, n, alpha, OPTIMIZERS["AdamW, 1e-4"], removal)]
                for removal in (0.0, 1.0)
            )
            rows.append({"layer": name, "m": m, "n": n, "ratios": found, "removal=1": removing})
            print(f"| {name} | {m} x {n} | " + " | ".join(f"{ratio:.2f}" for ratio in found) + " |", flush=True)
    print("\n| | smallest | largest |\n|---|---|---|")
    for name, label in (("ratios", "default"), ("removal=1", "`removal=1`, where a turning P moves W too")):
        every = [ratio for row in rows for ratio in row[name]]
        print(f"| {label} | {min(every):.2f} | {max(every):.2f} |")
    print("\n| optimizer, rate | step 1 | step 100 |\n|---|---|---|")
    others: dict[str, list[list[float]]] = {}
    for name, make in OPTIMIZERS.items():
        others[name] = [ratios(*shapes[0], RANK, make) for shapes in SHAPES.values()]
        columns = (f"{min(c):.2f} to {max(c):.2f}" for c in zip(*others[name], strict=True))
        print(f"| {name} | " + " | ".join(columns) + " |", flush=True)
    result = {"torch": torch.__version__, "device": "cpu", "rank": RANK, "rate": RATE, "steps": STEPS, "rows": rows}
    result["optimizers"] = others
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
