"""Single-label classification."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bigvision.errors import UserError, nearest
from bigvision.tasks.base import TargetsOf, Task, as_sum, name_of

MATRIX = 100
"""Classes up to which a report has the confusion matrix; of more it lists the most frequent pairs."""
PAIRS = 1000


class Classify(Task):
    """Cross-entropy, or binary cross-entropy for each class, with label smoothing (Szegedy et al. 2016) and class weights;
    top-1 and top-5 accuracy, and the mean over classes of the first.

    Targets are int64 (B,), or distributions over the classes: floats (B, classes).
    """

    target = "label"
    metrics = ("loss", "top1", "top5", "mean_class_top1")
    keeps_rows, means_need_rows = True, False

    def __init__(
        self, label_smoothing: float = 0.0, loss: str | None = None, class_weights: str | Sequence[float] | None = None
    ) -> None:
        """Args:
        loss: "ce", the default, or "bce" as in timm: the mean over the classes of each one's binary cross-entropy.
        class_weights: a number for each class, a file with them (see :func:`read_weights`), or "balanced": of each class the
            reciprocal of its number of training samples, times the mean number.
        """
        self.label_smoothing, self.binary, self.class_weights = label_smoothing, loss == "bce", class_weights
        self.classes = 0
        """Of the data; without them (see :meth:`prepare`) there is no mean over classes."""
        self.weights: Tensor | None = None
        self._padded: dict[tuple[torch.device, int], Tensor] = {}
        """The weights by device and number of outputs: in memory that stays, which a CUDA graph may read."""

    def study(self, targets: TargetsOf, classes: Sequence[str], known: Mapping[str, Any]) -> dict[str, Any]:
        if self.class_weights != "balanced":
            return {}
        found = targets(None)
        counts = found.sum(0) if found.ndim == 2 else np.bincount(found, minlength=len(classes))
        # A class without samples is only ever a wrong answer.
        weights = np.where(counts > 0, counts.sum() / (len(classes) * np.maximum(counts, 1e-12)), 1.0)
        return {"class_weights": weights.tolist()}

    def prepare(self, classes: Sequence[str], facts: Mapping[str, Any]) -> None:
        self.classes = len(classes)
        weights = self.class_weights
        if weights == "balanced":
            weights = facts.get("class_weights")  # none in an evaluation, which does not need them
        elif isinstance(weights, str):
            weights = read_weights(weights, classes)
        if weights is not None and len(weights) != len(classes):
            raise UserError(
                f"task.class_weights: {len(weights)} numbers, but the data has {len(classes)} classes: give one for each"
            )
        self.weights = None if weights is None else torch.tensor(weights, dtype=torch.float32)
        self._padded = {}

    # Training.

    def mixed(
        self, targets: Tensor, partners: Callable[[Tensor], Tensor], share: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Return each sample's target, its partner's, and the share of its own."""
        return targets, partners(targets), share

    @property
    def weighed(self) -> bool:
        return self.class_weights is not None

    def weight(self, targets: Tensor | tuple[Tensor, Tensor, Tensor]) -> Tensor | None:
        """Return the sum of the weights of the samples' classes, where classes have some."""
        if self.class_weights is None:
            return None
        if isinstance(targets, tuple):
            own, other, share = targets
            return (self._weight_of(own) * share + self._weight_of(other) * (1 - share)).sum(dtype=torch.float64)
        return self._weight_of(targets).sum(dtype=torch.float64)

    def _weight_of(self, targets: Tensor) -> Tensor:
        """The weight of each sample."""
        weights = self._weights_on(targets.device, self.classes)
        return targets.float() @ weights if targets.ndim == 2 else weights[targets]

    def _weights_on(self, device: torch.device, outputs: int) -> Tensor:
        """The weights of as many classes as the model has *outputs*, which may be more than the data's."""
        if self.weights is None:
            raise UserError("task.class_weights: balanced counts the training data: name it (data=...), or give numbers")
        if (key := (device, outputs)) not in self._padded:
            self._padded[key] = F.pad(self.weights.to(device), (0, outputs - len(self.weights)), value=1.0)
        return self._padded[key]

    def loss(self, outputs: Tensor, targets: Tensor | tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Return the sum of the samples' losses. *outputs* are logits, (B, classes); *targets* may be :meth:`mixed`.

        `UserError` for outputs of another shape, such as those of a model without a head.
        """
        if outputs.ndim != 2:
            raise UserError(
                f"model.name: the model returns {tuple(outputs.shape[1:])} for an image instead of a score for each class: "
                "choose a model with a head, or give model=..., a function that puts one on it"
            )
        if not isinstance(targets, tuple):
            return self._losses(outputs, targets, "sum")
        own, other, share = targets
        return (self._losses(outputs, own) * share + self._losses(outputs, other) * (1 - share)).sum()

    def _losses(self, outputs: Tensor, targets: Tensor, reduction: str = "none") -> Tensor:
        outputs, classes = outputs.float(), outputs.shape[1]
        weights = self._weights_on(outputs.device, classes) if self.class_weights is not None else None
        if targets.ndim == 2:
            targets = F.pad(targets.float(), (0, classes - targets.shape[1]))
        if not self.binary:
            return F.cross_entropy(outputs, targets, weights, label_smoothing=self.label_smoothing, reduction=reduction)
        losses = self._binary(outputs, targets, self.label_smoothing)
        losses = losses if weights is None else losses * self._weight_of(targets)
        return losses.sum() if reduction == "sum" else losses

    @staticmethod
    def _binary(outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        soft = targets.float() if targets.ndim == 2 else F.one_hot(targets, outputs.shape[1]).float()
        soft = soft * (1 - smoothing) + smoothing / outputs.shape[1]
        return F.binary_cross_entropy_with_logits(outputs, soft, reduction="none").mean(1)

    # Evaluation.

    @property
    def sums(self) -> int:
        return 3 + 2 * self.classes

    def measure(self, outputs: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
        """Return sums over the valid samples of the loss (without smoothing and weights), of hits in the first and first five,
        and of each class the hits and the samples. Of a distribution the most probable class counts.

        Logits of few bits often tie. A label that ties with others for the last places counts as the share of them that is
        left to it, which is what picking among them at random gives on average; so a model that answers all classes alike is
        at chance level. NaN is ahead of every label, as in `torch.topk`, and a label's own NaN or infinity is a miss.
        """
        outputs = outputs.float()
        labels = targets.argmax(1) if targets.ndim == 2 else targets
        if targets.ndim == 2:
            targets = F.pad(targets.float(), (0, outputs.shape[1] - targets.shape[1]))
        loss = self._binary(outputs, targets) if self.binary else F.cross_entropy(outputs, targets, reduction="none")
        own = outputs.gather(1, labels[:, None])
        ahead = ((outputs > own) | outputs.isnan()).sum(dim=1).double()
        alike = (outputs == own).sum(dim=1).clamp(min=1)
        known = torch.isfinite(own[:, 0])
        top1, top5 = (((k - ahead) / alike).clamp(0, 1) * known for k in (1, 5))
        sums = torch.stack([as_sum(value, valid) for value in (loss, top1, top5)])
        if not self.classes:
            return sums
        of_class = sums.new_zeros(2, self.classes)
        of_class.index_add_(1, labels, torch.stack([torch.where(valid, top1, 0.0), valid.double()]))
        return torch.cat([sums, of_class.flatten()])

    def rows(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return each sample's class and the one that is predicted."""
        labels = targets.argmax(1) if targets.ndim == 2 else targets
        return torch.stack([labels, outputs.argmax(1)], dim=1).double()

    def compute(self, sums: Tensor, count: float, rows: Tensor | None) -> dict[str, float]:
        found = {name: value / (count or math.nan) for name, value in zip(self.metrics, sums[:3].tolist())}
        if len(sums) > 3:
            hits, samples = sums[3:].chunk(2)
            found["mean_class_top1"] = (hits / samples)[samples > 0].mean().item()
        return found

    def report(self, sums: Tensor, count: float, rows: Tensor | None, classes: Sequence[str]) -> dict[str, Any]:
        """Return each class's samples and accuracy, and the confusion matrix: a row for each class, a column for each
        prediction. Of more than `MATRIX` classes it has the most frequent pairs instead, as [class, prediction, samples]."""
        hits, samples = sums[3:].chunk(2)
        found: dict[str, Any] = {
            "classes": [
                {"class": name, "samples": int(number), "top1": right / number if number else None}
                for name, right, number in zip(classes, hits.tolist(), samples.tolist())
            ]
        }
        if rows is None or not len(rows):
            return found
        pairs, counts = rows.long().unique(dim=0, return_counts=True)
        if len(classes) <= MATRIX:
            size = max(len(classes), int(pairs.max()) + 1)
            matrix = torch.zeros(len(classes), size, dtype=torch.int64)
            matrix[pairs[:, 0], pairs[:, 1]] = counts
            found["confusion"] = matrix.tolist()
        else:
            wrong = pairs[:, 0] != pairs[:, 1]
            pairs, counts = pairs[wrong], counts[wrong]
            most = counts.argsort(descending=True, stable=True)[:PAIRS]
            found["confused"] = [
                [name_of(one, classes), name_of(other, classes), number]
                for (one, other), number in zip(pairs[most].tolist(), counts[most].tolist())
            ]
        return found

    # Prediction.

    def scores(self, outputs: Tensor) -> Tensor:
        """Return probabilities, fp32; of the binary losses each class's own."""
        return outputs.float().sigmoid() if self.binary else outputs.float().softmax(1)

    def predict(self, scores: Tensor, classes: Sequence[str], top: int = 1) -> list[dict[str, Any]]:
        """Return the most probable class of each sample, its probability, and those of the next *top* - 1."""
        values, places = scores.topk(min(top, scores.shape[1]), dim=1)
        rows = []
        for probabilities, labels in zip(values.tolist(), places.tolist()):
            names = [name_of(label, classes) for label in labels]
            row: dict[str, Any] = {"prediction": names[0], "probability": probabilities[0]}
            for number, (name, probability) in enumerate(zip(names[1:], probabilities[1:]), start=2):
                row |= {f"prediction{number}": name, f"probability{number}": probability}
            rows.append(row)
        return rows


def read_weights(file: str, classes: Sequence[str]) -> list[float]:
    """The weights of *classes* in *file*: a number on each line, a JSON list, or a JSON object with a number for each name."""
    key = "task.class_weights"
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
        found = json.loads(text) if text.lstrip()[:1] in ("[", "{") else text.split()
        if isinstance(found, dict):
            unknown = next((name for name in found if name not in classes), None)
            missing = next((name for name in classes if name not in found), None)
            if unknown is not None or missing is not None:
                what = f"has no weight for class {missing!r}" if unknown is None else f"names {unknown!r}, which is no class"
                raise UserError(
                    f"{key}: {file!r} {what}{nearest(unknown or missing or '', found if unknown is None else classes)}"
                )
            found = [found[name] for name in classes]
        weights = [float(value) for value in found]
    except OSError as error:
        raise UserError(
            f"{key}: {file!r} cannot be read: {error.strerror}; write balanced, numbers, or a file's path"
        ) from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{key}: {file!r} is no list of numbers ({error}): write a number on each line, or JSON") from error
    if not all(0 <= weight < math.inf for weight in weights):
        raise UserError(f"{key}: {file!r} has a weight that is no finite number from 0 on")
    return weights
