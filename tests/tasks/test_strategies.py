"""Every task under every strategy: the losses and metrics of one process, exact resume, and checkpoints that all others take.

A task joins with a row in `ROWS`; the table in docs/tasks.md is made of them (see tests/docs/reference.py).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bigvision.config import TaskConfig
from bigvision.tasks import TASKS, build_task
from tests.distributed import run_ranks
from tests.recipes import digests, lines, recipe, run
from tests.tasks.scenes import Scenes

STEPS, HALF = 10, 5


@dataclass(frozen=True)
class Row:
    """A task in this test."""

    target: Any
    """Of `Scenes`."""
    keys: dict[str, Any] = field(default_factory=dict)
    """Of the section ``task``."""
    counted: tuple[str, ...] = ()
    """Metrics that count what is right or order it, so that they are the same number whatever the rounding of the loss."""
    sections: dict[str, Any] = field(default_factory=dict)
    """Keys of other sections."""
    refused: tuple[str, ...] = ()
    """Strategies that cannot run it; what refuses them is tested with the task."""
    model: str = "small"
    """Of `tests.recipes`."""


ROWS: dict[str, Row] = {
    "classify": Row("label", {"loss": "bce", "class_weights": [0.5, 2.0, 1.0]}, ("top1", "top5", "mean_class_top1")),
    "multilabel": Row("labels", {"loss": "asymmetric"}, ("map", "f1", "f1_micro")),
    "regress": Row("numbers", {"loss": "huber"}),
    "segment": Row(
        "mask",
        {
            "loss": "ce+dice",
            "decoder_options": {
                "decoder_pyramid_channels": 32,
                "decoder_segmentation_channels": 64,
                "decoder_dropout": 0.0,
            },
        },
        # What is counted depends on weights that differ in their last bits; of the same weights it is tested with the task.
        sections={"optim": {"name": "sgd", "lr": 0.001}, "train": {"micro_batch": 4}},
        model="pyramid",
    ),
}
STRATEGIES: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp 1": (1, {"strategy": "ddp"}),
    "fsdp 2": (2, {"strategy": "fsdp"}),
    "fsdp 3": (3, {"strategy": "fsdp"}),
    "hybrid 2x2": (4, {"strategy": "fsdp", "replicas": 2}),
    "zero2 2": (2, {"strategy": "zero2"}),
    "zero3 2": (2, {"strategy": "zero3"}),
    "pipeline 2": (2, {"strategy": "pipeline"}),
}
SHORT = {"classify": "ddp 1", "multilabel": "fsdp 3", "regress": "pipeline 2"}
"""The one that each task is tested with where time is short; a task without runs under fsdp 2."""
CASES = [
    pytest.param(name, layout, marks=[] if SHORT.get(name, "fsdp 2") == layout else [pytest.mark.long], id=f"{name}, {layout}")
    for name, row in ROWS.items()
    for layout, (_, parallel) in STRATEGIES.items()
    if parallel["strategy"] not in row.refused
]


def plain(out: Path, name: str, parallel: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """A run of *STEPS* steps; the validation data, 53 scenes, divides over no number of ranks and batches."""
    keys: dict[str, Any] = {
        "train": {"steps": STEPS, "micro_batch": 5}, "checkpoint": {"every": HALF, "shard_size": "40kB"},
        "task": {"name": name, **ROWS[name].keys}, "parallel": parallel,
    }  # fmt: skip
    for more in (ROWS[name].sections, sections):
        keys |= {section: keys.get(section, {}) | values for section, values in more.items()}
    return recipe(out, ROWS[name].model, **keys)


def train(config: dict[str, Any], name: str) -> tuple[list[float], dict[str, float]]:
    """Losses, and metrics of the evaluation at the end."""
    target = ROWS[name].target
    losses = run(config, data=Scenes(64, target), val=Scenes(53, target, seed=1))
    last = [line for line in lines(Path(config["out"])) if "val_loss" in line][-1]
    return losses, {key.removeprefix("val_"): value for key, value in last.items() if key.startswith("val_")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[float], dict[str, float]]]:
    """Of each task what one process finds; made when it is asked for."""

    class Made(dict[str, Any]):
        def __missing__(self, name: str) -> Any:
            config = plain(tmp_path_factory.mktemp(name) / "alone", name, {"strategy": "ddp"})
            (self[name],) = run_ranks(train, 1, config, name)
            return self[name]

    return Made()


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_a_task_under_a_strategy(tmp_path: Path, alone: dict[str, Any], name: str, layout: str) -> None:
    ranks, parallel = STRATEGIES[layout]
    config = plain(tmp_path / "whole", name, parallel)
    losses, metrics = run_ranks(train, ranks, config, name)[0]
    assert losses == pytest.approx(alone[name][0], rel=1e-5) and losses[0] != pytest.approx(losses[-1], rel=1e-3)
    assert metrics == pytest.approx(alone[name][1], rel=1e-5)
    assert {key: metrics[key] for key in ROWS[name].counted} == {key: alone[name][1][key] for key in ROWS[name].counted}
    # A run that was killed has the checkpoint of its half, and goes on to the same bits.
    (tmp_path / "killed").mkdir()
    half, end = (f"step-{step:08}" for step in (HALF, STEPS))
    shutil.copytree(tmp_path / "whole" / half, tmp_path / "killed" / half)
    again = run_ranks(train, ranks, config | {"out": str(tmp_path / "killed")}, name)[0]
    assert again == (losses[HALF:], metrics)
    assert digests(tmp_path / "killed" / end) == digests(tmp_path / "whole" / end)
    # Another strategy takes the checkpoint over, and leaves the same bytes and metrics.
    others, other = STRATEGIES["ddp 1"] if ranks > 1 else STRATEGIES["fsdp 2"]
    taken = plain(tmp_path / "taken", name, other, checkpoint={"resume": str(tmp_path / "whole" / end)})
    run_ranks(resumed, others, taken, name)
    assert digests(tmp_path / "taken" / end) == digests(tmp_path / "whole" / end)


def resumed(config: dict[str, Any], name: str) -> None:
    target = ROWS[name].target
    run(config, data=Scenes(64, target), val=Scenes(53, target, seed=1))


def test_every_task_has_a_row() -> None:
    """But for those that learn nothing, which have a test of their own."""
    assert set(ROWS) == {name for name in TASKS if build_task(TaskConfig(name=name)).learns}
