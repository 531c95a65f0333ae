"""Single-label classification."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigvision.tasks.base import Task, as_sum


class Classify(Task):
    """Cross-entropy with label smoothing (Szegedy et al. 2016); top-1 and top-5 accuracy."""

    target = "label"
    metrics = ("loss", "top1", "top5")

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def mixed(self, targets: Tensor, partners: Callable[[Tensor], Tensor], share: Tensor) -> Tensor:
        """Return float64 (B, 3): each sample's label, its partner's, and the share of its own."""
        return torch.stack([targets.double(), partners(targets).double(), share.double()], dim=1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of the samples' losses. *outputs* are logits, (B, classes).

        *targets* are int64, (B,); or for mixed samples (B, 3): the label, the other's, and the share of the first.
        """
        if targets.ndim == 2:
            own, other, share = targets.unbind(1)
            losses = [
                F.cross_entropy(outputs.float(), part.long(), label_smoothing=self.label_smoothing, reduction="none")
                for part in (own, other)
            ]
            return (losses[0] * share.float() + losses[1] * (1 - share.float())).sum()
        return F.cross_entropy(outputs.float(), targets, label_smoothing=self.label_smoothing, reduction="sum")

    def measure(self, outputs: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
        """Return sums over the valid samples of the loss (without smoothing) and of hits in the first and first five.

        Logits of few bits often tie. A label that ties with others for the last places counts as the share of them that is
        left to it, which is what picking among them at random gives on average; so a model that answers all classes alike is
        at chance level. NaN is ahead of every label, as in `torch.topk`, and a label's own NaN or infinity is a miss.
        """
        outputs = outputs.float()
        loss = F.cross_entropy(outputs, targets, reduction="none")
        own = outputs.gather(1, targets[:, None])
        ahead = ((outputs > own) | outputs.isnan()).sum(dim=1).double()
        alike = (outputs == own).sum(dim=1).clamp(min=1)
        known = torch.isfinite(own[:, 0])
        top1, top5 = (((k - ahead) / alike).clamp(0, 1) * known for k in (1, 5))
        return torch.stack([as_sum(value, valid) for value in (loss, top1, top5)])

    def scores(self, outputs: Tensor) -> Tensor:
        """Return probabilities, fp32."""
        return outputs.float().softmax(1)

    def predict(self, scores: Tensor, classes: Sequence[str], top: int = 1) -> list[dict[str, Any]]:
        """Return the most probable class of each sample, its probability, and those of the next *top* - 1."""
        values, places = scores.topk(min(top, scores.shape[1]), dim=1)
        rows = []
        for probabilities, labels in zip(values.tolist(), places.tolist()):
            names = [classes[label] if label < len(classes) else str(label) for label in labels]
            row: dict[str, Any] = {"prediction": names[0], "probability": probabilities[0]}
            for number, (name, probability) in enumerate(zip(names[1:], probabilities[1:]), start=2):
                row |= {f"prediction{number}": name, f"probability{number}": probability}
            rows.append(row)
        return rows
