"""Slow ranks: which rank the others wait for, from what each rank spent by itself."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median_low

SLOWER = 1.5
"""A rank is slow that takes this many times the median of all ranks, ..."""
SHARE = 0.1
"""... where this share of each step is lost by it, ..."""
WINDOWS, STEPS = 3, 20
"""... for this many windows and steps in a row: anything may be slow once."""


@dataclass(frozen=True)
class Own:
    """What a rank spent by itself in a step, in seconds: not what it waited for others, which is alike on all."""

    data: float | None
    """Waiting for its data; None where another rank reads it."""
    work: float
    """Working before it first needed the others."""


class Stragglers:
    """Compares the ranks, window by window. Ranks take their steps together, so that all steps last as long as the slowest."""

    def __init__(self) -> None:
        self.rows: dict[int, tuple[int, int]] = {}
        """For each slow rank the windows and steps for which it has been."""
        self.known: set[int] = set()

    def take(self, ranks: list[Own], steps: int, seconds: float) -> tuple[dict[int, float], list[str]]:
        """Take note of each rank's mean over a window of *steps* that took *seconds* each.

        Returns the ranks that are slow, with the seconds by which each is in a step, and what is new about it, in words.
        """
        compared = {rank: own.data + own.work for rank, own in enumerate(ranks) if own.data is not None}
        if len(compared) < 2:
            return {}, []
        usual = median_low(compared.values())
        behind = {rank: own - usual for rank, own in compared.items() if own > SLOWER * usual and own - usual > SHARE * seconds}
        before = {rank: self.rows.get(rank, (0, 0)) for rank in behind}
        self.rows = {rank: (windows + 1, taken + steps) for rank, (windows, taken) in before.items()}
        slow = {r: behind[r] for r, (windows, taken) in self.rows.items() if windows >= WINDOWS and taken >= STEPS}
        news = []
        for rank in sorted(slow.keys() - self.known):
            own = ranks[rank]
            news.append(
                f"rank {rank} is slow: the others wait {slow[rank]:.3g} of the {seconds:.3g} s of each step for it; it waits "
                f"{own.data:.3g} s for its data and works {own.work:.3g} s before it needs them"
            )
        news += [f"rank {rank} is no longer slow" for rank in sorted(self.known - behind.keys())]
        self.known = (self.known & behind.keys()) | slow.keys()
        return slow, news
