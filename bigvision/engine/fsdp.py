"""Every parameter, gradient and moment sharded over the ranks of a replica."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from bigvision.engine.data_parallel import average
from bigvision.engine.native import NativeEngine, squared_norm
from bigvision.engine.precision import COMPUTE_DTYPES


class FSDPEngine(NativeEngine):
    """FSDP2: ``fully_shard`` on each block and on the root (Zhao et al. 2023), over a (replicate, shard) mesh.

    Scalars, which cannot be sharded, and BatchNorm's weights, which must stay fp32 beside fp32 running statistics, are
    kept whole on every rank; they are few and small.
    """

    def _shard(self, blocks: list[nn.Module]) -> None:
        norms = [m for part in self.parts for m in part.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        whole = {parameter for norm in norms for parameter in norm.parameters(recurse=False)}
        whole |= {parameter for parameter in self._held().values() if parameter.ndim == 0}
        self.whole_names = {name for name, parameter in self._held().items() if parameter in whole}
        mesh = self.runtime.mesh["replicate", "shard"] if self.config.parallel.replicas > 1 else self.runtime.mesh["shard"]
        compute = COMPUTE_DTYPES[self.config.parallel.precision]
        policy = MixedPrecisionPolicy(
            param_dtype=None if compute == torch.float32 else compute, reduce_dtype=torch.float32
        )  # fmt: skip
        for part in self.parts:
            inside = set(part.modules())
            for block in (block for block in blocks if block in inside):
                block.register_forward_hook(_own_storage)
                fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=whole)
            fully_shard(part, mesh=mesh, mp_policy=policy, ignored_params=whole)

    def _distribute(self) -> nn.Module:
        self.whole = [p for name, p in self._held().items() if name in self.whole_names]
        return self.module

    def _micro_step(self, last: bool) -> AbstractContextManager[object]:
        # Gradients are scattered after every micro-batch, so that none is ever kept whole; only the exchange between
        # replicas waits for the last.
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_all_reduce(last)
        return nullcontext()

    def _reduce(self) -> None:
        average([p.grad for p in self.whole if p.grad is not None], self.runtime)

    def _run(self, tensor: Tensor, is_parameter: bool) -> tuple[Tensor, int, tuple[int, int]]:
        if not isinstance(tensor, DTensor):
            return tensor.view(-1), 0, (self.runtime.data_rank, self.runtime.data_ranks)
        with torch.no_grad():
            values = tensor.to_local()
        # fully_shard cuts dimension 0 as torch.chunk does: all but the last shards that are not empty are equal.
        rows, (shard, shards) = tensor.shape[0], self.runtime.shard
        chunk = -(-rows // shards)
        start_row = min(rows, chunk * shard)
        assert values.shape[0] == min(chunk, rows - start_row), (tuple(tensor.shape), tuple(values.shape))
        start = start_row * (tensor.numel() // rows if rows else 0)
        return values.view(-1), start, self.runtime.replica

    def _squared_norm(self, gradients: list[Tensor]) -> Tensor:
        whole = [g for g in gradients if not isinstance(g, DTensor)]
        shards = [g.to_local() for g in gradients if isinstance(g, DTensor)]
        device = self.runtime.device
        return (
            squared_norm(shards, device) / self.config.parallel.replicas + squared_norm(whole, device) / self.runtime.data_ranks
        )


def _own_storage(block: nn.Module, inputs: object, output: object) -> object:
    """Copy an output that is a view: an in-place operation on it would drop the hook that gathers the block's parameters."""
    if isinstance(output, Tensor) and output._is_view():
        return output.clone()
    if isinstance(output, (tuple, list)):
        return type(output)(_own_storage(block, inputs, part) for part in output)
    return output
