"""Computed shuffles: permutations, as random as drawn ones, and never stored."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from bigvision.data import Stream
from bigvision.data.order import Order, Part, permuted


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 16, 17, 99, 100, 101, 1023, 65_537])
def test_each_index_comes_once(length: int) -> None:
    for key in range(3):
        assert np.array_equal(np.sort(permuted(key, length, np.arange(length))), np.arange(length))


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_all_orders_of_a_few_are_as_likely(length: int) -> None:
    orders = [tuple(permuted(key, length, np.arange(length)).tolist()) for key in range(60 * 24)]
    counts = np.array([orders.count(order) for order in itertools.permutations(range(length))])
    wanted = len(orders) / len(counts)
    chi = float(((counts - wanted) ** 2 / wanted).sum())
    freedom = len(counts) - 1
    # Within four standard deviations of what chance gives.
    assert chi < freedom + 4 * (2 * freedom) ** 0.5, counts


@pytest.mark.parametrize("length", [1000, 1024, 10_007])
def test_as_random_as_a_drawn_one(length: int) -> None:
    """Of many keys: fixed points, neighbours that stay neighbours, rises, and where the first tenth goes."""
    here = np.arange(length)
    orders = np.stack([permuted(key, length, here) for key in range(40)])
    total = orders.size
    fixed = (orders == here).sum()
    neighbours = (np.abs(np.diff(orders, axis=1)) == 1).sum()
    assert abs(fixed - 40) < 5 * 40**0.5 and abs(neighbours - 80) < 5 * 80**0.5
    rises = (np.diff(orders, axis=1) > 0).mean()
    assert abs(rises - 0.5) < 5 * (1 / 12 / total) ** 0.5 + 1 / length
    tenth = length // 10
    inside = (orders[:, :tenth] < tenth).mean()
    assert abs(inside - 0.1) < 5 * (0.09 / (40 * tenth)) ** 0.5
    for lag in (1, 2, 7, 32):
        correlation = np.corrcoef(orders[:, :-lag].ravel(), orders[:, lag:].ravel())[0, 1]
        assert abs(correlation) < 5 / total**0.5 + 2 / length, lag


def test_epochs_and_seeds_differ() -> None:
    here = np.arange(500)
    orders = [Order(seed, 500).at(epoch, here) for seed in range(3) for epoch in range(3)]
    for one, other in itertools.combinations(orders, 2):
        assert (one == other).sum() < 10


@pytest.mark.parametrize(("length", "block", "window"), [(100, 10, 3), (103, 10, 4), (97, 100, 2), (64, 7, 100), (5, 2, 1)])
def test_nearby_samples_stay_near_and_come_once(length: int, block: int, window: int) -> None:
    order = Order(5, length, block, window)
    for epoch in range(4):
        ids = order.at(epoch, np.arange(length))
        assert np.array_equal(np.sort(ids), np.arange(length))
        span = block * window
        for begin in range(0, length, span):
            # A window is at most so many runs of neighbours, where the source is taken as a ring.
            here = np.sort(ids[begin : begin + span])
            steps = np.diff(np.concatenate([here, here[:1] + length]))
            assert (steps > 1).sum() <= window + 1
    everywhere = np.concatenate([order.at(0, np.array([position])) for position in range(length)])
    assert np.array_equal(everywhere, order.at(0, np.arange(length)))


def test_a_window_is_shuffled_and_runs_begin_elsewhere_in_each_epoch() -> None:
    order = Order(0, 1000, 10, 5)
    first, second = (order.at(epoch, np.arange(1000)) for epoch in (0, 1))
    assert (np.diff(first) == 1).mean() < 0.1
    assert len({int(begin) % 10 for begin in (min(first[:50]), min(second[:50]))}) == 2


def test_a_billion_samples_cost_nothing() -> None:
    tracemalloc.start()
    stream = Stream(0, [Part(0, 10**9, 10**9)])
    ids = [place.id for place in stream.places(17 * 10**9 + 123_456_789, 17 * 10**9 + 123_456_789 + 256)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(ids)) == 256 and max(ids) < 10**9
    assert peak < 10 << 20, "an order that is drawn takes 8 GB"


def test_the_order_is_the_same_in_another_process() -> None:
    # The figures pin the stream of existing runs: a change here makes every old checkpoint resume elsewhere.
    code = "import numpy; from bigvision.data.order import Order; print(Order(3, 8).at(1, numpy.arange(8)).tolist())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert other == f"{Order(3, 8).at(1, np.arange(8)).tolist()}\n" == "[5, 4, 3, 2, 1, 7, 0, 6]\n"
