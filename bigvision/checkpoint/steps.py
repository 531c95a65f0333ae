"""The step folders of an output folder."""

from __future__ import annotations

import re
from pathlib import Path

_STEP = re.compile(r"step-(\d{8,})")


def folder_name(step: int) -> str:
    """The name of a step's checkpoint in the output folder."""
    return f"step-{step:08}"


def steps_in(out: Path) -> list[int]:
    """Steps that have a folder in *out*, newest first; whether they verify is another matter."""
    names = [entry.name for entry in out.iterdir() if entry.is_dir()] if out.is_dir() else []
    return sorted((int(match[1]) for name in names if (match := _STEP.fullmatch(name))), reverse=True)
