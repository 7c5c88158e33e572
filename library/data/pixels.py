"""A picture file as upright RGB, whatever its format, mode, metadata and transparency."""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, PngImagePlugin

Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)

# what cannot be read without a plugin of Pillow's: extension -> (module, package)
PLUGINS = {
    ".jxl": ("pillow_jxl", "pillow-jxl-plugin"),
    ".heic": ("pillow_heif", "pillow-heif"),
    ".heif": ("pillow_heif", "pillow-heif"),
}

# Pillow refuses PNGs with more than 1 MiB of compressed text or ICC profile; a bomb would unpack to no more than this
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28

# what is refused is told; of what is only large, as panoramas are, Pillow says that it could be a bomb
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LAYERED = ("MPO", "PSD")  # what follows the picture are previews, depths and layers
# the value of white: in 16 bits, in what PGM and TIFF have as 32 bits, and in TIFF's floating-point numbers; of several
# the smallest that nine tenths of the picture do not exceed by far: highlights do
_WHITES = {"I;16": (65535,), "I": (65535, 2**31 - 1), "F": (1, 255, 65535)}


@dataclass(frozen=True)
class Picture:
    """A picture in RGB, whether parts of it were transparent, and how many frames its file has.

    :param alpha: (h, w) uint8, 0 where it was wholly transparent; None when no part was
    """

    image: Image.Image
    transparent: bool
    frames: int
    alpha: np.ndarray | None = None


@functools.cache  # what is not installed is searched for in every folder, each time
def _add_plugins() -> None:
    for module in {module for module, _ in PLUGINS.values()}:
        with contextlib.suppress(ImportError):
            plugin = importlib.import_module(module)
            getattr(plugin, "register_heif_opener", lambda: None)()


def readable_formats() -> dict[str, str]:
    """Extension, in lower case with its dot, -> Pillow's format, of all that can be read here.

    EPS is left out: it is a program, which Pillow has Ghostscript run.
    """
    _add_plugins()
    found = Image.registered_extensions()
    return {extension: name for extension, name in found.items() if name in Image.OPEN and name != "EPS"}


def read_picture(path: Path, background: Colour = WHITE) -> Picture:
    """The first frame of a file.

    :param background: what shows through where the picture is transparent
    :raises Exception: of many kinds, Pillow's, when the file is cut off or is no picture
    """
    frames = 1
    with Image.open(path, formats=sorted(set(readable_formats().values()))) as image:
        image.load()
        picture = to_rgb(image, background)
        method = _turn(image)
        if image.format not in _LAYERED:
            with contextlib.suppress(Exception):  # further frames may be broken
                frames = getattr(image, "n_frames", 1)
    if method is None:
        return replace(picture, frames=frames)
    alpha = None if picture.alpha is None else np.array(Image.fromarray(picture.alpha).transpose(method))
    return Picture(picture.image.transpose(method), picture.transparent, frames, alpha)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes the picture upright.

    Not ImageOps.exif_transpose, which also writes all other tags anew and fails on odd ones. Pillow turns TIFFs itself.
    """
    if image.format == "TIFF":
        return None
    with contextlib.suppress(Exception):  # metadata may be anything
        # a PNG's own getexif would read all of its pixels, to see whether there is something behind them
        exif = Image.Image.getexif(image) if image.format == "PNG" else image.getexif()
        return _UPRIGHT.get(exif[ExifTags.Base.Orientation])
    return None


def to_rgb(image: Image.Image, background: Colour = WHITE) -> Picture:
    """Every mode of Pillow's by value, the range of each onto 0 to 255, and transparent parts on the background."""
    eight_bit = _eight_bit(image)
    if not eight_bit.has_transparency_data:
        return Picture(eight_bit.convert("RGB"), False, 1)
    layer = eight_bit.convert("LA" if eight_bit.mode == "La" else "RGBA").convert("RGBA")
    if layer.getchannel("A").getextrema()[0] == 255:
        return Picture(layer.convert("RGB"), False, 1)
    below = Image.new("RGBA", layer.size, (*background, 255))
    alpha = np.array(layer.getchannel("A"))
    return Picture(Image.alpha_composite(below, layer).convert("RGB"), True, 1, alpha)


def _eight_bit(image: Image.Image) -> Image.Image:
    """In a mode that `convert` takes to RGB by value."""
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(*profiles, "LAB", "RGB").apply(image)
    if image.mode != "F" and not image.mode.startswith("I"):
        key = image.info.get("transparency")
        if isinstance(key, tuple) and max(key) > 255:  # of 16 bits, where Pillow has kept the upper 8 of the colours
            image.info["transparency"] = tuple(value >> 8 for value in key)
        return image
    values = np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0)
    whites = _WHITES.get(image.mode, _WHITES["I;16"])  # "I;16B" and the like differ in the order of bytes
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if tags.get(BITS) == (12,):
        whites = (4095,)
    usual = np.percentile(values, 90)
    white = next((white for white in whites if usual <= 4 * white), whites[-1])
    if image.mode.startswith("I;16") and tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        values = white - values
    grey = Image.fromarray((values * (255 / white)).clip(0, 255).round().astype(np.uint8))
    key = image.info.get("transparency")  # a grey that is transparent
    if isinstance(key, int):
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey
