"""From the command line and a TOML file to a `Run`."""

from __future__ import annotations

import argparse
import ast
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

import toml
from PIL import ImageColor

from library.options.rooms import Run
from library.options.table import OPTIONS, Option, asks_for_nothing
from networks.deft_config import DeftError, nearest, read_text, reason_of

logger = logging.getLogger(__name__)

_OFF_AT_0 = ("min_snr_gamma", "v_pred_like_loss", "noise_offset", "adaptive_noise_scale", "multires_noise_iterations",
             "ip_noise_gamma")  # fmt: skip
_LITERALS = ("optimizer_args", "lr_scheduler_args")  # whose values are Python's
_NEEDED = ("pretrained_model_name_or_path", "train_data_dir", "output_dir")
_BACKSLASH = re.compile(r'"[^"\n]*\\[^"\n]*"')  # in double quotes
_BY_NAME = {option.name: option for option in OPTIONS}

Room = TypeVar("Room")


class _Parser(argparse.ArgumentParser):
    """Raises DeftError instead of printing the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise DeftError(message)


def parse(argv: Sequence[str]) -> Run:
    """Options from `argv` and, behind them, from the TOML file that `--config_file` names.

    :raises DeftError: for an unknown option or key, a wrong value, or a missing one
    """
    parser = build_parser()
    first = parser.parse_known_args(argv)[0]
    config_file = None if first.output_config else first.config_file  # which is written then
    given = [*(_config_arguments(config_file) if config_file else []), *argv]
    found, unknown = parser.parse_known_args(given)
    if unknown:
        named = [word.split("=")[0] for word in unknown if word.startswith("--")] or unknown
        known = [f"--{name}" for name in _BY_NAME]
        raise DeftError(f"unknown option {', '.join(word + nearest(word, known) for word in named)}")
    values = vars(found)
    not_honoured = [f"--{option.name}: {option.help}" for option in OPTIONS if _is_refused(option, values[option.name])]
    if not_honoured:
        raise DeftError(f"{'; '.join(not_honoured)}; leave {'it' if len(not_honoured) == 1 else 'these'} out")
    for option in OPTIONS:
        _check(option, values[option.name])
    run = _run(dict(values))
    if values["output_config"]:
        _write_config(values)
    return run


def build_parser() -> argparse.ArgumentParser:
    """All rows of the table; `--help` lists those that are honoured."""
    parser = _Parser(
        prog="train_network_deft.py",
        description="Trains a DEFT adapter on a folder of pictures and saves it as a LoRA.",
        allow_abbrev=False,
    )
    # argparse takes -1e-05 and -inf for options
    parser._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$|-inf$", re.IGNORECASE)
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(option.group for option in OPTIONS)}
    for option in OPTIONS:
        shown = argparse.SUPPRESS if option.status else option.help
        if not option.status and option.default not in (None, False, ()):
            shown = f"{shown} (default: %(default)s)"
        rest: dict[str, Any] = {"default": option.default, "help": shown}
        if option.kind is bool:
            rest["action"] = "store_true"
        else:
            rest |= {"type": option.kind, "metavar": option.metavar, "nargs": "*" if option.many else None}
            rest |= {"choices": option.choices} if option.choices else {}
        groups[option.group].add_argument(f"--{option.name}", **rest)
    return parser


def _is_refused(option: Option, value: Any) -> bool:
    """Whether something is asked for that is not done here."""
    if option.status not in ("refused", "to come") or value is None or value is False:
        return False
    given = value if option.many else [value]
    return option.kind is bool or not all(asks_for_nothing(option.name, one) for one in given)


def _check(option: Option, value: Any) -> None:
    """:raises DeftError: for a value that is not allowed"""
    if value is None or value is False:
        return
    for one in value if option.many else [value]:
        if option.check is not None and not option.check[0](one):
            raise DeftError(f"--{option.name}={one}: must be {option.check[1]}")


# --- the configuration file ------------------------------------------------------------------------------------------


def _config_arguments(path: str) -> list[str]:
    """The options of a TOML file as command-line arguments, so that they are checked alike."""
    values: dict[str, Any] = {}
    for key, value in _read_toml(path).items():
        is_section = isinstance(value, dict) and key not in _BY_NAME
        for name, one in value.items() if is_section else [(key, value)]:
            if values.get(name, one) != one:
                raise DeftError(f"{path}: {name} is given twice, as {values[name]!r} and as {one!r}")
            values[name] = one
    known = _BY_NAME.keys() - {"config_file"}
    unknown = [key for key in values if key not in known]
    if unknown:
        told = ", ".join(f"'{key}'{nearest(key, known)}" for key in unknown)
        raise DeftError(f"{path}: unknown key{'s' if len(unknown) > 1 else ''} {told}")
    arguments: list[str] = []
    for key, value in values.items():
        option = _BY_NAME[key]
        if isinstance(value, bool):
            if option.kind is not bool:
                raise DeftError(f"{path}: {key} takes a value, not {str(value).lower()}")
            arguments += [f"--{key}"] if value else []
        elif value == "" and option.kind is not bool:
            continue  # as if it were not given
        elif isinstance(value, dict) and option.many:  # network_args = {conv_dim = 4}
            shown = repr if key in _LITERALS else str
            arguments += [f"--{key}", *(f"{name}={shown(one)}" for name, one in value.items())]
        elif isinstance(value, list) and not option.many and key != "resolution":
            raise DeftError(f"{path}: {key} takes one value, not {value}")
        elif isinstance(value, list) and not option.many:  # resolution = [512, 768]
            arguments.append(f"--{key}={','.join(map(str, value))}")
        elif option.many:
            arguments += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
        else:
            arguments.append(f"--{key}={value}")
    return arguments


def _read_toml(path: str) -> dict[str, Any]:
    """:raises DeftError: when it is missing or no TOML, with a hint where a Windows path is the likely reason"""
    if not os.path.isfile(path):
        raise DeftError(f"--config_file: no such file: {path}")
    text = read_text(path, f"--config_file {path}:")
    hint = "; in double quotes, backslashes have to be doubled: write 'C:\\path' in single quotes"
    try:
        content = toml.loads(text)
    except Exception as error:  # of many kinds
        raise DeftError(f"--config_file {path}: {reason_of(error)}{hint if _BACKSLASH.search(text) else ''}") from None
    for key, value in _strings_in(content):
        if (
            key != "training_comment" and any(ord(letter) < 32 for letter in value) and _BACKSLASH.search(text)
        ):  # as \t and \n of "C:\training\new"
            raise DeftError(f"--config_file {path}: {key} = {value!r}{hint}")
    return content


def _strings_in(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(content, str):
        yield key, content
    elif isinstance(content, (dict, list)):
        for name, value in content.items() if isinstance(content, dict) else ((key, value) for value in content):
            yield from _strings_in(value, name)


def _write_config(values: Mapping[str, Any]) -> NoReturn:
    """What differs from the defaults, without secrets, as a file that `_config_arguments` reads.

    :raises SystemExit: when it is written, as sd-scripts ends too
    :raises DeftError: when it is there already, or cannot be written
    """
    path = values["config_file"]
    if not path:
        raise DeftError("--output_config needs --config_file FILE, which is written")
    file = Path(path).with_suffix(".toml")
    if file.exists():
        raise DeftError(f"--output_config: {file} is there already; give another --config_file")
    left_out = ("config_file", "output_config", "wandb_api_key")
    given = {option.name: values[option.name] for option in OPTIONS if values[option.name] != option.default}
    content = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    try:
        file.write_text(toml.dumps({k: v for k, v in content.items() if k not in left_out}), encoding="utf-8")
    except OSError as error:
        raise DeftError(f"--output_config {file}: {reason_of(error)}") from None
    logger.warning(f"written: {file}; train with --config_file {file}")
    raise SystemExit(0)


# --- the rooms -------------------------------------------------------------------------------------------------------


def _run(values: dict[str, Any]) -> Run:
    """:raises DeftError: for options that are missing or do not go together"""
    for name in _NEEDED:
        if not values[name]:
            raise DeftError(f"--{name} is needed, on the command line or in --config_file")
    values |= {name: values[name] or None for name in _OFF_AT_0}
    values["optimizer_type"] = _optimizer_type(values)
    values["text_encoder_lr"] = values["text_encoder_lr"] or None
    recorded = {option.metadata: values[option.name] for option in OPTIONS if option.metadata}
    recorded = {key: value for key, value in recorded.items() if key.startswith("ss_") or value is not None}
    name = values["output_name"]
    if Path(name).name != name or not name.isprintable() or not 0 < len(name.encode()) <= 200:
        raise DeftError(f"--output_name={values['output_name']}: must be a file name without its extension")
    if values["network_train_unet_only"] and values["network_train_text_encoder_only"]:
        raise DeftError("--network_train_unet_only and --network_train_text_encoder_only leave nothing to train")
    for precision in ("full_fp16", "full_bf16"):
        if values[precision] and values["mixed_precision"] != precision[5:]:
            raise DeftError(f"--{precision} needs --mixed_precision {precision[5:]}")
    values["fp8_base"] = values["fp8_base"] or values["fp8_base_unet"]
    if values["fp8_base"] and values["mixed_precision"] == "no":
        raise DeftError("--fp8_base needs --mixed_precision bf16 or fp16")
    if values["cache_text_encoder_outputs"] and not values["network_train_unet_only"]:
        raise DeftError("--cache_text_encoder_outputs: text encoders that are trained give new outputs in every step; "
                        "add --network_train_unet_only, or leave it out")  # fmt: skip
    if values["adaptive_noise_scale"] is not None and values["noise_offset"] is None:
        raise DeftError("--adaptive_noise_scale needs --noise_offset")
    if values["min_timestep"] > values["max_timestep"]:
        raise DeftError(
            f"--min_timestep={values['min_timestep']}: must not be above --max_timestep, {values['max_timestep']}"
        )
    if values["dim_from_weights"] and not values["network_weights"]:
        raise DeftError("--dim_from_weights needs --network_weights")
    if len(values["base_weights_multiplier"]) > len(values["base_weights"]):
        logger.warning(
            "--base_weights_multiplier: more strengths than --base_weights has files; the last have no effect"
        )
    strengths = [*values["base_weights_multiplier"], *[1.0] * len(values["base_weights"])]
    values |= {
        "caption_extension": "." + values["caption_extension"].lstrip("."),
        "transparent_background": _colour(values["transparent_background"]),
        "resolution": _resolution(values["resolution"]),
        "text_encoder_lr": tuple(values["text_encoder_lr"] or ()),
        "base_weights": tuple(zip(values["base_weights"], strengths, strict=False)),
    }
    values["network_args"] = dict(_pairs("network_args", values))
    for name in _LITERALS:
        values[name] = _literals(name, values)
    if values["network_dropout"] is not None:
        values["network_args"]["neuron_dropout"] = values["network_dropout"]
    rooms: dict[str, Any] = {name: kind for name, kind in get_type_hints(Run).items() if is_dataclass(kind)}
    return Run(**{name: _room(kind, values) for name, kind in rooms.items()}, recorded=recorded)


def _room(kind: type[Room], values: Mapping[str, Any]) -> Room:
    return kind(**{field.name: values[field.name] for field in fields(kind)})  # type: ignore[arg-type]


def _optimizer_type(values: Mapping[str, Any]) -> str:
    """What --optimizer_type or an older switch names."""
    switches = {"use_8bit_adam": "AdamW8bit", "use_lion_optimizer": "Lion"}
    given = {f"--{name}": meant for name, meant in switches.items() if values[name]}
    if values["optimizer_type"]:
        given["--optimizer_type"] = values["optimizer_type"]
    if len(given) > 1:
        raise DeftError(f"{' and '.join(given)} name different optimizers; give one of them")
    return next(iter(given.values()), "AdamW")


def _pairs(name: str, values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """:raises DeftError: for an argument that is not KEY=VALUE"""
    for argument in values[name]:
        if "=" not in argument:
            raise DeftError(f"--{name} {argument}: must be KEY=VALUE")
    return [(key.strip(), value) for key, value in (argument.split("=", 1) for argument in values[name])]


def _literals(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a class, each a Python literal.

    :raises DeftError: for what is none, or is given twice
    """
    found: dict[str, Any] = {}
    for key, text in _pairs(name, values):
        if key in found:
            raise DeftError(f"--{name} {key} is given twice")
        try:
            found[key] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            capitals = {"true": "True", "false": "False", "none": "None"}.get(text.strip().lower())
            hint = f"write {capitals}" if capitals else f"quote a text: \"{key}='{text}'\""
            raise DeftError(
                f"--{name} {key}={text}: must be a Python value, as 0.9, True or 0.9,0.99; {hint}"
            ) from None
    return found


def _colour(text: str) -> tuple[int, ...]:
    try:
        return ImageColor.getrgb(text)[:3]
    except ValueError:
        raise DeftError(f"--transparent_background {text}: must be a colour's name or #RRGGBB") from None


def _resolution(text: str) -> tuple[int, int]:
    """(width, height) from `512` or `512,768`."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise DeftError(f"--resolution {text}: must be one number or WIDTH,HEIGHT")
    return numbers[0], numbers[-1]
