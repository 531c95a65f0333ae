"""Train and fine-tune timm backbones that are too large, or too slow, for one device.

This file has the public names only. Read ``api.py`` first (`train` and `Engine`), or ``cli.py`` for the command line;
then ``training/trainer.py``, the loop. docs/architecture.md lists all files and follows a batch, a parameter and a checkpoint.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigvision.api import Engine, plan, predict, train
    from bigvision.config import Config, load_config
    from bigvision.errors import Stopped, UserError
    from bigvision.monitor import Tracker
    from bigvision.training import STOP, Event, Result

__version__ = "0.1.0"
__all__ = [
    "STOP",
    "Config",
    "Engine",
    "Event",
    "Result",
    "Stopped",
    "Tracker",
    "UserError",
    "load_config",
    "plan",
    "predict",
    "train",
]

_HOMES = {
    "STOP": "bigvision.training",
    "Config": "bigvision.config",
    "Engine": "bigvision.api",
    "Event": "bigvision.training",
    "Result": "bigvision.training",
    "Stopped": "bigvision.errors",
    "Tracker": "bigvision.monitor",
    "UserError": "bigvision.errors",
    "load_config": "bigvision.config",
    "plan": "bigvision.api",
    "predict": "bigvision.api",
    "train": "bigvision.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch and timm take seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'bigvision' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


@contextmanager
def importing() -> Iterator[None]:
    """Import torch and timm in here: the garbage collector does not look through all that they create, now or ever.

    It stays anyway. Looking through it again and again is almost half of the processor time of a start, and a pause of its rank
    in training each time.
    """
    collects = gc.isenabled()
    if collects:
        gc.collect()  # what is garbage now would stay too
        gc.disable()
    _import_when_used("wandb")
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()


def _import_when_used(name: str) -> None:
    """Let ``import`` of *name* bring in a module that runs when something of it is first asked for.

    timm imports wandb where it is installed, for one function of its utilities: 0.2 s of every start that nobody uses.
    """
    import importlib.util
    import sys

    spec = None if name in sys.modules else importlib.util.find_spec(name)
    if spec is not None and spec.loader is not None:
        spec.loader = importlib.util.LazyLoader(spec.loader)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
