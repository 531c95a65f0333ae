"""What every data-parallel strategy shares: each rank runs the whole model on its part of the global batch."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bigvision.config import Config
from bigvision.data.batch import Batch
from bigvision.engine.base import Engine, Metrics, StepResult
from bigvision.engine.batches import micro_batch
from bigvision.engine.precision import autocast
from bigvision.engine.prepare import wrap_blocks
from bigvision.engine.statistics import Statistics
from bigvision.fragments import Fragment
from bigvision.models import Block, Blueprint
from bigvision.optim import learning_rate
from bigvision.runtime import Runtime
from bigvision.seeds import seed_from
from bigvision.tasks import Task

BUCKET = 16 * 2**20
"""Numbers exchanged at a time."""


class DataParallelEngine(Engine):
    """Trains a timm model; subclasses say how parameters, gradients and optimizer state are spread over the ranks."""

    module: nn.Module
    """The whole model; on meta, but for what this rank holds."""
    parts: list[nn.Module]
    """What this rank runs of it: the module itself, or stages."""
    forward: Callable[[Tensor], Tensor]
    """What is called in a step: the module, or what a strategy wrapped around it."""

    def __init__(
        self, config: Config, blueprint: Blueprint, blocks: Sequence[Block], task: Task, runtime: Runtime, steps: int
    ) -> None:
        """Place and initialise the model.

        Args:
            blueprint: the model on meta and where its first values come from.
            steps: optimizer steps of the whole run, for the schedule.
        """
        self.config, self.task, self.runtime, self.steps = config, task, runtime, steps
        self.micro_batch = micro_batch(config, runtime.data_ranks, runtime.pipeline_ranks)
        self.eval_batch = self.micro_batch
        self.checks: list[tuple[Tensor, Tensor]] = []
        self.room: Tensor | None = None
        self.input_shape = (blueprint.in_chans, blueprint.image_size, blueprint.image_size)
        self.mean = torch.tensor(blueprint.mean, device=runtime.device)
        self.std = torch.tensor(blueprint.std, device=runtime.device)

        if config.parallel.precision == "fp32":
            # Convolutions would else round their inputs to 10 bits on CUDA, and the strategies differ in the third digit.
            torch.backends.cudnn.allow_tf32 = False
        self.module: nn.Module = blueprint.module
        self.parts: list[nn.Module] = [self.module]
        modules = [block.module for block in blocks]
        wrap_blocks(modules, config.parallel.recompute == "blocks", config.parallel.compile)
        self.module.train()
        self._build(blueprint, modules)
        self.statistics = Statistics(self.parts, runtime.device)

    # What a strategy decides.

    @abstractmethod
    def _build(self, blueprint: Blueprint, blocks: list[nn.Module]) -> None:
        """Spread the model, still on meta, over the ranks, make the optimizer and give both their first values."""

    @abstractmethod
    def _set_rate(self, lr: float) -> None:
        """Give each parameter group its rate, *lr* times its own scale."""

    @abstractmethod
    def _pass(self, part: Batch, factor: float, last: bool) -> Tensor:
        """Run one micro-batch forward and backward, with gradients times *factor*; return the sum of its losses."""

    @abstractmethod
    def _update(self, loss_sum: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Take the optimizer's step; return (the losses summed over ranks, the gradient's norm, whether it was skipped).

        It is skipped on all ranks where a loss, a gradient or a running statistic is not finite on any.
        """

    @abstractmethod
    def _scale_may_fall(self) -> bool:
        """Whether there is a loss scale, and it is not at its least."""

    @abstractmethod
    def _model_fragments(self) -> Iterator[Fragment]:
        """Yield this rank's runs of the parameters and buffers."""

    @abstractmethod
    def _optimizer_fragments(self) -> Iterator[Fragment]:
        """Yield this rank's runs of the optimizer's state."""

    # The step.

    def train_step(self, batch: Batch) -> StepResult:
        self._set_mode(training=True)
        torch.manual_seed(seed_from("dropout", self.config.seed, self.step, self.runtime.data_rank))
        self._set_rate(self._rate())
        self.statistics.keep()
        self.checks = []
        may_fall = self._scale_may_fall()

        samples = len(batch) * self.runtime.data_ranks
        # Strategies average gradients over ranks; what is wanted is the sum of all samples' over their number.
        factor = self.runtime.data_ranks / samples
        total, grad_norm, skipped = self._update(self._passes(batch.to(self.runtime.device), factor))
        if not skipped:
            self.statistics_differ = True
            return self._counted(total / samples, grad_norm, samples)
        self.statistics.restore()
        # A loss does not depend on the scale: one that is not finite is no overflow.
        overflowed = may_fall and bool(torch.isfinite(total))
        return self._counted(total / samples, grad_norm, samples, skipped, overflowed, self._culprits(batch.ids))

    def pass_over(self, batch: Batch) -> StepResult:
        nothing = torch.full((), math.nan, dtype=torch.float64)
        return self._counted(nothing, nothing, len(batch) * self.runtime.data_ranks, skipped=True)

    def _counted(
        self, loss: Tensor, grad_norm: Tensor, samples: int, skipped: bool = False, overflowed: bool = False,
        culprits: Sequence[int] = (),
    ) -> StepResult:  # fmt: skip
        result = StepResult(loss, grad_norm, self._rate(), skipped, samples, overflowed, culprits)
        self.step += 1
        self.skipped += skipped
        self.samples += samples
        return result

    def _rate(self) -> float:
        """The learning rate; a skipped step leaves its own to the next one."""
        return learning_rate(self.config.optim, self.step - self.skipped, self.steps)

    def _passes(self, batch: Batch, factor: float) -> Tensor:
        """Run all micro-batches of *batch*; return the sum of this rank's losses, float64 and 0-D."""
        parts = batch.split(self.micro_batch)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        for number, part in enumerate(parts, start=1):
            loss_sum += self._pass(part, factor, last=number == len(parts))
        return loss_sum

    def _checked_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The sum of the task's losses; which outputs are finite is noted, in case that it is not."""
        loss = self.task.loss(outputs, targets)
        self.checks.append((loss.detach(), torch.isfinite(outputs.detach()).flatten(1).all(1)))
        return loss

    def _culprits(self, ids: Tensor) -> list[int]:
        """Of the samples *ids* of the step just run, those whose loss is not finite, if it can be told, else all around them.

        Through BatchNorm one sample spoils its whole micro-batch.
        """
        found: list[int] = []
        for loss, finite in self.checks:
            part, ids = ids[: len(finite)], ids[len(finite) :]
            if not torch.isfinite(loss):
                found += part[~finite.to(part.device)].tolist() or part.tolist()
        return found

    def eval_step(self, batch: Batch) -> Metrics:
        self._set_mode(training=False)
        with torch.no_grad():
            totals = self._measure(batch.to(self.runtime.device))
        dist.all_reduce(totals)
        return Metrics(self.task.metrics, totals[:-1], totals[-1])

    def _measure(self, batch: Batch) -> Tensor:
        """The sums of the task's metrics over this rank's samples and their number, float64 (metrics + 1,)."""
        return self._measured(self._outputs(batch), batch)

    def _measured(self, outputs: Tensor, batch: Batch) -> Tensor:
        sums = self.task.measure(outputs, batch.labels, batch.valid)
        return torch.cat([sums, batch.valid.sum(dtype=torch.float64)[None]])

    def _set_mode(self, training: bool) -> None:
        for part in self.parts:
            if part.training != training:
                part.train(training)

    def _inputs(self, batch: Batch) -> Tensor:
        """The images as the model gets them, until the next batch's."""
        images = batch.inputs(self.mean, self.std, self.room)
        if self.runtime.device.type == "cpu" and batch.mix is None:
            # Used again: the system gives large memory a page at a time, which takes longer than the arithmetic.
            self.room = images
        return images

    def _outputs(self, batch: Batch) -> Tensor:
        images = self._inputs(batch)
        with autocast(self.config.parallel.precision, self.runtime.device):
            return self.forward(images)

    # The state.

    def synchronize(self) -> None:
        # Once only: the mean of equal numbers may differ from them in its last bit.
        if not self.statistics_differ:
            return
        # Each rank's batches moved its own running statistics; their mean is what one rank would keep on average.
        average(self.statistics.running, self.runtime)
        self.statistics_differ = False

    def restored(self, scalars: dict[str, Any]) -> None:
        self.step, self.samples = scalars["step"], scalars["samples"]
        self.skipped = scalars.get("skipped", 0)  # older checkpoints have none
        self.statistics_differ = False

    def fragments(self) -> Iterator[Fragment]:
        yield from self._model_fragments()
        yield from self._optimizer_fragments()


def average(tensors: list[Tensor], runtime: Runtime) -> None:
    """Replace each tensor by its mean over the data-parallel ranks, exchanging many at a time."""
    if runtime.data_ranks == 1:
        return
    bucket: list[Tensor] = []
    for number, tensor in enumerate(tensors, start=1):
        bucket.append(tensor)
        if number < len(tensors) and sum(one.numel() for one in bucket) < BUCKET:
            continue
        flat = torch.cat([one.detach().reshape(-1).float() for one in bucket])
        dist.all_reduce(flat, group=runtime.data_group)
        flat /= runtime.data_ranks
        with torch.no_grad():
            for one, values in zip(bucket, flat.split([one.numel() for one in bucket])):
                one.copy_(values.view_as(one))
        bucket = []
