"""Two hosts on this machine: two network namespaces, joined by a cable that can be pulled."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pytest

DEVICE = "eth0"


@dataclass(frozen=True)
class Host:
    """A network of its own: it reaches the other host by its cable and nothing else."""

    name: str
    address: str

    def command(self, arguments: list[str]) -> list[str]:
        """*arguments*, run on this host, once it is started with :data:`ENVIRONMENT`."""
        return ["ip", "netns", "exec", self.name, *arguments]

    def cable(self, plugged: bool) -> None:
        """Pull this host's end of the cable, or put it back: nobody is told, packets get lost."""
        _ip("-n", self.name, "link", "set", DEVICE, "up" if plugged else "down")


ENVIRONMENT = {"GLOO_SOCKET_IFNAME": DEVICE, "NCCL_SOCKET_IFNAME": DEVICE}
"""What commands on a host need: the machine's own name, by which gloo would look for an address, is not known there."""


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Make two hosts; at the end everything that still runs on them is killed.

    Raises:
        subprocess.CalledProcessError: the system does not let this user make them; ``stderr`` says why.
    """
    hosts = tuple(Host(f"bv{os.getpid()}-{number}", f"192.0.2.{number}") for number in (1, 2))
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
        first, second = hosts
        _ip("-n", first.name, "link", "add", DEVICE, "type", "veth", "peer", "name", DEVICE, "netns", second.name)
        for host in hosts:
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", DEVICE)
            for device in ("lo", DEVICE):
                _ip("-n", host.name, "link", "set", device, "up")
        yield first, second
    finally:
        for host in hosts:
            with suppress(subprocess.CalledProcessError):
                for pid in _ip("netns", "pids", host.name).split():
                    with suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                _ip("netns", "delete", host.name)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts for one test, which is left out where they cannot be made."""
    if not shutil.which("ip"):
        pytest.skip("two hosts: there is no `ip` on PATH (Debian: iproute2)")
    try:
        with two_hosts() as made:
            yield made
    except subprocess.CalledProcessError as error:
        pytest.skip(f"two hosts: network namespaces need root and a kernel that has them: {error.stderr.strip()}")


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
