"""Bad numbers, planted into a run on one rank."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bigvision.engine import Engine
from bigvision.tasks import Classify
from bigvision.training.numbers import BadNumbers
from tests.recipes import run

HERE: dict[str, Any] = {"id": None, "kind": None}
"""What this rank does in the step that runs: the sample's id, and what becomes of it."""


@contextmanager
def planted(kind: str, steps: list[int], rank: int | None = 0, index: int = 2) -> Iterator[list[int]]:
    """Spoil a sample of one data-parallel rank, or of all (*rank* None), in the batches *steps* (from 0); yields the ids.

    Args:
        kind: "image": its pixels are NaN. "large": they are 1e25. "loss": the loss is infinite, the gradients are not.
            "gradient": the other way round. "spike": the loss is ten times as large.
        index: of the sample in its rank's batch.
    """
    train_step, inputs, loss = Engine.train_step, Engine._inputs, Classify.loss
    ids: list[int] = []

    def step(self: Any, batch: Any) -> Any:
        if self.step in steps and (rank is None or self.runtime.data_rank == rank):
            HERE.update(id=int(batch.ids[index]), kind=kind)
            ids.append(HERE["id"])
        try:
            return train_step(self, batch)
        finally:
            HERE.update(id=None, kind=None)

    def spoiled(self: Any, batch: Any) -> Any:
        images = inputs(self, batch)
        if HERE["kind"] in ("image", "large"):
            images[batch.ids == HERE["id"]] = math.nan if HERE["kind"] == "image" else 1e25
        return images

    def spoiled_loss(self: Any, outputs: Any, labels: Any) -> Any:
        found = loss(self, outputs, labels)
        if HERE["kind"] == "loss":
            return found + math.inf
        if HERE["kind"] == "gradient":
            return found + (outputs * 0).sum().sqrt()
        return found * 10 if HERE["kind"] == "spike" else found

    with (
        patch.object(Engine, "train_step", step),
        patch.object(Engine, "_inputs", spoiled),
        patch.object(Classify, "loss", spoiled_loss),
    ):
        yield ids


def run_planted(plain: dict[str, Any], kind: str, steps: list[int], rank: int | None = 0) -> tuple[list[int], str]:
    """Train; return the ids of this rank's spoiled samples, and the error that ended the run."""
    with planted(kind, steps, rank) as ids:
        try:
            run(plain)
        except BadNumbers as error:
            return ids, str(error)
    return ids, ""


def run_without(plain: dict[str, Any], steps: list[int]) -> None:
    """Train as a run that never sees the batches *steps*."""
    train_step = Engine.train_step

    def passing(self: Any, batch: Any) -> Any:
        if self.step not in steps:
            return train_step(self, batch)
        return self.pass_over(batch)

    with patch.object(Engine, "train_step", passing):
        run(plain)


def scalars(folder: Path) -> dict[str, Any]:
    """Those of a checkpoint."""
    return json.loads((folder / "progress.json").read_text())["scalars"]
