"""Predicted step times beside measured ones on this machine: twelve combinations, of one rank and of two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_twelve_steps_are_predicted(ranks: int, tmp_path: Path) -> None:
    """Within 20 % after calibration, and in their order where they differ by more than 10 %."""
    command = [sys.executable, "-m", "benchmarks.plan_time"]
    if ranks > 1:
        meeting = ["--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file", "--rdzv-endpoint", str(tmp_path / "meeting")]
        command[1:2] = [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(ranks),
            *meeting,
            "--local-addr",
            "127.0.0.1",
            "-m",
        ]
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": threads}
    subprocess.run([*command, "--results", str(tmp_path)], env=environment, check=True, timeout=900)
    steps = json.loads((tmp_path / f"plan_time_{ranks}_ranks.json").read_text())["steps"]
    assert len(steps) == {1: 8, 2: 4}[ranks]
    off = {name: step["predicted"] / step["measured"] - 1 for name, step in steps.items()}
    assert {name: f"{error:+.0%}" for name, error in off.items() if abs(error) > 0.2} == {}
    for one, other in product(steps.values(), repeat=2):
        assert other["measured"] < 1.1 * one["measured"] or one["predicted"] < other["predicted"], (one, other)
