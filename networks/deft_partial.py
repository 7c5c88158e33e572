"""Where an output grows before it stands under its name: a hidden neighbour, which killed runs leave behind."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path


def partial_of(output: Path) -> Path:
    """`.NAME.PID.partial` beside an output, whose folder is made; those of processes that have ended are removed.

    :raises OSError: for a folder that cannot be made or read
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    for path in output.parent.glob(f".{_escaped(output.name)}.*.partial"):
        pid = path.name.removeprefix(f".{output.name}.").removesuffix(".partial")
        if pid.isdigit() and not _runs(int(pid)):
            remove(path)
    return output.with_name(f".{output.name}.{os.getpid()}.partial")


def remove(path: Path) -> None:
    """A file or a folder, if it is there; errors are passed over, the disk may be gone."""
    with contextlib.suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _escaped(name: str) -> str:
    return re.sub(r"([\[*?])", r"[\1]", name)


def _runs(pid: int) -> bool:
    if os.name != "posix" or not 0 < pid < 1 << 31:  # elsewhere os.kill ends the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
