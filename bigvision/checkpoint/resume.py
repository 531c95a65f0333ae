"""Which checkpoint a run starts from, and taking it over."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, TypeVar

from bigvision.checkpoint import manifest
from bigvision.checkpoint.manifest import ByteRange, Damaged, read_document, retry_reading
from bigvision.checkpoint.reader import Tensors, check_same_tensors
from bigvision.checkpoint.retention import folder_name, is_step_folder, steps_in
from bigvision.disk import sync_folder
from bigvision.errors import UserError, nearest
from bigvision.fragments import Fragment
from bigvision.runtime import RankFailure, all_or_none, from_main, gather_json

T = TypeVar("T")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest, documents and headers verified; its tensors are checked while they are read."""

    tensors: Tensors
    progress: dict[str, Any]
    """step, samples, lr, scalars, metrics and the run's configuration."""
    card: dict[str, Any]
    """config.json: timm's model card, with the class names."""
    full: bool
    """Whether to compare the checksums of what is read."""
    what: str
    """The key that asked for it, or "auto": then an older one does as well."""

    @property
    def folder(self) -> Path:
        return self.tensors.folder

    def restore(
        self, fragments: list[Fragment], groups: tuple[str, ...] | None = None, without: tuple[str, ...] = ()
    ) -> None:  # fmt: skip
        """Fill *fragments*, on every rank; only those of *groups*, or all groups of the checkpoint.

        Tensors of the checkpoint whose names begin with one of *without* are not needed. `UserError` where the checkpoint is of
        another model, or damaged; `RankFailure` where a rank cannot read it.
        """
        if problem := self._fill(fragments, groups, without=without):
            raise _invalid(self.folder, problem, self._key)

    def restore_or_older(
        self, fragments: list[Fragment], say: Say, accept: Callable[[Checkpoint], None] = lambda found: None,
        why: Callable[[Checkpoint], str] = lambda found: "",
    ) -> Checkpoint:  # fmt: skip
        """Fill *fragments* from this checkpoint, on every rank, or from the newest older one that is whole; return it.

        Averaged weights are left out where the run or the checkpoint has none. *say* gets a line for that, and for each damaged
        checkpoint. *accept* gets an older one before it is read, and raises where the run must not go on from that. *why* gets
        one that has other tensors, and returns the reason and the fix, or nothing where it knows none. Raises as
        :meth:`restore` for one that was named, and a `UserError` where none is whole.
        """
        found = self
        while problem := found._fill(fragments, found._groups(fragments), why):
            if found.what != "auto":
                raise _invalid(found.folder, problem, found._key)
            say(_falls_back(found.folder, problem))
            found = _newest(found.folder.parent, found.full, say, below=int(found.folder.name.partition("-")[2]))
            accept(found)
        kept, wanted = "ema" in found.tensors.places, any(fragment.group == "ema" for fragment in fragments)
        if wanted and not kept:
            say(f"{found.folder} has no averaged weights: the average (ema.decay) begins at its weights")
        if kept and not wanted:
            say(f"{found.folder} has averaged weights, which this run does not go on with: ema.decay is null")
        return found

    def _groups(self, fragments: list[Fragment]) -> tuple[str, ...]:
        """All groups of *fragments* and of this checkpoint, but "ema" where only one of them has it."""
        groups, theirs = {fragment.group for fragment in fragments}, self.tensors.places.keys()
        return tuple(sorted((groups | theirs) - ({"ema"} - (groups & theirs))))

    def is_in(self, out: Path) -> bool:
        """Whether it is one of *out*."""
        return self.folder.absolute().parent.resolve() == out.resolve()

    @property
    def _key(self) -> str:
        return "checkpoint.resume" if self.what == "auto" else self.what

    def _fill(
        self, fragments: list[Fragment], groups: tuple[str, ...] | None, why: Callable[[Checkpoint], str] = lambda found: "",
        without: tuple[str, ...] = (),
    ) -> str:  # fmt: skip
        """As :meth:`restore`; returns what is damaged, the same on every rank."""
        places = {
            group: {name: place for name, place in held.items() if not name.startswith(without)} if without else held
            for group, held in self.tensors.places.items()
            if groups is None or group in groups
        }
        wanted = [fragment for fragment in fragments if groups is None or fragment.group in groups]
        all_or_none(lambda: check_same_tensors(self.folder, places, wanted, self._key, lambda: why(self)))
        return _agreed(self.folder, lambda: self.tensors.restore(wanted, self.full))[1]


def find(resume: str, out: Path, full: bool, say: Say) -> Checkpoint | None:
    """The checkpoint that ``checkpoint.resume`` means; None starts afresh. Called on every rank.

    *resume* is "auto", "never", a step of *out*, or the path of a step folder; *full* compares every checksum when tensors are
    read; *say* gets a line for each damaged checkpoint. Where no checkpoint is valid, or "never" would mix with those that are
    there, it is a `UserError`.
    """
    steps = _steps(out)
    if resume == "never":
        if steps:
            held = folder_name(steps[0])
            raise UserError(f"checkpoint.resume: never, but {out} already holds {held}: choose another --out or move it away")
        return None
    if resume == "auto":
        return _newest(out, full, say) if steps else None
    if resume.isdecimal():
        if int(resume) not in steps:
            held = f"; it has {', '.join(map(str, steps))}" if steps else ""
            raise UserError(f"checkpoint.resume: {out} has no checkpoint of step {resume}{held}")
        return open_checkpoint(out / folder_name(int(resume)), full, "checkpoint.resume")
    all_or_none(lambda: _check_named(resume))
    found = open_checkpoint(Path(resume), full, "checkpoint.resume")
    if steps and steps[0] > found.progress["step"] and not found.is_in(out):
        raise UserError(
            f"checkpoint.resume: {resume} is at step {found.progress['step']}, but {out} already goes on to "
            f"{folder_name(steps[0])}: choose another --out"
        )
    return found


def _check_named(resume: str) -> None:
    """Raises: UserError: *resume* names no folder, or that of a run."""
    path = Path(resume)
    if not path.is_dir():
        hint = nearest(resume.lower(), ("auto", "never")) or "; name a step folder, such as OUT/step-00000100, or a step"
        raise UserError(f"checkpoint.resume: {resume} is not a folder{hint}")
    if not is_step_folder(path) and (steps := steps_in(path)):
        newest = path / folder_name(steps[0])
        raise UserError(f"checkpoint.resume: {resume} is the folder of a run: name one of its steps, such as {newest}")


def open_checkpoint(folder: Path, full: bool, what: str) -> Checkpoint:
    """Open one step folder, on every rank; where it is missing or damaged, a `UserError` of *what*, the key that asked."""
    found, problem = _try_open(folder, full, what)
    if found is None:
        raise _invalid(folder, problem, what)
    return found


def _invalid(folder: Path, problem: str, what: str) -> UserError:
    return UserError(f"{what}: {folder} is not a valid checkpoint: {problem}")


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
    steps = _steps(out)
    for step in steps:
        if below is None or step < below:
            folder = out / folder_name(step)
            found, problem = _try_open(folder, full, "auto")
            if found:
                return found
            say(_falls_back(folder, problem))
    raise UserError(
        f"checkpoint.resume: none of the {len(steps)} checkpoints in {out} is valid: choose another --out to start afresh"
    )


def _steps(out: Path) -> list[int]:
    """The steps that rank 0 sees, on every rank."""
    return from_main(all_or_none(lambda: retry_reading(out, lambda: steps_in(out))))


def _falls_back(folder: Path, problem: str) -> str:
    return f"{folder} is damaged ({problem}): falling back to the one before it"


def _try_open(folder: Path, full: bool, what: str) -> tuple[Checkpoint | None, str]:
    """The checkpoint in *folder*, or what is damaged; the same on every rank."""

    def read() -> Checkpoint:
        tensors = Tensors(folder)
        # Also those that only other tools read.
        documents = {name: read_document(folder, tensors.ranges, name) for name in tensors.ranges if name.endswith(".json")}
        progress = documents["progress.json"]
        if not isinstance(progress.get("step"), int):
            raise Damaged("progress.json names no step")
        return Checkpoint(tensors, progress, documents["config.json"], full, what)

    return _agreed(folder, read)


def _agreed(folder: Path, read: Callable[[], T]) -> tuple[T | None, str]:
    """Return what *read* returns, or None and what is damaged, the same on every rank.

    A checkpoint is damaged where all ranks find it so: a run that falls back past a checkpoint will replace it, and must not
    do so because one host has lost its disk or reads other bytes than the others. Where a rank cannot read, or not all ranks
    find the damage that one has found, it is a `RankFailure`.
    """

    def attempt() -> tuple[T | None, Damaged | None]:
        try:
            return read(), None
        except Damaged as error:
            return None, error

    result, damage = all_or_none(attempt)
    reports = gather_json(damage and [str(damage), damage.part and astuple(damage.part)])
    if not any(reports):
        return result, ""
    first = next(rank for rank, report in enumerate(reports) if report)
    text = reports[first][0]
    doubtful = [ByteRange(*report[1]) for report in reports if report and report[1]]

    def finds_damage() -> bool:
        """Whether this rank finds damage too: each rank has read other bytes, and looks at those of the others now."""
        if damage is None:
            try:
                manifest.verify(folder, doubtful)
            except Damaged:
                return True
        return damage is not None

    verdicts = gather_json(all_or_none(finds_damage))
    if not all(verdicts):
        raise RankFailure(
            f"rank {first}: {folder}: {text}, but rank {verdicts.index(False)} finds it as it was written: look at the "
            "memory and the mounts of its host; the checkpoint is left as it is"
        )
    return None, text
