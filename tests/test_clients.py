"""What `deft_clients` says about clients, against the clients' own code, and the facts of docs/clients.md."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from networks.deft_clients import CLIENTS, Outline, Reading, made_for, read_by, readings, split
from networks.deft_inventory import NAMES, inventory
from tests.client_files import ODD, few, lora, odd, odder
from tests.real_a1111 import loaded_by_a1111
from tests.real_clients import COMPONENTS, loaded_by_diffusers

BY_NAME = {client.name: client for client in CLIENTS}


@functools.cache
def files(name: str) -> dict[str, dict[str, Tensor]]:
    return odd(name)


def reading(client: str, name: str, tensors: Mapping[str, Tensor], **metadata: str) -> Reading:
    return read_by(BY_NAME[client], Outline.of(tensors, metadata), inventory(name))


CASES = [(name, case) for name in NAMES for case in ODD if name == "sdxl" or "block name" not in case]
QUICK = {
    "sd1": (
        "plain",
        "no alpha in attention",
        "mixed alphas in attention",
        "an unknown part",
        "DoRA",
        "T5",
        "LoHa",
        "a text encoder's queries alone",
    ),
    "sdxl": ("one Diffusers' block name", "mixed ranks", "a text encoder's attention without outputs"),
    "flux": (
        "layers outside of blocks too",
        "no alpha",
        "T5",
        "DoRA",
        "LoHa",
        "no up",
        "a text encoder's attention without outputs",
    ),
}
if os.environ.get("CLIENTS") != "all":  # that takes minutes
    CASES = [(name, case) for name, case in CASES if case in QUICK.get(name, ())]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_diffusers_itself_adapts_the_layers_that_are_said_and_with_the_scales(name, case):
    transformers.logging.set_verbosity_error()
    tensors = files(name)[case]
    said = reading("diffusers", name, tensors)
    done = refused_or(lambda: loaded_by_diffusers(name, tensors))
    assert (done is None) == bool(said.refused)
    if done is None:
        return
    names = BY_NAME["diffusers"].names(inventory(name))
    wanted: dict[str, float] = {}
    for stem in {split(key)[0] for key in said.matched}:
        plain = stem.removeprefix("unet.").removeprefix("transformer.")
        layer = names[stem]
        component = COMPONENTS[name][layer.part]
        paths = [path for path in layer.diffusers if plain == path] or layer.diffusers
        wanted |= {f"{component}.{p.removeprefix('text_model.')}": said.factors.get(stem, 1.0) for p in paths}
    assert set(done) == set(wanted)
    for path, (up, _, scale) in done.items():
        alpha = alpha_of(name, tensors, path, up.shape[1])
        assert scale == pytest.approx(wanted[path] * alpha / up.shape[1], rel=1e-5), path


def refused_or(load: Callable[[], Any]) -> Any:
    """What a client loads, or None where it raises."""
    try:
        return load()
    except (AssertionError, KeyError, RuntimeError, ValueError):
        return None


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


# ComfyUI's `load_lora` and key maps as Forge carries them: FORGE_DIR=/path/to/stable-diffusion-webui-forge

FORGE = os.environ.get("FORGE_DIR", "")
UNETS = {
    "sd1": {"num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4], "transformer_depth": [1] * 6 + [0, 0],
            "transformer_depth_output": [1] * 9 + [0] * 3, "transformer_depth_middle": 1},
    "sdxl": {"num_res_blocks": [2] * 3, "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
             "transformer_depth_output": [0] * 3 + [2] * 3 + [10] * 3, "transformer_depth_middle": 10},
    "flux": {"depth": 19, "depth_single_blocks": 38, "hidden_size": 3072},
}  # fmt: skip
UNETS["sd2"] = UNETS["sd1"]


def matched_by_forge(name: str, tensors: Mapping[str, Tensor]) -> set[str]:
    """The keys that Forge's own `load_lora` uses, given a model's state dict of these layers."""
    sys.path.insert(0, FORGE)
    try:
        code = importlib.import_module("packages_3rdparty.comfyui_lora_collection.lora")
    finally:
        sys.path.remove(FORGE)
    known = inventory(name)
    state = {f"diffusion_model.{la.path}.weight": 0 for la in known.layers if la.part == "unet"}
    unet = SimpleNamespace(state_dict=lambda: state, config=SimpleNamespace(huggingface_repo=name),
                           diffusion_model=SimpleNamespace(config=UNETS[name]))  # fmt: skip
    encoders = {"te1": "clip_h" if name == "sd2" else "clip_l", "te2": "clip_g", "te3": "t5xxl"}
    texts = {f"{encoders[la.part]}.transformer.{la.path}.weight": 0 for la in known.layers if la.part != "unet"}
    _, left = code.load_lora(dict(tensors), code.model_lora_keys_unet(unet, {})[1])
    _, left = code.load_lora(left, code.model_lora_keys_clip(SimpleNamespace(state_dict=lambda: texts), {})[1])
    return set(tensors) - set(left)


@pytest.mark.skipif(not FORGE, reason="FORGE_DIR is not set")
@pytest.mark.parametrize("name", NAMES)
def test_forges_own_code_matches_the_same_keys(name):
    for case, tensors in files(name).items():
        said = reading("Forge", name, tensors)
        done = refused_or(lambda tensors=tensors: matched_by_forge(name, tensors))
        if done is None:
            assert "KeyError" in said.refused, case
        elif len(tensors) - len(done) > 12:
            assert "drops the whole file" in said.refused, case
        elif not said.refused:
            assert said.matched == done, case
        else:
            assert "do not fit" in said.refused, case


# Automatic1111's own loader: A1111_DIR=/path/to/stable-diffusion-webui

A1111 = os.environ.get("A1111_DIR", "")


@pytest.mark.skipif(not A1111, reason="A1111_DIR is not set")
@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_a1111s_own_code_matches_the_same_keys(name):
    for case, tensors in (files(name) | odder(name)).items():
        said = reading("A1111", name, tensors)
        done = refused_or(lambda tensors=tensors: loaded_by_a1111(A1111, name, tensors))
        assert (done is None) == bool(said.refused), (case, said.refused)
        if done is not None:
            assert said.matched == done[0], case
            told = next((line for line in said.wrong if "q, k, v and out" in line), "leaves out 0 ")
            assert int(told.split()[2]) == done[1], case


# Facts, of which docs/clients.md and the clients' code tell


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_file_is_recognised_and_read_whole_by_every_client(name):
    tensors = dict(sorted(lora(name, lambda layer: few(layer) and layer.inside).items()))  # as files have them
    outline = Outline.of(tensors, {"ss_base_model_version": {"sdxl": "sdxl_base_v1-0", "sd1": "sd_v1"}.get(name, "")})
    known = made_for(outline)
    assert known is not None
    assert known.name == name
    found = readings(outline, known)
    assert len(found) == len(CLIENTS) == 7
    for client, said in found.items():
        if said is None:
            assert name not in BY_NAME[client].models
            continue
        text_encoders = {key for key in tensors if key.startswith("lora_te")}
        assert said.matched == set(tensors) - (text_encoders if client == "musubi-tuner" else set()), client
        assert (said.refused, said.wrong, said.factors) == ("", [], {})


def test_what_each_client_gets_wrong_without_a_word():
    sdxl, flux = files("sdxl"), files("flux")
    said = reading("diffusers", "sdxl", sdxl["one Diffusers' block name"])
    assert any("leaves out" in line and "Diffusers' names" in line for line in said.wrong)
    said = reading("A1111", "sdxl", sdxl["half of a text encoder's attention"])
    assert any("not all of q, k, v and out" in line for line in said.wrong)
    said = reading("diffusers", "sd1", files("sd1")["mixed alphas in attention"])
    assert {round(factor, 3) for factor in said.factors.values()} <= {0.125, 8.0}
    assert said.factors
    assert any("magnitudes" in line for line in reading("diffusers", "flux", flux["DoRA"]).wrong)
    assert any("magnitudes" in line for line in reading("sd-scripts", "sd1", files("sd1")["DoRA"]).wrong)
    outside = reading("diffusers", "flux", flux["layers outside of blocks too"])
    assert any("in_dims" in line for line in outside.wrong)
    assert not outside.refused


def test_who_refuses_what():
    flux = files("flux")
    for client, case, word in (
        ("InvokeAI", "T5", "Unknown_Config"),
        ("InvokeAI", "layers outside of blocks too", "Unknown_Config"),
        ("Forge", "fourteen unknown layers", "14 keys"),
        ("sd-scripts", "no alpha", "KeyError"),
        ("diffusers", "an unknown part", "Incompatible keys"),
    ):
        assert word in reading(client, "flux", flux[case]).refused, (client, case)
    assert not reading("Forge", "flux", lora("flux", few) | {"x": torch.ones(1)}).refused
    assert not reading("diffusers", "flux", flux["T5"]).refused


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_what_a1111_gives_up_a_file_for(name):
    """Found with its own loader, which the test above runs."""
    found = {"ComfyUI's paths": files(name)["ComfyUI's paths"], **odder(name)}
    refused = {case for case, tensors in found.items() if reading("A1111", name, tensors).refused}
    assert refused == {
        "ComfyUI's paths", "GLoRA, no alpha", "half a LoKr", "half a LoKr, the other in two", "a LoRA of a norm",
        "half a norm", "another kernel", "(IA)^3, no side",
    }  # fmt: skip
    assert not reading("A1111", name, found["OFT, kohya's name for Diffusers"]).matched
    assert reading("A1111", name, found["OFT, kohya's name"]).matched


def test_an_sdxl_file_without_its_label_is_told_in_a1111():
    tensors = lora("sdxl", few)
    assert any("SD 1" in line for line in reading("A1111", "sdxl", tensors, ss_steps="1").remarks)
    assert not reading("A1111", "sdxl", tensors, ss_base_model_version="sdxl_base_v1-0").remarks


def test_a_layer_of_the_wrong_shape_is_told():
    tensors = files("sd1")["transposed"]
    assert "do not fit" in reading("diffusers", "sd1", tensors).refused
    said = reading("ComfyUI", "sd1", tensors)
    assert any("do not fit" in line for line in said.remarks)
    assert len(tensors) - len(said.matched) == 3
