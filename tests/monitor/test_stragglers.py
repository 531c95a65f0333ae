"""Ranks for which the others wait again and again are reported, and only those."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from bigvision.monitor import stragglers
from bigvision.monitor.stragglers import Own, Stragglers
from tests.distributed import run_ranks
from tests.recipes import lines, recipe
from tests.training.test_resume import run_and_listen

LATE = 0.4
"""Seconds; a step takes a hundredth of it."""


def run_late(plain: dict[str, Any], late: int, where: str, until: int) -> tuple[Any, str]:
    """Train and return what was said; rank *late* is late in each step before *until*."""
    from bigvision.data.loader import Batches
    from bigvision.engine import Engine

    home, name = {"data": (Batches, "__next__"), "forward": (Engine, "_inputs")}[where]
    before, calls = getattr(home, name), 0

    def slow(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if os.environ["RANK"] == str(late) and calls < until:
            time.sleep(LATE)
        return before(self, *args)

    with mock.patch.object(home, name, slow), mock.patch.object(stragglers, "STEPS", 5):
        return run_and_listen(plain)


@pytest.mark.parametrize(("where", "strategy", "late"), [
    ("forward", "ddp", 0),
    pytest.param("data", "fsdp", 2, marks=pytest.mark.long),
    pytest.param("data", "ddp", 1, marks=pytest.mark.long),
    pytest.param("data", "pipeline", 0, marks=pytest.mark.long),
])  # fmt: skip
def test_a_slow_rank_is_reported_and_stops_nothing(where: str, strategy: str, late: int, tmp_path: Path) -> None:
    ranks, parallel = 3, {"strategy": strategy}
    if strategy == "pipeline":
        ranks, parallel = 4, parallel | {"stages": 2}
    plain = recipe(
        tmp_path, parallel=parallel, train={"steps": 16, "micro_batch": 12}, monitor={"progress": False, "every": 1}
    )  # fmt: skip
    (_, said), *others = run_ranks(run_late, ranks, plain, late, where, 9)
    told = [line for line in said.splitlines() if re.match(r"rank \d is .*slow", line)]
    assert [line.partition(":")[0] for line in told] == [f"rank {late} is slow", f"rank {late} is no longer slow"], said
    assert all(text == "" for _, text in others)
    first = re.findall(r"^step (\d+) of 16: loss \d\.\d{4}, \d+\.\d s after the start$", said, re.MULTILINE)
    assert first == ["1"], "one line tells when the first step was done"
    found = {line["step"]: line["stragglers"] for line in lines(tmp_path) if "stragglers" in line}
    # The first step may be long for all: what it warms up is slower than the sleep.
    assert {6, 7, 8} <= set(found) <= {5, 6, 7, 8} and all(list(slow) == [str(late)] for slow in found.values())
    assert all(slow[str(late)] >= LATE / 2 for slow in found.values()), found


def take(known: Stragglers, *seconds: float | None, step: float = 1.0) -> tuple[dict[int, float], list[str]]:
    return known.take([Own(data, 0.0) for data in seconds], 10, step)


def test_only_what_lasts_is_told() -> None:
    one = Stragglers()
    assert take(one, 0.1, 0.1, 0.9) == ({}, [])
    assert take(one, 0.1, 0.1, 0.9) == ({}, [])
    assert take(one, 0.1, 0.1, 0.1) == ({}, [])
    assert take(one, 0.1, 0.9, 0.1) == ({}, [])
    assert take(one, 0.1, 0.9, 0.1) == ({}, [])
    slow, said = take(one, 0.1, 0.9, 0.1)
    assert slow == {1: pytest.approx(0.8)} and len(said) == 1 and said[0].startswith("rank 1 is slow: the others wait 0.8 of")
    assert take(one, 0.1, 0.9, 0.1)[1] == []
    assert take(one, 0.1, 0.1, 0.1) == ({}, ["rank 1 is no longer slow"])


@pytest.mark.parametrize("seconds", [
    (0.001, 0.09, 0.001),  # much slower, but no tenth of the step
    (0.5, 0.7, 0.5),  # less than half as slow again
    (0.1, 0.9, None, None),  # two ranks with data: the slower one of them counts
    (0.4,),
])  # fmt: skip
def test_what_is_no_straggler(seconds: tuple[float | None, ...]) -> None:
    one = Stragglers()
    found = [take(one, *seconds) for _ in range(5)]
    assert (found[-1][0] == {}) == (len(seconds) != 4), found
