"""The native step, of ddp, fsdp and pipelines, and what a step and an evaluation return."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from bigvision.config import WHOLE, Config
from bigvision.engine.parallelize import Spread
from bigvision.engine.state import Statistics, allocate, average, fill, local_tensor, model_fragments, optimizer_fragments
from bigvision.fragments import Fragment
from bigvision.models import Blueprint
from bigvision.models.formats import COMPUTE_DTYPES
from bigvision.optim import allocate_state, build_optimizer, parameter_groups, state_layout, step_counters
from bigvision.ranges import OPTIMIZER, REDUCE, mark
from bigvision.runtime import Runtime, gather_rows
from bigvision.samples import seed_from
from bigvision.tasks import Task

REQUESTS = ("stop", "save", "failure", "end")
"""What a rank can ask all others for: to save and stop at a signal, to save, to raise what has failed, to end as after the last
step. Requests travel in the tensor that a step or an evaluation reduces anyway."""


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
        """Copy the 1-D *numbers* to pinned memory, behind what was launched before."""
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
    """What one optimizer step did. `loss` and `grad_norm` are 0-D tensors on the device; to read other numbers waits for it."""

    loss: Tensor  # mean over the global batch
    grad_norm: Tensor  # of the whole model's gradient, before clipping
    lr: float
    samples: int  # of the global batch
    step: int  # batches taken, with this one
    consumed: int  # samples consumed, with this step's
    record: Record  # [loss, gradient norm, skipped, overflowed, *requests]
    offenders: Callable[[], list[int]] = list
    seconds: Callable[[], float] = float  # how long this rank worked by itself; 0 where it communicates from the first layer on
    passed_over: bool = False  # whether the batch was only counted

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
    def offending(self) -> Sequence[int]:
        """Of a skipped step: ids of this rank's samples whose loss is not finite. If the sample cannot be singled out
        (BatchNorm mixes a micro-batch), all ids of its micro-batch."""
        return self.offenders() if self.skipped and not self.overflowed else ()

    @property
    def culprits(self) -> Sequence[int]:
        """The earlier name of `offending`."""
        warnings.warn("StepResult.culprits is called StepResult.offending now", FutureWarning, stacklevel=2)
        return self.offending


def asked(counts: Sequence[float]) -> set[str]:
    """The requests of which *counts* ranks have made each."""
    return {name for name, count in zip(REQUESTS, counts) if count}


@dataclass(frozen=True)
class Metrics:
    """What an evaluation has measured so far: sums over samples, reduced over ranks, and rows, which each rank keeps."""

    task: Task
    sums: Tensor  # float64, (task.sums,)
    count: Tensor  # float64, 0-D: samples in the sums
    record: Record | None = None  # of one batch: what ranks asked for with it
    rows: tuple[Tensor, ...] = ()  # of each batch of this rank: float64 (samples, 1 + columns), the sample's id first

    def __add__(self, other: Metrics) -> Metrics:
        return Metrics(self.task, self.sums + other.sums, self.count + other.count, rows=self.rows + other.rows)

    def means(self) -> dict[str, float]:
        """The task's metrics; NaN where there is no sample. Where they are made of rows (see `Task.means_need_rows`), every
        rank calls this together."""
        return self.task.compute(self.sums.cpu(), self.count.item(), self._all_rows if self.task.means_need_rows else None)

    def report(self, classes: Sequence[str]) -> dict[str, Any]:
        """What the task says beyond :meth:`means`. Where it keeps rows, every rank calls this together."""
        return self.task.report(self.sums.cpu(), self.count.item(), self._all_rows, classes)

    @cached_property
    def _all_rows(self) -> Tensor | None:
        if not self.task.keeps_rows:
            return None
        # Of a sample that is not valid the id is not a number.
        mine = torch.cat(self.rows).cpu() if self.rows else torch.empty(0, 0, dtype=torch.float64)
        rows = gather_rows(mine[~mine[:, :1].isnan().any(1)])
        return rows[rows[:, 0].argsort(), 1:]

    @property
    def requests(self) -> set[str]:
        """What any rank asked for with this batch; reading it waits for the batch."""
        return asked(self.record.read()) if self.record is not None else set()


def seed_dropout(device: torch.device, *parts: int) -> None:
    """Seed what a pass draws on *device* with a hash of *parts*."""
    # Without a GPU torch.manual_seed queues a seed for each other kind of device, with a stack trace: milliseconds of a step.
    seed = torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed
    seed(seed_from("dropout", *parts))


class NativeStep:
    """Steps the tensors that a `Spread` gives to this rank with an optimizer of torch's or timm's."""

    def __init__(
        self, spread: Spread, blueprint: Blueprint, config: Config, runtime: Runtime, restored: bool, trains: bool = True
    ) -> None:
        """Give the model, still on meta, storage and first values (but not where it will be *restored*); make the optimizer,
        which has state only where the engine *trains*."""
        self.spread, self.config, self.runtime = spread, config, runtime
        self.reduce = COMPUTE_DTYPES[config.parallel.reduce]
        self.scale = LossScale(config.parallel.precision, runtime.device)
        for part in spread.parts:
            allocate(part, runtime.device)
            if isinstance(part, FSDPModule):
                # FSDP pads its shards now, once they have storage: it would replace them in the first forward pass.
                part._get_fsdp_state()._lazy_init()
        self.held = held = spread.held()
        # Sharded tensors cost a fused step five times the host time of plain ones; an optimizer that needs whole tensors gets
        # them all the same.
        whole = config.optim.name in WHOLE
        stepped = {name: p if whole or local_tensor(p) is p else local_tensor(p).detach() for name, p in held.items()}
        self.local = [(tensor, held[name]) for name, tensor in stepped.items() if tensor is not held[name]]
        optim = config.optim
        groups = parameter_groups(spread.module, optim.weight_decay, optim.layer_decay, stepped, optim.groups)
        self.optimizer: Optimizer = build_optimizer(groups, optim)
        self.fused = getattr(self.optimizer, "_step_supports_amp_scaling", False)  # decides on the device whether to step
        if trains:
            allocate_state(self.optimizer)
        self.shapes = {name: tuple(p.shape) for name, p in spread.module.named_parameters() if p.requires_grad}
        self.layout = functools.cache(functools.partial(state_layout, optim))
        fill(blueprint, config.seed, self.model_fragments(), spread.parts, runtime.device, restored)
        self.statistics = Statistics(spread.parts, runtime.device)

    # The step.

    def around(self, last: bool) -> AbstractContextManager[object]:
        """Surrounds the passes of one micro-batch."""
        return self.spread.around(last)

    def backward(self, loss: Tensor, factor: Tensor | float) -> None:
        """Add the gradient of *loss* times *factor*."""
        (loss * (self.scale.factor * factor)).backward()

    @torch.no_grad()
    def update(self, loss_sum: Tensor, weight: Tensor | int, lr: float, requests: frozenset[str]) -> Tensor:
        """Take the optimizer's step, unless a loss, a gradient or a running statistic is not finite on some rank.

        *loss_sum*, float64 and 0-D, is of this rank's samples; *weight* is that of the global batch's; *requests* is what this
        rank asks the others for. Returns the numbers of a `Record`, on the device.
        """
        with mark(REDUCE):
            unreduced = (self.held[name].grad for name in self.spread.unreduced)
            average([gradient for gradient in unreduced if gradient is not None], self.runtime, self.reduce)
            for tensor, parameter in self.local:
                tensor.grad = None if parameter.grad is None else local_tensor(parameter.grad)
            # The third is not a number where a running statistic is not finite.
            numbers = torch.stack([loss_sum, self._squared_norm(), self.statistics.largest() * 0.0])
            totals = reduce_with(requests, numbers)
        skipped = ~torch.isfinite(totals[:3]).all()
        norm = totals[1].sqrt() / self.scale.scale
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        with mark(OPTIMIZER):
            self._step(skipped, norm)
        self.optimizer.zero_grad(set_to_none=True)
        for _, parameter in self.local:
            parameter.grad = None
        self.statistics.restore(skipped)
        overflowed = self.scale.update(skipped, torch.isfinite(totals[0] + totals[2]))
        numbers = torch.stack([totals[0] / weight, norm, skipped.double(), overflowed.double()])
        return torch.cat([numbers, totals[3:]])

    def _step(self, skipped: Tensor, norm: Tensor) -> None:
        """Step with gradients scaled to the largest allowed norm (Pascanu et al. 2013) and freed of the loss scale."""
        factor = None
        if self.config.optim.clip is not None:
            factor = (self.config.optim.clip / (norm + 1e-6)).clamp(max=1.0) / self.scale.scale
        elif self.scale.dynamic:
            factor = self.scale.scale.reciprocal()
        optimizer: Any = self.optimizer
        if self.fused:
            optimizer.found_inf = skipped.float()
            optimizer.grad_scale = None if factor is None else factor.reciprocal().float()
            optimizer.step()
            return
        if factor is not None:
            stepped = (parameter for group in self.optimizer.param_groups for parameter in group["params"])
            torch._foreach_mul_([local_tensor(p.grad) for p in stepped if p.grad is not None], factor.float())
        if self.config.optim.name == "muon":
            optimizer.skipped = skipped
            optimizer.step()
        elif not bool(skipped):  # waits for the device
            optimizer.step()

    def _squared_norm(self) -> Tensor:
        """A part of the gradient's squared norm, float64 and 0-D; summed over all ranks it is the whole."""
        alike: dict[int, list[Tensor]] = {}
        for parameter in self.held.values():
            if parameter.grad is not None:
                alike.setdefault(self.spread.equal_gradients(parameter.grad), []).append(local_tensor(parameter.grad))
        total = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        for ranks, gradients in alike.items():
            flat = [gradient.reshape(-1) for gradient in gradients]
            if total.device.type == "cpu":
                # There the norm adds up one by one in fp32, which over ten million elements costs four digits.
                flat = [part for whole in flat for part in (whole.split(1 << 16) if len(whole) > 1 << 16 else (whole,))]
            total = total + torch.stack(torch._foreach_norm(flat)).double().square().sum() / ranks
        return total

    # The state.

    def model_fragments(self) -> Iterator[Fragment]:
        return model_fragments(self.spread.tensors(), self.spread.locate)

    def optimizer_fragments(self) -> Iterator[Fragment]:
        place = {name: self.spread.locate(parameter)[1:] for name, parameter in self.held.items()}
        return optimizer_fragments(self.optimizer, self.shapes, place, self.layout)

    def copies(self) -> Iterator[Fragment]:
        """What ranks hold alike beside the fragments."""
        return iter(())

    def scalars(self) -> dict[str, Any]:
        # Parameters that never had a gradient are still at 0.
        steps = max((int(counter) for counter in step_counters(self.optimizer)), default=None)
        return {"optimizer_steps": steps} | self.scale.state()

    def restored(self, scalars: dict[str, Any]) -> None:
        self.scale.restore(scalars)
        for counter in step_counters(self.optimizer):
            counter.fill_(scalars["optimizer_steps"] or 0)

    def refresh(self) -> None:
        """Free weights that FSDP keeps gathered from an evaluation on: they would be read once more. Nothing else derives from
        the fragments, since weights are cast where they are read."""
        for module in (module for part in self.spread.parts for module in part.modules()):
            if isinstance(module, FSDPModule):
                module.reshard()

    def close(self) -> None:
        """Nothing outlives the step."""


class LossScale:
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2018), on the device; 1 and constant for the other formats."""

    growth_interval = 2000

    def __init__(self, precision: str, device: torch.device) -> None:
        self.dynamic = precision == "fp16"
        self.scale = torch.tensor(2.0**16 if self.dynamic else 1.0, device=device)
        self.steps = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def factor(self) -> Tensor | float:
        """What losses are multiplied with."""
        return self.scale if self.dynamic else 1.0

    def update(self, skipped: Tensor, finite_loss: Tensor) -> Tensor:
        """Halve the scale after an overflow; double it after :attr:`growth_interval` steps without one.

        A loss that is not finite is no overflow, since it does not depend on the scale: it leaves the scale as it is. Returns
        whether the step overflowed while the scale could still fall. All are bool and 0-D, on the device.
        """
        if not self.dynamic:
            return torch.zeros_like(skipped)
        overflow = skipped & finite_loss & (self.scale > 1.0)
        steps = torch.where(overflow, 0, self.steps + ~skipped)
        grown = steps == self.growth_interval
        self.scale.copy_(torch.where(overflow, (self.scale / 2).clamp(min=1.0), torch.where(grown, self.scale * 2, self.scale)))
        self.steps.copy_(torch.where(grown, 0, steps))
        return overflow

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; waits for the device."""
        return {"loss_scale": self.scale.item() if self.dynamic else None, "good_steps": int(self.steps)}

    def restore(self, scalars: dict[str, Any]) -> None:
        if self.dynamic and scalars["loss_scale"] is not None:
            self.scale.fill_(scalars["loss_scale"])
            self.steps.fill_(scalars["good_steps"])
