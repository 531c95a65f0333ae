"""The trainer: the loop a reader can follow in one screen."""

from bigvision.training.evaluate import evaluate_checkpoint
from bigvision.training.trainer import Result, train

__all__ = ["Result", "evaluate_checkpoint", "train"]
