"""Where the ranks meet, and who else can reach it."""

from __future__ import annotations

import os
import socket
from contextlib import closing
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from bigvision.errors import UserError
from bigvision.runtime import Identity, start
from bigvision.runtime.rendezvous import make_store, private_address, public_address
from tests.distributed import free_port, run_ranks

NOW = timedelta(seconds=30)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)


def listening(port: int) -> set[str]:
    """The addresses at which this machine listens at *port*, in the kernel's spelling."""
    found = set()
    for table in ("tcp", "tcp6"):
        with open(f"/proc/net/{table}") as file:
            for line in file.read().splitlines()[1:]:
                address, state = line.split()[1], line.split()[3]
                if state == "0A" and int(address.rsplit(":", 1)[1], 16) == port:
                    found.add(address.rsplit(":", 1)[0])
    return found


def test_ranks_of_one_host_meet_where_nobody_else_can_reach_them(capfd: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    store = make_store(Identity(0, 1, 0, 1, "slurm", "127.0.0.1", port), NOW)
    store.set("key", "value")
    assert store.get("key") == b"value" and listening(port) == {"0100007F"}
    assert capfd.readouterr().err == ""


def test_a_store_that_is_open_to_the_network_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    store = make_store(Identity(0, 1, 0, 1, "slurm", "0.0.0.0", port), NOW)
    store.set("key", "value")
    assert listening(port) & {"0" * 32, "0" * 8}
    said = capfd.readouterr().err
    assert said.startswith("warning: the ranks meet at 0.0.0.0: the store listens on every address of this host port ")
    assert f"port {port}, which is open to the network" in said


def resolved(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> str:
    """The address at which the store of a rank 0 listens whose name means *addresses*."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 1)) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
    return public_address(Identity(0, 4, 0, 2, "slurm", "node1", 1))


def test_the_address_at_which_other_hosts_find_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    listens = socket.create_server
    own = {"10.0.0.1", "fd00::1"}

    def create_server(address: tuple[str, int], **kwargs: Any) -> socket.socket:
        if address[0] not in own:
            raise OSError(99, "Cannot assign requested address")
        return listens(("127.0.0.1", 0))

    monkeypatch.setattr(socket, "create_server", create_server)
    assert resolved(monkeypatch, "10.0.0.1") == "10.0.0.1"
    assert resolved(monkeypatch, "fd00::1", "10.0.0.1") == "fd00::1"
    assert resolved(monkeypatch, "127.0.1.1", "10.0.0.1") == "10.0.0.1", "a host's own name, in Debian's /etc/hosts"
    assert resolved(monkeypatch, "127.0.1.1") == "", "all devices: the others know another address"
    assert resolved(monkeypatch, "10.96.0.7") == "", "all devices: a service's address, which no host has"
    assert resolved(monkeypatch, "0.0.0.0") == "", "asked for"


def test_one_rank_without_a_launcher_opens_nothing() -> None:
    assert isinstance(make_store(Identity(0, 1, 0, 1, "python"), NOW), dist.HashStore)


@pytest.mark.parametrize(
    ("address", "local_world_size", "private"),
    [
        ("127.0.0.1", 2, "127.0.0.1"),
        ("127.0.0.1", 1, "127.0.0.1"),
        ("127.0.1.1", 1, "127.0.1.1"),
        ("::1", 2, "::1"),
        ("localhost", 2, "127.0.0.1"),
        ("localhost", 1, ""),  # rank 0's pod of a PyTorchJob
        ("10.0.0.1", 2, ""),
        ("node1", 2, ""),
    ],
)
def test_private_addresses(address: str, local_world_size: int, private: str) -> None:
    assert private_address(Identity(0, 2, 0, local_world_size, "slurm", address, 1)) == private


def test_a_port_that_is_taken() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}: Address already in use: set MASTER_PORT"):
            make_store(Identity(0, 1, 0, 1, "slurm", "127.0.0.1", port), NOW)


def meet_again() -> list[tuple[int, bool, set[str]]]:
    """Twice, the first process group still in somebody's hands."""
    seen, held = [], []
    for turn in range(2):
        with start("cpu") as runtime:
            held.append(dist.distributed_c10d._get_default_store())
            counted = held[-1].add("counted", 1)
            dist.barrier()
            seen.append((turn, counted <= runtime.world_size, listening(int(os.environ["MASTER_PORT"]))))
    return seen


def test_ranks_meet_again() -> None:
    for seen in run_ranks(meet_again, 3):
        assert seen == [(0, True, {"0100007F"}), (1, True, {"0100007F"})]
