"""The training stream as a function of (seed, samples consumed).

The stream has no other state, so a run resumes anywhere, on any number of ranks and workers, from one integer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from bigvision.data.order import Order
from bigvision.seeds import seed_from


class Place(NamedTuple):
    """Where a sample of the stream comes from."""

    epoch: int
    id: int
    """its index in the source"""
    repeat: int = 0
    """which of its repetitions (repeated augmentation) this is"""
    part: int = 0
    number: int = 0
    """its place in the stream of its part of the source, through all epochs"""


class Part(NamedTuple):
    """A run of a source's indices, and how many samples of it an epoch of the whole has."""

    begin: int
    length: int
    share: int


class Stream:
    """The samples of a run, in their order.

    An epoch has as many samples as the source. Sample number ``i`` lies in epoch ``i // length``. Several parts (sources
    that are mixed with weights) give an epoch so many samples each, and go through their own at their own pace: each part's
    samples come once before any comes again.
    """

    def __init__(self, seed: int, parts: Sequence[Part], *, repeats: int = 1, block: int = 1, window: int = 1) -> None:
        """Args:
        repeats: of each sample, one after the other (Hoffer et al. 2020); an epoch then has fewer different ones.
        block, window: see :class:`~bigvision.data.order.Order`.
        """
        self.seed, self.parts, self.repeats = seed, list(parts), repeats
        self.length = sum(part.share for part in parts)
        self._ends = np.array(list(accumulate(part.share for part in parts)))
        self._turns = Order(seed_from("turns", seed), self.length)
        seeds = [seed if number == 0 else seed_from("part", seed, number) for number in range(len(parts))]
        self._orders = [Order(own, part.length, block, window) for own, part in zip(seeds, parts)]

    def places(self, start: int, stop: int) -> list[Place]:
        """The samples ``start..stop-1``, across the ends of epochs."""
        positions = np.arange(start, stop)
        unique = positions // self.repeats
        if len(self.parts) == 1:
            part, number = np.zeros_like(unique), unique
        else:
            epoch, slot = np.divmod(unique, self.length)
            for value in np.unique(epoch):
                here = epoch == value
                slot[here] = self._turns.at(int(value), slot[here])
            part = np.searchsorted(self._ends, slot, side="right")
            shares = np.array([part.share for part in self.parts])
            number = epoch * shares[part] + slot - (self._ends - shares)[part]
        ids, epochs = np.empty_like(unique), np.empty_like(unique)
        for which in np.unique(part):
            here = part == which
            epochs[here], ids[here] = self._read(int(which), number[here])
        repeat = positions % self.repeats
        return [Place(*place) for place in np.stack([epochs, ids, repeat, part, number], axis=1).tolist()]

    def after(self, place: Place) -> Place:
        """The next sample of the same part, to stand in for one that cannot be read."""
        epoch, id = self._read(place.part, np.array([place.number + 1]))
        return place._replace(epoch=int(epoch[0]), id=int(id[0]), number=place.number + 1)

    def _read(self, which: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The epochs of a part, and the indices in the source, of the samples *numbers* of its stream."""
        part, order = self.parts[which], self._orders[which]
        epochs, positions = np.divmod(numbers, part.length)
        ids = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = part.begin + order.at(int(epoch), positions[here])
        return epochs, ids


def shares(lengths: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many samples of each part an epoch has: in proportion to *weights*, *lengths* in all, at least one each."""
    total = sum(lengths)
    exact = [total * weight / sum(weights) for weight in weights]
    found = [max(1, int(value)) for value in exact]
    # The largest remainders get what rounding down left.
    for number in sorted(range(len(exact)), key=lambda n: int(exact[n]) - exact[n])[: max(0, total - sum(found))]:
        found[number] += 1
    return found


def seed_everything(seed: int) -> None:
    """Seed the CPU generators that transforms draw from: torch's, Python's and NumPy's global ones."""
    # torch.manual_seed would reseed the CUDA generators too, which belong to the model's dropout.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])


@contextmanager
def generators_kept() -> Iterator[None]:
    """Leave the CPU generators of torch, Python and NumPy as they were found."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
