"""Run folders that earlier versions wrote go on under every strategy."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_ranks
from tests.recipes import lines, recipe, run

RUNS = Path(__file__).parent / "runs"
"""Each folder is named after the commit that wrote it: two ddp ranks, stopped after step 4 of 6, metrics of all six steps."""
LAYOUTS = [
    ("ddp", 3, {}), ("fsdp", 3, {}), ("fsdp", 4, {"replicas": 2}), ("zero1", 2, {}), ("zero2", 3, {}), ("zero3", 3, {}),
    ("pipeline", 2, {}), ("pipeline", 4, {"stages": 2}),
]  # fmt: skip


@pytest.mark.parametrize("version", sorted(folder.name for folder in RUNS.iterdir()))
@pytest.mark.parametrize(
    ("strategy", "ranks", "more"),
    [pytest.param(*layout, marks=() if layout[0] in ("fsdp", "zero2") else pytest.mark.long) for layout in LAYOUTS],
    ids=lambda value: str(value),
)
def test_an_old_run_goes_on(tmp_path: Path, version: str, strategy: str, ranks: int, more: dict[str, Any]) -> None:
    out = tmp_path / "run"
    shutil.copytree(RUNS / version, out)
    before = {line["step"]: line["loss"] for line in lines(out) if "loss" in line}
    plain = recipe(out, train={"steps": 6, "global_batch": 12, "micro_batch": 5}, parallel={"strategy": strategy, **more})
    plain["model"] = {
        "name": "vit_tiny_patch16_224", "image_size": 32,
        "options": {"patch_size": 8, "depth": 4, "embed_dim": 12, "num_heads": 3},
    }  # fmt: skip
    if strategy == "pipeline":
        plain["train"]["micro_batch"] = 3
    run_ranks(run, ranks, plain)
    after = {line["step"]: line["loss"] for line in lines(out) if "loss" in line}
    assert sorted(after) == [1, 2, 3, 4, 5, 6]
    assert after == pytest.approx(before, rel=1e-5)
    assert all(after[step] == before[step] for step in (1, 2, 3, 4)), "what was written before is kept"
