"""What `deft_clients` says about clients, against the clients' own code, and the facts of docs/clients.md."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from networks.deft_clients import CLIENTS, Outline, Reading, made_for, read_by, readings, split
from networks.deft_inventory import NAMES, inventory
from tests.client_files import ODD, few, lora, odd
from tests.real_clients import COMPONENTS, loaded_by_diffusers

BY_NAME = {client.name: client for client in CLIENTS}


@functools.cache
def files(name: str) -> dict[str, dict[str, Tensor]]:
    return odd(name)


def reading(client: str, name: str, tensors: Mapping[str, Tensor], **metadata: str) -> Reading:
    return read_by(BY_NAME[client], Outline.of(tensors, metadata), inventory(name))


CASES = [(name, case) for name in NAMES for case in ODD if name == "sdxl" or "block name" not in case]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_diffusers_itself_adapts_the_layers_that_are_said_and_with_the_scales(name, case):
    transformers.logging.set_verbosity_error()
    tensors = files(name)[case]
    said = reading("diffusers", name, tensors)
    try:
        done = loaded_by_diffusers(name, tensors)
    except Exception as error:
        assert said.refused, f"it refuses: {error!r}"[:300]
        return
    assert not said.refused
    names = BY_NAME["diffusers"].names(inventory(name))
    wanted: dict[str, float] = {}
    for stem in {split(key)[0] for key in said.matched}:
        plain = stem.removeprefix("unet.").removeprefix("transformer.")
        layer = names.get(stem)
        if layer is None:
            continue
        component = COMPONENTS[name][layer.part]
        paths = [path for path in layer.diffusers if plain == path] or layer.diffusers
        wanted |= {f"{component}.{p.removeprefix('text_model.')}": said.factors.get(stem, 1.0) for p in paths}
    assert set(done) == set(wanted)
    for path, (up, down, scale) in done.items():
        alpha = alpha_of(name, tensors, path, up.shape[1])
        assert scale == pytest.approx(wanted[path] * alpha / up.shape[1], rel=1e-5), path


def alpha_of(name: str, tensors: Mapping[str, Tensor], path: str, rank: int) -> float:
    """What the file says of a layer; for FLUX.1 it is in the matrices when diffusers has read them."""
    if name == "flux":
        return float(rank)
    known = inventory(name)
    for layer in known.layers:
        if f"{COMPONENTS[name][layer.part]}.{layer.diffusers[0].removeprefix('text_model.')}" == path:
            stems = [known.key(layer), "lora_unet_" + layer.diffusers[0].replace(".", "_")]
            stems += [s.replace("lora_te1_", "lora_te_") for s in stems] + [s.replace("te_", "te1_", 1) for s in stems]
            return next((float(tensors[f"{s}.alpha"]) for s in stems if f"{s}.alpha" in tensors), float(rank))
    raise AssertionError(path)
