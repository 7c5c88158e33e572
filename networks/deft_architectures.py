"""Architectures as data: which layers are adapted, under which names, and how their files are recognised.

Key names are those of sd-scripts' networks.lora (commit 48d368fa) and of musubi-tuner's (30c658c): prefix, module path,
dots as underscores.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import nn

from networks.deft_config import DeftError

# a denoiser -> `ss_base_model_version`, and `modelspec.architecture` without "/lora", "" where it cannot be seen
Base: TypeAlias = Callable[[nn.Module], tuple[str, str]]
Renames: TypeAlias = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Part:
    """One model of an architecture.

    :param prefix: of the key names
    :param model_classes: class names by which the model is recognised, with `PACKAGE.` before one that means another
        model elsewhere
    :param containers: class names of the modules whose Linear and 1x1 Conv2d layers are adapted
    :param conv_containers: those whose layers are adapted too when k x k convolutions are
    :param path_root: beginning of every module path in the file; transformers 5 dropped CLIP's `text_model.`
    :param renames: (pattern, replacement) from a module's path to the path that key names are made of, all applied in
        this order; `#k` at the end of a path: the layer is the k-th part of the weight that files know; in a pattern:
        its k-th part is what files know as a layer, all parts of equal size
    :param option: option without which the part is left alone
    :param optional_containers: option -> further containers
    :param base: of a denoiser, what sd-scripts calls the model in a file's metadata
    :param form: whose paths these are: "diffusers" or "original"
    :param words: what paths are made of, apart from numbers: by them a path is found in a key name, whose dots are
        underscores
    :param comfy: ComfyUI's names of a text encoder: where the second is there, it is that of widths from 1024
    """

    prefix: str
    model_classes: tuple[str, ...]
    containers: tuple[str, ...]
    conv_containers: tuple[str, ...] = ()
    path_root: str = ""
    renames: Renames = ()
    option: str | None = None
    optional_containers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    base: Base | None = None
    form: str = "original"
    words: str = ""
    comfy: tuple[str, ...] = ()


@dataclass(frozen=True)
class Blocks:
    """The numbered blocks of `block_dims` and of `down_lr_weight`, `mid_lr_weight` and `up_lr_weight`.

    :param down: how many there are, up as many
    :param outside: blocks before the first and behind the last that have no weights for rates
    :param number: the block of a key name
    """

    down: int
    mid: int
    outside: int
    number: Callable[[str], int | None]

    @property
    def total(self) -> int:
        """How many numbers `block_dims` has."""
        return 2 * (self.down + self.outside) + self.mid


@dataclass(frozen=True)
class Architecture:
    """A family of models that share one set of key names.

    :param denoisers: the U-Net or transformer, in each of the forms that programs have of it
    :param text_encoders: in the order in which trainers hand them over
    :param blocks: for the options that go by block
    :param kinds: option -> words of which all are in the key names that it gives a rank
    :param outside: option of a list of ranks for layers outside of the blocks -> a word of each one's key names
    :param numbered: option of a selection of numbers -> pattern whose group is the block's number
    :param train_blocks: value of `train_blocks` -> pattern of the key names that are adapted; "all" is always allowed
    :param fused: pattern of key names -> whether a fully connected layer stands behind queries, keys and values in the
        same weight; `split_qkv` adapts each for itself
    :param together: endings of the key names of queries, keys and values, which `fuse_qkv` adapts as one
    :param left_out: pattern of paths that are not adapted unless `include_patterns` says so
    :param left_out_by_default: another, which `exclude_patterns` takes the place of
    :param put_back: the `include_patterns` of those who give none
    :param unread: pattern of key names -> what to say of a LoRA file with such layers, which not every client reads
    :param with_convolutions: pattern of the key names that are adapted only where k x k convolutions are; those of
        `Part.conv_containers`
    :param peft_form: the form of the denoiser whose programs read a folder of peft's
    :param patterns_fit_paths: `network_reg_dims` and `network_reg_lrs` have to fit a layer's whole path, with dots,
        instead of being found in its key name
    :param dotted: what a LoRA's keys begin with in files that have paths with dots and peft's names instead of kohya's:
        where ComfyUI and diffusers do not know musubi-tuner's
    :param musubi_root: what musubi-tuner's key names have in front of a path, and files, which ComfyUI reads, have not;
        and a pattern of what paths begin with
    """

    name: str
    denoisers: tuple[Part, ...]
    text_encoders: tuple[Part, ...] = ()
    blocks: Blocks | None = None
    kinds: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    outside: tuple[str, tuple[str, ...]] | None = None
    numbered: Mapping[str, str] = field(default_factory=dict)
    train_blocks: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, bool] = field(default_factory=dict)
    together: tuple[str, ...] = ()
    left_out: str | None = None
    left_out_by_default: str = "(?!)"
    put_back: tuple[str, ...] = ()
    unread: Mapping[str, str] = field(default_factory=dict)
    with_convolutions: str = "(?!)"
    peft_form: str = "diffusers"
    patterns_fit_paths: bool = False
    dotted: str | None = None
    musubi_root: tuple[str, str] = ("", "")

    def options(self) -> set[str]:
        """The options that only some architectures have, of those that this one has."""
        names = {*self.kinds, *self.numbered, *(part.option for part in self.text_encoders if part.option)}
        names |= {self.outside[0]} if self.outside else set()
        names |= {"train_blocks"} if self.train_blocks else set()
        names |= {"split_qkv"} if self.fused else set()
        split = any("#" in new and "#swapped" not in new for part in self.denoisers for _, new in part.renames)
        names |= {"fuse_qkv"} if self.together or split else set()
        names |= set(BLOCK_OPTIONS) if self.blocks else set()
        names |= {"exclude_patterns", "include_patterns"} if self.left_out else set()
        return names.union(*(part.optional_containers for part in self.denoisers))

    def warnings(self, names: Collection[str]) -> list[str]:
        """What to say of a LoRA file with these key names."""
        return [line for pattern, line in self.unread.items() if any(re.search(pattern, name) for name in names)]

    def adapts(self, name: str, with_convolutions: bool) -> bool:
        """Whether a LoRA without further options has a layer of this key name."""
        if self.outside is not None and any(word in name for word in self.outside[1]):
            return False
        return with_convolutions or re.search(self.with_convolutions, name) is None


BLOCK_OPTIONS = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas",
                 "down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold")  # fmt: skip


_CLIP_WORDS = "text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 text_projection"
_T5_WORDS = "encoder block layer SelfAttention q k v o DenseReluDense wi wi_0 wi_1 wo"


def _clip(prefix: str, *comfy: str) -> Part:
    classes, containers = (
        ("CLIPTextModel", "CLIPTextModelWithProjection"),
        ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP"),
    )
    return Part(prefix, classes, containers, path_root="text_model.", words=_CLIP_WORDS, comfy=comfy)


_T5 = Part(
    "lora_te3",
    ("T5EncoderModel",),
    ("T5Attention", "T5DenseGatedActDense"),
    option="train_t5xxl",
    words=_T5_WORDS,
    comfy=("t5xxl",),
)

_UNET_CONTAINERS = ("Transformer2DModel",)
_UNET_CONV_CONTAINERS = ("ResnetBlock2D", "Downsample2D", "Upsample2D")


def _sd_block(name: str) -> int | None:
    """0 is without layers, then three a level of the way down, the middle, and three a level of the way up."""
    if "_mid_block_" in name:
        return 12
    found = re.search(r"_(down|up)_blocks_(\d+)_(resnets|attentions|downsamplers|upsamplers)_(\d+)_", name)
    if found is None:
        return None
    way, level, kind, place = found.groups()
    place = "2" if kind.endswith("samplers") else place
    return {"down": 1, "up": 13}[way] + 3 * int(level) + int(place)


def _sdxl_block(name: str) -> int | None:
    """Of the original's names: embeddings, 9 on the way down, 3 in the middle, 9 on the way up, output."""
    found = re.search(r"_(input_blocks|middle_block|output_blocks)_(\d+)_", name)
    if found is not None:
        return {"input_blocks": 1, "middle_block": 10, "output_blocks": 13}[found[1]] + int(found[2])
    return 0 if re.search("_(time_embed|label_emb)_", name) else 22 if "_unet_out_" in name else None


def _unet_renames(levels: int, plain: int) -> Renames:
    """Diffusers' paths of a U-Net to the original's.

    :param plain: the level without attention
    """
    kinds = (("resnets", 0), ("attentions", 1))
    down = [(rf"^down_blocks\.{i}\.{kind}\.{j}\b", f"input_blocks.{3 * i + j + 1}.{k}")
            for i in range(levels) for j in range(2) for kind, k in kinds if not (k and i == plain)]  # fmt: skip
    down += [
        (rf"^down_blocks\.{i}\.downsamplers\.0\.conv$", f"input_blocks.{3 * i + 3}.0.op") for i in range(levels - 1)
    ]
    without = levels - 1 - plain  # on the way up
    up = [(rf"^up_blocks\.{i}\.{kind}\.{j}\b", f"output_blocks.{3 * i + j}.{k}")
          for i in range(levels) for j in range(3) for kind, k in kinds if not (k and i == without)]  # fmt: skip
    up += [(rf"^up_blocks\.{i}\.upsamplers\.0\b", f"output_blocks.{3 * i + 2}.{1 if i == without else 2}")
           for i in range(levels - 1)]  # fmt: skip
    middle = [(r"^mid_block\.resnets\.0\b", "middle_block.0"), (r"^mid_block\.attentions\.0\b", "middle_block.1"),
              (r"^mid_block\.resnets\.1\b", "middle_block.2")]  # fmt: skip
    inside = [(r"\.conv1$", ".in_layers.2"), (r"\.conv2$", ".out_layers.3"), (r"\.time_emb_proj$", ".emb_layers.1"),
              (r"\.conv_shortcut$", ".skip_connection")]  # fmt: skip
    ends = [(r"^conv_in$", "input_blocks.0.0"), (r"^conv_out$", "out.2")]
    for number, place in (("1", "0"), ("2", "2")):
        ends += [(rf"^time_embedding\.linear_{number}$", f"time_embed.{place}"),
                 (rf"^add_embedding\.linear_{number}$", f"label_emb.0.{place}")]  # fmt: skip
    return (*down, *up, *middle, *inside, *ends)


def inverted(renames: Renames) -> Renames:
    """The way back: each replacement, as a pattern, to the literal text that its pattern stands for."""
    back = []
    for pattern, replacement in renames:
        start, end = "^" * pattern.startswith("^"), next(end for end in ("$", r"\b", "") if pattern.endswith(end))
        text = pattern.removeprefix("^").removesuffix(end).replace(r"\.", ".")
        for number in range(1, text.count(r"(\d+)") + 1):
            text = text.replace(r"(\d+)", rf"\{number}", 1)
        found = re.sub(r"\\(\d)", r"(\\d+)", replacement.replace(".", r"\."))
        back.append((start + found + end, text))
    return tuple(back)


SDXL_RENAMES = _unet_renames(3, 0)
LDM_RENAMES = inverted(_unet_renames(4, 3))  # of Stable Diffusion 1.x and 2.x: the original's to Diffusers'
_TRANSFORMER_WORDS = " proj_in proj_out transformer_blocks attn1 attn2 to_q to_k to_v to_out ff net proj"
_UNET_WORDS = (
    "conv_in conv_out time_embedding add_embedding linear_1 linear_2 down_blocks mid_block up_blocks resnets "
    "attentions downsamplers upsamplers conv conv1 conv2 time_emb_proj conv_shortcut" + _TRANSFORMER_WORDS
)
_ORIGINAL_UNET_WORDS = (
    "input_blocks middle_block output_blocks in_layers out_layers emb_layers skip_connection op conv time_embed "
    "label_emb out" + _TRANSFORMER_WORDS
)

# Diffusers' paths of a FLUX.1 transformer to the original's.
FLUX_RENAMES = (
    (r"^transformer_blocks\.(\d+)\.attn\.to_q$", r"double_blocks.\1.img_attn.qkv#0"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_k$", r"double_blocks.\1.img_attn.qkv#1"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_v$", r"double_blocks.\1.img_attn.qkv#2"),
    (r"^transformer_blocks\.(\d+)\.attn\.add_q_proj$", r"double_blocks.\1.txt_attn.qkv#0"),
    (r"^transformer_blocks\.(\d+)\.attn\.add_k_proj$", r"double_blocks.\1.txt_attn.qkv#1"),
    (r"^transformer_blocks\.(\d+)\.attn\.add_v_proj$", r"double_blocks.\1.txt_attn.qkv#2"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_out\.0$", r"double_blocks.\1.img_attn.proj"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_add_out$", r"double_blocks.\1.txt_attn.proj"),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.0\.proj$", r"double_blocks.\1.img_mlp.0"),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.2$", r"double_blocks.\1.img_mlp.2"),
    (r"^transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj$", r"double_blocks.\1.txt_mlp.0"),
    (r"^transformer_blocks\.(\d+)\.ff_context\.net\.2$", r"double_blocks.\1.txt_mlp.2"),
    (r"^transformer_blocks\.(\d+)\.norm1\.linear$", r"double_blocks.\1.img_mod.lin"),
    (r"^transformer_blocks\.(\d+)\.norm1_context\.linear$", r"double_blocks.\1.txt_mod.lin"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_q$", r"single_blocks.\1.linear1#0"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_k$", r"single_blocks.\1.linear1#1"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_v$", r"single_blocks.\1.linear1#2"),
    (r"^single_transformer_blocks\.(\d+)\.proj_mlp$", r"single_blocks.\1.linear1#3"),
    (r"^single_transformer_blocks\.(\d+)\.proj_out$", r"single_blocks.\1.linear2"),
    (r"^single_transformer_blocks\.(\d+)\.norm\.linear$", r"single_blocks.\1.modulation.lin"),
    (r"^x_embedder$", "img_in"),
    (r"^context_embedder$", "txt_in"),
    (r"^time_text_embed\.timestep_embedder\.linear_1$", "time_in.in_layer"),
    (r"^time_text_embed\.timestep_embedder\.linear_2$", "time_in.out_layer"),
    (r"^time_text_embed\.guidance_embedder\.linear_1$", "guidance_in.in_layer"),
    (r"^time_text_embed\.guidance_embedder\.linear_2$", "guidance_in.out_layer"),
    (r"^time_text_embed\.text_embedder\.linear_1$", "vector_in.in_layer"),
    (r"^time_text_embed\.text_embedder\.linear_2$", "vector_in.out_layer"),
    (r"^proj_out$", "final_layer.linear"),
    (r"^norm_out\.linear$", "final_layer.adaLN_modulation.1#swapped"),  # scale and shift the other way round
)
_FLUX_WORDS = (
    "double_blocks single_blocks img_attn txt_attn qkv proj img_mlp txt_mlp img_mod txt_mod lin linear1 linear2 "
    "modulation img_in txt_in time_in vector_in guidance_in in_layer out_layer final_layer linear adaLN_modulation "
    "distilled_guidance_layer layers in_proj out_proj"
)
_FLUX_DIFFUSERS_WORDS = (
    "transformer_blocks single_transformer_blocks attn to_q to_k to_v add_q_proj add_k_proj add_v_proj to_out "
    "to_add_out ff ff_context net proj norm norm1 norm1_context linear proj_mlp proj_out x_embedder context_embedder "
    "time_text_embed timestep_embedder guidance_embedder text_embedder linear_1 linear_2 norm_out"
)

_SD3_WORDS = (
    "joint_blocks context_block x_block attn attn2 qkv proj mlp fc1 fc2 adaLN_modulation context_embedder x_embedder "
    "t_embedder y_embedder final_layer linear"
)
_LUMINA_WORDS = (
    "layers noise_refiner context_refiner attention qkv out feed_forward w1 w2 w3 adaLN_modulation x_embedder "
    "t_embedder cap_embedder mlp final_layer linear"
)

# The layers of OmniGen's blocks: Diffusers' paths, which files have, to the original's, whose queries, keys and values
# are one weight.
_OMNIGEN_FUSED = (
    (r"^layers\.(\d+)\.self_attn\.to_q$", r"llm.layers.\1.self_attn.qkv_proj#0"),
    (r"^layers\.(\d+)\.self_attn\.to_k$", r"llm.layers.\1.self_attn.qkv_proj#1"),
    (r"^layers\.(\d+)\.self_attn\.to_v$", r"llm.layers.\1.self_attn.qkv_proj#2"),
    (r"^layers\.(\d+)\.self_attn\.to_out\.0$", r"llm.layers.\1.self_attn.o_proj"),
    (r"^layers\.(\d+)\.mlp\.gate_up_proj$", r"llm.layers.\1.mlp.gate_up_proj"),
    (r"^layers\.(\d+)\.mlp\.down_proj$", r"llm.layers.\1.mlp.down_proj"),
)
OMNIGEN_RENAMES = inverted(_OMNIGEN_FUSED)
_OMNIGEN_WORDS = "layers self_attn to_q to_k to_v to_out mlp gate_up_proj down_proj"
_OMNIGEN_ORIGINAL_WORDS = "llm layers self_attn qkv_proj o_proj mlp gate_up_proj down_proj"

_Z_IMAGE_WORDS = (
    "layers noise_refiner context_refiner attention to_q to_k to_v to_out feed_forward w1 w2 w3 adaLN_modulation "
    "all_x_embedder all_final_layer x_embedder final_layer linear cap_embedder t_embedder mlp qkv out"
)
_HUNYUAN_WORDS = (
    "double_blocks img_attn txt_attn qkv proj img_mlp txt_mlp img_mod txt_mod lin img_in txt_in time_in guidance_in "
    "vector_in byt5_in vision_in in_layer out_layer mlp t_embedder c_embedder input_embedder individual_token_refiner "
    "blocks self_attn self_attn_qkv self_attn_proj adaLN_modulation final_layer linear linear_1 linear_2 fc1 fc2 fc3"
)
_HUNYUAN_VIDEO_WORDS = (
    f"{_HUNYUAN_WORDS} single_blocks img_attn_qkv img_attn_proj txt_attn_qkv txt_attn_proj linear1 linear2 modulation"
)
# musubi-tuner's paths of HunyuanVideo 1.5 to ComfyUI's, as its convert_hunyuan_video_1_5_lora_to_comfy.py has them
_HUNYUAN_VIDEO_1_5_RENAMES = tuple(
    (rf"^double_blocks\.(\d+)\.{stream}_{theirs}$", rf"double_blocks.\1.{stream}_{comfy}")
    for stream in ("img", "txt")
    for theirs, comfy in (
        *((f"attn_{part}", f"attn.qkv#{k}") for k, part in enumerate("qkv")),
        ("attn_proj", "attn.proj"),
        (r"mlp\.fc1", "mlp.0"),
        (r"mlp\.fc2", "mlp.2"),
        (r"mod\.linear", "mod.lin"),
    )
)
_KANDINSKY_WORDS = (
    "text_transformer_blocks visual_transformer_blocks self_attention cross_attention to_query to_key to_value "
    "out_layer feed_forward in_layer text_modulation visual_modulation modulation time_embeddings text_embeddings "
    "pooled_text_embeddings visual_embeddings"
)
_KREA_WORDS = (
    "first blocks attn wq wk wv wo gate mlp up down tmlp tproj txtmlp txtfusion projector layerwise_blocks "
    "refiner_blocks last linear"
)
_IDEOGRAM_WORDS = (
    "layers attention qkv o feed_forward w1 w2 w3 adaln_modulation input_proj llm_cond_proj t_embedding mlp_in mlp_out "
    "adaln_proj final_layer linear"
)

CROSS_ATTENTION_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x"}


def _base(version: str, architecture: str) -> Base:
    return lambda unet: (version, architecture)


def _sd_base(unet: nn.Module) -> tuple[str, str]:
    """1.x or 2.x by the width of the text; whether a 2.x predicts v cannot be seen."""
    return _sd_version([layer.weight.shape[1] for path, layer in unet.named_modules() if path.endswith("attn2.to_k")])


def _sd_version(widths: Sequence[int]) -> tuple[str, str]:
    if widths and CROSS_ATTENTION_WIDTHS.get(widths[0]) == "Stable Diffusion 2.x":
        return "sd_v2", ""
    return "sd_v1", "stable-diffusion-v1"


def _flux_base(transformer: nn.Module) -> tuple[str, str]:
    """dev has layers for the guidance, schnell has none."""
    return _flux_version(re.search(r"guidance_(in|embedder)\.", path) for path, _ in transformer.named_modules())


def _flux_version(guided: Iterable[object]) -> tuple[str, str]:
    return "flux1", "flux-1-dev" if any(guided) else "flux-1-schnell"


def _sd3_base(transformer: nn.Module) -> tuple[str, str]:
    kind = str(getattr(transformer, "model_type", "m"))
    return kind, f"stable-diffusion-3-{kind}"


_SDXL = ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base")
_SDXL_BASE = _base(*_SDXL)
_CHROMA = ("chroma", "chroma")
_OMNIGEN = ("omnigen1", "omnigen-1")
_FLUX_CONTAINERS = ("DoubleStreamBlock", "SingleStreamBlock")
_FLUX_MODULATION = r".*(img_mod\.lin|txt_mod\.lin|modulation\.lin).*"
_FLUX_INPUTS = ("_img_in", "_time_in", "_vector_in", "_guidance_in", "_txt_in")

ARCHITECTURES = (
    Architecture(
        "Stable Diffusion 1.x or 2.x",
        (
            Part(
                "lora_unet",
                ("UNet2DConditionModel", "InferUNet2DConditionModel"),  # the second wraps it in gen_img.py
                _UNET_CONTAINERS,
                _UNET_CONV_CONTAINERS,
                base=_sd_base,
                form="diffusers",
                words=_UNET_WORDS,
            ),
            Part("lora_unet", (), (), renames=LDM_RENAMES, words=_ORIGINAL_UNET_WORDS),  # in files alone
        ),
        (_clip("lora_te", "clip_l", "clip_h"),),
        blocks=Blocks(12, 1, 0, _sd_block),
        with_convolutions=r"_(resnets|downsamplers|upsamplers)_\d+_",
    ),
    Architecture(
        "SDXL",
        (
            Part(
                "lora_unet",
                ("SdxlUNet2DConditionModel", "InferSdxlUNet2DConditionModel"),
                _UNET_CONTAINERS,
                _UNET_CONV_CONTAINERS,
                base=_SDXL_BASE,
                words=_ORIGINAL_UNET_WORDS,
            ),
            Part(
                "lora_unet",
                ("UNet2DConditionModel with text_time",),  # see `recognise`
                _UNET_CONTAINERS,
                _UNET_CONV_CONTAINERS,
                renames=SDXL_RENAMES,
                base=_SDXL_BASE,
                form="diffusers",
                words=_UNET_WORDS,
            ),
        ),
        (_clip("lora_te1", "clip_l"), _clip("lora_te2", "clip_g")),
        blocks=Blocks(9, 3, 1, _sdxl_block),
        with_convolutions=r"_(in_layers_2|out_layers_3|emb_layers_1|skip_connection|blocks_\d+_0_op|blocks_\d+_2_conv)$",
    ),
    Architecture(
        "FLUX.1 or Chroma",
        (
            Part("lora_unet", ("Flux",), _FLUX_CONTAINERS, base=_flux_base, words=_FLUX_WORDS),
            Part("lora_unet", ("Chroma",), _FLUX_CONTAINERS, base=_base(*_CHROMA), words=_FLUX_WORDS),
            Part(
                "lora_unet",
                ("FluxTransformer2DModel",),
                ("FluxTransformerBlock", "FluxSingleTransformerBlock"),
                renames=FLUX_RENAMES,
                base=_flux_base,
                form="diffusers",
                words=_FLUX_DIFFUSERS_WORDS,
            ),
        ),
        (_clip("lora_te1", "clip_l"), _T5),
        kinds={
            "img_attn_dim": ("img_attn",),
            "txt_attn_dim": ("txt_attn",),
            "img_mlp_dim": ("img_mlp",),
            "txt_mlp_dim": ("txt_mlp",),
            "img_mod_dim": ("img_mod",),
            "txt_mod_dim": ("txt_mod",),
            "single_dim": ("single_blocks", "linear"),
            "single_mod_dim": ("modulation",),
        },
        outside=("in_dims", _FLUX_INPUTS),
        numbered={
            "train_double_block_indices": r"_double_blocks_(\d+)_",
            "train_single_block_indices": r"_single_blocks_(\d+)_",
        },
        train_blocks={"double": "_double_blocks_", "single": "_single_blocks_"},
        fused={r"_double_blocks_.*qkv$": False, r"_single_blocks_.*linear1$": True},
        unread={
            "^lora_te3_": "ComfyUI, Forge and sd-scripts read its T5 part; diffusers leaves it out, "
            "InvokeAI and diffusers 0.32 refuse the whole file",
            "|".join(_FLUX_INPUTS): "layers outside of the blocks (in_dims): "
            "InvokeAI and diffusers 0.32 refuse the whole file",
        },
    ),
    Architecture(
        "Stable Diffusion 3",
        (Part("lora_unet", ("MMDiT",), ("SingleDiTBlock",), base=_sd3_base, words=_SD3_WORDS),),
        (_clip("lora_te1", "clip_l"), _clip("lora_te2", "clip_g"), _T5),
        kinds={
            "context_attn_dim": ("context_block", "attn"),
            "context_mlp_dim": ("context_block", "mlp"),
            "context_mod_dim": ("context_block", "adaLN_modulation"),
            "x_attn_dim": ("x_block", "attn"),
            "x_mlp_dim": ("x_block", "mlp"),
            "x_mod_dim": ("x_block", "adaLN_modulation"),
        },
        outside=(
            "emb_dims",
            (
                "context_embedder",
                "_t_embedder",
                "x_embedder",
                "y_embedder",
                "final_layer_adaLN_modulation",
                "final_layer_linear",
            ),
        ),
        numbered={"train_block_indices": r"_joint_blocks_(\d+)_"},
        fused={r"_joint_blocks_.*qkv$": False},
        unread={"^lora_te3_": "ComfyUI, Forge and sd-scripts read its T5 part; diffusers and InvokeAI do not"},
    ),
    Architecture(
        "Lumina 2",
        (
            Part(
                "lora_unet",
                ("NextDiT",),
                ("JointTransformerBlock", "FinalLayer"),
                base=_base("lumina2", "lumina-2"),
                words=_LUMINA_WORDS,
            ),
        ),
        (
            Part(
                "lora_te",
                ("Gemma2Model",),
                ("Gemma2Attention", "Gemma2FlashAttention2", "Gemma2SdpaAttention", "Gemma2MLP"),
            ),
        ),
        kinds={
            "attn_dim": ("attention",),
            "mlp_dim": ("mlp",),
            "mod_dim": ("modulation",),
            "refiner_dim": ("refiner",),
        },
        outside=("embedder_dims", ("x_embedder", "t_embedder", "cap_embedder")),
        train_blocks={
            "transformer": "layers_",
            "noise_refiner": "noise_refiner",
            "context_refiner": "context_refiner",
            "refiners": "noise_refiner|context_refiner",
        },
        fused={r"_qkv$": False},
    ),
    Architecture(
        "HunyuanImage 2.1",
        (
            Part(
                "lora_unet",
                ("HYImageDiffusionTransformer",),
                ("MMDoubleStreamBlock", "MMSingleStreamBlock"),
                base=_base("hunyuan-image-2.1", "hunyuan-image-2.1"),
            ),
        ),
        fused={r"_double_blocks_.*qkv$": False, r"_single_blocks_.*linear1$": True},
    ),
    Architecture(
        "Anima",
        (
            Part(
                "lora_unet",
                ("Anima",),
                ("Block", "PatchEmbed", "TimestepEmbedding", "FinalLayer"),
                optional_containers={"train_llm_adapter": ("LLMAdapterTransformerBlock",)},
                base=_base("anima", "anima-preview"),
            ),
        ),
        (
            Part(
                "lora_te",
                ("Qwen3Model",),
                ("Qwen3Attention", "Qwen3MLP", "Qwen3SdpaAttention", "Qwen3FlashAttention2"),
            ),
        ),
        left_out=r".*(_modulation|_norm|_embedder|final_layer).*",
        patterns_fit_paths=True,
    ),
    Architecture(
        "OmniGen",
        (
            Part(
                "lora_unet",
                ("OmniGenTransformer2DModel",),
                ("Attention",),
                optional_containers={"train_mlp": ("OmniGenFeedForward",)},
                base=_base(*_OMNIGEN),
                form="diffusers",
                words=_OMNIGEN_WORDS,
            ),
            Part(
                "lora_unet",
                ("OmniGen",),
                ("Phi3Attention", "Phi3SdpaAttention", "Phi3FlashAttention2"),
                renames=OMNIGEN_RENAMES,
                optional_containers={"train_mlp": ("Phi3MLP",)},
                base=_base(*_OMNIGEN),
                words=_OMNIGEN_ORIGINAL_WORDS,
            ),
        ),
        numbered={"train_block_indices": r"_layers_(\d+)_"},
        together=("_self_attn_to_q", "_self_attn_to_k", "_self_attn_to_v"),
        peft_form="original",  # its pipeline's merge_lora
    ),
    # --- musubi-tuner: containers and patterns of its networks/lora*.py; paths of files as ComfyUI has them -----------
    Architecture(
        "FLUX.1 Kontext",
        (Part("lora_unet", ("musubi_tuner.Flux",), _FLUX_CONTAINERS, words=_FLUX_WORDS),),
        fused={r"_double_blocks_.*qkv$": False, r"_single_blocks_.*linear1$": True},
        left_out=".*norm.*",
        left_out_by_default=_FLUX_MODULATION,
        patterns_fit_paths=True,
    ),
    Architecture(
        "FLUX.2",
        (Part("lora_unet", ("Flux2",), _FLUX_CONTAINERS),),
        fused={r"_double_blocks_.*qkv$": False, r"_single_blocks_.*linear1$": True},
        left_out=".*norm.*",
        left_out_by_default=_FLUX_MODULATION,
        patterns_fit_paths=True,
    ),
    Architecture(
        "Qwen-Image",
        (Part("lora_unet", ("QwenImageTransformer2DModel",), ("QwenImageTransformerBlock",)),),
        together=("_q", "_k", "_v", "_q_proj", "_k_proj", "_v_proj"),  # the picture's to_q, the text's add_q_proj
        left_out=".*_mod_.*",
        patterns_fit_paths=True,
    ),
    Architecture(
        "Z-Image",
        (
            Part(
                "lora_unet",
                ("ZImageTransformer2DModel",),
                ("ZImageTransformerBlock",),
                base=_base("z_image", ""),
                words=_Z_IMAGE_WORDS,
            ),
        ),
        together=("_attention_to_q", "_attention_to_k", "_attention_to_v"),
        left_out=".*(_modulation|_refiner).*",
        patterns_fit_paths=True,
        dotted="diffusion_model.",
    ),
    Architecture(
        "Wan 2.1 or 2.2",
        (Part("lora_unet", ("WanModel",), ("WanAttentionBlock",)),),
        together=("_self_attn_q", "_self_attn_k", "_self_attn_v"),
        left_out=".*(patch_embedding|text_embedding|time_embedding|time_projection|norm|head).*",
        patterns_fit_paths=True,
    ),
    Architecture(
        "HunyuanVideo",
        (
            Part(
                "lora_unet",
                ("HYVideoDiffusionTransformer",),
                ("MMDoubleStreamBlock", "MMSingleStreamBlock"),
                base=_base("hunyuan_video", ""),
                words=_HUNYUAN_VIDEO_WORDS,
            ),
        ),
        fused={r"_double_blocks_.*qkv$": False, r"_single_blocks_.*linear1$": True},
        left_out=".*(img_mod|txt_mod|modulation).*",
        patterns_fit_paths=True,
        dotted="diffusion_model.",
    ),
    Architecture(
        "HunyuanVideo 1.5",
        (
            Part(
                "lora_unet",
                ("HunyuanVideo_1_5_DiffusionTransformer",),
                ("MMDoubleStreamBlock",),
                renames=_HUNYUAN_VIDEO_1_5_RENAMES,
                base=_base("hunyuan_video_1_5", ""),
                form="musubi-tuner",
                words="double_blocks img_attn_q img_attn_k img_attn_v img_attn_proj txt_attn_q txt_attn_k txt_attn_v "
                "txt_attn_proj img_mlp txt_mlp fc1 fc2 img_mod txt_mod linear",
            ),
            Part("lora_unet", (), (), words=_HUNYUAN_WORDS),  # in files alone
        ),
        left_out=".*_in.*",
        patterns_fit_paths=True,
    ),
    Architecture(
        "FramePack",
        (
            Part(
                "lora_unet",
                ("HunyuanVideoTransformer3DModelPacked",),
                ("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock"),
            ),
        ),
        left_out=".*norm.*",
        patterns_fit_paths=True,
    ),
    Architecture(
        "Kandinsky 5",
        (
            Part(
                "lora_unet",
                ("DiffusionTransformer3D",),
                ("TransformerEncoderBlock", "TransformerDecoderBlock"),
                words=_KANDINSKY_WORDS,
            ),
        ),
        left_out=".*modulation.*",
        put_back=(
            r".*(self|cross)_attention\.(to_query|to_key|to_value|out_layer).*",
            r".*feed_forward\.(in|out)_layer.*",
        ),
        patterns_fit_paths=True,
    ),
    Architecture(
        "Krea 2",
        (Part("lora_unet", ("SingleStreamDiT",), ("SingleStreamDiT",), words=_KREA_WORDS),),  # all of its layers
        left_out="(?!)",
        patterns_fit_paths=True,
    ),
    Architecture(
        "Ideogram 4",
        (Part("lora_unet", ("Ideogram4Transformer",), ("Ideogram4TransformerBlock",), words=_IDEOGRAM_WORDS),),
        fused={r"_attention_qkv$": False},
        left_out=".*adaln_modulation.*",
        patterns_fit_paths=True,
    ),
    Architecture(
        "HiDream-O1",
        tuple(
            Part(
                "lora_unet",
                (f"musubi_tuner.Qwen3VLForConditionalGeneration{task}",),
                ("Qwen3VLTextDecoderLayer", "BottleneckPatchEmbed", "FinalLayer", *visual),
                renames=((r"^model\.", ""),),
                base=_base("hidream_o1_image", ""),
            )
            for task, visual in (
                ("", ()),
                (" for i2i", ("Qwen3VLVisionPatchEmbed", "Qwen3VLVisionBlock", "Qwen3VLVisionPatchMerger")),
            )
        ),
        left_out=".*(embed_tokens|lm_head).*",
        patterns_fit_paths=True,
        musubi_root=("model_", "language_model_|visual_|x_embedder_|final_layer2_|t_embedder1_"),
    ),
)


def recognise(unet: nn.Module) -> tuple[Architecture, Part]:
    """The architecture of a denoiser and the form that it has here, by its class or one that it is derived from.

    :raises DeftError: for one that is not in `ARCHITECTURES`
    """
    sdxl = getattr(getattr(unet, "config", None), "addition_embed_type", None) == "text_time"
    edits = getattr(unet, "hidream_o1_task", None) == "i2i"
    for kind in type(unet).__mro__:
        name = f"{kind.__name__}{' with text_time' * sdxl}{' for i2i' * edits}"
        for called in (f"{kind.__module__.partition('.')[0]}.{name}", name):
            for architecture in ARCHITECTURES:
                for part in architecture.denoisers:
                    if called in part.model_classes:
                        return architecture, part
    known = ", ".join(a.name for a in ARCHITECTURES)
    raise DeftError(f"networks.deft does not adapt {type(unet).__name__}; it adapts {known}")


def base_metadata(unet: nn.Module, denoiser: Part) -> dict[str, str]:
    """The fields by which UIs know what model a LoRA is for, as sd-scripts' train_network.py and its like write them.

    :param denoiser: what `recognise` found
    """
    version, architecture = denoiser.base(unet) if denoiser.base else ("", "")
    return _base_fields(version, architecture)


def base_metadata_of(architecture: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """The same where there is no module: by the name of a row of `ARCHITECTURES`, and the denoiser's key names.

    :param shapes: key name -> the weight's shape, of layers and other matrices
    """
    if architecture == "SDXL":
        return _base_fields(*_SDXL)
    if architecture == "Stable Diffusion 1.x or 2.x":
        return _base_fields(*_sd_version([shape[1] for name, shape in shapes.items() if name.endswith("attn2_to_k")]))
    if architecture == "FLUX.1 or Chroma":
        chroma = any("distilled_guidance_layer" in name for name in shapes)
        return _base_fields(*(_CHROMA if chroma else _flux_version("guidance_in" in name for name in shapes)))
    if architecture == "OmniGen":
        return _base_fields(*_OMNIGEN)
    return _base_fields("", "")


def _base_fields(version: str, architecture: str) -> dict[str, str]:
    fields = {"ss_v2": str(version == "sd_v2"), "ss_base_model_version": version}
    return fields | ({"modelspec.architecture": f"{architecture}/lora"} if architecture else {})
