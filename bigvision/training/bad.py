"""Samples that cannot be read: counted once each over all ranks and restarts, listed in a file, and not too many."""

from __future__ import annotations

from pathlib import Path

from bigvision.data import BadSample
from bigvision.errors import UserError
from bigvision.jsonlines import append_line, read_lines
from bigvision.runtime import Runtime, from_main, gather_json

NAME = "bad_samples.jsonl"


class BadSamples:
    """Every rank has one and calls all of its methods."""

    def __init__(self, budget: float, lengths: dict[str, int]) -> None:
        """Args:
        budget: share (below 1) or number of each split's samples that may be bad.
        lengths: samples of each split.
        """
        self.budget = budget
        self.lengths = lengths
        self.known: dict[str, set[int]] = {split: set() for split in lengths}
        self.path: Path | None = None
        self.example = ""
        """The last one that was found: where it is, and why it cannot be read."""

    def keep_in(self, path: Path, runtime: Runtime, resumed: bool) -> None:
        """List what is found in the file *path* from now on; what a *resumed* run lists there already is known."""
        if runtime.is_main:
            self.path = path
            if not resumed:
                path.unlink(missing_ok=True)
        listed = _read(path) if runtime.is_main else []
        for split, id in from_main(listed):
            self.known.setdefault(split, set()).add(id)

    def count(self, split: str) -> int:
        return len(self.known[split])

    def summary(self) -> str:
        """What the user should know at the end; empty where all could be read."""
        counts = [f"{len(ids)} of {self.lengths[split]} samples of data.{split}" for split, ids in self.known.items() if ids]
        return f"{' and '.join(counts)} could not be read: {self.path}" if counts else ""

    def exchange(self, split: str, found: list[BadSample]) -> int:
        """Record what each rank has found since the last time, and return how many different samples these are.

        Raises:
            UserError: too many are bad; on every rank.
        """
        samples = [BadSample(*sample) for part in gather_json(found) for sample in part]
        for sample in samples:
            if sample.id not in self.known[split]:
                self.known[split].add(sample.id)
                if self.path is not None:
                    append_line(self.path, {"split": split} | sample._asdict())
        if samples:
            self.example = f"such as {samples[-1].where}: {samples[-1].reason}"
        allowed = self.budget if self.budget >= 1 else self.budget * self.lengths[split]
        if (count := self.count(split)) > allowed:
            example = f", {self.example}" if self.example else ""
            raise UserError(
                f"data.bad_budget: {self.budget:g} allows {int(allowed)} of {self.lengths[split]} samples of data.{split} to "
                f"be unreadable, {count} are{example}; mend them, or allow more"
            )
        return len({sample.id for sample in samples})


def _read(path: Path) -> list[tuple[str, int]]:
    return [(line["split"], line["id"]) for line in read_lines(path) if {"split", "id"} <= line.keys()]
