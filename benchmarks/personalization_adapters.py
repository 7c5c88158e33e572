"""Adapters of `personalization.py`: how each is put on a U-Net, and what it adds to the weights once trained."""

from __future__ import annotations

import copy
import itertools
import math
import random
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from diffusers import UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from library import keep
from library.models import loading
from library.options.rooms import ModelOptions
from library.prompts import Prompt
from library.world import measure, scenes
from networks import deft, deft_io

RANK = 8  # of the LoRA whose number of parameters all have
KEPT = Path(__file__).resolve().parents[1] / "output" / "personalization"


@dataclass
class Adapter:
    """An adapter on a U-Net of its own. `deltas` gives what it adds to each weight, by name, once it is trained."""

    unet: UNet2DConditionModel
    groups: list[dict[str, Any]]
    deltas: Callable[[], dict[str, Tensor]]
    extra: nn.Module | None = None
    begin: Callable[[], None] = lambda: None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """That the optimizer has."""
        return [p for group in self.groups for p in group["params"]]

    @property
    def number(self) -> int:
        """Of trained numbers."""
        return sum(p.numel() for p in self.parameters)


def kept(k: int, shapes: int) -> Path:
    """The file of `library.keep` with k directions a layer, from pictures that the shipped model draws of its world.

    :param shapes: how many of the world's shapes they are of
    """
    file = KEPT / f"keep-{k}-{shapes}.safetensors"
    if not file.is_file():
        rng, some = random.Random("keep"), scenes.SHAPES[:shapes]
        drawn = (scenes.draw_scene(rng) for _ in itertools.count())
        known = (scene for scene in drawn if all(thing.shape in some for thing in scene.things))
        texts = [scenes.caption(scene, rng) for scene in itertools.islice(known, 64)]
        prompts = [Prompt(text, width=64, height=64, seed=i, steps=10) for i, text in enumerate(texts)]
        pipeline = loading.load(ModelOptions(str(measure.MODEL))).pipeline.to(
            "cuda" if torch.cuda.is_available() else "cpu"
        )
        keep.write(keep.directions_to_keep(pipeline, prompts, k), file)
    return file


def deft_args(spec: str, size: int) -> dict[str, str]:
    """network_args of a variant, convolutions as the rest; `keep=N` stands for a file of N directions a layer, made of
    prompts with all of the world's shapes, or with `shapes=M` of M of them."""
    given = dict(pair.split("=", 1) for pair in spec.split())
    shapes = int(given.pop("shapes", len(scenes.SHAPES)))
    if "keep" in given:
        given["keep"] = str(kept(int(given["keep"]), shapes))
    dim = given.pop("dim", str(size))
    alpha = given.pop("alpha", dim)
    return {"dim": dim, "alpha": alpha, "conv_dim": dim, "conv_alpha": alpha} | given


def targets_of(unet: UNet2DConditionModel) -> dict[str, nn.Module]:
    """The layers that are adapted: those of sd-scripts' networks with convolutions, by name."""
    network = deft.create_network(1.0, 1, 1.0, None, [], unet, conv_dim="1", conv_alpha="1")
    layers = {id(module.target.layer) for module in network.unet_modules}
    return {name: module for name, module in unet.named_modules() if id(module) in layers}


def with_deft(spec: str, unet: UNet2DConditionModel, size: int, rate: float) -> Adapter:
    """networks.deft."""
    args: dict[str, Any] = dict(deft_args(spec, size))
    dim, alpha = int(args.pop("dim")), float(args.pop("alpha"))
    network = deft.create_network(1.0, dim, alpha, None, [], unet, **args)
    network.apply_to([], unet, False, True)
    groups, _ = network.prepare_optimizer_params(rate, rate)
    names = {id(layer): name for name, layer in unet.named_modules()}

    def deltas() -> dict[str, Tensor]:
        """Of the file, as any program reads it."""
        with tempfile.TemporaryDirectory() as folder:
            file = f"{folder}/adapter.safetensors"
            network.save_weights(file, torch.float32, {})
            adapter = deft_io.read_adapter(file)
        found = {}
        for module in network.unet_modules:
            layer, weight = adapter.layer_of(module.target), module.target.layer.weight
            assert isinstance(layer, deft_io.LoraLayer)
            delta = layer.up.float() @ layer.down.float()
            found[f"{names[id(module.target.layer)]}.weight"] = delta.view(weight.shape).to(weight.device)
        return found

    return Adapter(unet, groups, deltas, network.to(unet.device), lambda: network.on_step_start(None, unet))


def with_peft(
    make: Callable[[int, list[str]], peft.PeftConfig],
    adapts: Callable[[nn.Module], bool],
    unet: UNet2DConditionModel,
    size: int,
    rate: float,
) -> Adapter:
    """One of peft's adapters on those layers that it adapts."""
    names = [name for name, layer in targets_of(unet).items() if adapts(layer)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unet = peft.inject_adapter_in_model(make(size, names), unet)
    groups = [{"params": [p for p in unet.parameters() if p.requires_grad], "lr": rate}]

    @torch.no_grad()
    def deltas() -> dict[str, Tensor]:
        found = {}
        for name, layer in unet.named_modules():
            if isinstance(layer, BaseTunerLayer):
                inner: Any = layer.get_base_layer()
                weight = inner.weight.data
                inner.weight.data = weight.clone()  # for merging, whose rounding would stay
                layer.merge()
                found[f"{name}.weight"] = inner.weight.detach() - weight
                layer.unmerge()
                inner.weight.data = weight
        return found

    return Adapter(unet, groups, deltas)


def with_all(unet: UNet2DConditionModel, size: int, rate: float) -> Adapter:
    """Every parameter of the U-Net, not only those of adapted layers."""
    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    unet.requires_grad_(True)
    groups = [{"params": list(unet.parameters()), "lr": rate}]
    return Adapter(unet, groups, lambda: {name: p.detach() - before[name] for name, p in unet.named_parameters()})


def without(unet: UNet2DConditionModel, size: int, rate: float) -> Adapter:
    """The base model."""
    return Adapter(unet, [], dict)


def any_layer(layer: nn.Module) -> bool:
    """Linear layers and convolutions."""
    return True


def linear(layer: nn.Module) -> bool:
    """What peft's DEFT knows."""
    return isinstance(layer, nn.Linear)


def pointwise(layer: nn.Module) -> bool:
    """Linear layers and 1x1 convolutions: with larger ones, peft 0.21's OFT changes the model from the start."""
    return linear(layer) or getattr(layer, "kernel_size", None) == (1, 1)


Build = Callable[[UNet2DConditionModel, int, float], Adapter]


def _peft(make: Callable[[int, list[str]], peft.PeftConfig], adapts: Callable[[nn.Module], bool] = any_layer) -> Build:
    return lambda unet, size, rate: with_peft(make, adapts, unet, size, rate)


def _deft(spec: str) -> Build:
    return lambda unet, size, rate: with_deft(spec, unet, size, rate)


# name -> (how to build it of a size, the sizes that may be chosen from; one: fixed)
ADAPTERS: dict[str, tuple[Build, Sequence[int]]] = {
    "lora": (_peft(lambda r, names: peft.LoraConfig(r=r, lora_alpha=r, target_modules=names)), [RANK]),
    "dora": (
        _peft(lambda r, names: peft.LoraConfig(r=r, lora_alpha=r, target_modules=names, use_dora=True)),
        range(1, 65),
    ),
    "oft": (
        _peft(
            lambda b, names: peft.OFTConfig(r=0, oft_block_size=b, target_modules=names, use_cayley_neumann=True),
            pointwise,
        ),
        [8, 16, 32, 64, 128],
    ),
    "peft-deft": (
        _peft(lambda r, names: peft.DeftConfig(r=r, target_modules=names, decomposition_method="relu"), linear),
        range(1, 65),
    ),
    "peft-deft-qr": (
        _peft(lambda r, names: peft.DeftConfig(r=r, target_modules=names, decomposition_method="qr"), linear),
        range(1, 65),
    ),
    "para": (_deft("para=true"), range(1, 65)),
    "para-8": (_deft("para=true dim=8"), [8]),  # the LoRA's rank, and a third of its parameters
    "full": (with_all, [0]),
    "deft": (_deft(""), range(1, 65)),
}


def adapter_of(label: str) -> tuple[Build, Sequence[int]]:
    """A row of the table; behind "deft", network_args."""
    if label == "none":
        return without, [0]
    if label.startswith("deft "):
        spec = label.removeprefix("deft ")
        given = dict(pair.split("=", 1) for pair in spec.split())
        return _deft(spec), [int(given["dim"])] if "dim" in given else range(1, 65)
    return ADAPTERS[label]


def matched(label: str) -> dict[str, int]:
    """The size with which an adapter's parameters are nearest to the LoRA's in number, and this number."""
    base = loading.load(ModelOptions(str(measure.MODEL))).denoiser
    build, sizes = adapter_of(label)

    def number(size: int) -> int:
        return build(copy.deepcopy(base), size, 1e-3).number

    wanted = ADAPTERS["lora"][0](copy.deepcopy(base), RANK, 1e-3).number
    if isinstance(sizes, range):  # parameters grow in proportion, but for small constant parts and capped ranks
        guess = RANK * wanted / number(RANK)
        sizes = sorted({min(max(math.floor(guess) + i, 1), sizes[-1]) for i in (0, 1)})
    counts = {size: number(size) for size in sizes}
    size = min(counts, key=lambda size: abs(math.log(counts[size] / wanted)))
    return {"size": size, "parameters": counts[size]}
