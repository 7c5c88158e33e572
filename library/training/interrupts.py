"""Ctrl-C and SIGTERM: the step is finished and saved before a training ends."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]


class Interrupted(Exception):
    """A training was asked to end, and has saved what goes on from there.

    :param number: of the signal
    :param state: the folder for --resume
    """

    def __init__(self, number: int, state: str | None):
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
