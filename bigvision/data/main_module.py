"""Worker processes and the main module of the program that starts them.

A new interpreter gets objects pickled, and multiprocessing first runs the main script in it again, in case a class is defined
there. A script without a guard would so start its training once more. Seldom is there such a class: then nothing of the main
module is needed, and it is hidden; else the workers are forked, which inherit the class and need no module.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigvision.data.sources.custom import MapStyle

MAIN = "__main__"


def needs_main(value: Any) -> bool:
    """Whether another process can only get *value* with the main module, where something in it is defined."""
    try:
        _Finder().dump(value)
    except _Found:
        return True
    except Exception:
        return False  # it cannot be sent at all, which is said when it is
    return False


@contextmanager
def main_hidden() -> Iterator[None]:
    """Let the processes that multiprocessing starts in here not run the main module again."""
    main = sys.modules[MAIN]
    with _LOCK:
        hidden = {name: vars(main)[name] for name in ("__spec__", "__file__") if name in vars(main)}
        main.__spec__ = None
        vars(main).pop("__file__", None)
        try:
            yield
        finally:
            vars(main).pop("__spec__", None)
            vars(main).update(hidden)


_LOCK = threading.RLock()


class _Found(Exception):
    """Something in the value is defined in the main module."""


class _Nowhere:
    def write(self, data: Any) -> int:
        return len(data)


class _Finder(ForkingPickler):
    """Goes through an object as sending it would, without side effects and without the bytes of tensors."""

    def __init__(self) -> None:
        super().__init__(_Nowhere(), 5)

    def reducer_override(self, obj: Any) -> Any:
        if getattr(obj, "__module__", None) == MAIN:
            raise _Found
        if isinstance(obj, (Tensor, torch.UntypedStorage, torch.TypedStorage)):
            return int, ()
        if isinstance(obj, np.ndarray) and not obj.dtype.hasobject:
            return int, ()
        if isinstance(obj, MapStyle):
            # Its own way of being sent makes bytes of the dataset, in which nothing can be found.
            return len, (vars(obj),)
        return NotImplemented
