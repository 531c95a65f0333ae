"""Two nodes of Ray's on this machine, of which one is lost."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bigvision import load_config
from bigvision.launchers.ray import Ask, train
from tests.distributed import run_ranks
from tests.launch.ray_session import ENVIRONMENT, skip_without_ray
from tests.recipes import lines, losses, recipe, run

skip_without_ray()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A node with one CPU; more can be added."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster

    answers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        yield made
    finally:
        made.shutdown()
        for number, answer in answers.items():
            signal.signal(number, answer)


@pytest.mark.long
def test_a_lost_node_is_done_without(cluster: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"train": {"steps": 150}, "checkpoint": {"every": 5}}
    expected = run_ranks(run, 2, recipe(tmp_path / "reference", **settings))[0]
    node = cluster.add_node(num_cpus=1)

    def lose() -> None:
        while not (tmp_path / "ray" / "latest").exists():
            time.sleep(0.05)
        cluster.remove_node(node, allow_graceful=False)

    threading.Thread(target=lose).start()
    result = train(load_config(recipe(tmp_path / "ray", **settings)), Ask(workers=(1, 2), address=cluster.address))
    assert result.step == 150
    starts = [json.loads(line) for line in (tmp_path / "ray" / "starts.jsonl").read_text().splitlines()]
    starts = [line for line in starts if "start" in line]
    assert (starts[0]["ranks"], starts[-1]["ranks"]) == (2, 1) and starts[-1]["step"] >= 5
    assert [line["step"] for line in lines(tmp_path / "ray") if "loss" in line] == list(range(1, 151))
    assert losses(tmp_path / "ray") == pytest.approx(expected, rel=1e-2)
