"""Ctrl-C and other signals: what is learnt is saved before a training ends, unless it is asked twice."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

# of Ctrl-C, a shutdown, a terminal that is closed, Windows' Ctrl-Break
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
SIGNALS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]


class Interrupted(Exception):
    """A training was asked to end, and has saved what goes on from there.

    :param number: of the signal
    :param state: the folder for --resume; None where it could not be written
    :param saved: what else there is, in words
    """

    def __init__(self, number: int, state: Path | None, saved: str):
        super().__init__(number, state, saved)
        self.number, self.state, self.saved = number, state, saved

    def __str__(self) -> str:
        return f"interrupted; {self.saved}"

    @property
    def exit_code(self) -> int:
        """A shell's for a program that a signal ends."""
        return 128 + self.number


class EndedAtOnce(KeyboardInterrupt):
    """A signal that is not waited for: before the first step, or the second one; its text is for the user."""

    def __init__(self, number: int, text: str):
        super().__init__(text)
        self.exit_code = 128 + number


class Interrupts:
    """Within its `with` block, a signal raises `EndedAtOnce`; behind `hold`, the first one is only noted in `number`,
    and the second one raises it."""

    number = 0

    def __init__(self) -> None:
        self._saved: Callable[[], str] | None = None
        self._asked = False

    def hold(self, saved: Callable[[], str]) -> None:
        """From here on there is something to lose.

        :param saved: what is saved by then, in words
        """
        self._saved = saved

    def __enter__(self) -> Interrupts:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere, Python sets no handlers
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._saved is None:
            raise EndedAtOnce(number, "interrupted before the first step: nothing had been trained yet")
        hangup = number == getattr(signal, "SIGHUP", None)  # sent twice by some shells, and by nobody who is in haste
        if self._asked and not hangup:
            raise EndedAtOnce(number, f"ended at once; {self._saved()}")
        self._asked |= not hangup
        self.number = self.number or number
        with contextlib.suppress(RuntimeError):  # of a stream that was being written to as the signal came
            logger.warning("ending when the step, picture or file under way is done; again: at once, without saving")


def how_to_go_on(ended: Interrupted, argv: Sequence[str], windows: bool = os.name == "nt") -> str:
    """The command that does, in words of a terminal.

    :param argv: the training's arguments
    :param windows: whether it is one of Windows
    """
    if ended.state is None:
        return f"interrupted; the state could not be saved; {ended.saved}"
    rest, skip = [], False
    for word in argv:
        if not skip and word != "--resume" and not word.startswith("--resume="):
            rest.append(word)
        skip = word == "--resume"
    return f"interrupted; to go on:\n{command([*rest, '--resume', str(ended.state)], windows)}"


def command(arguments: Sequence[str], windows: bool = os.name == "nt") -> str:
    """What a terminal is given to start this program with these arguments.

    :param windows: whether it is one of Windows
    """
    words = [*_launcher(windows), sys.argv[0], *arguments]
    return " ".join(map(_windows_word, words)) if windows else shlex.join(words)


def _launcher(windows: bool) -> list[str]:
    """What starts as many processes as there are, by what accelerate's and torch's launchers leave in the
    environment."""
    there = os.environ
    processes = int(there.get("WORLD_SIZE", "1"))
    if processes == 1:
        return ["python"]
    here = int(there.get("LOCAL_WORLD_SIZE", processes))
    machines = processes // here
    on_cpus = there.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    address = there.get("MASTER_ADDR", ""), there.get("MASTER_PORT", "")
    rank = there.get("GROUP_RANK", "0")
    if on_cpus:  # of these, accelerate launch starts one alone
        command = [] if windows else ["env", "ACCELERATE_USE_CPU=true"]
        command += ["torchrun", "--nproc_per_node", str(here)]
        names = ("--nnodes", "--node_rank", "--master_addr", "--master_port")
    else:
        command = ["accelerate", "launch", "--multi_gpu", "--num_processes", str(processes)]
        names = ("--num_machines", "--machine_rank", "--main_process_ip", "--main_process_port")
    more = zip(names, (str(machines), rank, *address), strict=True) if machines > 1 else ()
    return [*command, *(word for pair in more for word in pair)]


def _windows_word(word: str) -> str:
    """In quotes, unless it is of letters that neither cmd nor PowerShell takes for its own."""
    if re.fullmatch(r"[\w.:/\\=+-]+", word):
        return word
    return '"' + subprocess.list2cmdline([f" {word}"])[2:]  # what has a space, it quotes
