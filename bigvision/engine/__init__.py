"""The unified engine: one file per strategy."""

from __future__ import annotations

from bigvision.config import Config
from bigvision.engine.base import Engine, Metrics, StepResult
from bigvision.engine.batches import check_ranks, micro_batch
from bigvision.engine.ddp import DDPEngine
from bigvision.engine.fsdp import FSDPEngine
from bigvision.engine.pipeline import PipelineEngine
from bigvision.engine.zero import ZeroEngine
from bigvision.engine.zero_import import check_cpu_adam
from bigvision.engine.zero_settings import check_batches
from bigvision.models import Blocks, Blueprint
from bigvision.runtime import Runtime
from bigvision.tasks import Task

STRATEGIES = {
    "ddp": DDPEngine,
    "fsdp": FSDPEngine,
    "zero1": ZeroEngine,
    "zero2": ZeroEngine,
    "zero3": ZeroEngine,
    "pipeline": PipelineEngine,
}


def check_engine(config: Config, runtime: Runtime) -> None:
    """Find what would fail later, before a model is built.

    Raises:
        UserError: batch sizes that do not fit the ranks or the DeepSpeed file, no compiler for what has to be compiled.
    """
    check_sizes(config, runtime)
    if config.parallel.offload != "none" and config.optim.name == "adamw":
        check_cpu_adam(runtime.device)


def check_sizes(config: Config, runtime: Runtime) -> None:
    """The part of :func:`check_engine` that is about batches."""
    check_ranks(config, runtime)
    check_batches(config, runtime.data_ranks, micro_batch(config, runtime.data_ranks, runtime.pipeline_ranks))


def build_engine(config: Config, blueprint: Blueprint, blocks: Blocks, task: Task, runtime: Runtime, steps: int) -> Engine:
    """The engine of ``parallel.strategy``; *steps* are the optimizer steps of the whole run."""
    return STRATEGIES[config.parallel.strategy](config, blueprint, blocks, task, runtime, steps)


__all__ = ["STRATEGIES", "Engine", "Metrics", "StepResult", "build_engine", "check_engine", "check_sizes", "micro_batch"]
