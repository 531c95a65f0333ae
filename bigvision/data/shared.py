"""Memory that worker processes and this process have in common.

It lies in anonymous files (``memfd_create``), not in /dev/shm: containers give that 64 MB, and whoever writes more dies of
SIGBUS. An anonymous file has no name, so nothing is left when its processes end, however they end. Its descriptor travels
to a worker when the worker starts.
"""

from __future__ import annotations

import itertools
import mmap
import os
import tempfile
import weakref
from io import BytesIO
from multiprocessing.reduction import DupFd, ForkingPickler
from typing import Any

import numpy as np
import torch
from torch import Tensor


class SharedMemory(mmap.mmap):
    """Bytes that a process which this is sent to maps too."""

    fd: int

    def __new__(cls, size: int, fd: int | None = None) -> SharedMemory:
        """Args: *fd*: of memory that another process made; by default new memory is made, all zeros."""
        if fd is None:
            fd = _anonymous_file()
            os.ftruncate(fd, max(size, 1))
        memory = super().__new__(cls, fd, max(size, 1))
        memory.fd = fd
        return memory

    def array(self) -> np.ndarray:
        """All of it, uint8. The memory lives as long as this array or a tensor made of it."""
        return np.frombuffer(self, dtype=np.uint8)

    def __reduce__(self) -> tuple[Any, ...]:
        return _mapped, (DupFd(self.fd), len(self))

    def __del__(self) -> None:
        os.close(self.fd)


def _anonymous_file() -> int:
    try:
        return os.memfd_create("bigvision")
    except (AttributeError, OSError):  # not Linux, or forbidden in a sandbox
        with tempfile.TemporaryFile() as file:
            return os.dup(file.fileno())


def _mapped(sent: Any, size: int) -> SharedMemory:
    return SharedMemory(size, sent.detach())


# Objects with tensors in them.


def dumps(value: Any) -> bytes:
    """*value* as multiprocessing sends it, but that tensors in it move to `SharedMemory`, where torch would use /dev/shm.

    A tensor is moved once, however often it is sent, and no second copy stays behind.
    """
    buffer = BytesIO()
    _Sender(buffer).dump(value)
    return buffer.getvalue()


def loads(data: bytes) -> Any:
    return ForkingPickler.loads(data)  # pyright: ignore[reportAttributeAccessIssue]


class _Sender(ForkingPickler):
    def __init__(self, buffer: BytesIO) -> None:
        super().__init__(buffer, 5)
        self._left: dict[int, tuple[torch.UntypedStorage, SharedMemory]] = {}
        """By the address where tensors lay before: what they share, they share afterwards."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is not Tensor or obj.device.type != "cpu" or obj.layout != torch.strided or obj.requires_grad:
            return NotImplemented
        view = obj.storage_offset(), obj.shape, obj.stride()
        return _tensor, (self._memory(obj, view), obj.dtype, *view)

    def _memory(self, tensor: Tensor, view: tuple[Any, ...]) -> SharedMemory:
        """Where *tensor* lies; the first time that it is sent, it is moved there."""
        storage = tensor.untyped_storage()
        if (memory := _moved.get(storage.data_ptr())) is not None:
            return memory
        if storage.data_ptr() not in self._left:
            memory = SharedMemory(storage.nbytes())
            torch.from_numpy(memory.array())[: storage.nbytes()] = torch.empty(0, dtype=torch.uint8).set_(storage)  # pyright: ignore[reportCallIssue, reportArgumentType]
            self._left[storage.data_ptr()] = storage, memory
        memory = self._left[storage.data_ptr()][1]
        moved = torch.from_numpy(memory.array()).untyped_storage()
        _moved[moved.data_ptr()] = memory
        tensor.set_(moved, *view)  # pyright: ignore[reportCallIssue, reportArgumentType]
        return memory


def _tensor(memory: SharedMemory, dtype: torch.dtype, *view: Any) -> Tensor:
    storage = torch.from_numpy(memory.array()).untyped_storage()
    return torch.empty(0, dtype=dtype).set_(storage, *view)  # pyright: ignore[reportCallIssue, reportArgumentType]


_moved: weakref.WeakValueDictionary[int, SharedMemory] = weakref.WeakValueDictionary()
"""By the address of the first byte."""


# The images of micro-batches.


class Slots:
    """Memory for images, uint8 (*size*, C, H, W) in each of *count* slots, which workers write and this process reads.

    A slot is free again when the last tensor that shows a part of its images is gone. New memory for each batch would be
    slower: the system has to clear each of its pages, map it twice and take it back.
    """

    def __init__(self, count: int, size: int, shape: tuple[int, int, int]) -> None:
        channels, height, width = shape
        self._memory = SharedMemory(count * size * channels * height * width)
        self._shape = count, size, height, width, channels
        self._free = list(range(count))
        self._pinned: dict[int, Tensor] = {}
        self.key = next(_numbers)
        _known[self.key] = self

    @property
    def nbytes(self) -> int:
        return len(self._memory)

    def take(self) -> int | None:
        """A free slot, the one used last where there are several; None when batches lie in all of them."""
        return self._free.pop() if self._free else None

    def images(self, slot: int) -> Tensor:
        """Where a worker writes."""
        return torch.from_numpy(self._array(slot)).permute(0, 3, 1, 2)

    def pin(self, slot: int, begin: int, stop: int) -> None:
        """Copy these samples of a slot to page-locked memory, which :meth:`received` then returns."""
        images = self.images(slot)
        if slot not in self._pinned:
            self._pinned[slot] = torch.empty_like(images, pin_memory=True)
        self._pinned[slot][begin:stop].copy_(images[begin:stop])

    def received(self, slot: int) -> Tensor:
        """What workers wrote; when this and all views of it are gone, the slot is free."""
        if slot in self._pinned:
            self._free.append(slot)
            return self._pinned.pop(slot)
        array = self._array(slot)
        # A tensor made of it keeps this very array, however many views there will be of the tensor.
        weakref.finalize(array, self._free.append, slot).atexit = False
        return torch.from_numpy(array).permute(0, 3, 1, 2)

    def _array(self, slot: int) -> np.ndarray:
        return self._memory.array().reshape(self._shape)[slot]

    def __getstate__(self) -> dict[str, object]:
        return {"_memory": self._memory, "_shape": self._shape, "key": self.key}


def slots_of(key: int) -> Slots:
    """Those of this process that have the *key*."""
    return _known[key]


_numbers = itertools.count()
_known: weakref.WeakValueDictionary[int, Slots] = weakref.WeakValueDictionary()
