"""The step folders of a run: their names and contents, which of them are whole, and which are kept."""

from __future__ import annotations

import math
import re
import secrets
import shutil
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from bigvision.checkpoint import manifest
from bigvision.checkpoint.manifest import Damaged, ReadError, read_document
from bigvision.disk import sync_folder
from bigvision.errors import UserError

Progress = dict[int, dict[str, Any]]
"""progress.json of valid checkpoints, by step."""

OTHERS = {
    "tmp": ("unfinished", "being written, or left by a run that was killed"),
    "pruned": ("unfinished", "half removed"),
    "aside": ("unfinished", "set aside while its step is written again"),
    "left": ("left", "kept by a run that went on from an earlier step; remove it yourself"),
}
"""State and reason of a folder by what follows its step."""
OTHER = re.compile(rf"step-(\d{{8,}})\.({'|'.join(OTHERS)})-[0-9a-f]+")
LOWER = ("loss", "error", "mae", "mse")
"""Parts of the names of metrics that are better when they are lower."""
_STEP = re.compile(r"step-(\d{8,})")


def folder_name(step: int) -> str:
    """The name of a step's checkpoint in the output folder."""
    return f"step-{step:08}"


def steps_in(out: Path) -> list[int]:
    """Steps that have a folder in *out*, newest first; whether they verify is another matter."""
    names = [entry.name for entry in out.iterdir() if entry.is_dir()] if out.is_dir() else []
    return sorted((int(match[1]) for name in names if (match := _STEP.fullmatch(name))), reverse=True)


def is_step_folder(folder: Path) -> bool:
    """Whether *folder* is, was or is named as a checkpoint, and not the output folder of a run."""
    held = (folder / manifest.NAME).exists() or (folder / "progress.json").exists()
    return held or _STEP.fullmatch(folder.absolute().name) is not None


def step_folders(path: Path) -> list[Path]:
    """*path* itself when it is a step folder, else the step folders of the run *path*, newest first; an error without any."""
    if not path.is_dir():
        raise UserError(f"{path}: no such folder: name a step folder or the output folder of a run")
    if is_step_folder(path):
        return [path]
    if folders := [path / folder_name(step) for step in steps_in(path)]:
        return folders
    raise UserError(f"{path}: neither a step folder nor the output folder of a run that has some")


@dataclass(frozen=True)
class Retention:
    """What is kept: every checkpoint that one of these names."""

    last: int
    """The newest, as many."""
    best: str | None = None
    """The one whose evaluation has the best value of this metric; see :func:`_best_steps`."""
    every: int | None = None
    """Those of steps that this divides."""

    def keeps(self, progress: Progress) -> dict[int, str]:
        """The steps that stay, each with the reason where it is not one of the last."""
        kept = dict.fromkeys(sorted(progress, reverse=True)[: self.last], "")
        if self.every is not None:
            kept |= {step: f"every {self.every} steps" for step in progress if step % self.every == 0}
        if self.best is not None:
            kept |= {step: f"the best {self.best}" for step in _best_steps(progress, self.best)}
        return kept


def sign(metric: str) -> float:
    """By which values of a metric are multiplied so that the best is the largest: losses and errors are better when lower."""
    return -1.0 if any(word in metric for word in LOWER) else 1.0


def best_value(out: Path, name: str, newest: int) -> float | None:
    """The best value of the metric *name* that a checkpoint of *out* up to step *newest* was evaluated with, or None."""
    values = _values(_progress(out, newest), name, evaluated=True).values()
    return max(values, key=lambda value: sign(name) * value, default=None)


def _best_steps(progress: Progress, name: str) -> list[int]:
    """The step that was evaluated with the best value of the metric *name*, the first of equal ones.

    Earlier versions saved the metrics of the evaluation before. The best of these is kept beside, so that it does not stand in
    the way of one that was evaluated.
    """
    found = [_values(progress, name, evaluated) for evaluated in (True, False)]
    return [max(values, key=lambda step, values=values: sign(name) * values[step]) for values in found if values]


def _values(progress: Progress, name: str, evaluated: bool) -> dict[int, float]:
    """The finite values of the metric *name* by step: of evaluated steps, or where it is not saved which step was evaluated."""
    values = {}
    for step, facts in sorted(progress.items()):
        metrics = facts.get("metrics")
        value = metrics.get(name) if isinstance(metrics, dict) else None
        counts = facts.get("evaluated") == step if evaluated else "evaluated" not in facts
        if counts and isinstance(value, int | float) and math.isfinite(value):
            values[step] = value
    return values


def prune(out: Path, retention: Retention, newest: int) -> None:
    """Remove the valid checkpoints up to step *newest*, which was just written, that *retention* does not keep.

    Damaged ones are neither counted nor removed, and so are later ones: a run that fell back past them will replace them.
    Where one cannot be read (`ReadError`), nothing is removed.
    """
    progress = _progress(out, newest)
    for step in progress.keys() - retention.keeps(progress):
        remove_step(out / folder_name(step))


def _progress(out: Path, newest: int) -> Progress:
    """progress.json of the valid checkpoints up to step *newest*."""
    found = {}
    for step in steps_in(out):
        if step > newest:
            continue
        folder = out / folder_name(step)
        try:
            found[step] = read_document(folder, manifest.read(folder), "progress.json")
        except Damaged:
            continue
    return found


def remove_step(folder: Path) -> None:
    """Remove a checkpoint; under another name first, so that a half removed folder is never taken for one."""
    gone = folder.with_name(f"{folder.name}.pruned-{secrets.token_hex(4)}")
    folder.rename(gone)
    sync_folder(folder.parent)
    shutil.rmtree(gone, ignore_errors=True)


# For the commands: every byte is read.


def problems(folder: Path) -> list[str]:
    """Read every byte of a checkpoint; return what is wrong with each file that is damaged or cannot be read."""
    try:
        files = manifest.read(folder)
    except (Damaged, ReadError) as error:
        return [str(error)]
    found = []
    for ranges in files.values():
        try:
            manifest.verify(folder, ranges)
        except (Damaged, ReadError) as error:
            found.append(str(error))
    return found


def plan_pruning(out: Path, keep: int) -> tuple[dict[Path, str], list[Path], dict[Path, str]]:
    """Choose what a pruning to the last *keep* valid checkpoints removes. Every byte of all of them is read.

    Returns those that stay, each with why where it is not one of the last (the best of a run with ``checkpoint.keep_best``);
    those to remove; and those that are neither counted nor removed, each with what is wrong with it.
    """
    if keep < 1:
        raise UserError(f"--keep: {keep} would leave no checkpoint: use at least 1")
    progress: Progress = {}
    leave: dict[Path, str] = {}
    for step in steps_in(out):
        folder = out / folder_name(step)
        # Sizes would not do: the older ones go because these are there, and a flipped bit must not cost the run.
        if found := ["is a link"] if folder.is_symlink() else problems(folder):
            leave[folder] = found[0]
        else:
            progress[step] = read_document(folder, manifest.read(folder), "progress.json")
    kept = Retention(keep).keeps(progress)
    for name in sorted({str(name) for facts in progress.values() if (name := _keep_best(facts))}):
        kept |= {step: reason for step, reason in Retention(keep, name).keeps(progress).items() if reason}
    stay = {out / folder_name(step): kept[step] for step in progress if step in kept}
    return stay, [out / folder_name(step) for step in progress if step not in kept], leave


def _keep_best(progress: dict[str, Any]) -> Any:
    try:
        return progress["config"]["checkpoint"]["keep_best"]
    except (KeyError, TypeError):
        return None


@dataclass
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
    """The step folders of the run *out*, newest first, the unfinished ones among them; an error where it is no such folder."""
    check_out(out)
    paths = [out / folder_name(step) for step in steps_in(out)]
    paths += [path for path in out.iterdir() if OTHER.fullmatch(path.name)]
    found = []
    for path in paths:
        try:
            found.append(_entry(path))
        except FileNotFoundError:
            continue  # committed or pruned by a run that is going on
    valid = [entry for entry in found if entry.state == "valid"]
    for name in dict.fromkeys(name for entry in valid for name in entry.metrics):
        values = [value for entry in valid if (value := entry.metrics.get(name)) is not None]
        best = max(values, key=lambda value: sign(name) * value, default=None)
        for entry in valid:
            if best is not None and entry.metrics.get(name) == best:
                entry.best.append(name)
    return sorted(found, key=lambda entry: (-entry.step, entry.folder))


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
    # The manifest is written last, and nothing changes it afterwards.
    last = folder / manifest.NAME
    seconds, size = (last if last.exists() else folder).stat().st_mtime, bytes_in(folder)
    saved = datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")
    if match := OTHER.fullmatch(folder.name):
        return Entry(folder.name, int(match[1]), *OTHERS[match[2]], saved, size)
    step = int(folder.name.removeprefix("step-"))
    try:
        progress = read_document(folder, manifest.read(folder), "progress.json")
    except (Damaged, ReadError) as error:
        state = "damaged" if isinstance(error, Damaged) else "unreadable"
        return Entry(folder.name, step, state, str(error), saved, size)
    entry = Entry(folder.name, step, "valid", None, saved, size, progress.get("samples"))
    metrics = progress.get("metrics")
    for name, value in metrics.items() if isinstance(metrics, dict) else ():
        if isinstance(value, int | float):
            entry.metrics[name] = float(value) if math.isfinite(value) else None
    return entry


def _number(entry: Entry, name: str) -> str:
    if name not in entry.metrics:
        return ""
    value = entry.metrics[name]
    return "not finite" if value is None else f"{value:.5g}{'*' if name in entry.best else ''}"
