"""What every strategy offers: the engine's methods, and what a step and an evaluation return."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bigvision.data.batch import Batch, StepBatch
from bigvision.engine.state import RUNNING
from bigvision.fragments import Fragment

REQUESTS = ("stop", "save", "failure")
"""What a rank can ask all others for. Requests travel in the tensor that a step or an evaluation reduces anyway."""


class Record:
    """Numbers of a step on their way from the device to the host. Reading waits until they have arrived."""

    def __init__(self, numbers: Tensor) -> None:
        """Args: *numbers*: 1-D, on the device. The copy to pinned memory runs behind what was launched before."""
        self._host, self._arrived = numbers, None
        if numbers.device.type == "cuda":
            self._host = numbers.to("cpu", non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did. `loss` and `grad_norm` are 0-D tensors on the device; reading anything else that depends
    on the step's numbers waits until the device has come to it."""

    loss: Tensor
    """Mean over the global batch."""
    grad_norm: Tensor
    """Of the whole model's gradient, before clipping."""
    lr: float
    samples: int
    """Of the global batch."""
    step: int
    """Batches taken, with this one."""
    consumed: int
    """Samples consumed, with this step's."""
    record: Record
    """[loss, gradient norm, skipped, overflowed, *requests]."""
    offenders: Callable[[], list[int]] = list
    seconds: Callable[[], float] = float
    """How long this rank worked before it needed the others; 0 for strategies that communicate from the first layer on."""
    passed_over: bool = False
    """Whether the batch was only counted."""

    @property
    def numbers(self) -> tuple[float, float]:
        """(loss, gradient norm) as numbers."""
        loss, norm, *_ = self.record.read()
        return loss, norm

    @property
    def skipped(self) -> bool:
        """Whether the loss, the gradient or a running statistic was not finite on some rank. Then only the batch counter
        advances; weights, optimizer state and statistics are unchanged."""
        return bool(self.record.read()[2])

    @property
    def overflowed(self) -> bool:
        """Whether the step was skipped because fp16's loss scale was too large, and has fallen since: to be expected."""
        return bool(self.record.read()[3])

    @property
    def requests(self) -> set[str]:
        """What any rank asked for with this step (of `REQUESTS`)."""
        return asked(self.record.read()[4:])

    @property
    def culprits(self) -> Sequence[int]:
        """Of a skipped step: ids of this rank's samples whose loss is not finite. If the sample cannot be singled out
        (BatchNorm mixes a micro-batch), all ids of its micro-batch."""
        return self.offenders() if self.skipped and not self.overflowed else ()


def asked(counts: Sequence[float]) -> set[str]:
    """The requests of which *counts* ranks have made each."""
    return {name for name, count in zip(REQUESTS, counts) if count}


@dataclass(frozen=True)
class Metrics:
    """Sums over samples, already reduced over ranks."""

    names: tuple[str, ...]
    sums: Tensor
    """float64, (names,)."""
    count: Tensor
    """float64, 0-D: samples in the sums."""
    record: Record | None = None
    """Of one batch: what ranks asked for with it."""

    def __add__(self, other: Metrics) -> Metrics:
        return Metrics(self.names, self.sums + other.sums, self.count + other.count)

    def means(self) -> dict[str, float]:
        return {name: value / self.count.item() for name, value in zip(self.names, self.sums.tolist())}

    @property
    def requests(self) -> set[str]:
        """What any rank asked for with this batch; reading it waits for the batch."""
        return asked(self.record.read()) if self.record is not None else set()


class Engine(ABC):
    """A model, its optimizer and everything between a batch and the next weights, under one strategy."""

    step: int = 0
    """Batches taken, also those that were skipped or passed over."""
    samples: int = 0
    """Samples consumed: the whole state of the data."""
    statistics_differ: bool = False
    """Whether running statistics are each rank's own, until :meth:`synchronize`."""
    eval_batch: int
    """Samples that :meth:`eval_step` should be given on each rank."""
    notes: Sequence[str] = ()
    """What the user should know of how the model is spread."""
    requests: frozenset[str] = frozenset()
    """What this rank asks the others for; sent with the next step or evaluation."""
    place: str = ""
    """Which part of the model this rank has and with which ranks it exchanges, for errors; empty where all have the same."""

    @property
    @abstractmethod
    def skipped(self) -> int:
        """Batches without an optimizer step; waits for the last step. The learning rate is that of step - skipped."""

    @abstractmethod
    def train_step(self, batch: Batch | StepBatch) -> StepResult:
        """Take one optimizer step on this rank's part of the global batch. Every rank calls it with as many samples.

        It returns when the work is launched; at most one step is under way beside it.
        """

    @abstractmethod
    def pass_over(self, batch: Batch | StepBatch) -> StepResult:
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
            differs = self.statistics_differ and fragment.name.rpartition(".")[2] in RUNNING
            if fragment.copy[1] > 1 and fragment.values.numel() and not differs:
                yield fragment

    @abstractmethod
    def scalars(self) -> dict[str, Any]:
        """What of the state is not a tensor, as JSON. Waits for the last step."""

    @abstractmethod
    def restored(self, scalars: dict[str, Any]) -> None:
        """Take over *scalars* and :meth:`refresh`; called after all fragments were written."""

    def refresh(self) -> None:
        """Bring what derives from the fragments up to date: called after they were written, by :meth:`restored` too."""
        return

    def close(self) -> None:
        """Release what outlives the engine otherwise; it is not used afterwards."""
        return


def nothing_done(lr: float, samples: int, step: int, consumed: int) -> StepResult:
    """The result of a batch that was not trained on."""
    numbers = torch.tensor([math.nan, math.nan, 1.0, 0.0, *(0.0 for _ in REQUESTS)], dtype=torch.float64)
    return StepResult(numbers[0], numbers[1], lr, samples, step, consumed, Record(numbers), passed_over=True)
