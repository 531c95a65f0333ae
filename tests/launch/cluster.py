"""A Slurm cluster of two nodes on this machine, for as long as a test needs it."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed import free_port
from tests.launch.commands import BIN, ROOT

PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "scancel", "scontrol", "sinfo")

# Both nodes are this machine, each named by an address of its own, so that what Slurm calls rank 0's host can be reached.
CONFIGURATION = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0
PriorityType=priority/basic
ReturnToService=2
KillWait=10
LaunchParameters=use_interactive_step
InteractiveStepOptions="--interactive --preserve-env {python} {folder}/who.py"
NodeName=127.0.0.1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={first} CPUs=2 State=UNKNOWN
NodeName=127.0.0.2 NodeHostname=localhost NodeAddr=127.0.0.2 Port={second} CPUs=2 State=UNKNOWN
PartitionName=main Nodes=127.0.0.[1-2] Default=YES MaxTime=INFINITE State=UP
"""

# Prints what a process takes itself for. The package's own modules need no torch, which the package as a whole imports.
WHO = """
import os, sys, types
package = sys.modules["bigvision.runtime"] = types.ModuleType("bigvision.runtime")
package.__path__ = ["{package}"]
from bigvision.runtime.rendezvous import identify
who = identify(os.environ)
print(who.launcher, who.rank, who.world_size, who.local_rank, who.local_world_size, who.address, flush=True)
"""


@dataclass(frozen=True)
class Cluster:
    """Where it is, and how to speak to it."""

    folder: Path

    def start(self, command: list[str], timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run one of Slurm's programs from the project's folder to its end."""
        return subprocess.run(
            command, cwd=ROOT, env=self.environment() | environment, capture_output=True, text=True, timeout=timeout
        )

    def ask(self, *command: str) -> str:
        """Run one of Slurm's programs, which has to succeed, and return what it printed."""
        done = self.start(list(command))
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def environment(self) -> dict[str, str]:
        ours = {"SLURM_CONF": str(self.folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
        return os.environ | ours | {"PATH": f"{BIN}{os.pathsep}{path()}"}

    @property
    def who(self) -> str:
        """A program that prints what it takes itself for."""
        return str(self.folder / "who.py")


def path() -> str:
    """PATH with the folders of daemons, which users often lack."""
    return os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))


@contextmanager
def run_cluster() -> Iterator[Cluster]:
    """Start a controller and two nodes, and stop them with all that runs on them."""
    daemons: list[subprocess.Popen[bytes]] = []
    # Paths of sockets have to be short, which pytest's folders are not.
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        cluster = Cluster(Path(name))
        _write(cluster.folder)
        try:
            for command in (["slurmctld"], ["slurmd", "-N", "127.0.0.1"], ["slurmd", "-N", "127.0.0.2"]):
                program = shutil.which(command[0], path=path())
                assert program
                log = (cluster.folder / f"{'-'.join(command)}.log").open("wb")
                daemons.append(
                    subprocess.Popen(
                        [program, "-D", *command[1:]], env=cluster.environment(), stdout=log, stderr=log, cwd=cluster.folder
                    )
                )
                log.close()
            _wait(cluster, daemons)
            yield cluster
        finally:
            _stop(cluster, daemons)


def _write(folder: Path) -> None:
    for part in ("state", "127.0.0.1", "127.0.0.2"):
        (folder / part).mkdir()
    ports = {"controller": free_port(), "first": free_port(), "second": free_port()}
    text = CONFIGURATION.format(folder=folder, user=getpass.getuser(), python=sys.executable, **ports)
    (folder / "slurm.conf").write_text(text)
    (folder / "who.py").write_text(WHO.format(package=ROOT / "bigvision" / "runtime"))


def _wait(cluster: Cluster, daemons: list[subprocess.Popen[bytes]]) -> None:
    end = time.monotonic() + 60
    while cluster.start(["sinfo", "-h", "-N", "-o", "%T"]).stdout.split() != ["idle", "idle"]:
        ended = any(daemon.poll() is not None for daemon in daemons)
        if ended or time.monotonic() > end:
            said = "".join(log.read_text() for log in sorted(cluster.folder.glob("*.log")))
            if "plugin" in said and "none" in said:
                pytest.skip("Slurm: this build has no auth/none")
            raise AssertionError(said)
        time.sleep(0.2)


def _stop(cluster: Cluster, daemons: list[subprocess.Popen[bytes]]) -> None:
    if daemons and daemons[0].poll() is None:
        cluster.start(["scancel", "--signal=KILL", "--full", "--user", getpass.getuser()], timeout=30)
        cluster.start(["scancel", "--user", getpass.getuser()], timeout=30)
        end = time.monotonic() + 20
        while time.monotonic() < end and cluster.start(["squeue", "-h"]).stdout:
            time.sleep(0.2)
    for daemon in daemons:
        daemon.terminate()
    for daemon in daemons:
        try:
            daemon.wait(20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes for the tests of a file, which are left out where Slurm is not installed."""
    if missing := [program for program in PROGRAMS if not shutil.which(program, path=path())]:
        pytest.skip(f"Slurm: there is no {', '.join(missing)} on PATH (Debian: slurm-wlm)")
    with run_cluster() as running:
        yield running
