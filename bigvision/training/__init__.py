"""The trainer: the loop a reader can follow in one screen."""

from bigvision.training.saving import Callback, Event
from bigvision.training.trainer import Result, evaluate_checkpoint, read_history, train

__all__ = ["Callback", "Event", "Result", "evaluate_checkpoint", "read_history", "train"]
