"""Shuffled orders that are computed, never stored: a billion samples cost no memory and no start-up.

A permutation of ``range(n)`` is a Feistel network (Luby and Rackoff 1988) over the cells of a grid barely larger than n,
with additions modulo the grid's sides (as in Black and Rogaway 2002); what falls outside of ``range(n)`` walks on until it
does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import numpy as np

from bigvision.seeds import seed_from

ROUNDS = 12


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
