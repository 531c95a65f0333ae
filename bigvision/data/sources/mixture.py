"""Several sources as one, mixed with weights."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from bigvision.data.order import Part, shares
from bigvision.data.sources.base import Sample, Source


class Mixture(Source):
    """The samples of *sources* one after the other; an epoch has of each as many as its weight says."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]) -> None:
        self.sources = list(sources)
        self.name = " + ".join(f"{weight:g}*{source.name}" for weight, source in zip(weights, sources))
        self.classes, self.style, self.channels = sources[0].classes, sources[0].style, sources[0].channels
        lengths = [len(source) for source in sources]
        self._ends = list(accumulate(lengths))
        begins = [end - length for end, length in zip(self._ends, lengths)]
        self._parts = [Part(*part) for part in zip(begins, lengths, shares(lengths, weights))]

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, index: int) -> Sample:
        source, index = self._find(index)
        return source.read(index)

    def label(self, index: int) -> int:
        source, index = self._find(index)
        return source.label(index)

    def where(self, index: int) -> str:
        source, index = self._find(index)
        return source.where(index)

    @property
    def parts(self) -> list[Part]:
        return self._parts

    def _find(self, index: int) -> tuple[Source, int]:
        number = bisect_right(self._ends, index)
        return self.sources[number], index - (self._ends[number] - len(self.sources[number]))
