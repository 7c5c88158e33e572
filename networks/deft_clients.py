"""What the programs that load adapters make of a file, from its key names, shapes and alphas alone.

One row of `CLIENTS` for each program. Each rule says which keys the program finds a layer for, which it passes over,
when it refuses the whole file, and what it gets wrong without a word. The rules were read from, and are tested against,
the programs' own code: Automatic1111 82a973c0, Forge dfdcbab6, ComfyUI 17358c8f, diffusers 0.42.1 (with remarks about
0.32), InvokeAI 8e71a8a5, sd-scripts 48d368fa, musubi-tuner 30c658c.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from networks import deft_formats, deft_names
from networks.deft_inventory import NAMES, Inventory, Layer, flat, inventory

Known = Mapping[str, Layer]  # what a client calls a layer -> the layer


@dataclass(frozen=True)
class Outline:
    """An adapter file without its numbers.

    :param shapes: of all tensors, by key
    :param alphas: value of every `alpha`, by key
    """

    shapes: Mapping[str, tuple[int, ...]]
    alphas: Mapping[str, float]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Outline:
        """That of a file's tensors."""
        alphas = {k: float(t) for k, t in tensors.items() if k.endswith(".alpha") and t.numel() == 1}
        return Outline({key: tuple(t.shape) for key, t in tensors.items()}, alphas, metadata)


@dataclass(frozen=True)
class Kind:
    """A kind of adapter by the names of its tensors behind a layer's name.

    :param name: for people
    :param signs: the first of them, of which one is there in every such layer
    :param needs: what has to be there too
    :param may: what can be
    """

    name: str
    signs: tuple[str, ...]
    needs: tuple[str, ...] = ()
    may: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.signs, *self.needs, *self.may)


LORA = Kind("LoRA", (".lora_up.weight",), (".lora_down.weight",), (".lora_mid.weight",))
PEFT = Kind("LoRA", (".lora_B.weight",), (".lora_A.weight",))
PROCESSOR = Kind("LoRA", ("_lora.up.weight",), ("_lora.down.weight",))
DOTTED = Kind("LoRA", (".lora.up.weight",), (".lora.down.weight",))
ENCODER = Kind("LoRA", (".lora_linear_layer.up.weight",), (".lora_linear_layer.down.weight",))
NAMED = Kind("LoRA", (".lora_B.default.weight",), (".lora_A.default.weight",))
LOHA = Kind("LoHa", (".hada_w1_a",), (".hada_w1_b", ".hada_w2_a", ".hada_w2_b"), (".hada_t1", ".hada_t2"))
_LOKR = (".lokr_w1", ".lokr_w2", ".lokr_w1_a", ".lokr_w2_a")
LOKR = Kind("LoKr", _LOKR, (), (".lokr_w1_b", ".lokr_w2_b", ".lokr_t2"))
OFT = Kind("OFT", (".oft_blocks",), (), (".rescale",))
OLD_OFT = Kind("OFT", (".oft_diag",))
FULL = Kind("full difference", (".diff",), (), (".diff_b",))
BIAS = Kind("bias", (".diff_b",))
NORM = Kind("norm", (".w_norm",), (), (".b_norm",))
GLORA = Kind("GLoRA", (".a1.weight",), (".a2.weight", ".b1.weight", ".b2.weight"))
IA3 = Kind("IA3", (".on_input",), (".weight",))
SET = Kind("weights in full", (".set_weight",))
DEFT = Kind("DEFT (save_format=deft)", (".deft_E0",), (), (".deft_P", ".deft_R", ".deft_g"))
LORAS = (LORA, PEFT, PROCESSOR, DOTTED, ENCODER, NAMED)
KINDS = (*LORAS, LOHA, LOKR, OFT, OLD_OFT, FULL, BIAS, NORM, GLORA, IA3, SET, DEFT)
DORA_SCALE = ".dora_scale"
SCALES = (".alpha", DORA_SCALE)
_SUFFIXES = tuple(sorted({*SCALES, ".reshape_weight", *(s for kind in KINDS for s in kind.all)}, key=len, reverse=True))


def split(key: str) -> tuple[str, str]:
    """A key into the layer's name and the rest, which begins with "." or is "_lora.up.weight" and the like."""
    for suffix in _SUFFIXES:
        if key.endswith(suffix) and not (suffix == ".weight" and ".lora" in key):
            return key[: -len(suffix)], suffix
    stem, dot, rest = key.partition(".")
    return stem, dot + rest


def grouped(keys: Collection[str]) -> dict[str, dict[str, str]]:
    """Layer's name -> rest -> key."""
    groups: dict[str, dict[str, str]] = {}
    for key in keys:
        stem, rest = split(key)
        groups.setdefault(stem, {})[rest] = key
    return groups


class Refused(Exception):
    """A client does not take the file; why, in words."""


@dataclass
class Reading:
    """What a client makes of a file.

    :param matched: keys that it uses
    :param refused: why it takes nothing, if so
    :param wrong: what it gets wrong without a word, a line each
    :param remarks: what it says itself, or what concerns other versions
    :param factors: layer's name -> its delta there as a multiple of the right one, where that is not 1
    """

    matched: set[str] = field(default_factory=set)
    refused: str = ""
    wrong: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    factors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Client:
    """A program that loads adapters.

    :param models: of `deft_inventory.NAMES`, those that it runs
    :param names: what it calls the layers of a model
    :param read: its rule; fills the reading, or raises Refused
    :param strict: it takes no 1x1 convolution for a matrix, or the other way round
    :param misfit: what it does about a layer of another shape: "refuses" the file or "leaves out" the layer
    :param order: where it multiplies up and down: "float32", "model" (in the model's dtype) or "file" (in the file's)
    :param zero_alpha: an alpha of 0 is to it none
    :param dora: how it reads a DoRA: "inputs" (norms over the outputs, whatever the file means), "file" (as the file
        means), "plain" (as a LoRA, its magnitudes dropped) or "" (not at all)
    """

    name: str
    version: str
    models: tuple[str, ...]
    names: Callable[[Inventory], Known]
    read: Callable[[Outline, Inventory, Known, Reading], None]
    strict: bool
    misfit: str
    order: str
    dora: str
    zero_alpha: bool = False


# What each client calls the layers


def _named(known: Inventory, *forms: Callable[[Layer, Inventory], Iterator[str]]) -> Known:
    return {name: layer for form in forms for layer in known.layers for name in form(layer, known)}


def _diffusers_flat(layer: Layer, known: Inventory) -> Iterator[str]:
    """kohya's names that diffusers converts; a CLIP's two prefixes are the same to it."""
    if layer.part == "unet" and not layer.is_norm:
        if known.name != "flux":
            yield f"lora_unet_{flat(layer.diffusers[0])}"
        if known.name in ("sdxl", "flux"):
            yield f"lora_unet_{flat(layer.path)}"
    elif layer.part == "te1":
        yield from (f"lora_te_{flat(layer.path)}", f"lora_te1_{flat(layer.path)}")
    elif layer.part == "te2":
        yield known.key(layer)


def _diffusers(layer: Layer, known: Inventory) -> Iterator[str]:
    """Diffusers' own paths."""
    component = {"unet": "transformer" if known.name == "flux" else "unet", "te1": "text_encoder"}
    component |= {"te2": "text_encoder_2"}
    if layer.part in component and not layer.is_norm:
        yield from (f"{component[layer.part]}.{path}" for path in layer.diffusers)


def _processor(path: str) -> str:
    """A path as Diffusers' old attention processors had it."""
    return path.replace(".to_", ".processor.to_").removesuffix(".0" if path.endswith(".to_out.0") else "")


def _comfy_shared(layer: Layer, known: Inventory) -> Iterator[str]:
    """ComfyUI's names that Forge has too."""
    if layer.part == "unet":
        yield f"lora_unet_{flat(layer.path)}"
        yield f"diffusion_model.{layer.path}"
        for path in layer.diffusers:
            if known.name == "flux":
                yield from (f"transformer.{path}", f"lycoris_{flat(path)}", f"lora_transformer_{flat(path)}")
            else:
                yield from (f"lora_unet_{flat(path)}", f"lycoris_{flat(path)}")
                yield from (_processor(path), f"unet.{_processor(path)}")
    elif layer.part in ("te1", "te2") and layer.inside:
        number, component = ("1", "text_encoder") if layer.part == "te1" else ("2", "text_encoder_2")
        yield f"lora_te{number}_{flat(layer.path)}"
        yield f"{component}.{layer.path}"
        if layer.part == "te1":
            yield f"lora_te_{flat(layer.path)}"
    elif layer.part == "te2":
        yield "lora_te2_text_projection"
    elif layer.part == "te3":
        yield from (f"lora_te{number}_{flat(layer.path)}" for number in (2, 3))


def _comfy_alone(layer: Layer, known: Inventory) -> Iterator[str]:
    if layer.part == "unet" and known.name == "flux":
        yield from layer.diffusers
        if layer.path.endswith(".linear1"):
            yield f"diffusion_model.{layer.path}_qkv"
    elif layer.part != "unet":
        encoder = {"te1": "clip_h" if known.name == "sd2" else "clip_l", "te2": "clip_g", "te3": "t5xxl"}[layer.part]
        yield f"text_encoders.{encoder}.transformer.{layer.path}"
        if not encoder.startswith("clip_"):
            yield f"text_encoders.transformer.{layer.path}"


def _forge_alone(layer: Layer, known: Inventory) -> Iterator[str]:
    if layer.part == "te3":
        yield f"lora_te1_{flat(layer.path)}"
    elif layer.part == "te2" and not layer.inside:
        yield "text_encoder.text_projection"


def _a1111_names(layer: Layer, known: Inventory) -> Iterator[str]:
    if layer.part != "unet":
        if layer.inside:
            yield known.key(layer)
        if known.name == "sd1":
            yield f"lora_te1_{flat(layer.path)}"
        return
    yield f"lora_unet_{flat(layer.path)}"
    other = layer.diffusers[0]
    unknown = ("add_embedding", "conv_norm_out") if known.name == "sdxl" else ("conv_norm_out",)
    if not other.startswith(unknown) and (known.name != "sdxl" or other != "up_blocks.0.upsamplers.0.conv"):
        yield f"lora_unet_{flat(other)}"


def _invoke_names(layer: Layer, known: Inventory) -> Iterator[str]:
    if known.name == "flux":
        if layer.inside and layer.part == "unet":
            yield from (f"lora_unet_{flat(layer.path)}", f"diffusion_model.{layer.path}")
            yield from (f"transformer.{path}" for path in layer.diffusers)
        elif layer.part != "unet":
            yield f"lora_te{'1' if layer.part == 'te1' else '2'}_{flat(layer.path)}"
    elif layer.part == "unet":
        yield f"lora_unet_{flat(layer.diffusers[0])}"
        if known.name == "sdxl":
            yield f"lora_unet_{flat(layer.path)}"
    else:
        yield known.key(layer)


def _trainer_names(layer: Layer, known: Inventory) -> Iterator[str]:
    """sd-scripts: layers of the blocks; of FLUX.1 those at the inputs too (in_dims)."""
    inputs = known.name == "flux" and layer.path.split(".")[0].endswith("_in")
    if (layer.inside or inputs) and not layer.is_norm:
        yield known.key(layer)
        if known.name == "sdxl" and layer.part == "unet":
            yield f"lora_unet_{flat(layer.diffusers[0])}"


def _musubi_names(layer: Layer, known: Inventory) -> Iterator[str]:
    if layer.part == "unet" and not layer.is_norm:
        yield f"lora_unet_{flat(layer.path)}"


# How each client reads


def _taken(rests: Collection[str], kinds: Collection[Kind]) -> set[str]:
    """The tensors of a layer that belong to these kinds. Raises Refused where one is missing."""
    used: set[str] = set()
    for kind in kinds:
        if any(sign in rests for sign in kind.signs):
            missing = [need for need in kind.needs if need not in rests]
            if missing:
                raise Refused(f"KeyError: a layer has no {missing[0].lstrip('.')}")
            used.update(rest for rest in kind.all if rest in rests)
    return used


def _comfy(kinds: Collection[Kind]) -> Callable[[Outline, Inventory, Known, Reading], None]:
    """ComfyUI's `load_lora`: for every name that it knows, what is there; the first of the LoRA's names alone."""

    def read(file: Outline, known: Inventory, names: Known, reading: Reading) -> None:
        for stem, rests in grouped(file.shapes).items():
            if stem not in names:
                continue
            loras = [kind for kind in kinds if kind.name == "LoRA" and kind.signs[0] in rests][:1]
            used = _taken(rests, [*loras, *(kind for kind in kinds if kind.name != "LoRA")])
            used |= {rest for rest in SCALES if rest in rests}
            reading.matched |= {rests[rest] for rest in used}

    return read


def _forge(file: Outline, known: Inventory, names: Known, reading: Reading) -> None:
    _comfy((*LORAS[:5], LOHA, LOKR, GLORA, NORM, FULL, BIAS, SET))(file, known, names, reading)
    unmatched = len(file.shapes) - len(reading.matched)
    if unmatched > 12:
        raise Refused(f"{unmatched} keys that it does not know; more than 12, and it drops the whole file")


_HALVES = tuple(
    itertools.product(((".lokr_w1",), (".lokr_w1_a", ".lokr_w1_b")), ((".lokr_w2",), (".lokr_w2_a", ".lokr_w2_b")))
)
_A1111_KINDS = (  # in its order: each with the tensors of which all have to be there, for LoKr in one of several ways
    *((kind, ((*kind.signs, *kind.needs),)) for kind in (LORA, PEFT, LOHA, IA3)),
    (LOKR, tuple((*one, *other) for one, other in _HALVES)),
    (FULL, ((".diff",),)),
    (NORM, ((".w_norm", ".b_norm"),)),
    (GLORA, ((*GLORA.signs, *GLORA.needs, *GLORA.may, ".alpha"),)),
    *((kind, (kind.signs,)) for kind in (OFT, OLD_OFT)),
)


def _first_dot(file: Outline) -> dict[str, dict[str, str]]:
    """Layer's name -> rest -> key, for clients that take the name to end at the first dot."""
    groups: dict[str, dict[str, str]] = {}
    for key in file.shapes:
        stem, dot, rest = key.partition(".")
        groups.setdefault(stem, {})[dot + rest] = key
    return groups


def _a1111(file: Outline, known: Inventory, names: Known, reading: Reading) -> None:
    halves: dict[str, int] = {}
    for stem, rests in _first_dot(file).items():
        if stem == "bundle_emb":
            reading.matched |= set(rests.values())
        if stem == "diffusion_model":
            raise Refused("AssertionError: it takes diffusion_model for one layer's name")
        layer = names.get(stem.replace("oft_unet", "lora_unet", 1))
        if layer is None or (stem.startswith("oft_unet") and not stem.endswith(flat(layer.path))):
            continue
        kind = _a1111_kind(stem, layer, rests)
        if kind is LORA and not _a1111_builds(file.shapes[rests[".lora_down.weight"]], layer):
            raise Refused(f"RuntimeError: {stem} has another kernel than the model's layer")
        reading.matched |= {rests[rest] for rest in (*kind.all, *SCALES) if rest in rests}
        if ".self_attn." in layer.path and (layer.part == "te2" or known.name == "sd2"):
            block = layer.path.rpartition(".")[0]
            halves[block] = halves.get(block, 0) + 1
    left = sum(number for number in halves.values() if number < 4)
    if left:
        reading.wrong.append(f"leaves out {left} attention layers of {_tower(known)}: not all of q, k, v and out")
    version = file.metadata.get("ss_base_model_version", "")
    if known.name == "sdxl" and file.metadata and not version.startswith("sdxl_"):
        reading.remarks.append("listed as made for SD 1 or 2: ss_base_model_version does not begin with sdxl_")


def _a1111_kind(stem: str, layer: Layer, rests: Collection[str]) -> Kind:
    """The first of its classes that takes a layer's tensors. Raises Refused, as it gives up the file then."""
    for kind, ways in _A1111_KINDS:
        if any(all(rest in rests for rest in way) for way in ways):
            if layer.is_norm and kind in (LORA, PEFT):
                raise Refused(f"AssertionError: {stem} is a LoRA of a norm")
            return kind
    raise Refused(f"AssertionError: {stem} is of no kind that it knows")


def _a1111_builds(down: tuple[int, ...], layer: Layer) -> bool:
    """Whether it can make a convolution of a LoRA's `lora_down`; it does so before it looks at anything else."""
    return len(layer.shape) != 4 or len(down) != 4 or down[2:] in ((1, 1), layer.shape[2:])


def _tower(known: Inventory) -> str:
    return "CLIP-G" if known.name == "sdxl" else "the text encoder"


_KOHYA_PREFIXES = ("lora_te_", "lora_unet_", "lora_te1_", "lora_te2_")
_SGM, _NOT_SGM = ("input_blocks", "middle_block", "output_blocks"), ("down_blocks", "mid_block", "up_blocks")


def _diffusers_read(file: Outline, known: Inventory, names: Known, reading: Reading) -> None:
    keys = [key for key in file.shapes if "dora_scale" not in key]
    if known.name == "flux" and any(".lora_down.weight" in key for key in keys):
        _diffusers_flux(keys, names, reading)
    elif known.name != "flux" and all(key.startswith(_KOHYA_PREFIXES) for key in keys):
        _diffusers_kohya(file, keys, known, names, reading)
    else:
        _diffusers_own(keys, known, names, reading)
    _diffusers_texts(names, reading)
    if len(keys) < len(file.shapes):
        reading.wrong.append("drops the magnitudes of a DoRA and applies the rest as a LoRA, with a warning")


def _diffusers_flux(keys: list[str], names: Known, reading: Reading) -> None:
    """As `_convert_kohya_flux_lora_to_diffusers`."""
    if any(key.startswith("transformer.") for key in keys):
        reading.matched |= {key for key in keys if split(key)[0] in names and key.startswith("transformer.")}
        return
    left, dropped = [], 0
    for stem, rests in grouped(keys).items():
        plain = flat(stem.replace("diffusion_model.", "lora_unet_"))
        layer = names.get(plain)
        if LORA.needs[0] in rests and LORA.signs[0] not in rests:
            raise Refused(f"KeyError: {stem}.lora_up.weight")
        pair = {rest for rest in rests if rest in (*LORA.signs, *LORA.needs, ".alpha")}
        if layer is not None and LORA.needs[0] in rests:
            inside = layer.inside  # it gives the others names without `transformer.`, and then looks for that
            dropped += not inside
            reading.matched |= {rests[rest] for rest in pair if inside}
            pair = set(rests) if layer.part != "unet" else pair
            left += [rests[rest] for rest in rests if rest not in pair]
        else:
            left += rests.values()
    if dropped:
        reading.wrong.append(f"leaves out {dropped} layers outside of the blocks (in_dims)")
    left = [key for key in left if key.startswith(("lora_unet_", "diffusion_model.")) and ".diff_b" not in key]
    if left:
        raise Refused(f"Incompatible keys detected: {left[0]} and so on, {len(left)} of them")


def _diffusers_texts(names: Known, reading: Reading) -> None:
    """As `convert_state_dict_to_peft`, which knows a text encoder's old names by `to_out_lora` alone."""
    stems = {split(key)[0] for key in reading.matched if key.startswith("lora_te")}
    for part in ("te1", "te2"):
        of_part = {stem for stem in stems if names[stem].part == part}
        attention = {stem for stem in of_part if ".self_attn." in names[stem].path}
        if not attention or any(names[stem].path.endswith(".out_proj") for stem in attention):
            continue
        if attention == of_part:
            raise Refused("ValueError: Could not automatically infer state dict type (a text encoder without out_proj)")
        reading.matched -= {key for key in reading.matched if split(key)[0] in attention}
        reading.wrong.append(f"leaves out {len(attention)} layers of a text encoder's attention, as it has no out_proj")


def _diffusers_kohya(file: Outline, keys: list[str], known: Inventory, names: Known, reading: Reading) -> None:
    """As `_maybe_map_sgm_blocks_to_diffusers` and `_convert_non_diffusers_lora_to_diffusers`."""
    sgm = [key for key in keys if any(p in key for p in _SGM)]
    mixed = known.name == "sdxl" and sgm and any(p in key for key in keys for p in _NOT_SGM if key not in sgm)
    if mixed:
        lost = len({split(key)[0] for key in sgm})
        reading.wrong.append(f"leaves out {lost} layers under sd-scripts' names, because others have Diffusers' names")
        keys = [key for key in keys if key not in set(sgm)]
    used: dict[str, dict[str, str]] = {}
    for stem, rests in grouped(keys).items():
        pair = {".lora_down.weight", ".lora_up.weight", ".alpha"}
        if ".lora_down.weight" in rests and ".lora_up.weight" not in rests:
            raise Refused(f"KeyError: {stem}.lora_up.weight")
        extra = [rest for rest in rests if rest not in pair or ".lora_down.weight" not in rests]
        if extra:
            raise Refused(f"keys that it cannot rename: {rests[extra[0]]}")
        if stem in names:
            used[stem] = rests
    unet = {key.partition(".")[0] for key in keys if key.startswith("lora_unet_")}
    if unet and not any(stem in used for stem in unet):
        raise Refused("none of its U-Net layers are found in the model")
    reading.matched |= {key for rests in used.values() for key in rests.values()}
    _diffusers_scales(file, used, names, reading)


def _diffusers_own(keys: list[str], known: Inventory, names: Known, reading: Reading) -> None:
    """Files under Diffusers' own names."""
    for key in keys:
        if "lora" not in key and not (known.name == "flux" and key.endswith(".alpha")):
            raise Refused(f"not a LoRA to it: {key}")
    for stem, rests in grouped(keys).items():
        if stem.startswith("lora_"):
            continue
        plain = stem.replace(".processor.", ".")
        plain = plain + ".0" if plain.endswith(".to_out") else plain
        if plain in names:
            reading.matched |= {rests[rest] for kind in LORAS for rest in kind.all if rest in rests}


def _diffusers_scales(file: Outline, used: Mapping[str, Mapping[str, str]], names: Known, reading: Reading) -> None:
    """Layers read with another layer's alpha.

    `get_peft_kwargs` takes the most frequent alpha of a component, and lists those that differ under names that peft
    finds for a part of the layers alone: not for attention, and for no text encoder where transformers (5.6 and newer)
    has dropped `text_model.` from their paths.
    """
    for part in ("unet", "te1", "te2"):
        stems = [stem for stem in used if names[stem].part == part]
        alphas = {s: file.alphas[used[s][".alpha"]] for s in stems if used[s].get(".alpha") in file.alphas}
        if not alphas:
            continue
        usual = Counter(alphas.values()).most_common(1)[0][0]
        for stem in stems:
            rank = file.shapes[used[stem][".lora_down.weight"]][0]
            right = alphas.get(stem, float(rank))
            found = part != "te1" and not re.search(r"attn[12]?\.", names[stem].diffusers[0])
            seen = right if stem in alphas and found else usual
            if seen != right and right:
                reading.factors[stem] = seen / right
    if reading.factors:
        worst = max(abs(factor - 1) for factor in reading.factors.values())
        reading.wrong.append(
            f"scales {len(reading.factors)} layers by another layer's alpha: deltas off by up to {worst:.0%}"
        )


_FLUX_KEY = re.compile(
    r"lora_unet_(\w+_blocks)_(\d+)_(img_attn|img_mlp|img_mod|txt_attn|txt_mlp|txt_mod|linear1|linear2|modulation)"
    r"|lora_unet_final_layer_linear|lora_te1_text_model_encoder_layers_\d+_(mlp|self_attn)_\w+"
    r"|lora_te2_encoder_block_\d+_layer_\d+_(DenseReluDense|SelfAttention)_\w+"
)
_INVOKE_KINDS = (LORA, LOHA, LOKR, FULL, IA3, NORM)
_WIDTHS = {768: "sd1", 1024: "sd2", 1280: "sdxl", 2048: "sdxl"}


def _invoke(file: Outline, known: Inventory, names: Known, reading: Reading) -> None:
    keys = [key for key in file.shapes if not key.startswith("bundle_emb")]
    taken = _invoke_base(file, file.shapes)
    if taken is None:
        raise Refused("it does not see for which model the file is (Unknown_Config)")
    if taken != known.name:
        raise Refused(f"it takes the file for {inventory(taken).title}")
    if known.name == "sdxl":
        unet = {key.partition(".")[0] for key in keys if key.startswith("lora_unet_")}
        sgm = {
            stem for stem in unet if re.match(r"lora_unet_(input_|middle_|output_|time_embed_|label_emb|out_)", stem)
        }
        strange = [key for key in keys if not key.startswith(("lora_unet_", "lora_te1_", "lora_te2_"))]
        if strange:
            raise Refused(f"a prefix that it does not know: {strange[0]}")
        if sgm and unet - sgm:
            raise Refused("block names of both kinds, sd-scripts' and Diffusers'")
    paths = {prefix for prefix in ("transformer.", "diffusion_model.") if any(key.startswith(prefix) for key in keys)}
    other = [key for key in keys if paths and not key.startswith(tuple(paths))]
    if other:
        raise Refused(f"a layer that it does not know: {other[0]}")
    groups = grouped(keys) if paths else None
    for stem, rests in (groups or _first_dot(Outline(dict.fromkeys(keys, ()), {}))).items():
        kinds = (PEFT, *_INVOKE_KINDS) if groups else _INVOKE_KINDS
        used = [k for k in kinds if any(s in rests for s in k.signs)][:1]
        if not used or (".dora_scale" in rests and used[0].name != "LoRA"):
            raise Refused(f"{stem} is of no kind that it knows")
        taken_rests = _taken(rests, used) | {rest for rest in SCALES if rest in rests}
        if stem in names:
            reading.matched |= {rests[rest] for rest in taken_rests}


def _invoke_base(file: Outline, keys: Collection[str]) -> str | None:
    """The model that it takes a file for: by names for FLUX.1, else by the width of the texts, else by deep blocks."""
    if keys and all(_FLUX_KEY.match(key) for key in keys):
        return "flux"
    ends = (".lora_A.weight", ".lora_B.weight")
    if all(key.endswith(ends) for key in keys) and any(
        key.startswith(("transformer.single_transformer_blocks.0.attn.to_q", "diffusion_model.double_blocks."))
        for key in keys
    ):
        return "flux"
    widths: dict[str, int | None] = {}
    for key in keys:
        stem, _, rest = key.partition(".")
        known = rest in ("lora_down.weight", "hada_w1_b", "hada_w2_b", "diff") and len(file.shapes[key]) > 1
        width = file.shapes[key][1] if known else None
        found: int | None = None
        texts = stem.startswith("lora_unet_") and stem.endswith(("_attn2_to_k", "_attn2_to_v"))
        if texts or ("time_emb_proj.lora_down" in key) or (stem.startswith("lora_te_") and "_self_attn_" in stem):
            found = width
        elif stem.startswith(("lora_te1_", "lora_te2_")) and "_self_attn_" in stem:
            widths[stem[:8]] = width  # None again at each alpha: it is the order of the keys that counts
            te1, te2 = widths.get("lora_te1"), widths.get("lora_te2")
            found = te1 + te2 if te1 and te2 else None
        if found is not None:
            return _WIDTHS.get(found)
    deep = r"lora_unet_(down_|up_|mid_|input_|output_|middle_)block.*_transformer_blocks_([2-9])_"
    return "sdxl" if any(re.match(deep, key) for key in keys) else None


def _sd_scripts(file: Outline, known: Inventory, names: Known, reading: Reading) -> None:
    has_diffusers = any("down_blocks" in key or "up_blocks" in key for key in file.shapes)
    unet = [key.partition(".")[0] for key in file.shapes if key.startswith("lora_unet_")]
    if known.name == "sdxl" and has_diffusers and any(part in "".join(unet[:1]) for part in _SGM):
        raise Refused("UnboundLocalError: block names of both kinds, sd-scripts' first")
    for stem, rests in _first_dot(file).items():
        layer = names.get(stem)
        other = layer is not None and stem != known.key(layer)
        if layer is None or ".lora_down.weight" not in rests or (other and not has_diffusers):
            continue
        if ".lora_up.weight" not in rests:
            raise Refused(f"KeyError: {stem} has no lora_up.weight")
        if known.name == "flux" and ".alpha" not in rests:
            raise Refused(f"KeyError: {stem} has no alpha")
        reading.matched |= {rests[rest] for rest in (*LORA.signs, *LORA.needs, ".alpha") if rest in rests}
        if ".dora_scale" in rests and not reading.wrong:
            reading.wrong.append("drops the magnitudes of a DoRA and applies the rest as a LoRA")


def _musubi(file: Outline, known: Inventory, names: Known, reading: Reading) -> None:
    groups = grouped(file.shapes)
    kind = next((k for key in file.shapes for k, sign in _MUSUBI_SIGNS if sign in key), LORA)
    for stem, rests in groups.items():
        if stem in names and any(sign in rests for sign in kind.signs):
            reading.matched |= {rests[rest] for rest in (*_taken(rests, [kind]), ".alpha") if rest in rests}
            if ".dora_scale" in rests and not reading.wrong:
                reading.wrong.append("drops the magnitudes of a DoRA and applies the rest as a LoRA")


_MUSUBI_SIGNS = ((LORA, "lora_down"), (LOHA, "hada_w1_a"), (LOKR, "lokr_w1"))
_ALL = ("sd1", "sd2", "sdxl", "flux")
_SDS = ("sd1", "sd2", "sdxl")
_COMFY_KINDS = (*LORAS, LOHA, LOKR, OFT, GLORA, NORM, FULL, BIAS, SET)

CLIENTS = (
    Client("A1111", "1.10.1", _SDS, lambda k: _named(k, _a1111_names), _a1111, False, "leaves out", "model", "inputs"),
    Client("Forge", "dfdcbab6", _ALL, lambda k: _named(k, _comfy_shared, _forge_alone), _forge, False, "refuses",
           "float32", "file"),
    Client("ComfyUI", "0.19", _ALL, lambda k: _named(k, _comfy_shared, _comfy_alone), _comfy(_COMFY_KINDS), False,
           "leaves out", "float32", "file"),
    Client("diffusers", "0.42", _ALL, lambda k: _named(k, _diffusers_flat, _diffusers),
           _diffusers_read, True, "refuses", "model", "plain"),
    Client("InvokeAI", "8e71a8a5", _ALL, lambda k: _named(k, _invoke_names), _invoke, False, "refuses", "model",
           "inputs"),
    Client("sd-scripts", "0.10", _ALL, lambda k: _named(k, _trainer_names), _sd_scripts, True, "refuses", "float32",
           "plain", zero_alpha=True),
    Client("musubi-tuner", "30c658c", ("flux",), lambda k: _named(k, _musubi_names), _musubi, False, "refuses", "file",
           "plain"),
)  # fmt: skip


# All together


def made_for(file: Outline) -> Inventory | None:
    """The model whose layers a file names, and whose widths it has; None if it is none that is known here."""
    if deft_names.said(file.metadata):  # none of `NAMES`
        return None
    groups = grouped(file.shapes)
    best, found = (False, 0, 0, False), None
    for name in NAMES:
        known = inventory(name)
        names = all_names(name)
        named = [(names[stem], rests) for stem, rests in groups.items() if stem in names]
        wanted = "True" if name == "sd2" else "False"
        fits = sum(_fits(layer, rests, file, strict=False) is True for layer, rests in named)
        version = file.metadata.get("ss_base_model_version", "")
        told = bool(version) and version.startswith({"sd1": "sd_v1", "sd2": "sd_v2"}.get(name, name))
        score = (told and 2 * len(named) >= len(groups), len(named), fits, file.metadata.get("ss_v2", "") == wanted)
        if score > best:
            best, found = score, known
    return found if found and 2 * best[1] >= len(groups) else None


def is_published(file: Outline, known: Inventory) -> bool:
    """Whether a file's layers are all of the published model, or at least as wide as those."""
    names = all_names(known.name)
    groups = grouped(file.shapes)
    fits = [_fits(names[stem], rests, file, strict=False) for stem, rests in groups.items() if stem in names]
    return len(fits) == len(groups) or 2 * fits.count(False) <= len(fits)


def all_names(name: str) -> Known:
    """What any client calls the layers of a model."""
    known = inventory(name)
    together: dict[str, Layer] = {}
    for client in CLIENTS:
        if name in client.models:
            together.update(client.names(known))
    oft = {stem.replace("lora_unet", "oft_unet", 1): layer for stem, layer in together.items()}
    return oft | together


def _fits(layer: Layer, rests: Mapping[str, str], file: Outline, strict: bool) -> bool | None:
    """Whether a LoRA's matrices fit the layer's weight; None if the layer has no LoRA."""
    kind = next((k for k in LORAS if k.signs[0] in rests and k.needs[0] in rests), None)
    if kind is None:
        return None
    up, down = file.shapes[rests[kind.signs[0]]], file.shapes[rests[kind.needs[0]]]
    if len(up) < 2 or len(down) < 2 or up[1] != down[0]:
        return False
    outputs = {layer.shape[0], *layer.rows}
    if up[0] not in outputs or down[1] != layer.shape[1]:
        return False
    if ".lora_mid.weight" in rests and not strict:
        return True
    kernel, wanted = down[2:], layer.shape[2:]
    return kernel == wanted if strict else (kernel or (1, 1)) == (wanted or (1, 1))


def readings(file: Outline, known: Inventory) -> dict[str, Reading | None]:
    """What each client makes of a file for a model, by its name; None where it does not run the model."""
    return {c.name: read_by(c, file, known) if known.name in c.models else None for c in CLIENTS}


def read_by(client: Client, file: Outline, known: Inventory) -> Reading:
    """What a client makes of a file."""
    reading = Reading()
    names = client.names(known)
    try:
        client.read(file, known, names, reading)
        _check_shapes(client, file, names, reading)
        if deft_formats.PEFT_KEY in file.metadata and client.name != "diffusers":
            _check_recorded(file, names, reading)
    except Refused as refusal:
        reading = Reading(refused=str(refusal), remarks=reading.remarks)
    if known.name == "flux" and client.name == "diffusers":
        old = ("lora_te3_", "lora_unet_img_in", "lora_unet_txt_in", "lora_unet_time_in", "lora_unet_vector_in")
        if any(key.startswith(old) for key in file.shapes):
            reading.remarks.append("0.32 refuses the file: T5, or layers outside of the blocks")
    return reading


def recorded_alpha(metadata: Mapping[str, str], stem: str, shapes: Mapping[str, tuple[int, ...]]) -> float | None:
    """A LoRA's alpha where diffusers has put it into a file's metadata.

    :param shapes: of the layer's tensors, by the ends of their keys
    """
    rank = next((shapes[kind.needs[0]][0] for kind in LORAS if shapes.get(kind.needs[0])), 0)
    return deft_formats.recorded_alpha(metadata, stem, rank) if rank and ".alpha" not in shapes else None


def _check_recorded(file: Outline, names: Known, reading: Reading) -> None:
    """Layers whose scale is in diffusers' record alone, which no other program looks into."""
    for stem, rests in grouped(reading.matched).items():
        shapes = {rest: file.shapes[key] for rest, key in rests.items()}
        alpha = recorded_alpha(file.metadata, stem, shapes)
        rank = next((shapes[kind.needs[0]][0] for kind in LORAS if shapes.get(kind.needs[0])), 0)
        if alpha is not None and alpha != rank and stem in names:
            reading.factors[stem] = rank / alpha
    if reading.factors:
        largest = max(reading.factors.values(), key=lambda factor: abs(math.log(factor)))
        reading.wrong.append(
            f"scales {len(reading.factors)} layers by 1, not as {deft_formats.PEFT_KEY} has it: deltas up to "
            f"{largest:.3g} times the right ones"
        )


def _check_shapes(client: Client, file: Outline, names: Known, reading: Reading) -> None:
    """Layers whose matrices do not fit the model, unless most do not: then the model has other widths."""
    groups = {stem: rests for stem, rests in grouped(file.shapes).items() if stem in names}
    groups = {stem: rests for stem, rests in groups.items() if any(key in reading.matched for key in rests.values())}
    fits = {stem: _fits(names[stem], rests, file, client.strict) for stem, rests in groups.items()}
    bad = [stem for stem, fit in fits.items() if fit is False]
    strange = sum(_fits(names[stem], groups[stem], file, strict=False) is False for stem in bad)
    if not bad or 2 * strange > len(fits):
        return
    if client.misfit == "refuses":
        raise Refused(f"{len(bad)} layers do not fit the model's weights: {bad[0]}")
    for stem in bad:
        reading.matched -= set(groups[stem].values())
    reading.remarks.append(f"leaves out {len(bad)} layers that do not fit the model's weights")
