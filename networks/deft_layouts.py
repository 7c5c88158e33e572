"""Checkpoint layouts as data: how a file or folder is recognised, and which of its tensors is which layer.

Layers go by the key names of sd-scripts' networks.lora (commit 48d368fa), as in `deft_architectures`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from networks import deft_architectures
from networks.deft_config import DeftError


@dataclass(frozen=True)
class Piece:
    """Rows of a layer's weight as they stand in a checkpoint.

    :param key: the tensor's
    :param first: the first of its rows
    :param rows: how many; row by row, the pieces of a layer give its weight
    """

    key: str
    first: int
    rows: int


@dataclass(frozen=True)
class Place:
    """Where a layer's weight of `shape` (m, in[, kh, kw]) stands in a checkpoint."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Model:
    """One model in a checkpoint.

    :param start: pattern of the beginning of its keys
    :param prefix: of the key names
    :param layers: pattern of the paths, as key names have them, of the layers that sd-scripts' LoRA can adapt
    :param further: of further matrices that adapters of other programs change
    :param renames: (pattern, replacement) from a path in the checkpoint to that of key names, all applied in this
        order; `#k` at the end: the tensor is the k-th part of the layer's weight; `#swapped`: its halves are the
        other way round; `|` in the last word: the tensor is several layers' weights of equal size, one above the other
    :param root: beginning of the paths of key names, which some checkpoints leave out
    """

    start: str
    prefix: str
    layers: str
    further: str = r"(?!)"
    renames: tuple[tuple[str, str], ...] = ()
    root: str = ""


@dataclass(frozen=True)
class Layout:
    """A layout of a checkpoint.

    :param architecture: name of a row of `deft_architectures.ARCHITECTURES`
    :param signs: patterns of keys that it has
    :param without: pattern of keys that it has not
    :param pipelines: beginning of the class name in a Diffusers folder's model_index.json; "" of what is no folder
    """

    name: str
    architecture: str
    models: tuple[Model, ...]
    signs: tuple[str, ...]
    without: str = r"(?!)"
    pipeline: str = ""


_SD_LAYERS = r"(down_blocks|up_blocks)\.\d+\.(attentions|resnets|downsamplers|upsamplers)\.|mid_block\."
_SD_FURTHER = r"(conv_in|conv_out|(time|add|class)_embedding\.linear_[12])$"
_SDXL_LAYERS = r"(input_blocks\.[1-9]\d*|middle_block|output_blocks\.\d+)\."
_SDXL_FURTHER = r"(input_blocks\.0\.0|out\.2|time_embed\.[02]|label_emb\.0\.[02])$"
_CLIP_LAYERS = r"text_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])$"
_T5_LAYERS = r"encoder\.block\.\d+\.layer\.\d+\.(SelfAttention\.[qkvo]|DenseReluDense\.(wi|wi_0|wi_1|wo))$"
_FLUX_LAYERS = r"(double|single)_blocks\.|(img_in|txt_in|(time|vector|guidance)_in\.(in|out)_layer)$"
_FLUX_FURTHER = r"final_layer\.(linear|adaLN_modulation\.1)$|distilled_guidance_layer\."
_SD3_LAYERS = (
    r"joint_blocks\.|(context_embedder|x_embedder\.proj|[ty]_embedder\.mlp\.[02]"
    r"|final_layer\.(linear|adaLN_modulation\.1))$"
)
_LUMINA_LAYERS = (
    r"(layers|noise_refiner|context_refiner|final_layer)\.|(x_embedder|t_embedder\.mlp\.[02]|cap_embedder\.1)$"
)
_OMNIGEN_LAYERS = r"layers\.\d+\.(self_attn\.to_([qkv]|out\.0)|mlp\.(gate_up|down)_proj)$"
_GEMMA_LAYERS = r"layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)$"

# open_clip's names of a text encoder to transformers'
_OPEN_CLIP_RENAMES = (
    (r"^transformer\.resblocks\.(\d+)\.attn\.in_proj_weight$",
     r"text_model.encoder.layers.\1.self_attn.q_proj|k_proj|v_proj"),
    (r"^transformer\.resblocks\.(\d+)\.attn\.out_proj$", r"text_model.encoder.layers.\1.self_attn.out_proj"),
    (r"^transformer\.resblocks\.(\d+)\.mlp\.c_fc$", r"text_model.encoder.layers.\1.mlp.fc1"),
    (r"^transformer\.resblocks\.(\d+)\.mlp\.c_proj$", r"text_model.encoder.layers.\1.mlp.fc2"),
)  # fmt: skip

_OMNIGEN_RENAMES = (
    (r"^llm\.layers\.(\d+)\.self_attn\.qkv_proj$", r"layers.\1.self_attn.to_q|to_k|to_v"),
    (r"^llm\.layers\.(\d+)\.self_attn\.o_proj$", r"layers.\1.self_attn.to_out.0"),
    (r"^llm\.layers\.(\d+)\.mlp\.(gate_up|down)_proj$", r"layers.\1.mlp.\2_proj"),
)


def _clip(start: str, prefix: str) -> Model:
    return Model(start, prefix, _CLIP_LAYERS, root="text_model.")


def _open_clip(start: str, prefix: str) -> Model:
    return Model(start, prefix, _CLIP_LAYERS, renames=_OPEN_CLIP_RENAMES)


def _t5(start: str) -> Model:
    return Model(start, "lora_te3", _T5_LAYERS)


_SINGLE = r"(?:model\.diffusion_model\.|diffusion_model\.|)"  # before a denoiser's keys, or nothing
_FLUX = Model(_SINGLE, "lora_unet", _FLUX_LAYERS, _FLUX_FURTHER)
_CLIP_KEY = r"(?:text_model\.)?encoder\.layers\.{}\.mlp\.fc1\.weight"

LAYOUTS = (
    Layout(
        "SGM single file",
        "SDXL",
        (
            Model(_SINGLE, "lora_unet", _SDXL_LAYERS, _SDXL_FURTHER),
            _clip(r"conditioner\.embedders\.0\.transformer\.", "lora_te1"),
            _open_clip(r"conditioner\.embedders\.1\.model\.", "lora_te2"),
        ),
        (rf"{_SINGLE}label_emb\.0\.0\.weight", rf"{_SINGLE}output_blocks\.8\.0\.in_layers\.2\.weight"),
        without=rf"conditioner\.embedders\.0\.model\.|cond_stage_model\.|{_SINGLE}output_blocks\.9\.",
    ),
    Layout(
        "LDM single file",
        "Stable Diffusion 1.x or 2.x",
        (
            Model(_SINGLE, "lora_unet", _SD_LAYERS, _SD_FURTHER, deft_architectures.LDM_RENAMES),
            _clip(r"cond_stage_model\.transformer\.", "lora_te"),
            _open_clip(r"cond_stage_model\.model\.", "lora_te"),
        ),
        (rf"{_SINGLE}input_blocks\.1\.1\.transformer_blocks\.0\.attn1\.to_q\.weight",),
        without=rf"conditioner\.|{_SINGLE}.*\.time_stack\.",
    ),
    Layout(
        "BFL single file",
        "FLUX.1 or Chroma",
        (
            _FLUX,
            _clip(r"text_encoders\.clip_l\.transformer\.", "lora_te1"),
            _t5(r"text_encoders\.t5xxl\.transformer\."),
        ),
        (rf"{_SINGLE}double_blocks\.0\.img_attn\.qkv\.weight", rf"{_SINGLE}single_blocks\.0\.linear1\.weight"),
        without=rf"{_SINGLE}(?:double_stream_modulation|single_stream_modulation)",
    ),
    Layout(
        "MMDiT single file",
        "Stable Diffusion 3",
        (
            Model(_SINGLE, "lora_unet", _SD3_LAYERS),
            _clip(r"text_encoders\.clip_l\.transformer\.", "lora_te1"),
            _clip(r"text_encoders\.clip_g\.transformer\.", "lora_te2"),
            _t5(r"text_encoders\.t5xxl\.transformer\."),
        ),
        (rf"{_SINGLE}joint_blocks\.0\.x_block\.attn\.qkv\.weight",),
    ),
    Layout(
        "NextDiT single file",
        "Lumina 2",
        (
            Model(_SINGLE, "lora_unet", _LUMINA_LAYERS),
            Model(r"text_encoders\.gemma2_2b\.transformer\.model\.", "lora_te", _GEMMA_LAYERS),
        ),
        (rf"{_SINGLE}layers\.0\.attention\.qkv\.weight", rf"{_SINGLE}cap_embedder\.1\.weight"),
        without=rf"{_SINGLE}(?:cap_pad_token|x_pad_token)",  # Z-Image
    ),
    Layout(
        "Diffusers",
        "SDXL",
        (
            Model(r"(?:unet/|)", "lora_unet", _SDXL_LAYERS, _SDXL_FURTHER, deft_architectures.SDXL_RENAMES),
            _clip("text_encoder/", "lora_te1"),
            _clip("text_encoder_2/", "lora_te2"),
        ),
        (r"(?:unet/|)add_embedding\.linear_1\.weight", r"(?:unet/|)down_blocks\.0\.resnets\.0\.conv1\.weight"),
        pipeline="StableDiffusionXL",
    ),
    Layout(
        "Diffusers",
        "Stable Diffusion 1.x or 2.x",
        (
            Model(r"(?:unet/|)", "lora_unet", _SD_LAYERS, _SD_FURTHER),
            _clip("text_encoder/", "lora_te"),
        ),
        (r"(?:unet/|)(?:mid_block|down_blocks\.\d)\.attentions\.0\.transformer_blocks\.0\.attn1\.to_q\.weight",),
        without=r"(?:unet/|)(?:add_embedding|.*temporal_transformer_block)",
        pipeline="StableDiffusion",
    ),
    Layout(
        "Diffusers",
        "FLUX.1 or Chroma",
        (
            Model(r"(?:transformer/|)", "lora_unet", _FLUX_LAYERS, _FLUX_FURTHER, deft_architectures.FLUX_RENAMES),
            _clip("text_encoder/", "lora_te1"),
            _t5("text_encoder_2/"),
        ),
        (
            r"(?:transformer/|)transformer_blocks\.0\.attn\.add_q_proj\.weight",
            r"(?:transformer/|)single_transformer_blocks\.0\.proj_mlp\.weight",
        ),
        pipeline="Flux",
    ),
    Layout(
        "Diffusers",
        "OmniGen",
        (Model(r"(?:transformer/|)", "lora_unet", _OMNIGEN_LAYERS),),
        (
            r"(?:transformer/|)layers\.0\.self_attn\.to_q\.weight",
            r"(?:transformer/|)patch_embedding\.input_image_proj\.weight",
        ),
        pipeline="OmniGen",
    ),
    Layout(
        "original",
        "OmniGen",
        (Model("", "lora_unet", _OMNIGEN_LAYERS, renames=_OMNIGEN_RENAMES),),
        (r"llm\.layers\.0\.self_attn\.qkv_proj\.weight", r"input_x_embedder\.proj\.weight"),
    ),
    Layout(
        "CLIP-G text encoder", "SDXL", (_clip("", "lora_te2"),), (_CLIP_KEY.format(31),), without=_CLIP_KEY.format(32)
    ),
    Layout(
        "CLIP-L text encoder",
        "FLUX.1 or Chroma",
        (_clip("", "lora_te1"),),
        (_CLIP_KEY.format(0),),
        without=_CLIP_KEY.format(12),
    ),
    Layout(
        "T5 text encoder",
        "FLUX.1 or Chroma",
        (_t5(""),),
        (r"encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight",),
    ),
)


# what else people take for an adapter or a checkpoint: what it is, where ComfyUI and A1111 have it, a key that it has;
# of embeddings all keys are such
_OTHERS = (
    ("a ControlNet", "models/controlnet", "models/ControlNet",
     r"(.*\.)?(input_hint_block\.0|zero_convs\.0\.0|controlnet_cond_embedding\.conv_in|controlnet_x_embedder"
     r"|controlnet_(down_)?blocks\.0)\.weight"),
    ("an IP-Adapter", "models/ipadapter", "models/ControlNet",
     r"ip_adapter\.\d+\.to_[kv]_ip\.weight|image_proj\.(proj|proj_in|latents)(\.weight)?"),
    ("a T2I-Adapter", "models/controlnet", "models/ControlNet", r"(adapter\.)?body\.0\.(resnets\.0\.)?block1\.weight"),
    ("an upscaler", "models/upscale_models", "models/ESRGAN",
     r"(params(_ema)?\.)?(model\.1\.sub\.0\.RDB1\.conv1\.0|(RRDB_trunk\.0\.RDB|body\.0\.rdb)1\.conv1"
     r"|layers\.0\.residual_group\.blocks\.0\.attn\.qkv)\.weight"),
    ("a CLIP vision model", "models/clip_vision", "models/ControlNet",
     r"vision_model\.encoder\.layers\.0\..*|visual\.transformer\.resblocks\.0\..*"),
    ("a model's checkpoint of a kind that is not known here", "models/checkpoints or models/diffusion_models",
     "models/Stable-diffusion", r"model\.diffusion_model\..*"),
    ("a VAE", "models/vae", "models/VAE",
     r"(first_stage_model\.)?(encoder|decoder)\.((down|up)\.0\.block\.0\.conv1|(down|up)_blocks\.0\.resnets\.0\.conv1"
     r"|middle\.0\.residual\.2)\.weight"),
)  # fmt: skip
_EMBEDDING = r"emb_params|clip_[lg]|t5xxl|string_to_param|<[^.]*>"

_ADAPTER = r"lora_(up|down)\.|lora_[AB]\.|lora\.(up|down)\.|hada_w|lokr_w|\.oft_|\.deft_E0|\.diff$"
AN_ADAPTER = "this is an adapter (LoRA or the like), where a model's checkpoint is to be given"


def recognise(keys: Collection[str], pipeline: str, source: str) -> Layout:
    """The layout of a checkpoint.

    :param pipeline: the class name in its model_index.json, or ""
    :raises DeftError: when it is none of `LAYOUTS`
    """
    for layout in LAYOUTS:
        if all(_any(sign, keys) for sign in layout.signs) and not _any(layout.without, keys, whole=False):
            return layout
    for layout in LAYOUTS:
        if layout.pipeline and pipeline.startswith(layout.pipeline):
            return layout
    if _any(_ADAPTER, keys, whole=False, anywhere=True):
        raise DeftError(f"{source}: {AN_ADAPTER}")
    _refuse_others(keys, source, "a model's checkpoint")
    known = ", ".join(dict.fromkeys(f"{layout.architecture} ({layout.name})" for layout in LAYOUTS))
    raise DeftError(f"{source}: its keys are in no layout of a checkpoint that is known here: {known}")


def refuse_model(keys: Collection[str], source: str) -> None:
    """:raises DeftError: when these are keys of a checkpoint, where an adapter was to be given"""
    if _any(_ADAPTER, keys, whole=False, anywhere=True):
        return
    for layout in LAYOUTS:
        if all(_any(sign, keys) for sign in layout.signs):
            raise DeftError(
                f"{source}: this is a model's checkpoint ({layout.architecture}, {layout.name}), where an adapter "
                "(LoRA or the like) is to be given"
            )
    _refuse_others(keys, source, "an adapter (LoRA or the like)")


def _refuse_others(keys: Collection[str], source: str, wanted: str) -> None:
    """:raises DeftError: for a file of another kind that is known by its keys"""
    found = next(((name, *places) for name, *places, sign in _OTHERS if _any(sign, keys)), None)
    if found is None and keys and all(re.fullmatch(_EMBEDDING, key) for key in keys):
        found = "an embedding (textual inversion)", "models/embeddings", "embeddings"
    if found is not None:
        name, comfy, a1111 = found
        raise DeftError(
            f"{source}: this is {name}, where {wanted} is to be given; it belongs in {comfy} of ComfyUI, in {a1111} of "
            f"A1111"
        )


def _any(pattern: str, keys: Collection[str], whole: bool = True, anywhere: bool = False) -> bool:
    compiled = re.compile(pattern)
    fits = compiled.fullmatch if whole else compiled.search if anywhere else compiled.match
    return any(fits(key) for key in keys)


def places(
    layout: Layout, shapes: Mapping[str, tuple[int, ...]], source: str
) -> tuple[dict[str, Place], dict[str, Place]]:
    """Key name -> place, of the layers and of the further matrices, in the order of the checkpoint's keys.

    :param shapes: of all of its tensors
    :raises DeftError: when a layer is there twice, or in part
    """
    parts: tuple[dict[str, dict[int, Piece]], ...] = ({}, {})
    for key, shape in shapes.items():
        if len(shape) not in (2, 4) or not key.endswith((".weight", ".in_proj_weight")):
            continue
        for further, name, number, piece in _named(layout, key, shape[0]):
            of_layer = parts[further].setdefault(name, {})
            if number in of_layer:
                raise DeftError(f"{source}: {of_layer[number].key} and {key} are the same layer, {name}")
            of_layer[number] = piece
    whole: dict[str, int] = {}  # how many parts the layers of a kind have
    for name, found in (*parts[0].items(), *parts[1].items()):
        whole[_alike(name)] = max(len(found), whole.get(_alike(name), 0))
    layers, others = (
        {name: _place(name, found, whole[_alike(name)], shapes, source) for name, found in part.items()}
        for part in parts
    )
    return layers, others


def _alike(name: str) -> str:
    """The same for the same layer of every block."""
    return re.sub(r"(?<=_)\d+(?=_|$)", "#", name)


def _named(layout: Layout, key: str, rows: int) -> Iterator[tuple[bool, str, int, Piece]]:
    """(whether no layer of sd-scripts, key name, number of the part, piece) of what a tensor holds."""
    for model in layout.models:
        start = re.match(model.start, key)
        if start is None:
            continue
        path = key[start.end() :].removesuffix(".weight")
        if model.root and not path.startswith(model.root):
            path = model.root + path
        for pattern, replacement in model.renames:
            path = re.sub(pattern, replacement, path)
        path, _, number = path.partition("#")
        parent, dot, last = path.rpartition(".")
        words = last.split("|")
        for k, word in enumerate(words):
            of_layer = f"{parent}{dot}{word}"
            layer = re.match(model.layers, of_layer) is not None
            if not (layer or re.match(model.further, of_layer)) or rows % len(words):
                continue
            share = rows // len(words)
            name = f"{model.prefix}_{of_layer}".replace(".", "_")
            if number == "swapped":
                half = rows // 2
                yield not layer, name, 0, Piece(key, half, rows - half)
                yield not layer, name, 1, Piece(key, 0, half)
            else:
                yield not layer, name, int(number or 0), Piece(key, k * share, share)


def _place(
    name: str, found: Mapping[int, Piece], number: int, shapes: Mapping[str, tuple[int, ...]], source: str
) -> Place:
    """:param number: of the parts that the layer has to have"""
    pieces = tuple(found[k] for k in sorted(found))
    kernels = {shapes[piece.key][1:] for piece in pieces}
    if sorted(found) != list(range(number)) or len(kernels) != 1:
        held = ", ".join(piece.key for piece in pieces)
        raise DeftError(f"{source}: of the layer {name} only {held} is there, or the shapes do not fit each other")
    return Place((sum(piece.rows for piece in pieces), *kernels.pop()), pieces)
