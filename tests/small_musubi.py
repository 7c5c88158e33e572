"""The layers of musubi-tuner's models (30c658c) and where ComfyUI has their weights, one block of each kind, small.

`MODELS` has a model's class, the classes of its blocks, and its layers. ComfyUI's paths are those of its own models
(comfy/ldm, 0.33), its names for them those of model_lora_keys_unet in comfy/lora.py and of what that calls in
comfy/utils.py, read there; tests/integration/test_comfyui.py has ComfyUI's own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

WIDTH = 12


@dataclass(frozen=True)
class Model:
    """One model.

    :param blocks: path -> class of the modules that hold the layers; "" is the model itself
    :param layers: path -> (outputs, inputs) in widths
    :param outside: of those, what is not adapted without further options
    :param comfy: path -> ComfyUI's where that is another, and which of three equal parts of its rows, None for all
    :param dotted: whether ComfyUI knows a path with dots behind `diffusion_model.`, too, as musubi-tuner has it
    :param key: beginning of `ss_base_model_version`
    """

    kind: str
    blocks: Mapping[str, str]
    layers: Mapping[str, tuple[int, int]]
    key: str
    outside: frozenset[str] = frozenset()
    comfy: Mapping[str, tuple[str, int | None]] = field(default_factory=dict)
    dotted: bool = False


def _under(root: str, layers: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {f"{root}.{path}": size for path, size in layers.items()}


def _stream(name: str, layers: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {f"{name}_{path}": size for path, size in layers.items()}


def _both(layers: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return _stream("img", layers) | _stream("txt", layers)


_FLUX_BLOCKS = {"double_blocks.0": "DoubleStreamBlock", "single_blocks.0": "SingleStreamBlock"}
_HUNYUAN_BLOCKS = {"double_blocks.0": "MMDoubleStreamBlock", "single_blocks.0": "MMSingleStreamBlock"}
_FLUX = _under("double_blocks.0", _both(
    {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.0": (4, 1), "mlp.2": (1, 4), "mod.lin": (6, 1)}
)) | _under("single_blocks.0", {"linear1": (7, 1), "linear2": (1, 5), "modulation.lin": (3, 1)})  # fmt: skip
_FLUX_2 = _under("double_blocks.0", _both(
    {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.0": (6, 1), "mlp.2": (1, 3)}
)) | _under("single_blocks.0", {"linear1": (9, 1), "linear2": (1, 4)})  # fmt: skip
_HUNYUAN = _both({"attn_proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4), "mod.linear": (6, 1)})
_HUNYUAN_COMFY = {
    f"double_blocks.0.{stream}_{theirs}": (f"double_blocks.0.{stream}_{comfy}", None)
    for stream in ("img", "txt")
    for theirs, comfy in (("attn_qkv", "attn.qkv"), ("attn_proj", "attn.proj"), ("mlp.fc1", "mlp.0"),
                          ("mlp.fc2", "mlp.2"), ("mod.linear", "mod.lin"))
}  # fmt: skip
_ATTENTION = {"attn.to_q": (1, 1), "attn.to_k": (1, 1), "attn.to_v": (1, 1), "attn.to_out.0": (1, 1)}
_ADDED = {"attn.add_q_proj": (1, 1), "attn.add_k_proj": (1, 1), "attn.add_v_proj": (1, 1), "attn.to_add_out": (1, 1)}
_QKV = dict.fromkeys(("to_query", "to_key", "to_value", "out_layer"), (1, 1))
_SWIGLU = {"w1": (3, 1), "w2": (1, 3), "w3": (3, 1)}
_Z_ATTENTION = {"to_q": (1, 1), "to_k": (1, 1), "to_v": (1, 1), "to_out.0": (1, 1)}
_Z_BLOCK = _under("attention", _Z_ATTENTION) | _under("feed_forward", _SWIGLU) | {"adaLN_modulation.0": (4, 1)}
_KREA_BLOCK = _under("attn", {"wq": (2, 2), "wk": (1, 2), "wv": (1, 2), "gate": (2, 2), "wo": (2, 2)}) | _under(
    "mlp", {"gate": (4, 2), "up": (4, 2), "down": (2, 4)}
)
_KANDINSKY = _under("self_attention", _QKV) | {"feed_forward.in_layer": (4, 1), "feed_forward.out_layer": (1, 4)}


def _wan() -> dict[str, tuple[int, int]]:
    layers = {f"{kind}_attn.{part}": (1, 1) for kind in ("self", "cross") for part in "qkvo"}
    layers |= {"cross_attn.k_img": (1, 1), "cross_attn.v_img": (1, 1), "ffn.0": (4, 1), "ffn.2": (1, 4)}
    return _under("blocks.0", layers)


MODELS = {
    "FLUX.1 Kontext": Model(
        "musubi_tuner.flux.flux_models.Flux", _FLUX_BLOCKS, _FLUX, "flux_kontext",
        outside=frozenset(path for path in _FLUX if path.endswith(".lin")),
    ),
    "FLUX.2": Model("musubi_tuner.flux_2.flux2_models.Flux2", _FLUX_BLOCKS, _FLUX_2, "flux_2_klein_4b"),
    "Qwen-Image": Model(
        "musubi_tuner.qwen_image.qwen_image_model.QwenImageTransformer2DModel",
        {"transformer_blocks.0": "QwenImageTransformerBlock"},
        _under("transformer_blocks.0", _ATTENTION | _ADDED | _both(
            {"mlp.net.0.proj": (4, 1), "mlp.net.2": (1, 4), "mod.1": (6, 1)}
        )),
        "qwen_image",
    ),
    "Z-Image": Model(
        "musubi_tuner.zimage.zimage_model.ZImageTransformer2DModel",
        {"layers.0": "ZImageTransformerBlock", "noise_refiner.0": "ZImageTransformerBlock"},
        _under("layers.0", _Z_BLOCK) | _under("noise_refiner.0", _Z_BLOCK),
        "z_image",
        outside=frozenset(["layers.0.adaLN_modulation.0", *_under("noise_refiner.0", _Z_BLOCK)]),
        comfy={
            f"{block}.0.attention.{theirs}": (f"{block}.0.attention.{comfy}", part)
            for block in ("layers", "noise_refiner")
            for theirs, comfy, part in (("to_q", "qkv", 0), ("to_k", "qkv", 1), ("to_v", "qkv", 2),
                                        ("to_out.0", "out", None))
        },
        dotted=True,
    ),
    "Wan 2.1 or 2.2": Model(
        "musubi_tuner.wan.modules.model.WanModel", {"blocks.0": "WanAttentionBlock"}, _wan(), "wan"
    ),
    "HunyuanVideo": Model(
        "musubi_tuner.hunyuan_model.models.HYVideoDiffusionTransformer", _HUNYUAN_BLOCKS,
        _under("double_blocks.0", _HUNYUAN | _both({"attn_qkv": (3, 1)}))
        | _under("single_blocks.0", {"linear1": (7, 1), "linear2": (1, 5), "modulation.linear": (3, 1)}),
        "hunyuan_video",
        outside=frozenset([*(f"double_blocks.0.{s}_mod.linear" for s in ("img", "txt")),
                           "single_blocks.0.modulation.linear"]),
        comfy=_HUNYUAN_COMFY | {"single_blocks.0.modulation.linear": ("single_blocks.0.modulation.lin", None)},
        dotted=True,
    ),
    "HunyuanVideo 1.5": Model(
        "musubi_tuner.hunyuan_video_1_5.hunyuan_video_1_5_models.HunyuanVideo_1_5_DiffusionTransformer",
        {"double_blocks.0": "MMDoubleStreamBlock"},
        _under("double_blocks.0", _HUNYUAN | _both({"attn_q": (1, 1), "attn_k": (1, 1), "attn_v": (1, 1)})),
        "hunyuan_video_1_5",
        comfy=_HUNYUAN_COMFY | {
            f"double_blocks.0.{stream}_attn_{part}": (f"double_blocks.0.{stream}_attn.qkv", k)
            for stream in ("img", "txt") for k, part in enumerate("qkv")
        },
    ),
    "FramePack": Model(
        "musubi_tuner.frame_pack.hunyuan_video_packed.HunyuanVideoTransformer3DModelPacked",
        {"transformer_blocks.0": "HunyuanVideoTransformerBlock",
         "single_transformer_blocks.0": "HunyuanVideoSingleTransformerBlock"},
        _under("transformer_blocks.0", _ATTENTION | _ADDED | {
            f"{part}.net.{k}": size for part in ("ff", "ff_context") for k, size in (("0.proj", (4, 1)), ("2", (1, 4)))
        } | {"norm1.linear": (6, 1)})
        | _under("single_transformer_blocks.0", {
            "attn.to_q": (1, 1), "attn.to_k": (1, 1), "attn.to_v": (1, 1), "proj_mlp": (4, 1), "proj_out": (1, 5),
        }),
        "framepack",
        outside=frozenset(["transformer_blocks.0.norm1.linear"]),
    ),
    "Kandinsky 5": Model(
        "musubi_tuner.kandinsky5.models.dit.DiffusionTransformer3D",
        {"text_transformer_blocks.0": "TransformerEncoderBlock",
         "visual_transformer_blocks.0": "TransformerDecoderBlock"},
        _under("text_transformer_blocks.0", _KANDINSKY | {"text_modulation.out_layer": (6, 1)})
        | _under("visual_transformer_blocks.0", _KANDINSKY | _under("cross_attention", _QKV)
                 | {"visual_modulation.out_layer": (9, 1)}),
        "kandinsky5",
        outside=frozenset(["text_transformer_blocks.0.text_modulation.out_layer",
                           "visual_transformer_blocks.0.visual_modulation.out_layer"]),
    ),
    "Krea 2": Model(
        "musubi_tuner.krea2.krea2_mmdit.SingleStreamDiT", {},
        {"first": (2, 1), "tmlp.0": (2, 1), "tmlp.2": (2, 2), "tproj.1": (12, 2), "txtmlp.1": (2, 1),
         "txtmlp.3": (2, 2), "last.linear": (1, 2)}
        | _under("blocks.0", _KREA_BLOCK) | _under("txtfusion.layerwise_blocks.0", _KREA_BLOCK)
        | _under("txtfusion.refiner_blocks.0", _KREA_BLOCK),
        "krea2",
    ),
    "Ideogram 4": Model(
        "musubi_tuner.ideogram4.ideogram4_model.Ideogram4Transformer", {"layers.0": "Ideogram4TransformerBlock"},
        _under("layers.0", {"attention.qkv": (3, 1), "attention.o": (1, 1), "adaln_modulation": (4, 1)}
               | _under("feed_forward", _SWIGLU)),
        "ideogram4",
        outside=frozenset(["layers.0.adaln_modulation"]),
    ),
    "HiDream-O1": Model(
        "musubi_tuner.hidream_o1.qwen3_vl_transformers.Qwen3VLForConditionalGeneration",
        {"model.language_model.layers.0": "Qwen3VLTextDecoderLayer", "model.x_embedder": "BottleneckPatchEmbed",
         "model.final_layer2": "FinalLayer", "model.visual.blocks.0": "Qwen3VLVisionBlock"},
        (hidream := _under("model.language_model.layers.0", {
            "self_attn.q_proj": (2, 2), "self_attn.k_proj": (1, 2), "self_attn.v_proj": (1, 2),
            "self_attn.o_proj": (2, 2), "mlp.gate_proj": (4, 2), "mlp.up_proj": (4, 2), "mlp.down_proj": (2, 4),
        }) | {"model.x_embedder.proj1": (1, 2), "model.x_embedder.proj2": (2, 1), "model.final_layer2.linear": (2, 2),
              "model.visual.blocks.0.attn.qkv": (3, 1)}),
        "hidream_o1_image",
        comfy={path: (path.removeprefix("model."), None) for path in hidream},
    ),
}  # fmt: skip
NOT_IN_COMFYUI = ("FramePack",)  # without further nodes


def made(name: str, seed: int = 0) -> nn.Module:
    """A model with these layers and random weights, frozen."""
    torch.manual_seed(seed)
    row = MODELS[name]
    package, _, kind = row.kind.rpartition(".")
    model = type(kind, (nn.Module,), {"__module__": package})()
    if name == "HiDream-O1":
        model.hidream_o1_task = "i2i"
    for path, (outputs, inputs) in row.layers.items():
        parent, *parts, last = model, *path.split(".")
        for k, part in enumerate(parts):
            if part not in parent._modules:
                block = row.blocks.get(".".join(parts[: k + 1]), "Module")
                parent.add_module(part, type(block, (nn.Module,), {})())
            parent = parent._modules[part]
        parent.add_module(last, nn.Linear(inputs * WIDTH, outputs * WIDTH))
    return model.requires_grad_(False)


def place_of(name: str, path: str) -> tuple[str, int | None]:
    """Where ComfyUI has a layer's weight: the path, and which third of its rows, None for all."""
    return MODELS[name].comfy.get(path, (path, None))


def comfy_shapes(name: str) -> dict[str, tuple[int, int]]:
    """The weights of ComfyUI's model by path."""
    shapes: dict[str, tuple[int, int]] = {}
    for path, (outputs, inputs) in MODELS[name].layers.items():
        place, part = place_of(name, path)
        shapes[place] = (outputs * WIDTH * (1 if part is None else 3), inputs * WIDTH)
    return shapes


def comfy_names(name: str) -> dict[str, tuple[str, int | None]]:
    """What ComfyUI calls them in an adapter's keys -> path, and which third of its rows."""
    names: dict[str, tuple[str, int | None]] = {}
    for place in comfy_shapes(name):
        names[f"lora_unet_{place.replace('.', '_')}"] = names[f"diffusion_model.{place}"] = (place, None)
    if MODELS[name].dotted:
        names |= {f"diffusion_model.{path}": place for path, place in MODELS[name].comfy.items()}
    return names


def in_comfyui(name: str, by_path: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Changes of musubi-tuner's weights as changes of ComfyUI's, by its paths."""
    found = {path: torch.zeros(shape, dtype=torch.float64) for path, shape in comfy_shapes(name).items()}
    for path, change in by_path.items():
        place, part = place_of(name, path)
        rows = slice(None) if part is None else slice(part * len(change), (part + 1) * len(change))
        found[place][rows] += change
    return found
