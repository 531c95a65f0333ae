"""Frozen features: neighbours and a probe against other programs, and the same numbers under every strategy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import bigvision
from bigvision.tasks.embed import PENALTIES, Features, Share, neighbours, probe
from tests.cli.test_mistakes import command, refused
from tests.distributed import run_ranks
from tests.recipes import recipe, run

ALONE = Share(0, 1, torch.device("cpu"), lambda numbers: None, lambda: None)


def clusters(count: int, seed: int, classes: int = 4, width: int = 6) -> Features:
    """Points around a center for each class, near enough to be mixed up at times; one feature never varies."""
    centers = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    values = centers[labels] + 0.9 * torch.randn(count, width, generator=generator)
    values[:, 0] = 3.0
    return Features(values * torch.tensor([1.0, 100.0, 1.0, 0.01, 1.0, 1.0]), labels)


@pytest.mark.parametrize("k", [1, 20, 500])
def test_neighbours_vote(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    monkeypatch.setattr("bigvision.tasks.embed.ROWS", 7)
    monkeypatch.setattr("bigvision.tasks.embed.COLUMNS", 30)
    train, val, right = clusters(200, 1), clusters(50, 2), 0
    for value, label in zip(val.values.double(), val.labels.tolist()):
        near = torch.nn.functional.cosine_similarity(value[None], train.values.double())
        votes = [0.0] * 4
        for place in near.argsort(descending=True)[:k].tolist():
            votes[train.labels[place]] += math.exp(near[place] / 0.07)
        right += int(np.argmax(votes)) == label
    top1, top5 = neighbours(train, val, 4, k, ALONE).tolist()
    assert top1 == right and 15 < right < 50
    assert k == 20 or top5 == {1: top1, 500: 50}[k], "a class without votes is a miss"


def test_the_probe_is_scikit_learns_logistic_regression() -> None:
    train, val = clusters(300, 1), clusters(80, 2)
    scaler = StandardScaler().fit(train.values.double().numpy())
    inputs, others = (scaler.transform(part.values.double().numpy()) for part in (train, val))
    # scikit-learn sums losses and multiplies them with C.
    found = []
    for penalty in PENALTIES:
        theirs = LogisticRegression(C=1 / (penalty * 300), tol=1e-8, max_iter=1000).fit(inputs, train.labels)
        found.append(theirs.score(others, val.labels))
    top1 = float(probe(train, val, 4, ALONE)[0]) / 80
    assert any(top1 == pytest.approx(score) for score in found) and top1 > 0.7


STRATEGIES = [
    pytest.param(2, {"strategy": "fsdp"}, id="fsdp 2"),
    pytest.param(3, {"strategy": "ddp"}, marks=pytest.mark.long, id="ddp 3"),
    pytest.param(3, {"strategy": "fsdp"}, marks=pytest.mark.long, id="fsdp 3"),
    pytest.param(4, {"strategy": "fsdp", "replicas": 2}, marks=pytest.mark.long, id="hybrid 2x2"),
    pytest.param(2, {"strategy": "zero2"}, marks=pytest.mark.long, id="zero2 2"),
    pytest.param(2, {"strategy": "zero3"}, marks=pytest.mark.long, id="zero3 2"),
    pytest.param(2, {"strategy": "pipeline"}, marks=pytest.mark.long, id="pipeline 2"),
]


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, with averaged weights, of a run with keys that features have no use for."""
    out = tmp_path_factory.mktemp("run")
    sections = {"train": {"steps": 3}, "task": {"label_smoothing": 0.1}, "ema": {"decay": 0.5}, "optim": {"lr": 0.01}}
    plain = recipe(out, "small", **sections)
    plain["model"] = plain["model"] | {"trainable": ["head", "norm"]}
    run_ranks(run, 1, plain)
    return out / "step-00000003"


def evaluated(step: str, parallel: dict[str, Any], *more: str) -> dict[str, float]:
    flags = ["--task.name", "embed", "--task.k", "3", "--data.train", "synthetic:61x32", "--data.val", "synthetic:53x32"]
    flags += [part for name, value in parallel.items() for part in (f"--parallel.{name}", str(value))]
    code, out, err = command(["eval", step, *flags, *more])
    assert code == 0, err
    return json.loads(out) if out else {}


@pytest.fixture(scope="module")
def alone(step: Path) -> dict[str, float]:
    return run_ranks(evaluated, 1, str(step), {"strategy": "ddp"})[0]


@pytest.mark.parametrize(("ranks", "parallel"), STRATEGIES)
def test_metrics_are_those_of_one_process(step: Path, alone: dict[str, float], ranks: int, parallel: dict[str, Any]) -> None:
    assert set(alone) == {"knn_top1", "knn_top5", "probe_top1", "probe_top5"}
    assert run_ranks(evaluated, ranks, str(step), parallel)[0] == pytest.approx(alone, abs=1e-12)


def test_averaged_weights_have_features_too(step: Path, alone: dict[str, float]) -> None:
    assert run_ranks(evaluated, 1, str(step), {}, "--ema")[0].keys() == alone.keys()


def test_predicted_features_are_what_the_classifier_gets(step: Path) -> None:
    embed: dict[str, Any] = {"task.name": "embed", "data.workers": 0}
    rows = bigvision.predict(str(step), "synthetic:9x32", **embed)
    assert rows is not None and list(rows[0]) == ["sample", *(f"feature{number}" for number in range(24)), "error"]
    features = torch.tensor([[row[f"feature{number}"] for number in range(24)] for row in rows])
    model: Any = timm.create_model(f"local-dir:{step}", pretrained=True)
    with torch.no_grad():
        expected = model.head(features).softmax(1).max(1).values.tolist()
    del embed["task.name"]
    classified = bigvision.predict(str(step), "synthetic:9x32", **embed)
    assert [row["probability"] for row in classified or []] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--task.name", "embed"], "task.name: embed trains nothing: use bigvision eval STEP_FOLDER|MODEL"),
        (["train", "--task.k", "5"], "task.k: 5, but task.name: classify has no use for it, only embed"),
        (["eval", "resnet10t", "--task.name", "embed", "--task.k", "0"], "task.k: 0 must be a finite number from 1 on"),
        (["eval", "resnet10t", "--task.name", "embed", "--data.val", "digits"], "on which images? Name them: --data.train"),
    ],
    ids=["train", "other task", "no neighbour", "no data"],
)  # fmt: skip
def test_mistakes(tmp_path: Path, arguments: list[str], words: str) -> None:
    out = ["--out", str(tmp_path / "out")] if arguments[0] == "train" else []
    refused([*arguments, *out], words)
