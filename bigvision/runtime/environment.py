"""What launchers say in environment variables, checked before it is used, and the variables that libraries read."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from bigvision.errors import UserError


@dataclass(frozen=True)
class Identity:
    """This process among all that run together."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str
    address: str = ""
    """Where rank 0 is found; empty where there is one rank, which meets nobody."""
    port: int = 0


LOOPBACK = "127.0.0.1"


def number(environ: Mapping[str, str], name: str, least: int = 0) -> int:
    """Return the whole number that *name* holds.

    Raises:
        UserError: it is not a whole number, or below *least*.
    """
    text = environ[name]
    # int() takes more than launchers write: "1_0", " 1", other scripts' digits.
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        raise UserError(f"environment: {name}={text!r} is not a whole number: unset it or start with torchrun")
    if int(text) < least:
        raise UserError(f"environment: {name}={text} must be at least {least}")
    return int(text)


def host(environ: Mapping[str, str], name: str) -> str:
    """Return the host's name or address that *name* holds.

    Raises:
        UserError: no host is called so.
    """
    text = environ[name]
    if not is_host(text):
        raise UserError(f"environment: {name}={text[:80]!r} is not the name or the address of a host")
    return text


def is_host(text: str) -> bool:
    """Whether a host may be called *text*: letters, digits, dots, hyphens and underscores, or an IPv6 address."""
    # A leading hyphen would be a flag to whatever program gets the name.
    if re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?", text):
        return True
    try:
        # %eth0 names a device of this host; what follows the sign is free text.
        return "%" not in text and ipaddress.ip_address(text).version == 6
    except ValueError:
        return False


def port(environ: Mapping[str, str], name: str) -> int:
    """Return the TCP port that *name* holds.

    Raises:
        UserError: it is not from 1 to 65535.
    """
    value = number(environ, name, least=1)
    if value > 65535:
        raise UserError(f"environment: {name}={value} is not a port: they end at 65535")
    return value


def place(launcher: str, names: tuple[str, str, str, str], values: tuple[int, int, int, int]) -> Identity:
    """An identity without an address, once its numbers fit together.

    Args:
        names: what the launcher calls rank, world size, local rank and local world size.

    Raises:
        UserError: they do not fit.
    """
    rank, world_size, local_rank, local_world_size = values
    if not 0 <= rank < world_size:
        raise UserError(f"environment: {names[0]}={rank} must be from 0 to {names[1]}-1 ({names[1]}={world_size})")
    if not 0 <= local_rank < local_world_size:
        raise UserError(f"environment: {names[2]}={local_rank} must be from 0 to {names[3]}-1 ({local_world_size} ranks here)")
    return Identity(rank, world_size, local_rank, local_world_size, launcher)


def meeting_point(environ: Mapping[str, str], alone: bool, first: str, number_of_run: int, mend: str) -> tuple[str, int]:
    """Where the ranks of a launcher that does not say it meet: MASTER_ADDR and MASTER_PORT where the user has set them.

    Args:
        alone: all ranks are on this host, and need nobody from outside.
        first: the host of rank 0, as far as the launcher tells.
        number_of_run: the same for all ranks of a run and another for the next run; makes the port.
        mend: what to do where nothing tells the host of rank 0.

    Raises:
        UserError: the ranks are on several hosts and nothing tells which is rank 0's; or the variables hold no host or port.
    """
    address = host(environ, "MASTER_ADDR") if environ.get("MASTER_ADDR") else LOOPBACK if alone else first
    if not address:
        raise UserError(mend)
    if environ.get("MASTER_PORT"):
        return address, port(environ, "MASTER_PORT")
    # Below the ports that systems give to clients (from 32768) and Kubernetes to services (from 30000).
    return address, 15000 + number_of_run % 15000


@contextmanager
def announced(identity: Identity) -> Iterator[None]:
    """Set torch's variables in here where the launcher did not: DeepSpeed would ask MPI instead, and libraries read them."""
    values = {"LOCAL_RANK": str(identity.local_rank)}
    if identity.address:
        values |= {
            "RANK": str(identity.rank),
            "WORLD_SIZE": str(identity.world_size),
            "LOCAL_WORLD_SIZE": str(identity.local_world_size),
            "MASTER_ADDR": identity.address,
            "MASTER_PORT": str(identity.port),
        }
    added = {name: value for name, value in values.items() if not os.environ.get(name)}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
