"""A device that runs out of memory: the next start continues with half the micro-batch on all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from bigvision.config import Config, check_batches, micro_batch
from bigvision.errors import UserError, lacks_memory, one_line
from bigvision.models import Blueprint
from bigvision.runtime import RankFailure, Runtime
from bigvision.training.starts import Starts


@contextmanager
def retry_with_smaller_batch(config: Config, blueprint: Blueprint, runtime: Runtime, starts: Starts) -> Iterator[None]:
    """When this rank runs out of memory, add to its error what helps, and make the next start use a smaller micro-batch.

    A rank that runs out of memory in the middle of a pass leaves the others inside collectives, where nothing can be agreed.
    So all ranks end, and the next start reads the micro-batch from the restart log.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, RankFailure) or not lacks_memory(error):  # a RankFailure repeats another rank's error
            raise
        starts.smaller, advice = smaller(config, blueprint, runtime)
        error.args = (f"{one_line(error)}: {advice}",)
        error.again = starts.smaller is not None  # type: ignore[attr-defined]  # for whoever can start the ranks again
        raise


def smaller(config: Config, blueprint: Blueprint, runtime: Runtime) -> tuple[int | None, str]:
    """Half the micro-batch, or the largest below it that the run allows (None: there is none); and advice for the user."""
    size = micro_batch(config, runtime.data_ranks, runtime.pipeline_ranks)
    half = -(-size // 2)
    less = "use parallel.recompute blocks, a strategy that shards more, or more ranks"
    if config.faults.out_of_memory == "stop":
        return None, f"faults.out_of_memory: stop: use halve, or a train.micro_batch below {size}"
    if size == 1:
        return None, f"train.micro_batch: 1 cannot be halved: {less}"
    modules = list(blueprint.module.modules())
    if any(isinstance(module, BatchNorm) or "running_var" in module._buffers for module in modules):
        return None, (
            f"train.micro_batch: {size} is what batch normalisation takes its statistics over, another one trains otherwise: "
            f"choose it yourself, or {less}"
        )
    reason = ""
    for found in range(half, 0, -1):
        try:
            check_batches(with_micro_batch(config, found), runtime.data_ranks, runtime.pipeline_ranks)
            return found, f"start again to go on with train.micro_batch {found} instead of {size}"
        except UserError as error:
            reason = reason or str(error)
    return None, f"no train.micro_batch below {size} is allowed ({reason}): {less}"


def with_micro_batch(config: Config, size: int) -> Config:
    """*config* with micro-batches of *size* samples."""
    train, parallel = replace(config.train, micro_batch=size), replace(config.parallel, microbatches=None)
    return replace(config, train=train, parallel=parallel)
