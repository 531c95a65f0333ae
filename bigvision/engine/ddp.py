"""A whole copy of everything on every rank."""

from __future__ import annotations

import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bigvision.data.batch import Batch
from bigvision.engine.base import StepResult
from bigvision.engine.native import NativeEngine, squared_norm
from bigvision.engine.precision import autocast


class DDPEngine(NativeEngine):
    """DistributedDataParallel (Li et al. 2020); the plain module on one rank."""

    began: Any = 0.0
    local: Any = 0.0
    """When the last step began and when it came to need the others."""

    def train_step(self, batch: Batch) -> StepResult:
        self.began = self.local = _moment(self.runtime.device)
        return super().train_step(batch)

    def alone(self) -> float:
        if isinstance(self.began, float):
            return self.local - self.began
        self.local.synchronize()
        return self.began.elapsed_time(self.local) / 1000

    def _outputs(self, batch: Batch) -> Tensor:
        outputs = super()._outputs(batch)
        if self.module.training:
            # The last backward pass is the first to exchange anything.
            self.local = _moment(self.runtime.device)
        return outputs

    def _shard(self, blocks: list[nn.Module]) -> None:
        pass

    def _distribute(self) -> nn.Module:
        if self.runtime.world_size == 1:
            return self.module
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        # Gradients of expanded tokens: a copy of a few values.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        self._rehearse(self.module)
        unused = any(p.grad is None for p in self.module.parameters() if p.requires_grad)
        self.module.zero_grad(set_to_none=True)
        wrapped = DistributedDataParallel(
            self.module,
            broadcast_buffers=False,
            init_sync=False,
            find_unused_parameters=unused,
            gradient_as_bucket_view=True,
        )
        # After its first backward pass DDP rebuilds its buckets, once, in the order in which gradients came. Without
        # this one a resumed run would sum its first step in another order than the run that it continues.
        self._rehearse(wrapped)
        self.module.zero_grad(set_to_none=True)
        return wrapped

    def _rehearse(self, model: nn.Module) -> None:
        """A forward and backward pass that leaves nothing behind: running statistics do not move in eval mode."""
        self.module.eval()
        count = self.micro_batch if self.config.parallel.compile else 1
        with autocast(self.config.parallel.precision, self.runtime.device):
            outputs = model(torch.zeros(count, *self.input_shape, device=self.runtime.device))
        outputs.float().sum().backward()
        self.module.train()

    def _micro_step(self, last: bool) -> AbstractContextManager[object]:
        if isinstance(self.forward, DistributedDataParallel) and not last:
            return self.forward.no_sync()
        return nullcontext()

    def _reduce(self) -> None:
        pass

    def _run(self, tensor: Tensor, is_parameter: bool) -> tuple[Tensor, int, tuple[int, int]]:
        return tensor.view(-1), 0, (self.runtime.rank, self.runtime.world_size)

    def _squared_norm(self, gradients: list[Tensor]) -> Tensor:
        return squared_norm(gradients, self.runtime.device) / self.runtime.world_size


def _moment(device: torch.device) -> Any:
    """Now, for a device's own work: seconds, or an event in its stream."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
