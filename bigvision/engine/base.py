"""The one shape that every strategy shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bigvision.data.batch import Batch
from bigvision.engine.statistics import RUNNING
from bigvision.fragments import Fragment


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did. Tensors are 0-D and on the device: reading one waits for the step."""

    loss: Tensor
    """Mean over the global batch."""
    grad_norm: Tensor
    """Of the whole model's gradient, before clipping."""
    lr: float
    skipped: bool
    """True when the loss or the gradient was not finite on some rank: all but the count of batches is as before."""
    samples: int
    """Of the global batch."""
    overflowed: bool = False
    """True when a step was skipped that fp16's loss scale, which has fallen, made overflow: to be expected now and then."""
    culprits: Sequence[int] = ()
    """Of a skipped step: the ids of this rank's samples whose loss is not finite, or of those among which they are."""


@dataclass(frozen=True)
class Metrics:
    """Sums over samples, already reduced over ranks."""

    names: tuple[str, ...]
    sums: Tensor
    """float64, (names,)."""
    count: Tensor
    """float64, 0-D: samples in the sums."""

    def __add__(self, other: Metrics) -> Metrics:
        return Metrics(self.names, self.sums + other.sums, self.count + other.count)

    def means(self) -> dict[str, float]:
        return {name: value / self.count.item() for name, value in zip(self.names, self.sums.tolist())}


class Engine(ABC):
    """A model, its optimizer and everything between a batch and the next weights, under one strategy."""

    step: int = 0
    """Batches taken, also those that were skipped or passed over."""
    skipped: int = 0
    """Of these, the ones without an optimizer step. The learning rate is that of step - skipped."""
    samples: int = 0
    """Samples consumed: the whole state of the data."""
    statistics_differ: bool = False
    """Whether running statistics are each rank's own, until :meth:`synchronize`."""
    eval_batch: int
    """Samples that :meth:`eval_step` should be given on each rank."""
    notes: Sequence[str] = ()
    """What the user should know of how the model is spread."""

    place: str = ""
    """Which part of the model this rank has and with which ranks it exchanges, for errors; empty where all have the same."""

    @abstractmethod
    def train_step(self, batch: Batch) -> StepResult:
        """Take one optimizer step on this rank's part of the global batch. Every rank calls it with as many samples."""

    def alone(self) -> float:
        """Seconds that this rank worked in the last step before it needed the others; 0 where it needs them at once."""
        return 0.0

    @abstractmethod
    def pass_over(self, batch: Batch) -> StepResult:
        """Count a batch as a skipped step, and do nothing with it."""

    @abstractmethod
    def eval_step(self, batch: Batch) -> Metrics:
        """Return metrics of all ranks' batches. Every rank calls it with as many samples; padding is not counted."""

    @abstractmethod
    def synchronize(self) -> None:
        """Make running statistics the same on all ranks. Called on every rank before evaluation and saving."""

    @abstractmethod
    def fragments(self) -> Iterator[Fragment]:
        """Yield live views of all that this rank holds; writing to them restores."""

    def copies(self) -> Iterator[Fragment]:
        """Yield what other ranks hold as well; running statistics only while they are the same on all."""
        for fragment in self.fragments():
            own = self.statistics_differ and fragment.name.rpartition(".")[2] in RUNNING
            if fragment.copy[1] > 1 and fragment.values.numel() and not own:
                yield fragment

    @abstractmethod
    def scalars(self) -> dict[str, Any]:
        """What of the state is not a tensor, as JSON."""

    @abstractmethod
    def restored(self, scalars: dict[str, Any]) -> None:
        """Take over *scalars* and :meth:`refresh`; called after all fragments were written."""

    def refresh(self) -> None:
        """Bring what derives from the fragments up to date: called after they were written, by :meth:`restored` too."""
        return

    def close(self) -> None:
        """Let go of what outlives the engine otherwise; it is not used afterwards."""
        return
