"""What a run's output folder holds, from names, sizes and JSON alone: no tensor is read."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from bigvision.checkpoint import manifest
from bigvision.checkpoint.manifest import Damaged, ReadError, read_document
from bigvision.checkpoint.retention import folder_name, is_step_folder, sign, steps_in
from bigvision.errors import UserError

OTHERS = {
    "tmp": ("unfinished", "being written, or left by a run that was killed"),
    "pruned": ("unfinished", "half removed"),
    "aside": ("unfinished", "set aside while its step is written again"),
    "left": ("left", "kept by a run that went on from an earlier step; remove it yourself"),
}
"""State and reason of a folder by what follows its step."""
_OTHER = re.compile(rf"step-(\d{{8,}})\.({'|'.join(OTHERS)})-[0-9a-f]+")


@dataclass(frozen=True)
class Entry:
    """One folder of a run."""

    folder: str
    step: int
    state: str
    """ "valid", "damaged" or "unreadable", by the manifest, the files' sizes and progress.json; "unfinished" or "left"."""
    problem: str | None
    """What is wrong with one that is not valid."""
    saved: str
    """When, ISO 8601 in local time."""
    bytes: int
    samples: int | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    """Of the last evaluation before it was saved; None is a value that was not finite."""
    best: list[str] = field(default_factory=list)
    """Metrics in which no valid one is better."""


def entries(out: Path) -> list[Entry]:
    """The step folders of the run *out*, newest first, the unfinished ones among them.

    Raises:
        UserError: *out* is not the output folder of a run.
    """
    check_out(out)
    paths = [out / folder_name(step) for step in steps_in(out)]
    paths += [path for path in out.iterdir() if _OTHER.fullmatch(path.name)]
    found = []
    for path in paths:
        try:
            found.append(_entry(path))
        except FileNotFoundError:
            continue  # committed or pruned by a run that is going on
    best = _best([entry for entry in found if entry.state == "valid"])
    marked = [replace(entry, best=[name for name in entry.metrics if entry.folder in best.get(name, ())]) for entry in found]
    return sorted(marked, key=lambda entry: (-entry.step, entry.folder))


def table(found: list[Entry]) -> str:
    """*found* for people: a line each, under a line of headings."""
    names = list(dict.fromkeys(name for entry in found for name in entry.metrics))
    rows = [["step", "samples", "saved", "size", *names, "state"]]
    for entry in found:
        samples = "" if entry.samples is None else str(entry.samples)
        metrics = [_number(entry, name) for name in names]
        # Several of these may be of one step.
        state = f"{entry.state} {entry.folder}" if entry.state in ("unfinished", "left") else entry.state
        state += f": {entry.problem}" if entry.problem else ""
        rows.append([str(entry.step), samples, entry.saved[:16].replace("T", " "), size_text(entry.bytes), *metrics, state])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join([*map(str.ljust, row[:-1], widths), row[-1]]) for row in rows]
    if any(entry.best for entry in found):
        lines.append("* the best")
    return "\n".join(lines)


def check_out(out: Path) -> None:
    """Raises: UserError: *out* is not a folder, or a step folder instead of the run's."""
    if not out.is_dir():
        raise UserError(f"{out}: no such folder: name the output folder of a run, such as checkpoints/digits")
    if is_step_folder(out):
        raise UserError(f"{out}: a step folder: name the run's output folder, {out.absolute().parent}")


def check_step_folder(folder: Path) -> None:
    """Raises: UserError: *folder* is not a step folder."""
    if not is_step_folder(folder):
        there = [folder / folder_name(step) for step in steps_in(folder)[:1]] or ["checkpoints/digits/step-00000337"]
        raise UserError(f"{folder}: not a step folder: name one, such as {there[0]}")


def bytes_in(folder: Path) -> int:
    """Of all files in *folder*."""
    return sum(path.lstat().st_size for path in folder.iterdir() if path.is_file())


def size_text(size: int) -> str:
    """Bytes for people, in decimal units as ``checkpoint.shard_size`` spells them."""
    number, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while number >= 999.5 and len(units) > 1:
        number /= 1000
        del units[0]
    return f"{number:.3g} {units[0]}"


def _entry(folder: Path) -> Entry:
    saved, size = _saved(folder), bytes_in(folder)
    if match := _OTHER.fullmatch(folder.name):
        return Entry(folder.name, int(match[1]), *OTHERS[match[2]], saved, size)
    step = int(folder.name.removeprefix("step-"))
    try:
        progress = read_document(folder, manifest.read(folder), "progress.json")
    except (Damaged, ReadError) as error:
        state = "damaged" if isinstance(error, Damaged) else "unreadable"
        return Entry(folder.name, step, state, str(error), saved, size)
    return Entry(folder.name, step, "valid", None, saved, size, progress.get("samples"), _saved_metrics(progress))


def _saved_metrics(progress: dict[str, Any]) -> dict[str, float | None]:
    known = progress.get("metrics")
    found = known if isinstance(known, dict) else {}
    numbers = {name: float(value) for name, value in found.items() if isinstance(value, int | float)}
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def _best(valid: list[Entry]) -> dict[str, list[str]]:
    """The folders with the best value of each metric."""
    best = {}
    for name in {name for entry in valid for name in entry.metrics}:
        values = {entry.folder: value for entry in valid if (value := entry.metrics.get(name)) is not None}
        if values:
            wanted = max(values.values(), key=lambda value: sign(name) * value)
            best[name] = [folder for folder, value in values.items() if value == wanted]
    return best


def _number(entry: Entry, name: str) -> str:
    if name not in entry.metrics:
        return ""
    value = entry.metrics[name]
    return "not finite" if value is None else f"{value:.5g}{'*' if name in entry.best else ''}"


def _saved(folder: Path) -> str:
    # The manifest is written last, and nothing changes it afterwards.
    path = folder / manifest.NAME
    time = (path if path.exists() else folder).stat().st_mtime
    return datetime.fromtimestamp(time).astimezone().isoformat(timespec="seconds")
