"""Data sets of a few pictures, as the trainer plans and encodes them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from library.data.index import Index
from library.data.plan import Picture, Plan, pictures, plan_of
from library.data.remarks import Remarks
from library.options.rooms import BucketOptions, DataOptions, DatasetOptions, SubsetOptions
from library.training import prepare


class Model:
    """What of a model the reading of pictures needs, whose latents are the pixels."""

    multiple_of = pixels_per_latent = 1
    vae = nn.Identity()

    @staticmethod
    def encode_image(pixels, generators):
        return pixels


def options_of(root: Path, size: tuple[int, int] = (64, 64), **changes) -> DataOptions:
    """Of kohya's folders `REPEATS_NAME/` in one.

    :param changes: of every subset
    """
    named = [(folder, re.fullmatch(r"(\d+)_(.*)", folder.name)) for folder in sorted(root.iterdir())]
    subset = replace(SubsetOptions(None, caption_extension=".txt"), **changes)
    subsets = [
        replace(subset, image_dir=str(folder), num_repeats=int(match[1]), class_tokens=match[2])
        for folder, match in named
        if match and folder.is_dir() and int(match[1])
    ]
    dataset = DatasetOptions(tuple(subsets), BucketOptions(size))
    return DataOptions((dataset,), train_data_dir=str(root))


def _plan_of(options: DataOptions, root: Path) -> Plan:
    remarks = Remarks()
    plan = plan_of(options, Index(root.parent / f"{root.name} cache"), remarks)
    remarks.tell()
    return plan


def planned(root: Path, size: tuple[int, int] = (64, 64), **changes) -> Plan:
    """See `options_of`; without an index that stays."""
    return _plan_of(options_of(root, size, **changes), root)


def found(root: Path, extension: str = ".txt") -> list[Picture]:
    """All pictures."""
    return list(pictures(planned(root, caption_extension=extension)))


def read(root: Path, model, size: tuple[int, int] = (64, 64), **changes):
    """The plan of what could be read, and the latents."""
    options = options_of(root, size, **changes)
    plan = _plan_of(options, root)
    return prepare.read_pictures(options, plan, model, Accelerator(cpu=True))
