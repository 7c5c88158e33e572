"""Makes the virtual environment that the README's commands run in. Standard library only: it runs before all else."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / ".venv"
TORCH = "torch==2.13.0"  # what the tests were run with; installed only where no torch is there yet


def ensure_environment(requirements: Path) -> Path:
    """The Python of `.venv`, made and filled if it is not there yet; prints what it does and how long it took.

    A torch that is already in `.venv` is kept, so a build for another device can be installed there first.

    :param requirements: a pip requirements file
    """
    if sys.version_info < (3, 10):  # noqa: UP036, since this file is what an older Python meets
        sys.exit(f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}")
    python = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "requirements.txt", requirements))
    stamp = ENVIRONMENT / f"installed-{hashlib.sha256((TORCH + wanted).encode()).hexdigest()[:16]}"
    if stamp.exists():
        return python
    start = time.time()
    print(f"setting up {ENVIRONMENT} (once; PyTorch is the large part)", flush=True)
    if not python.exists():
        try:
            venv.create(ENVIRONMENT, with_pip=True)
        except (subprocess.CalledProcessError, OSError) as error:
            sys.exit(f"no virtual environment could be made (Debian, Ubuntu: apt install python3-venv): {error}")
    if not _succeeds(python, "-m", "pip", "--version") and not _succeeds(python, "-m", "ensurepip"):
        sys.exit(f"{ENVIRONMENT} has no pip (Debian, Ubuntu: apt install python3-venv); delete it and try again")
    if not _succeeds(python, "-c", "import torch"):
        _pip(python, TORCH)
    _pip(python, "-r", str(requirements))
    stamp.touch()
    print(f"set up in {time.time() - start:.0f} s", flush=True)
    return python


def run_environment(threads: int) -> dict[str, str]:
    """Environment variables for the commands: no hub, and so many threads, since the models they run are tiny."""
    return {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads), **os.environ}


def _succeeds(python: Path, *arguments: str) -> bool:
    return subprocess.run([python, *arguments], capture_output=True).returncode == 0


def _pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    if subprocess.run(command).returncode != 0:
        sys.exit(f"installation failed: {' '.join(command)}")
