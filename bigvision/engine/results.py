"""What a step and an evaluation return, and what ranks ask each other for with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

REQUESTS = ("stop", "save", "failure")
"""What a rank can ask all others for. Requests travel in the tensor that a step or an evaluation reduces anyway."""


def reduce_with(requests: Set[str], numbers: Tensor) -> Tensor:
    """Return the sums of *numbers*, float64 (N,), over all ranks, and behind them how many ranks have made each request.

    It is the one collective beyond the strategy's own traffic.
    """
    totals = torch.cat([numbers, numbers.new_zeros(len(REQUESTS))])
    for place, name in enumerate(REQUESTS, start=len(numbers)):
        if name in requests:
            totals[place].fill_(1.0)
    dist.all_reduce(totals)
    return totals


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
        """NaN where there is no sample."""
        count = self.count.item() or math.nan
        return {name: value / count for name, value in zip(self.names, self.sums.tolist())}

    @property
    def requests(self) -> set[str]:
        """What any rank asked for with this batch; reading it waits for the batch."""
        return asked(self.record.read()) if self.record is not None else set()
