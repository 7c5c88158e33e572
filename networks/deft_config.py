"""Options of a DEFT network: strings from a command line become one frozen, checked dataclass."""

from __future__ import annotations

import ast
import contextlib
import difflib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


class DeftError(ValueError):
    """A mistake of the user's: one line that names the option, file or layer and says what to do."""


def reason_of(error: BaseException) -> str:
    """What another program's error says, in one line; of a disk's the reason and the file's name, unless that is the
    hidden one under which a file is written."""
    if isinstance(error, OSError) and error.strerror:
        path = str(error.filename or "")
        return error.strerror if not path or ".partial" in path else f"{error.strerror}: {os.path.basename(path)}"
    lines = [line for line in str(error).strip().split("\n") if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


@contextlib.contextmanager
def naming(place: str) -> Iterator[None]:
    """Puts the file and layer before what functions of numbers alone raise: a ValueError becomes a user's error."""
    try:
        yield
    except DeftError:
        raise
    except ValueError as error:
        raise DeftError(f"{place}: {error}") from None


def read_text(path: str | os.PathLike, source: str) -> str:
    """A text file in UTF-8, with or without a byte order mark; its lines end in \\n however they did in the file.

    Split it at \\n: `str.splitlines` also ends lines where nobody sees it, at U+2028 for one.

    :param source: how errors begin
    :raises DeftError: when it cannot be read
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    except OSError as error:
        raise DeftError(f"{source} cannot be read ({error.strerror or error})") from None
    if "\0" in text:  # UTF-16 reads as UTF-8 with these
        raise DeftError(f"{source} the file is not UTF-8 text; save it as UTF-8")
    return text


def nearest(word: str, allowed: Any) -> str:
    """` (did you mean 'x'?)` for the likeliest spelling among `allowed`, or nothing."""
    close = difflib.get_close_matches(word, [str(a) for a in allowed], n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def _choice(*allowed: str, **other_names: str) -> Callable[[str, Any], str]:
    def parse(key: str, value: Any) -> str:
        name = str(value).lower()
        if other_names.get(name, name) in allowed:
            return other_names.get(name, name)
        raise DeftError(f"{key}={value}: allowed are {', '.join(allowed)}{nearest(str(value).lower(), allowed)}")

    return parse


def _number(kind: type, allowed: str, test: Callable[[Any], bool]) -> Callable[[str, Any], Any]:
    def parse(key: str, value: Any) -> Any:
        try:
            number = kind(value)
        except (TypeError, ValueError, OverflowError):
            raise DeftError(f"{key}={value}: must be {allowed}") from None
        if not test(number):
            raise DeftError(f"{key}={value}: must be {allowed}")
        return number

    return parse


def parse_bool(key: str, value: Any) -> bool:
    """True or False from a bool or from true/false, yes/no, on/off, 1/0 in any case."""
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if str(value).lower() not in words:
        raise DeftError(f"{key}={value}: must be true or false")
    return words[str(value).lower()]


def _numbers(kind: type, allowed: str) -> Callable[[str, Any], Any]:
    """A list of numbers of at least 0 from `1,2,3`, in brackets or not, or from a list."""
    number = _number(kind, allowed, lambda v: 0 <= v < float("inf"))

    def parse(key: str, value: Any) -> Any:
        parts = value if isinstance(value, (list, tuple)) else str(value).strip().strip("[]").split(",")
        return tuple(number(key, part) for part in parts)

    return parse


def _by_pattern(kind: type, allowed: str) -> Callable[[str, Any], Any]:
    """A mapping of regular expressions to numbers of at least 0 from `pattern=1,pattern=2`, or from a mapping; `:` for
    the last `=`, since musubi-tuner takes none in a value."""
    number = _number(kind, allowed, lambda v: 0 <= v < float("inf"))

    def parse(key: str, value: Any) -> Any:
        pairs = value.items() if isinstance(value, Mapping) else [_pair(key, p) for p in str(value).split(",") if p]
        return {_pattern(key, pattern): number(key, size) for pattern, size in pairs}

    return parse


def _pair(key: str, text: str) -> tuple[str, str]:
    found = re.fullmatch(r"(.*)[=:]([^=:]*)", text.strip(), re.DOTALL)
    if found is None:
        raise DeftError(
            f"{key}: {text.strip()} must be PATTERN=NUMBER or PATTERN:NUMBER, separated from the next by a comma"
        )
    return found[1].strip(), found[2].strip()


def _pattern(key: str, text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise DeftError(f"{key}: {text} is no regular expression ({error})") from None
    return text


def _patterns(key: str, value: Any) -> Any:
    """Regular expressions from `a.*`, quoted or not, or from a list such as `['a.*','b.*']`."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value)
    listed = value if isinstance(value, (list, tuple)) else [value]
    return tuple(_pattern(key, str(pattern)) for pattern in listed)


def _text(key: str, value: Any) -> Any:
    return str(value)


def _refused(reason: str) -> Callable[[str, Any], Any]:
    def parse(key: str, value: Any) -> Any:
        raise DeftError(f"{key}={value}: {reason}")

    return parse


_rank = _number(int, "a whole number of at least 1", lambda v: v >= 1)
_alpha = _number(float, "a number of at least 0 (0 means: equal to the dim)", lambda v: 0 <= v < float("inf"))
_rank_or_none = _number(int, "a whole number of at least 0 (0 means: not adapted)", lambda v: v >= 0)
_ranks = _numbers(int, "whole numbers of at least 0, separated by commas (0 means: not adapted)")
_alphas = _numbers(float, "numbers of at least 0, separated by commas")
_positive = _number(float, "a number above 0", lambda v: 0 < v < float("inf"))
_share = _number(float, "a number from 0 to 1", lambda v: 0 <= v <= 1)
_probability = _number(float, "a number from 0 to below 1", lambda v: 0 <= v < 1)


_bases = _choice("qr", "svd", "relu", "none", "tsvd", "nmf", lrmf="tsvd", eigen="none")
_at_least_0 = _number(float, "a number of at least 0", lambda v: 0 <= v < float("inf"))
_ggpo = _refused("GGPO shakes a LoRA's weights by the sizes of its two matrices, and DEFT has others; leave it out")


def _option(default: Any, parse: Callable[[str, Any], Any], of_file: bool = False) -> Any:
    """A field; `of_file`: it belongs to the adapter, and a training that goes on from the file takes it over."""
    return field(default=default, metadata={"parse": parse, "of_file": of_file})


@dataclass(frozen=True)
class DeftConfig:
    """All options of a DEFT network. `docs/options.md` describes them for users.

    `dim` and `alpha` are `--network_dim` and `--network_alpha`; the others come from `--network_args key=value`.
    An alpha of 0 means "equal to the dim", as in sd-scripts' networks.lora. None means "not given".
    """

    dim: int = _option(4, _rank, of_file=True)
    alpha: float = _option(1.0, _alpha, of_file=True)
    conv_dim: int | None = _option(None, _rank)  # k x k convolutions are adapted only when this is given
    conv_alpha: float = _option(1.0, _alpha)

    # the method
    basis: str = _option("qr", _bases, of_file=True)
    para: bool = _option(False, parse_bool, of_file=True)
    gate: bool = _option(False, parse_bool, of_file=True)
    # how much of what leaves W with a turning basis stays out. 0: R follows it, and puts it back; 1: the paper's own
    # coordinates. None becomes 1 in the published forms, 0 otherwise
    removal: float = _option(None, _share, of_file=True)
    freeze_basis: bool = _option(False, parse_bool, of_file=True)
    init: str | None = _option(None, _choice("identity", "paper", "svd", "minor"))
    init_scale: float = _option(1.0, _positive, of_file=True)
    ratio: float = _option(1.0, _positive, of_file=True)  # P's rate over R's
    split_qkv: bool = _option(False, parse_bool, of_file=True)
    fuse_qkv: bool = _option(False, parse_bool, of_file=True)
    # a file of input directions that R stays out of; for our trainer also prompts (.txt), of which it makes that file
    keep: str | None = _option(None, _text)

    # dropout
    neuron_dropout: float = _option(0.0, _probability, of_file=True)
    rank_dropout: float = _option(0.0, _probability, of_file=True)
    module_dropout: float = _option(0.0, _probability, of_file=True)

    # files
    save_format: str = _option("lora", _choice("lora", "deft"), of_file=True)
    pad: bool = _option(True, parse_bool, of_file=True)  # one rank in the whole file
    truncate: bool = _option(False, parse_bool)  # a file of higher rank is cut down instead of refused

    # which layers, and their ranks: see deft_ranks
    block_dims: tuple[int, ...] | None = _option(None, _ranks)
    block_alphas: tuple[float, ...] | None = _option(None, _alphas)
    conv_block_dims: tuple[int, ...] | None = _option(None, _ranks)
    conv_block_alphas: tuple[float, ...] | None = _option(None, _alphas)
    network_reg_dims: Mapping[str, int] | None = _option(None, _by_pattern(int, "a whole number of at least 0"))
    img_attn_dim: int | None = _option(None, _rank_or_none)
    txt_attn_dim: int | None = _option(None, _rank_or_none)
    img_mlp_dim: int | None = _option(None, _rank_or_none)
    txt_mlp_dim: int | None = _option(None, _rank_or_none)
    img_mod_dim: int | None = _option(None, _rank_or_none)
    txt_mod_dim: int | None = _option(None, _rank_or_none)
    single_dim: int | None = _option(None, _rank_or_none)
    single_mod_dim: int | None = _option(None, _rank_or_none)
    in_dims: tuple[int, ...] | None = _option(None, _ranks)
    train_blocks: str | None = _option(None, _text)
    train_double_block_indices: str | None = _option(None, _text)
    train_single_block_indices: str | None = _option(None, _text)
    context_attn_dim: int | None = _option(None, _rank_or_none)
    context_mlp_dim: int | None = _option(None, _rank_or_none)
    context_mod_dim: int | None = _option(None, _rank_or_none)
    x_attn_dim: int | None = _option(None, _rank_or_none)
    x_mlp_dim: int | None = _option(None, _rank_or_none)
    x_mod_dim: int | None = _option(None, _rank_or_none)
    emb_dims: tuple[int, ...] | None = _option(None, _ranks)
    train_block_indices: str | None = _option(None, _text)
    attn_dim: int | None = _option(None, _rank_or_none)
    mlp_dim: int | None = _option(None, _rank_or_none)
    mod_dim: int | None = _option(None, _rank_or_none)
    refiner_dim: int | None = _option(None, _rank_or_none)
    embedder_dims: tuple[int, ...] | None = _option(None, _ranks)
    train_t5xxl: bool = _option(False, parse_bool)
    train_llm_adapter: bool = _option(False, parse_bool)
    train_mlp: bool = _option(False, parse_bool)
    exclude_patterns: tuple[str, ...] | None = _option(None, _patterns)
    include_patterns: tuple[str, ...] | None = _option(None, _patterns)
    verbose: bool = _option(False, parse_bool)

    # rates
    down_lr_weight: str | None = _option(None, _text)
    mid_lr_weight: str | None = _option(None, _text)
    up_lr_weight: str | None = _option(None, _text)
    block_lr_zero_threshold: float = _option(0.0, _at_least_0)
    network_reg_lrs: Mapping[str, float] | None = _option(None, _by_pattern(float, "a rate of at least 0"))
    loraplus_lr_ratio: float | None = _option(None, _positive)
    loraplus_unet_lr_ratio: float | None = _option(None, _positive)
    loraplus_text_encoder_lr_ratio: float | None = _option(None, _positive)

    ggpo_beta: None = _option(None, _ggpo)
    ggpo_sigma: None = _option(None, _ggpo)

    def __post_init__(self) -> None:
        published = self.para or self.gate or self.basis != "qr" or self.init == "paper"
        if self.removal is None:
            object.__setattr__(self, "removal", float(published))
        if self.init == "paper" and self.removal != 1:
            raise DeftError(f"removal={self.removal:g}: init=paper starts with all of it taken out; leave removal out")
        if self.keep is not None and self.removal:
            raise DeftError(f"keep={self.keep}: what is removed does not stay out of its directions; use removal=0")
        if self.para and self.basis in ("relu", "svd"):
            raise DeftError(f"para=true needs basis=qr, none, tsvd or nmf, not basis={self.basis}")
        if self.basis in ("tsvd", "nmf") and not self.para:
            name = "tsvd (lrmf)" if self.basis == "tsvd" else "nmf"
            raise DeftError(f"basis={name} only removes: add para=true, or choose basis=qr")
        if self.basis == "nmf" and self.init is not None:
            raise DeftError(f"init={self.init}: basis=nmf starts with random positive matrices; leave init out")
        if self.para and self.removal != 1:
            raise DeftError(f"removal={self.removal:g}: with para=true nothing is learnt but the removal; leave it out")
        if self.para and self.freeze_basis:
            raise DeftError("freeze_basis=true: with para=true nothing else is trained; choose one")
        if self.para and self.gate:
            raise DeftError("gate=true scales R, and para=true has no R: choose one")
        if self.para and self.init in ("identity", "paper"):
            raise DeftError(
                f"init={self.init}: para=true removes from the first step; leave init out or use svd or minor"
            )

        if self.fuse_qkv and self.split_qkv:
            raise DeftError("fuse_qkv=true: queries, keys and values are together or apart; leave split_qkv out")
        dropouts = ("neuron_dropout", "rank_dropout", "module_dropout")
        for name in dropouts if self.fuse_qkv else ():
            if getattr(self, name):
                shown = _COMMAND_LINE_NAMES.get(name, name)
                raise DeftError(f"{shown}={getattr(self, name)}: fuse_qkv=true has no dropout; leave one of them out")

    @property
    def scale(self) -> float:
        """s = alpha / dim of Linear layers and 1x1 convolutions."""
        return (self.alpha or self.dim) / self.dim

    def __str__(self) -> str:
        """Dim, alpha and basis, and every option that is not at its default."""
        always = ("dim", "alpha", "basis")
        shown = [f for f in fields(self) if f.name in always or getattr(self, f.name) != f.default]
        return ", ".join(f"{f.name}={getattr(self, f.name)}" for f in shown)

    def to_json(self) -> str:
        """The options that were set, and those that a training from the file takes over, as JSON for its metadata. Of
        files to `keep` their names alone: a shared file tells nothing of its author's disk."""
        kept = [f for f in fields(self) if f.metadata["of_file"] or getattr(self, f.name) != f.default]
        found = {f.name: getattr(self, f.name) for f in kept}
        if self.keep:
            found["keep"] = ",".join(re.split(r"[/\\]", one.strip())[-1] for one in self.keep.split(","))
        return json.dumps(found)


_COMMAND_LINE_NAMES = {"dim": "network_dim", "alpha": "network_alpha", "neuron_dropout": "network_dropout"}


def user_options(network_args: Mapping[str, Any]) -> dict[str, Any]:
    """`--network_args` as options of `parse_options`, those that were not given (None) left out.

    sd-scripts always adds `dropout`, its `--network_dropout`: it is `neuron_dropout` here.

    :raises DeftError: for `dim` and `alpha`, which have options of their own
    """
    given = {key: value for key, value in network_args.items() if value is not None}
    for key in ("dim", "alpha"):
        if key in given:
            raise DeftError(f"network_args {key}={given[key]}: use --network_{key}")
    if "dropout" in given:
        given["neuron_dropout"] = given.pop("dropout")
    return given


def parse_options(options: Mapping[str, Any]) -> DeftConfig:
    """Checks every option and returns the configuration.

    :param options: names of `DeftConfig`'s fields with strings, as sd-scripts passes them, or values; None means
        "not given"
    :raises DeftError: for an unknown name or a value that is not allowed
    """
    given = {key: value for key, value in options.items() if value is not None}
    parsers = {f.name: f.metadata["parse"] for f in fields(DeftConfig)}
    for key in given:
        if key not in parsers:
            raise DeftError(f"unknown network_args key '{key}'{nearest(key, parsers)}; docs/options.md lists them all")
    shown = _COMMAND_LINE_NAMES
    return DeftConfig(**{key: parsers[key](shown.get(key, key), value) for key, value in given.items()})


def options_of_file(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that belong to the adapter; ranks by layer stand in the file itself, and rates are each training's own."""
    kept = {f.name for f in fields(DeftConfig) if f.metadata["of_file"]}
    return {name: value for name, value in options.items() if name in kept}


def option_names() -> list[str]:
    """All options of a network."""
    return [f.name for f in fields(DeftConfig)]
