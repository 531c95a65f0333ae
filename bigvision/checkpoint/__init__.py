"""Fragments to bytes and back. Knows no strategy: the bytes do not depend on how the model was trained."""

from bigvision.checkpoint.commit import folder_name, prepare_folder, prune, save, steps_in
from bigvision.checkpoint.manifest import Damaged
from bigvision.checkpoint.resume import Checkpoint, find, open_checkpoint

__all__ = ["Checkpoint", "Damaged", "find", "folder_name", "open_checkpoint", "prepare_folder", "prune", "save", "steps_in"]
