"""This process among the ranks: launcher environments, process groups, device and mesh, and the end of runs that hang.

In come the environment that a launcher set and the sections ``parallel`` and ``limits``; out come a `Runtime`, and functions by
which ranks agree (`all_or_none`, `from_main`, `gather_json`, `gather_rows`).

Read ``process.py`` first, then ``rendezvous.py`` (rank and meeting point from each launcher's variables). ``watchdog.py`` ends
a run that hangs, ``diagnosis.py`` explains it, ``guard.py`` ends a rank whose native code holds the interpreter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigvision.runtime.process import (
        RankFailure,
        Runtime,
        all_or_none,
        deterministic,
        from_main,
        gather_json,
        gather_rows,
        operations_named,
        start,
        warn_of_shared_memory,
    )
    from bigvision.runtime.rendezvous import Identity, identify
    from bigvision.runtime.watchdog import Watchdog, collective_timeout

__all__ = [
    "Identity",
    "RankFailure",
    "Runtime",
    "Watchdog",
    "all_or_none",
    "collective_timeout",
    "deterministic",
    "from_main",
    "gather_json",
    "gather_rows",
    "identify",
    "operations_named",
    "start",
    "warn_of_shared_memory",
]

_HOMES = dict.fromkeys(__all__, "process")
_HOMES |= {"Identity": "rendezvous", "identify": "rendezvous", "Watchdog": "watchdog", "collective_timeout": "watchdog"}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: who this process is takes no seconds to find out, and torch does."""
    if name not in _HOMES:
        raise AttributeError(f"module 'bigvision.runtime' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"bigvision.runtime.{_HOMES[name]}"), name)
