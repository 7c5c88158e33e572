"""Configuration files: TOML and JSON, as people and their editors write them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Any

import toml

from networks.deft_config import DeftError, read_text, reason_of

# whose text may hold line ends and tabs
_FREE = ("training_comment", "caption_prefix", "caption_suffix", "caption_separator", "keep_tokens_separator",
         "secondary_separator", "custom_attributes")  # fmt: skip
_BACKSLASH = re.compile(r'"[^"\n]*\\[^"\n]*"')  # in double quotes
_DOUBLED = "in double quotes, backslashes have to be doubled"


def read_config(path: str, option: str) -> dict[str, Any]:
    """What a `.json` file holds, or any other as TOML.

    :param option: which names the file, for messages
    :raises DeftError: when it is missing or neither, with a hint where a Windows path is the likely reason
    """
    if not os.path.isfile(path):
        raise DeftError(f"{option}: no such file: {path}")
    is_json = path.lower().endswith(".json")
    hint = f"; {_DOUBLED}" if is_json else f"; {_DOUBLED}: write 'C:\\path' in single quotes"
    text = read_text(path, f"{option} {path}:")
    try:
        content = json.loads(text) if is_json else toml.loads(text)
        strings = list(_strings_in(content))
    except Exception as error:  # of many kinds
        raise DeftError(f"{option} {path}: {reason_of(error)}{hint if _BACKSLASH.search(text) else ''}") from None
    if not isinstance(content, dict):
        raise DeftError(f"{option} {path}: must be an object, {{...}}, not a {type(content).__name__}")
    for key, value in strings:  # as \t and \n of "C:\training\new"
        if any(ord(letter) < 32 for letter in value) and _BACKSLASH.search(text):
            raise DeftError(f"{option} {path}: {key} = {value!r}{hint}")
    return content


def _strings_in(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(content, str):
        yield key, content
    elif isinstance(content, (dict, list)):
        for name, value in content.items() if isinstance(content, dict) else ((key, value) for value in content):
            if name not in _FREE:
                yield from _strings_in(value, name)
