"""sd-scripts' optimizers and schedules in its environment: arguments.json -> found.json, in a given folder."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from library import train_util


def found(arguments: list[str], steps: int) -> dict:
    """What sd-scripts makes of these arguments: the rates of every step, and the metadata's description."""
    parser = argparse.ArgumentParser()
    train_util.add_optimizer_arguments(parser)
    parser.add_argument("--unet_lr", type=float)
    parser.add_argument("--text_encoder_lr", type=float, nargs="*")
    args = parser.parse_args(arguments)
    args.max_train_steps, args.gradient_accumulation_steps = steps, 1
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    groups = [{"params": [parameter], "lr": args.learning_rate}]
    name, described, optimizer = train_util.get_optimizer(args, groups)
    schedule = train_util.get_scheduler_fix(args, optimizer, 1)
    rates = []
    for _ in range(steps):
        rates.append(float(schedule.get_last_lr()[0]))
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return {
        "rates": rates,
        "optimizer": name + (f"({described})" if described else ""),
        "weights": parameter.flatten().tolist(),
        "schedule": args.lr_scheduler,
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    asked = json.loads((folder / "arguments.json").read_text())
    (folder / "found.json").write_text(json.dumps([found(arguments, asked["steps"]) for arguments in asked["cases"]]))
