"""How far a weight moves in the first steps, DEFT against LoRA at one learning rate: `python benchmarks/rates.py`.

For every layer shape of SD 1.5, at alpha 1 and alpha = rank, after 1 and 100 AdamW steps: the Frobenius norm of the
delta, divided by that of a LoRA started as sd-scripts starts it. Both learn the same target from the same inputs.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
from torch import nn

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


def movement(kind: str, m: int, n: int, rank: int, alpha: float, steps: tuple[int, ...]) -> list[float]:
    """||delta|| after each number of steps.

    :param kind: `lora`, started as sd-scripts' networks.lora, or `deft`, this project's module
    """
    torch.manual_seed(0)
    layer = nn.Linear(n, m, bias=False).requires_grad_(False)
    target = torch.randn(m, n) * layer.weight.std() / 2
    if kind == "lora":
        down = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, n), a=math.sqrt(5)))
        up = nn.Parameter(torch.zeros(m, rank))
        parameters, factors = [up, down], lambda: (up * (alpha / rank), down)
    else:
        config = DeftConfig(dim=rank, alpha=alpha)
        module = DeftModule(Target("x", "x", layer), 1.0, rank, config.scale, config)
        parameters, factors = list(module.parameters()), module.lora_factors
    optimizer = torch.optim.AdamW(parameters, lr=RATE)
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


def main() -> None:
    """Prints the table and writes `rates.json` beside this file."""
    rows = []
    print("| layer | m x n | alpha 1, step 1 | alpha 1, step 100 | alpha 16, step 1 | alpha 16, step 100 |")
    print("|---|---|---|---|---|---|")
    for name, shapes in SHAPES.items():
        for m, n in shapes:
            ratios = []
            for alpha in (1, RANK):
                lora, deft = (movement(kind, m, n, RANK, alpha, STEPS) for kind in ("lora", "deft"))
                ratios += [b / a for a, b in zip(lora, deft, strict=True)]
            rows.append({"layer": name, "m": m, "n": n, "ratios": ratios})
            print(f"| {name} | {m} x {n} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |", flush=True)
    every = [ratio for row in rows for ratio in row["ratios"]]
    print(f"\nsmallest {min(every):.2f}, largest {max(every):.2f}")
    result = {"torch": torch.__version__, "device": "cpu", "rank": RANK, "rate": RATE, "steps": STEPS, "rows": rows}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
