"""What a training has warned of."""

from __future__ import annotations

import logging
from types import TracebackType

OURS = ("library", "networks", "train_network_deft", "__main__")
MOST = 12  # lines from the beginning, and as many from the end


class Told(logging.Handler):
    """Within its `with` block, remembers the warnings and errors of this program, in their order."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.first: list[str] = []
        self.last: list[str] = []
        self.left_out = 0

    def __enter__(self) -> Told:
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        logging.getLogger().removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Called by `logging`."""
        line = record.getMessage()
        if record.name.split(".")[0] not in OURS or line in self.first or line in self.last:
            return
        (self.first if len(self.first) < MOST else self.last).append(line)
        if len(self.last) > MOST:
            self.last.pop(0)
            self.left_out += 1

    def lines(self) -> list[str]:
        """Those that are shown."""
        gap = [f"… and {self.left_out} more …"] if self.left_out else []
        return [*self.first, *gap, *self.last]
