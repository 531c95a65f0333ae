"""Watch a process's anonymous memory: ``resident.py PID`` prints it in bytes, and once its input ends the most that there was.

A process of its own: a thread of the watched one would wait while a long call there holds the interpreter. It imports next to
nothing, so that it starts at once.
"""

from __future__ import annotations

import select
import sys
from pathlib import Path

INTERVAL = 0.003


def main() -> None:
    status = Path("/proc", sys.argv[1], "status")
    most = anonymous(status)
    print(most, flush=True)
    while not select.select([sys.stdin], [], [], INTERVAL)[0]:
        most = max(most, anonymous(status))
    print(max(most, anonymous(status)), flush=True)


def anonymous(status: Path) -> int:
    """RssAnon in bytes: neither files that are mapped nor the page cache."""
    line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
