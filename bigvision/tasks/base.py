"""What every task offers to the engine and the loader."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from bigvision.targets import Targets, stack


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
