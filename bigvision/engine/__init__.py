"""The engine: a model under a strategy, its steps and its state.

In come a model on meta (`Blueprint`), its blocks and batches; out come step results, sums of metrics and fragments.

Read ``engine.py`` first (the step from above), then ``step.py`` (the update and what it returns) and ``parallelize.py`` (how a
model is spread over the ranks). ``pipeline.py`` and ``zero.py`` hold what those strategies do otherwise, ``state.py`` storage,
first values, running statistics and fragments.
"""

from __future__ import annotations

from bigvision.config import Config, check_batches
from bigvision.engine.engine import Engine
from bigvision.engine.parallelize import check_compile, check_norms
from bigvision.engine.pipeline import PipelineEngine
from bigvision.engine.step import Metrics, StepResult
from bigvision.engine.zero import ZeroEngine, check_cpu_adam
from bigvision.models import Blocks, Blueprint
from bigvision.runtime import Runtime
from bigvision.tasks import Task

STRATEGIES = {
    "ddp": Engine,
    "fsdp": Engine,
    "zero1": ZeroEngine,
    "zero2": ZeroEngine,
    "zero3": ZeroEngine,
    "pipeline": PipelineEngine,
}


def check_engine(config: Config, runtime: Runtime) -> None:
    """Find what would fail later, before a model is built.

    Raises:
        UserError: batch sizes that do not fit the ranks or the DeepSpeed file, no compiler for what has to be compiled,
            SyncBatchNorm without CUDA.
    """
    check_batches(config, runtime.data_ranks, runtime.pipeline_ranks)
    check_compile(config, runtime.device)
    check_norms(config, runtime.device)
    if config.parallel.offload != "none" and config.optim.name == "adamw":
        check_cpu_adam(runtime.device)


def build_engine(
    config: Config, blueprint: Blueprint, blocks: Blocks, task: Task, runtime: Runtime, steps: int, restored: bool,
    trains: bool = True,
) -> Engine:  # fmt: skip
    """The engine of ``parallel.strategy``.

    Args:
        steps: optimizer steps of the whole run.
        restored: a checkpoint will be read into its fragments, so that first values are not computed.
        trains: whether it will take steps; where it only evaluates nothing is run in training mode.
    """
    return STRATEGIES[config.parallel.strategy](config, blueprint, blocks, task, runtime, steps, restored, trains)


__all__ = ["STRATEGIES", "Engine", "Metrics", "StepResult", "build_engine", "check_engine"]
