"""The training stream as a function of (seed, samples consumed), and the shuffled orders in it.

The stream has no other state, so a run resumes anywhere, on any number of ranks and workers, from one integer. Orders are
computed, never stored: a billion samples cost no memory and no start-up. A permutation of ``range(n)`` is a Feistel network
(Luby and Rackoff 1988) over the cells of a grid barely larger than n, with additions modulo the grid's sides (as in Black and
Rogaway 2002); what falls outside of ``range(n)`` walks on until it does not.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from math import isqrt
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bigvision.samples import seed_from

ROUNDS = 12


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

    def __init__(
        self, seed: int, parts: Sequence[Part], *, repeats: int = 1, block: int = 1, window: int = 1,
        members: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Args:
        repeats: of each sample, one after the other (Hoffer et al. 2020); an epoch then has fewer different ones.
        block, window: see `Order`.
        members: int64, the source's indices in the order that *parts* are runs of; by default 0, 1, 2, ...
        """
        self.members = members
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
        return epochs, ids if self.members is None else self.members.numpy()[ids]


def shares(lengths: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many samples of each part an epoch has: in proportion to *weights*, *lengths* in all, at least one each."""
    total = sum(lengths)
    exact = [total * weight / sum(weights) for weight in weights]
    found = [max(1, int(value)) for value in exact]
    # The largest remainders get what rounding down left.
    for number in sorted(range(len(exact)), key=lambda n: int(exact[n]) - exact[n])[: max(0, total - sum(found))]:
        found[number] += 1
    return found


def balanced(labels: np.ndarray, balance: float) -> tuple[list[Part], Tensor]:
    """Parts of a `Stream`, one for each class in *labels*, int64 (N,), and its members.

    Of a class with n samples an epoch has a share in proportion to n ** (1 - *balance*): with 1 all classes come equally often,
    with 0 as they are.
    """
    members = np.argsort(labels, kind="stable")
    _, begins, counts = np.unique(labels[members], return_index=True, return_counts=True)
    parts = zip(begins.tolist(), counts.tolist(), shares(counts.tolist(), (counts ** (1.0 - balance)).tolist()))
    return [Part(*part) for part in parts], torch.from_numpy(members)


# Orders.


@dataclass(frozen=True)
class Order:
    """The order in which each epoch sees a source.

    With *block* above 1 samples that lie next to each other are read near each other: runs of *block* samples are shuffled
    as wholes, and then the samples of every *window* consecutive ones among themselves. The runs begin elsewhere in each epoch.
    """

    seed: int
    length: int
    block: int = 1
    window: int = 1

    def at(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """The indices, int64, that *epoch* sees at *positions*, int64 in ``range(length)``."""
        if self.block == 1:
            return permuted(seed_from("order", self.seed, epoch), self.length, positions)
        found = np.empty_like(positions)
        span, whole = self.block * self.window, self.length // self.block
        windows = positions // span
        for number in np.unique(windows):
            here = windows == number
            size = min(span, self.length - int(number) * span)
            within = permuted(seed_from("window", self.seed, epoch, int(number)), size, positions[here] - number * span)
            run, place = int(number) * self.window + within // self.block, within % self.block
            # What does not fill a run stays the last one.
            full = run < whole
            run[full] = permuted(seed_from("runs", self.seed, epoch), whole, run[full])
            found[here] = run * self.block + place
        return (found + seed_from("begin", self.seed, epoch) % self.length) % self.length


def permuted(key: int, length: int, positions: np.ndarray) -> np.ndarray:
    """Where the permutation *key* of ``range(length)`` takes *positions*: int64, of any shape."""
    rows = isqrt(max(length, 1) - 1) + 1
    columns = -(-length // rows)
    keys = [np.uint64(seed_from(key, number)) for number in range(ROUNDS)]
    found = positions.astype(np.uint64)
    outside = np.ones(found.shape, dtype=bool)
    while outside.any():
        found[outside] = _once(found[outside], np.uint64(rows), np.uint64(columns), keys)
        outside &= found >= length
    return found.astype(np.int64)


def _once(values: np.ndarray, rows: np.uint64, columns: np.uint64, keys: list[np.uint64]) -> np.ndarray:
    row, column = values // columns, values % columns
    for number, key in enumerate(keys):
        if number % 2:
            column = (column + _hash(row ^ key) % columns) % columns
        else:
            row = (row + _hash(column ^ key) % rows) % rows
    return row * columns + column


def _hash(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele, Lea and Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


# Generators.


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
