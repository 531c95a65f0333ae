"""What is known of one run on some hardware: profiles, and from them the memory and the time of each layout."""

from __future__ import annotations

import copy
from typing import Any

from bigvision.config import SPLIT_BACKWARD, Config, other_sizes, with_values
from bigvision.config.checks import check
from bigvision.engine import check_layout
from bigvision.errors import UserError
from bigvision.models import Blocks, Blueprint, GivenModel, blueprint, find_blocks
from bigvision.models.float8 import choose_float8
from bigvision.models.offload import TRANSFERS
from bigvision.optim import freeze
from bigvision.pipeline.schedules import USABLE
from bigvision.pipeline.stages import DoesNotFit
from bigvision.planning.hardware import Hardware
from bigvision.planning.memory import Memory, shards_teacher, worst
from bigvision.planning.profile import Profile, planned, profile
from bigvision.planning.state import Layout
from bigvision.planning.timing import StepTime, least_seconds, step_time
from bigvision.tasks import Task, build_task

CASTING = ("ddp", "pipeline")
"""Those that cast weights where they are read."""


class Estimates:
    """What is known of one run on some hardware: profiles are made when they are first needed, and kept.

    *model* and *task* are the caller's own, *outputs* those that the task needs of the model, where they are known.
    """

    def __init__(
        self, hardware: Hardware, model: GivenModel | None = None, task: Task | None = None, outputs: int | None = None
    ) -> None:
        self.hardware, self.model, self.outputs, self._given_task = hardware, model, outputs, task
        self._plans: dict[str, tuple[Blueprint, Blocks]] = {}
        self._profiles: dict[Any, Profile] = {}

    def on(self, hardware: Hardware) -> Estimates:
        """The same run on other devices of the same kind."""
        other = copy.copy(self)
        other.hardware = hardware
        return other

    def task(self, config: Config) -> Task:
        return build_task(config.task, self._given_task)

    def profile(self, config: Config) -> Profile:
        """The profile of *config*'s model. Of the strategy it takes over how weights are cast: by the model, or before it."""
        config = self._alone(config)
        parallel = config.parallel
        casts = "ddp" if parallel.strategy in CASTING else "fsdp"
        taught = self.task(config).teacher is not None
        if casts == "fsdp" and taught and not shards_teacher(parallel.strategy, self.hardware.ranks):
            casts = "zero2"  # the student's weights are cast before, the teacher's where they are read
        # As `why_eager` decides: the schedule and zero3's hooks.
        eager = parallel.compile == "auto" and (parallel.strategy == "zero3" or parallel.schedule in SPLIT_BACKWARD)
        offloads = parallel.offloads_activations
        key = (repr(config.model), repr(config.task), parallel.recompute, parallel.precision, casts, eager, offloads)
        if parallel.precision == "fp8":
            size = config.train.micro_batch
            if not isinstance(size, int):
                layout = Layout.of(config, self.hardware.ranks)
                size = config.train.global_batch // layout.data_ranks if size == "auto" else layout.micro_batch(config)
                config = with_size(config, size)
            made, blocks = self.built(config)
            key += (choose_float8(made.module, blocks, made.input_shape, size, parallel.fp8_layers).names,)
        if key not in self._profiles:
            offload = "activations" if parallel.offloads_activations else "none"
            alike = {"parallel.device": self.hardware.device.kind, "parallel.strategy": casts, "parallel.offload": offload}
            alike |= {"parallel.schedule": "1f1b"} | ({"parallel.compile": False} if eager else {})
            config = with_values(config, alike)
            self._profiles[key] = profile(config, self.outputs, self._given_task, self.built(config))
        return self._profiles[key]

    def built(self, config: Config) -> tuple[Blueprint, Blocks]:
        """The model on meta and its blocks; each profile copies them."""
        if (name := repr(config.model)) not in self._plans:
            if self.model is None:
                self._plans[name] = planned(config, self.outputs, self.task(config))
            else:
                made = blueprint(config.model, self.outputs, self.model, sizes=other_sizes(config.data))
                freeze(made.module, config.model.trainable, made.adapters)
                self._plans[name] = made, find_blocks(made.module, made.image_size)
        return self._plans[name]

    def _alone(self, config: Config) -> Config:
        """*config* as it runs: fsdp on one rank is the plain module."""
        if self.hardware.ranks == 1 and config.parallel.strategy == "fsdp":
            return with_values(config, {"parallel.strategy": "ddp"})
        return config

    def memory(self, config: Config) -> Memory:
        """Of the worst rank."""
        config = self._alone(config)
        return worst(self.profile(config), config, self.layout(config))

    def fits(self, config: Config) -> bool:
        """Whether the worst rank has the memory. A pipeline of which no cut fits does not start."""
        try:
            return self.memory(config).peak <= self.usable
        except DoesNotFit:
            return False

    def layout(self, config: Config) -> Layout:
        """The mesh of *config* on the hardware."""
        capacity = self.usable if self.hardware.device.kind == "cuda" else None
        return Layout.of(config, self.hardware.ranks, capacity)

    def time(self, config: Config) -> StepTime:
        config = self._alone(config)
        return step_time(self.profile(config), config, self.layout(config), self.hardware)

    def least(self, config: Config, strategy: str) -> float:
        """Seconds of a step that no layout of *strategy* undercuts."""
        plain = with_values(
            config,
            {"parallel.strategy": "ddp", "parallel.recompute": "none", "parallel.schedule": "1f1b", "parallel.offload": "none"},
        )
        return least_seconds(self.profile(plain), config, self.hardware, strategy in CASTING)

    @property
    def usable(self) -> float:
        """Bytes of a device that a run may take."""
        return USABLE * self.hardware.device.memory

    def check(self, config: Config) -> None:
        """Raise `UserError` for what no run on so many ranks can have."""
        check(config)
        device = self.hardware.device
        if config.parallel.precision == "fp8" and device.kind == "cuda" and "fp8" not in device.flops:
            raise UserError(
                f"parallel.precision: fp8, but no peak of fp8 is known for {device.name} (GPUs below compute capability 8.9 "
                "have none): use bf16"
            )
        layout, parallel = Layout.of(config, self.hardware.ranks), config.parallel
        check_layout(config, layout.data_ranks, layout.stages, self.task(config))
        if parallel.offloads_activations and self.hardware.device.kind not in TRANSFERS:
            raise UserError(f"parallel.offload: {parallel.offload} needs devices with memory of their own, not a CPU")
        if parallel.offloads_activations and parallel.strategy == "pipeline":
            raise UserError("parallel.offload: activations is not predicted for pipelines, which can be trained with it")
        if parallel.recompute != "none" and parallel.compile is True and has_batchnorm(self.profile(config)):
            raise UserError(
                f"parallel.recompute: {parallel.recompute} and parallel.compile: true exclude each other for BatchNorm"
            )


def has_batchnorm(found: Profile) -> bool:
    """Whether the model has running statistics: then a micro-batch is more than a matter of memory."""
    return any(tensor.buffer and tensor.name.rpartition(".")[2] == "running_var" for tensor in found.tensors)


def with_size(config: Config, size: int) -> Config:
    """*config* in micro-batches of *size* samples."""
    return with_values(config, {"train.micro_batch": size, "parallel.microbatches": None})
