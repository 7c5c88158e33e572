"""The trainer's options: sd-scripts' names, from the command line and from a TOML file."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import toml
from PIL import ImageColor

from networks.deft_config import DeftError, nearest, read_text, reason_of

_AT_LEAST_ONE = (
    "train_batch_size",
    "max_train_steps",
    "max_train_epochs",
    "gradient_accumulation_steps",
    "max_nan_steps",
    "save_every_n_epochs",
    "save_every_n_steps",
    "sample_every_n_epochs",
    "sample_every_n_steps",
)
_AT_LEAST_ZERO = (
    "learning_rate",
    "unet_lr",
    "text_encoder_lr",
    "lr_warmup_steps",
    "max_grad_norm",
    "min_snr_gamma",
    "scale_weight_norms",
)
_BACKSLASH = re.compile(r'"[^"\n]*\\[^"\n]*"')  # in double quotes
LR_SCHEDULERS = ("constant", "constant_with_warmup", "cosine", "linear")


class _Parser(argparse.ArgumentParser):
    """Raises DeftError instead of printing the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise DeftError(message)


def parse(argv: list[str]) -> argparse.Namespace:
    """Options from `argv` and, behind them, from the TOML file that `--config_file` names.

    :raises DeftError: for an unknown option or key, a wrong value, or a missing one
    """
    parser = build_parser()
    # argparse takes -1e-05 and -inf for options
    parser._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$|-inf$", re.IGNORECASE)
    config_file = parser.parse_known_args(argv)[0].config_file
    from_file = _config_arguments(config_file, parser) if config_file else []
    args, unknown = parser.parse_known_args([*from_file, *argv])
    if unknown:
        names = [s for action in parser._actions for s in action.option_strings]
        given = [word.split("=")[0] for word in unknown if word.startswith("--")] or unknown
        raise DeftError(f"unknown option {', '.join(word + nearest(word, names) for word in given)}")
    _check(args)
    return args


def build_parser() -> argparse.ArgumentParser:
    """All options with their defaults and help."""
    parser = _Parser(prog="train_network_deft.py", description=__doc__, allow_abbrev=False)

    def group(title: str) -> Any:
        return parser.add_argument_group(title).add_argument

    add = group("model")
    add("--pretrained_model_name_or_path", metavar="PATH", help="a Diffusers folder or a .safetensors checkpoint")
    add("--tokenizer", metavar="DIR", help="folder with the CLIP tokenizer, for single-file checkpoints")
    add("--tokenizer_cache_dir", metavar="DIR", help="folder that holds openai_clip-vit-large-patch14/")
    add("--xformers", action="store_true", help="memory-efficient attention by xformers, where it is installed")

    add = group("data")
    add("--train_data_dir", metavar="DIR", help="folder of folders named REPEATS_NAME, e.g. 10_sks cat")
    add("--caption_extension", default=".txt", help="captions beside the images (default: %(default)s)")
    add(
        "--transparent_background",
        default="white",
        metavar="COLOUR",
        help="behind transparent pictures, a name or #RRGGBB (default: %(default)s)",
    )
    add("--resolution", default="512", help="WIDTH,HEIGHT or one number for both (default: %(default)s)")
    add("--train_batch_size", type=int, default=1, help="images a step and device (default: %(default)s)")

    add = group("network")
    add("--network_module", choices=("networks.deft",), default="networks.deft", help="(default: %(default)s)")
    add("--network_dim", type=int, help="rank (default: 4)")
    add("--network_alpha", type=float, default=1.0, help="scale is alpha / dim (default: %(default)s)")
    add("--network_args", nargs="*", default=[], metavar="KEY=VALUE", help="see docs/options.md")
    add("--network_dropout", type=float, help="probability of dropping each of the rank's values")
    add("--network_weights", metavar="FILE", help="LoRA or DEFT file to start from")
    add("--dim_from_weights", action="store_true", help="take ranks and options from --network_weights")
    add("--network_train_unet_only", action="store_true", help="leave the text encoder alone")
    add("--network_train_text_encoder_only", action="store_true", help="leave the U-Net alone")
    add("--base_weights", nargs="*", default=[], metavar="FILE", help="adapter files to merge into the model first")
    add("--base_weights_multiplier", nargs="*", type=float, default=[], help="their strengths (default: 1 each)")
    add("--scale_weight_norms", type=float, help="largest norm of a layer's delta")

    add = group("training")
    add("--learning_rate", type=float, default=1e-4, help="(default: %(default)s)")
    add("--unet_lr", type=float, help="the U-Net's own rate")
    add("--text_encoder_lr", type=float, help="the text encoder's own rate")
    add("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="(default: %(default)s)")
    add("--lr_warmup_steps", type=int, default=0, help="(default: %(default)s)")
    add("--max_train_steps", type=int, default=1600, help="(default: %(default)s)")
    add("--max_train_epochs", type=int, help="overrides --max_train_steps")
    add("--gradient_accumulation_steps", type=int, default=1, help="(default: %(default)s)")
    add("--gradient_checkpointing", action="store_true", help="less memory, a third more time")
    add("--max_grad_norm", type=float, default=1.0, help="gradient clipping, 0 is off (default: %(default)s)")
    add("--min_snr_gamma", type=float, help="weight timesteps by min(SNR, this) / SNR; 5 is usual, 0 is off")
    add("--max_nan_steps", type=int, default=10, help="stop after this many non-finite losses in a row")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), default="no", help="(default: %(default)s)")
    add("--seed", type=int, help="of everything random (default: a new one each run)")

    add = group("saving")
    add("--output_dir", metavar="DIR", help="where everything is written")
    add("--output_name", default="last", help="name of the adapter file (default: %(default)s)")
    add("--save_precision", choices=("float", "fp16", "bf16"), default="fp16", help="(default: %(default)s)")
    add("--save_every_n_epochs", type=int)
    add("--save_every_n_steps", type=int)
    add("--no_metadata", action="store_true", help="keep the training's settings out of the file")
    add("--training_comment", help="goes into the file's metadata")
    add("--logging_dir", metavar="DIR", help="TensorBoard logs")

    add = group("sample images")
    add("--sample_prompts", metavar="FILE", help="a prompt a line, with --n --w --h --d --l --s as in sd-scripts")
    add("--sample_every_n_steps", type=int)
    add("--sample_every_n_epochs", type=int)
    add("--sample_at_first", action="store_true", help="also before the first step")

    parser.add_argument("--config_file", metavar="FILE", help="TOML file with any of these options, in any sections")
    return parser


def _config_arguments(path: str, parser: argparse.ArgumentParser) -> list[str]:
    """The options of a TOML file as command-line arguments, so that they are checked alike."""
    values: dict[str, Any] = {}
    for key, value in _read_toml(path).items():
        values.update(value if isinstance(value, dict) else {key: value})
    known = {action.dest for action in parser._actions} - {"help", "config_file"}
    unknown = [key for key in values if key not in known]
    if unknown:
        told = ", ".join(f"'{key}'{nearest(key, known)}" for key in unknown)
        raise DeftError(f"{path}: unknown key{'s' if len(unknown) > 1 else ''} {told}")
    arguments: list[str] = []
    for key, value in values.items():
        if isinstance(value, bool):
            switches = {a.dest for a in parser._actions if a.nargs == 0}
            if key not in switches:
                raise DeftError(f"{path}: {key} takes a value, not {str(value).lower()}")
            arguments += [f"--{key}"] if value else []
        elif isinstance(value, list) and key == "resolution":
            arguments.append(f"--{key}={','.join(map(str, value))}")
        elif isinstance(value, list):
            arguments += [f"--{key}", *map(str, value)]
        else:
            arguments.append(f"--{key}={value}")
    return arguments


def _read_toml(path: str) -> dict[str, Any]:
    """:raises DeftError: when it is missing or no TOML, with a hint where a Windows path is the likely reason"""
    if not Path(path).is_file():
        raise DeftError(f"--config_file: no such file: {path}")
    text = read_text(path, f"--config_file {path}:")
    hint = "; in double quotes, backslashes have to be doubled: write 'C:\\path' in single quotes"
    try:
        content = toml.loads(text)
    except Exception as error:  # of many kinds
        raise DeftError(f"--config_file {path}: {reason_of(error)}{hint if _BACKSLASH.search(text) else ''}") from None
    for key, value in _strings_in(content):
        if any(ord(letter) < 32 for letter in value) and _BACKSLASH.search(text):  # as \t and \n of "C:\training\new"
            raise DeftError(f"--config_file {path}: {key} = {value!r}{hint}")
    return content


def _strings_in(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(content, str):
        yield key, content
    elif isinstance(content, (dict, list)):
        for name, value in content.items() if isinstance(content, dict) else ((key, value) for value in content):
            yield from _strings_in(value, name)


def _check(args: argparse.Namespace) -> None:
    for name in ("pretrained_model_name_or_path", "train_data_dir", "output_dir"):
        if not getattr(args, name):
            raise DeftError(f"--{name} is needed, on the command line or in --config_file")
    for name in _AT_LEAST_ONE:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise DeftError(f"--{name}={value}: must be at least 1")
    for name in _AT_LEAST_ZERO:
        value = getattr(args, name)
        if value is not None and not 0 <= value < math.inf:
            raise DeftError(f"--{name}={value}: must be a number of at least 0")
    if args.seed is not None and not 0 <= args.seed < 2**32:
        raise DeftError(f"--seed={args.seed}: must be from 0 to {2**32 - 1}")
    if not args.output_name or Path(args.output_name).name != args.output_name:
        raise DeftError(f"--output_name={args.output_name}: must be a file name without its extension")
    if args.lr_warmup_steps and args.lr_scheduler == "constant":
        raise DeftError("--lr_warmup_steps: --lr_scheduler=constant has no warmup; use constant_with_warmup")
    args.caption_extension = "." + args.caption_extension.lstrip(".")
    if args.network_train_unet_only and args.network_train_text_encoder_only:
        raise DeftError("--network_train_unet_only and --network_train_text_encoder_only leave nothing to train")
    if args.dim_from_weights and not args.network_weights:
        raise DeftError("--dim_from_weights needs --network_weights")
    for argument in args.network_args:
        if "=" not in argument:
            raise DeftError(f"--network_args {argument}: must be KEY=VALUE")
    if not all(map(math.isfinite, args.base_weights_multiplier)):
        raise DeftError(f"--base_weights_multiplier {args.base_weights_multiplier}: must be finite numbers")
    args.resolution = parse_resolution(args.resolution)
    try:
        args.transparent_background = ImageColor.getrgb(args.transparent_background)[:3]
    except ValueError:
        raise DeftError(
            f"--transparent_background {args.transparent_background}: must be a colour's name or #RRGGBB"
        ) from None


def parse_resolution(text: str) -> tuple[int, int]:
    """(width, height) from `512` or `512,768`."""
    try:
        numbers = [int(part) for part in str(text).split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise DeftError(f"--resolution {text}: must be one number or WIDTH,HEIGHT")
    return numbers[0], numbers[-1]
