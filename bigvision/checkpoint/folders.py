"""The folders in a run's output folder. Imports nothing heavy: looking at a run should not wait for torch."""

from __future__ import annotations

import re
import secrets
import shutil
from pathlib import Path

STEP = re.compile(r"step-(\d{8,})")
UNFINISHED = re.compile(r"step-\d{8,}\.(tmp|pruned)-[0-9a-f]+")
ASIDE = re.compile(r"(step-\d{8,})\.aside-[0-9a-f]+")


def folder_name(step: int) -> str:
    """The name of a step's checkpoint in the output folder."""
    return f"step-{step:08}"


def steps_in(out: Path) -> list[int]:
    """Steps that have a folder in *out*, newest first; whether they verify is another matter."""
    names = [entry.name for entry in out.iterdir() if entry.is_dir()] if out.is_dir() else []
    return sorted((int(match[1]) for name in names if (match := STEP.fullmatch(name))), reverse=True)


def remove(folder: Path) -> None:
    """Remove a step folder; under another name first, so that a half removed one is never taken for a checkpoint."""
    gone = folder.with_name(f"{folder.name}.pruned-{secrets.token_hex(4)}")
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
