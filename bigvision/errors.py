"""What went wrong, said to the user."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """A mistake in what was asked for: one line with the key, the value and the mend. Ends the program with exit code 2."""


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
