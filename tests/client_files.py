"""Adapter files, good and odd, for the models whose layers are known: by kohya's names, mostly of rank 1."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from networks.deft_inventory import Layer, flat, inventory

Tensors = dict[str, Tensor]


def lora(name: str, wanted: Callable[[Layer], bool] = lambda layer: layer.inside, **ranks: int) -> Tensors:
    """A LoRA of the layers that are wanted, alpha = rank.

    :param ranks: word in a key name -> rank of these layers
    """
    known, tensors = inventory(name), Tensors()
    random = torch.Generator().manual_seed(0)
    for layer in known.layers:
        if layer.is_norm or not wanted(layer) or layer.part == "te3":
            continue
        key = known.key(layer)
        rank = next((r for word, r in ranks.items() if word in key), 1)
        ones = (1,) * (len(layer.shape) - 2)
        tensors[f"{key}.lora_down.weight"] = torch.randn(rank, *layer.shape[1:], generator=random)
        tensors[f"{key}.lora_up.weight"] = torch.randn(layer.shape[0], rank, *ones, generator=random)
        tensors[f"{key}.alpha"] = torch.tensor(float(rank))
    return tensors


def few(layer: Layer) -> bool:
    """Some layers of every sort."""
    return bool(re.search(r"input_blocks\.[147]\.|middle|output_blocks\.3|layers\.[01]\.|_blocks\.0\.", layer.path))


def t5(rank: int = 1) -> Tensors:
    """Two layers of FLUX.1's T5."""
    name = "lora_te3_encoder_block_0_layer_0_SelfAttention_"
    pairs = {"lora_up.weight": torch.ones(4096, rank), "lora_down.weight": torch.ones(rank, 4096)}
    return {f"{name}{n}.{p}": t for n in "qk" for p, t in (pairs | {"alpha": torch.tensor(1.0)}).items()}


def without(tensors: Tensors, pattern: str) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if not re.search(pattern, key)}


def with_alphas(tensors: Tensors, pattern: str) -> Tensors:
    """With an alpha of 8 where a key has the pattern."""
    return {key: torch.tensor(8.0) if re.search(pattern, key) else tensor for key, tensor in tensors.items()}


def renamed(tensors: Tensors, pattern: str, to: str) -> Tensors:
    return {re.sub(pattern, to, key): tensor for key, tensor in tensors.items()}


def in_diffusers_blocks(tensors: Tensors, pattern: str = "") -> Tensors:
    """SDXL's U-Net layers (those whose key has the pattern) under Diffusers' block names."""
    known = inventory("sdxl")
    names = {known.key(la): f"lora_unet_{flat(la.diffusers[0])}" for la in known.layers if la.part == "unet"}
    return {
        ".".join((names.get(key.split(".")[0], key.split(".")[0]), key.split(".", 1)[1]))
        if re.search(pattern, key)
        else key: tensor
        for key, tensor in tensors.items()
    }


def dotted(name: str, tensors: Tensors, style: str) -> Tensors:
    """Without alphas, under paths with dots: Diffusers' ("diffusers", in peft's names) or ComfyUI's ("comfy")."""
    known = inventory(name)
    component = {"unet": "transformer" if name == "flux" else "unet", "te1": "text_encoder", "te2": "text_encoder_2"}
    by_key = {known.key(layer): layer for layer in known.layers}
    found = Tensors()
    for key, tensor in tensors.items():
        stem, _, rest = key.partition(".")
        layer, rest = by_key[stem], {"lora_up.weight": "lora_B.weight", "lora_down.weight": "lora_A.weight"}.get(rest)
        if rest is None:
            continue
        if style == "comfy" and layer.part == "unet":
            found[f"diffusion_model.{layer.path}.{rest}"] = tensor
        elif style == "diffusers":
            sizes = layer.rows or (layer.shape[0],)
            parts = tensor.split(sizes) if rest.startswith("lora_B") else [tensor] * len(sizes)
            found |= {f"{component[layer.part]}.{p}.{rest}": t for p, t in zip(layer.diffusers, parts, strict=True)}
    return found


def loha(name: str) -> Tensors:
    """A LoHa of the first linear layers."""
    found = Tensors()
    for key, tensor in lora(name, few).items():
        stem = key.split(".")[0]
        if key.endswith("up.weight") and tensor.dim() == 2:
            found |= {f"{stem}.hada_w{i}_a": tensor for i in (1, 2)}
        elif key.endswith("down.weight") and tensor.dim() == 2:
            found |= {f"{stem}.hada_w{i}_b": tensor for i in (1, 2)}
    return found


def lokr(name: str) -> Tensors:
    """A LoKr of some layers."""
    stems = {key.split(".")[0] for key, t in lora(name, few).items() if key.endswith("up.weight") and t.dim() == 2}
    parts = {"lokr_w1": torch.ones(4, 4), "lokr_w2_a": torch.ones(80, 1), "lokr_w2_b": torch.ones(1, 80)}
    return {f"{stem}.{part}": tensor for stem in sorted(stems) for part, tensor in parts.items()}


def odder(name: str) -> dict[str, Tensors]:
    """What A1111's loader tells apart by more than the kinds' first names."""
    plain, known = lora(name, few), inventory(name)
    layer = next(la for la in known.layers if la.part == "unet" and la.inside and len(la.shape) == 2)
    conv = next(la for la in known.layers if la.inside and la.shape[2:] == (3, 3))
    norm = next(la for la in known.layers if la.is_norm and la.inside)
    key, block = known.key(layer), known.key(conv)
    size = layer.shape[0]
    glora = {f"{key}.{p}.weight": torch.ones(1) for p in ("a1", "a2", "b1", "b2")}
    oft = {"oft_blocks": torch.zeros(4, size // 4, size // 4)}
    return {
        "GLoRA": without(plain, f"^{key}") | glora | {f"{key}.alpha": torch.tensor(1.0)},
        "GLoRA, no alpha": without(plain, f"^{key}") | glora,
        "half a LoKr": without(plain, f"^{key}") | {f"{key}.lokr_w1": torch.ones(4, 4)},
        "half a LoKr, the other in two": without(plain, f"^{key}")
        | {f"{key}.{p}": torch.ones(1, 1) for p in ("lokr_w1", "lokr_w2_a")},
        "LoRA and OFT at once": plain | {f"{key}.{p}": t for p, t in oft.items()},
        "OFT": {f"{key}.{p}": t for p, t in oft.items()},
        "OFT, kohya's name": {f"oft_unet_{flat(layer.path)}.{p}": t for p, t in oft.items()},
        "OFT, kohya's name for Diffusers": {f"oft_unet_{flat(layer.diffusers[0])}.{p}": t for p, t in oft.items()},
        "a LoRA of a norm": plain | {f"{known.key(norm)}.lora_{p}.weight": torch.ones(1, 1) for p in ("up", "down")},
        "a norm": plain | {f"{known.key(norm)}.{p}_norm": torch.ones(norm.shape) for p in "wb"},
        "half a norm": plain | {f"{known.key(norm)}.w_norm": torch.ones(norm.shape)},
        "another kernel": plain | {f"{block}.lora_up.weight": torch.ones(conv.shape[0], 1, 1, 1),
                                   f"{block}.lora_down.weight": torch.ones(1, conv.shape[1], 5, 5)},
        "bias of a difference alone": plain | {f"{key}.diff_b": torch.ones(size)},
        "a difference": without(plain, f"^{key}") | {f"{key}.diff": torch.ones(layer.shape)},
        "(IA)^3": without(plain, f"^{key}") | {f"{key}.weight": torch.ones(size), f"{key}.on_input": torch.tensor(0.0)},
        "(IA)^3, no side": without(plain, f"^{key}") | {f"{key}.weight": torch.ones(size)},
    }  # fmt: skip


def odd(name: str) -> dict[str, Tensors]:
    """What goes wrong in practice, by what it is."""
    plain = lora(name, few)
    first = next(iter(plain)).split(".")[0]
    attention = next(key for key in plain if "attn" in key).split(".")[0]
    conv = {k for k, t in plain.items() if t.dim() == 4 and k.endswith("down.weight") and t.shape[2:] == (1, 1)}
    pairs = {conv_key.replace("lora_down", "lora_up") for conv_key in conv}
    ups = {
        k: t
        for k, t in plain.items()
        if k.endswith("up.weight") and t.shape[0] != plain[k.replace("lora_up", "lora_down")].shape[1]
    }
    found = {
        "plain": plain,
        "U-Net only": without(plain, "^lora_te"),
        "text encoders only": {k: t for k, t in plain.items() if k.startswith("lora_te")},
        "every layer": lora(name, lambda layer: layer.path != "text_projection"),
        "layers outside of blocks too": lora(name, lambda layer: few(layer) or not layer.inside),
        "no alpha": without(plain, "alpha"),
        "no alpha in attention": without(plain, "attn.*alpha"),
        "mixed ranks": lora(name, few, attn=2, ff=3, mlp=3),
        "mixed ranks, no alpha": without(lora(name, few, attn=2, ff=3), "alpha"),
        "mixed ranks, one alpha": {
            k: torch.tensor(1.0) if k.endswith("alpha") else t for k, t in lora(name, few, attn=2, ff=3).items()
        },
        "mixed alphas": with_alphas(plain, "(proj|lin|fc1).*alpha"),
        "mixed alphas in attention": with_alphas(plain, "attn.*alpha"),
        "an unknown layer": plain | {f"lora_unet_nothing_here.{p}": plain[f"{first}.{p}"] for p in
                                     ("lora_down.weight", "lora_up.weight", "alpha")},
        "an unknown part": plain | {f"{first}.something": torch.ones(1)},
        "fourteen unknown layers": plain | {f"lora_unet_none_{i}.lora_{p}.weight": torch.ones(1, 1) for i in range(7)
                                            for p in ("up", "down")},
        "no up": without(plain, f"^{attention}.lora_up"),
        "DoRA": plain | {f"{attention}.dora_scale": torch.ones(1, 1)},
        "embeddings": plain | {"bundle_emb.sks.string_to_param.*": torch.ones(1, 8)},
        "T5": plain | t5(),
        "the other prefix": renamed(plain, "^lora_te1?_", "lora_te1_" if name in ("sd1", "sd2") else "lora_te_"),
        "transposed": plain | dict(list({k: t.mT.contiguous() for k, t in ups.items() if t.dim() == 2}.items())[:1]),
        "1x1 convolutions as matrices": {k: t.flatten(1) if k in conv | pairs else t for k, t in plain.items()},
        "matrices as 1x1 convolutions": {k: t[..., None, None] if t.dim() == 2 else t for k, t in plain.items()},
        "LoHa": loha(name),
        "LoKr": lokr(name),
        "half a LoHa too": plain | {f"{first}.hada_w1_a": torch.ones(2, 2)},
        "a middle": plain | {f"{first}.lora_mid.weight": torch.ones(1, 1, 3, 3)},
        "Diffusers' paths": dotted(name, plain, "diffusers"),
        "ComfyUI's paths": dotted(name, without(plain, "^lora_te"), "comfy"),
        "half of a text encoder's attention": without(plain, "self_attn_(q|k)"),
        "a text encoder's attention without outputs": without(plain, "self_attn_out"),
        "a text encoder's queries alone": without(plain, "lora_te.*(self_attn_out|_k_|_v_|mlp)"),
    }  # fmt: skip
    if name == "sdxl":
        found["Diffusers' block names"] = in_diffusers_blocks(plain)
        found["one Diffusers' block name"] = in_diffusers_blocks(plain, "input_blocks_4_1_proj_in")
    return found


ODD = tuple(odd("sdxl"))
