"""Automatic1111's own loading of adapter files, around models without their numbers; its `modules` are stand-ins."""

from __future__ import annotations

import functools
import importlib.util
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from networks.deft_inventory import Layer, inventory


class QkvLinear(nn.Linear):
    """Of Stable Diffusion 3, which no file here is for."""


def _stand_ins(folder: str) -> dict[str, ModuleType]:
    """What its files import of the program around them."""
    shared = SimpleNamespace(
        cmd_opts=SimpleNamespace(lora_dir=folder, lyco_dir_backcompat=folder),
        walk_files=lambda *a, **k: [],
        sd_model=None,
    )
    found: dict[str, dict[str, Any]] = {
        "modules": {
            "shared": shared,
            "devices": SimpleNamespace(cpu=torch.device("cpu"), dtype=torch.float32),
            "sd_models": SimpleNamespace(read_state_dict=lambda tensors: tensors),
            **dict.fromkeys(("errors", "scripts", "sd_hijack", "cache", "hashes"), SimpleNamespace()),
        },
        "modules.textual_inversion": {},
        "modules.textual_inversion.textual_inversion": {
            "create_embedding_from_data": lambda data, name, filename: SimpleNamespace()
        },
        "modules.models": {},
        "modules.models.sd3": {},
        "modules.models.sd3.mmdit": {"QkvLinear": QkvLinear},
        "gradio": {},
        "einops": {"rearrange": None},
        "lora_patches": {},
    }
    made = {name: ModuleType(name) for name in found}
    for name, values in found.items():
        vars(made[name]).update(values)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(made[parent], last, made[name])
    return made


@functools.cache
def code(folder: str) -> Any:
    """Its `networks.py`, with the classes of adapters beside it. (Under another name: ours is a package `networks`.)"""
    there = Path(folder) / "extensions-builtin" / "Lora"
    before = dict(sys.modules)
    with tempfile.TemporaryDirectory() as empty:
        sys.modules.update(_stand_ins(empty))
        sys.path.insert(0, str(there))
        try:
            spec = importlib.util.spec_from_file_location("a1111_networks", there / "networks.py")
            assert spec
            assert spec.loader
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(there))
            for name in set(sys.modules) - set(before):
                del sys.modules[name]
            sys.modules.update(before)
    return module


def _module(layer: Layer) -> nn.Module:
    if layer.is_norm:
        norm = layer.path.split(".")[-1]
        return nn.LayerNorm(layer.shape) if norm in ("norm1", "norm2", "norm3") else nn.GroupNorm(1, layer.shape[0])
    if len(layer.shape) == 4:
        return nn.Conv2d(layer.shape[1], layer.shape[0], layer.shape[2:], padding=layer.shape[2] // 2)
    return nn.Linear(layer.shape[1], layer.shape[0])


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    *folders, last = path.split(".")
    for folder in folders:
        if not hasattr(root, folder):
            root.add_module(folder, nn.Module())
        root = getattr(root, folder)
    if not hasattr(root, last):
        root.add_module(last, module)


def _open_clip(root: nn.Module, layer: Layer) -> None:
    """A layer of a CLIP of Transformers' under open_clip's names."""
    *_, number, part, name = layer.path.split(".")
    block = f"model.transformer.resblocks.{number}"
    if part == "self_attn":
        _put(root, f"{block}.attn", nn.MultiheadAttention(layer.shape[0], 1))
    else:
        _put(root, f"{block}.mlp.{ {'fc1': 'c_fc', 'fc2': 'c_proj'}[name] }", _module(layer))


@functools.cache
def model(name: str) -> Any:
    """A model of `deft_inventory.NAMES` with the paths that its layers have there, on the meta device."""
    unet, te1, te2 = nn.Module(), nn.Module(), nn.Module()
    with torch.device("meta"):
        for layer in inventory(name).layers:
            if layer.part == "unet":
                _put(unet, f"diffusion_model.{layer.path}", _module(layer))
            elif not layer.inside:
                continue  # a parameter there
            elif layer.part == "te2" or name == "sd2":
                _open_clip(te2 if layer.part == "te2" else te1, layer)
            else:
                _put(te1, f"transformer.{layer.path}", _module(layer))
    if name != "sdxl":
        return SimpleNamespace(is_sdxl=False, model=unet, cond_stage_model=SimpleNamespace(wrapped=te1))
    embedders = [SimpleNamespace(wrapped=te1), SimpleNamespace(wrapped=te2)]
    return SimpleNamespace(is_sdxl=True, model=unet, conditioner=SimpleNamespace(embedders=embedders))


class _Noted(dict):
    """A layer's tensors by their names there; which are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.used: set[int] = set()

    def get(self, name: str, other: Any = None) -> Any:
        self.used |= {id(self[name])} if name in self else set()
        return super().get(name, other)

    def __getitem__(self, name: str) -> Any:
        self.used.add(id(super().__getitem__(name)))
        return super().__getitem__(name)


def loaded_by_a1111(folder: str, name: str, tensors: Mapping[str, Tensor]) -> tuple[set[str], int]:
    """The keys that change a layer, and how many layers of open_clip's attention it leaves out. Raises what it raises.

    :param folder: its repository
    """
    own = code(folder)
    own.shared.sd_model = model(name)
    given = {key: tensor.view(tensor.shape) for key, tensor in tensors.items()}
    own.sd_models.read_state_dict = lambda file: given
    noted: list[Any] = []
    plain = own.network.NetworkWeights

    def note(w: dict, **rest: Any) -> Any:
        noted.append(plain(w=_Noted(), **rest))
        return noted[-1]

    own.network.NetworkWeights = note
    try:
        net = own.load_network("x", SimpleNamespace(filename=__file__))
    finally:
        own.network.NetworkWeights = plain
    attention = [w.sd_key.rpartition("_proj")[0].rsplit("_", 1)[0] for w in noted if "_attn_" in w.sd_key]
    attention = [block for block in attention if "resblocks" in block]
    used = {f for weights in noted if _changes(net.modules[weights.sd_key]) for f in weights.w.used}
    keys = {key for key, tensor in given.items() if id(tensor) in used or key.startswith("bundle_emb.")}
    return keys, sum(attention.count(block) < 4 for block in attention)


def _changes(module: Any) -> bool:
    """Whether what a LoRA computes can be added to the layer's weight; if not, it goes on without that layer."""
    if getattr(module, "up_model", None) is None or module.mid_model is not None:
        return True  # other kinds: found is enough
    weight = module.sd_module.out_proj.weight if hasattr(module.sd_module, "out_proj") else module.sd_module.weight
    module.network.dyn_dim = None
    try:
        change, _ = module.calc_updown(weight)
        return torch.broadcast_shapes(change.shape, weight.shape) == weight.shape
    except RuntimeError:
        return False
