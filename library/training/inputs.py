"""Input pictures of captions and prompts: what is wrong with them is told before a model is loaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from library.data import cache, captions, plan
from library.data.cache import Memory
from library.data.examples import Latents, decoded_input
from library.data.index import hash_of, header_of
from library.data.plan import InputPicture, Plan, input_picture
from library.data.resizing import INPUT_STEPS, center_crop
from library.models.family import Family
from library.models.loading import outline_of
from library.options.rooms import DataOptions, Run
from library.placeholders import PICTURE, misplaced
from library.prompts import Prompt, told_unused
from networks.deft_config import DeftError, reason_of

logger = logging.getLogger(__name__)


def checked(run: Run, pictures: Plan, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts with the paths of their pictures, or without these where the model reads none.

    :raises DeftError: for input pictures that the model cannot read, or that captions and prompts do not fit
    """
    with_inputs = [one for one in plan.pictures(pictures) if one.inputs]
    given, most = [prompt for prompt in prompts if prompt.inputs], run.data.max_input_image_size
    if most != DataOptions.max_input_image_size and not with_inputs and not given:
        logger.warning("--max_input_image_size: no effect without input pictures")
    asked = any(one.subset.captions.condition_dropout_prob for one in plan.pictures(pictures))
    texts = [*(one.caption for one in plan.pictures(pictures)), *(prompt.text for prompt in prompts)]
    if not (with_inputs or given or asked or any(map(PICTURE.search, texts))):
        return list(prompts)
    file = run.samples.sample_prompts or ""
    if not outline_of(run.model).takes_pictures:
        if with_inputs:
            one = with_inputs[0]
            raise DeftError(f"{one.subset.place}: {one.path.name} has input pictures, and {_model(run)} reads none")
        if asked:
            what = f"--condition_dropout_prob: {_model(run)} reads no input pictures"
            raise DeftError(f"{what}; --caption_dropout_rate leaves captions out")
        return told_unused(prompts, f"--sample_prompts {file}:")
    for one in plan.pictures(pictures):
        if problem := misplaced(captions.whole(one.caption, one.subset.captions), len(one.inputs)):
            raise DeftError(f"the caption of {one.path}: {problem}")
    return [_found(prompt, Path(file), most) for prompt in prompts]


def _model(run: Run) -> str:
    return Path(run.model.pretrained_model_name_or_path).name


def encoded(
    prompts: Sequence[Prompt], model: Family, options: DataOptions, device: torch.device
) -> list[tuple[Tensor, ...]]:
    """Latents (c, h, w) of each prompt's pictures, float32, on the CPU, as rows of --train_jsonl have them: a picture
    of the proportions of what is drawn is scaled to its size. The VAE stays on the device.

    :raises DeftError: for a picture that cannot be read
    """
    if not any(prompt.inputs for prompt in prompts):
        return [()] * len(prompts)
    model.vae.to(device)
    vae, background = cache.fingerprint(model.vae), options.transparent_background

    def latents(file: str, prompt: Prompt) -> Tensor:
        one = _picture(Path(file), prompt, options.max_input_image_size)
        try:
            pixels, content = decoded_input(one, background).pixels, hash_of(one.path) or ""
        except Exception as error:  # whatever Pillow raises
            raise DeftError(f"{file}: cannot be read ({reason_of(error)})") from None
        generator = cache.generator_of(Latents(Memory(), {one.path: content}, vae, background).key(one))
        return model.encode_image(pixels[None], [generator])[0].float().cpu()

    return [tuple(latents(file, prompt) for file in prompt.inputs) for prompt in prompts]


def _picture(path: Path, prompt: Prompt, most: int) -> InputPicture:
    """:param most: pixels of its longest side, unless it has the proportions of what is drawn
    :raises DeftError: when it is not there, cannot be read, or is too elongated
    """
    header = header_of(path)
    if header.error:
        raise DeftError(f"{path}: cannot be read ({header.error})" if path.is_file() else f"{path}: no such file")
    size, (width, height) = (header.width, header.height), (prompt.width, prompt.height)
    drawn = width - width % INPUT_STEPS, height - height % INPUT_STEPS
    as_drawn = center_crop(size, drawn, drawn) if size[0] * drawn[1] == size[1] * drawn[0] else None
    return input_picture(path, header, most, as_drawn)


def _found(prompt: Prompt, file: Path, most: int) -> Prompt:
    """With the paths of its pictures.

    :param file: of the prompts
    """
    try:
        if problem := misplaced(prompt.text, len(prompt.inputs)):
            raise DeftError(problem)
        found = [_picture(_path(name, file.parent), prompt, most) for name in prompt.inputs]
    except DeftError as error:
        raise DeftError(f"--sample_prompts {file}: {error}, in '{prompt.text}'") from None
    return replace(prompt, inputs=tuple(str(one.path) for one in found))


def _path(name: str, folder: Path) -> Path:
    """As it is named, or in the prompts' folder; paths of Windows are understood elsewhere too."""
    spelt = name.replace("\\", "/")
    places = (Path(name), folder / name, Path(spelt), folder / spelt)
    return next((path for path in places if path.is_file()), Path(name))
