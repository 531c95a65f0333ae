"""The engine: a model under a strategy, its steps and its state.

In come a model on meta (`Blueprint`), its blocks and batches; out come step results, sums of metrics and fragments.

Read ``engine.py`` first (the step from above), then ``step.py`` (the update and what it returns) and ``parallelize.py`` (how a
model is spread over the ranks). ``pipeline.py`` and ``zero.py`` hold what those strategies do otherwise, ``graphs.py`` passes
that run as CUDA graphs, ``state.py`` storage, first values, running statistics and fragments, ``ema.py`` the average of the
weights, ``teacher.py`` a frozen model to learn from.
"""

from __future__ import annotations

from bigvision.config import Config, check_batches, micro_batch
from bigvision.engine import parallelize
from bigvision.engine.engine import Engine
from bigvision.engine.graphs import RECORDERS
from bigvision.engine.pipeline import PipelineEngine
from bigvision.engine.step import Metrics, StepResult
from bigvision.engine.teacher import Teacher
from bigvision.engine.zero import ZeroEngine, check_cpu_adam
from bigvision.errors import UserError
from bigvision.models import Blocks, Blueprint
from bigvision.models.float8 import check_float8
from bigvision.models.offload import TRANSFERS
from bigvision.runtime import Runtime
from bigvision.tasks import Task

ZERO = dict.fromkeys(("zero1", "zero2", "zero3"), ZeroEngine)
STRATEGIES = {"ddp": Engine, "fsdp": Engine, **ZERO, "pipeline": PipelineEngine}


def check_engine(config: Config, runtime: Runtime, task: Task) -> None:
    """Raise `UserError`, before a model is built, for what would fail later: batch sizes, a compiler that is missing."""
    if not task.learns:
        raise UserError(
            f"task.name: {config.task.name} trains nothing: use bigvision eval STEP_FOLDER|MODEL --task.name {config.task.name}"
        )
    check_layout(config, runtime.data_ranks, runtime.pipeline_ranks, task)
    if config.parallel.compile is True and (missing := parallelize.lacks_for_compile(runtime.device)):
        raise UserError(f"parallel.compile: true needs {missing}: install it, or use auto or false")
    if config.model.sync_batchnorm and runtime.device.type not in parallelize.SYNCHRONIZED:
        raise UserError(f"model.sync_batchnorm: true needs CUDA, but this run is on {runtime.device.type}: use false")
    if config.parallel.precision == "fp8":
        check_float8(runtime.device)
    if config.parallel.offloads_activations and runtime.device.type not in TRANSFERS:
        raise UserError(
            f"parallel.offload: {config.parallel.offload} moves activations from a device to its host, but the device is the "
            f"{runtime.device.type.upper()}: use none on it"
        )
    if config.parallel.cuda_graphs and runtime.device.type not in RECORDERS:
        raise UserError(
            f"parallel.cuda_graphs: true needs CUDA, but the device is the {runtime.device.type.upper()}: use false on it"
        )
    if config.parallel.offloads_state and config.optim.name == "adamw":
        check_cpu_adam(runtime.device)


def check_layout(config: Config, data_ranks: int, stages: int, task: Task) -> None:
    """Raise `UserError` for batch sizes, tasks and graphs that *data_ranks* with *stages* (see `micro_batch`) cannot have."""
    check_batches(config, data_ranks, stages)
    if config.parallel.cuda_graphs and data_ranks > 1:
        # DistributedDataParallel's exchange would be captured too.
        raise UserError(f"parallel.cuda_graphs: true is for one rank, but there are {data_ranks}: use false")
    if config.parallel.strategy == "pipeline" and (not task.cuttable or task.span == "global batch"):
        why = "whose model cannot be cut into stages" if not task.cuttable else "whose loss spans the global batch"
        raise UserError(f"parallel.strategy: pipeline cannot run task.name: {config.task.name}, {why}: use fsdp")
    if config.parallel.strategy == "pipeline" and task.teacher is not None:
        raise UserError("parallel.strategy: pipeline cannot run task.teacher, which is not cut into stages: use fsdp")
    if task.teacher is not None and task.span == "global batch":
        raise UserError(f"task.teacher: {task.teacher}, but the loss of task.name: {config.task.name} spans the global batch")
    share = config.train.global_batch // data_ranks
    if task.span == "global batch" and (size := micro_batch(config, data_ranks, 1)) < share:
        raise UserError(
            f"train.micro_batch: {size}, but the loss of task.name: {config.task.name} spans the global batch, and a rank has "
            f"{share} samples of it: use null"
        )


def build_engine(
    config: Config, blueprint: Blueprint, blocks: Blocks, task: Task, runtime: Runtime, steps: int, restored: bool,
    trains: bool = True,
) -> Engine:  # fmt: skip
    """The engine of ``parallel.strategy``; the arguments are those of `Engine`."""
    return STRATEGIES[config.parallel.strategy](config, blueprint, blocks, task, runtime, steps, restored, trains)


__all__ = ["STRATEGIES", "Engine", "Metrics", "StepResult", "Teacher", "build_engine", "check_engine", "check_layout"]
