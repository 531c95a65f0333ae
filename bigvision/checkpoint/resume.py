"""Which checkpoint a run starts from, and taking it over."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigvision.checkpoint import manifest
from bigvision.checkpoint.disk import sync_folder
from bigvision.checkpoint.manifest import Damaged, Run, read_document
from bigvision.checkpoint.reader import check_same_tensors, read_fragments, read_places
from bigvision.checkpoint.steps import folder_name, steps_in
from bigvision.errors import UserError
from bigvision.fragments import Fragment
from bigvision.runtime import all_or_none, from_main, gather_json
from bigvision.tensorfile import Place

Say = Callable[[str], None]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest, documents and headers verified; its tensors are checked while they are read."""

    folder: Path
    progress: dict[str, Any]
    """step, samples, lr, scalars, metrics and the run's configuration."""
    runs: dict[str, list[Run]]
    places: dict[str, dict[str, Place]]
    full: bool
    """Whether to compare the checksums of what is read."""
    what: str
    """The key that asked for it, or "auto": then an older one does as well."""

    def restore(self, fragments: list[Fragment], groups: tuple[str, ...] | None = None) -> None:
        """Fill *fragments*, on every rank; only those of *groups*, or all groups of the checkpoint.

        Raises:
            UserError: the checkpoint is of another model, or damaged.
        """
        if (problem := self._fill(fragments, groups)) is not None:
            raise UserError(f"{self._key}: {self.folder} is not a valid checkpoint: {problem}")

    def restore_or_older(self, fragments: list[Fragment], say: Say) -> Checkpoint:
        """Fill *fragments* from this checkpoint, on every rank, or from the newest older one that is whole; return it.

        Args:
            say: told when a damaged checkpoint is passed over.

        Raises:
            UserError: as :meth:`restore`, for one that was named; or none is whole.
        """
        found: Checkpoint | None = self
        while found is not None:
            if found.what != "auto":
                found.restore(fragments)
                return found
            problem = found._fill(fragments, None)
            if problem is None:
                return found
            say(_passed_over(found.folder, problem))
            found = _newest(found.folder.parent, found.full, say, below=int(found.folder.name.partition("-")[2]))
        raise AssertionError("either one is found or it is an error")

    @property
    def _key(self) -> str:
        return "checkpoint.resume" if self.what == "auto" else self.what

    def _fill(self, fragments: list[Fragment], groups: tuple[str, ...] | None) -> str | None:
        """As :meth:`restore`; says what is damaged, the same on every rank."""
        places = {group: held for group, held in self.places.items() if groups is None or group in groups}
        wanted = [fragment for fragment in fragments if groups is None or fragment.group in groups]
        all_or_none(lambda: check_same_tensors(self.folder, places, wanted, self._key))
        problem = None
        try:
            read_fragments(self.folder, self.runs, places, wanted, self.full)
        except Damaged as error:
            problem = str(error)
        return next((text for text in gather_json(problem) if text is not None), None)


def find(resume: str, out: Path, full: bool, say: Say) -> Checkpoint | None:
    """The checkpoint that ``checkpoint.resume`` means; None starts afresh. Called on every rank.

    Args:
        resume: "auto", "never", a step of *out*, or the path of a step folder.
        full: compare every checksum when tensors are read.
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
    if resume == "auto":
        return _newest(out, full, say) if steps else None
    if resume.isdigit():
        if int(resume) not in steps:
            held = f"; it has {', '.join(map(str, steps))}" if steps else ""
            raise UserError(f"checkpoint.resume: {out} has no checkpoint of step {resume}{held}")
        return open_checkpoint(out / folder_name(int(resume)), full, "checkpoint.resume")
    found = open_checkpoint(Path(resume), full, "checkpoint.resume")
    if steps and steps[0] > found.progress["step"]:
        raise UserError(
            f"checkpoint.resume: {resume} is at step {found.progress['step']}, but {out} already goes on to "
            f"{folder_name(steps[0])}: choose another --out"
        )
    return found


def open_checkpoint(folder: Path, full: bool, what: str) -> Checkpoint:
    """Open one step folder, on every rank.

    Raises:
        UserError: not there or damaged; *what* is the key that asked for it.
    """
    found, problem = _try_open(folder, full, what)
    if found is None:
        raise UserError(f"{what}: {folder} is not a valid checkpoint: {problem}")
    return found


def set_aside_later(out: Path, step: int, say: Say) -> None:
    """Rename the checkpoints of *out* beyond *step*, from which a run goes on another way; they are kept."""
    later = [number for number in steps_in(out) if number > step]
    for number in later:
        aside = out / f"{folder_name(number)}.left-{secrets.token_hex(4)}"
        (out / folder_name(number)).rename(aside)
        say(f"{folder_name(number)} is later than step {step}, from which this run goes on: kept as {aside.name}")
    if later:
        sync_folder(out)


def _newest(out: Path, full: bool, say: Say, below: int | None = None) -> Checkpoint:
    """The newest checkpoint of *out*, before step *below*, that opens."""
    steps: list[int] = from_main(steps_in(out))
    for step in steps:
        if below is None or step < below:
            folder = out / folder_name(step)
            found, problem = _try_open(folder, full, "auto")
            if found:
                return found
            say(_passed_over(folder, problem))
    raise UserError(
        f"checkpoint.resume: none of the {len(steps)} checkpoints in {out} is valid: choose another --out to start afresh"
    )


def _passed_over(folder: Path, problem: str) -> str:
    return f"{folder} is damaged ({problem}): falling back to the one before it"


def _try_open(folder: Path, full: bool, what: str) -> tuple[Checkpoint | None, str]:
    """All ranks come to the same verdict."""
    found, problem = None, None
    try:
        runs = manifest.read(folder)
        progress = read_document(folder, runs, "progress.json")
        if not isinstance(progress.get("step"), int):
            raise Damaged("progress.json names no step")
        for name in runs:
            # Others read those that we do not.
            if name.endswith(".json"):
                read_document(folder, runs, name)
        found = Checkpoint(folder, progress, runs, read_places(folder, runs), full, what)
    except (Damaged, OSError) as error:
        problem = str(error)
    problems = [text for text in gather_json(problem) if text is not None]
    return (None, problems[0]) if problems else (found, "")
