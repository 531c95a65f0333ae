"""What is learned: targets, losses and metrics.

In come a model's outputs and a batch's targets; out come the sum of the losses and sums of metrics, which add up over ranks.
All of it is in ``classify.py``: `Task`, which engine and loader call, and single-label classification.
"""

from __future__ import annotations

from bigvision.config import TaskConfig
from bigvision.tasks.classify import Classify, Task


def build_task(config: TaskConfig) -> Task:
    """The task that *config* names."""
    return Classify(label_smoothing=config.label_smoothing)


__all__ = ["Classify", "Task", "build_task"]
