"""What a source knows of each of its samples, a million times, in memory that worker processes share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Column:
    """Whole numbers that are read one at a time, in a tensor, which worker processes share.

    A million numbers of Python would be copied and pickled for each of them; and indexing a tensor takes ten times as long as
    this.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._seen = values.numpy()

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> int:
        return self._seen.item(index)

    def __reduce__(self) -> tuple[Any, ...]:
        return Column, (self.values,)


class Texts:
    """Texts in two tensors, read one at a time; as :class:`Column`."""

    def __init__(self, values: Tensor, ends: Tensor) -> None:
        """Args: *values* uint8 (bytes of all), *ends* int64 (N,), where each one's end."""
        self.values, self.ends = values, Column(ends)
        self._seen = values.numpy()

    @classmethod
    def of(cls, texts: Sequence[bytes]) -> Texts:
        ends = torch.tensor([len(text) for text in texts], dtype=torch.int64).cumsum(0)
        return cls(torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        return self._seen[self.ends[index - 1] if index else 0 : self.ends[index]].tobytes()

    def __reduce__(self) -> tuple[Any, ...]:
        return Texts, (self.values, self.ends.values)
