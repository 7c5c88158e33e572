"""What is known of a model before its weights are read: what its text encoders read of a caption, and what sides its
pictures may have."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from networks.deft_config import DeftError, read_text, reason_of


@dataclass(frozen=True)
class Encoder:
    """A text encoder.

    :param ids: of a whole caption, without start and end
    :param length: how many of them are read
    """

    name: str
    tokenizer: Any
    ids: Callable[[str], list[int]]
    length: int

    def beyond(self, caption: str) -> str:
        """What of a caption is cut."""
        return str(self.tokenizer.decode(self.ids(caption)[self.length :])).strip()


@dataclass(frozen=True)
class Outline:
    """:param multiple_of: pixels that a picture's sides have to be a multiple of
    :param encoders: in the order of `Family.text_encoders`
    :param takes_pictures: as `Family.takes_pictures`
    """

    multiple_of: int
    encoders: tuple[Encoder, ...]
    takes_pictures: bool = False


def config_of(location: Path, part: str) -> dict[str, Any]:
    """The configuration of a part of a Diffusers folder; nothing for a single file, which is as the published models.

    :raises DeftError: when it cannot be read
    """
    if location.is_file():
        return {}
    file = location / part / "config.json"
    try:
        found = json.loads(read_text(file, f"{file}:"))
    except (ValueError, RecursionError) as error:
        raise DeftError(f"{file}: no JSON ({reason_of(error)})") from None
    return found if isinstance(found, dict) else {}


def pixels_per_latent(location: Path) -> int:
    """Of a side, as `Family.pixels_per_latent`."""
    blocks = config_of(location, "vae").get("block_out_channels", [0] * 4)
    return 2 ** (len(blocks) - 1)
