"""Losses that stand out from those before them."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

WINDOW = 100
"""Losses whose mean and deviation the next one is measured by."""
LEAST = 20
"""Losses before the first verdict; and spikes in a row that are no spikes any more, but where the loss is now."""


@dataclass(frozen=True)
class Spike:
    """A loss that is *deviations* standard deviations above the *mean* of those before it."""

    loss: float
    mean: float
    deviations: float


class Spikes:
    """Looks at each step's loss, which is the same on every rank, and so is the verdict."""

    def __init__(self, threshold: float, losses: Sequence[float] = ()) -> None:
        """Args:
        threshold: standard deviations above the mean.
        losses: of earlier steps, from :attr:`losses`: a run that goes on judges as one that was never interrupted.
        """
        self.threshold = threshold
        self.losses = deque(losses, WINDOW)
        self.in_a_row: list[float] = []

    def look(self, loss: float) -> Spike | None:
        """Say whether the finite *loss* is a spike. Those that are none are what the next ones are compared with."""
        if len(self.losses) >= LEAST:
            mean = statistics.fmean(self.losses)
            # Where all were the same, the last digit is no spike.
            deviation = max(statistics.pstdev(self.losses, mean), 1e-6 * abs(mean), 1e-12)
            if loss - mean > self.threshold * deviation:
                self.in_a_row.append(loss)
                if len(self.in_a_row) == LEAST:
                    self.losses, self.in_a_row = deque(self.in_a_row, WINDOW), []
                return Spike(loss, mean, (loss - mean) / deviation)
        self.in_a_row = []
        self.losses.append(loss)
        return None
