"""The trainer: the loop a reader can follow in one screen."""

from bigvision.training.callbacks import Callback, Event
from bigvision.training.evaluate import evaluate_checkpoint
from bigvision.training.trainer import Result, read_history, train

__all__ = ["Callback", "Event", "Result", "evaluate_checkpoint", "read_history", "train"]
