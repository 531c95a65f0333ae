"""What is learned: targets, losses, metrics and predictions.

In come the section ``task`` of a configuration, or a task of the user's; out comes a `Task`, which engine, trainer and data ask
for all of that. Read ``base.py`` first, the protocol, then ``regress.py``, the shortest task.
"""

from __future__ import annotations

from collections.abc import Callable

from bigvision.config import TaskConfig
from bigvision.errors import UserError
from bigvision.tasks.base import Features, Kind, Share, Span, Task, as_sum
from bigvision.tasks.classify import Classify
from bigvision.tasks.distill import Distill
from bigvision.tasks.embed import Embed
from bigvision.tasks.multilabel import Multilabel
from bigvision.tasks.regress import Regress
from bigvision.tasks.segment import Segment

PREFIX = "python:"  # before the name of a task of the user's in a configuration


def _classify(config: TaskConfig) -> Task:
    own = config.label_smoothing, config.loss, config.class_weights
    if config.teacher is None:
        return Classify(*own)
    return Distill(config.teacher, config.distill, config.distill_weight, config.temperature, *own)


TASKS: dict[str, Callable[[TaskConfig], Task]] = {
    "classify": _classify,
    "multilabel": lambda config: Multilabel(config.loss),
    "regress": lambda config: Regress(config.loss, config.standardize),
    "segment": lambda config: Segment(config.decoder, config.decoder_options, config.loss, config.ignore),
    "embed": lambda config: Embed(config.k),
}
"""Of each ``task.name`` what makes the task; which keys it has a use for is in `bigvision.config.checks`."""


def task_name(task: Task) -> str:
    """What a configuration calls a *task* of the user's: ``python:Pairs``."""
    return PREFIX + type(task).__name__


def build_task(config: TaskConfig, given: Task | None = None) -> Task:
    """The task that *config* names, or the *given* one."""
    if given is not None:
        return given
    if config.name.startswith(PREFIX):
        raise UserError(
            f"task.name: the task of this run was given from Python ({config.name.removeprefix(PREFIX)}): give it again, with "
            "bigvision.train(..., task=...); no command can make it"
        )
    return TASKS[config.name](config)


__all__ = [
    "Classify", "Distill", "Embed", "Features", "Kind", "Multilabel", "Regress", "Segment", "Share", "Span", "Task", "as_sum",
    "build_task", "task_name",
]  # fmt: skip
