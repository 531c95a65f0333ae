"""Many files gone through at once, and word of how far that is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")
Found = TypeVar("Found")
EVERY = 5.0
"""Seconds between two lines."""
THREADS = 16
"""Whose reading overlaps."""


def each(function: Callable[[Item], Found], items: Sequence[Item], what: str, *, tell: bool) -> list[Found]:
    """Return *function* of each of *items*, several at a time; raises the first error, in their order, of those that ended.

    Args:
        what: is done, with what, as in "data.train: shards indexed".
        tell: write to stderr every few seconds how many are done.
    """
    with ThreadPoolExecutor(min(THREADS, len(items) or 1)) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            while (state := wait(futures, EVERY if tell else None, FIRST_EXCEPTION)).not_done:
                if any(future.exception() for future in state.done):
                    break
                print(f"{what}: {len(state.done)} of {len(futures)}", file=sys.stderr, flush=True)
            return [future.result() for future in futures if future in state.done]
        finally:
            for future in futures:
                future.cancel()
