"""Fragments to bytes and back. It knows no strategy: the bytes do not depend on how the model was trained.

In come fragments (`bigvision.fragments.Fragment`) of all ranks and JSON documents; out comes a step folder of safetensors files
with a manifest, and the same back into fragments.

Read ``commit.py`` first: the stages of a save, in the foreground or in a thread. ``layout.py`` says where each tensor lies
and which bytes this rank writes, ``writer.py`` writes them, ``manifest.py`` has their checksums. ``resume.py`` chooses and
restores a checkpoint, through ``reader.py``. ``retention.py`` names and removes step folders, ``lock.py`` keeps other runs out,
``disk.py`` writes durably; ``commands.py``, ``diff.py`` and ``export.py`` are for the command line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigvision.checkpoint.commit import Saver, check_shared, prepare_folder, save
    from bigvision.checkpoint.disk import replace
    from bigvision.checkpoint.lock import Lock
    from bigvision.checkpoint.manifest import Damaged, ReadError
    from bigvision.checkpoint.resume import Checkpoint, find, open_checkpoint, set_aside_later
    from bigvision.checkpoint.retention import Retention, best_value, folder_name, is_step_folder, prune, sign, steps_in

__all__ = [
    "Checkpoint",
    "Damaged",
    "Lock",
    "ReadError",
    "Retention",
    "Saver",
    "best_value",
    "check_shared",
    "find",
    "folder_name",
    "is_step_folder",
    "open_checkpoint",
    "prepare_folder",
    "prune",
    "replace",
    "save",
    "set_aside_later",
    "sign",
    "steps_in",
]

_HOMES = {
    "Checkpoint": "resume",
    "Damaged": "manifest",
    "Lock": "lock",
    "ReadError": "manifest",
    "Retention": "retention",
    "Saver": "commit",
    "best_value": "retention",
    "check_shared": "commit",
    "find": "resume",
    "folder_name": "retention",
    "is_step_folder": "retention",
    "open_checkpoint": "resume",
    "prepare_folder": "commit",
    "prune": "retention",
    "replace": "disk",
    "save": "commit",
    "set_aside_later": "resume",
    "sign": "retention",
    "steps_in": "retention",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: some commands need no torch, which takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'bigvision.checkpoint' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"bigvision.checkpoint.{_HOMES[name]}"), name)
