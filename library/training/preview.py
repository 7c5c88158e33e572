"""--debug_dataset: gathers what would be trained on, for `library.data.page`, without reading a model's weights."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch.utils.data import Dataset

from library.data import advice, page
from library.data.advice import Facts
from library.data.batches import Loader
from library.data.examples import View, decoded, decoded_input
from library.data.index import Index
from library.data.masks import read_mask
from library.data.page import Preview
from library.data.pixels import Colour, readable_formats
from library.data.plan import Plan, divided, pictures, unreadable_lines, without
from library.models.loading import outline_of
from library.models.outline import Encoder
from library.options.rooms import Run
from library.training import prepare
from library.training.given import Given
from library.training.state import Length
from networks.deft_config import DeftError

logger = logging.getLogger(__name__)

QUICK = ("JPEG", "MPO")  # Pillow decodes them at an eighth of their size in an eighth of the time


class _NoExamples(Dataset):
    """Turns are asked for alone."""


def write(run: Run, files: Given) -> list[Path]:
    """A page and a contact sheet in --output_dir; their files.

    :raises DeftError: for sizes that the model cannot have, when no picture is left, or nothing can be written
    """
    outline, remarks = outline_of(run.model), files.remarks
    prepare.check_sizes(files.plan, outline.multiple_of)
    plan, background = files.plan, run.data.transparent_background
    targets = [View(one) for one in pictures(plan)]
    inputs = {one.path: one for picture in pictures(plan) for one in picture.inputs}
    unreadable = prepare.unreadable_of(targets, lambda view: _check(view, background))
    unreadable |= prepare.unreadable_of(list(inputs.values()), lambda one: decoded_input(one, background))
    for path, line in zip(unreadable, unreadable_lines(plan, unreadable), strict=True):
        remarks.add(line, path)
        logger.warning(line)
    plan = without(plan, unreadable)
    if not plan:
        path, reason = next(iter(unreadable.items()))
        raise DeftError(f"none of the {len(unreadable)} images can be read, {path} for one ({reason})")
    duplicates = Index(run.data.caches.folder).duplicates(one.path for one in pictures(plan))
    seed = random.randrange(2**32) if run.process.seed is None else run.process.seed
    trained, kept = divided(plan, seed)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    loaders = [
        Loader(trained, _NoExamples(), seed, process, processes, run.loop.gradient_accumulation_steps)
        for process in range(processes)
    ]
    length = Length.of(run.loop, len(loaders[0]))
    for loader in loaders:
        loader.steps = length.steps
    facts = Facts(loaders[0], kept, run.preservation.trigger_word, duplicates, _cut(plan, outline.encoders))
    of_validation = seed if run.validation.validation_seed is None else run.validation.validation_seed
    preview = Preview(
        run.saves.output_name,
        run.model.pretrained_model_name_or_path,
        loaders,
        Loader(kept, _NoExamples(), of_validation, shuffle=False) if kept else None,
        length.epochs,
        run.process.seed is not None,
        outline.encoders,
        list(advice.advice(facts)),
        dict(zip(remarks.lines(), remarks.files.values(), strict=True)),
        duplicates,
        background,
        outline.takes_pictures,
    )
    return page.write(preview, Path(run.saves.output_dir))


def _check(view: View, background: Colour) -> None:
    """:raises Exception: of many kinds, when the picture cannot be decoded, or its mask"""
    picture = view.picture
    with Image.open(picture.path, formats=sorted(set(readable_formats().values()))) as image:
        if image.format in QUICK:
            image.draft(image.mode, (1, 1))
            image.load()
            if picture.mask is not None:
                read_mask(picture.mask, picture.size)
            return
    decoded(picture, view.crop, False, background)


def _cut(plan: Plan, encoders: Sequence[Encoder]) -> list[Path]:
    """Pictures whose captions are longer than the last reads: the first words of FLUX.1's are enough for CLIP."""
    if not encoders:
        return []
    encoder = encoders[-1]
    texts = {one.path: advice.text_of(one) for one in pictures(plan)}
    return [path for path, caption in texts.items() if len(encoder.ids(caption)) > encoder.length]
