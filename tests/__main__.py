"""The README's second command, and CI's: `python -m tests [pytest arguments]`.

Makes `.venv`, then runs linter, format check, type checker and tests in it, and prints how long each took.
"""

from __future__ import annotations

import subprocess
import sys
import time

from library.bootstrap import ROOT, ensure_environment, run_environment

TYPED = ("networks", "library", "train_network_deft.py")
# a worker for every core; each takes a gigabyte of memory and some seconds to start
PARALLEL = ("--numprocesses=logical", "--maxprocesses=8", "--dist=worksteal")


def main(pytest_arguments: list[str]) -> int:
    """Runs every stage, also after one has failed; returns 0 when all passed."""
    start = time.time()
    python = str(ensure_environment(ROOT / "tests" / "requirements.txt"))
    stages = {
        "lint": [python, "-m", "ruff", "check", "."],
        "format": [python, "-m", "ruff", "format", "--check", "."],
        "types": [python, "-m", "mypy", *TYPED],
        "tests": [python, "-m", "pytest", "--durations=10", *PARALLEL, *pytest_arguments],
    }
    times = {"environment": time.time() - start}
    failed = []
    for name, command in stages.items():
        print(f"--- {name}", flush=True)
        start = time.time()
        if subprocess.run(command, cwd=ROOT, env=run_environment(1)).returncode != 0:
            failed.append(name)
        times[name] = time.time() - start
    print("--- " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in times.items()))
    print(f"failed: {', '.join(failed)}" if failed else "all stages passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
