"""Checking every byte of checkpoints, and removing the ones that are not needed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from bigvision.checkpoint import manifest
from bigvision.checkpoint.listing import is_step_folder
from bigvision.checkpoint.manifest import Damaged
from bigvision.checkpoint.steps import folder_name, steps_in
from bigvision.errors import UserError


def step_folders(path: Path) -> list[Path]:
    """*path* itself when it is a step folder, else the step folders of the run *path*, newest first.

    Raises:
        UserError: it is neither.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder: name a step folder or the output folder of a run")
    if is_step_folder(path) or path.absolute().name in {folder_name(step) for step in steps_in(path.absolute().parent)}:
        return [path]
    if folders := [path / folder_name(step) for step in steps_in(path)]:
        return folders
    raise UserError(f"{path}: neither a step folder nor the output folder of a run that has some")


def problems(folder: Path) -> list[str]:
    """Read every byte of a checkpoint; return what is wrong with each file that is damaged, nothing when it is whole."""
    try:
        files = manifest.read(folder)
    except Damaged as error:
        return [str(error)]
    found = []
    for runs in files.values():
        try:
            manifest.verify(folder, runs)
        except Damaged as error:
            found.append(str(error))
    return found


@dataclass
class Pruning:
    """What becomes of each step folder."""

    keep: list[Path] = field(default_factory=list)
    remove: list[Path] = field(default_factory=list)
    leave: dict[Path, str] = field(default_factory=dict)
    """Neither counted nor removed, with what is wrong with each."""


def plan_pruning(out: Path, keep: int) -> Pruning:
    """Choose what a pruning to the last *keep* valid checkpoints removes. Every byte of all of them is read.

    Raises:
        UserError: *keep* is not positive.
    """
    if keep < 1:
        raise UserError(f"--keep: {keep} would leave no checkpoint: use at least 1")
    plan = Pruning()
    for step in steps_in(out):
        folder = out / folder_name(step)
        # Sizes would not do: the older ones go because these are there, and a flipped bit must not cost the run.
        if found := ["is a link"] if folder.is_symlink() else problems(folder):
            plan.leave[folder] = found[0]
        else:
            (plan.keep if len(plan.keep) < keep else plan.remove).append(folder)
    return plan
