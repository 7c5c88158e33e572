"""Input pictures of captions and prompts: what is wrong with them is told before a model is loaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from library.data import captions, plan
from library.data.index import header_of
from library.data.plan import InputPicture, Plan, input_picture
from library.models.loading import outline_of
from library.options.rooms import DataOptions, Run
from library.placeholders import PICTURE, misplaced
from library.prompts import Prompt, told_unused
from networks.deft_config import DeftError

logger = logging.getLogger(__name__)


def checked(run: Run, pictures: Plan, prompts: Sequence[Prompt]) -> tuple[list[Prompt], dict[str, InputPicture]]:
    """The prompts with the paths of their pictures, or without these where the model reads none; and each picture.

    :raises DeftError: for input pictures that the model cannot read, or that captions and prompts do not fit
    """
    with_inputs = [one for one in plan.pictures(pictures) if one.inputs]
    given, most = [prompt for prompt in prompts if prompt.inputs], run.data.max_input_image_size
    if most != DataOptions.max_input_image_size and not with_inputs and not given:
        logger.warning("--max_input_image_size: no effect without input pictures")
    asked = any(one.subset.captions.condition_dropout_prob for one in plan.pictures(pictures))
    texts = [*(one.caption for one in plan.pictures(pictures)), *(prompt.text for prompt in prompts)]
    if not (with_inputs or given or asked or any(map(PICTURE.search, texts))):
        return list(prompts), {}
    file = run.samples.sample_prompts or ""
    if not outline_of(run.model).takes_pictures:
        if with_inputs:
            one = with_inputs[0]
            raise DeftError(f"{one.subset.place}: {one.path.name} has input pictures, and {_model(run)} reads none")
        if asked:
            what = f"--condition_dropout_prob: {_model(run)} reads no input pictures"
            raise DeftError(f"{what}; --caption_dropout_rate leaves captions out")
        return told_unused(prompts, f"--sample_prompts {file}:"), {}
    for one in plan.pictures(pictures):
        if problem := misplaced(captions.whole(one.caption, one.subset.captions), len(one.inputs)):
            raise DeftError(f"the caption of {one.path}: {problem}")
    return _of_prompts(prompts, Path(file), most)


def _model(run: Run) -> str:
    return Path(run.model.pretrained_model_name_or_path).name


def _of_prompts(prompts: Sequence[Prompt], file: Path, most: int) -> tuple[list[Prompt], dict[str, InputPicture]]:
    """:param file: of the prompts
    :param most: pixels of a picture's longest side
    """
    option = f"--sample_prompts {file}:"
    found: list[Prompt] = []
    pictures: dict[str, InputPicture] = {}
    for prompt in prompts:
        if problem := misplaced(prompt.text, len(prompt.inputs)):
            raise DeftError(f"{option} {problem}, in '{prompt.text}'")
        paths = [_path(name, file.parent) for name in prompt.inputs]
        for name, path in zip(prompt.inputs, paths, strict=True):
            header = header_of(path)
            if header.error:
                reason = f"cannot be read ({header.error})" if path.is_file() else "no such file"
                raise DeftError(f"{option} --i {name}: {reason}, in '{prompt.text}'")
            pictures[str(path)] = input_picture(path, header, most)
        found.append(replace(prompt, inputs=tuple(map(str, paths))))
    return found, pictures


def _path(name: str, folder: Path) -> Path:
    """As it is named, or in the prompts' folder; paths of Windows are understood elsewhere too."""
    spelt = name.replace("\\", "/")
    places = (Path(name), folder / name, Path(spelt), folder / spelt)
    return next((path for path in places if path.is_file()), Path(name))
