"""What went wrong, said to the user."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from enum import IntEnum
from pathlib import Path


class Exit(IntEnum):
    """How a rank ends: its exit code."""

    DONE = 0
    FAULT = 1
    """Something broke while running: a restart goes on from the last checkpoint."""
    MISTAKE = 2
    """What was asked for cannot be done: starting again changes nothing."""
    STOPPED = 75
    """A signal asked the run to stop, and it is saved: start it again to go on (EX_TEMPFAIL of sysexits.h)."""
    HUNG = 124
    """A limit of `limits` ran out: stacks are written; a restart goes on from the last checkpoint (as of timeout(1))."""


class UserError(Exception):
    """A mistake in what was asked for: one line with the key, the value and the mend. Ends the program with exit code 2."""


class Stopped(Exception):
    """A signal asked the run to stop, and what it has done is saved. Ends the program with exit code 75."""

    def __init__(self, name: str, step: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by {name} at step {step}, saved in {checkpoint}: start it again to go on")
        self.name, self.step, self.checkpoint = name, step, checkpoint


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name most like *name*, or ``""`` when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def either(names: Sequence[str]) -> str:
    """*names* as a choice: "a", "a or b", "a, b or c"."""
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def one_line(error: BaseException) -> str:
    """What *error* says, on one line; the name of its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
