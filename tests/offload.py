"""Host memory beside the CPU's, for tests of offloaded activations without a GPU.

What is "on the host" is numpy's, so that torch's memory is the device's alone. A copy is made as late as CUDA might make it:
when something waits for its event. What reads before that, or keeps too little alive, reads bytes of ones, which are NaN in
every format. What comes back into memory that is free by then is an error: on a GPU it might be somebody else's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

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
            assert out or not address.expired()
            if not address.expired():
                storage = torch.UntypedStorage._new_with_weak_ptr(address.cdata)
                here = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()  # type: ignore[call-overload]
                host[:], here[:] = (here, here) if out else (host, host)

    def free(self, copy: Any) -> None:
        self.held -= len(copy)


class LateStream(TorchFunctionMode):
    """A stream of CUDA on the CPU for `bigvision.models.offload.PinnedCopies`, and the stream that computes and waits for it.

    A copy is made when its event is waited for, of what its memory has then, and not at all where that is gone. One that
    would not wait for what is computed is an error.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queue: list[tuple[tuple[StorageWeakRef, int, int], ...]] = []
        """Of each copy that was begun the memories that it writes and reads, with offset and size."""
        self.done = 0
        self.behind = False
        """Whether what is begun now waits for what was computed."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.copy_:
            return func(*args, **(kwargs or {}))
        assert self.behind and kwargs == {"non_blocking": True}
        if args[0].numel() == args[0].untyped_storage().nbytes():  # not a part of a slab, so it is the device's
            args[0].fill_(NEVER_WRITTEN)
        self.queue.append(tuple((StorageWeakRef(t.untyped_storage()), t.storage_offset(), t.numel()) for t in args))
        return args[0]

    def wait_stream(self, computing: LateStream) -> None:
        self.behind = True

    def record_event(self) -> int:
        self.behind = False
        return self.done + len(self.queue)

    def wait_event(self, event: int) -> None:
        while self.done < event:
            memories = self.queue.pop(0)
            self.done += 1
            assert not memories[0][0].expired()
            if not memories[1][0].expired():
                storages = [(torch.UntypedStorage._new_with_weak_ptr(memory.cdata), *where) for memory, *where in memories]
                here, there = (torch.empty(0, dtype=torch.uint8).set_(s, at, (size,)) for s, at, size in storages)  # type: ignore[call-overload]
                here.copy_(there)


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
