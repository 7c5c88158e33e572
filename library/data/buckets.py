"""Which size every picture is brought to, and which pictures make a batch: sd-scripts' buckets and epochs.

Facts of kohya-ss/sd-scripts at 48d368fa and v0.11.1; docs/data.md says where this differs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from library.options.rooms import BucketOptions
from networks.deft_config import DeftError

Size = tuple[int, int]  # width and height in pixels
T = TypeVar("T")


@dataclass(frozen=True)
class Fit:
    """The bucket of a picture, and what the picture is scaled to, which covers the bucket."""

    bucket: Size
    resized: Size


class Buckets:
    """The sizes of a data set.

    :param multiple: what the model needs every side to be a multiple of
    :raises DeftError: for options that do not go together
    """

    def __init__(self, options: BucketOptions, multiple: int = 1):
        self.options = options
        self.sizes: list[Size] = []  # without buckets the resolution alone; with --bucket_no_upscale none is given
        if not options.enable_bucket:
            _check_multiple("--resolution", options.resolution, multiple)
            self.sizes = [options.resolution]
            return
        steps = options.bucket_reso_steps
        if steps < 1 or steps % multiple:
            raise DeftError(f"--bucket_reso_steps {steps}: must be a multiple of {multiple}, which the model needs")
        least, most = self._limits()
        if options.bucket_no_upscale:
            return
        if least == 0:
            raise DeftError(
                f"--min_bucket_reso {options.min_bucket_reso}: must be at least --bucket_reso_steps, {steps}"
            )
        self.sizes = bucket_sizes(options.resolution, least, most, steps)

    def fit(self, width: int, height: int) -> Fit:
        """:raises DeftError: when the picture is too small or too elongated to be cut to a bucket"""
        if self.options.enable_bucket and self.options.bucket_no_upscale:
            return self._fit_without_upscaling(width, height)
        bucket = self._nearest(width, height)
        scale = bucket[1] / height if width / height > bucket[0] / bucket[1] else bucket[0] / width
        return Fit(bucket, (int(width * scale + 0.5), int(height * scale + 0.5)))

    def skips(self, width: int, height: int) -> bool:
        """Whether --skip_image_resolution leaves the picture out."""
        least = self.options.skip_image_resolution
        return least is not None and width * height <= least[0] * least[1]

    def _limits(self) -> Size:
        """The shortest and the longest side, rounded to steps."""
        options, steps = self.options, self.options.bucket_reso_steps
        least = options.min_bucket_reso // steps * steps
        most = -(-options.max_bucket_reso // steps) * steps
        if least > min(options.resolution):
            raise DeftError(f"--min_bucket_reso {least}: must not exceed --resolution, {min(options.resolution)}")
        if most < max(options.resolution):
            raise DeftError(f"--max_bucket_reso {most}: must not be less than --resolution, {max(options.resolution)}")
        return least, most

    def _nearest(self, width: int, height: int) -> Size:
        """The picture's own size where that is a bucket, else the first of the nearest aspect ratio."""
        if (width, height) in self.sizes:
            return width, height
        return min(self.sizes, key=lambda size: abs(size[0] / size[1] - width / height))

    def _fit_without_upscaling(self, width: int, height: int) -> Fit:
        """The picture, made smaller where its area is too large, cut to whole steps."""
        steps = self.options.bucket_reso_steps
        area = math.prod(self.options.resolution)
        resized = (width, height) if width * height <= area else self._shrunk(width / height, area)
        bucket = resized[0] - resized[0] % steps, resized[1] - resized[1] % steps
        if not all(bucket):
            raise DeftError(
                f"a picture of {width}x{height} is not even {steps} pixels, --bucket_reso_steps, on one side once it "
                "fits --resolution; leave it out, or do without --bucket_no_upscale"
            )
        return Fit(bucket, resized)

    def _shrunk(self, aspect: float, area: int) -> Size:
        """Of that area, the width or the height whole steps, whichever keeps the aspect ratio better."""
        width = math.sqrt(area * aspect)
        height = area / width
        by_width, by_height = self._rounded(width), self._rounded(height)
        if not (by_width and by_height and self._rounded(by_width / aspect)):
            return 0, 0
        of_width = abs(by_width / self._rounded(by_width / aspect) - aspect)
        of_height = abs(self._rounded(by_height * aspect) / by_height - aspect)
        if of_width < of_height:
            return by_width, int(by_width / aspect + 0.5)
        return int(by_height * aspect + 0.5), by_height

    def _rounded(self, side: float) -> int:
        return int(side + 0.5) // self.options.bucket_reso_steps * self.options.bucket_reso_steps


def bucket_sizes(resolution: Size, least: int, most: int, steps: int) -> list[Size]:
    """Every width in steps with the most height that the resolution's area leaves it, both ways round; sorted."""
    area = math.prod(resolution)
    square = int(math.sqrt(area) // steps) * steps
    sizes = {(square, square)}
    for width in range(least, most + 1, steps):
        height = min(most, area // width // steps * steps)
        if height >= least:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def _check_multiple(option: str, size: Size, multiple: int) -> None:
    if any(side < 1 or side % multiple for side in size):
        raise DeftError(f"{option} {size[0]},{size[1]}: both must be multiples of {multiple}")


def dataset_seed(seed: int) -> int:
    """What sd-scripts seeds its data sets with when it is started with `--seed`.

    A --validation_split without --validation_seed has drawn from the same stream before, and gives another.
    """
    return random.Random(seed).randint(0, 2**31)


def regularization_repeats(pictures: int, repeats: Sequence[int]) -> list[int]:
    """Repeats of the regularization pictures that bring them to as many as there are others; 0: not used.

    :param pictures: the others, with their repeats
    :param repeats: as the folders or the configuration give them
    """
    balanced, drawn = [0] * len(repeats), 0
    for place, number in enumerate(repeats):
        if drawn >= pictures:
            return balanced
        balanced[place] = number
        drawn += number
    while repeats and drawn < pictures:
        for place in range(min(len(repeats), pictures - drawn)):
            balanced[place] += 1
            drawn += 1
    return balanced


class Epochs:
    """The batches of every epoch, drawn from the seed alone.

    :param buckets: the size of each picture's bucket, or whatever else pictures of a batch have in common
    :param repeats: how often an epoch shows each picture
    :param seed: `dataset_seed`'s
    """

    def __init__(self, buckets: Sequence[tuple[int, ...]], repeats: Sequence[int], batch_size: int, seed: int):
        self.buckets, self.repeats, self.batch_size, self.seed = buckets, repeats, batch_size, seed
        self._start()

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self._batches)

    def batches(self, epoch: int) -> list[list[int]]:
        """The places of the pictures in each batch; a batch has pictures of one bucket.

        sd-scripts shuffles what the epoch before left, so the 100th epoch takes 100 shuffles, unless the 99th was the
        last that was asked for.

        :param epoch: 1 is the first
        """
        if epoch < self._epoch:
            self._start()
        while self._epoch < epoch:
            self._epoch += 1
            self._shuffle(self.seed + self._epoch)
        size = self.batch_size
        return [self._members[bucket][number * size : (number + 1) * size] for bucket, number in self._batches]

    def in_order(self) -> list[list[int]]:
        """The batches of an epoch as the pictures come, bucket after bucket."""
        members: dict[tuple[int, ...], list[int]] = {}
        for place, (bucket, repeats) in enumerate(zip(self.buckets, self.repeats, strict=True)):
            members.setdefault(bucket, []).extend([place] * repeats)
        size = self.batch_size
        return [places[i : i + size] for places in members.values() for i in range(0, len(places), size)]

    def _start(self) -> None:
        """As sd-scripts leaves its data sets before it seeds them."""
        members: dict[tuple[int, ...], list[int]] = {size: [] for size in sorted(set(self.buckets))}
        for place, (bucket, repeats) in enumerate(zip(self.buckets, self.repeats, strict=True)):
            members[bucket] += [place] * repeats
        self._members = list(members.values())
        self._batches = [
            (bucket, number)
            for bucket, places in enumerate(self._members)
            for number in range(math.ceil(len(places) / self.batch_size))
        ]
        self._epoch = 0
        self._shuffle(0)

    def _shuffle(self, seed: int) -> None:
        drawn = random.Random(seed)
        drawn.shuffle(self._batches)
        for places in self._members:
            drawn.shuffle(places)


def mixed(batches: Sequence[Sequence[T]], seed: int, epoch: int) -> list[tuple[int, T]]:
    """Batches of several data sets in an order drawn from the seed and the epoch, each with its data set's place.

    sd-scripts has torch's DataLoader draw it, from a generator whose state depends on all that was drawn before.
    """
    order = [(place, batch) for place, found in enumerate(batches) for batch in found]
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order
