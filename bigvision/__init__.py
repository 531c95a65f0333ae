"""Train and fine-tune timm backbones that are too large, or too slow, for one device.

This file has the public names only. Read ``api.py`` first (`train` and `Engine`), or ``cli.py`` for the command line;
then ``training/trainer.py``, the loop. docs/architecture.md lists all files and follows a batch, a parameter and a checkpoint.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
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
    _defer("wandb")
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()


class _Deferred(ModuleType):
    """A module that runs when something of it is first asked for, not when it is imported."""

    def __getattr__(self, name: str) -> Any:
        # Whoever looks through all modules, as `inspect` does, asks for such names.
        if name.startswith("__") or "__deferred__" not in vars(self):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        del vars(self)["__deferred__"]
        assert self.__spec__ is not None and self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def _defer(name: str) -> None:
    """Let ``import`` of *name* bring in a `_Deferred`.

    timm imports wandb where it is installed, for one function of its utilities: 0.2 s of every start that nobody uses.
    """
    import importlib.util
    import sys

    if name not in sys.modules and (spec := importlib.util.find_spec(name)) is not None and spec.origin is not None:
        module = sys.modules[name] = _Deferred(name)
        vars(module).update(
            __spec__=spec, __loader__=spec.loader, __file__=spec.origin, __package__=name,
            __path__=spec.submodule_search_locations or [], __deferred__=True,
        )  # fmt: skip


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
