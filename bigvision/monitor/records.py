"""The files with a JSON object on each line, such as metrics.jsonl: read past damage, append behind it."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in *path*, without lines that are cut, damaged or no object; none where there is no file.

    An `OSError` where the file is there and cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    found: list[Any] = []
    for line in text.split("\n"):
        with suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict)]


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add *line* to *path*; behind what a kill has cut it stands on a line of its own."""
    with path.open("a+b") as file:
        cut = b""
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            cut = b"" if file.read(1) == b"\n" else b"\n"
        # In one piece: several ranks may add to one file.
        file.write(cut + json.dumps(line).encode() + b"\n")
