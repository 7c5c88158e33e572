"""What stands between a model and the first step: latents, captions, batches."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator

from library.data import building, cache, masks
from library.data.batches import Loader
from library.data.buckets import Buckets
from library.data.cache import Entries, Memory, Store
from library.data.examples import Decoded, Examples, Latents, View, decoded, decoded_input, views
from library.data.index import Index, hash_of
from library.data.plan import InputPicture, Plan, pictures, unreadable_lines, without
from library.models.family import Family
from library.options.rooms import CacheOptions, DataOptions, NetworkOptions
from library.prompts import Prompt
from networks.deft_config import DeftError, reason_of
from networks.deft_progress import Bar

logger = logging.getLogger(__name__)

Item = TypeVar("Item", View, InputPicture, View | InputPicture)

WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def read_pictures(options: DataOptions, plan: Plan, model: Family, accelerator: Accelerator) -> tuple[Plan, Latents]:
    """Encodes all pictures that are the same in every epoch, and all input pictures; the VAE is put aside where that is
    all. Pictures that cannot be read are named and left out.

    :raises DeftError: when none is left
    """
    caches = options.caches
    on_disk = caches.cache_latents_to_disk
    entries: Entries = Store(caches.folder) if on_disk else Memory()
    files = [file for picture in pictures(plan) for file in picture.files]
    contents = Index(caches.folder).hashes(files)
    latents = Latents(entries, contents, cache.fingerprint(model.vae), options.transparent_background)
    given, unreadable = plan, dict(_lost(plan, contents))
    plan = without(plan, unreadable)
    inputs = [one for picture in pictures(plan) for one in picture.inputs]
    asked: list[View | InputPicture] = [*views(plan), *inputs]
    keys = [(latents.key(one), one) for one in asked]  # pictures of the same content share one
    wanted = dict(keys)

    def load(one: View | InputPicture) -> Decoded:
        files = [one.path] if isinstance(one, InputPicture) else [one.path, one.picture.mask]
        found = _decoded(options, one)
        for file in filter(None, files):  # its entry would be kept as that of what it was before
            if hash_of(file) != contents[file]:
                raise OSError(f"{file.name} has changed in the meantime; start again")
        return found

    @functools.cache  # asking a model where it is takes as long as reading a small picture
    def place() -> None:
        model.vae.to(accelerator.device)

    def make(keys: list[str], found: list[Decoded]) -> list[dict[str, torch.Tensor]]:
        place()
        pixels = torch.stack([one.pixels for one in found])
        encoded = model.encode_image(pixels, [cache.generator_of(key) for key in keys]).float()
        height, width = encoded.shape[-2:]
        return [
            {"latents": one} | ({} if of.mask is None else {"mask": masks.in_latents(of.mask, (height, width))})
            for one, of in zip(encoded, found, strict=True)
        ]

    failed = building.build(
        entries, wanted, load, make, caches.vae_batch_size, what="caching latents", unit="pictures",
        alike=lambda one: one.crop.size, check=not caches.skip_cache_check,
        process_index=accelerator.process_index if on_disk else 0,
        num_processes=accelerator.num_processes if on_disk else 1,
    )  # fmt: skip
    unreadable |= {one.path: reason_of(failed[key]) for key, one in keys if key in failed}
    unreadable |= unreadable_of([View(picture) for one in plan if one.varies for picture in one.pictures], load)
    left = _left(given, unreadable)
    in_every_step = any(dataset.varies for dataset in left)
    model.vae.to(accelerator.device if in_every_step else "cpu")
    if isinstance(entries, Memory):
        entries.place(accelerator.device)
    where = "on the disk" if on_disk else "in memory"
    number, sizes = sum(1 for _ in pictures(left)), {picture.fit.bucket for picture in pictures(left)}
    repeated = sum(dataset.appearances for dataset in left)
    told = f"{number} images, {repeated} with repeats, in {len(sizes)} size{'s' * (len(sizes) > 1)}"
    logger.info(f"{told}; latents cached {where}")
    return left, latents


def readable(options: DataOptions, plan: Plan) -> Plan:
    """What `read_pictures` would leave of a plan; nothing is encoded or kept.

    :raises DeftError: when nothing is left
    """
    asked: list[View | InputPicture] = [View(one) for one in pictures(plan)]
    asked += [one for picture in pictures(plan) for one in picture.inputs]
    return _left(plan, unreadable_of(asked, lambda one: _decoded(options, one)))


def _decoded(options: DataOptions, one: View | InputPicture) -> Decoded:
    if isinstance(one, InputPicture):
        return decoded_input(one, options.transparent_background)
    return decoded(one.picture, one.crop, one.mirrored, options.transparent_background)


def _left(plan: Plan, unreadable: Mapping[Path, str]) -> Plan:
    """The plan without these, each of which is named.

    :raises DeftError: when nothing is left
    """
    for line in unreadable_lines(plan, unreadable):
        logger.warning(line)
    left = without(plan, unreadable)
    if not left:
        path, reason = next(iter(unreadable.items()))
        raise DeftError(f"none of the {len(unreadable)} images can be read, {path} for one ({reason})")
    return left


def _lost(plan: Plan, contents: Mapping[Path, str]) -> Iterator[tuple[Path, str]]:
    """Files of a plan that could not be hashed, each with the reason; a mask costs its picture."""
    for picture in pictures(plan):
        if not {picture.path, picture.mask or picture.path} <= contents.keys():
            yield picture.path, "it cannot be read, or its mask"
        yield from ((one.path, "it cannot be read") for one in picture.inputs if one.path not in contents)


def check_sizes(plan: Plan, multiple: int) -> None:
    """:raises DeftError: for sizes that the model cannot have"""
    for dataset in plan:
        Buckets(dataset.options.buckets, multiple)


def unreadable_of(found: Sequence[Item], load: Callable[[Item], object]) -> dict[Path, str]:
    """Pictures that cannot be read, with the reason."""
    failed: dict[Path, str] = {}
    with ThreadPoolExecutor(building.WORKERS) as pool, Bar(len(found), "reading pictures", "pictures") as bar:
        for one, error in zip(found, pool.map(lambda one: _error_of(load, one), found), strict=True):
            if error is not None:
                failed[one.path] = reason_of(error)
            bar.add(1)
    return failed


def _error_of(load: Callable[[Item], object], one: Item) -> Exception | None:
    try:
        load(one)
    except Exception as error:  # whatever Pillow raises for a file costs that file at most
        return error
    return None


def loader_of(
    plan: Plan,
    seed: int,
    accumulated: int = 1,
    *,
    shuffle: bool = True,
    weight: float,
    latents: Latents,
    model: Family,
    accelerator: Accelerator,
) -> Loader:
    """:param accumulated: batches of a step
    :param weight: of regularisation pictures
    """
    examples = Examples(
        plan, latents, weight, model.pixels_per_latent, seed, model.takes_pictures, model.dropped
    )  # fmt: skip
    places = accelerator.process_index, accelerator.num_processes
    return Loader(plan, examples, seed, *places, accumulated, shuffle)


def check_text_encoders(model: Family, network: NetworkOptions, caches: CacheOptions) -> None:
    """:raises DeftError: for options that are about text encoders alone, where the model has none"""
    asked = {
        "network_train_text_encoder_only": network.network_train_text_encoder_only,
        "cache_text_encoder_outputs": caches.cache_text_encoder_outputs,
    }
    for name, value in asked.items():
        if value and not model.text_encoders:
            raise DeftError(
                f"--{name}: {type(model).__name__} has no text encoder, words go through what is trained; leave it out"
            )


def tell_what_is_cut(model: Family, texts: Sequence[tuple[str, str]]) -> None:
    """One line where texts are longer than the text encoder reads.

    :param texts: each behind what a user knows it by
    """
    rests = [(name, *found) for name, text in texts if (found := model.beyond(text))[0]]
    if rests:
        name, rest, tokens = rests[0]
        rest = rest if len(rest) <= 60 else f"... {rest[-60:]}"  # a trigger word stands last as often as first
        logger.warning(
            f"{len(rests)} of {len(texts)} captions and prompts are longer than the text encoder's {tokens} "
            f"tokens, what is behind is not read: '{rest}' in {name} for one"
        )


def tell_what_is_rounded(model: Family, prompts: Sequence[Prompt]) -> None:
    """One line where pictures are drawn smaller than they are asked for, as sd-scripts draws them without a word.

    :raises DeftError: for those of which nothing would be left
    """
    step, rounded = model.multiple_of, []
    for prompt in prompts:
        width, height = (side - side % step for side in (prompt.width, prompt.height))
        told = f"{prompt.width} x {prompt.height} of '{prompt.text}'"
        if not width or not height:
            raise DeftError(f"--sample_prompts: {told}: this model draws at least {step} x {step}")
        if (width, height) != (prompt.width, prompt.height):
            rounded.append(f"{told} as {width} x {height}")
    if rounded:
        logger.warning(f"--sample_prompts: this model draws multiples of {step} alone: {', '.join(rounded)}")
