"""What is learned."""

from __future__ import annotations

from bigvision.config import TaskConfig
from bigvision.tasks.classify import Classify, Task


def build_task(config: TaskConfig) -> Task:
    """The task that *config* names."""
    return Classify(label_smoothing=config.label_smoothing)


__all__ = ["Classify", "Task", "build_task"]
