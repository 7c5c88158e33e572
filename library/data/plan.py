"""What is trained on: pictures with their captions, repeats and sizes, before any is decoded."""

from __future__ import annotations

import hashlib
import logging
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from library.data.buckets import Buckets, Fit, regularization_repeats
from library.data.folders import Found, look_into, pictures_of
from library.data.index import Header, Index
from library.data.masks import find_masks
from library.data.remarks import Remarks, printable
from library.data.resizing import Crop, center_crop, face_of, input_crop
from library.options.rooms import DataOptions, DatasetOptions, SubsetOptions
from networks.deft_config import DeftError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InputPicture:
    """A picture that a caption speaks of, and what of it the model reads."""

    path: Path
    crop: Crop


@dataclass(frozen=True)
class Picture:
    """:param size: width and height of the file, upright
    :param fit: the size that it is scaled to, and the bucket that is cut out of that
    :param buckets: that it was fitted to
    :param mask: the file of its mask
    :param inputs: that its caption speaks of
    """

    path: Path
    caption: str
    subset: SubsetOptions
    repeats: int
    size: tuple[int, int]
    fit: Fit
    buckets: Buckets
    mask: Path | None = None
    inputs: tuple[InputPicture, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """All that it is made of."""
        mask = () if self.mask is None else (self.mask,)
        return (self.path, *mask, *(one.path for one in self.inputs))

    @property
    def alike(self) -> tuple[int, int, int]:
        """What pictures of a batch have in common: the size and, for the model reads both in one row, how many pixels
        the input pictures have together."""
        return (*self.fit.bucket, sum(math.prod(one.crop.size) for one in self.inputs))

    @property
    def varies(self) -> bool:
        """Whether its own pixels are others in every epoch, beyond being mirrored."""
        augment = self.subset.augment
        return augment.varies and (augment.random_crop or augment.color_aug or face_of(self.path) is not None)


@dataclass(frozen=True)
class Dataset:
    """Pictures that share buckets and batches."""

    options: DatasetOptions
    pictures: tuple[Picture, ...]

    @property
    def varies(self) -> bool:
        """Whether some of its pictures may vary. All are encoded then in every step, since they share batches."""
        return any(subset.augment.varies for subset in self.options.subsets)

    @property
    def appearances(self) -> int:
        """Of pictures in an epoch."""
        return sum(picture.repeats for picture in self.pictures)

    def alike(self) -> Counter[tuple[int, int, int]]:
        """What pictures of a batch have in common -> how many pictures of an epoch have that."""
        counts: Counter[tuple[int, int, int]] = Counter()
        for picture in self.pictures:
            counts[picture.alike] += picture.repeats
        return counts

    def batches(self) -> Counter[tuple[int, int]]:
        """(width, height) -> batches of an epoch."""
        counts: Counter[tuple[int, int]] = Counter()
        for (width, height, _), number in self.alike().items():
            counts[width, height] += math.ceil(number / self.options.batch_size)
        return counts

    def buckets(self) -> dict[tuple[int, int], int]:
        """(width, height) -> how many pictures of an epoch are of that size, smallest sizes first."""
        counts: Counter[tuple[int, int]] = Counter()
        for picture in self.pictures:
            counts[picture.fit.bucket] += picture.repeats
        return dict(sorted(counts.items()))


Plan = tuple[Dataset, ...]


def pictures(plan: Plan) -> Iterator[Picture]:
    """Of all data sets, in their order."""
    return (picture for dataset in plan for picture in dataset.pictures)


def by_subset(found: Iterable[Picture]) -> Iterator[tuple[SubsetOptions, list[Picture]]]:
    """Each subset with its pictures, in their order."""
    groups: dict[int, list[Picture]] = {}
    for picture in found:
        groups.setdefault(id(picture.subset), []).append(picture)
    return ((group[0].subset, group) for group in groups.values())


def fingerprint(plan: Plan, contents: Mapping[Path, str]) -> str:
    """Of what is trained on: names, captions, repeats, sizes and contents, wherever the folders are.

    :param contents: `cache.content_hash` of all their files
    """
    facts = []
    for p in pictures(plan):
        mask = None if p.mask is None else contents[p.mask]
        inputs = ((contents[one.path], one.crop) for one in p.inputs)
        facts.append((p.path.name, p.caption, p.repeats, p.fit, contents[p.path], mask, *inputs))
    return hashlib.sha256(repr(facts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def plan_of(options: DataOptions, index: Index, remarks: Remarks) -> Plan:
    """All pictures of all data sets.

    :param remarks: learns of what is not used
    :raises DeftError: for folders and files that are missing or hold nothing to train on
    """
    for root, option in ((options.train_data_dir, "train_data_dir"), (options.reg_data_dir, "reg_data_dir")):
        if root is not None:
            look_into(root, f"--{option}", remarks)
    listed = [[(subset, pictures_of(subset, remarks)) for subset in one.subsets] for one in options.datasets]
    paths = [found.path for subsets in listed for _, group in subsets for found in group]
    inputs = [path for subsets in listed for _, group in subsets for found in group for path in found.inputs]
    headers = index.contents([*paths, *inputs])
    plan = []
    for one, subsets in zip(options.datasets, listed, strict=True):
        buckets = Buckets(one.buckets)
        found: list[Picture] = []
        for subset, group in subsets:
            masks, most = _masks(options, subset, group), options.max_input_image_size
            found += _fitted(group, subset, headers, masks, buckets, most, remarks)
        if any(not picture.subset.is_reg for picture in found):
            plan.append(Dataset(one, tuple(_balanced(found, remarks))))
    told = remarks.lines()
    if paths and all(headers[path].error for path in paths):
        raise DeftError(f"none of the {len(paths)} images can be read, {paths[0]} for one ({headers[paths[0]].error})")
    if not plan:
        raise DeftError("; ".join([_nothing(options), *told]))
    return tuple(plan)


def cannot_be_read(path: Path, reason: str) -> str:
    """What is said of a picture that is left out for it."""
    return printable(f"{path}: left out, it cannot be read ({reason})")


def unreadable_lines(plan: Plan, unreadable: Mapping[Path, str]) -> Iterator[str]:
    """The same of some files of a plan, each with how many rows it takes along as an input picture.

    :param unreadable: with the reason of each
    """
    rows = Counter(path for picture in pictures(plan) for path in {one.path for one in picture.inputs})
    for path, reason in unreadable.items():
        more = f"; an input picture of {rows[path]} row{'s' * (rows[path] > 1)}, left out with it" * (path in rows)
        yield f"{cannot_be_read(path, reason)}{more}"


def _nothing(options: DataOptions) -> str:
    subsets = [subset for one in options.datasets for subset in one.subsets]
    rows = any(subset.train_jsonl for subset in subsets)
    if options.train_data_dir is not None and not rows:
        root = Path(options.train_data_dir)
        return f"--train_data_dir {root}: no images; they belong into folders named as in {root / '10_sks cat'}"
    names = [str(subset.place) for subset in subsets]
    of_files = "--train_jsonl" if rows else "--in_json"
    option = f"--dataset_config {options.dataset_config}" if options.dataset_config else of_files
    return f"{option}: no images to train on in {', '.join(names) or 'it'}"


def _masks(options: DataOptions, subset: SubsetOptions, group: Sequence[Found]) -> list[Path] | list[None]:
    """Of each picture, where masks are asked for."""
    if subset.conditioning_data_dir is None or not options.masked_loss or not group:
        return [None] * len(group)
    return find_masks(subset.conditioning_data_dir, [one.path for one in group])


def _fitted(
    group: Sequence[Found],
    subset: SubsetOptions,
    headers: dict[Path, Header],
    masks: Sequence[Path | None],
    buckets: Buckets,
    most: int,
    remarks: Remarks,
) -> Iterator[Picture]:
    """Those that can be read, with their input pictures, and are large enough.

    :param most: pixels of an input picture's longest side
    """
    for one, mask in zip(group, masks, strict=True):
        header = headers[one.path]
        size = header.width, header.height
        if unread := [path for path in (one.path, *one.inputs) if headers[path].error]:
            more = "; an input picture of {n} row{s}, left out with it" * (unread[0] != one.path)
            remarks.add(cannot_be_read(unread[0], headers[unread[0]].error) + more, unread[0])
        elif buckets.skips(*size):
            remarks.add("{n} picture{s} ({one}) left out: --skip_image_resolution", one.path)
        else:
            try:
                fit = buckets.fit(*size)
                wanted = center_crop(size, fit.resized, fit.bucket)
                inputs = tuple(input_picture(path, headers[path], most, wanted) for path in one.inputs)
            except DeftError as error:
                remarks.add(f"{one.path}: left out, {error}", one.path)
                continue
            if header.alpha and not subset.alpha_mask:
                remarks.add(
                    "{n} picture{s} ({one}) with an alpha channel: transparent parts lie on --transparent_background",
                    one.path,
                )
            if header.frames > 1:
                remarks.add("{n} picture{s} of several frames ({one}): only the first is used", one.path)
            yield Picture(one.path, one.caption, subset, subset.num_repeats, size, fit, buckets, mask, inputs)


def input_picture(path: Path, header: Header, most: int, wanted: Crop | None) -> InputPicture:
    """What is read of it: one of the wanted picture's size is scaled and cut as that is, so that both show the same.

    :param most: pixels of the longest side of others
    :param wanted: what is done with the wanted picture
    :raises DeftError: when it is too elongated
    """
    size = header.width, header.height
    return InputPicture(path, wanted if wanted is not None and wanted.original == size else input_crop(size, most))


def _balanced(found: list[Picture], remarks: Remarks) -> Iterator[Picture]:
    """Regularisation pictures as often as those that are trained on."""
    trained = [picture for picture in found if not picture.subset.is_reg]
    regular = [picture for picture in found if picture.subset.is_reg]
    yield from trained
    if not regular:
        return
    wanted, own = sum(one.repeats for one in trained), [one.subset.num_repeats for one in regular]
    if wanted < sum(own):
        remarks.add("more regularisation pictures ({one}) than pictures to train on: some of them are not used",
                    regular[0].path)  # fmt: skip
    balanced = zip(regular, regularization_repeats(wanted, own), strict=True)
    yield from (replace(picture, repeats=repeats) for picture, repeats in balanced if repeats)


def divided(plan: Plan, seed: int) -> tuple[Plan, Plan]:
    """What is trained on, and of each subset the share that its validation_split keeps apart, chosen as sd-scripts
    chooses it.

    :param seed: where a subset has no validation_seed
    :raises DeftError: when none is left to train on
    """
    trained, kept = [], []
    for dataset in plan:
        parts: tuple[list[Picture], list[Picture]] = ([], [])
        for _, group in by_subset(dataset.pictures):
            for part, found in zip(parts, _split(group, seed), strict=True):
                part += found
        of_training = _balanced(parts[0], Remarks()) if parts[1] else parts[0]  # what is left is less than it was
        trained.append(replace(dataset, pictures=tuple(of_training)))
        kept.append(replace(dataset, pictures=tuple(replace(picture, repeats=1) for picture in parts[1])))
    asked = [share for one in plan for picture in one.pictures if (share := picture.subset.validation_split)]
    if asked and not any(dataset.pictures for dataset in kept):
        logger.warning(f"--validation_split {asked[0]}: less than a picture of every folder; nothing is validated")
    if number := sum(len(dataset.pictures) for dataset in kept):
        logger.info(f"{number} of the images are kept apart to validate on")
    if not any(dataset.pictures for dataset in trained):
        raise DeftError(f"--validation_split {asked[0]}: leaves no picture to train on")
    return _filled(trained), _filled(kept)


def _split(group: list[Picture], seed: int) -> tuple[list[Picture], list[Picture]]:
    subset = group[0].subset
    if not subset.validation_split or subset.is_reg:
        return group, []
    shuffled = list(group)
    random.Random(seed if subset.validation_seed is None else subset.validation_seed).shuffle(shuffled)
    number = math.ceil(len(shuffled) * (1 - subset.validation_split))
    return shuffled[:number], shuffled[number:]


def without(plan: Plan, left_out: Iterable[Path]) -> Plan:
    """The plan but for some pictures, and for those whose input pictures they are."""
    gone = set(left_out)
    if not gone:
        return _filled(plan)

    def stays(picture: Picture) -> bool:
        return gone.isdisjoint((picture.path, *(one.path for one in picture.inputs)))

    return _filled([replace(one, pictures=tuple(filter(stays, one.pictures))) for one in plan])


def _filled(plan: Iterable[Dataset]) -> Plan:
    return tuple(dataset for dataset in plan if dataset.pictures)
