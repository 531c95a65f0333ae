"""How the ranks find each other, and small facts that they exchange as JSON over the CPU."""

from __future__ import annotations

import ipaddress
import json
import os
import platform
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from bigvision.errors import UserError
from bigvision.runtime.identity import LOOPBACK, Identity

if TYPE_CHECKING:
    from bigvision.runtime.process import Runtime

BACKLOG = 2048
"""Connections that may wait to be accepted: all ranks come at once."""
T = TypeVar("T")
SHARED_PER_RANK = 64 << 20
"""Bytes of /dev/shm that NCCL may take for a rank: some segments of 10 MB. Its manual asks for 1 GB in a container."""


@dataclass
class _Met:
    """The store that this rank has met the others at."""

    others: tuple[object, ...]
    store: dist.Store
    times: int = 0


_met: _Met | None = None
"""Where the store is still in use its port cannot be had again, so it is kept."""


def meet(identity: Identity, timeout: timedelta) -> dist.Store:
    """:func:`make_store`, or the one that the same ranks have met at before, with keys that none of them has used."""
    global _met
    others = (identity, os.environ.get("TORCHELASTIC_RUN_ID"), os.environ.get("TORCHELASTIC_RESTART_COUNT"))
    if _met is None or _met.others != others or identity.launcher == "python":
        _met = None  # its server is gone before another one needs the port
        _met = _Met(others, make_store(identity, timeout))
    _met.times += 1
    # torchrun's store stays when it starts ranks again, and has what the dead ones have said.
    return dist.PrefixStore(f"start{others[2] or 0}-meeting{_met.times}", _met.store)


def make_store(identity: Identity, timeout: timedelta) -> dist.Store:
    """Meet the other ranks: at the launcher's own store where torchrun offers it, else at one that rank 0 serves.

    torch's own listens on every device of the host. This one listens on the address of rank 0 alone, and logs that others can
    reach it where that is not the loopback device.

    Raises:
        UserError: rank 0 cannot listen there.
    """
    if identity.launcher == "python":
        # One rank needs no rendezvous, and so opens no port to others.
        return dist.HashStore()
    if launcher_holds_store():
        store, _, _ = next(dist.rendezvous("env://", identity.rank, identity.world_size, timeout=timeout))
        return store
    serves = identity.rank == 0
    return dist.TCPStore(
        identity.address,
        identity.port,
        identity.world_size,
        serves,
        timeout,
        wait_for_workers=True,
        master_listen_fd=_listen(identity) if serves else None,
    )


def launcher_holds_store() -> bool:
    """Whether the ranks' store is torchrun's own, and not rank 0's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


def _listen(identity: Identity) -> int:
    """A socket for the store, which closes it."""
    address = private_address(identity)
    if not address:
        address = public_address(identity)
        where = f"{address or 'every address of this host'} port {identity.port}"
        print(
            f"warning: the ranks meet at {identity.address}: the store listens on {where}, which is open to the network: "
            "whoever reaches it can disturb the run (docs/launching.md, Safety)",
            file=sys.stderr,
        )
    try:
        listener = _listening_socket(address, identity.port)
    except OSError as error:
        place, why = f"{address or 'any address'} port {identity.port}", os.strerror(error.errno or 0)
        raise UserError(f"environment: rank 0 cannot listen on {place}: {why}: set MASTER_PORT to a free port") from None
    return listener.detach()


def _listening_socket(address: str, port: int) -> socket.socket:
    """A socket that listens at *address*, or at every address of this host where that is empty."""
    if not address and socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=BACKLOG)


def public_address(identity: Identity) -> str:
    """The address of this host at which ranks of other hosts find rank 0; "" where only every address will do.

    That is so where rank 0 is called by an address that its host does not have, as a Kubernetes service is, or by a name that
    means the loopback device to itself, as Debian's /etc/hosts has it.
    """
    try:
        found = socket.getaddrinfo(identity.address, identity.port, type=socket.SOCK_STREAM)
    except OSError:
        return ""
    for address in dict.fromkeys(str(place[0]) for *_, place in found):
        known = ipaddress.ip_address(address.partition("%")[0])
        if known.is_loopback or known.is_unspecified or known.is_link_local:
            continue
        try:
            # Whether this host has the address: any port of it can be bound then.
            _listening_socket(address, 0).close()
        except OSError:
            continue
        return address
    return ""


def private_address(identity: Identity) -> str:
    """The address of the loopback device at which all ranks come, or ``""`` where some come from other hosts."""
    if identity.address == "localhost":
        # Kubeflow's PyTorchJob calls rank 0's pod so to itself, and the other pods use its name.
        return LOOPBACK if identity.world_size == identity.local_world_size else ""
    try:
        return identity.address if ipaddress.ip_address(identity.address).is_loopback else ""
    except ValueError:
        return ""


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
