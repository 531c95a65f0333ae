"""Which checkpoints stay."""

from __future__ import annotations

import math
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from bigvision.checkpoint import manifest
from bigvision.checkpoint.disk import sync_folder
from bigvision.checkpoint.manifest import Damaged, read_document
from bigvision.checkpoint.steps import folder_name, steps_in


@dataclass(frozen=True)
class Retention:
    """What is kept: every checkpoint for which one of these speaks."""

    last: int
    """The newest so many."""
    best: str | None = None
    """The one with the best value of this metric; of a loss the lowest, else the highest. The first of several equal ones."""
    every: int | None = None
    """Those of steps that this divides."""

    def keeps(self, metrics: dict[int, dict[str, float]]) -> set[int]:
        """The steps that stay, of all valid ones with the metrics that were last known when they were saved."""
        kept = set(sorted(metrics, reverse=True)[: self.last])
        if self.every is not None:
            kept |= {step for step in metrics if step % self.every == 0}
        if self.best is not None:
            known = {
                step: sign(self.best) * found[self.best] for step, found in metrics.items() if _number(found.get(self.best))
            }
            if known:
                kept.add(max(sorted(known), key=known.__getitem__))
        return kept


def prune(out: Path, retention: Retention, newest: int) -> None:
    """Remove the valid checkpoints up to step *newest*, which was just written, that *retention* does not keep.

    Damaged ones are neither counted nor removed, and so are later ones: a run that fell back past them will replace them.
    """
    metrics: dict[int, dict[str, float]] = {}
    for step in steps_in(out):
        if step > newest:
            continue
        folder = out / folder_name(step)
        try:
            progress = read_document(folder, manifest.read(folder), "progress.json")
        except Damaged:
            continue
        known = progress.get("metrics")
        metrics[step] = known if isinstance(known, dict) else {}
    for step in metrics.keys() - retention.keeps(metrics):
        remove_step(out / folder_name(step))


def remove_step(folder: Path) -> None:
    """Remove a checkpoint; under another name first, so that a half removed folder is never taken for one."""
    gone = folder.with_name(f"{folder.name}.pruned-{secrets.token_hex(4)}")
    folder.rename(gone)
    sync_folder(folder.parent)
    shutil.rmtree(gone, ignore_errors=True)


def sign(metric: str) -> float:
    """By which values of a metric are multiplied so that the best is the largest: a loss is better when it is lower."""
    return -1.0 if "loss" in metric else 1.0


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
