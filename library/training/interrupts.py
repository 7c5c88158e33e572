"""Ctrl-C and SIGTERM: the step is finished and saved before a training ends."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]


class Interrupted(Exception):
    """A training was asked to end, and has saved what goes on from there.

    :param number: of the signal
    :param state: the folder for --resume; None where it could not be written
    """

    def __init__(self, number: int, state: Path | None):
        super().__init__(number, state)
        self.number, self.state = number, state

    @property
    def exit_code(self) -> int:
        """A shell's for a program that a signal ends."""
        return 128 + self.number


class Interrupts:
    """Within its `with` block, a signal is noted in `number`; the same one again ends the process as ever."""

    number = 0

    def __enter__(self) -> Interrupts:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere, Python sets no handlers
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        signal.signal(number, self._before[number])
        logger.warning("ending after this step; what is learnt will be saved. Again: end at once, saving nothing")


def how_to_go_on(ended: Interrupted, argv: Sequence[str]) -> str:
    """The command that does, for a terminal of this system.

    :param argv: the training's arguments
    """
    if ended.state is None:
        return "interrupted; the state could not be saved"
    rest, skip = [], False
    for word in argv:
        if not skip and word != "--resume" and not word.startswith("--resume="):
            rest.append(word)
        skip = word == "--resume"
    command = ["python"] if int(os.environ.get("WORLD_SIZE", "1")) == 1 else ["accelerate", "launch"]
    command += [sys.argv[0], *rest, "--resume", str(ended.state)]
    joined = subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)
    return f"interrupted; to go on:\n{joined}"
