"""Which layouts of a run there are on some devices, and what is found of each.

A *layout* is a strategy with its mesh and with or without recomputed blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bigvision.config import SPLIT_BACKWARD, Config, ParallelConfig
from bigvision.config.checks import PIPELINE_KEYS, SHARDED_KEYS
from bigvision.planning.hardware import Hardware
from bigvision.planning.memory import Memory
from bigvision.planning.timing import StepTime

MOST_STAGES = 64
"""Ranks of the longest pipeline that is looked at, where the recipe does not say how many."""
DETAILS = (*(f"parallel.{key}" for key in (*SHARDED_KEYS, *PIPELINE_KEYS)), "parallel.offload", "parallel.deepspeed")
"""The keys that say more about one strategy, and have no meaning for others."""


@dataclass(frozen=True)
class Row:
    """A layout that fits."""

    values: dict[str, Any]
    """The keys that make it, where they differ from the recipe's."""
    config: Config
    micro_batch: int
    largest: int
    """The largest micro-batch that fits."""
    share: int
    """A rank's part of the global batch."""
    memory: Memory
    """Of the worst rank."""
    time: StepTime

    @property
    def passes(self) -> int:
        """Micro-batches of a step."""
        return -(-self.share // self.micro_batch)

    @property
    def name(self) -> str:
        """The strategy and its mesh, such as "fsdp, 4 replicas"."""
        return layout_name(self.config)


@dataclass(frozen=True)
class Refusal:
    """A layout that does not fit, or cannot be."""

    config: Config
    why: str
    needs: int | None = None
    """Bytes of the worst rank; None where it cannot be for another reason."""
    change: str | None = None
    """The smallest change that would make it fit."""

    @property
    def name(self) -> str:
        return layout_name(self.config)


def layout_name(config: Config) -> str:
    """The strategy and its mesh."""
    parallel = config.parallel
    parts: list[str] = [parallel.strategy]
    if parallel.strategy == "pipeline":
        parts.append(f"{parallel.stages or 'all'} stages")
        parts += [parallel.schedule] if parallel.schedule != ParallelConfig.schedule else []
    if parallel.replicas > 1:
        parts.append(f"{parallel.replicas} replicas" if parallel.strategy == "fsdp" else f"{parallel.replicas} copies")
    parts += [f"offload {parallel.offload}"] if parallel.offload != "none" else []
    return ", ".join(parts)


def layouts(config: Config, hardware: Hardware, strategies: Sequence[str], blocks: int) -> Iterator[dict[str, Any]]:
    """The values of `parallel` for each layout of *strategies* that *config* leaves open; the simplest first."""
    parallel, ranks = config.parallel, hardware.ranks
    for strategy in strategies:
        values: dict[str, Any] = {"parallel.strategy": strategy}
        if strategy == "fsdp" and parallel.replicas == 1:
            yield values
            # Sharded over whole hosts, one, two, four, ... of them.
            for replicas in [hardware.hosts >> n for n in range(hardware.hosts.bit_length())] if hardware.hosts > 1 else ():
                if replicas > 1 and ranks % replicas == 0 and hardware.per_host > 1:
                    yield values | {"parallel.replicas": replicas}
        elif strategy == "pipeline":
            most = min(ranks, MOST_STAGES, blocks // parallel.per_rank)
            counts = [parallel.stages or ranks] if parallel.stages else [1 << n for n in range(1, most.bit_length())]
            for stages in (count for count in counts if count <= most and ranks % count == 0):
                of_stage = ranks // stages
                copies = {1, of_stage} if parallel.replicas == 1 else {parallel.replicas}
                if parallel.schedule in SPLIT_BACKWARD:
                    copies = {of_stage}
                for replicas in sorted(copies, reverse=True):
                    yield values | {"parallel.stages": stages, "parallel.replicas": replicas}
        else:
            yield values
