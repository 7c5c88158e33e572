"""From the command line and a TOML file to a `Run`."""

from __future__ import annotations

import argparse
import ast
import functools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

from PIL import ImageColor

from library.options.config_file import LITERALS, arguments_of, given, without_secrets, write_config
from library.options.dataset_config import datasets_of
from library.options.option import Option, asks_for_nothing, number_or_pair, pair
from library.options.rooms import Run
from library.options.table import LORA_MODULES, OPTIONS
from networks.deft_config import DeftError, nearest

logger = logging.getLogger(__name__)

_OFF_AT_0 = ("min_snr_gamma", "v_pred_like_loss", "noise_offset", "adaptive_noise_scale", "multires_noise_iterations",
             "ip_noise_gamma")  # fmt: skip
_NOT_COMPILED = {"fp8_base": "weights in fewer bits are not compiled",
                 "quantize_base": "weights in fewer bits are not compiled",
                 "blocks_to_swap": "blocks that come and go are not compiled"}  # fmt: skip
_NEEDED = ("pretrained_model_name_or_path", "output_dir")
_NUMBERS: dict[str, Callable[[Any], Any]] = {
    "resolution": number_or_pair, "skip_image_resolution": number_or_pair, "face_crop_aug_range": pair,
}  # fmt: skip
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
    overridden = {word[2:].split("=")[0] for word in argv if word.startswith("--")}
    words = [*(arguments_of(config_file, overridden) if config_file else []), *argv]
    found, unknown = parser.parse_known_args(words)
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
    run = _run(values | {"settings": given(values), "arguments": tuple(without_secrets(argv))})
    if values["output_config"]:
        write_config(values)
    return run


@functools.cache
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
    if option.status != "refused" or value is None or value is False:
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


# --- the rooms -------------------------------------------------------------------------------------------------------


def _run(values: dict[str, Any]) -> Run:
    """:raises DeftError: for options that are missing or do not go together"""
    for name in _NEEDED:
        if not values[name]:
            raise DeftError(f"--{name} is needed, on the command line or in --config_file")
    if not (values["train_data_dir"] or values["dataset_config"] or values["train_jsonl"]):
        raise DeftError("--train_data_dir is needed, on the command line or in --config_file")
    if values["in_json"] and values["train_jsonl"] and not values["dataset_config"]:
        raise DeftError("--in_json and --train_jsonl do not go together; name both in --dataset_config")
    values |= {name: values[name] or None for name in _OFF_AT_0}
    for name, read in _NUMBERS.items():
        values[name] = _number(name, values[name] or _BY_NAME[name].default, read)
    values["caption_extension"] = values["caption_extention"] or values["caption_extension"]
    values["cache_text_encoder_outputs"] |= values["cache_text_encoder_outputs_to_disk"]
    if values["network_module"] in LORA_MODULES:
        logger.warning(
            f"--network_module {values['network_module']}: trained as networks.deft; the file is a LoRA as well"
        )
        values["network_module"] = "networks.deft"
    values["optimizer_type"] = _optimizer_type(values)
    if values["cpu_offload_checkpointing"] and not values["gradient_checkpointing"]:
        logger.warning("--cpu_offload_checkpointing: --gradient_checkpointing is on with it")
        values["gradient_checkpointing"] = True
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
    if values["fp8_base"] and values["quantize_base"]:
        raise DeftError("--fp8_base and --quantize_base do not go together: each keeps the denoiser in fewer bits")
    if values["blocks_to_swap"] and not values["gradient_checkpointing"]:
        raise DeftError("--blocks_to_swap needs --gradient_checkpointing: without it, weights have to stay for the "
                        "backward pass")  # fmt: skip
    backend = values["dynamo_backend"]
    if values["compile"] and backend == "no":  # which is --torch_compile's, and in every file of the GUI's
        backend = "inductor"
    compiled = (values["torch_compile"] or values["compile"]) and backend != "no"
    values["torch_compile"] = backend if compiled else None
    for name, why in _NOT_COMPILED.items():
        if compiled and values[name]:
            raise DeftError(f"--torch_compile and --{name} do not go together: {why}")
    if values["cache_text_encoder_outputs"] and not values["network_train_unet_only"]:
        raise DeftError("--cache_text_encoder_outputs: text encoders that are trained give new outputs in every step; "
                        "add --network_train_unet_only, or leave it out")  # fmt: skip
    if values["diff_output_preservation_class"] and not values["trigger_word"]:
        raise DeftError("--diff_output_preservation_class needs --trigger_word, the word that it stands in for")
    if values["adaptive_noise_scale"] is not None and values["noise_offset"] is None:
        raise DeftError("--adaptive_noise_scale needs --noise_offset")
    if values["min_timestep"] > values["max_timestep"]:
        raise DeftError(
            f"--min_timestep={values['min_timestep']}: must not be above --max_timestep, {values['max_timestep']}"
        )
    if values["stop_at_drift"] is not None and values["meter_every_n_steps"] == 0:
        raise DeftError("--stop_at_drift needs the meters, which --meter_every_n_steps 0 turns off")
    if values["dim_from_weights"] and not values["network_weights"]:
        raise DeftError("--dim_from_weights needs --network_weights")
    if len(values["base_weights_multiplier"]) > len(values["base_weights"]):
        logger.warning(
            "--base_weights_multiplier: more strengths than --base_weights has files; the last have no effect"
        )
    strengths = [*values["base_weights_multiplier"], *[1.0] * len(values["base_weights"])]
    values |= {
        "transparent_background": _colour(values["transparent_background"]),
        "datasets": datasets_of(values),
        "train_data_dir": None if values["dataset_config"] or values["in_json"] else values["train_data_dir"],
        "reg_data_dir": None if values["dataset_config"] or values["in_json"] else values["reg_data_dir"],
        "text_encoder_lr": tuple(values["text_encoder_lr"] or ()),
        "base_weights": tuple(zip(values["base_weights"], strengths, strict=False)),
    }
    values["network_args"] = dict(_pairs("network_args", values))
    for name in LITERALS:
        values[name] = _literals(name, values)
    if values["network_dropout"] is not None:
        values["network_args"]["neuron_dropout"] = values["network_dropout"]
    rooms: dict[str, Any] = {name: kind for name, kind in get_type_hints(Run).items() if is_dataclass(kind)}
    return Run(**{name: _room(kind, values) for name, kind in rooms.items()}, recorded=recorded)


def _room(kind: type[Room], values: Mapping[str, Any]) -> Room:
    """A room of the options of its fields' names, with the rooms within it."""
    kinds = get_type_hints(kind)
    found = {one.name: _room(kinds[one.name], values) if is_dataclass(kinds[one.name]) else values[one.name]
             for one in fields(kind)}  # type: ignore[arg-type]  # fmt: skip
    return kind(**found)


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


def _number(name: str, text: str | None, read: Callable[[Any], Any]) -> Any:
    if not text:
        return None
    try:
        return read(text)
    except ValueError as error:
        raise DeftError(f"--{name} {text}: must be {error}") from None
