"""A device without memory: the next start goes on with half the micro-batch on all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from bigvision.config import Config
from bigvision.engine import check_sizes, micro_batch
from bigvision.errors import UserError, one_line
from bigvision.models import Blueprint
from bigvision.runtime import RankFailure, Runtime
from bigvision.training.starts import Starts

SIGNS = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "bad_alloc")
"""Found in what torch, CUDA's libraries and the C++ library say; torch's CPU allocator has no exception of its own."""


@contextmanager
def mended(config: Config, blueprint: Blueprint, runtime: Runtime, starts: Starts) -> Iterator[None]:
    """Let an error of this rank for want of memory say what will help, and the next start do it.

    A rank that has no memory in the middle of a pass leaves the others inside collectives, where nothing can be agreed: so all
    end, and what they agree on is in the file of starts.
    """
    try:
        yield
    except Exception as error:
        if not lacks_memory(error):
            raise
        starts.smaller, advice = smaller(config, blueprint, runtime)
        error.args = (f"{one_line(error)}: {advice}",)
        error.again = starts.smaller is not None  # type: ignore[attr-defined]  # for whoever can start the ranks again
        raise


def lacks_memory(error: BaseException | None) -> bool:
    """Whether *error*, or what is behind it, says that this process has no memory."""
    if isinstance(error, RankFailure):
        return False  # repeats what another rank said
    seen: set[int] = set()
    while error is not None and id(error) not in seen:  # what is raised again may come after itself
        seen.add(id(error))
        says = isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or says:
            # A smaller micro-batch leaves data workers as they are.
            return "DataLoader worker" not in str(error)
        error = error.__cause__ or error.__context__
    return False


def smaller(config: Config, blueprint: Blueprint, runtime: Runtime) -> tuple[int | None, str]:
    """Half the micro-batch, or the largest below that fits; None where that is not allowed. And what the user should know."""
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
            check_sizes(with_micro_batch(config, found), runtime)
            return found, f"start again to go on with train.micro_batch {found} instead of {size}"
        except UserError as error:
            reason = reason or str(error)
    return None, f"no train.micro_batch below {size} is allowed ({reason}): {less}"


def with_micro_batch(config: Config, size: int) -> Config:
    """*config* with micro-batches of *size* samples."""
    train, parallel = replace(config.train, micro_batch=size), replace(config.parallel, microbatches=None)
    return replace(config, train=train, parallel=parallel)
