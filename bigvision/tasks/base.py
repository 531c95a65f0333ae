"""What every task offers to the engine."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Task(Protocol):
    """Turns a model's output into a loss and metrics. Sums, never means: the engine alone knows the global batch."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what :meth:`measure` sums."""
        ...

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the 0-D sum of the samples' losses."""
        ...

    def measure(self, outputs: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        """Return the sum of each of :attr:`metrics` over the samples that are *valid*, float64 of shape (metrics,)."""
        ...
