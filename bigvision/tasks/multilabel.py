"""Classification with any number of labels for each sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigvision.tasks.base import Task, as_sum, name_of

MARGIN, FOCUS = 0.05, 4
"""Of the asymmetric loss: what is taken off a negative's probability, and the power of what is left that weighs its loss."""
SEPARATOR = "|"
"""Between the labels of a prediction."""


class Multilabel(Task):
    """Binary cross-entropy, the mean over the classes, or the asymmetric loss (Ridnik et al. 2021), the sum over them as in
    timm. Mean average precision, in which a class that no sample has counts as 0 (as in torchmetrics and scikit-learn), and F1
    of the labels whose probability is above one half.

    Targets are 0 and 1, or shares between them, (B, classes). A share of one half and more counts as a label in the metrics.
    """

    target = "labels"
    metrics = ("loss", "map", "f1", "f1_micro")
    keeps_rows = True

    def __init__(self, loss: str | None = None) -> None:
        """Args: *loss*: "bce", the default, or "asymmetric": positives weigh 1, and negatives the 4th power of their
        probability less 0.05, as in the paper."""
        self.asymmetric = loss == "asymmetric"
        self.classes: int | None = None

    def prepare(self, classes: Sequence[str], facts: Mapping[str, Any]) -> None:
        self.classes = len(classes)

    def mixed(self, targets: Tensor, partners: Callable[[Tensor], Tensor], share: Tensor) -> Tensor:
        """Return of each label the share of the image that it is of."""
        share, targets = share[:, None], targets.float()
        return targets * share + partners(targets) * (1 - share)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._losses(outputs, targets).sum()

    def _losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of each sample."""
        outputs, targets = outputs[:, : self.classes].float(), targets.float()
        if not self.asymmetric:
            return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(1)
        shifted = (outputs.sigmoid() - MARGIN).clamp(min=0)
        negative = shifted**FOCUS * torch.log1p(-shifted.clamp(max=1 - 1e-6))
        return -(targets * F.logsigmoid(outputs) + (1 - targets) * negative).sum(1)

    @property
    def sums(self) -> int:
        return 1

    def measure(self, outputs: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
        return as_sum(self._losses(outputs, targets), valid)[None]

    def rows(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return of each class its probability, and 2 more where it is a label: exact in float64."""
        return self.scores(outputs).nan_to_num(0.0).double() + 2.0 * (targets >= 0.5)

    def compute(self, sums: Tensor, count: float, rows: Tensor | None) -> dict[str, float]:
        assert rows is not None
        precision, f1, (right, wrong) = self._by_class(rows)
        return {
            "loss": float(sums[0]) / count if count else float("nan"),
            "map": precision.nan_to_num(0.0).mean().item(),
            "f1": f1.mean().item(),
            "f1_micro": (2 * right.sum() / (2 * right + wrong).sum().clamp(min=1)).item(),
        }

    @staticmethod
    def _by_class(rows: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Of each class average precision, F1 (0 where it is neither a label nor predicted), and how many samples are right
        positives and wrong ones."""
        labels = rows >= 2
        scores = torch.where(labels, rows - 2, rows)
        right, wrong = ((scores > 0.5) & labels).sum(0).double(), ((scores > 0.5) != labels).sum(0).double()
        return average_precision(scores, labels), 2 * right / (2 * right + wrong).clamp(min=1), (right, wrong)

    def report(self, sums: Tensor, count: float, rows: Tensor | None, classes: Sequence[str]) -> dict[str, Any]:
        """Return each class's positive samples, average precision and F1."""
        if rows is None or not len(rows):
            return {}
        precision, f1, _ = self._by_class(rows)
        found = zip(classes, (rows >= 2).sum(0).tolist(), precision.tolist(), f1.tolist())
        return {
            "classes": [
                {"class": name, "samples": number, "average_precision": value if number else None, "f1": other}
                for name, number, value, other in found
            ]
        }

    def scores(self, outputs: Tensor) -> Tensor:
        """Return each class's probability, fp32."""
        return outputs[:, : self.classes].float().sigmoid()

    def predict(self, scores: Tensor, classes: Sequence[str], top: int = 1) -> list[dict[str, Any]]:
        """Return the labels of each sample whose probability is above one half, parted by ``|``, and the *top* most probable
        ones with their probabilities."""
        values, places = scores.topk(min(top, scores.shape[1]), dim=1)
        rows = []
        for chosen, probabilities, labels in zip((scores > 0.5).tolist(), values.tolist(), places.tolist()):
            row: dict[str, Any] = {
                "prediction": SEPARATOR.join(name_of(n, classes) for n, is_one in enumerate(chosen) if is_one)
            }
            for number, (label, probability) in enumerate(zip(labels, probabilities), start=1):
                row |= {f"label{number}": name_of(label, classes), f"probability{number}": probability}
            rows.append(row)
        return rows


def average_precision(scores: Tensor, labels: Tensor) -> Tensor:
    """Of each column of *scores* the mean, over the samples that are *labels*, of the precision among all samples with at least
    that score; float64, NaN in columns without any. Both are (N, columns).
    """
    count = len(scores)
    order = scores.argsort(dim=0, descending=True)
    scores, hits = scores.gather(0, order), labels.gather(0, order).double()
    places = torch.arange(1, count + 1, dtype=torch.float64)[:, None]
    precision = hits.cumsum(0) / places
    # Equal scores count as one place, the last of them.
    ends = torch.cat([scores[1:] != scores[:-1], torch.ones_like(labels[:1])])
    last = torch.where(ends, places, float(count)).flip(0).cummin(0).values.flip(0).long() - 1
    return (precision.gather(0, last) * hits).sum(0) / hits.sum(0)
