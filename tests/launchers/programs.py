"""Programs that a user would write: run as scripts without a guard, from a folder of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests import recipes


def small(out: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A :func:`tests.recipes.recipe` of less than a second."""
    return recipes.recipe(out, "small", **sections | {"train": {"steps": 4} | sections.get("train", {})})


def start(folder: Path, source: str, **recipe: Any) -> subprocess.Popen[str]:
    """Start a script with *source* in *folder*, and *recipe* beside it as recipe.yaml, which JSON is too."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    (folder / "script.py").write_text(source)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "script.py"], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def ended(program: subprocess.Popen[str], folder: Path, timeout: float = 600) -> tuple[int, str, str]:
    """Wait for its end; return its exit code and what it printed. Fails where it has left a process behind in *folder*."""
    said, errors = program.communicate(timeout=timeout)
    until = time.monotonic() + 60
    while left := inhabitants(folder):
        assert time.monotonic() < until, f"left behind: {left}\n{errors}"
        time.sleep(0.1)
    return program.returncode, said, errors


def inhabitants(folder: Path) -> list[str]:
    """The commands of the processes that work in *folder*; ranks have sessions of their own, but stay there."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cwd").readlink() == folder:
                found.append((entry / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def forks(program: subprocess.Popen[str]) -> list[int]:
    """The processes that it has forked, which have its command line: its ranks, not multiprocessing's helpers."""
    line = Path(f"/proc/{program.pid}/cmdline").read_bytes()
    found = [int(pid) for path in Path(f"/proc/{program.pid}/task").glob("*/children") for pid in path.read_text().split()]
    return sorted(pid for pid in found if Path(f"/proc/{pid}/cmdline").read_bytes() == line)


def wait_for(path: Path, text: str, program: subprocess.Popen[str], timeout: float = 600) -> None:
    """Wait until the file *path* holds *text*."""
    until = time.monotonic() + timeout
    while not (path.exists() and text in path.read_text()):
        assert program.poll() is None, program.communicate()
        assert time.monotonic() < until, f"{path} does not hold {text!r}"
        time.sleep(0.05)
