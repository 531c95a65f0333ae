"""Two hosts, as network namespaces joined by a pair of virtual Ethernet devices, and the link between them taken down."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
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
