"""Fragments to bytes and back. Knows no strategy: the bytes do not depend on how the model was trained."""

from bigvision.checkpoint.background import Saver
from bigvision.checkpoint.commit import prepare_folder, save
from bigvision.checkpoint.disk import replace
from bigvision.checkpoint.lock import Lock
from bigvision.checkpoint.manifest import Damaged
from bigvision.checkpoint.resume import Checkpoint, find, open_checkpoint, set_aside_later
from bigvision.checkpoint.retention import Retention, prune
from bigvision.checkpoint.steps import folder_name, steps_in

__all__ = [
    "Checkpoint",
    "Damaged",
    "Lock",
    "Retention",
    "Saver",
    "find",
    "folder_name",
    "open_checkpoint",
    "prepare_folder",
    "prune",
    "replace",
    "save",
    "set_aside_later",
    "steps_in",
]
