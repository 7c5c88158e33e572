"""Runs in sd-scripts' own Python: `python compile_side.py FILE` trains networks.deft on a small Anima, its blocks
compiled by sd-scripts' own function or not, and writes each step's loss and how many graphs were made until then."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from library import compile_utils
from networks import deft

sys.path.append(str(Path(__file__).parent))  # sd-scripts has a `tests` of its own
import steps_side


def train(compiled: bool, checkpointed: bool) -> dict[str, Any]:
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters
    graphs.clear()
    torch.manual_seed(0)
    model, run = steps_side.made("anima")
    if checkpointed:
        model.enable_gradient_checkpointing()
    model.train()
    net = deft.create_network(1.0, 4, 4, None, [], model)
    net.apply_to([], model)
    if compiled:
        options = argparse.Namespace(
            compile_backend="aot_eager", compile_mode="default", compile_dynamic=None, compile_fullgraph=False,
            compile_cache_size_limit=None,
        )  # fmt: skip
        compile_utils.compile_transformer(options, model, [model.blocks], disable_linear=False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    target = torch.randn(run(model).shape)
    found: dict[str, Any] = {"losses": [], "graphs": []}
    for _ in range(4):
        net.on_step_start(None, model)
        loss = (run(model) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found["losses"].append(float(loss.detach()))
        found["graphs"].append(graphs["stats"]["unique_graphs"])
    return found


if __name__ == "__main__":
    ways = {f"{kind}{more}": train(kind == "compiled", bool(more))
            for kind in ("plain", "compiled") for more in ("", ", checkpointed")}  # fmt: skip
    Path(sys.argv[1]).write_text(json.dumps(ways))
