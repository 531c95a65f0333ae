"""What a task offers to engine and loader, and single-label classification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bigvision.samples import Targets, stack


class Task(Protocol):
    """Turns a model's output into a loss and metrics. Sums, never means: the engine alone knows the global batch."""

    metrics: tuple[str, ...]
    """Names of what :meth:`measure` sums."""

    def collate(self, targets: Sequence[Any]) -> Targets:
        """Return the targets of a micro-batch, made of those of its samples; with the samples as their first dimension."""
        return stack(targets)

    def loss(self, outputs: Tensor, targets: Targets) -> Tensor:
        """Return the 0-D sum of the samples' losses."""
        ...

    def measure(self, outputs: Tensor, targets: Targets, valid: Tensor) -> Tensor:
        """Return the sum of each of :attr:`metrics` over the samples that are *valid*, float64 of shape (metrics,)."""
        ...


class Classify(Task):
    """Cross-entropy with label smoothing (Szegedy et al. 2016); top-1 and top-5 accuracy."""

    metrics = ("loss", "top1", "top5")

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

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
        return torch.stack([(value.double() * valid).sum() for value in (loss, top1, top5)])
