"""Photos and captions as people have them: every sound picture is used as it looks, and what is not used is told."""

from __future__ import annotations

import functools
import logging
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, PngImagePlugin

from library.data import examples
from library.data.pixels import read_picture, readable_formats, to_rgb
from library.data.resizing import in_tensor
from library.options.rooms import DataOptions
from library.training import prepare
from networks.deft_config import DeftError
from tests import small_data

RAMP = np.arange(256, dtype=np.uint8).repeat(16).reshape(64, 64)
GREY = Image.fromarray(RAMP)


def picture(folder: Path, name: str = "a.png", **save) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 16), (200, 40, 10)).save(folder / name, **save)
    return folder / name


def values(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float64) / 255


# --- orientation and other metadata ----------------------------------------------------------------------------------


def exif_of(tag: int, kind: int) -> bytes:
    """EXIF in bytes: orientation 6, and a tag with a value of another kind (the type's number in TIFF) than it has."""
    count = 4 if kind in (1, 2, 6, 7) else 1
    value = b"72\0\0" if kind not in (5, 10, 12, 16) else struct.pack("<I", 8 + 2 + 2 * 12 + 4)  # 8 bytes stand behind
    entries = sorted([struct.pack("<HHI", 0x0112, 3, 1) + b"\x06\0\0\0", struct.pack("<HHI", tag, kind, count) + value],
                     key=lambda entry: struct.unpack("<H", entry[:2]))  # fmt: skip
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + b"".join(entries) + bytes(4) + b"72\0\0\1\0\0\0"


ODD_TAGS = (0x010E, 0x0110, 0x011A, 0x011B, 0x0128, 0x0132, 0x8298, 0x8769, 0x8825, 0xA005, 0x927C, 0x9286, 0x829A)


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
@pytest.mark.parametrize("kind", [*range(1, 14), 16])
def test_a_photo_on_its_side_is_used_upright_whatever_its_other_tags_are(tmp_path, kind, extension):
    """XResolution stored as text (type 2) is what cameras and editors have been seen to write."""
    stored = Image.new("RGB", (32, 16), (255, 0, 0))
    stored.paste((0, 0, 255), (0, 0, 16, 16))  # blue on the left, which orientation 6 turns up
    for tag in ODD_TAGS:
        stored.save(tmp_path / f"a.{extension}", exif=exif_of(tag, kind))
        upright = values(read_picture(tmp_path / f"a.{extension}").image)
        assert upright.shape == (32, 16, 3), hex(tag)
        assert upright[:12, :, 2].mean() > 0.9, hex(tag)
        assert upright[20:, :, 0].mean() > 0.9, hex(tag)


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage!", b"Exif\0\0II\x2b\0", b"Exif\0\0II*\0" + bytes(3)])
def test_a_photo_with_damaged_metadata_is_used(tmp_path, exif, extension):
    GREY.convert("RGB").save(tmp_path / f"a.{extension}", exif=exif)
    assert np.abs(values(read_picture(tmp_path / f"a.{extension}").image) - RAMP[..., None] / 255).mean() < 0.02


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["jpg", "tif"])
def test_every_orientation_is_turned_upright(tmp_path, orientation, extension):
    """Saved as a camera does that was held so: Pillow's own way back, on a sound file, is the reference."""
    upright = Image.fromarray(np.dstack([RAMP, RAMP.T, 255 - RAMP])[:, :48])
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # 6 and 8 undo each other
    stored = upright if back is None else upright.transpose(Image.Transpose(back))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored.save(tmp_path / f"a.{extension}", exif=exif, **({"quality": 98} if extension == "jpg" else {}))
    found = read_picture(tmp_path / f"a.{extension}").image
    assert found.size == (48, 64)
    assert np.abs(values(found) - values(upright)).mean() < 0.02


def test_pngs_with_much_text_or_a_large_profile_are_used(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    read_picture(picture(tmp_path, "a.png", pnginfo=text))
    read_picture(picture(tmp_path, "b.png", icc_profile=bytes(2_500_000)))


# --- modes -----------------------------------------------------------------------------------------------------------


def sixteen_bit(mode: str) -> Image.Image:
    order = ">u2" if mode == "I;16B" else "<u2"
    return Image.frombytes(mode, (64, 64), (RAMP.astype(np.uint32) * 257).astype(order).tobytes())


MODES = {
    "1": lambda: GREY.convert("1"),
    "L": lambda: GREY,
    "P": lambda: GREY.convert("P"),
    "P with colours": lambda: GREY.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE),
    "RGB": lambda: GREY.convert("RGB"),
    "RGBA": lambda: GREY.convert("RGBA"),
    "RGBa": lambda: GREY.convert("RGBA").convert("RGBa"),
    "RGBX": lambda: GREY.convert("RGBX"),
    "LA": lambda: GREY.convert("LA"),
    "La": lambda: GREY.convert("LA").convert("La"),
    "PA": lambda: GREY.convert("PA"),
    "CMYK": lambda: GREY.convert("RGB").convert("CMYK"),
    "YCbCr": lambda: GREY.convert("RGB").convert("YCbCr"),
    "HSV": lambda: GREY.convert("RGB").convert("HSV"),
    "I": lambda: Image.fromarray(RAMP.astype(np.int32) * 257),
    "I to 2^31": lambda: Image.fromarray((RAMP.astype(np.int64) * (2**31 - 1) // 255).astype(np.int32)),
    "F to 1": lambda: Image.fromarray(RAMP.astype(np.float32) / 255),
    "F to 255": lambda: GREY.convert("F"),
    "F to 65535": lambda: Image.fromarray(RAMP.astype(np.float32) * 257),
    "F with a hole": lambda: Image.fromarray(np.where(RAMP == 0, np.nan, RAMP / 255).astype(np.float32)),
    **{mode: (lambda mode=mode: sixteen_bit(mode)) for mode in ("I;16", "I;16L", "I;16B", "I;16N")},
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_converted_by_value(mode):
    found = to_rgb(MODES[mode]())
    assert not found.transparent
    assert values(found.image).mean() == pytest.approx(0.5, abs=5e-3 if mode == "1" else 2e-3)
    if mode != "1":  # that one is dithered
        assert np.abs(values(found.image) - RAMP[..., None] / 255).max() < 0.02


def test_lab_is_converted_by_lightness():
    """CIE's L* to sRGB, by their formulas."""
    neutral = Image.new("L", GREY.size, 128)
    found = values(to_rgb(Image.merge("LAB", [GREY, neutral, neutral])).image)
    lightness = RAMP / 255 * 100
    Y = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness / 903.3)
    wanted = np.where(Y > 0.0031308, 1.055 * Y ** (1 / 2.4) - 0.055, 12.92 * Y)
    assert np.abs(found - wanted[..., None]).max() < 0.02


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("a.png", "I;16"),
        *(("a.tif", mode) for mode in ["I;16", "I", "F", "LAB", "CMYK"]),
        ("a.pgm", "I"),
        ("a.jpg", "CMYK"),
    ],
)
def test_files_of_odd_modes_keep_their_mean(tmp_path, name, mode):
    """Half of white: 32768 of 65535, which 8 bits would clip to white, 0.5 in floating-point numbers."""
    half = {
        "I;16": lambda: Image.fromarray(np.full((16, 16), 32768, np.uint16)),
        "I": lambda: Image.fromarray(np.full((16, 16), 32768, np.int32)),
        "F": lambda: Image.fromarray(np.full((16, 16), 0.5, np.float32)),
        "LAB": lambda: Image.merge("LAB", [Image.new("L", (16, 16), v) for v in (136, 128, 128)]),  # L* = 53.6
        "CMYK": lambda: Image.new("CMYK", (16, 16), (127, 127, 127, 0)),
    }[mode]()
    half.save(tmp_path / name)
    pixels = in_tensor(np.asarray(read_picture(tmp_path / name).image))
    assert pixels.mean() == pytest.approx(0, abs=0.02)
    assert pixels.std() < 0.01


@pytest.mark.parametrize(("dtype", "half", "highlight"), [(np.float32, 0.5, 3.0), (np.int32, 32768, 70000)])
def test_a_highlight_beyond_white_does_not_turn_a_picture_black(dtype, half, highlight):
    pixels = np.full((16, 16), half, dtype)
    pixels[3, 4] = highlight
    assert values(to_rgb(Image.fromarray(pixels)).image).mean() == pytest.approx(0.5, abs=0.01)


# --- transparency ----------------------------------------------------------------------------------------------------


def half_transparent(mode: str) -> Image.Image:
    """The left half's colour is hidden, the right half is black."""
    hidden = Image.new("RGBA", (16, 16), (0, 0, 0, 255))
    hidden.paste((10, 200, 30, 0), (0, 0, 8, 16))
    if mode == "P":
        image = Image.new("P", (16, 16), 1)
        image.putpalette([10, 200, 30, 0, 0, 0])
        image.paste(0, (0, 0, 8, 16))
        image.info["transparency"] = 0
        return image
    if mode in ("L key", "I;16 key"):
        grey = np.zeros((16, 16), np.uint8 if mode == "L key" else np.uint16)
        grey[:, :8] = 77
        image = Image.fromarray(grey)
        image.info["transparency"] = 77
        return image
    return hidden.convert("LA").convert("La") if mode == "La" else hidden.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA", "P", "L key", "I;16 key"])
def test_hidden_colours_are_not_trained(mode):
    found = to_rgb(half_transparent(mode), (255, 128, 0))
    assert found.transparent
    left, right = np.split(np.asarray(found.image), 2, axis=1)
    assert np.abs(left.astype(int) - (255, 128, 0)).max() <= 1
    assert right.max() <= 1


def test_transparent_pictures_are_counted_and_the_background_is_an_option(run, photos, tmp_path, monkeypatch, caplog):
    for i in range(2):
        half_transparent("RGBA").save(photos / f"transparent{i}.png")
    seen = []

    def read(path, background):
        seen.append(read_picture(path, background))
        return seen[-1]

    monkeypatch.setattr(examples, "read_picture", read)
    assert run(max_train_steps=1, transparent_background="#ff8000") == 0
    assert any(
        line.startswith("2 pictures (") and "alpha channel" in line and "--transparent_background" in line
        for line in caplog.messages
    )
    transparent = [picture.image.getpixel((0, 0)) for picture in seen if picture.transparent]
    assert transparent == [(255, 128, 0)]  # of one content


# --- files that are not used -----------------------------------------------------------------------------------------


def told(tmp_path: Path, caplog, extension: str = ".txt") -> tuple[list[str], list[str]]:
    """Captions of the pictures that are found, and the lines that are told."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        found = small_data.found(tmp_path, extension)
    return [image.caption for image in found], caplog.messages


def test_image_folders(tmp_path, caplog):
    picture(tmp_path / "3_sks cat", "a.PNG")
    picture(tmp_path / "1_a_b", "b.webp")
    for unused in ("plain", "0_sks"):
        picture(tmp_path / unused)
    picture(tmp_path, "c.png")
    picture(tmp_path / "1_a_b" / "more")
    (tmp_path / "1_a_b" / "b.TXT").write_text("\ufefffirst line\r\nsecond", encoding="utf-8", newline="")
    found = small_data.found(tmp_path)
    assert [(i.path.name, i.caption, i.repeats, i.subset.name) for i in found] == [
        ("b.webp", "first line", 1, "1_a_b"),
        ("a.PNG", "sks cat", 3, "3_sks cat"),
    ]
    wanted = ["0_sks) left out: its name asks for 0 repeats", "1 caption (", "b.TXT) of several lines",
              "1 folder within others", "1 picture (", "a.PNG) without a caption: trained as 'sks cat'",
              "c.png) left out: pictures belong into a folder", "plain) left out: the name has to begin"]  # fmt: skip
    for part in wanted:
        assert sum(part in line for line in caplog.messages) >= 1, part
    assert len(caplog.messages) == 6


def test_captions_under_another_extension_are_told(tmp_path, caplog):
    for name in ("1", "2"):
        picture(tmp_path / "1_sks", f"{name}.png")
        (tmp_path / "1_sks" / f"{name}.caption").write_text("a long caption")
    captions, lines = told(tmp_path, caplog)
    assert captions == ["sks", "sks"]
    assert ["--caption_extension .caption takes them" in line for line in lines] == [False, True]
    assert lines[1].startswith("2 .caption files (")
    assert told(tmp_path, caplog, ".caption") == (["a long caption"] * 2, [])


def test_captions_without_a_picture_and_other_files_are_told(tmp_path, caplog):
    picture(tmp_path / "1_sks", "1.png")
    for name in ("1.txt", "2.txt", "film.mp4", "1.npz", "scan.jxl", "phone.heic"):
        (tmp_path / "1_sks" / name).write_text("x")
    captions, lines = told(tmp_path, caplog)
    assert captions == ["x"]
    assert {line.split(" (")[0] for line in lines} == {
        "1 caption", "1 .mp4 file", "1 .npz file", "1 .jxl file", "1 .heic file",
    }  # fmt: skip
    assert any("pip install pillow-jxl-plugin" in line for line in lines)
    assert any("pip install pillow-heif" in line for line in lines)


def test_no_image_at_all_says_what_there_was(tmp_path):
    (tmp_path / "10_sks").mkdir()
    (tmp_path / "10_sks" / "a.jxl").write_bytes(b"x")
    (tmp_path / "0_sks").mkdir()
    with pytest.raises(DeftError, match=r"no images; they belong.*0 repeats.*pip install pillow-jxl-plugin"):
        small_data.found(tmp_path)


@pytest.mark.parametrize("extension", ["avif", "jfif", "tif", "tiff", "gif", "webp", "bmp", "jp2", "tga", "ico", "ppm"])
def test_whatever_pillow_reads_is_read(tmp_path, extension):
    path = picture(tmp_path / "1_sks", f"a.{extension}")
    assert [image.path for image in small_data.found(tmp_path)] == [path]
    red = values(read_picture(path).image).mean((0, 1))
    assert red == pytest.approx([200 / 255, 40 / 255, 10 / 255], abs=0.05)


def test_postscript_is_not_run(tmp_path):
    """Pillow would have Ghostscript draw it."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    assert ".eps" not in readable_formats()
    with pytest.raises(OSError, match="cannot identify"):
        read_picture(tmp_path / "a.png")


def test_frames_behind_the_first_are_told(tmp_path, caplog):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    folder = picture(tmp_path / "1_sks").parent
    frames[0].save(folder / "b.gif", save_all=True, append_images=frames[1:])
    with caplog.at_level(logging.WARNING):
        small_data.read(tmp_path, small_data.Model(), (8, 8))
    assert sum("of several frames" in line and "b.gif" in line for line in caplog.messages) == 1


def test_what_systems_leave_behind_is_passed_over(tmp_path, caplog):
    folder = picture(tmp_path / "1_sks").parent
    for name in ("._a.png", "._a.txt", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (folder / name).write_bytes(b"\0\1\2")
        (tmp_path / name).write_bytes(b"\0\1\2")
    picture(tmp_path / "__MACOSX" / "1_sks")
    captions, lines = told(tmp_path, caplog)
    assert captions == ["sks"]
    assert [line.split(")")[1] for line in lines] == [" without a caption: trained as 'sks'"]


@pytest.mark.parametrize(
    "error", [AttributeError, struct.error, MemoryError, RuntimeError, Image.DecompressionBombError]
)
def test_whatever_pillow_raises_costs_that_file_alone(tmp_path, monkeypatch, caplog, error):
    bad = picture(tmp_path / "1_sks", "bad.png")
    Image.new("RGB", (24, 16)).save(tmp_path / "1_sks" / "good.png")

    def read(path, background):
        if path == bad:
            raise error("two\nlines")
        return read_picture(path, background)

    monkeypatch.setattr(examples, "read_picture", read)
    (dataset,), _ = small_data.read(tmp_path, small_data.Model(), (8, 8))
    assert [picture.path.name for picture in dataset.pictures] == ["good.png"]
    assert [line for line in caplog.messages if "bad.png" in line][-1].endswith("left out, it cannot be read (two)")


# --- captions --------------------------------------------------------------------------------------------------------

SEPARATORS = {"U+2028": "\u2028", "U+0085": "\x85", "VT": "\x0b", "FF": "\x0c", "FS": "\x1c"}


@pytest.mark.parametrize("masked", [False, True])
def test_a_file_that_changes_while_pictures_are_cached_is_not_kept_as_what_it_was(
    tmp_path, monkeypatch, caplog, masked
):
    """Its entry's key says what it was when it was hashed."""
    folder, masks = tmp_path / "data" / "1_cat", tmp_path / "masks"
    for number, name in enumerate(("a.png", "b.png")):  # pictures of one content would share an entry
        for place in (folder, masks):
            Image.effect_noise((24, 16), 40 + number).save(picture(place, name))
    changing = (masks if masked else folder) / "b.png"
    decoded = examples.decoded

    def change(found, *given):
        if found.path.name == "b.png":
            Image.new("RGB", (24, 16), (1, 2, 3)).save(changing)
        return decoded(found, *given)

    monkeypatch.setattr(prepare, "decoded", change)
    monkeypatch.setattr(small_data, "DataOptions", functools.partial(DataOptions, masked_loss=True))
    changes = {"conditioning_data_dir": str(masks)} if masked else {}
    (dataset,), _ = small_data.read(tmp_path / "data", small_data.Model(), (8, 8), **changes)
    assert [found.path.name for found in dataset.pictures] == ["a.png"]
    assert "b.png: left out, it cannot be read (b.png has changed in the meantime" in caplog.text


@pytest.mark.parametrize("separator", SEPARATORS.values(), ids=SEPARATORS)
def test_only_the_three_usual_ends_end_a_line(tmp_path, separator, caplog):
    picture(tmp_path / "1_sks")
    (tmp_path / "1_sks" / "a.txt").write_bytes(f"a cat{separator}on a mat".encode())
    assert told(tmp_path, caplog) == ([f"a cat{separator}on a mat"], [])


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-16", "latin-1"])
def test_captions_in_another_encoding_are_refused(tmp_path, encoding):
    picture(tmp_path / "1_sks")
    (tmp_path / "1_sks" / "a.txt").write_bytes("caf\xe9 sks".encode(encoding))
    with pytest.raises(DeftError, match=r"a\.txt: the file is not UTF-8 text; save it as UTF-8"):
        small_data.found(tmp_path)


def test_names_may_have_braces_and_years_are_asked_about(tmp_path, caplog):
    picture(tmp_path / "1_{red|blue} hat", "{n}.png")
    (tmp_path / "1_{red|blue} hat" / "notes.{draft}").write_text("x")
    picture(tmp_path / "2024_holiday")
    (tmp_path / "5_empty").mkdir()
    captions, lines = told(tmp_path, caplog)
    assert captions == ["{red|blue} hat", "holiday"]
    assert any("with 2024 repeats of every picture: is that meant?" in line for line in lines)
    assert any("5_empty) without a picture" in line for line in lines)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_second_line_is_told(tmp_path, end, caplog):
    picture(tmp_path / "1_sks")
    (tmp_path / "1_sks" / "a.txt").write_bytes(f"{end}a cat{end}{end}on a mat{end}".encode("utf-8-sig"))
    captions, lines = told(tmp_path, caplog)
    assert captions == ["a cat"]
    assert ["of several lines: only the first is used" in line for line in lines] == [True]


def test_what_the_text_encoder_does_not_read_is_told(run, photos, tmp_path, caplog):
    long = ", ".join(["cat"] * 60)
    (photos / "chelsea_1.txt").write_text(f"{long}, sks trigger")
    prompts = tmp_path / "p.txt"
    prompts.write_text(f"{long} end of prompt --w 64 --h 64 --s 1")
    assert run(max_train_steps=1, sample_prompts=prompts) == 0
    (line,) = (line for line in caplog.messages if "longer than the text encoder's 75 tokens" in line)
    assert line.startswith("2 of 6 captions and prompts")
    assert "sks trigger' in " in line
    assert "chelsea_1" in line


def test_white_is_the_default_background():
    assert in_tensor(np.asarray(to_rgb(half_transparent("RGBA")).image))[:, :, :8].eq(torch.ones(())).all()
