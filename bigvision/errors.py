"""Errors that the user sees, and how they are worded."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
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
    """A mistake in what was asked for: one line with the key, the value and the fix. Ends the program with exit code 2."""


class InUse(RuntimeError):
    """Another host may hold what is asked for, or have died with it: starting again later may help. Exit code 1."""


class Stopped(Exception):
    """A signal asked the run to stop, and what it has done is saved. Ends the program with exit code 75."""

    def __init__(self, name: str, step: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by {name} at step {step}, saved in {checkpoint}: start it again to go on")
        self.name, self.step, self.checkpoint = name, step, checkpoint


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name most like *name*, or ``""`` when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def nearest_paths(pattern: str, paths: Iterable[str]) -> str:
    """The three of the dotted *paths* that are most like *pattern*, with ``*`` for the numbers of layers."""
    numberless = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path) for path in paths)
    return ", ".join(difflib.get_close_matches(pattern, numberless, n=3, cutoff=0))


def either(names: Sequence[str]) -> str:
    """*names* as a choice: "a", "a or b", "a, b or c"."""
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def how_to_install(extra: str) -> str:
    """What an error says where a library of the optional *extra* is missing: true for a wheel and, as pip takes the extras of
    what is installed, for a checkout."""
    return f"install it with: pip install 'bigvision[{extra}]'"


def one_line(error: BaseException) -> str:
    """What *error* says, on one line; the name of its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """*error*, its cause or what was handled when it was raised, and so on."""
    seen = set[int]()
    while error is not None and id(error) not in seen:  # an error that is raised again may be among its own causes
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


NO_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "ALLOCATION_FAILED", "bad_alloc")
"""What torch, cuBLAS, cuDNN and the C++ library say without memory; torch's CPU allocator has no exception of its own."""
DEVICE_FAULT = re.compile(
    r"CUDA (driver )?error: (?!out of memory|\w+ALLOC)|NCCL|nccl[A-Z]|device-side assert|_STATUS_EXECUTION_FAILED"
)
"""What torch says after a fault of the device, of a kernel or between devices."""


def lacks_memory(error: BaseException | None) -> bool:
    """Whether *error* comes from a lack of memory in this process, on the device or on the host.

    The earliest error in the chain of causes decides: after a fault of the device allocations fail too, and after a failed
    allocation so may the collectives that the rank leaves.
    """
    verdict = False
    for one in causes(error):
        verdict = _blames_memory(one, verdict)
    return verdict


def _blames_memory(error: BaseException, otherwise: bool) -> bool:
    """Whether *error* by itself reports a lack of memory; *otherwise* where it is about something else."""
    text = str(error)
    if not isinstance(error, (RuntimeError, MemoryError)):
        return otherwise
    if "DataLoader worker" in text or DEVICE_FAULT.search(text):
        return False  # a smaller micro-batch helps neither data workers nor a broken device
    return True if isinstance(error, MemoryError) or any(sign in text for sign in NO_MEMORY) else otherwise
