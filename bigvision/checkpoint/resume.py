"""Which checkpoint a run starts from, and taking it over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from bigvision.checkpoint import manifest
from bigvision.checkpoint.commit import folder_name, steps_in
from bigvision.checkpoint.manifest import Damaged
from bigvision.checkpoint.reader import Place, read_document, read_fragments, read_places
from bigvision.errors import UserError
from bigvision.fragments import Fragment
from bigvision.runtime import all_or_none, from_main, gather_json


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that verified."""

    folder: Path
    progress: dict[str, Any]
    """step, samples, lr, scalars, metrics and the run's configuration."""
    places: dict[str, dict[str, Place]]

    def restore(
        self, fragments: list[Fragment], groups: tuple[str, ...] | None = None, what: str = "checkpoint.resume"
    ) -> None:
        """Fill *fragments*, on every rank; only those of *groups*, or all groups of the checkpoint.

        Raises:
            UserError: the checkpoint is of another model; *what* is the key that asked for it.
        """
        places = {group: held for group, held in self.places.items() if groups is None or group in groups}
        wanted = [fragment for fragment in fragments if groups is None or fragment.group in groups]
        all_or_none(lambda: read_fragments(self.folder, places, wanted, what))


def find(resume: str, out: Path, full: bool, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint that ``checkpoint.resume`` means; None starts afresh. Called on every rank.

    Args:
        resume: "auto", "never" or the path of a step folder.
        full: compare every checksum; otherwise sizes and headers.
        say: told when a damaged checkpoint is passed over.

    Raises:
        UserError: checkpoints are there and none is valid, or there are some and "never" would mix with them.
    """
    steps: list[int] = from_main(steps_in(out))
    if resume == "never":
        if steps:
            held = folder_name(steps[0])
            raise UserError(f"checkpoint.resume: never, but {out} already holds {held}: choose another --out or move it away")
        return None
    if resume != "auto":
        found = open_checkpoint(Path(resume), full, "checkpoint.resume")
        if steps and steps[0] > found.progress["step"]:
            raise UserError(
                f"checkpoint.resume: {resume} is at step {found.progress['step']}, but {out} already goes on to "
                f"{folder_name(steps[0])}: choose another --out"
            )
        return found
    for step in steps:
        folder = out / folder_name(step)
        found, problem = _try_open(folder, full)
        if found:
            return found
        say(f"{folder} is damaged ({problem}): falling back to the one before it")
    if steps:
        raise UserError(
            f"checkpoint.resume: none of the {len(steps)} checkpoints in {out} is valid: choose another --out to start afresh"
        )
    return None


def open_checkpoint(folder: Path, full: bool, what: str) -> Checkpoint:
    """Verify and open one step folder, on every rank.

    Raises:
        UserError: not there or damaged; *what* is the key that asked for it.
    """
    found, problem = _try_open(folder, full)
    if found is None:
        raise UserError(f"{what}: {folder} is not a valid checkpoint: {problem}")
    return found


def _try_open(folder: Path, full: bool) -> tuple[Checkpoint | None, str]:
    """Every rank checks its part of the bytes; all come to the same verdict."""
    found, problem = None, None
    try:
        runs = manifest.read(folder)
        if full:
            everything = [run for part in runs.values() for run in part]
            manifest.verify(folder, everything[dist.get_rank() :: dist.get_world_size()])
        found = Checkpoint(folder, read_document(folder, "progress.json"), read_places(folder, runs))
    except (Damaged, OSError) as error:
        problem = str(error)
    problems = [text for text in gather_json(problem) if text is not None]
    return (None, problems[0]) if problems else (found, "")
