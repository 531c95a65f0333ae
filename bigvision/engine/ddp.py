"""A whole copy of everything on every rank."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bigvision.engine.data_parallel import DataParallelEngine


class DDPEngine(DataParallelEngine):
    """DistributedDataParallel (Li et al. 2020); the plain module on one rank."""

    def _shard(self, blocks: list[nn.Module]) -> None:
        pass

    def _distribute(self) -> nn.Module:
        if self.runtime.world_size == 1:
            return self.module
        # Buckets are otherwise rebuilt after the first step in the order in which gradients came. A resumed run would
        # sum in another order than the one it continues, and so end in other bits. Unused parameters work, too.
        warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
        return DistributedDataParallel(
            self.module,
            broadcast_buffers=False,
            init_sync=False,
            find_unused_parameters=True,
            gradient_as_bucket_view=True,
        )

    def _micro_step(self, last: bool) -> AbstractContextManager[object]:
        if isinstance(self.forward, DistributedDataParallel) and not last:
            return self.forward.no_sync()
        return nullcontext()

    def _reduce(self) -> None:
        pass

    def _run(self, tensor: Tensor, is_parameter: bool) -> tuple[Tensor, int, tuple[int, int]]:
        return tensor.view(-1), 0, (self.runtime.rank, self.runtime.world_size)

    def _squared_norm(self, gradients: list[Tensor]) -> Tensor:
        return torch.stack(torch._foreach_norm(gradients)).double().square().sum() / self.runtime.world_size
