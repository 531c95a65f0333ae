"""A run that is to be handed over."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RESTARTS = 100
"""How often a run is started again where nothing else is said. It ends itself where that leads nowhere (`faults`): this is for
what keeps it from beginning at all."""


@dataclass(frozen=True)
class Job:
    """A recipe and where it is to run. Every text in it has been checked by `bigvision.launching.submit`."""

    name: str
    recipe: Path
    """Absolute."""
    flags: tuple[str, ...]
    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    """0 where the ranks compute on the CPU."""
    restarts: int = RESTARTS
    """How often it may be started again."""
    seconds: int | None = None
    """The longest that it may take."""
    cpus_per_rank: int = 1
    """For the rank itself and its data workers."""
    directives: tuple[tuple[str, str], ...] = ()
    """More options of sbatch, by their long names; "" for one without a value."""
    image: str | None = None
    claim: tuple[str, str] | None = None
    """A volume claim and the folder where the container sees it."""
