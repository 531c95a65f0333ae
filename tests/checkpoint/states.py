"""States whose values say which they are, saved and looked for without any training."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bigvision import checkpoint
from bigvision.checkpoint import Retention
from bigvision.checkpoint.commit import Writer, commit
from bigvision.checkpoint.writer import plan
from bigvision.fragments import Fragment
from bigvision.runtime import Runtime, start
from tests.checkpoint.test_format import make_fragments

SHAPES: dict[str, tuple[int, ...]] = {
    "norm.weight": (7,),
    "scale": (),
    "blocks.0.weight": (30, 40),
    "blocks.1.weight": (9, 4),
    "head.weight": (300, 5),
}
LARGE = {"blocks.0.weight", "head.weight"}


@dataclass(frozen=True)
class Save:
    """One call of ``save``, of a state that no other save has."""

    step: int
    version: int
    keep: int = 3


@cache
def tensors_of(version: int, scale: int = 1) -> dict[str, torch.Tensor]:
    """The values of one version, no two of them alike; the large ones *scale* times as large."""
    generator = torch.Generator().manual_seed(version)
    shapes = {name: (shape[0] * scale, *shape[1:]) if name in LARGE else shape for name, shape in SHAPES.items()}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors["count"] = torch.tensor(2**40 + version)
    return tensors


def cut(rank: int, ranks: int, how: str, tensors: dict[str, torch.Tensor]) -> list[Fragment]:
    """As :func:`make_fragments`, and a group whose file is nothing but its header: no rank writes into it."""
    return [*make_fragments(rank, ranks, how, tensors), Fragment("ema", "empty", (0, 3), 0, torch.empty(0), (rank, ranks))]


def save_version(
    out: Path, save: Save, rank: int = 0, ranks: int = 1, how: str = "rows", shard_size: int = 10**9, scale: int = 1,
    writer: Writer = "direct",
) -> None:  # fmt: skip
    """Save a version from all ranks."""
    documents: dict[str, Any] = {
        "config.json": {"architecture": "made"},
        "progress.json": {"step": save.step, "version": save.version, "scale": scale, "scalars": {}},
    }
    content = plan(cut(rank, ranks, how, tensors_of(save.version, scale)), shard_size)
    commit(out, save.step, content, documents, Retention(save.keep), writer)


@cache
def _wanted(version: int, scale: int) -> list[Fragment]:
    return cut(0, 1, "whole", tensors_of(version, scale))


def find_version(out: Path, say: Callable[[str], None], resume: str = "auto", full: bool = True) -> int | None:
    """Start on a single rank: the version that was restored, to the last bit; None for a fresh start."""
    found = checkpoint.find(resume, out, full, say)
    if found is None:
        return None
    scale = found.progress["scale"]
    got = cut(0, 1, "whole", {name: tensor * 0 - 1 for name, tensor in tensors_of(0, scale).items()})
    found = found.restore_or_older(got, say)
    version = found.progress["version"]
    different = [a.name for a, b in zip(_wanted(version, scale), got) if not torch.equal(a.values, b.values)]
    assert not different, f"{found.folder} says that it is version {version}, but {different} are not"
    return version


def kept(saves: list[Save]) -> dict[int, int]:
    """The version of each step that is there after these saves."""
    steps: dict[int, int] = {}
    for save in saves:
        steps[save.step] = save.version
        steps = {step: version for step, version in steps.items() if step in sorted(steps)[-save.keep :]}
    return steps


@contextmanager
def meet(store: Path) -> Iterator[Runtime]:
    """Join the other ranks by a file: of hundreds of starts, some would find the port that was chosen for them taken."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=dist.FileStore(str(store), ranks), rank=rank, world_size=ranks)
    try:
        with start("cpu") as runtime:
            yield runtime
    finally:
        dist.destroy_process_group()
