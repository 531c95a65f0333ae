"""Regression: one or several numbers for each sample."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigvision.tasks.base import TargetsOf, Task, as_sum

LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.huber_loss}
ENOUGH = 256
"""Samples for mean and deviation of data that does not list its targets."""


class Regress(Task):
    """Squared error, absolute error or Huber's loss, means over the numbers; mean absolute error and R².

    The model learns each number less its mean over the training data and divided by its standard deviation there, unless
    *standardize* is false. The loss is of those; predictions and the mean absolute error are in the data's own units.
    """

    target = "numbers"
    metrics = ("loss", "mae", "r2")

    def __init__(self, loss: str | None = None, standardize: bool = True) -> None:
        """Args: *loss*: "l2", the default, "l1" or "huber", which is linear from a (standardised) error of 1 on."""
        self.criterion, self.standardize = LOSSES[loss or "l2"], standardize
        self.numbers = 1
        self.mean, self.std = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)

    def study(self, targets: TargetsOf, classes: Sequence[str], known: Mapping[str, Any]) -> dict[str, Any]:
        """Return mean and standard deviation of each number; a run keeps those that it began with."""
        if len(known.get("mean", ())) == len(known.get("std", ())) == len(classes):
            return dict(known)
        values = torch.as_tensor(targets(ENOUGH)).double().reshape(-1, len(classes))
        std = values.std(0, correction=0)
        # Of a number that is always the same the rounding of its mean is all that is left.
        std = torch.where(std > 1e-12 * values.abs().amax(0), std, 1.0)
        return {"mean": values.mean(0).tolist(), "std": std.tolist()}

    def prepare(self, classes: Sequence[str], facts: Mapping[str, Any]) -> None:
        self.numbers = len(classes)
        self.mean = torch.tensor(facts.get("mean", [0.0] * self.numbers), dtype=torch.float64)
        self.std = torch.tensor(facts.get("std", [1.0] * self.numbers), dtype=torch.float64)

    def _standard(self, targets: Tensor) -> Tensor:
        """Standardised *targets*, float64 (B, numbers)."""
        self.mean, self.std = self.mean.to(targets.device), self.std.to(targets.device)
        return (targets.double().reshape(len(targets), -1) - self.mean) / self.std

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._losses(outputs, targets).sum()

    def _losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        learned = self._standard(targets) if self.standardize else targets.reshape(len(targets), -1)
        return self.criterion(outputs[:, : self.numbers].float(), learned.float(), reduction="none").mean(1)

    @property
    def sums(self) -> int:
        return 1 + 4 * self.numbers

    def measure(self, outputs: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
        """Return sums of the losses; and of each number of its absolute errors, in the data's units, of the squares of the
        standardised errors, and of the standardised targets and their squares."""
        standard = self._standard(targets)
        errors = self.scores(outputs) - targets.reshape(len(targets), -1)
        parts = torch.cat([errors.abs(), (errors / self.std).square(), standard, standard.square()], dim=1)
        return torch.stack([as_sum(part, valid) for part in (self._losses(outputs, targets), *parts.unbind(1))])

    def _by_number(self, sums: Tensor, count: float) -> tuple[Tensor, Tensor, Tensor]:
        """Of each number mean absolute error, root of the mean squared error, and R², which is NaN where it never varies."""
        absolute, squared, total, squares = sums[1:].reshape(4, -1)
        # Around the training data's mean, so that the difference of the two keeps its digits.
        around = squares - total.square() / (count or math.nan)
        r2 = torch.where(around > 1e-12 * squares, 1 - squared / around, math.nan)
        return absolute / (count or math.nan), (squared / (count or math.nan)).sqrt() * self.std.cpu(), r2

    def compute(self, sums: Tensor, count: float, rows: Tensor | None) -> dict[str, float]:
        mae, _, r2 = self._by_number(sums, count)
        return {"loss": float(sums[0]) / (count or math.nan), "mae": mae.mean().item(), "r2": r2.mean().item()}

    def report(self, sums: Tensor, count: float, rows: Tensor | None, classes: Sequence[str]) -> dict[str, Any]:
        """Return each number's errors and R²."""
        found = zip(classes, *(values.tolist() for values in self._by_number(sums, count)))
        return {
            "numbers": [
                {"number": name, "mae": mae, "rmse": rmse, "r2": None if math.isnan(r2) else r2}
                for name, mae, rmse, r2 in found
            ]
        }

    def scores(self, outputs: Tensor) -> Tensor:
        """Return the numbers in the data's units, float64."""
        values = outputs[:, : self.numbers].double()
        return values * self.std.to(values.device) + self.mean.to(values.device) if self.standardize else values

    def predict(self, scores: Tensor, classes: Sequence[str], top: int = 1) -> list[dict[str, Any]]:
        """Return the number; of several, ``prediction`` has all of them, parted by spaces, and each its own column too."""
        if scores.shape[1] == 1:
            return [{"prediction": value} for value in scores[:, 0].tolist()]
        return [
            {"prediction": " ".join(f"{value:.6g}" for value in values)} | dict(zip(classes, values))
            for values in scores.tolist()
        ]
