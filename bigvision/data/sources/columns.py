"""What a source knows of each of its samples, a million times, in memory that worker processes share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class _Shared:
    """A tensor, read by NumPy: its own indexing takes ten times as long."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._array, self._begin = values.numpy(), values.data_ptr()

    def __len__(self) -> int:
        return len(self.values)

    @property
    def array(self) -> np.ndarray:
        # When a tensor is first sent to another process, its numbers move to shared memory, and the array is left behind.
        if self.values.data_ptr() != self._begin:
            self._array, self._begin = self.values.numpy(), self.values.data_ptr()
        return self._array

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.values,)


class Column(_Shared):
    """Whole numbers that are read one at a time. A million of Python's own would be copied and pickled for each worker."""

    def __getitem__(self, index: int) -> int:
        return self.array.item(index)


class Texts:
    """Texts that are read one at a time."""

    def __init__(self, values: Tensor, ends: Tensor) -> None:
        """Args: *values* uint8 (bytes of all), *ends* int64 (N,), where each one ends."""
        self._values, self._ends = _Shared(values), Column(ends)

    @classmethod
    def of(cls, texts: Sequence[bytes]) -> Texts:
        ends = torch.tensor([len(text) for text in texts], dtype=torch.int64).cumsum(0)
        return cls(torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8), ends)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> bytes:
        return self._values.array[self._ends[index - 1] if index else 0 : self._ends[index]].tobytes()
