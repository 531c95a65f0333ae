"""The word that engine, checkpoint and everything else that must see the state share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Fragment:
    """A contiguous run of one named tensor that this rank holds.

    Every rank names every tensor: one that holds nothing of it yields a fragment without values, so that each rank can
    work out by itself how the whole state is laid out.
    """

    group: str
    """"model", "optimizer" or "ema"."""
    name: str
    """timm's parameter or buffer name; in the optimizer, that name and the state: "blocks.3.attn.qkv.weight/exp_avg"."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    """First element of this run in the whole tensor, flattened row-major."""
    values: Tensor
    """1-D, a view of live storage: writing to it restores."""
    copy: tuple[int, int]
    """(which copy this is, how many ranks hold the same run): decides who writes what."""

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)
