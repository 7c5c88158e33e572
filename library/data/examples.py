"""Pictures as they are trained on: decoded, scaled, cropped, mirrored; as latents, with their masks and captions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from library.data import augment, cache, captions, masks
from library.data.batches import Example, Gone, Turn
from library.data.cache import Entries
from library.data.index import alike
from library.data.pixels import Colour, read_picture
from library.data.pixels import Picture as PixelsOfFile
from library.data.plan import InputPicture, Picture, Plan, pictures
from library.data.resizing import Crop, crop_of, face_of, in_tensor
from library.data.streams import Purpose, stream
from networks.deft_config import reason_of


class View(NamedTuple):
    """A picture as it is encoded once."""

    picture: Picture
    mirrored: bool = False

    @property
    def path(self) -> Path:
        """Its file."""
        return self.picture.path

    @property
    def crop(self) -> Crop:
        """What is encoded of it; pictures whose crop is drawn are not encoded once."""
        return crop_of(self.picture.size, self.picture.buckets, self.picture.subset.augment, Random(0))


class Decoded(NamedTuple):
    """:param pixels: (3, height, width) in [-1, 1]
    :param mask: (height, width) uint8, 255 where it is trained on; None for all of it
    """

    pixels: Tensor
    mask: np.ndarray | None


def decoded_input(picture: InputPicture, background: Colour) -> Decoded:
    """:raises Exception: as `decoded`"""
    return Decoded(in_tensor(picture.crop.of(np.asarray(_read(picture.path, picture.crop, background).image))), None)


def decoded(picture: Picture, crop: Crop, mirrored: bool, background: Colour, colours: Random | None = None) -> Decoded:
    """:param colours: that changes of colour are drawn from
    :raises Exception: of many kinds, Pillow's, when the file cannot be read
    :raises DeftError: when its mask does not fit
    """
    read = _read(picture.path, crop, background)
    interpolation = picture.subset.resize_interpolation
    pixels = np.asarray(read.image)
    if colours is not None:  # of what is cut out, as sd-scripts changes it
        pixels = augment.change_colours(crop.of(pixels, interpolation), colours)
        pixels = augment.flip(pixels) if mirrored else pixels
    else:
        pixels = crop.of(pixels, interpolation, mirrored)
    mask = None
    if picture.mask is not None:
        mask = masks.read_mask(picture.mask, read.image.size)
    elif picture.subset.alpha_mask:
        mask = masks.alpha_mask(read)
    mask = None if mask is None else crop.of(mask, interpolation, mirrored)
    return Decoded(in_tensor(pixels), mask)


def _read(path: Path, crop: Crop, background: Colour) -> PixelsOfFile:
    found = read_picture(path, background)
    if found.image.size != crop.original:
        raise OSError(f"its header promises {crop.original[0]}x{crop.original[1]} pixels, not {found.image.size}")
    return found


@dataclass(frozen=True)
class Latents:
    """Of all pictures that are the same in every epoch, and of all input pictures.

    :param contents: `content_hash` of every picture and mask
    :param vae: its `cache.fingerprint`
    :param background: behind transparent pictures
    """

    entries: Entries
    contents: Mapping[Path, str]
    vae: str
    background: Colour

    def key(self, view: View | InputPicture) -> str:
        """Of a picture's entry."""
        if isinstance(view, InputPicture):
            return self._key(view.path, view.crop)
        picture, subset = view.picture, view.picture.subset
        alpha_mask = subset.alpha_mask and picture.mask is None
        mask = None if picture.mask is None else self.contents[picture.mask]
        return self._key(picture.path, view.crop, subset.resize_interpolation, view.mirrored, alpha_mask, mask)

    def _key(
        self,
        path: Path,
        crop: Crop,
        interpolation: str | None = None,
        flipped: bool = False,
        alpha_mask: bool = False,
        mask: str | None = None,
    ) -> str:
        return cache.latents_key(
            self.contents[path],
            self.vae,
            torch.float32,
            resized=crop.resized,
            crop=(*crop.place, *crop.size),
            interpolation=interpolation,
            flipped=flipped,
            background=self.background,
            alpha_mask=alpha_mask,
            mask=mask,
        )

    def duplicates(self, plan: Plan) -> list[list[Path]]:
        """Pictures with the same content, two or more each."""
        return alike({one.path: self.contents[one.path] for one in pictures(plan)}.items())

    def read(self, view: View | InputPicture) -> tuple[Tensor, Tensor | None]:
        """Latents (c, h, w) and their mask (1, h, w).

        :raises Gone: when the entry is gone, which the disk's is when somebody deletes it
        """
        entry = self.entries.read(self.key(view), check=False)
        if entry is None:
            raise Gone(f"the latents of {view.path} are gone from the cache")
        return entry["latents"], entry.get("mask")


class Drawn(NamedTuple):
    """What is drawn for a picture's turn.

    :param caption: "" where it is left out
    :param colours: that changes of colour are drawn from; None without them
    """

    caption: str
    mirrored: bool
    crop: Crop
    colours: Random | None
    inputs: tuple[InputPicture, ...] = ()


def drawn(picture: Picture, turn: Turn, seed: int, takes_pictures: bool = False) -> Drawn:
    """The same for the same turn and seed, whoever asks.

    :param takes_pictures: whether the model's family does, where a caption that is left out takes its pictures with it
    """
    subset, draw = picture.subset, {purpose: stream(purpose, seed, turn.epoch, turn.place) for purpose in Purpose}
    caption = captions.process(
        picture.caption, subset.captions, epoch=turn.epoch, step=turn.step, steps=turn.steps,
        random=draw[Purpose.CAPTION],
    )  # fmt: skip
    if draw[Purpose.CONDITION].random() < captions.condition_dropout(subset.captions, takes_pictures):
        caption = ""
    inputs = picture.inputs if caption else ()
    mirrored = subset.augment.flip_aug and augment.flips(draw[Purpose.MIRROR])
    crop = crop_of(picture.size, picture.buckets, subset.augment, draw[Purpose.CROP], face_of(picture.path))
    return Drawn(caption, mirrored, crop, draw[Purpose.COLOUR] if subset.augment.color_aug else None, inputs)


def views(plan: Plan) -> list[View]:
    """All that is encoded once: pictures, mirrored too where flip_aug asks for it."""
    return [
        View(picture, mirrored)
        for dataset in plan
        for picture in dataset.pictures
        if not dataset.varies
        for mirrored in ((False, True) if picture.subset.augment.flip_aug else (False,))
    ]


class Examples(TorchDataset):
    """What a `Turn` is trained on.

    :param latents: of pictures that are the same in every epoch
    :param weight: of regularisation pictures' losses
    :param pixels_per_latent: of a side
    :param seed: of all that is drawn
    :param takes_pictures: see `drawn`
    :param dropped: the caption where it is left out
    """

    def __init__(
        self,
        plan: Plan,
        latents: Latents,
        weight: float,
        pixels_per_latent: int,
        seed: int,
        takes_pictures: bool = False,
        dropped: str = "",
    ):
        self.plan, self.latents, self.weight, self.pixels_per_latent = plan, latents, weight, pixels_per_latent
        self.seed, self.takes_pictures, self.dropped = seed, takes_pictures, dropped

    def __len__(self) -> int:
        return sum(dataset.appearances for dataset in self.plan)

    def __getitem__(self, turn: Turn) -> Example:
        """:raises Gone: when the picture or its latents cannot be read any more"""
        dataset = self.plan[turn.dataset]
        picture = dataset.pictures[turn.picture]
        subset = picture.subset
        caption, mirrored, crop, colours, inputs = drawn(picture, turn, self.seed, self.takes_pictures)
        latents = pixels = mask = None
        if dataset.varies:
            try:
                found = decoded(picture, crop, mirrored, self.latents.background, colours)
            except Exception as error:  # whatever Pillow raises
                raise Gone(f"{picture.path}: it cannot be read any more ({reason_of(error)})") from error
            pixels = found.pixels
            if found.mask is not None:
                mask = masks.in_latents(found.mask, tuple(side // self.pixels_per_latent for side in found.mask.shape))
        else:
            latents, mask = self.latents.read(View(picture, mirrored))
        return Example(
            latents,
            pixels,
            caption or self.dropped,
            torch.tensor(crop.conditioning(mirrored), dtype=torch.float32),
            mask,
            self.weight if subset.is_reg else 1.0,
            subset.preserved,
            dataset.options.network_multiplier,
            tuple(self.latents.read(one)[0] for one in inputs),
        )
