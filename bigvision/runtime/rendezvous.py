"""The store by which the ranks find each other: it listens on the address at which they meet, and on no other."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from bigvision.errors import UserError
from bigvision.runtime.environment import LOOPBACK, Identity

BACKLOG = 2048
"""Connections that may wait to be accepted: all ranks come at once."""


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
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):
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
