"""Host memory beside the CPU's, for tests of offloaded activations without a GPU.

What is "on the host" is numpy's, so that torch's memory is the device's alone. A copy is made as late as CUDA might make it:
when something waits for its event. What reads before that, or keeps too little alive, reads bytes of ones, which are NaN in
every format.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from bigvision.models import offload

NEVER_WRITTEN = 255


class LateCopies:
    """`bigvision.models.offload.Transfers` on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.queue: list[tuple[StorageWeakRef, np.ndarray[Any, Any], bool]] = []
        """Copies that were begun: the device's memory, the host's, and whether to the host."""
        self.done = 0
        self.leaving: list[int] = []
        """Bytes of each memory that has left."""
        self.back = 0
        """Bytes that came back."""
        self.held = self.most = 0
        """Bytes on the host, now and at most."""

    def leave(self, sources: Sequence[Tensor]) -> tuple[list[Any], int]:
        hosts = [np.full(source.untyped_storage().nbytes(), NEVER_WRITTEN, np.uint8) for source in sources]
        self.queue += [(StorageWeakRef(source.untyped_storage()), host, True) for source, host in zip(sources, hosts)]
        self.leaving += [len(host) for host in hosts]
        self.held += sum(map(len, hosts))
        self.most = max(self.most, self.held)
        return hosts, self.done + len(self.queue)

    def bring(self, copies: Sequence[Any]) -> tuple[list[Tensor], int]:
        targets = [torch.full((len(host),), NEVER_WRITTEN, dtype=torch.uint8) for host in copies]
        self.queue += [(StorageWeakRef(target.untyped_storage()), host, False) for target, host in zip(targets, copies)]
        self.back += sum(map(len, copies))
        return targets, self.done + len(self.queue)

    def wait(self, event: int) -> None:
        while self.done < event:
            address, host, out = self.queue.pop(0)
            self.done += 1
            if not address.expired():
                storage = torch.UntypedStorage._new_with_weak_ptr(address.cdata)
                here = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()  # type: ignore[call-overload]
                host[:], here[:] = (here, here) if out else (host, host)

    def free(self, copy: Any) -> None:
        self.held -= len(copy)


@contextmanager
def on_the_cpu(least: int = 64) -> Iterator[list[LateCopies]]:
    """Let activations of at least so many bytes be offloaded on the CPU; yield the transfers that are made meanwhile."""
    found: list[LateCopies] = []

    def made(device: torch.device) -> LateCopies:
        found.append(LateCopies(device))
        return found[-1]

    before, offload.LEAST = offload.LEAST, least
    offload.TRANSFERS["cpu"] = made
    try:
        yield found
    finally:
        offload.LEAST = before
        del offload.TRANSFERS["cpu"]
