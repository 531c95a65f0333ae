"""Small facts exchanged between ranks: as JSON and over the CPU, never as pickled objects; and the memory that NCCL needs."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from bigvision.errors import UserError

if TYPE_CHECKING:
    from bigvision.runtime.process import Runtime

T = TypeVar("T")
SHARED_PER_RANK = 64 << 20
"""Bytes of /dev/shm that NCCL may take for a rank: some segments of 10 MB. Its manual asks for 1 GB in a container."""


def gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return every rank's *value*, in the order of the ranks, on every rank.

    Args:
        group: all ranks, where several threads speak at a time and each needs lines of its own.
    """
    if dist.get_world_size() == 1:
        return [json.loads(json.dumps(value))]
    text = torch.from_numpy(np.frombuffer(json.dumps(value).encode(), dtype=np.uint8).copy())
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([text.numel()]), group)
    longest = max(int(size) for size in sizes)
    padded = torch.nn.functional.pad(text, (0, longest - text.numel()))
    texts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(texts, padded, group)
    return [json.loads(bytes(text[: int(size)].numpy()).decode()) for text, size in zip(texts, sizes)]


def from_main(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Return rank 0's *value* on every rank."""
    return gather_json(value if dist.get_rank() == 0 else None, group)[0]


class RankFailure(RuntimeError):
    """Another rank could not do its part; names the rank and its error."""


def all_or_none(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Do *work* on every rank; when it fails on any, raise the same error on all, so that none waits for another.

    Raises:
        UserError: with the first failing rank's own words, when what failed was a user's mistake.
        RankFailure: names the first rank that failed and its error.
    """
    failure: Exception | None = None
    result: T | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    said = None if failure is None else [isinstance(failure, UserError), _words(failure)]
    for rank, words in enumerate(gather_json(said, group)):
        if words is None:
            continue
        if words[0]:
            raise UserError(words[1]) from failure
        raise RankFailure(f"rank {rank}: {words[1]}") from failure
    return result  # type: ignore[return-value]


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, (UserError, RankFailure)) else f"{type(error).__name__}: {error}"


def warn_of_shared_memory(runtime: Runtime, say: Callable[[str], None]) -> None:
    """Call *say* with each host's `lacks_shared_memory`. Called on every rank."""
    found = gather_json(lacks_shared_memory(runtime.device, runtime.identity.local_world_size))
    for text in dict.fromkeys(text for text in found if text is not None):
        say(text)


def lacks_shared_memory(device: torch.device, ranks: int) -> str | None:
    """A warning where /dev/shm is small for NCCL between *ranks* of this host; None where it is not needed or large enough."""
    if device.type != "cuda" or ranks == 1 or os.environ.get("NCCL_SHM_DISABLE") == "1":
        return None
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return None
    free, needed = found.f_bavail * found.f_frsize, ranks * SHARED_PER_RANK
    if free >= needed:
        return None
    return (
        f"warning: /dev/shm of {platform.node()} has {free >> 20} MB left, but NCCL between {ranks} ranks of a host may need "
        f"{needed >> 20} MB: start the container with --shm-size=1g (Kubernetes: mount an emptyDir of medium Memory there)"
    )
