"""Pictures in a file's metadata, and the room that its header has for them.

`ssmd_cover_images` is shown by Automatic1111, Forge (modules/ui_extra_networks.py) and ComfyUI (app/model_manager.py),
`modelspec.thumbnail` by SwarmUI. ComfyUI's server hands headers of more than 1 MiB to nobody (server.py,
/view_metadata).
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from networks.deft_config import DeftError, reason_of

COVER, THUMBNAIL = "ssmd_cover_images", "modelspec.thumbnail"
HEADER_LIMIT = 2**20  # bytes
SIZES = ((512, 90), (512, 80), (512, 60), (384, 70), (256, 70), (192, 60), (128, 50))  # pixels at most, quality
SMALL = 256  # pixels of a thumbnail at most


def fields_of(picture: Path | bytes, taken: int = 0) -> dict[str, str]:
    """A picture as metadata has it, as large as there is room for.

    :param picture: a file, or its content
    :param taken: bytes of the header by all else
    :returns: `COVER` and `THUMBNAIL`, JPEGs; nothing where there is no room
    :raises DeftError: when it cannot be read, or Pillow is missing
    """
    jpeg = _jpegs(picture)
    for size, quality in SIZES:
        cover, thumbnail = (base64.b64encode(jpeg(most, quality)).decode() for most in (size, min(size, SMALL)))
        found = {COVER: json.dumps([cover]), THUMBNAIL: f"data:image/jpeg;base64,{thumbnail}"}
        if taken + length_of(found) < HEADER_LIMIT:
            return found
    return {}


def fitted(metadata: Mapping[str, str], taken: int) -> tuple[dict[str, str], str]:
    """Metadata whose pictures are so small that the header has no more than 1 MiB, or that has none.

    :param taken: bytes of the header by the tensors' names and places
    :returns: also what to tell, "" where the pictures stay, smaller or as they are
    """
    rest = {key: value for key, value in metadata.items() if key not in (COVER, THUMBNAIL)}
    if len(rest) == len(metadata) or taken + length_of(metadata) < HEADER_LIMIT:
        return dict(metadata), ""
    why = "the header would be longer than 1 MiB, which ComfyUI hands to nobody"
    try:
        content = embedded(metadata)
        smaller = fields_of(content, taken + length_of(rest)) if content else {}
    except DeftError as error:
        smaller, why = {}, f"{why}; a smaller one {error}"
    kept = {key: value for key, value in smaller.items() if key in metadata}
    return rest | kept, "" if kept else f"without its picture, {why}"


def length_of(metadata: Mapping[str, str]) -> int:
    """Bytes in a header, with what is around them."""
    return len(json.dumps(dict(metadata), separators=(",", ":"), ensure_ascii=False).encode()) + 32


def embedded(metadata: Mapping[str, str]) -> bytes | None:
    """The picture that a file has in its metadata, as it is there; None if none can be read."""
    try:
        return base64.b64decode(json.loads(metadata[COVER])[0], validate=True)
    except (KeyError, IndexError, TypeError, ValueError, RecursionError, binascii.Error):
        return of_data_url(metadata.get(THUMBNAIL, ""))


def of_data_url(url: str) -> bytes | None:
    """The picture in one; None if none can be read."""
    try:
        return base64.b64decode(re.sub("^data:image/[^,]*,", "", url), validate=True) or None
    except (ValueError, binascii.Error):
        return None


def _jpegs(picture: Path | bytes) -> Callable[[int, int], bytes]:
    """A picture's JPEG for a largest side in pixels and a quality."""
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError:
        raise DeftError("needs Pillow; pip install pillow") from None
    try:
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as file:
            whole = ImageOps.exif_transpose(file).convert("RGB")
    except UnidentifiedImageError:  # whose own words name the memory that it was read from
        raise DeftError("cannot be read as a picture (of no format that Pillow knows)") from None
    except Exception as error:  # of many kinds, as files may be damaged
        raise DeftError(f"cannot be read as a picture ({reason_of(error)})") from None

    def jpeg(size: int, quality: int) -> bytes:
        small, written = whole.copy(), io.BytesIO()
        small.thumbnail((size, size))
        small.save(written, "JPEG", quality=quality, optimize=True)
        return written.getvalue()

    return jpeg
