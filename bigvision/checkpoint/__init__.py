"""Fragments to bytes and back. Knows no strategy: the bytes do not depend on how the model was trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOMES = {
    "Checkpoint": "resume",
    "Damaged": "manifest",
    "Lock": "lock",
    "Retention": "retention",
    "Saver": "background",
    "find": "resume",
    "folder_name": "steps",
    "open_checkpoint": "resume",
    "prepare_folder": "commit",
    "prune": "retention",
    "replace": "disk",
    "save": "commit",
    "set_aside_later": "resume",
    "steps_in": "steps",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: some commands need no torch, which takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'bigvision.checkpoint' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"bigvision.checkpoint.{_HOMES[name]}"), name)
