"""Install this project and its dev extra into the environment that runs this file, for `make install`.

It prints a line for each large package instead of pip's hundreds, the time every 15 s, and all of pip's output if pip fails.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time

PIP = ["-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off", "-c", "constraints.txt", "-e", ".[dev]"]
LARGE_MB = 10
QUIET_SECONDS = 15


def main() -> int:
    start, done = time.monotonic(), threading.Event()
    threading.Thread(target=_print_time, args=(start, done), daemon=True).start()
    pip = subprocess.Popen(
        [sys.executable, *PIP], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    assert pip.stdout is not None
    written = []
    for line in pip.stdout:
        written.append(line)
        if text := shortened(line):
            print(f"  {text}", flush=True)
    code = pip.wait()
    done.set()
    if code:
        print("".join(written), f"error: pip failed with exit code {code}; its output is above", sep="", file=sys.stderr)
        return code
    print(f"  installed in {time.monotonic() - start:.0f} s", flush=True)
    return 0


def shortened(line: str) -> str | None:
    """What to print for one line of pip's, or None."""
    if match := re.match(r"\s*(?:Downloading|Using cached) \S*?([\w.]+)-([\w.+]+)-\S+\.whl \(([\d.]+) (MB|GB)\)", line):
        name, version, size, unit = match.groups()
        return f"{name} {version}, {size} {unit}" if unit == "GB" or float(size) >= LARGE_MB else None
    if line.startswith("Installing collected packages:"):
        return f"unpacking {line.count(',') + 1} packages"
    return None


def _print_time(start: float, done: threading.Event) -> None:
    while not done.wait(QUIET_SECONDS):
        print(f"  ... {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
