"""``launch/train.py``, where an object that is pickled for other ranks, or unpickled from them, is an error."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def without_objects() -> Iterator[None]:
    """Refuse every collective of objects in here: all of torch's go through these two functions."""
    from torch.distributed import distributed_c10d

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an object is pickled for other ranks")

    names = ("_object_to_tensor", "_tensor_to_object")
    before = {name: getattr(distributed_c10d, name) for name in names}
    for name in names:
        setattr(distributed_c10d, name, refuse)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(distributed_c10d, name, function)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from bigvision.cli import main

    with without_objects():
        sys.exit(main(["train", *sys.argv[1:]]))
