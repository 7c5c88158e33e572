"""Data sets from the command line or from --dataset_config, with sd-scripts' names and precedence."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from library.options.combinations import settled
from library.options.dataset_file import OPTION_OF_KEY, read_dataset_config
from library.options.rooms import AugmentOptions, BucketOptions, CaptionOptions, DatasetOptions, SubsetOptions

Room = TypeVar("Room")
Level = Mapping[str, Any]


def repeats_and_name(folder: str) -> tuple[int, str] | None:
    """Of a folder named `REPEATS_NAME`."""
    match = re.fullmatch(r"(\d+)_(.*)", folder, re.DOTALL)
    return (int(match[1]), match[2].strip()) if match else None


def named_folders(folder: str) -> list[tuple[str, int, str]]:
    """Folders named `REPEATS_NAME` in the order of their names: path, repeats of at least 1, and the name.

    An empty list where `folder` is none.
    """
    if not os.path.isdir(folder):
        return []
    found = []
    for path in sorted(Path(folder).iterdir()):
        named = repeats_and_name(path.name)
        if named and path.is_dir() and named[0] > 0:
            found.append((str(path), *named))
    return found


def datasets_of(values: Mapping[str, Any]) -> tuple[DatasetOptions, ...]:
    """The data sets that a command line asks for.

    :param values: the command line's, by the options' names; sizes and ranges are pairs of numbers
    :raises DeftError: for a --dataset_config that cannot be read, and for what does not go together
    """
    general, datasets = _levels(values)
    command_line = {**values, **{key: values[option] for key, option in OPTION_OF_KEY.items()}}
    for name in ("conditioning_data_dir", "train_jsonl", "image_path"):  # said of each subset
        del command_line[name]
    return settled([_dataset(dataset, general, command_line) for dataset in datasets], values)


def _levels(values: Mapping[str, Any]) -> tuple[Level, Sequence[Level]]:
    """What stands for all data sets, and each of them."""
    if values["dataset_config"]:
        return read_dataset_config(values["dataset_config"], values["masked_loss"])
    if values["in_json"]:
        return {}, [{"subsets": [{"image_dir": values["train_data_dir"], "metadata_file": values["in_json"]}]}]
    rows = {name: values[name] for name in ("train_jsonl", "image_path")}
    kinds = (
        (values["train_data_dir"], {"conditioning_data_dir": values["conditioning_data_dir"]}),
        (values["reg_data_dir"], {"is_reg": True}),
    )
    subsets = [
        {"image_dir": folder, "num_repeats": repeats, "class_tokens": name, **kind}
        for parent, kind in kinds
        for folder, repeats, name in named_folders(parent or "")
    ]
    return {}, [{"subsets": [*subsets, *([rows] if rows["train_jsonl"] else [])]}]


def _dataset(dataset: Level, *above: Level) -> DatasetOptions:
    levels = (dataset, *above)
    return _room(
        DatasetOptions,
        levels,
        subsets=tuple(_subset(subset, *levels) for subset in dataset["subsets"]),
        buckets=_room(BucketOptions, levels),
    )


def _subset(*levels: Level) -> SubsetOptions:
    own = levels[0]
    captions, augment = _room(CaptionOptions, levels), _room(AugmentOptions, levels)
    return _room(SubsetOptions, levels, image_dir=own.get("image_dir"), captions=captions, augment=augment)


def _room(kind: type[Room], levels: Sequence[Level], **given: Any) -> Room:
    """A room of the values of the first level that has them; an empty text asks for nothing."""
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name in given:
            continue
        value = next((level[field.name] for level in levels if level.get(field.name) is not None), None)
        if value not in (None, ""):
            given[field.name] = value
    return kind(**given)
