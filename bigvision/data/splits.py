"""A part of a source: what is held out of it for validation, or the rest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from bigvision.data.sources.base import Sample, Source, Split

HELD_OUT = 0.1
"""The share of a dataset without a validation part that is held out for it."""


class Subset(Source):
    """The samples *indices* of another source, in that order."""

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray) -> None:
        self.source = source
        self.name, self.classes, self.style, self.channels = source.name, source.classes, source.style, source.channels
        self.location, self.noun, self.passed_over = source.location, source.noun, source.passed_over
        # A tensor: workers share it.
        self.indices = torch.as_tensor(np.asarray(indices, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Sample:
        return self.source.read(int(self.indices[index]))

    def label(self, index: int) -> int:
        return self.source.label(int(self.indices[index]))

    def where(self, index: int) -> str:
        return self.source.where(int(self.indices[index]))

    def key(self, index: int) -> bytes:
        return self.source.key(int(self.indices[index]))

    def size(self, index: int) -> int:
        return self.source.size(int(self.indices[index]))


def hold_out(source: Source, split: Split) -> Subset:
    """A fixed tenth of *source* for ``val``, the rest for ``train``; at least one sample for each, of two or more."""
    length = len(source)
    count = min(max(1, round(HELD_OUT * length)), length - 1)
    # A counter-based generator is a hash of the index, so that samples added later hardly move others between the splits.
    ranked = np.argsort(np.random.Philox(key=0).random_raw(length), kind="stable")
    return Subset(source, np.sort(ranked[:count] if split == "val" else ranked[count:]))
