"""The partition is the best one: compared with all others."""

from __future__ import annotations

import itertools
import random

import pytest

from bigvision.pipeline.stages import SLACK, best_cuts


def largest(work: list[float], cuts: list[int]) -> float:
    bounds = [0, *cuts, len(work)]
    return max(sum(work[start:end]) for start, end in itertools.pairwise(bounds))


@pytest.mark.parametrize("seed", range(20))
def test_no_other_partition_is_better(seed: int) -> None:
    rng = random.Random(seed)
    work = [rng.choice([0.0, 1.0, rng.random(), 5 * rng.random()]) for _ in range(rng.randint(4, 11))]
    allowed = sorted(rng.sample(range(1, len(work)), rng.randint(3, len(work) - 1)))
    traffic = {cut: float(rng.randint(1, 9)) for cut in allowed}
    parts = rng.randint(2, 4)
    every = [list(cuts) for cuts in itertools.combinations(allowed, parts - 1)]
    found = best_cuts(work, allowed, parts, traffic.__getitem__)
    assert found in every
    least = min(largest(work, cuts) for cuts in every)
    near = [cuts for cuts in every if largest(work, cuts) <= least * SLACK]
    assert largest(work, found) <= least * SLACK
    assert sum(traffic[cut] for cut in found) == min(sum(traffic[cut] for cut in cuts) for cuts in near)


def test_what_does_not_fit_is_not_taken() -> None:
    work = [1.0] * 6
    assert best_cuts(work, [1, 2, 3, 4, 5], 2, lambda cut: 0.0) == [3]
    # The first part may hold two at most, as under 1F1B, where it keeps the most micro-batches.
    fits = lambda part, start, end: end - start <= (2, 5)[part]  # noqa: E731
    assert best_cuts(work, [1, 2, 3, 4, 5], 2, lambda cut: 0.0, fits) == [2]
    assert best_cuts(work, [1, 2, 3, 4, 5], 2, lambda cut: 0.0, lambda *_: False) is None
    assert best_cuts(work, [3], 3, lambda cut: 0.0) is None
