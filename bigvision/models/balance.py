"""Where to cut: the contiguous partition whose most expensive part is the cheapest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

SLACK = 1.01
"""How much more than the least possible the largest part may cost, when less then crosses the cuts."""


def best_cuts(
    work: Sequence[float],
    allowed: Sequence[int],
    parts: int,
    crossing: Callable[[int], float],
    fits: Callable[[int, int, int], bool] = lambda part, start, end: True,
) -> list[int] | None:
    """Cut the items ``0 .. len(work)`` into *parts* runs; return where each but the first begins, or None.

    The cost of the largest part is the least possible, and among partitions within 1 % of that the one with the least
    traffic is taken. Exact, by dynamic programming over the allowed positions.

    Args:
        work: what each item costs.
        allowed: positions p at which the run of items from p on may begin, ascending.
        crossing: what a cut at a position costs in traffic.
        fits: whether the items from start to end may be part number *part*; None is returned when nothing fits.
    """
    total = [0.0, *accumulate(work)]
    ends = [*allowed, len(work)]

    def cost(start: int, end: int) -> float:
        return total[end] - total[start]

    def search(limit: float, value: Callable[[float, int, int], float]) -> tuple[float, list[int]] | None:
        """The best last state over *parts* parts, none above *limit*; *value* of (so far, start, end) is made small."""
        states: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
        for part in range(parts):
            reached: dict[int, tuple[float, list[int]]] = {}
            for end in ends if part < parts - 1 else [len(work)]:
                for start, (so_far, cuts) in states.items():
                    if start >= end or cost(start, end) > limit or not fits(part, start, end):
                        continue
                    new = value(so_far, start, end)
                    if end not in reached or new < reached[end][0]:
                        reached[end] = (new, [*cuts, end])
            states = reached
        return states.get(len(work))

    cheapest = search(float("inf"), lambda so_far, start, end: max(so_far, cost(start, end)))
    if cheapest is None:
        return None
    lightest = search(
        cheapest[0] * SLACK, lambda so_far, start, end: so_far + (crossing(end) if end < len(work) else 0.0)
    )  # fmt: skip
    assert lightest is not None
    return lightest[1][:-1]
