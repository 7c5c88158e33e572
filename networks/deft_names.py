"""Names of layers: a module's path in a model, as each program writes it, and the key name of kohya's files.

Paths have dots; a key name is a prefix and the path with underscores instead, in which a path is found again by the
words that the model's modules are called by (`deft_architectures.Part.words`). Diffusers' FLUX.1 has in pieces what its
files have as one weight: such a piece is named by its numbers, "0" to "3", or "012" for the first three together;
"swapped" is a whole weight whose halves stand the other way round.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from networks.deft_architectures import ARCHITECTURES, CROSS_ATTENTION_WIDTHS, Architecture, Part, inverted
from networks.deft_targets import parts_of

DENOISER = "denoiser"  # the other models are text encoders: "text_encoder", "text_encoder_2", ... in Diffusers' order

# What musubi-tuner writes as `ss_base_model_version`: several of its models have layers of the same names.
_SAID = (
    ("FLUX.2", r"^flux_2_"),
    ("Qwen-Image", r"^qwen_image"),
    ("Z-Image", r"^z_image$"),
    ("Wan 2.1 or 2.2", r"^wan$"),
    ("HunyuanVideo", r"^hunyuan_video$"),
    ("HunyuanVideo 1.5", r"^hunyuan_video_1_5$"),
    ("FramePack", r"^framepack$"),
    ("Kandinsky 5", r"^kandinsky5$"),
    ("Krea 2", r"^krea2$"),
    ("Ideogram 4", r"^ideogram4$"),
    ("HiDream-O1", r"^hidream_o1_image$"),
)

# What can be seen in the names of layers, with underscores and behind their model's: the first row that fits any. Where
# none does, files' metadata is asked, and then the rows of `_LIKELY`.
_CERTAIN = (
    ("Stable Diffusion 3", r"^denoiser_joint_blocks_"),
    ("HunyuanImage 2.1", r"_(img|txt)_mlp_fc\d$|_(img|txt)_mod_linear$|_single_blocks_\d+_modulation_linear$"),
    ("SDXL", r"transformer_blocks_[1-9]_attn[12]_|label_emb_|add_embedding_|^text_encoder_2_text_model_"),
    ("Stable Diffusion 1.x or 2.x", r"^denoiser_(down_blocks_(0_attentions|3_)|up_blocks_3_)"
                                    r"|^denoiser_(input_blocks_[12]_1|(input|output)_blocks_(9|1\d))_"),
    ("Qwen-Image", r"^denoiser_transformer_blocks_\d+_(img|txt)_(mlp|mod)_"),
    ("FLUX.1 or Chroma", r"^denoiser_(double|single)_blocks_|^text_encoder_[23]_encoder_block_"
                         r"|^denoiser_(single_)?transformer_blocks_\d+_(attn|ff|norm|norm1|proj)_"),
    ("Lumina 2", r"^denoiser_(layers|noise_refiner|context_refiner)_\d+_attention_qkv$"),
    ("Anima", r"^denoiser_(llm_adapter_)?blocks_\d+_.*(q|k|v|output)_proj$"),
    ("OmniGen", r"^denoiser_(llm_)?layers_\d+_(self_attn_(to_[qkv]|to_out_0|qkv_proj|o_proj)|mlp_gate_up_proj)$"),
    ("Z-Image", r"^denoiser_(layers|noise_refiner|context_refiner)_\d+_attention_to_[qkv]$"),
    ("Wan 2.1 or 2.2", r"^denoiser_blocks_\d+_(self|cross)_attn_[qkvo]$"),
    ("Kandinsky 5", r"^denoiser_(text|visual)_transformer_blocks_\d+_(self|cross)_attention_"),
    ("HiDream-O1", r"^denoiser_(model_)?(language_model_layers_\d+_(self_attn|mlp)|final_layer2|t_embedder1)_"),
)  # fmt: skip
_LIKELY = (
    # small models of other families have attention there too, and their files say what they are
    ("SDXL", r"^denoiser_(input|middle|output)_block|^denoiser_up_blocks_0_attentions_"),
    ("Stable Diffusion 1.x or 2.x", r"^denoiser_(down_blocks|mid_block|up_blocks)_|^text_encoder_text_model_"),
)
_IN_METADATA = (
    ("SDXL", r"^sdxl|^stable-diffusion-xl"),
    ("Stable Diffusion 1.x or 2.x", r"^sd_v[12]|^stable-diffusion-v[12]"),
    ("FLUX.1 or Chroma", r"^flux-?1|^chroma"),
    ("Stable Diffusion 3", r"^sd3|^stable-diffusion-3"),
    ("Lumina 2", r"^lumina-?2"),
    ("HunyuanImage 2.1", r"^hunyuan-image-2.1"),
    ("Anima", r"^anima"),
    ("OmniGen", r"^omnigen-?1"),
)


@dataclass(frozen=True)
class Format:
    """How programs name the layers of an adapter.

    :param layers: (what a layer's key begins with, its model: `DENOISER`, a text encoder in Diffusers' words,
        or one of kohya's prefixes, to be kept); what stands behind it is the layer's path
    :param flat: whether paths have underscores for dots
    """

    name: str
    writers: str
    layers: tuple[tuple[str, str], ...]
    flat: bool = False


_KOHYA_MODELS = (
    (r"^(?:lora_unet|lycoris|lora_transformer|oft_unet)_", DENOISER),
    (r"^(?=lora_prior_)", "kept"),
    (r"^lora_te1?_(?=text_model|encoder_layers)", "text_encoder"),
    (r"^lora_te2_(?=text_model|encoder_layers|encoder_block)", "text_encoder_2"),
    (r"^lora_te3_(?=encoder_block)", "text_encoder_3"),
    (r"^(?=lora_te)", "kept"),
)
FORMATS = (
    Format("kohya", "sd-scripts, musubi-tuner, LyCORIS, OneTrainer, A1111", _KOHYA_MODELS, flat=True),
    Format(
        "diffusers",
        "diffusers, ai-toolkit, SimpleTuner, OneTrainer",
        (
            (r"^(?:unet|transformer)\.", DENOISER),
            (r"^text_encoder\.", "text_encoder"),
            (r"^text_encoder_2\.", "text_encoder_2"),
            (r"^text_encoder_3\.", "text_encoder_3"),
        ),
    ),
    Format(
        "comfy",
        "ComfyUI, ai-toolkit, OneTrainer, musubi-tuner's converter",
        (
            (r"^(?:model\.)?diffusion_model\.", DENOISER),
            (r"^text_encoders\.clip_[lh]\.transformer\.", "text_encoder"),
            (r"^text_encoders\.clip_g\.transformer\.", "text_encoder_2"),
            (r"^text_encoders\.t5xxl\.transformer\.", "text_encoder_3"),
        ),
    ),
    Format("peft", "peft, one model a folder", ((r"^base_model\.model\.(?:model\.)?", "peft"),)),
    Format("bare", "Black Forest Labs, XLabs, OneTrainer, diffusers before 0.22", ((r"^", "bare"),)),
)


def named(name: str) -> Architecture | None:
    """The row of `deft_architectures.ARCHITECTURES` of that name."""
    return next((row for row in ARCHITECTURES if row.name == name), None)


def said(metadata: Mapping[str, str]) -> str:
    """The architecture that a file's metadata names, of those whose layers have other models' names, too; else ""."""
    version = str(metadata.get("ss_base_model_version", "")).lower()
    return next((name for name, pattern in _SAID if re.match(pattern, version)), "")


def said_or_seen(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """The architecture that a file's metadata names or, without them, its keys show; else something that is none."""
    return said(metadata) or looks_made_for(tensors)


def recognised(layers: Iterable[tuple[str, str]], text_widths: Collection[int], metadata: Mapping[str, str]) -> str:
    """The name of the architecture that layers belong to, "" if it cannot be seen.

    :param layers: each one's model and path, with dots or underscores
    :param text_widths: the widths of text that cross-attention takes in
    """
    names = [f"{model}_{path.replace('.', '_')}" for model, path in layers]
    width = {768: 1, 1024: 1, 2048: 2}.get(next(iter(text_widths), 0), 0)
    facts = [str(metadata.get(key, "")).lower() for key in ("ss_base_model_version", "modelspec.architecture")]
    of_xl = any(re.match("text_encoder_2_|denoiser_(input|middle|output)_block", name) for name in names)  # mislabelled
    if re.match("sd_v[12]", facts[0]) and not of_xl and any(re.match("denoiser_(down|mid|up)_b", n) for n in names):
        return "Stable Diffusion 1.x or 2.x"  # a smaller U-Net can have attention where SDXL alone has it
    if of_musubi := said(metadata):
        return of_musubi
    for rows, texts in ((_CERTAIN, names), (_IN_METADATA, facts), (_LIKELY, names)):
        for architecture, pattern in rows:
            if any(re.search(pattern, text) for text in texts):
                return architecture
        if width and rows is _CERTAIN:
            return ("", "Stable Diffusion 1.x or 2.x", "SDXL")[width]
    return ""


def model_of(layer: str) -> tuple[Format, str, str]:
    """A layer's format, its model, and its path there."""
    for format in FORMATS:
        for pattern, model in format.layers:
            found = re.match(pattern, layer)
            if found:
                path = layer[found.end() :]
                if model == "peft":
                    model = _bare_model(path)
                if model == "bare":
                    model, path = _bare_model(path), _without_processor(path)
                elif format.name in ("diffusers", "comfy"):
                    path = _without_processor(path)
                return format, model, path
    raise AssertionError(layer)  # the last row fits all


def _bare_model(path: str) -> str:
    if re.match(r"(text_model\.)?encoder\.layers\.", path):
        return "text_encoder"
    return "text_encoder_3" if re.match(r"encoder\.block\.", path) else DENOISER


def _without_processor(path: str) -> str:
    """The layer that an attention processor of diffusers before 0.22, or of XLabs, has its matrices for."""
    found = re.match(r"^((?:double|single)_blocks\.\d+)\.processor\.(qkv|proj)(?:_lora([12]?))?$", path)
    if found:
        block, what, number = found.groups()
        if block.startswith("single"):
            return f"{block}.linear1#012" if what == "qkv" else f"{block}.linear2"
        return f"{block}.{'txt' if number == '2' else 'img'}_attn.{what}"
    path = re.sub(r"(encoder\.layers\.\d+\.self_attn)\.to_([qkv])$", r"\1.\2_proj", path)
    path = re.sub(r"(encoder\.layers\.\d+\.self_attn)\.to_out$", r"\1.out_proj", path)
    return re.sub(r"(?:\.processor)?\.to_out$", ".to_out.0", path).replace(".processor.to_", ".to_")


def looks_made_for(tensors: Mapping[str, Tensor]) -> str:
    """The model that an adapter file looks made for, in words, by its key names and widths."""
    layers = [
        model_of(re.sub(r"\.(lora_|lora\.|deft_|alpha$|dora_|hada_|lokr_|oft_|diff).*$", "", key)) for key in tensors
    ]
    widths = {
        tensor.shape[1]
        for key, tensor in tensors.items()
        if re.search(r"attn2[._]to_k\.(lora_down|lora_A|deft_R)", key) and tensor.dim() > 1
    }
    found = recognised([(model, path) for _, model, path in layers], widths, {})
    if not found:
        return "a model that is not known here"
    if found == "Stable Diffusion 1.x or 2.x":
        found = next((CROSS_ATTENTION_WIDTHS[width] for width in widths if width in CROSS_ATTENTION_WIDTHS), found)
    form = layers[0][0].name
    return found if form == "kohya" else f"{found}, with {form_in_words(form)}"


def form_in_words(format: str) -> str:
    """How a row of `FORMATS` names layers."""
    return {"kohya": "kohya's names", "diffusers": "Diffusers' names", "comfy": "ComfyUI's names",
            "peft": "peft's names", "bare": "names without a prefix"}.get(format, format)  # fmt: skip


def dotted(name: str, words: Collection[str]) -> str | None:
    """The path of a key name without its prefix: numbers and words, the longest that fit; None if none do."""
    return _dotted(tuple(name.split("_")), frozenset(words))


@functools.lru_cache(100_000)
def _dotted(tokens: tuple[str, ...], words: frozenset[str]) -> str | None:
    if not tokens:
        return ""
    for length in range(min(len(tokens), 4), 0, -1):
        word = "_".join(tokens[:length])
        if word in words or (length == 1 and word.isdecimal()):
            rest = _dotted(tokens[length:], words)
            if rest is not None:
                return f"{word}.{rest}" if rest else word
    return None


_PEFT_ENDS = {"lora_up.weight": "lora_B.weight", "lora_down.weight": "lora_A.weight"}
_MUSUBI_ROOTS = [
    re.compile(f"^lora_unet_{root}(?={paths})") for root, paths in (a.musubi_root for a in ARCHITECTURES) if root
]
_DOTTED_KEY = re.compile(r"^diffusion_model\.(.+)\.(lora_[AB]\.weight|lora_(?:up|down)\.weight|alpha)$")


def with_dots(tensors: Mapping[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """A plain LoRA's tensors by the keys that files for this model have: kohya's, or those of `Architecture.dotted`.

    :param tensors: as `deft_io.lora_tensors` makes them: an alpha is the rank, and so is one that is not there
    :param architecture: name of a row of `ARCHITECTURES`
    """
    row = named(architecture)
    if row is None or row.dotted is None:
        return dict(tensors)
    own = next(part for part in row.denoisers if not part.renames)
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name, _, end = key.partition(".")
        path = dotted(name.removeprefix(f"{own.prefix}_"), own.words.split())
        if path is None or end not in (*_PEFT_ENDS, "alpha"):  # not known here: the whole file keeps its names
            return dict(tensors)
        if end in _PEFT_ENDS:
            found[f"{row.dotted}{path}.{_PEFT_ENDS[end]}"] = tensor
    return found


def as_musubi(tensors: Mapping[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """A LoRA's tensors by kohya's keys, with what musubi-tuner's own have in front of a path.

    :param architecture: name of a row of `ARCHITECTURES`, or ""
    """
    row = named(architecture)
    root, _ = row.musubi_root if row else ("", "")
    return {re.sub("^lora_unet_", f"lora_unet_{root}", key): tensor for key, tensor in tensors.items()}


def own_key(key: str) -> str:
    """Kohya's key of a file as it is saved, of one with the dots of ComfyUI's paths or with `Architecture.musubi_root`;
    others as they are."""
    for root in _MUSUBI_ROOTS:
        key = root.sub("lora_unet_", key)
    found = _DOTTED_KEY.match(key)
    if found is None:
        return key
    end = next((ours for ours, theirs in _PEFT_ENDS.items() if theirs == found[2]), found[2])
    return f"lora_unet_{found[1].replace('.', '_')}.{end}"


def _is_path(path: str, words: Collection[str]) -> bool:
    return all(part.isdecimal() or part in words for part in path.split("."))


def renamed(path: str, renames: Iterable[tuple[str, str]]) -> str:
    """A path after all of these renames, in their order."""
    for pattern, replacement in renames:
        path = re.sub(pattern, replacement, path)
    return path


def encoder_of(architecture: Architecture | None, model: str) -> Part | None:
    """A text encoder's row, by Diffusers' name of it; where T5 is the second there, by its last number."""
    encoders = architecture.text_encoders if architecture else ()
    number = int(model.rpartition("_")[2]) if model[-1].isdecimal() else 1
    return encoders[min(number, len(encoders)) - 1] if encoders else None


def key_name(architecture: Architecture | None, model: str, path: str) -> tuple[str, str]:
    """Kohya's key name of a layer's weight, and which piece of it the layer is, "" for all.

    :param model: `DENOISER` or a text encoder in Diffusers' words
    :param path: in any form that the architecture has, with dots, or with underscores alone
    :raises KeyError: when an architecture that is known has no such layer
    """
    if model != DENOISER:
        part = encoder_of(architecture, model)
        if part is None:
            return f"{_prefix(model)}_{path.replace('.', '_')}", ""
        root = part.path_root.replace(".", "_" if "." not in path else ".")
        path = path if path.startswith(root) else root + path
        if "." in path and not _is_path(path, part.words.split()):
            raise KeyError(path)
        return f"{part.prefix}_{path.replace('.', '_')}", ""
    if architecture is None:
        return f"lora_unet_{path.replace('.', '_')}", ""
    for part in sorted(architecture.denoisers, key=lambda part: not part.renames):
        words = part.words.split()
        found = path if "." in path or not part.renames else dotted(path, words)
        if found is None or not words or ("." in path and not _is_path(path, words)):
            continue
        new, _, piece = renamed(found, part.renames).partition("#")
        if part.renames and new == found and not piece:
            continue  # not that form's
        return f"{part.prefix}_{new.replace('.', '_')}", piece
    if "." in path and any(part.words for part in architecture.denoisers):
        raise KeyError(path)
    return f"lora_unet_{path.replace('.', '_').removeprefix(architecture.musubi_root[0])}", ""


def layers_in(architecture: Architecture | None, model: str, path: str) -> list[str]:
    """The paths of the layers whose weights stand one above the other in one, of equal size; empty where it is one's.

    :param path: as for `key_name`
    """
    for part in architecture.denoisers if architecture and model == DENOISER else ():
        found = path if "." in path else dotted(path, part.words.split())
        if found and (paths := parts_of(found, part)):
            return paths
    return []


def _prefix(model: str) -> str:
    number = model.rpartition("_")[2]
    return f"lora_te{number if number.isdecimal() else ''}"


def places(architecture: Architecture, name: str, form: str) -> list[tuple[str, str, str]]:
    """Where a weight is in another form of its model: the model, the path and the piece of each layer it is there.

    A path that ends in `#k` is of a layer whose k-th part, of equal size, the weight is.

    :param name: kohya's key name
    :param form: "diffusers" or "original"; those of text encoders are the same
    :raises KeyError: when the path cannot be had from the name, or the form is not known
    """
    for number, encoder in enumerate(architecture.text_encoders, 1):
        if name.startswith(f"{encoder.prefix}_"):
            path = dotted(name.removeprefix(f"{encoder.prefix}_"), encoder.words.split())
            if not path:
                raise KeyError(name)
            return [("text_encoder" if number == 1 else f"text_encoder_{number}", path, "")]
    own = next((part for part in architecture.denoisers if not part.renames), None)
    path = dotted(name.removeprefix(f"{own.prefix}_"), own.words.split()) if own and name.startswith(own.prefix) else ""
    other = next((part for part in architecture.denoisers if part.form == form), None)
    if not path or other is None:
        raise KeyError(name)
    return [(DENOISER, found, piece) for found, piece in _pieces(path, other)]


def _pieces(path: str, part: Part) -> list[tuple[str, str]]:
    back = _inverted(part.renames)
    pieces = {piece: renamed(f"{path}#{piece}", back) for piece in ("0", "1", "2", "3", "swapped")} if back else {}
    found = [(new, piece) for piece, new in pieces.items() if "#" not in new]
    return found or [(renamed(path, back), "")]


_inverted = functools.lru_cache(None)(inverted)
