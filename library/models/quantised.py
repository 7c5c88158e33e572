"""A frozen denoiser whose layers are kept in 8 or 4 bits: plain fp8, or by the packages that diffusers uses too."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from networks.deft_architectures import recognise
from networks.deft_autograd import FrozenLayer
from networks.deft_config import DeftError, reason_of
from networks.deft_progress import Bar
from networks.deft_targets import targets

PACKAGES = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}

# what fp8_base leaves as it is: inputs and outputs. FLUX.1's layers that modulate are inside of its norms, and a
# seventh of it; sd-scripts casts them too
_NOT_CAST = re.compile("pos_embed|patch_embed|embed_tokens|^proj_in$|^proj_out$")
_CAST = (nn.Linear, nn.Conv2d)


def check_installed(kind: str) -> None:
    """:raises DeftError: where the package is missing that a value of --quantize_base needs"""
    if importlib.util.find_spec(PACKAGES[kind]) is None:
        raise DeftError(f"--quantize_base {kind}: not installed; pip install {PACKAGES[kind]}")


def quantise(denoiser: nn.Module, kind: str, device: torch.device, dtype: torch.dtype) -> None:
    """Quantises each Linear layer that can be adapted, one at a time on the device; it comes back to the CPU. Others,
    such as those for inputs, timesteps and outputs, are few and stay as they are.

    :param kind: "int8" and "fp8" (e4m3fn), with a scale a row, by torchao; "nf4", with a scale for each 64 numbers, by
        bitsandbytes
    :param dtype: that the layers compute in
    :raises DeftError: where the package does not do it here
    """
    of_kind: dict[str, Callable[[nn.Linear, torch.dtype], nn.Module]] = {"int8": _int8, "fp8": _fp8, "nf4": _nf4}
    paths = _adaptable(denoiser)  # and no layers, which would keep what has been replaced alive
    with Bar(len(paths), f"quantising to {kind}", "layers") as bar:
        for path in paths:
            layer: Any = denoiser.get_submodule(path)
            try:
                found = of_kind[kind](layer.to(device, dtype), dtype).to("cpu")
            except Exception as error:  # of many kinds: a device or a release that does not have it
                raise DeftError(f"--quantize_base {kind}: {PACKAGES[kind]} fails here ({reason_of(error)})") from None
            if found is not layer:
                denoiser.set_submodule(path, found)
            bar.add(1)


def read_anew(denoiser: nn.Module) -> None:
    """Makes frozen layers read their weight again in the backward pass, kept as it is in fewer bits than they compute
    with. Comes behind what adapts them, and before what casts them."""
    for layer in denoiser.modules():
        if type(layer) not in _CAST:
            continue
        holder: Any = layer
        name = "forward"  # the layer's own, behind those of adapters
        while hasattr(adapter := getattr(getattr(holder, name), "__self__", None), "org_forward"):
            holder, name = adapter, "org_forward"
        setattr(holder, name, functools.partial(_frozen, layer, getattr(holder, name)))


def _frozen(layer: Any, own: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return FrozenLayer.apply(x, own, layer)


class _Widened(ModelHook):
    """A layer that is in float8_e4m3fn, and widened while its turn is.

    diffusers' own hook for it (0.42) rounds the layer again behind each turn, into memory that is free just then: the
    weights wander between what steps keep, and half a GiB of FLUX.1's card was lost in gaps. Here they stay.

    :param dtype: that the layer computes in; diffusers says of the model that it is in it
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.compute_dtype = dtype

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        return module.to(torch.float8_e4m3fn)

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        kept: dict[str, Any] = dict(module._parameters)
        wide = {name: None if one is None else one.to(self.compute_dtype) for name, one in kept.items()}
        module._parameters.update(wide)
        try:
            return self.fn_ref.original_forward(*args, **kwargs)
        finally:
            module._parameters.update(kept)


def keep_in_fp8(denoiser: nn.Module, dtype: torch.dtype) -> None:
    """--fp8_base: Linear and Conv2d layers, but inputs and outputs. Comes behind `read_anew`.

    :param dtype: that layers compute in
    """
    for path, layer in denoiser.named_modules():
        if type(layer) in _CAST and not _NOT_CAST.search(path):
            HookRegistry.check_if_exists_or_initialize(layer).register_hook(_Widened(dtype), "layerwise_casting")


def _adaptable(denoiser: nn.Module) -> list[str]:
    _, part = recognise(denoiser)
    layers = {target.layer for target in targets(denoiser, part, False, part.optional_containers)}
    return [path for path, layer in denoiser.named_modules() if layer in layers and type(layer) is nn.Linear]


def _int8(layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(layer, Int8WeightOnlyConfig(set_inductor_config=False))
    return layer


def _fp8(layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    quantize_(layer, Float8WeightOnlyConfig(set_inductor_config=False))
    return layer


def _nf4(layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    from bitsandbytes.nn import Linear4bit

    with torch.device("meta"):
        found = Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, dtype, quant_type="nf4")
    found.weight = type(found.weight)(layer.weight.detach(), quant_type="nf4", module=found)
    found.bias = layer.bias
    return found.requires_grad_(False).to(layer.weight.device)  # quantises it
