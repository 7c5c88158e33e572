"""Scaling, crops, faces, colours, and the sizes that SDXL is told: what holds for every picture and option."""

from __future__ import annotations

import math
import random

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from library.data.augment import change_colours, flip, flips
from library.data.buckets import Buckets
from library.data.resizing import Crop, Face, center_crop, crop_of, face_crop, face_of, in_tensor, random_crop, resize
from library.options.rooms import AugmentOptions, BucketOptions
from networks.deft_config import DeftError

quickly = settings(max_examples=150, deadline=None)
sides = st.integers(8, 300)
sizes = st.tuples(sides, sides)
NAMES = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")
BUCKETS = {
    "buckets": Buckets(BucketOptions((64, 64), True, 32, 128, 16)),
    "no upscale": Buckets(BucketOptions((64, 64), True, 32, 128, 8, True)),
    "none": Buckets(BucketOptions((64, 48))),
}


def noise(size, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (size[1], size[0], channels), np.uint8)


def where(size) -> np.ndarray:
    """Each pixel's column and row, modulo 256, so that a crop shows where it came from."""
    columns, rows = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    return np.stack([columns % 256, rows % 256, columns // 256], 2).astype(np.uint8)


# --- scaling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, *NAMES])
@pytest.mark.parametrize("size", [(20, 30), (90, 70), (60, 50), (20, 90)])
def test_every_interpolation_gives_that_size_and_leaves_an_even_colour_alone(name, size):
    even = np.full((50, 60, 3), (200, 40, 10), np.uint8)
    assert (resize(even, size, name) == even[0, 0]).all()
    assert resize(noise((60, 50), 4), size, name).shape == (size[1], size[0], 4)
    assert resize(noise((60, 50), 1)[:, :, 0], size, name).shape == (size[1], size[0])


@pytest.mark.parametrize("size", [(20, 30), (90, 70), (20, 90)])
def test_the_libraries_are_those_of_sd_scripts(size):
    image = noise((60, 50))
    pillow = {name: np.asarray(Image.fromarray(image).resize(size, getattr(Image.Resampling, name.upper())))
              for name in ("lanczos", "box")}  # fmt: skip
    opencv = {"area": cv2.INTER_AREA, "bilinear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC}
    wanted = pillow | {name: cv2.resize(image, size, interpolation=kind) for name, kind in opencv.items()}
    for name, pixels in wanted.items():
        np.testing.assert_array_equal(resize(image, size, name), pixels)
    larger = size[0] > 60 or size[1] > 50
    np.testing.assert_array_equal(resize(image, size), wanted["lanczos" if larger else "area"])


@quickly
@given(st.integers(1, 400), st.integers(1, 400))
def test_nearest_takes_the_pixel_under_the_middle_of_the_new_one(length, size):
    places = resize(np.arange(length, dtype=np.uint16)[None], (size, 1), "nearest")[0].astype(int)
    middles = (np.arange(size) + 0.5) * length / size
    assert np.abs(places + 0.5 - middles).max() <= 0.5 + 0.01  # a tie goes either way
    assert sorted(places) == places.tolist()


def test_a_wrong_name_is_told():
    with pytest.raises(DeftError, match=r"--resize_interpolation lanczso: allowed are area, .*did you mean 'lanczos'"):
        resize(noise((60, 50)), (10, 10), "lanczso")


def test_pixels_become_numbers_from_minus_one_to_one():
    tensor = in_tensor(np.array([[[0, 255, 51]]], np.uint8))
    assert tensor.dtype == torch.float32
    assert tensor.flatten().tolist() == pytest.approx([-1, 1, -0.6])


# --- crops -----------------------------------------------------------------------------------------------------------


@quickly
@given(st.sampled_from(list(BUCKETS)), sizes, st.booleans(), st.integers())
def test_a_crop_lies_within_the_picture_and_fills_the_bucket(kind, size, anywhere, seed):
    buckets = BUCKETS[kind]
    try:
        fit = buckets.fit(*size)
    except DeftError:
        return
    crop = crop_of(size, buckets, AugmentOptions(random_crop=anywhere), random.Random(seed))
    assert crop.size == fit.bucket
    for place, side, length in zip(crop.place, crop.size, crop.resized, strict=True):
        assert 0 <= place <= length - side
    assert crop.of(noise(size)).shape == (crop.size[1], crop.size[0], 3)
    original_height, original_width, top, left, height, width = crop.conditioning()
    assert (width, height) == crop.size
    assert (original_width, original_height) == (size if crop.told_of_file else crop.size)
    assert 0 <= top < max(height, 1)
    assert 0 <= left < max(width, 1)


@quickly
@given(sizes, st.integers())
def test_a_random_crop_keeps_the_scale_with_buckets_and_takes_none_without(size, seed):
    anywhere = AugmentOptions(random_crop=True)
    fit = BUCKETS["buckets"].fit(*size)
    assert crop_of(size, BUCKETS["buckets"], anywhere, random.Random(seed)).resized == fit.resized
    crop = crop_of(size, BUCKETS["none"], anywhere, random.Random(seed))
    fits = size[0] >= 64 and size[1] >= 48
    assert crop.resized == (size if fits else BUCKETS["none"].fit(*size).resized)


def test_a_crop_is_the_part_that_it_names():
    picture = where((300, 100))
    crop = Crop((300, 100), (300, 100), (20, 30), (260, 40))
    np.testing.assert_array_equal(crop.of(picture), picture[30:70, 20:280])
    np.testing.assert_array_equal(crop.of(picture, flipped=True), picture[30:70, 20:280][:, ::-1])
    np.testing.assert_array_equal(crop.of(picture[:, :, 0]), picture[30:70, 20:280, 0])
    assert center_crop((300, 100), (301, 100), (260, 40)).place == (20, 30)


def test_random_crops_reach_every_place():
    drawn = random.Random(0)
    places = {random_crop((10, 10), (12, 11), (10, 10), drawn).place for _ in range(200)}
    assert places == {(left, top) for left in range(3) for top in range(2)}


@pytest.mark.parametrize(
    ("original", "bucket", "sizes", "flipped"),
    [  # printed by sd-scripts' BucketManager.get_crop_ltrb, and flipped as its data sets do it
        ((1000, 1000), (512, 512), (1000, 1000, 0, 0, 512, 512), 0),
        ((1500, 1000), (576, 448), (1000, 1500, 32, 0, 448, 576), 0),
        ((700, 1300), (384, 640), (1300, 700, 0, 19, 640, 384), 20),
        ((1003, 377), (832, 256), (377, 1003, 0, 75, 256, 832), 75),
    ],
)
def test_sdxl_is_told_the_margins_of_the_whole_picture_in_its_bucket(original, bucket, sizes, flipped):
    crop = center_crop(original, bucket, bucket)
    assert crop.conditioning() == sizes
    assert crop.conditioning(flipped=True) == (*sizes[:3], flipped, *sizes[4:])


def test_sdxl_is_told_of_unscaled_crops_as_of_pictures_of_their_own():
    crop = crop_of((100, 90), BUCKETS["none"], AugmentOptions(random_crop=True), random.Random(0))
    assert crop.conditioning() == (48, 64, 0, 0, 48, 64)
    assert crop.conditioning(flipped=True) == (48, 64, 0, 64, 48, 64)


# --- faces -----------------------------------------------------------------------------------------------------------


def test_faces_stand_in_file_names():
    assert face_of("folder/anna_at_sea_120_80_40_50.png") == Face(120, 80, 40, 50)
    assert face_of("a_1_2_3_4.jpg") == Face(1, 2, 3, 4)
    for name in ("1_2_3_4.png", "a_b_c_d_e.png", "a_0_2_3_4.png", "a_5_5_0_0.png", "a.png", "a_1_2_3_x.png"):
        assert face_of(name) is None


@quickly
@given(sizes, st.tuples(st.floats(1, 6), st.floats(1, 6)), st.booleans(), st.integers(), st.data())
def test_a_face_crop_stays_within_the_picture_and_has_the_face_as_large_as_asked(size, lengths, anywhere, seed, data):
    size = size[0] + 64, size[1] + 48
    face = Face(
        data.draw(st.integers(1, size[0])), data.draw(st.integers(0, size[1])), *data.draw(st.tuples(sides, sides))
    )
    crop = face_crop(size, (64, 48), face, tuple(sorted(lengths)), anywhere, random.Random(seed))
    assert all(0 <= p <= r - s for p, r, s in zip(crop.place, crop.resized, crop.size, strict=True))
    scale = crop.resized[0] / size[0]
    largest = max(face.width, face.height) * scale
    covers = max(64 / size[0], 48 / size[1])
    if covers + 0.02 < scale < 0.98:  # neither the whole picture nor more than it has
        assert 48 / max(lengths) - 3 <= largest <= 48 / min(lengths) + 3


def test_the_face_is_in_the_middle():
    crop = face_crop((640, 480), (64, 48), Face(320, 200, 24, 24), (2.0, 2.0), False, random.Random(0))
    assert (crop.resized, crop.place) == ((640, 480), (320 - 32, 200 - 24))
    corner = face_crop((640, 480), (64, 48), Face(1, 470, 24, 24), (2.0, 2.0), False, random.Random(0))
    assert corner.place == (0, 480 - 48)


def test_faces_count_without_buckets_alone():
    augment, face = AugmentOptions(face_crop_aug_range=(2.0, 2.0)), Face(10, 10, 8, 8)
    bucketed = crop_of((200, 150), BUCKETS["buckets"], augment, random.Random(0), face)
    assert bucketed == crop_of((200, 150), BUCKETS["buckets"], AugmentOptions(), random.Random(0))
    assert crop_of((200, 150), BUCKETS["none"], augment, random.Random(0), face).place == (0, 0)
    small = crop_of((40, 150), BUCKETS["none"], augment, random.Random(0), face)
    assert small == crop_of((40, 150), BUCKETS["none"], AugmentOptions(), random.Random(0))


# --- augmentation ----------------------------------------------------------------------------------------------------


def test_half_are_flipped():
    drawn = random.Random(0)
    assert 450 < sum(flips(drawn) for _ in range(1000)) < 550
    image = where((10, 4))
    np.testing.assert_array_equal(flip(flip(image)), image)
    assert (flip(image)[:, 0] == image[:, -1]).all()


def test_a_third_get_other_colours_by_hue_or_by_gamma():
    image, drawn = noise((16, 16)), random.Random(0)
    kept = image.copy()
    changed = [change_colours(image, drawn) for _ in range(600)]
    np.testing.assert_array_equal(image, kept)
    others = [c for c in changed if not np.array_equal(c, image)]
    assert 150 < len(others) < 250
    # gamma keeps the order of all values; another hue keeps each pixel's largest and smallest
    order = np.argsort(image.ravel(), kind="stable")
    gamma = [c for c in others if (np.diff(c.ravel()[order].astype(int)) >= 0).all()]
    hue = [c for c in others if np.abs(c.max(2).astype(int) - image.max(2)).max() <= 1]
    assert {id(c) for c in others} == {id(c) for c in gamma + hue}  # a very small change may be either
    assert min(len(gamma), len(hue)) > 60


@quickly
@given(st.integers())
def test_the_hue_moves_by_less_than_nine_half_degrees(seed):
    image = np.full((2, 2, 3), (10, 40, 200), np.uint8)
    changed = change_colours(image, random.Random(seed))
    hue, before = (int(cv2.cvtColor(c, cv2.COLOR_BGR2HSV)[0, 0, 0]) for c in (changed, image))
    if changed.max() == image.max():
        assert min(abs(hue - before), 180 - abs(hue - before)) <= 9
    else:
        assert math.log(int(changed.max())) / math.log(200) == pytest.approx(1, abs=0.051)
