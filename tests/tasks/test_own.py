"""A task of the user's: its weights, losses over pairs and rows are of the global batch and of all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bigvision
from bigvision.errors import UserError
from bigvision.tasks import Task
from tests.distributed import run_ranks
from tests.recipes import lines, recipe, run

WEIGHTS = torch.tensor([0.1, 2.0, 0.5, 1.0, 0.0, 3.0, 1.0, 1.0, 0.25, 1.0])


class Weighed(Task):
    """Cross-entropy with a weight for each class, and the median of the samples' losses, which no sum gives."""

    target, metrics, keeps_rows = "label", ("loss", "median"), True

    def weight(self, targets: Tensor) -> Tensor:
        return WEIGHTS.to(targets.device)[targets].sum()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.float(), targets, WEIGHTS.to(outputs.device), reduction="sum")

    @property
    def sums(self) -> int:
        return 2

    def measure(self, outputs: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
        weights = WEIGHTS.to(outputs.device)[targets].double() * valid
        return torch.stack([(F.cross_entropy(outputs.float(), targets, reduction="none") * weights).sum(), weights.sum()])

    def rows(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.stack([targets.double(), F.cross_entropy(outputs.double(), targets, reduction="none")], dim=1)

    def compute(self, sums: Tensor, count: float, rows: Tensor | None) -> dict[str, float]:
        assert rows is not None and len(rows) == count == 53 and rows[:, 0].tolist() == [float(i % 10) for i in range(53)]
        return {"loss": float(sums[0] / sums[1]), "median": float(rows[:, 1].median())}


class Pairs(Task):
    """Outputs of the same class are to be near each other, those of others far: a loss over all pairs of the global batch."""

    target, span = "label", "global batch"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        near = F.normalize(outputs.float(), dim=1) @ F.normalize(outputs.float(), dim=1).T
        alike = (targets[:, None] == targets).float()
        return ((near - alike).square().mean(1)).sum()

    def measure(self, outputs: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
        return torch.where(valid, outputs.double().norm(dim=1), 0.0).sum()[None]


def outcome(plain: dict[str, Any], task: type[Task]) -> tuple[list[float], dict[str, float]]:
    found = run(plain, task=task())
    (last,) = [line for line in lines(Path(plain["out"])) if "val_loss" in line]
    return found, {name: value for name, value in last.items() if name.startswith("val_")}


STRATEGIES = [
    pytest.param(3, {"strategy": "ddp"}, id="ddp 3"),
    pytest.param(2, {"strategy": "zero2"}, marks=pytest.mark.long, id="zero2 2"),
    pytest.param(2, {"strategy": "fsdp"}, marks=pytest.mark.long, id="fsdp 2"),
    pytest.param(3, {"strategy": "fsdp"}, marks=pytest.mark.long, id="fsdp 3"),
    pytest.param(4, {"strategy": "fsdp", "replicas": 2}, marks=pytest.mark.long, id="hybrid 2x2"),
    pytest.param(2, {"strategy": "zero3"}, marks=pytest.mark.long, id="zero3 2"),
    pytest.param(2, {"strategy": "pipeline"}, marks=pytest.mark.long, id="pipeline 2"),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[type[Task], tuple[list[float], dict[str, float]]]:
    found = {}
    for task, size in ((Weighed, 5), (Pairs, None)):
        folder = tmp_path_factory.mktemp(task.__name__)
        plain = recipe(folder, "small", train={"steps": 10, "micro_batch": size}, optim={"name": "sgd", "lr": 0.1})
        (found[task],) = run_ranks(outcome, 1, plain, task)
    return found


@pytest.mark.parametrize(
    ("task", "ranks", "parallel"),
    [
        pytest.param(task, *row.values, marks=row.marks, id=f"{task.__name__}, {row.id}")
        for task, rows in ((Weighed, STRATEGIES), (Pairs, STRATEGIES[:-1]))  # a pipeline refuses pairs, see below
        for row in rows
    ],
)
def test_losses_and_metrics_are_those_of_one_process(
    tmp_path: Path, alone: dict[type[Task], Any], task: type[Task], ranks: int, parallel: dict[str, Any]
) -> None:
    size = 5 if task is Weighed else None
    plain = recipe(
        tmp_path, "small", train={"steps": 10, "micro_batch": size}, optim={"name": "sgd", "lr": 0.1}, parallel=parallel
    )
    losses, metrics = run_ranks(outcome, ranks, plain, task)[0]
    assert losses == pytest.approx(alone[task][0], rel=1e-5) and losses[0] != pytest.approx(losses[-1], rel=1e-3)
    assert metrics == pytest.approx(alone[task][1], rel=1e-5)


def test_the_loss_of_a_step_is_the_weighted_mean_of_the_global_batch(alone: dict[type[Task], Any]) -> None:
    """At the first step the outputs are still nearly alike, so that it is about log(10) with any weights; a mean over samples
    would be that times the mean weight, about 1."""
    first, *_ = alone[Weighed][0]
    assert 2.0 < first < 2.6


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"train": {"micro_batch": 4}}, "train.micro_batch: 4, but the loss of task.name: python:Pairs spans the global batch"),
        ({"task": {"label_smoothing": 0.1}}, "task.label_smoothing: 0.1, but task.name: python:Pairs has no use for it"),
        ({"data": {"train": "imagefolder:nowhere", "val": "imagefolder:nowhere"}}, "data.train: no folder 'nowhere'"),
    ],
    ids=["micro-batch", "key", "data"],
)
def test_what_it_cannot_do_is_said_before_a_step(tmp_path: Path, sections: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        bigvision.train(recipe(tmp_path, "small", **{"train": {"micro_batch": None}} | sections), task=Pairs())


def test_pairs_of_the_global_batch_are_no_task_for_a_pipeline(tmp_path: Path) -> None:
    plain = recipe(tmp_path, "small", parallel={"strategy": "pipeline"}, train={"micro_batch": None})
    for error in run_ranks(refused, 2, plain):
        assert error.startswith("parallel.strategy: pipeline cannot run task.name: python:Pairs, whose loss spans the global")


def refused(plain: dict[str, Any]) -> str:
    with pytest.raises(UserError) as error:
        bigvision.train(plain, task=Pairs())
    return str(error.value)


class Levels:
    """Grey images, and how bright they are: no classes at all."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        level = index * 37 % 200
        return torch.full((3, 32, 32), level, dtype=torch.uint8), {"level": level / 200, "name": [index]}


class Brightness(Task):
    metrics = ("error",)

    def outputs(self, classes: Any) -> int:
        return 1

    def loss(self, outputs: Tensor, targets: Any) -> Tensor:
        return (outputs[:, 0].float() - targets["level"]).square().sum()

    def measure(self, outputs: Tensor, targets: Any, valid: Tensor) -> Tensor:
        return torch.where(valid, (outputs[:, 0].double() - targets["level"]).abs(), 0.0).sum()[None]


def test_targets_of_any_kind_from_python(tmp_path: Path) -> None:
    keys = {"train": {"steps": 30, "micro_batch": None, "eval_every": 30}, "optim": {"lr": 3e-3}, "data": {"augment": False}}
    plain = recipe(tmp_path, "small", **keys)
    result = bigvision.train(plain, data=Levels(48), val=Levels(20), task=Brightness())
    assert set(result.metrics) == {"error"} and result.metrics["error"] < 0.2
    with pytest.raises(UserError, match=r"task\.name: the task of this run was given from Python"):
        bigvision.train(yaml_of(result.checkpoint), data=Levels(48), val=Levels(20))


def yaml_of(step: Path) -> str:
    return str(step.parent / "run.yaml")
