"""Memory for the images of batches, which workers write and this process reads, used again and again."""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import Tensor


class Rooms:
    """So many *places*, each for images uint8 (*size*, C, H, W), in memory shared with the workers that this is sent to.

    Without them each batch gets new memory: the system has to clear each of its pages, map it twice and take it back, and a
    file descriptor travels. A place is free again when the last tensor that shows a part of its images is gone.
    """

    def __init__(self, places: int, size: int, shape: tuple[int, int, int]) -> None:
        channels, height, width = shape
        self._memory = shared_memory(places * size * channels * height * width).view(places, size, height, width, channels)
        self._free = list(range(places))
        self.key = next(_numbers)
        _known[self.key] = self

    def take(self) -> int | None:
        """A free place, the one used last where there are several; None when batches lie in all of them."""
        return self._free.pop() if self._free else None

    def images(self, place: int) -> Tensor:
        """Where a worker writes."""
        return self._memory[place].permute(0, 3, 1, 2)

    def received(self, place: int) -> Tensor:
        """What a worker wrote; when this and all views of it are gone, the place is free."""
        array = self._memory[place].numpy()
        # A tensor made of it keeps this very array, however many views there will be of the tensor.
        weakref.finalize(array, self._free.append, place).atexit = False
        return torch.from_numpy(array).permute(0, 3, 1, 2)

    def __getstate__(self) -> dict[str, object]:
        return {"_memory": self._memory, "key": self.key}


def rooms_of(key: int) -> Rooms:
    """Those of this process that have the *key*."""
    return _known[key]


def shared_memory(size: int) -> Tensor:
    """uint8 (size,), which other processes map when it is sent to them."""
    # As DataLoader's own collation gets it: `share_memory_` would first get private memory, and copy that.
    storage = torch.UntypedStorage._new_shared(size, device="cpu")
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # pyright: ignore[reportCallIssue, reportArgumentType]


_numbers = itertools.count()
_known: weakref.WeakValueDictionary[int, Rooms] = weakref.WeakValueDictionary()
