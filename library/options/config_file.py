"""The file that --config_file names and --output_config writes: options as TOML keys, in any sections."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NoReturn

from library.options import kohya_gui
from library.options.files import read_config
from library.options.option import Option
from library.options.table import OPTIONS
from networks.deft_config import DeftError, nearest, reason_of

logger = logging.getLogger(__name__)

LITERALS = ("optimizer_args", "lr_scheduler_args")  # whose values are Python's
_LISTS = ("resolution", "skip_image_resolution", "face_crop_aug_range")  # of numbers, with commas on the command line
_NOT_IN_FILES = ("config_file", "output_config")
_SECRETS = ("wandb_api_key", "huggingface_token")
_BY_NAME = {option.name: option for option in OPTIONS if option.name not in _NOT_IN_FILES}


def arguments_of(path: str, overridden: Set[str] = frozenset()) -> list[str]:
    """The options of a file as command-line arguments, so that they are checked alike.

    :param overridden: options that the command line gives, whatever the file says
    :raises DeftError: for a file that cannot be read, and for all of its keys and values that are wrong
    """
    path = path if path.endswith(".toml") or os.path.isfile(path) else f"{path}.toml"
    values: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in _flat(read_config(path, "--config_file")):
        if key in values and values[key] != value:
            problems.append(f"{key} is given twice, as {values[key]!r:.60} and as {value!r:.60}")
        values[key] = value
    problems += kohya_gui.refusals(values)
    arguments: list[str] = []
    for key, value in values.items():
        if key in overridden:
            continue
        if key in _BY_NAME:
            try:
                arguments += _arguments(_BY_NAME[key], value)
            except ValueError as error:
                problems.append(f"{key} {error}")
    problems += _strangers([key for key in values if key not in _BY_NAME.keys() | kohya_gui.KEYS | overridden])
    if problems:
        raise DeftError(f"--config_file {path}: {'; '.join(problems)}")
    for line in kohya_gui.remarks(values):
        logger.warning(f"{path}: {line}")
    return arguments


def _flat(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values of all sections, which sd-scripts does not tell apart."""
    for key, value in content.items():
        if isinstance(value, dict) and key not in _BY_NAME:
            yield from value.items()
        else:
            yield key, value


def _strangers(keys: Sequence[str]) -> Iterator[str]:
    """Keys that are no options, each with where it belongs or the likeliest one."""
    unknown = []
    for key in keys:
        if key in _NOT_IN_FILES:
            yield f"'{key}' belongs on the command line"
        elif key in ("general", "datasets", "subsets"):
            yield f"'{key}' belongs into a file of its own, which dataset_config names"
        else:
            unknown.append(f"'{key}'{nearest(key, _BY_NAME)}")
    if unknown:
        yield f"unknown key{'s' * (len(unknown) > 1)} {', '.join(unknown)}"


def _arguments(option: Option, value: Any) -> list[str]:
    """An option's value as it is written on the command line.

    :raises ValueError: which says what it must be
    """
    name = f"--{option.name}"
    if option.kind is bool:
        if value not in (True, False):  # 1 and 0 too, as the GUI writes them
            raise ValueError(f"= {value!r:.60}: must be true or false")
        return [name] if value else []
    if isinstance(value, bool):
        raise ValueError(f"takes a value, not {str(value).lower()}")
    if value == "":
        return []  # as if it were not given
    if option.many:
        if isinstance(value, dict):  # network_args = {conv_dim = 4}
            shown = repr if option.name in LITERALS else str
            return [name, *(f"{key}={shown(one)}" for key, one in value.items())]
        return [name, *map(str, value if isinstance(value, list) else [value])]
    if isinstance(value, list) and option.name in _LISTS:  # resolution = [512, 768]
        return [f"{name}={','.join(map(str, value))}"]
    if isinstance(value, (list, dict)):
        raise ValueError(f"takes one value, not {value!r:.60}")
    if option.kind is int and isinstance(value, float) and value.is_integer():  # 10.0
        value = int(value)
    return [f"{name}={value}"]


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """What differs from the defaults, without secrets."""
    return {name: values[name] for name, option in _BY_NAME.items()
            if values[name] != option.default and name not in _SECRETS}  # fmt: skip


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """A command line's, with *** for each secret."""
    shown, hidden = [], False
    for word in arguments:
        name, equals, _ = word.partition("=")
        is_secret = name.removeprefix("--") in _SECRETS
        shown.append("***" if hidden else f"{name}=***" if is_secret and equals else word)
        hidden = is_secret and not equals
    return shown


def write_config(values: Mapping[str, Any]) -> NoReturn:
    """What differs from the defaults, without secrets, as a file that `arguments_of` reads.

    :raises SystemExit: when it is written, as sd-scripts ends too
    :raises DeftError: when it is there already, or cannot be written
    """
    from networks.deft_io import write_whole  # loads torch, which takes seconds; other options are read without

    path = values["config_file"]
    if not path:
        raise DeftError("--output_config needs --config_file FILE, which is written")
    file = Path(path if path.endswith(".toml") else f"{path}.toml")
    if file.exists():
        raise DeftError(f"--output_config: {file} is there already; give another --config_file")
    lines = [f"{name} = {_toml(value)}\n" for name, value in given(values).items()]
    try:
        write_whole(file, "".join(lines).encode())
    except ValueError as error:  # a name that no file has
        raise DeftError(f"--output_config {file}: {reason_of(error)}") from None
    logger.warning(f"written: {file}; train with --config_file {file}")
    raise SystemExit(0)


def _toml(value: Any) -> str:
    """A switch, number or text, or a list of such; JSON's texts are TOML's."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str) and set(value) == {'"'}:
        return f"'{value}'"  # of which the toml package would read nothing between double ones
    if isinstance(value, (bool, str)):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)
