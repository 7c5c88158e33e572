"""Buckets and epochs: what must hold for every option and every size, beside sizes known from sd-scripts."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from library.data.buckets import Buckets, Epochs, dataset_seed, mixed, regularization_repeats
from library.options.rooms import BucketOptions
from networks.deft_config import DeftError

quickly = settings(max_examples=200, deadline=None)
sides = st.integers(16, 6000)


@st.composite
def bucketed(draw, no_upscale: bool) -> BucketOptions:
    steps = draw(st.sampled_from([8, 16, 32, 64, 100, 128]))
    resolution = draw(st.tuples(st.integers(256, 1536), st.integers(256, 1536)))
    return BucketOptions(
        resolution,
        enable_bucket=True,
        min_bucket_reso=draw(st.integers(steps, min(resolution))),
        max_bucket_reso=draw(st.integers(max(resolution), 4096)),
        bucket_reso_steps=steps,
        bucket_no_upscale=no_upscale,
    )


def nearest_aspect(sizes, width, height):
    return min(abs(w / h - width / height) for w, h in sizes)


@quickly
@given(bucketed(no_upscale=False))
def test_sizes_are_whole_steps_within_the_limits_and_the_area(options):
    buckets, steps = Buckets(options), options.bucket_reso_steps
    assert buckets.sizes == sorted(set(buckets.sizes))
    for width, height in buckets.sizes:
        assert width % steps == height % steps == 0
        assert width * height <= math.prod(options.resolution)
        assert (height, width) in buckets.sizes
        assert max(width, height) <= options.max_bucket_reso + steps - 1
        assert min(width, height) > options.min_bucket_reso - steps


@quickly
@given(bucketed(no_upscale=False), sides, sides)
def test_a_picture_is_scaled_to_cover_the_bucket_nearest_to_its_shape(options, width, height):
    buckets = Buckets(options)
    fit = buckets.fit(width, height)
    assert fit.bucket in buckets.sizes
    if (width, height) in buckets.sizes:
        assert fit.bucket == fit.resized == (width, height)
    else:
        assert abs(fit.bucket[0] / fit.bucket[1] - width / height) == nearest_aspect(buckets.sizes, width, height)
    assert fit.resized[0] >= fit.bucket[0]
    assert fit.resized[1] >= fit.bucket[1]
    assert fit.resized[0] == fit.bucket[0] or fit.resized[1] == fit.bucket[1]
    scale = max(fit.bucket[0] / width, fit.bucket[1] / height)
    assert fit.resized == pytest.approx((width * scale, height * scale), abs=0.501)


@quickly
@given(bucketed(no_upscale=True), sides, sides)
def test_without_upscaling_nothing_grows_and_less_than_a_step_is_cut_off(options, width, height):
    steps, area = options.bucket_reso_steps, math.prod(options.resolution)
    buckets = Buckets(options)
    if min(width, height) * min(1, math.sqrt(area / (width * height))) < steps - 1:
        with pytest.raises(DeftError, match=f"a picture of {width}x{height} is not even {steps} pixels"):
            buckets.fit(width, height)
        return
    try:
        fit = buckets.fit(width, height)
    except DeftError:  # both sides are rounded to steps on the way
        assert min(width, height) * min(1, math.sqrt(area / (width * height))) < 2 * steps
        return
    assert min(fit.bucket) > 0
    for side, resized, bucket in zip((width, height), fit.resized, fit.bucket, strict=True):
        assert resized <= side + 1
        assert bucket % steps == 0
        assert 0 <= resized - bucket < steps
    if width * height <= area:
        assert fit.resized == (width, height)
    else:
        exact = [side * math.sqrt(area / (width * height)) for side in (width, height)]
        rounding = 1 + 0.5 / min(exact)  # of the side that is made whole steps, which the other one follows
        assert all(bucket <= side * rounding + 0.5 for bucket, side in zip(fit.bucket, exact, strict=True))
        assert fit.resized[0] % steps == 0 or fit.resized[1] % steps == 0


@quickly
@given(st.tuples(st.integers(8, 200), st.integers(8, 200)), sides, sides)
def test_without_buckets_every_picture_covers_the_resolution(eighths, width, height):
    resolution = eighths[0] * 8, eighths[1] * 8
    fit = Buckets(BucketOptions(resolution, min_bucket_reso=9999), multiple=8).fit(width, height)
    assert fit.bucket == resolution
    assert all(have >= need for have, need in zip(fit.resized, resolution, strict=True))


def test_sizes_of_sd_scripts():
    """Printed by `model_util.make_bucket_resolutions((512, 512))` and `((1024, 1024), 512, 2048, 64)`."""
    assert Buckets(BucketOptions((512, 512), enable_bucket=True)).sizes == [
        (256, 832), (256, 896), (256, 960), (256, 1024), (320, 704), (320, 768), (384, 640), (448, 576), (512, 512),
        (576, 448), (640, 384), (704, 320), (768, 320), (832, 256), (896, 256), (960, 256), (1024, 256),
    ]  # fmt: skip
    large = Buckets(BucketOptions((1024, 1024), True, 512, 2048)).sizes
    assert (len(large), large[0], large[-1]) == (33, (512, 1856), (2048, 512))


@pytest.mark.parametrize(
    ("options", "multiple", "says"),
    [
        (BucketOptions((512, 516)), 8, "--resolution 512,516: both must be multiples of 8"),
        (BucketOptions((512, 512), True, bucket_reso_steps=48), 64, "--bucket_reso_steps 48: must be a multiple of 64"),
        (BucketOptions((512, 512), True, bucket_reso_steps=0), 1, "--bucket_reso_steps 0"),
        (BucketOptions((512, 512), True, 576), 1, "--min_bucket_reso 576: must not exceed --resolution, 512"),
        (BucketOptions((512, 1088), True), 1, "--max_bucket_reso 1024: must not be less than --resolution, 1088"),
        (BucketOptions((512, 512), True, 32), 1, "--min_bucket_reso 32: must be at least --bucket_reso_steps, 64"),
    ],
)
def test_options_that_do_not_go_together_are_named(options, multiple, says):
    with pytest.raises(DeftError, match=says):
        Buckets(options, multiple)


def test_limits_are_rounded_outwards(caplog):
    """What is told of that is the options', once: buckets are made several times in a training."""
    sizes = Buckets(BucketOptions((512, 512), True, 300, 1000)).sizes
    assert (min(min(size) for size in sizes), max(max(size) for size in sizes)) == (256, 1024)
    Buckets(BucketOptions((512, 512), True, bucket_no_upscale=True))
    assert caplog.messages == []


def test_pictures_of_no_more_pixels_are_skipped():
    buckets = Buckets(BucketOptions((512, 512), skip_image_resolution=(300, 200)))
    assert buckets.skips(300, 200)
    assert buckets.skips(60000, 1)
    assert not buckets.skips(200, 301)
    assert not Buckets(BucketOptions((512, 512))).skips(1, 1)


# --- epochs ----------------------------------------------------------------------------------------------------------

pictures = st.lists(st.tuples(st.sampled_from([(512, 512), (448, 576), (576, 448)]), st.integers(0, 4)), max_size=30)
seeds = st.integers(0, 2**31)


@quickly
@given(pictures, st.integers(1, 5), seeds, st.integers(1, 4))
def test_an_epoch_shows_every_picture_as_often_as_asked_in_batches_of_one_bucket(found, batch_size, seed, epoch):
    buckets, repeats = [size for size, _ in found], [number for _, number in found]
    epochs = Epochs(buckets, repeats, batch_size, seed)
    batches = epochs.batches(epoch)
    assert len(batches) == len(epochs)
    shown = Counter(place for batch in batches for place in batch)
    assert shown == Counter({place: number for place, number in enumerate(repeats) if number})
    assert all(len({buckets[place] for place in batch}) == 1 for batch in batches)
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    short = Counter(buckets[batch[0]] for batch in batches if len(batch) < batch_size)
    assert all(number == 1 for number in short.values())  # one a bucket


@quickly
@given(pictures, seeds, st.lists(st.integers(0, 6), min_size=1, max_size=6))
def test_an_epoch_is_the_same_whenever_it_is_asked_for(found, seed, asked):
    arguments = [size for size, _ in found], [number for _, number in found], 2, seed
    epochs = Epochs(*arguments)
    for epoch in asked:
        assert epochs.batches(epoch) == Epochs(*arguments).batches(epoch)


@quickly
@given(seeds, seeds)
def test_other_epochs_and_seeds_have_other_orders(seed, other):
    assume(seed != other)
    first, second = (Epochs([(512, 512)] * 40, [1] * 40, 2, number) for number in (seed, other))
    orders = [str(first.batches(1)), str(first.batches(2)), str(second.batches(3))]
    assert len(set(orders)) == 3


def test_order_of_sd_scripts():
    """Printed by a `DreamBoothDataset` of both versions: five squares, two repeats of the first, three portraits."""
    buckets = [(64, 64)] * 5 + [(64, 128)] * 3
    epochs = Epochs(buckets, [2, 1, 1, 1, 1, 1, 1, 1], 2, dataset_seed(42))
    assert dataset_seed(42) == 478163327
    assert epochs.batches(1) == [[5], [6, 7], [0, 1], [0, 2], [4, 3]]
    assert epochs.batches(2) == [[3, 0], [2, 1], [7], [6, 5], [4, 0]]


@quickly
@given(st.integers(0, 60), st.lists(st.integers(1, 6), max_size=8))
def test_regularization_pictures_are_brought_to_as_many_as_the_others(number, repeats):
    balanced = regularization_repeats(number, repeats)
    if repeats:
        assert number <= sum(balanced) < number + max(repeats)
    used = [have for have in balanced if have]
    assert all(have >= asked for have, asked in zip(used, repeats, strict=False))
    assert balanced == used + [0] * (len(repeats) - len(used))


@quickly
@given(st.lists(st.lists(st.integers(), max_size=5), max_size=4), seeds, st.integers(1, 3))
def test_batches_of_several_data_sets_are_mixed_without_loss(batches, seed, epoch):
    order = mixed(batches, seed, epoch)
    assert sorted(order) == sorted((place, batch) for place, found in enumerate(batches) for batch in found)
    assert order == mixed(batches, seed, epoch)
