"""What stands between a model and the first step: latents, captions, batches."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from accelerate import Accelerator

from library.data import building, cache, masks
from library.data.batches import Loader
from library.data.buckets import Buckets
from library.data.cache import Entries, Memory, Store
from library.data.examples import Decoded, Examples, Latents, View, decoded, views
from library.data.index import Index, hash_of
from library.data.plan import Picture, Plan, cannot_be_read, pictures, without
from library.models.family import Family
from library.options.rooms import CacheOptions, DataOptions, NetworkOptions
from library.prompts import Prompt
from networks.deft_config import DeftError, reason_of
from networks.deft_progress import Bar

logger = logging.getLogger(__name__)

WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def read_pictures(options: DataOptions, plan: Plan, model: Family, accelerator: Accelerator) -> tuple[Plan, Latents]:
    """Encodes all pictures that are the same in every epoch; the VAE is put aside where that is all. Pictures that
    cannot be read are named and left out.

    :raises DeftError: when none is left, or for sizes that the model cannot have
    """
    check_sizes(plan, model.multiple_of)
    caches = options.caches
    on_disk = caches.cache_latents_to_disk
    entries: Entries = Store(caches.folder) if on_disk else Memory()
    files = [file for picture in pictures(plan) for file in (picture.path, picture.mask) if file is not None]
    contents = Index(caches.folder).hashes(files)
    latents = Latents(entries, contents, cache.fingerprint(model.vae), options.transparent_background)
    lost = [picture for picture in pictures(plan) if {picture.path, picture.mask or picture.path} - contents.keys()]
    unreadable = {picture.path: "it cannot be read, or its mask" for picture in lost}
    plan = without(plan, unreadable)
    keys = [(latents.key(view), view) for view in views(plan)]  # pictures of the same content share one
    wanted = dict(keys)

    def load(view: View) -> Decoded:
        found = decoded(view.picture, view.crop, view.mirrored, options.transparent_background)
        for file in (view.picture.path, view.picture.mask):  # its entry would be kept as that of what it was before
            if file is not None and hash_of(file) != contents[file]:
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
        alike=lambda view: view.crop.size, check=not caches.skip_cache_check,
        process_index=accelerator.process_index if on_disk else 0,
        num_processes=accelerator.num_processes if on_disk else 1,
    )  # fmt: skip
    unreadable |= {view.picture.path: reason_of(failed[key]) for key, view in keys if key in failed}
    unreadable |= unreadable_of([picture for one in plan if one.varies for picture in one.pictures], load)
    for path, reason in unreadable.items():
        logger.warning(cannot_be_read(path, reason))
    left = without(plan, unreadable)
    in_every_step = any(dataset.varies for dataset in left)
    model.vae.to(accelerator.device if in_every_step else "cpu")
    if not left:
        path, reason = next(iter(unreadable.items()))
        raise DeftError(f"none of the {len(unreadable)} images can be read, {path} for one ({reason})")
    where = "on the disk" if on_disk else "in memory"
    number, sizes = sum(1 for _ in pictures(left)), {picture.fit.bucket for picture in pictures(left)}
    repeated = sum(dataset.appearances for dataset in left)
    told = f"{number} images, {repeated} with repeats, in {len(sizes)} size{'s' * (len(sizes) > 1)}"
    logger.info(f"{told}; latents cached {where}")
    return left, latents


def check_sizes(plan: Plan, multiple: int) -> None:
    """:raises DeftError: for sizes that the model cannot have"""
    for dataset in plan:
        Buckets(dataset.options.buckets, multiple)


def unreadable_of(found: Sequence[Picture], load: Callable[[View], object]) -> dict[Path, str]:
    """Pictures that cannot be read, with the reason."""
    failed: dict[Path, str] = {}
    with ThreadPoolExecutor(building.WORKERS) as pool, Bar(len(found), "reading pictures", "pictures") as bar:
        for picture, error in zip(found, pool.map(lambda one: _error_of(load, View(one)), found), strict=True):
            if error is not None:
                failed[picture.path] = reason_of(error)
            bar.add(1)
    return failed


def _error_of(load: Callable[[View], object], view: View) -> Exception | None:
    try:
        load(view)
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
    examples = Examples(plan, latents, weight, model.pixels_per_latent, seed)
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
