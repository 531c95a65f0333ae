"""Two hosts, as network namespaces joined by a pair of virtual Ethernet devices, and the link between them taken down."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from tests.distributed import free_port
from tests.launch.commands import BIN, ROOT
from tests.recipes import lines, recipe

LIMIT = 4.0
PATIENCE = 180.0
"""Seconds for the start of ranks on a busy machine."""


def ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run iproute2's command."""
    return subprocess.run(["ip", *arguments], capture_output=True, text=True)


def missing() -> str:
    """Why there can be no namespaces here; empty where there can."""
    if not shutil.which("ip"):
        return "two hosts need iproute2, and there is no ip on PATH"
    probe = f"bigvision-{secrets.token_hex(3)}"
    made = ip("netns", "add", probe)
    ip("netns", "delete", probe)
    return "" if made.returncode == 0 else f"two hosts need the right to make network namespaces: {made.stderr.strip()}"


class Hosts:
    """Two namespaces with an address each."""

    addresses = ("10.213.77.1", "10.213.77.2")

    def __init__(self) -> None:
        self.tag = secrets.token_hex(3)
        self.names = [f"bigvision-{self.tag}-{number}" for number in range(2)]
        self.links = [f"bv{self.tag}{number}" for number in range(2)]

    def begin(self) -> None:
        commands = [["netns", "add", name] for name in self.names]
        commands.append(["link", "add", self.links[0], "netns", self.names[0], "type", "veth", "peer", "name", self.links[1],
                         "netns", self.names[1]])  # fmt: skip
        for name, link, address in zip(self.names, self.links, self.addresses):
            commands.append(["-n", name, "addr", "add", f"{address}/24", "dev", link])
            commands += [["-n", name, "link", "set", device, "up"] for device in ("lo", link)]
        for command in commands:
            done = ip(*command)
            assert done.returncode == 0, (command, done.stderr)

    def part(self) -> None:
        """Take the link down."""
        assert ip("-n", self.names[0], "link", "set", self.links[0], "down").returncode == 0

    def torchrun(self, number: int, port: int, said: Path, *arguments: str) -> subprocess.Popen[bytes]:
        """Start two ranks on a host."""
        command = [
            "ip", "netns", "exec", self.names[number], str(BIN / "torchrun"), "--nnodes", "2", "--node-rank", str(number),
            "--nproc-per-node", "2", "--master-addr", self.addresses[0], "--master-port", str(port), *arguments,
        ]  # fmt: skip
        variables = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self.links[number]}
        with said.open("wb") as file:
            return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=file, stderr=file)

    def python(self, number: int, code: str, *arguments: str) -> subprocess.Popen[str]:
        """Start Python code on a host."""
        command = ["ip", "netns", "exec", self.names[number], sys.executable, "-c", code, *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def end(self) -> None:
        for name in self.names:
            ip("netns", "delete", name)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    # Asked here, not when tests are collected: it makes a namespace.
    if reason := missing():
        pytest.skip(reason)
    found = Hosts()
    try:
        found.begin()
        yield found
    finally:
        found.end()


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


SERVE = """
import sys
from datetime import timedelta
from bigvision.runtime import Identity
from bigvision.runtime.rendezvous import make_store

store = make_store(Identity(0, 2, 0, 1, "slurm", sys.argv[1], int(sys.argv[2])), timedelta(seconds=60))
store.set("key", "value")
print(store.get("met").decode(), flush=True)
"""
CONNECT = """
import socket, sys, time
from datetime import timedelta
import torch.distributed as dist

address, other, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
store = dist.TCPStore(address, port, 2, False, timedelta(seconds=60))
assert store.get("key") == b"value"
try:
    socket.create_connection((other, port), timeout=5).close()
except ConnectionRefusedError:
    store.set("met", "refused")
else:
    store.set("met", "open")
"""


@pytest.mark.long
def test_the_store_listens_where_the_ranks_meet_and_nowhere_else(hosts: Hosts) -> None:
    """A host with two networks: through the other one nobody reaches the store."""
    address, other, port = hosts.addresses[0], "10.213.78.1", str(free_port())
    assert ip("-n", hosts.names[0], "addr", "add", f"{other}/24", "dev", hosts.links[0]).returncode == 0
    assert ip("-n", hosts.names[1], "route", "add", "10.213.78.0/24", "dev", hosts.links[1]).returncode == 0
    server, client = hosts.python(0, SERVE, address, port), hosts.python(1, CONNECT, address, other, port)
    try:
        said, warning = server.communicate(timeout=PATIENCE)
        assert said == "refused\n", (said, warning, client.communicate(timeout=10))
        assert f"the store listens on {address} port {port}, which is open to the network" in warning
    finally:
        server.kill()
        client.kill()


@pytest.mark.long
def test_the_link_between_two_hosts_is_taken_down(hosts: Hosts, tmp_path: Path) -> None:
    """The ranks of each host end and name those of the other, though only one has the store."""
    out, path = tmp_path / "out", tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(out, train={"steps": 100_000}, limits={"start": PATIENCE, "step": LIMIT})))
    said = [tmp_path / f"said-{number}" for number in range(2)]
    rest = ["-m", "tests.runtime.hangs", str(path), "step", "none"]
    port = free_port()
    launchers = [hosts.torchrun(number, port, said[number], *rest) for number in range(2)]
    try:
        deadline = time.monotonic() + PATIENCE
        while not (out / "metrics.jsonl").exists() or len(lines(out)) < 3:
            assert time.monotonic() < deadline and launchers[0].poll() is None, said[0].read_text() + said[1].read_text()
            time.sleep(0.1)
        pids = [int((tmp_path / f"pid-{rank}").read_text()) for rank in range(4)]
        hosts.part()
        since = time.monotonic()
        while any(map(runs, pids)) and time.monotonic() - since < 10 * LIMIT:
            time.sleep(0.05)
        after = time.monotonic() - since
    finally:
        # Those of the second host would wait for their store before they end.
        for launcher in launchers:
            launcher.kill()
            launcher.wait()
        for file in tmp_path.glob("pid-*"):
            with suppress(ProcessLookupError):
                os.kill(int(file.read_text()), signal.SIGKILL)
    texts = [file.read_text() for file in said]
    assert after < 2 * LIMIT, (after, texts)
    here = dict(re.findall(r"^error: rank (\d): (limits\.step: 4 s ran out on rank .*)$", texts[0], re.M))
    there = dict(re.findall(r"^error: rank (\d): (limits\.step: 4 s ran out on rank .*)$", texts[1], re.M))
    assert here.keys() == {"0", "1"} and there.keys() == {"2", "3"}, texts
    assert all(re.search("rank 2 does not answer .*; rank 3 does not answer ", text) for text in here.values()), here
    assert all(re.search(r": ranks 0 and 1 on host \S+ cannot be reached: the store at ", text) for text in there.values()), (
        there
    )
    assert sorted(file.name for file in (out / "stacks").iterdir()) == [f"rank-{rank}.txt" for rank in range(4)]
