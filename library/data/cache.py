"""What is computed once, latents and what text encoders make of captions, under keys that say what it was made of.

An entry's key is a hash of everything that decides its content, so it can never be out of date: whatever changes, the
key does. Entries are safetensors files, whole or absent, and are checked when they are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import struct
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from library.transfer import is_small
from networks.deft_config import DeftError
from networks.deft_progress import Bar

logger = logging.getLogger(__name__)

FORMAT = 1  # to be raised whenever the same parts of a key come to give other tensors
LABEL = "deft_cache"  # of a file's metadata; one alone, since safetensors writes several in any order
DIGEST = 20  # bytes of every hash
ABANDONED = 24 * 3600  # seconds after which an unfinished file is one of a run that was killed

Tensors = dict[str, Tensor]
Part = Any  # None, bool, int, float, str, bytes, torch.dtype, or sequences and mappings (by str) of such


class Entries(Protocol):
    """Where entries are kept."""

    def has(self, key: str, check: bool = True) -> bool:
        """:param check: whether the content is verified, not only that it is there"""

    def read(self, key: str, check: bool = True) -> Tensors | None:
        """An entry, not to be changed in place; None where there is none."""

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps an entry; one that is there is replaced."""


class Memory:
    """Entries that end with the process."""

    def __init__(self) -> None:
        self._entries: dict[str, Tensors] = {}

    def has(self, key: str, check: bool = True) -> bool:
        return key in self._entries

    def read(self, key: str, check: bool = True) -> Tensors | None:
        return self._entries.get(key)

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        self._entries[key] = _apart(tensors)

    def place(self, device: torch.device) -> None:
        """Takes all entries to a device where they are small beside its memory; else, and at first, they are on the
        CPU."""
        if is_small(sum(one.nbytes for entry in self._entries.values() for one in entry.values()), device):
            for entry in self._entries.values():
                entry |= {name: one.to(device) for name, one in entry.items()}


class Store:
    """Entries in a folder, shared by all runs and processes that use it.

    A folder that cannot be written to, or is full, ends no training: that is told once, and what follows is kept in
    memory.

    :param folder: None for the user's own, see `default_folder`
    """

    def __init__(self, folder: Path | None = None):
        self.folder = default_folder() if folder is None else folder
        self._unwritten = Memory()
        self._told = self._cleared = False

    def has(self, key: str, check: bool = True) -> bool:
        """:param check: False reads the file's header alone, which also shows a file that was cut off"""
        if self._unwritten.has(key):
            return True
        return self.read(key) is not None if check else _is_entry(self._file(key), key)

    def read(self, key: str, check: bool = True) -> Tensors | None:
        """None also for a file that is damaged, or another's.

        :param check: False leaves the checksum out
        """
        kept = self._unwritten.read(key)
        if kept is not None:
            return kept
        try:
            content = self._file(key).read_bytes()
            tensors = load(content)
            checksum = _label_of(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]), key)
            return tensors if not check or checksum == _checksum(tensors) else None
        except Exception:  # whatever a damaged file makes of its parsers; it is made again
            return None

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """The file appears whole or not at all, also where several processes write it at once."""
        own = _apart(tensors)
        content = save(own, {LABEL: f"{FORMAT} {key} {_checksum(own)}"})
        unfinished = self.folder / "unfinished" / f"{key}.{uuid.uuid4().hex}"
        try:
            self._clear()
            try:
                with open(unfinished, "xb") as file:
                    file.write(content)
                self._file(key).parent.mkdir(exist_ok=True)
                os.replace(unfinished, self._file(key))
            finally:
                with contextlib.suppress(OSError):
                    unfinished.unlink(missing_ok=True)
        except OSError as error:
            if self.has(key):  # Windows replaces no file that another process has open
                return
            self._unwritten.write(key, own)
            if not self._told:
                logger.warning(
                    f"--cache_dir {self.folder}: it cannot be written to ({error.strerror or error}); what is computed "
                    "is kept in memory, and computed again in the next run"
                )
            self._told = True

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _clear(self) -> None:
        """Makes the folder of unfinished files, and removes those that killed runs have left there, once."""
        if self._cleared:
            return
        folder = self.folder / "unfinished"
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.iterdir():
            with contextlib.suppress(OSError):  # another process clears too
                if file.stat().st_mtime < time.time() - ABANDONED:
                    file.unlink()
        self._cleared = True


def default_folder() -> Path:
    """`deft` in the user's folder for caches, as the system has it.

    :raises DeftError: where the user has no home
    """
    home = os.path.expanduser("~")
    if sys.platform == "win32":
        place = os.environ.get("LOCALAPPDATA") or os.path.join(home, "AppData", "Local")
    elif sys.platform == "darwin":
        place = os.path.join(home, "Library", "Caches")
    else:
        place = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    if not os.path.isabs(place):
        raise DeftError("--cache_dir: there is no home folder to keep caches in; name a folder")
    return Path(place) / "deft"


# keys


def key_of(**parts: Part) -> str:
    """The key of what is made of these parts; other names, types or values give another.

    :raises TypeError: for a part that is not a `Part`
    """
    return hashlib.blake2b(_canonical([FORMAT, parts]), digest_size=DIGEST).hexdigest()


def latents_key(
    content: str,
    vae: str,
    dtype: torch.dtype,
    *,
    resized: tuple[int, int],
    crop: tuple[int, int, int, int],
    interpolation: str | None,
    flipped: bool,
    background: tuple[int, int, int],
    alpha_mask: bool,
    mask: str | None = None,
) -> str:
    """Of a picture's latents.

    :param content: `content_hash` of its file
    :param vae: its `fingerprint`
    :param resized: width and height that the upright picture is scaled to
    :param crop: left, top, width and height of what is encoded of that
    :param interpolation: None for sd-scripts' choice by direction
    :param background: behind transparent parts
    :param alpha_mask: whether the entry also holds the mask that transparency makes
    :param mask: `content_hash` of the file whose mask it holds
    """
    return key_of(
        what="latents",
        content=content,
        vae=vae,
        dtype=dtype,
        resized=resized,
        crop=crop,
        interpolation=interpolation,
        flipped=flipped,
        background=background,
        alpha_mask=alpha_mask,
        mask=mask,
    )


def text_key(
    caption: str, encoders: Sequence[str], tokenizers: Sequence[str], dtype: torch.dtype, **reading: Part
) -> str:
    """Of what text encoders make of a caption, as it is read.

    :param encoders: the `fingerprint` of each, in the model's order
    :param tokenizers: likewise, by `tokenizer_fingerprint`
    :param dtype: of the result
    :param reading: every option that changes it: max_token_length, clip_skip, weighted_captions, autocast's dtype, ...
    """
    return key_of(
        what="text", caption=caption, encoders=encoders, tokenizers=tokenizers, dtype=dtype, reading=dict(reading)
    )


def generator_of(key: str) -> torch.Generator:
    """Seeded by the key alone: for what is drawn once and kept, whatever was made before."""
    return torch.Generator().manual_seed(int(key[:16], 16) >> 1)


def content_hash(data: bytes) -> str:
    """Of a file's bytes."""
    return hashlib.blake2b(data, digest_size=DIGEST).hexdigest()


def fingerprint(module: nn.Module) -> str:
    """Of a model's class, configuration and weights, to the bit, wherever they are; 1 to 2 s a gigabyte and core.

    :raises DeftError: for weights without values
    """
    tensors = module.state_dict()
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise DeftError(f"{type(module).__name__}: {name} has no values, so there is no key for caches")
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    hashes: dict[str, Part] = {}
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,  # hashlib lets other threads run meanwhile
        Bar(total, "fingerprint", "B", unit_scale=True) as bar,
    ):
        for (name, tensor), digest in zip(tensors.items(), pool.map(_hashed, tensors.values()), strict=True):
            hashes[name] = (*_described(tensor), digest)
            bar.add(tensor.numel() * tensor.element_size())
    return key_of(what=type(module).__qualname__, config=_config(module), weights=hashes)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Of a tokenizer of transformers': its vocabulary, its rules and its special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {"vocabulary": tokenizer.get_vocab()} if backend is None else json.loads(backend.to_str())
    kept = {name: rule for name, rule in rules.items() if name not in ("padding", "truncation")}  # of the last call
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return key_of(what=type(tokenizer).__qualname__, rules=json.dumps(kept, sort_keys=True), special=special)


def _canonical(part: Part) -> bytes:
    """A kind, a length and the bytes, so that no two parts read the same, alone or in a row."""
    if part is None or isinstance(part, bool):
        kind, content = "b", repr(part).encode()
    elif isinstance(part, int):
        kind, content = "i", str(part).encode()
    elif isinstance(part, float):
        kind, content = "f", struct.pack("<d", part)
    elif isinstance(part, str):
        kind, content = "s", part.encode("utf-8", "surrogatepass")
    elif isinstance(part, bytes):
        kind, content = "y", part
    elif isinstance(part, torch.dtype):
        kind, content = "t", str(part).encode()
    elif isinstance(part, Mapping):
        if not all(isinstance(name, str) for name in part):
            raise TypeError("mappings in a key are by names")
        kind, content = "m", b"".join(_canonical(name) + _canonical(part[name]) for name in sorted(part))
    elif isinstance(part, (list, tuple)):
        kind, content = "l", b"".join(map(_canonical, part))
    else:
        raise TypeError(f"{type(part).__name__} cannot be part of a key")
    return f"{kind}{len(content)}:".encode() + content


def _config(module: nn.Module) -> str:
    """A model's configuration, without where it came from and who wrote it."""
    config = getattr(module, "config", {})
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    kept = {name: value for name, value in values.items() if name[0] != "_" and name != "transformers_version"}
    return json.dumps(kept, sort_keys=True, default=str)


# files


def _apart(tensors: Mapping[str, Tensor]) -> Tensors:
    """Copies on the CPU that share no memory: a part of a batch would keep all of it."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def _is_entry(file: Path, key: str) -> bool:
    """Whether its header is this entry's, and its length the header's."""
    try:
        with open(file, "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(min(length, size)))
        _label_of(header, key)
        end = max((tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"), default=0)
        return size == 8 + length + end
    except Exception:  # see `Store.read`
        return False


def _label_of(header: Mapping[str, Any], key: str) -> str:
    """The checksum in a file's header.

    :raises ValueError: for another entry's file; foreign ones raise whatever they do
    """
    number, of, checksum = header["__metadata__"][LABEL].split()
    if (number, of) != (str(FORMAT), key):
        raise ValueError(key)
    return checksum


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Of names, dtypes, shapes and bytes."""
    total = hashlib.blake2b(digest_size=DIGEST)
    for name in sorted(tensors):
        total.update(_canonical([name, *_described(tensors[name])]))
        total.update(_bytes_of(tensors[name]))
    return total.hexdigest()


def _described(tensor: Tensor) -> tuple[torch.dtype, list[int]]:
    return tensor.dtype, list(tensor.shape)


def _bytes_of(tensor: Tensor) -> memoryview:
    """Without a copy, where the tensor is contiguous and on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _hashed(tensor: Tensor) -> bytes:
    return hashlib.blake2b(_bytes_of(tensor), digest_size=DIGEST).digest()
