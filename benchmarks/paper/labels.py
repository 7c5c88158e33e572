"""The adapters that are compared, by name. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from networks.deft_config import DeftError, nearest, parse_options, user_options

KEEP = Path(__file__).resolve().parents[2] / "configs" / "keep.txt"

# networks.deft: name -> network_args
DEFT: Mapping[str, Mapping[str, str]] = {
    "deft": {},
    "deft-keep": {"keep": str(KEEP)},
    "deft-published": {"removal": "1"},  # the paper's equation with an orthonormal basis
    "deft-none": {"basis": "none"},  # without a decomposition: the form of the paper's runs on DreamBench++
    "deft-frozen": {"freeze_basis": "true", "init": "paper"},  # what the authors' script trains with qr: docs/method.md
    "para": {"para": "true"},
}
# peft: name -> what it is
PEFT: Mapping[str, str] = {
    "lora": "LoRA",
    "dora": "DoRA",
    "oft": "OFT, of blocks with a LoRA's number of parameters",
    "peft-deft": "peft's DEFT as it is by default",
    "peft-deft-qr": "peft's DEFT with an orthonormal basis",
}
ADAPTERS = (*PEFT, *DEFT)


def network_args(label: str) -> Mapping[str, str] | None:
    """Of networks.deft; None for peft's adapters.

    :raises DeftError: for a name that there is not, or options that cannot be
    """
    if label in PEFT:
        return None
    if label in DEFT:
        return DEFT[label]
    name, *pairs = label.split()
    if name != "deft":
        raise DeftError(f"--adapters {label}: allowed are {', '.join(ADAPTERS)}, 'deft KEY=VALUE'"
                        f"{nearest(label, ADAPTERS)}")  # fmt: skip
    if not all("=" in pair for pair in pairs):
        raise DeftError(f"--adapters '{label}': behind deft, KEY=VALUE is wanted, as 'deft removal=1'")
    given = dict(pair.split("=", 1) for pair in pairs)
    try:
        parse_options(user_options(given))
    except DeftError as error:
        raise DeftError(f"--adapters '{label}': {error}") from None
    return given
