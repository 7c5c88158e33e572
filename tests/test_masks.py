"""Masks: found by name, read as they look, refused when they do not fit, and reduced to latents; sizes from headers."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from library.data.index import header_of
from library.data.masks import alpha_mask, find_masks, in_latents, read_mask, stacked
from library.data.pixels import read_picture, readable_formats
from library.data.resizing import center_crop
from networks.deft_config import DeftError


def folder_of(folder: Path, *names: str) -> list[Path]:
    folder.mkdir()
    for name in names:
        Image.new("L", (8, 8)).save(folder / name)
    return [folder / name for name in names]


def test_masks_are_found_by_name_whatever_the_extension_and_the_case(tmp_path, caplog):
    images = [Path(name) for name in ("a.jpg", "B.PNG", "c d.[x].webp")]
    masks = folder_of(tmp_path / "masks", "a.png", "b.bmp", "c d.[x].png", "d.png")
    assert find_masks(tmp_path / "masks", images) == masks[:3]
    assert caplog.messages == [f"--conditioning_data_dir {tmp_path / 'masks'}: no picture for d.png"]


def test_the_very_name_goes_before_another_case(tmp_path):
    masks = folder_of(tmp_path / "masks", "A.png", "a.jpg", "a.png")
    assert find_masks(tmp_path / "masks", [Path("a.webp"), Path("A.webp")]) == [masks[1], masks[0]]


def test_a_picture_without_its_mask_is_named_in_one_line(tmp_path):
    folder_of(tmp_path / "masks", "a.png")
    with pytest.raises(DeftError, match=r"no mask for b\.png and 1 more; add pictures of the same name") as error:
        find_masks(tmp_path / "masks", [Path("a.png"), Path("b.png"), Path("c.png")])
    assert "\n" not in str(error.value)
    with pytest.raises(DeftError, match="no such folder"):
        find_masks(tmp_path / "none", [])


@pytest.mark.parametrize(
    ("mask", "fits"),
    [((60, 40), True), ((30, 20), True), ((120, 80), True), ((61, 41), True), ((40, 60), False), ((60, 60), False)],
)
def test_a_mask_has_the_pictures_proportions(tmp_path, mask, fits):
    Image.new("L", mask, 128).save(tmp_path / "m.png")
    if fits:
        assert read_mask(tmp_path / "m.png", (60, 40)).shape == mask[::-1]
        return
    with pytest.raises(DeftError, match=rf"m\.png: the mask has {mask[0]}x{mask[1]} pixels, its picture 60x40"):
        read_mask(tmp_path / "m.png", (60, 40))


def test_a_mask_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "m.png").write_bytes(b"no picture")
    with pytest.raises(DeftError, match=r"m\.png: the mask cannot be read \(cannot identify"):
        read_mask(tmp_path / "m.png", (8, 8))


def test_a_mask_is_its_red_channel_upright_and_black_where_it_is_transparent(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    values = np.arange(24, dtype=np.uint8).reshape(4, 6)
    Image.merge("RGB", [Image.fromarray(values)] + [Image.new("L", (6, 4), 99)] * 2).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png", (4, 6)), np.rot90(values, -1))
    Image.new("RGBA", (6, 4), (255, 255, 255, 0)).save(tmp_path / "b.png")
    assert not read_mask(tmp_path / "b.png", (6, 4)).any()


def test_opacity_is_a_mask_and_turns_with_its_picture(tmp_path):
    picture = Image.new("RGBA", (6, 4), (10, 20, 30, 255))
    picture.putpixel((0, 0), (10, 20, 30, 0))
    picture.putpixel((5, 3), (10, 20, 30, 77))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture.save(tmp_path / "a.png", exif=exif)
    mask = alpha_mask(read_picture(tmp_path / "a.png"))
    assert mask.shape == (6, 4)
    assert (mask[0, 3], mask[5, 0], np.count_nonzero(mask == 255)) == (0, 77, 22)
    picture.convert("RGB").save(tmp_path / "b.png")
    opaque = read_picture(tmp_path / "b.png")
    assert opaque.alpha is None
    assert (alpha_mask(opaque) == 255).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_a_latent_has_the_mean_of_its_pixels(height, width, seed):
    mask = np.random.default_rng(seed).integers(0, 256, (height * 8, width * 8), np.uint8)
    wanted = mask.reshape(height, 8, width, 8).mean((1, 3)) / 255
    found = in_latents(mask, (height, width))
    assert found.shape == (1, height, width)
    np.testing.assert_allclose(found[0], wanted, atol=1e-6)


def test_a_mask_is_cut_as_its_picture_even_from_half_the_size():
    """The mask's white part is where the picture's is."""
    picture = np.zeros((200, 400, 3), np.uint8)
    picture[50:150, 100:180] = 255
    crop = center_crop((400, 200), (128, 64), (96, 64))
    for mask in (picture[:, :, 0], picture[::2, ::2, 0]):
        assert np.abs(crop.of(mask).astype(int) - crop.of(picture)[:, :, 0]).mean() < 3


def test_pictures_without_a_mask_count_wholly_beside_others():
    mask = torch.full((1, 2, 3), 0.5)
    assert stacked([None, None], (2, 3)) is None
    both = stacked([mask, None], (2, 3))
    assert both is not None
    assert both.shape == (2, 1, 2, 3)
    assert both.mean((1, 2, 3)).tolist() == [0.5, 1]


# --- sizes -----------------------------------------------------------------------------------------------------------


def size_of(path: Path) -> tuple[int, int]:
    header = header_of(path)
    return header.width, header.height


def written(folder: Path) -> list[Path]:
    """A picture in every format that Pillow writes here and we read, in modes that it takes."""
    made = []
    for extension, name in sorted(readable_formats().items()):
        if name not in Image.SAVE:
            continue
        for mode in ("RGB", "RGBA", "L", "P", "1", "I;16", "F", "CMYK"):
            path = folder / f"{mode.replace(';', '')}{extension}"
            try:
                Image.new(mode, (48, 32)).save(path)
            except (OSError, ValueError, KeyError, AttributeError, RuntimeError):
                path.unlink(missing_ok=True)
                continue
            made.append(path)
    return made


def test_a_header_tells_the_size_in_every_format(tmp_path):
    sizes = {}
    for path in written(tmp_path):
        try:
            size = read_picture(path).image.size
        except Exception:  # as formats that Pillow writes and cannot read
            continue
        assert size_of(path) == size, path
        sizes[path.suffix] = size
    assert len(sizes) > 30
    assert {".png", ".jpg", ".webp", ".bmp", ".tif", ".gif", ".ico", ".tga", ".jp2"} <= sizes.keys()


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tif", "avif", "jp2"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_the_size_is_that_of_the_upright_picture(tmp_path, extension, turn):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turn
    Image.new("RGB", (48, 32)).save(tmp_path / f"a.{extension}", exif=exif)
    size = size_of(tmp_path / f"a.{extension}")
    assert size == read_picture(tmp_path / f"a.{extension}").image.size
    if extension in ("jpg", "png", "webp", "avif"):
        assert size == ((48, 32) if turn < 5 else (32, 48))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("kind", ["eXIf", "iTXt"])
def test_metadata_behind_a_png_s_pixels_counts(tmp_path, behind, kind):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    metadata = chunk(b"eXIf", exif.tobytes()[6:]) if kind == "eXIf" else chunk(b"iTXt", xmp)
    Image.new("RGB", (48, 32)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    place = data.index(b"IEND" if behind else b"IDAT") - 4
    (tmp_path / "a.png").write_bytes(data[:place] + metadata + data[place:])
    assert size_of(tmp_path / "a.png") == read_picture(tmp_path / "a.png").image.size == (32, 48)


def test_only_the_header_of_a_png_is_read(tmp_path):
    """Its pixels are broken, which the size does not depend on."""
    Image.new("RGB", (48, 32)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    start = data.index(b"IDAT") + 4
    (tmp_path / "a.png").write_bytes(data[:start] + b"\xff" * 8 + data[start + 8 :])
    assert size_of(tmp_path / "a.png") == (48, 32)
    with pytest.raises(OSError, match="broken data stream"):
        read_picture(tmp_path / "a.png")
