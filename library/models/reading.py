"""What the families share in reading models: headers, folders, tokenizers; no hub is asked and no pickle is read."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import CLIPTokenizer, PreTrainedTokenizerBase

from networks.deft_config import DeftError, read_text, reason_of

CONFIGS = Path(__file__).parent / "configs"
CLIP_L = "openai/clip-vit-large-patch14"
NEEDS_SENTENCEPIECE = "a tokenizer of spiece.model, without tokenizer.json, needs: pip install sentencepiece"


def shapes_of(file: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a file's tensors, from its header.

    :raises DeftError: when it is cut off or no safetensors file
    """
    try:
        with safe_open(str(file), "pt") as opened:
            return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}
    except (SafetensorError, OSError) as error:
        raise DeftError(f"{file}: not a whole safetensors file ({reason_of(error)})") from None


# the option that takes a file of one part or of none -> what that is, and by which name of a tensor it is known
_PARTS = {
    "clip_l": ("a CLIP text encoder", re.compile(r"(text_model\.)?encoder\.layers\.0\.mlp\.fc1\.weight")),
    "t5xxl": ("a T5 text encoder", re.compile(r"encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight")),
    "ae": ("a VAE", re.compile(r"decoder\.conv_in\.weight")),
    "pretrained_model_name_or_path": (
        "FLUX.1's transformer",
        re.compile(r"(model\.diffusion_model\.)?double_blocks\.0\.img_attn\.qkv\.weight"),
    ),
    "network_weights": (
        "an adapter (LoRA or the like)",
        re.compile(r".*\.(lora_(up|down|A|B)\.|lora\.(up|down)\.|hada_w|lokr_w|oft_|boft_|deft_E0|dora_scale).*"),
    ),
}


def other_than(option: str, names: Iterable[str]) -> str | None:
    """What a file is that is given by the wrong option, and by which it is to be given; None where it may be right.

    :param names: of its tensors
    """
    found = {right: what for name in names for right, (what, known) in _PARTS.items() if known.fullmatch(name)}
    if not found or option in found:
        return None
    right, what = next(iter(found.items()))
    return f"this is {what}, which is given by --{right}"


def of_folder(folder: Path) -> dict[str, Any]:
    """Options for a pipeline's `from_pretrained`: no hub and no pickles, none of the parts that only look at finished
    pictures, and the variant (such as fp16) where a part is there in no other."""
    index = index_of(folder)
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
    options |= dict.fromkeys(index.keys() & {"safety_checker", "feature_extractor", "image_encoder"})
    variants = [found for part in index if (found := variant_of(folder / part))]
    return options | ({"variant": variants[0]} if variants else {})


def variant_of(part: Path) -> str | None:
    """Such as fp16, where a part's folder has its weights in no other."""
    names = [path.name.removesuffix(".safetensors") for path in part.glob("*model*.safetensors")]
    if names and all("." in name for name in names):  # diffusion_pytorch_model.fp16-00001-of-00002
        return names[0].split(".")[1].split("-0")[0]
    return None


def part_of_folder(kind: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """A part of a Diffusers folder, whole.

    :param kind: diffusers' or transformers' class
    :raises DeftError: for weights that are missing
    """
    model, found = kind.from_pretrained(
        str(folder),
        dtype=dtype,
        variant=variant_of(folder),
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    without_value = {name for name, weight in model.named_parameters() if weight.is_meta}  # a shard that lacks it
    return whole(model, folder, without_value | set(found["missing_keys"]))


def blank(kind: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    """A part without values, on the meta device.

    :param kind: diffusers' or transformers' class
    :param config: its folder, or what is in it
    """
    with torch.device("meta"), _no_values():
        if hasattr(kind, "load_config"):  # diffusers'
            model = kind.from_config(kind.load_config(str(config)) if isinstance(config, Path) else config)
        else:
            model = kind(kind.config_class.from_pretrained(str(config)))
    return model.to(dtype)


@contextlib.contextmanager
def _no_values() -> Iterator[None]:
    """Weights are not drawn, which takes its time on the meta device too."""
    with contextlib.ExitStack() as stack:
        for name in ("uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_", "constant_"):
            stack.enter_context(mock.patch.object(nn.init, name, lambda tensor, *_, **__: tensor))
        yield


def blank_parts(folder: Path, dtype: torch.dtype) -> dict[str, nn.Module]:
    """All parts with weights of a Diffusers folder or of one of `CONFIGS`, see `blank`; the VAE in float32."""
    libraries = {"diffusers": diffusers, "transformers": transformers}
    listed = {name: entry for name, entry in index_of(folder).items() if isinstance(entry, list)}
    kinds = {
        name: getattr(libraries.get(entry[0]), str(entry[1]), None)
        for name, entry in listed.items()
        if (folder / name / "config.json").is_file()
    }
    return {
        name: blank(kind, folder / name, torch.float32 if name == "vae" else dtype)
        for name, kind in kinds.items()
        if isinstance(kind, type) and issubclass(kind, nn.Module) and name != "safety_checker"
    }


def whole(model: nn.Module, source: Path, missing: Iterable[str]) -> nn.Module:
    """:raises DeftError: for weights that are missing, which the libraries leave without a value, or draw at random"""
    names = sorted(missing)
    if names:
        raise DeftError(f"{source}: {len(names)} weights of a {type(model).__name__} are missing, {names[0]} for one")
    return model


def index_of(folder: Path) -> dict[str, Any]:
    """A Diffusers folder's list of parts.

    :raises DeftError: when it cannot be read
    """
    try:
        index = json.loads(read_text(folder / "model_index.json", f"{folder / 'model_index.json'}:"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DeftError(f"{folder / 'model_index.json'}: no JSON ({reason_of(error)})") from None
    return index if isinstance(index, dict) else {}


def check_whole(location: Path, pipeline: DiffusionPipeline, parts: Mapping[str, str]) -> None:
    """:param parts: of the pipeline -> what older files write before the names of its weights, or nothing
    :raises DeftError: when a weight is missing, which the libraries leave without a value, or draw at random
    """
    for name, prefix in parts.items():
        expected = dict(getattr(pipeline, name).named_parameters())
        missing = [key for key, weight in expected.items() if weight.is_meta]
        if location.is_dir() and prefix:  # a VAE's attention has other names in older files
            files = (location / name).glob("*.safetensors")
            held = {key.removeprefix(prefix) for file in files for key in shapes_of(file)}
            missing += [key for key in expected if key.removeprefix(prefix) not in held]
        if missing:
            raise DeftError(f"{location}: {len(missing)} weights of its {name} are missing, {missing[0]} for one")


def find_tokenizer(
    tokenizer: str | None, cache_dir: str | None, name: str = CLIP_L, kind: Any = CLIPTokenizer, subfolder: str = ""
) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder, sd-scripts' cache folder or the local hub cache, in this order.

    :param tokenizer: the folder, where there is one
    :param cache_dir: sd-scripts' layout, `openai_clip-vit-large-patch14/` inside
    :param name: the hub's
    :param kind: transformers' class
    :param subfolder: of the hub's
    :raises DeftError: naming the three places
    """
    if tokenizer:
        return tokenizer_from(tokenizer, kind)
    cached = Path(cache_dir or "", name.replace("/", "_"))
    if cache_dir and cached.is_dir():
        return tokenizer_from(str(cached), kind)
    try:
        return tokenizer_from(name, kind, subfolder)
    except DeftError as error:
        if NEEDS_SENTENCEPIECE in str(error):
            raise
        own = "--tokenizer FOLDER, or " if kind is CLIPTokenizer else ""
        raise DeftError(
            f"a single-file checkpoint holds no tokenizer: give {own}--tokenizer_cache_dir FOLDER "
            f"with {cached.name}/ in it, or put {name} into the local hub cache"
        ) from None


def tokenizer_from(folder: str, kind: Any = CLIPTokenizer, subfolder: str = "") -> PreTrainedTokenizerBase:
    """:raises DeftError: when there is none"""
    try:
        tokenizer = kind.from_pretrained(folder, subfolder=subfolder, local_files_only=True)
    except Exception as error:  # of many kinds, by transformers' version
        reason = reason_of(error)
        if any(word in reason.lower() for word in ("sentencepiece", "tiktoken")):
            raise DeftError(f"{folder}: {NEEDS_SENTENCEPIECE}") from None
        raise DeftError(f"{folder}: no tokenizer there ({reason})") from None
    check_tokenizer(tokenizer, folder)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, source: str | Path) -> None:
    """transformers 5 makes an empty tokenizer, which knows no letter, where it finds no files."""
    if len(tokenizer) < 256:
        raise DeftError(f"{source}: no tokenizer there (vocab.json and merges.txt, or tokenizer.json)")
