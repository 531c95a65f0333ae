"""Tasks are learned: generated scenes, two ranks, a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import bigvision
from tests.distributed import run_ranks
from tests.tasks.scenes import Scenes


def learned(out: str, task: dict[str, Any], target: Any, steps: int) -> dict[str, float]:
    plain = {
        "out": out,
        "model": {"name": "test_resnet", "image_size": 32, "options": {"act_layer": "silu"}},
        "task": task,
        "data": {"augment": False, "workers": 0},
        "optim": {"lr": 2e-3, "warmup": 0.1},
        "parallel": {"strategy": "fsdp", "precision": "fp32", "device": "cpu"},
        "train": {"steps": steps, "global_batch": 64, "eval_every": 10000},
        "checkpoint": {"every": 10000},
        "monitor": {"progress": False},
    }
    result = bigvision.train(plain, data=Scenes(4096, target), val=Scenes(400, target, seed=1))
    return dict(result.metrics)


@pytest.mark.long
@pytest.mark.parametrize(
    ("task", "target", "metric"),
    [
        ({"name": "multilabel"}, "labels", "map"),
        ({"name": "multilabel", "loss": "asymmetric"}, "labels", "map"),
        ({"name": "regress"}, "numbers", "r2"),
        ({"name": "regress", "loss": "huber"}, "numbers", "r2"),
    ],
    ids=["multilabel", "multilabel, asymmetric", "regress", "regress, huber"],
)
def test_it_is_learned(tmp_path: Path, task: dict[str, Any], target: Any, metric: str) -> None:
    metrics = run_ranks(learned, 2, str(tmp_path), task, target, 300)[0]
    assert metrics[metric] >= 0.95, metrics
