"""The file that --dataset_config names: `[general]`, `[[datasets]]` and `[[datasets.subsets]]`, every key checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from library.options.files import read_config
from library.options.option import Check, Option, number_or_pair, pair
from library.options.rooms import PRESERVED
from library.options.table import OPTIONS
from networks.deft_config import DeftError, nearest

OPTION_OF_KEY = {"batch_size": "train_batch_size", "num_repeats": "dataset_repeats"}  # where the names differ
_OPTIONS = {option.name: option for option in OPTIONS}
_KEY_OF_OPTION = {
    **{option: f"{key} here" for key, option in OPTION_OF_KEY.items()},
    "caption_extention": "caption_extension here",
    "in_json": "metadata_file of [[datasets.subsets]]",
    "train_data_dir": "image_dir of [[datasets.subsets]], a folder of pictures",
    "reg_data_dir": "image_dir of [[datasets.subsets]] with is_reg = true",
}
GENERAL, DATASET, SUBSET = "[general]", "[[datasets]]", "[[datasets.subsets]]"
ANYWHERE, ABOVE, BELOW = (GENERAL, DATASET, SUBSET), (GENERAL, DATASET), (SUBSET,)


@dataclass(frozen=True)
class Key:
    """What a key of the file takes.

    :param read: makes its value of what stands in the file, or raises ValueError, which says what it must be
    :param places: where it may stand
    :param folders_only: whether it means nothing where captions come from a metadata file or instructions
    """

    read: Callable[[Any], Any]
    places: tuple[str, ...]
    check: Check | None = None
    folders_only: bool = False


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("a whole number")
    return value


def _number(value: Any) -> float:
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value * 0 != 0:  # of inf and nan
            raise ValueError
        return float(value)
    except (ValueError, OverflowError):
        raise ValueError("a number") from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a text in quotes")
    return value


def _path(value: Any) -> str:
    if not _text(value).strip() or "\0" in value:
        raise ValueError("a path")
    return value


def _attributes(value: Any) -> dict[str, Any]:
    """Whatever a user notes of pictures; one name means something here, as in sd-scripts."""
    if not isinstance(value, dict):
        raise ValueError("a table, as { name = 1 }")
    for name, one in value.items():
        if name != PRESERVED and (like := nearest(name, [PRESERVED])):
            raise ValueError(f"another name than {name}{like}")
        if name == PRESERVED and not isinstance(one, bool):
            raise ValueError(f"{PRESERVED} = true or false")
    return value


def _like_option(places: tuple[str, ...], *names: str, folders_only: bool = False) -> dict[str, Key]:
    """Keys that take what their options do on the command line."""
    kinds: dict[Any, Callable[[Any], Any]] = {bool: _switch, int: _whole, float: _number, str: _text}
    keys = {}
    for name in names:
        option = _OPTIONS[OPTION_OF_KEY.get(name, name)]
        keys[name] = Key(kinds[option.kind], places, _check_of(option), folders_only)
    return keys


def _check_of(option: Option) -> Check | None:
    if option.choices:
        return (lambda value: value in option.choices, f"one of {', '.join(map(str, option.choices))}")
    return option.check


KEYS = {
    **_like_option(
        ANYWHERE, "color_aug", "flip_aug", "random_crop", "shuffle_caption", "keep_tokens", "keep_tokens_separator",
        "secondary_separator", "caption_separator", "enable_wildcard", "token_warmup_min", "token_warmup_step",
        "caption_prefix", "caption_suffix", "resize_interpolation", "caption_dropout_every_n_epochs",
        "caption_dropout_rate", "caption_tag_dropout_rate", "condition_dropout_prob",
    ),
    "face_crop_aug_range": Key(pair, ANYWHERE),
    "num_repeats": Key(_whole, ANYWHERE),  # below 1, the subset is left out
    "custom_attributes": Key(_attributes, ANYWHERE),
    "class_tokens": Key(_text, ANYWHERE, None, True),
    **_like_option(ANYWHERE, "caption_extension", folders_only=True),
    "cache_info": Key(_switch, ANYWHERE, None, True),
    **_like_option(
        ABOVE, "batch_size", "enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps",
        "bucket_no_upscale", "validation_split", "validation_seed",
    ),
    "resolution": Key(number_or_pair, ABOVE),
    "skip_image_resolution": Key(number_or_pair, ABOVE),
    "network_multiplier": Key(_number, ABOVE, (lambda value: value != 0, "other than 0, with which nothing is learnt")),
    "train_inpainting": Key(_switch, ABOVE, (lambda value: not value, "false: inpainting models are not trained here")),
    "image_dir": Key(_path, BELOW),
    "metadata_file": Key(_path, BELOW),
    "train_jsonl": Key(_path, BELOW),
    "image_path": Key(_path, BELOW),
    "alpha_mask": Key(_switch, BELOW),
    "is_reg": Key(_switch, BELOW, None, True),
    "conditioning_data_dir": Key(_path, BELOW, None, True),
}  # fmt: skip


def read_dataset_config(path: str, masked_loss: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The values of `[general]`, and of each of `[[datasets]]`, whose `subsets` are a list of such.

    :param masked_loss: whether masks, and so `conditioning_data_dir`, are used
    :raises DeftError: with everything that is wrong in the file
    """
    if not path.lower().endswith((".toml", ".json")):
        raise DeftError(f"--dataset_config {path}: must be a .toml or .json file")
    content = read_config(path, "--dataset_config")
    problems = list(_strangers(content))
    general = _values(content.get("general", {}), GENERAL, GENERAL, problems)
    datasets = []
    if not isinstance(content.get("datasets", []), list):
        problems.append("datasets must be a list: write [[datasets]], in double brackets")
    elif not content.get("datasets"):
        problems.append("has no data set: write [[datasets]] and [[datasets.subsets]]")
    else:
        for number, dataset in enumerate(content["datasets"], 1):
            datasets.append(_dataset(dataset, f"{DATASET} {number}", masked_loss, problems))
    if problems:
        raise DeftError(f"--dataset_config {path}: {'; '.join(problems)}")
    return general, datasets


def _strangers(content: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the keys outside of all sections."""
    for name in content:
        if name in ("general", "datasets"):
            continue
        if name in KEYS:
            yield f"'{name}' belongs into {_places(KEYS[name])}"
        elif name == "subsets":
            yield "'subsets' belong to a data set: write [[datasets]] and [[datasets.subsets]]"
        else:
            yield _unknown(name, {"general", "datasets"}, "key or section")


def _dataset(dataset: Any, where: str, masked_loss: bool, problems: list[str]) -> dict[str, Any]:
    subsets = dataset.get("subsets", []) if isinstance(dataset, dict) else []
    own = {key: value for key, value in dataset.items() if key != "subsets"} if isinstance(dataset, dict) else dataset
    values = _values(own, DATASET, where, problems)
    if not isinstance(subsets, list):
        problems.append(f"{where}: subsets must be a list: write [[datasets.subsets]], in double brackets")
        subsets = [{}]
    elif not subsets:
        problems.append(f"{where}: has no subsets: write [[datasets.subsets]] with an image_dir")
    found = [_values(subset, SUBSET, f"{where}, subset {i}", problems) for i, subset in enumerate(subsets, 1)]
    values["subsets"] = found
    of_metadata = ["metadata_file" in subset for subset in subsets if isinstance(subset, dict)]
    if any(of_metadata) and not all(of_metadata):
        problems.append(f"{where}: some subsets have a metadata_file and some have none; make two data sets of them")
    for i, subset in enumerate([values, *found]):
        place = f"{where}, subset {i}" if i else where
        if any(of_metadata):
            for name in sorted(key for key in subset if key in KEYS and KEYS[key].folders_only):
                problems.append(f"{place}: {name} means nothing with a metadata_file; leave it out")
        elif i and isinstance(subsets[i - 1], dict):
            problems += (f"{place}: {problem}" for problem in _of_its_kind(subsets[i - 1]))
        if "conditioning_data_dir" in subset and not masked_loss:
            problems.append(
                f"{place}: conditioning_data_dir holds masks with --masked_loss; ControlNets are not trained here"
            )
    return values


def _of_its_kind(subset: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with where a subset's pictures are, which no metadata file says."""
    if "train_jsonl" in subset:
        if "image_dir" in subset:
            yield "train_jsonl names its pictures itself; leave image_dir out, or give it as image_path"
        for name in sorted(key for key in subset if key in KEYS and KEYS[key].folders_only):
            yield f"{name} means nothing with a train_jsonl; leave it out"
    elif "image_path" in subset:
        yield "image_path is what paths in a train_jsonl are relative to; folders of pictures are an image_dir"
    elif "image_dir" not in subset:
        yield "needs an image_dir, a folder of pictures, or a metadata_file or train_jsonl"


def _values(section: Any, kind: str, where: str, problems: list[str]) -> dict[str, Any]:
    """The section's values as the rooms take them; what is wrong with it goes to the problems."""
    if not isinstance(section, dict):
        problems.append(f"{where}: must be a table of keys and values, not {section!r:.40}")
        return {}
    found = {}
    for name, value in section.items():
        key = KEYS.get(name)
        if key is None:
            allowed = [other for other, known in KEYS.items() if kind in known.places]
            allowed += ["subsets"] if kind == DATASET else []
            problems.append(f"{where}: {_unknown(name, allowed, 'key')}")
        elif kind not in key.places:
            problems.append(f"{where}: '{name}' belongs into {_places(key)}")
        else:
            try:
                found[name] = key.read(value)
                if key.check is not None and not key.check[0](found[name]):
                    raise ValueError(key.check[1])
            except ValueError as error:
                problems.append(f"{where}: {name} = {value!r:.60}: must be {error}")
    return found


def _places(key: Key) -> str:
    return " or ".join(key.places)


def _unknown(name: str, allowed: Any, what: str) -> str:
    """A key that no section has, with the likeliest one, or where its option is given."""
    if name in _KEY_OF_OPTION:
        return f"'{name}' is {_KEY_OF_OPTION[name]}"
    if name in _OPTIONS:
        return f"'{name}' is an option of the command line or of --config_file"
    return f"unknown {what} '{name}'{nearest(name, allowed) or nearest(name, KEYS)}"
