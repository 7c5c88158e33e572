"""Processes of a training's own that do not each import for five seconds what it needs: they are forked from one that
has done so, and have memory, signals and an exit code as any other.

They have that one's hash seed, which orders sets. Where it could matter, one side is started anew.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {"MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1"}
EXACT = os.environ | SETTINGS
IMPORTED = ["train_network_deft"]

if sys.platform == "linux":
    _context = multiprocessing.get_context("forkserver")
    _context.set_forkserver_preload(IMPORTED)
else:  # forking is not safe there
    _context = multiprocessing.get_context("spawn")


def start(
    words: Sequence[str], environment: Mapping[str, str] = EXACT, errors: Path | None = None, anew: bool = False
) -> BaseProcess:
    """As `python WORDS` in the repository's folder.

    :param errors: where it writes what goes to stderr
    :param anew: with a hash seed of its own, after seconds of imports
    """
    context = multiprocessing.get_context("spawn") if anew else _context
    process = context.Process(target=_run, args=(list(words), dict(environment), errors))
    with mock.patch.dict(os.environ, SETTINGS):  # of the process that all are forked from, too
        process.start()
    return process


def code_of(process: BaseProcess, seconds: float = 600) -> int:
    """Waits for its end."""
    process.join(seconds)
    assert process.exitcode is not None
    return process.exitcode


def _run(words: list[str], environment: dict[str, str], errors: Path | None) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for descriptor, file in ((1, os.devnull), (2, errors or os.devnull)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")
