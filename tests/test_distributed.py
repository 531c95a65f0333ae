"""The pool of ranks that other tests run on."""

from __future__ import annotations

import os

import pytest

from tests.distributed import Pool, RankError


def look(fails: bool = False) -> tuple[str, str, int]:
    if fails and os.environ["RANK"] == "1":
        raise ValueError("planted")
    return os.environ["RANK"], os.environ["WORLD_SIZE"], hash("a name")


def test_ranks_differ_as_those_of_a_launcher_do_and_an_error_of_one_is_raised() -> None:
    pool = Pool()
    try:
        assert [found[:2] for found in pool.run(look, 1)] == [("0", "1")] and len(pool.workers) == 1
        (rank, ranks, first), (_, _, second) = pool.run(look, 2)
        assert (rank, ranks) == ("0", "2") and first != second, "sets of names have another order on each rank"
        with pytest.raises(RankError, match=r"(?s)rank 1 of 2:.*ValueError: planted"):
            pool.run(look, 2, fails=True)
        assert not pool.workers and len(pool.run(look, 2)) == 2, "started afresh"
    finally:
        pool.stop()
