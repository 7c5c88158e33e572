"""Embeddings on the disk, by what was embedded: a model sees every picture and text once."""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from networks.deft_config import DeftError

WAIT = 60.0  # seconds for another process that writes
AT_ONCE = 500  # keys of one question; SQLite allows some thousand


def digest_of(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


class Store:
    """Vectors by key in one file, which several processes may share.

    :param file: is made, with its folder, where it is not there
    :raises DeftError: where it is no such file, or cannot be written
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        with self._open() as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS embeddings (key TEXT PRIMARY KEY, value BLOB)")

    def get(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Those that are there, float32 vectors."""
        wanted = list(dict.fromkeys(keys))
        found: dict[str, Tensor] = {}
        with self._open() as connection:
            for start in range(0, len(wanted), AT_ONCE):
                some = wanted[start : start + AT_ONCE]
                marks = ",".join("?" * len(some))
                rows = connection.execute(f"SELECT key, value FROM embeddings WHERE key IN ({marks})", some)
                found.update(
                    (key, torch.from_numpy(np.frombuffer(value, "<f4").astype(np.float32))) for key, value in rows
                )
        return found

    def put(self, embeddings: Mapping[str, Tensor]) -> None:
        """Adds these, all or none."""
        rows = [
            (key, value.detach().cpu().float().numpy().astype("<f4").tobytes()) for key, value in embeddings.items()
        ]
        with self._open() as connection:
            connection.executemany("INSERT OR REPLACE INTO embeddings VALUES (?, ?)", rows)

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with contextlib.closing(sqlite3.connect(self._file, timeout=WAIT)) as connection, connection:
                yield connection
        except sqlite3.Error as error:
            raise DeftError(f"{self._file}: {error}; it only holds embeddings and may be deleted") from None
