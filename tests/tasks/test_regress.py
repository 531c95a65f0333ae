"""Numbers: losses of standardised targets, and metrics equal torchmetrics' in the data's units."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.functional import mean_absolute_error, r2_score

import bigvision
from bigvision.errors import UserError
from bigvision.tasks import Regress
from tests.recipes import recipe

NAMES = ["age", "year"]


def prepared(loss: str | None = None, standardize: bool = True) -> tuple[Regress, torch.Tensor]:
    """A task, and its targets: small ones, and large ones that hardly vary."""
    draw = torch.Generator().manual_seed(0)
    targets = torch.randn(301, 2, generator=draw, dtype=torch.float64) * torch.tensor([12.0, 0.5]) + torch.tensor([40.0, 2e6])
    task = Regress(loss, standardize)
    task.prepare(NAMES, task.study(lambda most: targets.numpy(), NAMES, {}))
    return task, targets


@pytest.mark.parametrize(("loss", "peer"), [(None, "MSELoss"), ("l1", "L1Loss"), ("huber", "HuberLoss")])
def test_losses_are_of_standardised_numbers(loss: str | None, peer: str) -> None:
    task, targets = prepared(loss)
    outputs = torch.randn(301, 2)
    standard = (targets - targets.mean(0)) / targets.std(0, correction=0)
    expected = getattr(torch.nn, peer)()(outputs, standard.float()) * 301
    torch.testing.assert_close(task.loss(outputs, targets), expected)


@pytest.mark.parametrize("standardize", [True, False])
def test_metrics_are_those_of_torchmetrics(standardize: bool) -> None:
    task, targets = prepared(standardize=standardize)
    outputs = (targets - task.mean) / task.std + torch.randn(301, 2) * 0.3
    outputs = outputs if standardize else outputs * task.std + task.mean
    valid = torch.ones(301, dtype=torch.bool)
    valid[-1] = False
    targets[-1] = math.nan
    sums = task.measure(outputs[:200], targets[:200], valid[:200]) + task.measure(outputs[200:], targets[200:], valid[200:])
    found, values = task.compute(sums, 300, None), task.scores(outputs)[:300]
    assert found["mae"] == pytest.approx(float(mean_absolute_error(values, targets[:300])), rel=1e-9)
    # Not of the large numbers themselves: squares of millions have no digits left for it in torchmetrics.
    shifted = torch.tensor([0.0, 2e6], dtype=torch.float64)
    expected = r2_score(values - shifted, targets[:300] - shifted)
    assert found["r2"] == pytest.approx(float(expected), rel=1e-9)
    report = task.report(sums, 300, None, NAMES)["numbers"]
    assert [one["number"] for one in report] == NAMES
    assert report[0]["rmse"] == pytest.approx((values - targets[:300]).square().mean(0).sqrt()[0].item())


def test_a_run_keeps_the_mean_that_it_began_with() -> None:
    known = {"mean": [1.0, 2.0], "std": [3.0, 4.0]}
    assert Regress().study(lambda most: np.zeros((9, 2)), NAMES, known) == known
    found = Regress().study(lambda most: np.array([[1.0, 5.0], [3.0, 5.0]]), NAMES, {"mean": [1.0], "std": [1.0]})
    assert found == {"mean": [2.0, 5.0], "std": [1.0, 1.0]}  # a number that never varies is not blown up


def test_predictions_are_in_the_units_of_the_data() -> None:
    task = Regress()
    task.prepare(NAMES, {"mean": [40.0, 2000.0], "std": [10.0, 5.0]})
    assert task.predict(task.scores(torch.tensor([[1.0, -1.0]])), NAMES) == [
        {"prediction": "50 1995", "age": 50.0, "year": 1995.0}
    ]
    task.prepare(["age"], {"mean": [40.0], "std": [10.0]})
    assert task.predict(task.scores(torch.tensor([[1.0, 7.0]])), ["age"]) == [{"prediction": 50.0}]


def test_an_engine_takes_several_numbers(tmp_path: Path) -> None:
    images, numbers = torch.zeros(24, 3, 32, 32, dtype=torch.uint8), torch.randn(24, 2)
    with bigvision.Engine(recipe(tmp_path, "small", task={"name": "regress"}), num_classes=2) as engine:
        expected = numbers.square().mean().item()  # a new head answers about 0
        assert engine.train_step(images, numbers).numbers[0] == pytest.approx(expected, rel=0.1)
        assert engine.eval_step(images, numbers).means().keys() == {"loss", "mae", "r2"}
        with pytest.raises(UserError, match=r"got \(24, 3, 32, 32\) and \(23, 2\): give images \(B, C, H, W\) and targets"):
            engine.train_step(images, numbers[:23])


def test_r2_of_a_number_that_never_varies_is_none() -> None:
    task = Regress()
    task.prepare(["age"], {})
    sums = task.measure(torch.zeros(4, 1), torch.full((4,), 3.0), torch.ones(4, dtype=torch.bool))
    assert math.isnan(task.compute(sums, 4, None)["r2"]) and task.report(sums, 4, None, ["age"])["numbers"][0]["r2"] is None
