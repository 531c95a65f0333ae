"""Fragments to bytes and back. Knows no strategy: the bytes do not depend on how the model was trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigvision.checkpoint.commit import prepare_folder, prune, save
    from bigvision.checkpoint.folders import folder_name, steps_in
    from bigvision.checkpoint.manifest import Damaged
    from bigvision.checkpoint.resume import Checkpoint, find, open_checkpoint

__all__ = ["Checkpoint", "Damaged", "find", "folder_name", "open_checkpoint", "prepare_folder", "prune", "save", "steps_in"]

_HOMES = {
    "Checkpoint": "resume",
    "Damaged": "manifest",
    "find": "resume",
    "folder_name": "folders",
    "open_checkpoint": "resume",
    "prepare_folder": "commit",
    "prune": "commit",
    "save": "commit",
    "steps_in": "folders",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: some commands need no torch, which takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'bigvision.checkpoint' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"bigvision.checkpoint.{_HOMES[name]}"), name)
