"""The training stream as a function of (seed, samples consumed).

Sample number ``i`` of a run lies in epoch ``i // length`` and is that epoch's permutation at ``i % length``. The stream
has no other state, so a run resumes anywhere, on any number of ranks and workers, from one integer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from bigvision.seeds import seed_from


class Place(NamedTuple):
    """Where a sample of the stream comes from."""

    epoch: int
    id: int
    """its index in the source"""


@lru_cache(maxsize=1)
def order(seed: int, epoch: int, length: int) -> np.ndarray:
    """Return the permutation of ``range(length)`` in which *epoch* sees the source: int64 (length,), read-only."""
    generator = torch.Generator().manual_seed(seed_from("order", seed, epoch))
    permutation = torch.randperm(length, generator=generator).numpy()
    permutation.flags.writeable = False
    return permutation


def places(seed: int, length: int, start: int, stop: int) -> list[Place]:
    """Return the samples ``start..stop-1`` of the stream over a source of *length* samples, across epoch boundaries."""
    found: list[Place] = []
    while start < stop:
        epoch, first = divmod(start, length)
        last = min(length, first + stop - start)
        found += [Place(epoch, id) for id in order(seed, epoch, length)[first:last].tolist()]
        start += last - first
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
