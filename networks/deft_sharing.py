"""What a file says of itself to people and their programs: its metadata edited, its picture, the files beside it.

Who reads what: Automatic1111 and Forge (`modules/ui_extra_networks.py`, `sd_forge_lora/ui_edit_user_metadata.py`)
NAME.json, NAME.png and `ssmd_cover_images`; ComfyUI (`app/model_manager.py`) the same pictures; ComfyUI-Lora-Manager
(`py/utils/models.py`) NAME.metadata.json; SwarmUI `modelspec.*`. Keys are ModelSpec's, as sd-scripts'
library/sai_model_spec.py (commit 48d368fa) writes them.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from networks import deft_io, deft_pictures
from networks.deft_config import DeftError, nearest, reason_of
from networks.deft_pictures import COVER, THUMBNAIL
from networks.deft_progress import Bar

FRIENDLY = {
    "trigger": "modelspec.trigger_phrase",
    "title": "modelspec.title",
    "author": "modelspec.author",
    "description": "modelspec.description",
    "license": "modelspec.license",
    "licence": "modelspec.license",
    "tags": "modelspec.tags",
    "usage_hint": "modelspec.usage_hint",
    "merged_from": "modelspec.merged_from",
    "weight": "deft_preferred_weight",
}
SPEC = {"modelspec.sai_model_spec": "1.0.1"}
BLOCK = 2**24


@dataclass(frozen=True)
class Base:
    """A base model by the names that programs have for it.

    :param version: sd-scripts' `ss_base_model_version`; other values that begin with it are this model too
    :param architecture: `modelspec.architecture`, without "/lora"
    :param webui: "sd version" of Automatic1111 and Forge
    :param manager: ComfyUI-Lora-Manager's and Civitai's
    :param hub: the repository of Hugging Face's Hub that diffusers loads it from
    """

    version: str
    architecture: str
    webui: str
    manager: str
    hub: str


BASES = (
    Base("sd_v1", "stable-diffusion-v1", "SD1", "SD 1.5", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    Base("sd_v2", "stable-diffusion-v2", "SD2", "SD 2.1", "stabilityai/stable-diffusion-2-1"),
    Base("sdxl_", "stable-diffusion-xl-v1-base", "SDXL", "SDXL 1.0", "stabilityai/stable-diffusion-xl-base-1.0"),
    Base("", "flux-1-schnell", "Flux", "Flux.1 S", "black-forest-labs/FLUX.1-schnell"),
    Base("flux1", "flux-1", "Flux", "Flux.1 D", "black-forest-labs/FLUX.1-dev"),
    Base("chroma", "chroma", "Unknown", "Chroma", "lodestones/Chroma1-HD"),
    Base("sd3", "stable-diffusion-3", "Unknown", "SD 3", ""),
    Base("lumina", "lumina", "Unknown", "Lumina", "Alpha-VLLM/Lumina-Image-2.0"),
    Base("hunyuan-image", "hunyuan-image", "Unknown", "Other", ""),
    Base("anima", "anima", "Unknown", "Anima", ""),
    Base("omnigen1", "omnigen-1", "Unknown", "Other", "Shitao/OmniGen-v1-diffusers"),
)
UNKNOWN = Base("", "", "Unknown", "Unknown", "")


def base_of(metadata: Mapping[str, str]) -> Base:
    """The base model that a file says it is for."""
    for key, name in (("modelspec.architecture", "architecture"), ("ss_base_model_version", "version")):
        for base in BASES:
            if getattr(base, name) and metadata.get(key, "").startswith(getattr(base, name)):
                return base
    return UNKNOWN


# --- editing ----------------------------------------------------------------------------------------------------------


def edited(metadata: Mapping[str, str], settings: Sequence[str], unset: Sequence[str]) -> dict[str, str]:
    """Metadata with some entries set and some taken out.

    :param settings: `key=value` each, the key one of `FRIENDLY`, `preview` with a picture's path, or as in the file
    :param unset: keys likewise
    :raises DeftError: for a key that may not be changed, is misspelt or is not there; for a picture that cannot be read
    """
    found = dict(metadata)
    for name in unset:
        keys = (COVER, THUMBNAIL) if name == "preview" else (_key("--unset", name, metadata),)
        if not found.keys() & set(keys):
            raise DeftError(f"--unset {name}: the file has no {keys[0]}{nearest(keys[0], metadata)}")
        for key in keys:
            found.pop(key, None)
    for name, value in map(_setting, settings):
        if name != "preview":
            found[_key("--set", name, metadata)] = value
    for name, value in map(_setting, settings):
        if name == "preview":  # last, so that it goes by the room that the rest leaves
            found = with_preview(found, Path(value))
    if any(key.startswith("modelspec.") for key in found):
        found = SPEC | found
    return found


def _setting(given: str) -> tuple[str, str]:
    name, equals, value = given.partition("=")
    if not equals or not name.strip():
        raise DeftError(f"--set {given}: write key=value, the whole in quotes where it has spaces")
    if any("\ud800" <= letter <= "\udfff" for letter in given):
        raise DeftError(
            f"--set {given.encode(errors='replace').decode()}: no text in this terminal's encoding; use UTF-8"
        )
    if not value.strip():
        raise DeftError(f"--set {given}: no value; --unset {name} takes one out")
    if name == "weight" and strength_of({FRIENDLY["weight"]: value}) is None:
        raise DeftError(f"--set {given}: give a number, 0.8 for one")
    return name.strip(), value


def _key(option: str, name: str, metadata: Mapping[str, str]) -> str:
    """The file's key for what a user calls it."""
    if name in FRIENDLY:
        return FRIENDLY[name]
    if name.startswith(("sshs_", "deft_")):
        raise DeftError(f"{option} {name}: this is made of the tensors, and is read with them; it stays as it is")
    guess = nearest(name, [*FRIENDLY, "preview"])
    if guess and name not in metadata:
        raise DeftError(f"{option} {name}: no such name{guess}; keys of your own need a dot or an underscore in them")
    return name


# --- pictures ---------------------------------------------------------------------------------------------------------


def with_preview(metadata: Mapping[str, str], picture: Path) -> dict[str, str]:
    """Metadata with a picture in it, see `deft_pictures.fields_of`.

    :raises DeftError: when it cannot be read, Pillow is missing, or the rest leaves no room for the smallest
    """
    option = f"--set preview={picture}"
    rest = {key: value for key, value in metadata.items() if key not in (COVER, THUMBNAIL)}
    try:
        found = deft_pictures.fields_of(picture, deft_pictures.length_of(rest))
    except DeftError as error:
        raise DeftError(f"{option}: {error}") from None
    if not found:
        raise DeftError(
            f"{option}: no room for a picture in a header of at most 1 MiB; --unset ss_tag_frequency makes some"
        )
    return rest | found


# --- a file with other metadata ---------------------------------------------------------------------------------------


def write_with_metadata(source: Path, path: Path, metadata: Mapping[str, str]) -> None:
    """A copy of a `.safetensors` file with other metadata and every byte behind its header as it is.

    So Automatic1111's hash and Civitai's AutoV3, which are of those bytes, stay.

    :raises DeftError: when it cannot be read, or a disk fails
    """
    deft_io.read_metadata(source)  # says what is wrong with it
    with open(source, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        whole = deft_io.fitted_header(header, metadata, path)
        deft_io.write_whole(path, _parts(whole, file, source.stat().st_size))


def _parts(header: bytes, file: io.BufferedReader, size: int) -> Iterator[bytes]:
    yield header
    with Bar(size, "copying", "B", unit_scale=True) as bar:
        while block := file.read(BLOCK):
            yield block
            bar.add(len(block))


# --- files beside it --------------------------------------------------------------------------------------------------


def write_sidecars(
    path: Path, metadata: Mapping[str, str], picture: Path | None, given: Collection[str] = ()
) -> list[str]:
    """Writes what programs read beside a file: NAME.json, NAME.metadata.json and the picture, where there is one.

    What people have written into such files stays, except what this run was given anew.

    :param picture: a picture's file, copied as it is; None for the one in the metadata
    :param given: metadata keys that this run has set
    :returns: what was written, a line each
    :raises DeftError: for such a file that is there and cannot be read, and for a failing disk
    """
    shown, is_new = write_picture(path, metadata, picture)
    lines = [f"{shown}: the preview"] if is_new else []
    for ending, fields in ((".json", _webui_fields), (".metadata.json", _manager_fields)):
        target = path.with_suffix(ending)
        made = fields(path, metadata, shown.name if shown else "")
        new = {name for name, key in SOURCES.items() if key in given} | ALWAYS_NEW
        before = _read_json(target)
        kept = {name: value for name, value in before.items() if name not in new and not _says_nothing(value)}
        content = json.dumps(before | made | kept, indent=2, ensure_ascii=False)
        deft_io.write_whole(target, content.encode())
        lines.append(f"{target}: {READERS[ending]}{', what was there kept' if before else ''}")
    return lines


PREVIEWS = (".png", ".jpg", ".jpeg", ".webp", ".preview.png", ".preview.jpg")
READERS = {".json": "for Automatic1111 and Forge", ".metadata.json": "for ComfyUI-Lora-Manager"}
# a sidecar's field -> the metadata that it is made of
SOURCES = {
    "description": FRIENDLY["description"],
    "modelDescription": FRIENDLY["description"],
    "activation text": FRIENDLY["trigger"],
    "civitai": FRIENDLY["trigger"],
    "preferred weight": FRIENDLY["weight"],
    "usage_tips": FRIENDLY["weight"],
    "notes": FRIENDLY["usage_hint"],
    "tags": FRIENDLY["tags"],
    "model_name": FRIENDLY["title"],
    "preview_url": COVER,
}
ALWAYS_NEW = {"file_name", "file_path", "size", "modified", "sha256", "autov3"}  # facts of the file


def write_picture(path: Path, metadata: Mapping[str, str], given: Path | None) -> tuple[Path | None, bool]:
    """The preview beside a file, and whether it was written now; a picture that is there stays, if none is given.

    :param given: see `write_sidecars`
    :raises DeftError: when it cannot be read or written
    """
    there = picture_beside(path)
    if given is None and there is not None:
        return there, False
    try:
        content = deft_pictures.embedded(metadata) if given is None else given.read_bytes()
    except OSError as error:
        raise DeftError(f"{given}: cannot be read ({reason_of(error)})") from None
    if not content:
        return None, False
    target = path.with_suffix(".png" if content.startswith(b"\x89PNG") else ".jpg")
    if there == target and there.read_bytes() == content:
        return target, False
    deft_io.write_whole(target, content)
    return target, True


def picture_beside(path: Path) -> Path | None:
    """The preview that UIs find beside a file."""
    return next((found for ending in PREVIEWS if (found := path.with_suffix(ending)).exists()), None)


def _webui_fields(path: Path, metadata: Mapping[str, str], picture: str) -> dict[str, Any]:
    base = base_of(metadata)  # a written "Unknown" would be taken instead of what the program sees itself
    return {
        "description": metadata.get(FRIENDLY["description"], ""),
        **({} if base is UNKNOWN else {"sd version": base.webui}),
        "activation text": metadata.get(FRIENDLY["trigger"], ""),
        "preferred weight": strength_of(metadata) or 0.0,
        "negative text": "",
        "notes": metadata.get(FRIENDLY["usage_hint"], ""),
    }


def _manager_fields(path: Path, metadata: Mapping[str, str], picture: str) -> dict[str, Any]:
    """Paths without folders: the manager completes them, and a shared file tells nothing of its author's disk."""
    weight, hashes = strength_of(metadata), hashes_of(path)
    trigger = metadata.get(FRIENDLY["trigger"])
    return {
        "file_name": path.stem,
        "model_name": metadata.get(FRIENDLY["title"]) or path.stem,
        "file_path": path.name,
        "size": path.stat().st_size,
        "modified": path.stat().st_mtime,
        "sha256": hashes["SHA256"],
        "autov3": hashes["AutoV3"],
        "base_model": base_of(metadata).manager,
        "preview_url": picture,
        "preview_nsfw_level": 0,
        "notes": metadata.get(FRIENDLY["usage_hint"], ""),
        "from_civitai": True,
        "civitai": {"trainedWords": _words(trigger)} if trigger else {},
        "tags": _words(metadata.get(FRIENDLY["tags"], "")),
        "modelDescription": metadata.get(FRIENDLY["description"], ""),
        "usage_tips": json.dumps({"strength": weight}) if weight else "{}",
    }


def strength_of(metadata: Mapping[str, str]) -> float | None:
    """The strength to use it at: what the file says, or 1 where it was trained here, which is then what was trained."""
    try:
        found = float(metadata.get(FRIENDLY["weight"], "nan"))
    except ValueError:
        found = math.nan
    if math.isfinite(found):
        return found
    return 1.0 if deft_io.VERSION_KEY in metadata else None


def _says_nothing(value: object) -> bool:
    """Whether a sidecar's field is as programs leave it where nobody has filled it in."""
    return value in (None, "", [], {}, "{}", "Unknown") or (value == 0 and not isinstance(value, bool))


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DeftError(f"{path}: is there and cannot be read; move it away ({reason_of(error)})") from None
    if not isinstance(found, dict):
        raise DeftError(f"{path}: is there and is no file of this kind; move it away")
    return found


def hashes_of(path: Path) -> dict[str, str]:
    """By which Civitai and UIs know a file: SHA256, AutoV2 (its first ten letters), and AutoV3, of the tensors alone
    (the first twelve; ComfyUI-Lora-Manager's `calculate_autov3`, commit 003ee55, says where it comes from).

    :raises DeftError: when it cannot be read
    """
    whole, tensors = hashlib.sha256(), hashlib.sha256()
    try:
        with open(path, "rb") as file:
            length = file.read(8)
            header = length + file.read(int.from_bytes(length, "little"))
            whole.update(header)
            with Bar(path.stat().st_size, f"hashing {path.name}", "B", unit_scale=True) as bar:
                while block := file.read(BLOCK):
                    whole.update(block)
                    tensors.update(block)
                    bar.add(len(block))
    except OSError as error:
        raise DeftError(f"{path}: cannot be read ({reason_of(error)})") from None
    found = whole.hexdigest()
    return {"AutoV2": found[:10], "AutoV3": tensors.hexdigest()[:12], "SHA256": found}
