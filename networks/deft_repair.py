"""What makes an adapter file one that every client reads right; each change of a weight stays what it is.

What clients do with files that lack it is in docs/clients.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from networks import deft_factors, deft_tools
from networks.deft_config import DeftError
from networks.deft_factors import Factors
from networks.deft_formats import Adapter

_ATTENTION = re.compile(r"(lora_te2?_text_model_encoder_layers_\d+_self_attn)_([qkv]|out)_proj")
# by model: the text encoder whose attention is OpenCLIP's, of queries, keys and values in one
_OPEN_CLIP = {"SDXL": ("lora_te2_", "CLIP-G"), "Stable Diffusion 2.x": ("lora_te_", "text encoder")}
_CONVOLUTION = re.compile(r"_(conv_shortcut|skip_connection)$")
_PROJECTION = re.compile(r"_proj_(in|out)$")  # of a U-Net's attention: a 1x1 convolution in Stable Diffusion 1.x alone
_MATRIX = re.compile(r"_(to_[qkv]|to_out_0|ff_net_0_proj|ff_net_2|[qkv]_proj|out_proj|fc[12]|qkv|linear[12]|mlp_[02])$")
_FLUX_IMPLEMENTATION = "https://github.com/black-forest-labs/flux"

# by architecture: what tells clients which model a file is for, as sd-scripts' trainers (commit 48d368fa) write it
_BASE = {
    "Stable Diffusion 1.x": {
        "ss_base_model_version": "sd_v1", "ss_v2": "False", "modelspec.architecture": "stable-diffusion-v1/lora",
    },
    "Stable Diffusion 2.x": {"ss_base_model_version": "sd_v2", "ss_v2": "True"},  # 512 or 768-v cannot be seen
    "SDXL": {
        "ss_base_model_version": "sdxl_base_v1-0", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    },
    "FLUX.1 or Chroma": {"ss_base_model_version": "flux1", "modelspec.implementation": _FLUX_IMPLEMENTATION},
    "Lumina 2": {"ss_base_model_version": "lumina2", "modelspec.architecture": "lumina-2/lora"},
    "HunyuanImage 2.1": {
        "ss_base_model_version": "hunyuan-image-2.1", "modelspec.architecture": "hunyuan-image-2.1/lora",
    },
    "Anima": {"ss_base_model_version": "anima", "modelspec.architecture": "anima-preview/lora"},
}  # fmt: skip


@dataclass(frozen=True)
class Repaired:
    """:param done: what was found and mended, a line each"""

    changes: dict[str, Factors]
    metadata: dict[str, str]
    done: tuple[str, ...]


def repaired(adapter: Adapter, tensors: Mapping[str, Tensor]) -> Repaired:
    """The same changes under kohya's names, completed; to be written by `deft_io.lora_tensors` with padding.

    :param tensors: of the file that the adapter was read from
    :raises DeftError: when it holds more than plain LoRA layers
    """
    changes = _plain(adapter)
    done = [*_names(adapter, tensors), *_scales(tensors), *deft_tools.left_told(adapter.left)]
    model = _model(adapter.architecture, changes)
    changes, lines = _shapes(changes, model)
    done += lines
    changes, lines = _with_whole_attention(changes, *_OPEN_CLIP.get(model, ("", "")))
    done += lines
    changes, lines = _with_an_output(changes)
    done += lines
    metadata, lines = base_named(adapter.metadata, adapter.architecture, changes)
    return Repaired(changes, metadata, (*done, *lines, *_nothing_learnt(changes)))


def refuse_non_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """:raises DeftError: for NaN or infinite values, with the layer's name"""
    for key, tensor in tensors.items():
        if not deft_factors.is_finite(tensor):
            wrong = int((~torch.isfinite(tensor.float())).sum())
            layer, _, part = key.partition(".")
            raise DeftError(
                f"{source}: {layer} has {wrong} values that are NaN or infinite (of {tensor.numel()} in {part}), which "
                f"nothing can mend; take an earlier save of the training"
            )


def _plain(adapter: Adapter) -> dict[str, Factors]:
    changes: dict[str, Factors] = {}
    for name, change in adapter.changes.items():
        if isinstance(change, Factors):
            changes[name] = change
        else:
            raise DeftError(
                f"{adapter.source}: {name} is no plain LoRA layer ({change.kind}); convert the file first (--to kohya)"
            )
    return changes


# --- what is said of the file as it was -------------------------------------------------------------------------------


def _names(adapter: Adapter, tensors: Mapping[str, Tensor]) -> list[str]:
    if adapter.format != "kohya":
        return [f"names: kohya's instead of {adapter.format}'s"]
    others = sorted({key.partition(".")[0] for key in tensors} - adapter.changes.keys())
    kinds = (
        (r"^lora_te\d?_encoder_", "text_model_ put into the names of {} text encoder layers ({} for one)"),
        (r"^lora_unet_(down_blocks|mid_block|up_blocks)_", "{} layers with Diffusers' block names have SGM's now ({})"),
    )
    lines = []
    for pattern, line in kinds:
        found = [name for name in others if re.search(pattern, name)]
        if found:
            lines.append(f"names: {line.format(len(found), found[0])}")
    return lines


def _scales(tensors: Mapping[str, Tensor]) -> list[str]:
    """Of ranks and alphas, which are one and the same number in the new file."""
    ranks = {
        key.removesuffix(".lora_down.weight"): len(t) for key, t in tensors.items() if key.endswith(".lora_down.weight")
    }
    alphas = {name: float(tensors[f"{name}.alpha"]) for name in ranks if f"{name}.alpha" in tensors}
    lines = []
    if len(set(ranks.values())) > 1:
        lowest, highest = min(ranks.values()), max(ranks.values())
        lines.append(f"ranks: {lowest} to {highest}, all padded to {highest} with zeros (diffusers takes one for all)")
    missing = [name for name in ranks if name not in alphas]
    if missing:
        lines.append(f"alpha: {len(missing)} layers had none ({missing[0]} for one); it is the rank now")
    other = [name for name, alpha in alphas.items() if alpha != ranks[name]]
    if other:
        lines.append(f"alpha: {len(other)} layers had another than their rank; multiplied into their weights")
    return lines


def _nothing_learnt(changes: Mapping[str, Factors]) -> list[str]:
    zero = [name for name, found in changes.items() if not (found.up.any() and found.down.any())]
    if len(zero) == len(changes):
        return ["zero: every layer changes nothing; nothing was learnt, or it underflowed"]
    return [f"zero: {len(zero)} of {len(changes)} layers change nothing, {zero[0]} for one; they stay"] if zero else []


# --- what is mended ---------------------------------------------------------------------------------------------------


def _model(architecture: str, changes: Mapping[str, Factors]) -> str:
    """The architecture's name; of Stable Diffusion 1.x and 2.x the one of both, by the width of the text, or both."""
    if architecture != "Stable Diffusion 1.x or 2.x":
        return architecture
    for name, change in changes.items():
        if name.endswith(("attn2_to_k", "attn2_to_v")) or re.search(r"lora_te_.*self_attn_([qkv]|out)_proj$", name):
            return {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x"}.get(change.kernel[0], architecture)
    return architecture


def _shapes(changes: Mapping[str, Factors], model: str) -> tuple[dict[str, Factors], list[str]]:
    """1x1 convolutions with four dimensions, matrices with two."""
    new: dict[str, Factors] = {}
    mended: dict[str, list[str]] = {}
    for name, change in changes.items():
        kernel, pointwise = change.kernel, _is_pointwise(name, model)
        if pointwise is True and len(kernel) == 1:
            kernel = (*kernel, 1, 1)
            mended.setdefault("1x1 convolutions have four dimensions again", []).append(name)
        elif pointwise is False and kernel[1:] == (1, 1):
            kernel = kernel[:1]
            mended.setdefault("fully connected layers have two dimensions again", []).append(name)
        new[name] = replace(change, kernel=kernel) if kernel != change.kernel else change
    return new, [f"shapes: {len(names)} {line} ({names[0]} for one)" for line, names in mended.items()]


def _is_pointwise(name: str, model: str) -> bool | None:
    """Whether a layer is a 1x1 convolution; None if it cannot be seen, or is a larger one."""
    if _CONVOLUTION.search(name):
        return True
    if _PROJECTION.search(name) and name.startswith("lora_unet_"):
        return {"Stable Diffusion 1.x": True, "Stable Diffusion 2.x": False, "SDXL": False}.get(model)
    return False if _MATRIX.search(name) else None


def _with_whole_attention(
    changes: Mapping[str, Factors], prefix: str, encoder: str
) -> tuple[dict[str, Factors], list[str]]:
    """With layers that change nothing where one of q, k, v and out is missing: of OpenCLIP, A1111 applies all or none.

    :param prefix: of the text encoder's key names; "" where none is OpenCLIP's
    """
    found: dict[str, dict[str, Factors]] = {}
    for name, change in changes.items():
        if prefix and name.startswith(prefix) and (match := _ATTENTION.fullmatch(name)):
            found.setdefault(match[1], {})[match[2]] = change
    added = {}
    for layer, parts in found.items():
        m, n = next(iter(parts.values())).shape[:2]
        for part in {"q", "k", "v", "out"} - parts.keys():
            added[f"{layer}_{part}_proj"] = Factors(torch.zeros(m, 1), torch.zeros(1, n), (n,))
    line = "{}: {} zero layers added, since A1111 applies its attention only where q, k, v and out are all there"
    return {**changes, **dict(sorted(added.items()))}, [line.format(encoder, len(added))] if added else []


def _with_an_output(changes: Mapping[str, Factors]) -> tuple[dict[str, Factors], list[str]]:
    """With one out_proj that changes nothing in a text encoder whose attention has none: diffusers knows it by that."""
    added = {}
    for prefix in ("lora_te_", "lora_te1_", "lora_te2_"):
        layers = [name for name in changes if name.startswith(prefix) and "_self_attn_" in name]
        if layers and not any(name.endswith("_out_proj") for name in layers):
            m, n = changes[layers[0]].shape[:2]
            name = re.sub(r"_[qkv]_proj$", "_out_proj", layers[0])
            added[name] = Factors(torch.zeros(m, 1), torch.zeros(1, n), (n,))
    line = "text encoder: a zero {} added, since diffusers leaves out attention that has no out_proj"
    return {**changes, **added}, [line.format(name) for name in added]


def base_named(
    metadata: Mapping[str, str], architecture: str, changes: Mapping[str, Factors]
) -> tuple[dict[str, str], list[str]]:
    """With the fields by which clients know the model, where they are missing, and a line for each."""
    model = _model(architecture, changes)
    known = _BASE.get(model, {})
    new = {key: value for key, value in known.items() if metadata.get(key, "") in ("", "None")}
    version = metadata.get("ss_base_model_version", "")
    if model == "SDXL" and version and not version.startswith("sdxl_"):  # A1111 goes by that alone
        new["ss_base_model_version"] = known["ss_base_model_version"]
    if "modelspec.implementation" in new and metadata.get("modelspec.architecture"):
        del new["modelspec.implementation"]
    lines = [f"metadata: {key} = {value}" for key, value in new.items()]
    if any(key.startswith("modelspec.") for key in new):
        new.setdefault("modelspec.sai_model_spec", metadata.get("modelspec.sai_model_spec", "1.0.1"))
    return {**metadata, **new}, lines
