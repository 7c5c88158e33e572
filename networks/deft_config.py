"""Options of a DEFT network: strings from a command line become one frozen, checked dataclass."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


class DeftError(ValueError):
    """A mistake of the user's: one line that names the option, file or layer and says what to do."""


def nearest(word: str, allowed: Any) -> str:
    """` (did you mean 'x'?)` for the likeliest spelling among `allowed`, or nothing."""
    close = difflib.get_close_matches(word, [str(a) for a in allowed], n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def _choice(*allowed: str) -> Callable[[str, Any], str]:
    def parse(key: str, value: Any) -> str:
        if str(value).lower() in allowed:
            return str(value).lower()
        raise DeftError(f"{key}={value}: allowed are {', '.join(allowed)}{nearest(str(value).lower(), allowed)}")

    return parse


def _number(kind: type, allowed: str, test: Callable[[Any], bool]) -> Callable[[str, Any], Any]:
    def parse(key: str, value: Any) -> Any:
        try:
            number = kind(value)
        except (TypeError, ValueError):
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


_rank = _number(int, "a whole number of at least 1", lambda v: v >= 1)
_alpha = _number(float, "a number of at least 0 (0 means: equal to the dim)", lambda v: 0 <= v < float("inf"))
_positive = _number(float, "a number above 0", lambda v: 0 < v < float("inf"))
_probability = _number(float, "a number from 0 to below 1", lambda v: 0 <= v < 1)


def _option(default: Any, parse: Callable[[str, Any], Any]) -> Any:
    return field(default=default, metadata={"parse": parse})


@dataclass(frozen=True)
class DeftConfig:
    """All options of a DEFT network. `docs/options.md` describes them for users.

    `dim` and `alpha` are `--network_dim` and `--network_alpha`; the others come from `--network_args key=value`.
    An alpha of 0 means "equal to the dim", as in sd-scripts' networks.lora.
    """

    dim: int = _option(4, _rank)
    alpha: float = _option(1.0, _alpha)
    conv_dim: int | None = _option(None, _rank)  # k x k convolutions are adapted only when this is given
    conv_alpha: float = _option(1.0, _alpha)
    basis: str = _option("qr", _choice("qr", "relu"))
    para: bool = _option(False, parse_bool)
    gate: bool = _option(False, parse_bool)
    init: str | None = _option(None, _choice("identity", "paper", "svd"))
    init_scale: float = _option(1.0, _positive)
    ratio: float = _option(1.0, _positive)  # P's rate over R's
    neuron_dropout: float = _option(0.0, _probability)
    rank_dropout: float = _option(0.0, _probability)
    module_dropout: float = _option(0.0, _probability)
    save_format: str = _option("lora", _choice("lora", "deft"))
    pad: bool = _option(True, parse_bool)  # one rank in the whole file
    truncate: bool = _option(False, parse_bool)  # a file of higher rank is cut down instead of refused

    def __post_init__(self) -> None:
        if self.para and self.basis != "qr":
            raise DeftError(f"para=true needs basis=qr, not basis={self.basis}")
        if self.para and self.gate:
            raise DeftError("gate=true scales R, and para=true has no R: choose one")
        if self.para and self.init in ("identity", "paper"):
            raise DeftError(f"init={self.init}: para=true removes from the first step; leave init out or use init=svd")

    @property
    def scale(self) -> float:
        """s = alpha / dim of Linear layers and 1x1 convolutions."""
        return (self.alpha or self.dim) / self.dim

    @property
    def conv_scale(self) -> float:
        """s = conv_alpha / conv_dim of k x k convolutions."""
        return (self.conv_alpha or self.conv_dim or 1) / (self.conv_dim or 1)

    def __str__(self) -> str:
        """Dim, alpha and basis, and every option that is not at its default."""
        always = ("dim", "alpha", "basis")
        shown = [f for f in fields(self) if f.name in always or getattr(self, f.name) != f.default]
        return ", ".join(f"{f.name}={getattr(self, f.name)}" for f in shown)

    def to_json(self) -> str:
        """The options as JSON, for a file's metadata."""
        return json.dumps(asdict(self))


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
            raise DeftError(
                f"unknown network_args key '{key}'{nearest(key, parsers)}; allowed are {', '.join(sorted(parsers))}"
            )
    shown = _COMMAND_LINE_NAMES
    return DeftConfig(**{key: parsers[key](shown.get(key, key), value) for key, value in given.items()})


def option_names() -> list[str]:
    """All options of a network."""
    return [f.name for f in fields(DeftConfig)]
