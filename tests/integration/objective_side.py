"""Runs in sd-scripts' own Python: `python objective_side.py ROWS.json GIVEN.safetensors FOUND.safetensors`.

For each row the real trainer's own step (`process_batch`) on each picture by itself, with a model whose answers are
given; writes what the model saw, the loss, and every random number in the order of drawing.
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import flux_train_network
import torch
import train_network
from safetensors.torch import load_file, save_file
from torch import Tensor

from library import flux_utils

Draws = list[tuple[str, Tensor]]


@contextlib.contextmanager
def recorded() -> Iterator[Draws]:
    """Every random number that is drawn meanwhile: (function, numbers)."""
    draws: Draws = []

    def recording(name: str, function: Callable) -> Callable:
        def draw(*args: Any, **kwargs: Any) -> Any:
            numbers = function(*args, **kwargs)
            draws.append((name, torch.as_tensor(numbers).clone()))
            return numbers

        return draw

    names = [(torch, name) for name in ("randn_like", "randn", "rand", "randint", "normal")] + [(random, "random")]
    originals = [getattr(module, name) for module, name in names]
    try:
        for (module, name), original in zip(names, originals, strict=True):
            setattr(module, name, recording(name, original))
        yield draws
    finally:
        for (module, name), original in zip(names, originals, strict=True):
            setattr(module, name, original)


class Model:
    """A U-Net or FLUX that gives one answer, and notes what it is shown."""

    def __init__(self, answer: Tensor):
        self.answer = answer

    def get_mod_vectors(self, **_: Any) -> None:
        """As FLUX's: none."""

    def __call__(
        self, noisy: Tensor = None, timesteps: Tensor = None, *_: Tensor, img: Tensor = None, **__: Any
    ) -> Any:
        if img is None:
            self.seen = {"noisy": noisy, "timesteps": timesteps}
            return SimpleNamespace(sample=self.answer)
        height, width = self.answer.shape[2] // 2, self.answer.shape[3] // 2
        self.seen = {"noisy": flux_utils.unpack_latents(img, height, width), "timesteps": 1000 * timesteps}
        return flux_utils.pack_latents(self.answer)


def main(rows_file: str, given_file: str, found_file: str) -> None:
    given, found = load_file(given_file), {}
    cpu, accelerator = torch.device("cpu"), SimpleNamespace(device=torch.device("cpu"), autocast=contextlib.nullcontext)
    with open(rows_file, encoding="utf-8") as file:
        rows = json.load(file)
    for number, (name, row) in enumerate(rows.items()):
        flow = row["world"] == "flow"
        module = flux_train_network if flow else train_network
        trainer = flux_train_network.FluxNetworkTrainer() if flow else train_network.NetworkTrainer()
        trainer.vae_scale_factor = 1.0
        args = module.setup_parser().parse_args(row["options"])
        scheduler = trainer.get_noise_scheduler(args, cpu)
        random.seed(number)
        torch.manual_seed(number)
        for i in range(len(given[f"{row['world']}/latents"])):
            latents, answer = (given[f"{row['world']}/{part}"][i : i + 1] for part in ("latents", "answers"))
            model = Model(answer)
            text = [torch.zeros(1, 1)] * 4
            batch = {"latents": latents, "text_encoder_outputs_list": text, "loss_weights": torch.ones(1)}
            with recorded() as draws:
                loss = trainer.process_batch(
                    batch, [], model, None, None, scheduler, torch.float32, torch.float32, accelerator, args, None,
                    None, is_train=False, train_text_encoder=False, train_unet=False,
                )  # fmt: skip
            parts = {f"{n:02d} {kind}": numbers for n, (kind, numbers) in enumerate(draws)}
            parts |= {"loss": loss, **model.seen}
            found |= {f"{name}/{i}/{part}": value.detach().clone().contiguous() for part, value in parts.items()}
    save_file(found, found_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
