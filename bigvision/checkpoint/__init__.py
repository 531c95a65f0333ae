"""Fragments to bytes and back. It knows no strategy: the bytes do not depend on how the model was trained.

In come fragments (`bigvision.fragments.Fragment`) of all ranks and JSON documents; out comes a step folder of safetensors files
with a manifest, and the same back into fragments.

Read ``commit.py`` first: the stages of a save, in the foreground or in a thread. ``writer.py`` begins with a picture of which
rank writes which bytes of which file; ``manifest.py`` has their checksums. ``resume.py`` chooses and restores a checkpoint,
through ``reader.py``. ``retention.py`` names and removes step folders, ``lock.py`` keeps other runs out; ``commands.py``,
``diff.py`` and ``export.py`` (with ``forms.py``, ``running.py`` and ``adapters.py``) are for the command line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigvision.checkpoint.commit import Saver, check_shared, prepare_folder
    from bigvision.checkpoint.lock import Lock
    from bigvision.checkpoint.manifest import ReadError
    from bigvision.checkpoint.resume import Checkpoint, find, open_checkpoint, set_aside_later
    from bigvision.checkpoint.retention import Retention, best_value, folder_name, is_step_folder, sign, steps_in
    from bigvision.disk import replace

__all__ = [
    "Checkpoint", "Lock", "ReadError", "Retention", "Saver", "best_value", "check_shared", "find", "folder_name",
    "is_step_folder", "open_checkpoint", "prepare_folder", "replace", "set_aside_later", "sign", "steps_in",
]  # fmt: skip

_HOMES = {
    "checkpoint.commit": ("Saver", "check_shared", "prepare_folder"),
    "checkpoint.lock": ("Lock",),
    "checkpoint.manifest": ("ReadError",),
    "checkpoint.resume": ("Checkpoint", "find", "open_checkpoint", "set_aside_later"),
    "checkpoint.retention": ("Retention", "best_value", "folder_name", "is_step_folder", "sign", "steps_in"),
    "disk": ("replace",),
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: some commands need no torch, which takes seconds."""
    import importlib

    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"bigvision.{module}"), name)
    raise AttributeError(f"module 'bigvision.checkpoint' has no attribute {name!r}")
