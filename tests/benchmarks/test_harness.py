"""The harness's arithmetic, on a clock that only the sides move."""

from __future__ import annotations

import gc
import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.harness import compare, summarize, turn


class Clock:
    """Each side takes its cost times *speed*, which may change while the measurement runs."""

    def __init__(self, drift: float = 0.0) -> None:
        self.now, self.drift, self.speed, self.log = 0.0, drift, 1.0, list[str]()

    def __call__(self) -> float:
        return self.now

    def side(self, name: str, cost: float):
        def call() -> None:
            self.log.append(name)
            self.now += cost * self.speed
            self.speed += self.drift

        return call


@pytest.mark.parametrize("sides", [2, 3, 4, 5])
def test_each_side_is_in_each_place_equally_often(sides: int) -> None:
    names = [str(i) for i in range(sides)]
    rounds = [turn(names, number) for number in range(2 * sides)]
    assert all(sorted(order) == names for order in rounds)
    assert set(Counter((name, place) for order in rounds for place, name in enumerate(order)).values()) == {2}
    for a in names:
        for b in names[: int(a)]:
            assert sum(order.index(a) < order.index(b) for order in rounds) == sides, "each goes first in half of the rounds"


def test_two_sides_go_a_b_b_a() -> None:
    assert [turn("AB", number) for number in range(4)] == [["A", "B"], ["B", "A"], ["B", "A"], ["A", "B"]]


def test_a_known_ratio_is_found_and_the_control_is_one() -> None:
    clock = Clock()
    report = compare("?", {"slow": clock.side("slow", 0.03), "base": clock.side("base", 0.02)}, "base", rounds=6, clock=clock)
    base, again, slow = report.lines
    assert [line.name for line in report.lines] == ["base", "base (again)", "slow"]
    assert (base.ratio, again.ratio, slow.ratio) == pytest.approx((1, 1, 1.5))
    assert slow.interval == pytest.approx((1.5, 1.5)) and slow.ratio_of_medians == pytest.approx(1.5)
    assert slow.milliseconds == pytest.approx(30) and slow.quartiles == pytest.approx((30, 30))


@pytest.mark.long
def test_drift_of_the_machine_cancels() -> None:
    clock = Clock(drift=0.001)
    sides = {"base": clock.side("base", 1.0), "same": clock.side("same", 1.0)}
    report = compare("?", sides, "base", rounds=12, clock=clock)
    assert report.times["base"][-1] > 1.1 * report.times["base"][0]
    assert report.lines[-1].ratio == pytest.approx(1, abs=2e-3)
    low, high = report.lines[-1].interval
    assert low <= 1 <= high


def test_an_outlier_does_not_move_the_ratio() -> None:
    line = summarize("x", [1.1] * 19 + [50.0], [1.0] * 20)
    assert line.ratio == pytest.approx(1.1) and line.interval == pytest.approx((1.1, 1.1))
    noisy = summarize("x", [1.0 + 0.01 * i for i in range(20)], [1.0] * 20)
    assert noisy.interval[0] < noisy.ratio < noisy.interval[1]


def test_calls_are_counted_and_warm_up_is_not_timed() -> None:
    clock = Clock()
    control = clock.side("control", 1.0)
    sides = {"base": clock.side("base", 1.0), "other": clock.side("other", 1.0)}
    report = compare("?", sides, "base", control, rounds=3, calls=2, warmup=4, clock=clock)
    assert Counter(clock.log) == {name: 4 + 3 * (1 + 2) for name in ("base", "control", "other")}
    assert all(len(times) == 3 for times in report.times.values())


def test_garbage_collection_is_on_again_also_after_an_error() -> None:
    clock = Clock()
    state = {"calls": 0}

    def breaks() -> None:
        state["calls"] += 1
        if state["calls"] == 7:
            assert not gc.isenabled()
            raise ValueError("step failed")

    with pytest.raises(ValueError, match="step failed"):
        compare("?", {"base": breaks}, "base", rounds=4, calls=1, warmup=1, clock=lambda: clock.now + state["calls"])
    assert gc.isenabled()


def test_the_report_is_written_as_json_and_markdown(tmp_path: Path) -> None:
    clock = Clock()
    report = compare("How fast?", {"a": clock.side("a", 0.01), "b": clock.side("b", 0.02)}, "a", rounds=4, clock=clock)
    report.write(tmp_path / "results" / "fast")
    saved = json.loads((tmp_path / "results" / "fast.json").read_text())
    assert saved["lines"][2]["ratio"] == pytest.approx(2) and len(saved["times"]["b"]) == 4
    assert saved["facts"]["ranks"] == 1 and saved["facts"]["torch"]
    text = (tmp_path / "results" / "fast.md").read_text()
    assert text.startswith("## How fast?") and "| b | 20.00 (20.00 to 20.00) | 2.000 | 2.000 to 2.000 | 2.000 |" in text
