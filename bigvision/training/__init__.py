"""The trainer: the loop, and all that a run does beside its steps.

In come a `Config`, and datasets, a model and callbacks of the user's; out come checkpoints, metrics.jsonl and a `Result`.

Read ``trainer.py`` first (the loop, evaluation), then ``build.py`` (all that happens before the first step). ``data.py`` feeds
the loop, ``saving.py`` decides when to save, ``callbacks.py`` calls the user's functions and knows what ends a run early,
``numbers.py`` what becomes of non-finite losses and spikes. ``run_folder.py`` logs each start, and compares a run with what its
folder holds.
"""

import warnings
from typing import Any

from bigvision import importing

with importing():
    from bigvision.training.callbacks import STOP, Callback, Event
    from bigvision.training.evaluation import evaluate_checkpoint
    from bigvision.training.trainer import Result, read_history, train_on_rank, write_report

__all__ = ["STOP", "Callback", "Event", "Result", "evaluate_checkpoint", "read_history", "train_on_rank", "write_report"]


def __getattr__(name: str) -> Any:
    if name != "train":
        raise AttributeError(f"module 'bigvision.training' has no attribute {name!r}")
    warnings.warn("bigvision.training.train is called train_on_rank now", FutureWarning, stacklevel=2)
    return train_on_rank
