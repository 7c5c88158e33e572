"""Prompts files in sd-scripts' three formats: text, JSON and TOML."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import toml
import torch

from networks.deft_config import DeftError, nearest, read_text, reason_of

logger = logging.getLogger(__name__)

MOST_STEPS = 1000  # the timesteps that the models were trained with; a sampler has no more
LARGEST = 16384  # pixels a side
MOST_SEEDS = 2**64  # that torch takes
GUIDANCE = 7.5  # of Stable Diffusion, where a prompt gives none


@dataclass(frozen=True)
class Prompt:
    """One picture that is asked for."""

    text: str
    negative: str = ""
    width: int = 512
    height: int = 512
    seed: int | None = None
    guidance: float | None = None  # classifier-free; None: as the model's family is used to
    steps: int = 30
    embedded_guidance: float | None = None  # that FLUX is told; None likewise
    sampler: str | None = None  # of --sample_sampler; None for the run's
    inputs: tuple[str, ...] = ()  # files of the pictures that the text speaks of as <img><|image_1|></img> and so on

    def generator(self) -> torch.Generator:
        """Of the picture's noise, the same on every device; from a seed of its own where there is none."""
        generator = torch.Generator("cpu")
        generator.manual_seed(self.seed) if self.seed is not None else generator.seed()
        return generator


# a field, the letter it has in a line, and its key in JSON and TOML
_FIELDS = {
    "text": ("", "prompt", str),
    "negative": ("n", "negative_prompt", str),
    "width": ("w", "width", int),
    "height": ("h", "height", int),
    "seed": ("d", "seed", int),
    "guidance": ("l", "scale", float),
    "steps": ("s", "sample_steps", int),
    "embedded_guidance": ("g", "guidance_scale", float),
    "sampler": ("ss", "sample_sampler", str),
}
_BY_LETTER = {letter: key for letter, key, _ in _FIELDS.values() if letter}
_BY_KEY = {key: (name, kind) for name, (_, key, kind) in _FIELDS.items()}
# sd-scripts' further ones, for samplers and models that are not here
_NOT_USED = {
    "cn": "controlnet_image", "ctr": "cfg_trunc_ratio",
    "rcfg": "renorm_cfg", "fs": "flow_shift", "mk": "mask_image",
}  # fmt: skip
_INPUT = ("i", "image")  # letter and key of an input picture, of which there may be several


def read_prompts(
    path: str, size: tuple[int, int], option: str = "--sample_prompts", steps: int = Prompt.steps
) -> list[Prompt]:
    """The prompts of a file: lines of a text, of which empty ones and those that begin with # are passed over; a list
    in JSON, of lines or tables; or `[prompt]` with a `[[prompt.subset]]` each in TOML.

    :param size: (width, height) where a prompt gives none
    :param option: that names the file, for errors
    :param steps: where a prompt gives none
    :raises DeftError: for a missing or empty file, or a prompt that cannot be read or drawn
    """
    if not Path(path).is_file():
        raise DeftError(f"{option}: no such file: {path}")
    option = f"{option} {path}:"
    text = read_text(path, option)
    defaults = {"width": size[0], "height": size[1], "sample_steps": steps}
    kinds = {".txt": _lines, ".json": _json, ".toml": _toml}
    if Path(path).suffix.lower() not in kinds:
        raise DeftError(f"{option} only {', '.join(kinds)} files are read")
    tables = kinds[Path(path).suffix.lower()](text, option)
    prompts = [_prompt(table, defaults, option) for table in tables]
    if not prompts:
        raise DeftError(f"{option} no prompts in it")
    not_used = sorted({key for table in tables for key in table if key in _NOT_USED.values()})
    if not_used:
        logger.warning(f"{option} {', '.join(not_used)} not used; other models have them")
    return prompts


def parse_line(line: str, option: str = "--sample_prompts") -> dict[str, Any]:
    """`a cat --n blurry --w 512 --h 512 --d 1 --l 7.5 --s 28` as a table."""
    text, *options = re.split(r"\s--(?=\w+(?:\s|$))", line)
    found: dict[str, Any] = {"prompt": text.strip()}
    for given in options:
        letter, _, value = given.partition(" ")
        if letter.lower() == _INPUT[0]:
            found.setdefault(_INPUT[1], []).append(value.strip())
            continue
        key = (_BY_LETTER | _NOT_USED).get(letter.lower())
        if key is None:
            raise DeftError(
                f"{option} unknown option --{letter} in '{line}'; known: --{' --'.join((*_BY_LETTER, _INPUT[0]))}"
            )
        found[key] = value.strip()
    return found


def _lines(text: str, option: str) -> list[dict[str, Any]]:
    lines = (line.strip() for line in text.split("\n"))
    return [parse_line(line, option) for line in lines if line and not line.startswith("#")]


def _json(text: str, option: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DeftError(f"{option} no JSON ({reason_of(error)})") from None
    if not isinstance(found, list) or not all(isinstance(one, (str, dict)) for one in found):
        raise DeftError(f'{option} has to be a list, as in [{{"prompt": "a cat", "width": 512}}]')
    return [parse_line(one, option) if isinstance(one, str) else _table(one, option) for one in found]


def _toml(text: str, option: str) -> list[dict[str, Any]]:
    try:
        content = toml.loads(text)
    except Exception as error:  # of many kinds
        raise DeftError(f"{option} no TOML ({reason_of(error)})") from None
    shared = content.pop("prompt", None)
    for key in content:
        raise DeftError(f"{option} '{key}' has to stand in [prompt]")
    subsets = shared.pop("subset", None) if isinstance(shared, dict) else None
    if not isinstance(subsets, list) or not all(isinstance(one, dict) for one in subsets):
        raise DeftError(f"{option} needs [[prompt.subset]] tables, each with a prompt")
    return [_table(shared | one, option) for one in subsets]


def _table(found: Mapping[str, Any], option: str) -> dict[str, Any]:
    """What is given in it, every key known."""
    known = {*_BY_KEY, *_NOT_USED.values(), _INPUT[1], "enum"}
    for key in found:
        if key not in known:
            raise DeftError(f"{option} unknown key '{key}'{nearest(key, known)}")
    return {key: value for key, value in found.items() if value is not None and key != "enum"}


def _inputs(given: Any, option: str) -> tuple[str, ...]:
    """One file or several; a line's --i are several."""
    files = [given] if isinstance(given, str) else given
    if not isinstance(files, (list, tuple)) or not all(isinstance(one, str) and one for one in files):
        raise DeftError(f"{option} {_INPUT[1]} = {given!r:.60} is no file, nor a list of such (--{_INPUT[0]} FILE)")
    return tuple(files)


def told_unused(prompts: Sequence[Prompt], option: str) -> list[Prompt]:
    """The prompts without their pictures, for models that read none, which is told."""
    if any(prompt.inputs for prompt in prompts):
        logger.warning(f"{option} {_INPUT[1]} not used; other models have it")
    return [replace(prompt, inputs=()) for prompt in prompts]


def _prompt(table: Mapping[str, Any], defaults: Mapping[str, Any], option: str) -> Prompt:
    """:raises DeftError: for a value that is no number, or that no picture can have"""
    if "prompt" not in table:
        raise DeftError(f"{option} no prompt in {dict(table)}")
    values: dict[str, Any] = {"inputs": _inputs(table.get(_INPUT[1], ()), option)}
    where = f"in '{table['prompt']}'"
    for key, given in {**defaults, **table}.items():
        if key in _BY_KEY:
            name, kind = _BY_KEY[key]
            if isinstance(given, bool) or (kind is str and not isinstance(given, str)):
                raise DeftError(f"{option} {key} = {given!r} is no {'text' if kind is str else 'number'}, {where}")
            try:
                values[name] = kind(given)
                if isinstance(given, float) and values[name] != given:
                    raise ValueError("not whole")
            except (TypeError, ValueError, OverflowError):
                raise DeftError(f"{option} --{_FIELDS[name][0]} {given} is no number {where}") from None
    prompt = Prompt(**values)
    if prompt.width % 8 or prompt.height % 8 or not all(8 <= side <= LARGEST for side in (prompt.width, prompt.height)):
        raise DeftError(f"{option} --w and --h must be multiples of 8 from 8 to {LARGEST}, {where}")
    if not 1 <= prompt.steps <= MOST_STEPS:
        raise DeftError(f"{option} --s {prompt.steps} must be from 1 to {MOST_STEPS}, {where}")
    if prompt.seed is not None and not 0 <= prompt.seed < MOST_SEEDS:
        raise DeftError(f"{option} --d {prompt.seed} must be from 0 to 2^64 - 1, {where}")
    for letter, value in (("l", prompt.guidance), ("g", prompt.embedded_guidance)):
        if value is not None and not abs(value) < 1e6:
            raise DeftError(f"{option} --{letter} {value} must be a number, {where}")
    return prompt
