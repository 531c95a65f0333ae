"""Balanced sampling: how often each class comes, whatever the ranks, and a run that goes on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bigvision
from bigvision.data import Stream
from bigvision.data.order import balanced
from bigvision.errors import UserError
from tests.distributed import run_ranks
from tests.recipes import digests, recipe, run, write

LABELS = np.array([0] * 60 + [2] * 25 + [1] * 14 + [3] * 1)[np.random.default_rng(0).permutation(100)]


@pytest.mark.parametrize(
    ("balance", "expected"),
    [(1.0, {0: 25, 1: 25, 2: 25, 3: 25}), (0.5, {0: 45, 1: 22, 2: 28, 3: 5}), (0.0, Counter(LABELS.tolist()))],
)
def test_an_epoch_has_classes_in_these_shares(balance: float, expected: dict[int, int]) -> None:
    parts, members = balanced(LABELS, balance)
    stream = Stream(7, parts, members=members)
    assert stream.length == len(LABELS)
    for epoch in range(3):
        ids = [place.id for place in stream.places(epoch * 100, (epoch + 1) * 100)]
        assert Counter(LABELS[ids].tolist()) == pytest.approx(expected, abs=1)
    # Each sample of a class comes as often as any other, or once more; the order is none of classes.
    ids = [place.id for place in stream.places(0, 1000)]
    times = np.bincount(ids, minlength=100)
    assert all(np.ptp(times[label == LABELS]) <= 1 for label in range(4))
    assert np.abs(np.diff(LABELS[ids[:100]])).sum() > 20
    # A function of the place: any part of it by itself, and what stands in for a sample is of the same class.
    some = stream.places(37, 41)
    assert some == stream.places(0, 100)[37:41]
    assert all(LABELS[stream.after(place).id] == LABELS[place.id] for place in some)


class Skewed:
    """Few samples of one class."""

    def __init__(self, count: int, listed: bool = True) -> None:
        self.count, self.classes = count, ["often", "seldom"]
        if listed:
            self.targets = [int(index % 8 == 0) for index in range(count)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        label = int(index % 8 == 0)
        return torch.full((3, 32, 32), 60 + 100 * label + index % 40, dtype=torch.uint8), label


def train(plain: dict[str, Any]) -> list[float]:
    return run(plain, data=Skewed(64), val=Skewed(16))


def plain(out: Path, steps: int, **sections: Any) -> dict[str, Any]:
    keys = {"train": {"steps": steps, "global_batch": 12, "micro_batch": None}, "checkpoint": {"every": 3}, **sections}
    return recipe(out, "small", optim={"schedule": "constant"}, data={"balance": 1.0}, **keys)


def test_a_run_goes_on_with_the_same_samples_on_any_number_of_ranks(tmp_path: Path) -> None:
    traces, found = [tmp_path / "trace-1", tmp_path / "trace-3"], []
    for ranks, trace in ((1, traces[0]), (3, traces[1])):
        config = plain(tmp_path / str(ranks), 6)
        config["data"] |= {"trace": str(trace)}
        found.append(run_ranks(train, ranks, config)[0])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    ids = [[id for line in _lines(trace) for id in line["ids"]] for trace in traces]
    assert ids[0] == ids[1] and 0.45 < np.mean([id % 8 == 0 for id in ids[0]]) < 0.55
    assert run_ranks(train, 1, plain(tmp_path / "part", 3))[0] == found[0][:3]
    assert run_ranks(train, 1, plain(tmp_path / "part", 6))[0] == found[0]
    assert digests(tmp_path / "part" / "step-00000006") == digests(tmp_path / "1" / "step-00000006")


def _lines(trace: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in trace.read_text().splitlines()]
    return sorted(found, key=lambda line: (line["step"], line["rank"]))


AS_IT_IS = {"data": {"balance": 0.0}}


@pytest.mark.parametrize(
    ("sections", "given", "said"),
    [
        (
            {"task": {"name": "multilabel"}}, None,
            "data.balance: 1.0, but task.name: multilabel has no class for each sample: use 0",
        ),
        ({"data": {"balance": 1.5}}, None, "data.balance: 1.5 must be at most 1"),
        ({"data": {"balance": -1}}, None, "data.balance: -1.0 must be a finite number from 0 on"),
        ({}, Skewed(64, listed=False), "data.balance: Skewed does not list its labels: give it an attribute 'targets'"),
        (
            {"data": {"balance": 1.0, "train": "synthetic:20x32 + synthetic:30x32", "val": "synthetic:20x32"}}, None,
            "data.balance: 1.0, but data.train mixes datasets with weights: use one of both",
        ),
        ({"task": {"class_weights": "balanced"}, **AS_IT_IS}, Skewed(64, listed=False), "task.class_weights: Skewed does not"),
        ({"task": {"class_weights": [1.0, 2.0, 3.0]}}, Skewed(64), "task.class_weights: 3 numbers, but the data has 2 classes"),
        ({"task": {"class_weights": [1.0, -2.0]}}, None, r"task.class_weights: \[1.0, -2.0\] must be balanced, a file, or fin"),
        ({"task": {"loss": "l1"}}, None, "task.loss: l1, but task.name: classify has ce or bce: use one of them"),
        ({"task": {"name": "regress", "mixup": 0.5}}, None, "task.mixup: 0.5, but task.name: regress has no use for it"),
        ({"task": {"name": "multilabel", "class_weights": "balanced"}, **AS_IT_IS}, None, "task.class_weights: balanced, but"),
        ({"task": {"name": "regres"}}, None, "task.name: unknown task 'regres'; did you mean 'regress'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path: Path, sections: dict[str, Any], given: Any, said: str) -> None:
    keys = plain(tmp_path / "out", 3)
    keys = keys | {section: keys.get(section, {}) | more for section, more in sections.items()}
    objects = {} if given is None else {"data": given, "val": Skewed(16)}
    with pytest.raises(UserError, match=said) as error:
        bigvision.train(write(tmp_path, keys), **objects)
    assert "\n" not in str(error.value)
