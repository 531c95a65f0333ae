"""What every data-parallel strategy shares: each rank runs the whole model on its part of the global batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bigvision.config import Config
from bigvision.data.batch import Batch, normalize
from bigvision.engine.base import Engine, Metrics, StepResult
from bigvision.engine.precision import autocast
from bigvision.engine.prepare import wrap_blocks
from bigvision.errors import UserError
from bigvision.fragments import Fragment
from bigvision.models import Block, Blueprint
from bigvision.optim import learning_rate
from bigvision.runtime import Runtime
from bigvision.seeds import seed_from
from bigvision.tasks import Task


class DataParallelEngine(Engine):
    """Trains a timm model; subclasses say how parameters, gradients and optimizer state are spread over the ranks."""

    forward: Callable[[Tensor], Tensor]
    """What is called in a step: the module, or what a strategy wrapped around it."""

    def __init__(
        self, config: Config, blueprint: Blueprint, blocks: list[Block], task: Task, runtime: Runtime, steps: int
    ) -> None:
        """Place and initialise the model.

        Args:
            blueprint: the model on meta and where its first values come from.
            steps: optimizer steps of the whole run, for the schedule.
        """
        self.config, self.task, self.runtime, self.steps = config, task, runtime, steps
        self.micro_batch = micro_batch(config, runtime.world_size)
        self.statistics_differ = False
        self.input_shape = (blueprint.in_chans, blueprint.image_size, blueprint.image_size)
        self.mean = torch.tensor(blueprint.mean, device=runtime.device)
        self.std = torch.tensor(blueprint.std, device=runtime.device)

        if config.parallel.precision == "fp32":
            # Convolutions would else round their inputs to 10 bits on CUDA, and the strategies differ in the third digit.
            torch.backends.cudnn.allow_tf32 = False
        self.module: nn.Module = blueprint.module
        modules = [block.module for block in blocks]
        wrap_blocks(modules, config.parallel.recompute == "blocks", config.parallel.compile)
        self.module.train()
        self._build(blueprint, modules)

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
        """Take the optimizer's step; return (the losses summed over ranks, the gradient's norm, whether it was skipped)."""

    @abstractmethod
    def _model_fragments(self) -> Iterator[Fragment]:
        """Yield this rank's runs of the parameters and buffers."""

    @abstractmethod
    def _optimizer_fragments(self) -> Iterator[Fragment]:
        """Yield this rank's runs of the optimizer's state."""

    # The step.

    def train_step(self, batch: Batch) -> StepResult:
        if not self.module.training:
            self.module.train()
        torch.manual_seed(seed_from("dropout", self.config.seed, self.step, self.runtime.rank))
        lr = learning_rate(self.config.optim, self.step, self.steps)
        self._set_rate(lr)

        samples = len(batch) * self.runtime.world_size
        # Strategies average gradients over ranks; what is wanted is the sum of all samples' over their number.
        factor = self.runtime.world_size / samples
        parts = batch.to(self.runtime.device).split(self.micro_batch)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        for number, part in enumerate(parts, start=1):
            loss_sum += self._pass(part, factor, last=number == len(parts))
        total, grad_norm, skipped = self._update(loss_sum)
        self.statistics_differ = True
        self.step += 1
        self.samples += samples
        return StepResult(total / samples, grad_norm, lr, skipped, samples)

    def eval_step(self, batch: Batch) -> Metrics:
        if self.module.training:
            self.module.eval()
        batch = batch.to(self.runtime.device)
        with torch.no_grad():
            sums = self.task.measure(self._outputs(batch), batch.labels, batch.valid)
        totals = torch.cat([sums, batch.valid.sum(dtype=torch.float64)[None]])
        dist.all_reduce(totals)
        return Metrics(self.task.metrics, totals[:-1], totals[-1])

    def _outputs(self, batch: Batch) -> Tensor:
        images = normalize(batch.images, self.mean, self.std)
        with autocast(self.config.parallel.precision, self.runtime.device):
            return self.forward(images)

    # The state.

    def synchronize(self) -> None:
        # Once only: the mean of equal numbers may differ from them in its last bit.
        if not self.statistics_differ:
            return
        # Each rank's batches moved its own running statistics; their mean is what one rank would keep on average.
        running = [m._buffers.get(name) for m in self.module.modules() for name in ("running_mean", "running_var")]
        average([buffer for buffer in running if buffer is not None], self.runtime.world_size)
        self.statistics_differ = False

    def fragments(self) -> Iterator[Fragment]:
        yield from self._model_fragments()
        yield from self._optimizer_fragments()


def micro_batch(config: Config, ranks: int) -> int:
    """Samples in one pass on one rank.

    Raises:
        UserError: the ranks do not divide the global batch.
    """
    total = config.train.global_batch
    if total % ranks:
        below, above = total - total % ranks, total - total % ranks + ranks
        fits = f"{below} or {above}" if below else f"{above}"
        raise UserError(f"train.global_batch: {total} cannot be divided among {ranks} data-parallel ranks: use {fits}")
    return min(config.train.micro_batch or total // ranks, total // ranks)


def average(tensors: list[Tensor], ranks: int) -> None:
    """Replace each tensor by its mean over all ranks, in one exchange."""
    if not tensors or ranks == 1:
        return
    flat = torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= ranks
    with torch.no_grad():
        for tensor, values in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(values.view_as(tensor))
