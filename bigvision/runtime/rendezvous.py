"""This process's place among the ranks, from the launcher's environment (`identify`), and where they find each other (`meet`).

Every function raises UserError, with the variable and the fix, where a value has the wrong form or contradicts another, and
where a launcher's variables are there in part. torch is imported only to meet: who a process is takes no seconds to find out.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import socket
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING

from bigvision.errors import UserError

if TYPE_CHECKING:
    import torch.distributed as dist

LOOPBACK = "127.0.0.1"
OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
HYDRA = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
FIRST_OWN_STEP = 0xFFFFFFF0
"""Steps from here on are Slurm's own: a batch script, an interactive shell. Programs in them are not started by srun."""
BACKLOG = 2048
"""Connections that may wait to be accepted: all ranks come at once."""


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

    def check(self, names: Sequence[str]) -> Identity:
        """This identity, if its numbers fit together. *names*: what the launcher calls the first four."""
        if not 0 <= self.rank < self.world_size:
            raise UserError(
                f"environment: {names[0]}={self.rank} must be from 0 to {names[1]}-1 ({names[1]}={self.world_size})"
            )
        if not 0 <= self.local_rank < self.local_world_size:
            raise UserError(
                f"environment: {names[2]}={self.local_rank} must be from 0 to {names[3]}-1 ({self.local_world_size} ranks here)"
            )
        return self


def number(environ: Mapping[str, str], name: str, least: int = 0) -> int:
    """Return the whole number that *name* holds."""
    text = environ[name]
    # int() takes more than launchers write: "1_0", " 1", other scripts' digits.
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        raise UserError(f"environment: {name}={text!r} is not a whole number: unset it or start with torchrun")
    if int(text) < least:
        raise UserError(f"environment: {name}={text} must be at least {least}")
    return int(text)


def host(environ: Mapping[str, str], name: str) -> str:
    """Return the host's name or address that *name* holds."""
    if not is_host(environ[name]):
        raise UserError(f"environment: {name}={environ[name][:80]!r} is not the name or the address of a host")
    return environ[name]


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
    """Return the TCP port that *name* holds."""
    value = number(environ, name, least=1)
    if value > 65535:
        raise UserError(f"environment: {name}={value} is not a port: they end at 65535")
    return value


def meeting(identity: Identity, environ: Mapping[str, str], first: str, number_of_run: int, fix: str) -> Identity:
    """*identity* with the place where the ranks meet: MASTER_ADDR and MASTER_PORT where the user has set them.

    *first* is the host of rank 0, as far as the launcher names it; not needed where all ranks are on this host. *fix* says what
    to do where nothing names it. *number_of_run*, which makes the port, is the same for all ranks of a run and another for the
    next run.
    """
    here = LOOPBACK if identity.local_world_size == identity.world_size else first
    address = host(environ, "MASTER_ADDR") if environ.get("MASTER_ADDR") else here
    if not address:
        raise UserError(fix)
    # Below the ports that systems give to clients (from 32768) and Kubernetes to services (from 30000).
    found = port(environ, "MASTER_PORT") if environ.get("MASTER_PORT") else 15000 + number_of_run % 15000
    return replace(identity, address=address, port=found)


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set these environment variables in here, and set them back at the end."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def announced(identity: Identity) -> AbstractContextManager[None]:
    """Set torch's variables in here where the launcher did not: DeepSpeed would ask MPI instead, and libraries read them."""
    values: dict[str, object] = {"LOCAL_RANK": identity.local_rank}
    if identity.address:
        values |= {
            "RANK": identity.rank, "WORLD_SIZE": identity.world_size, "LOCAL_WORLD_SIZE": identity.local_world_size,
            "MASTER_ADDR": identity.address, "MASTER_PORT": identity.port,
        }  # fmt: skip
    return environment({name: str(value) for name, value in values.items() if not os.environ.get(name)})


def _complete(environ: Mapping[str, str], needed: Sequence[str], fix: str, shown: Sequence[str] = ()) -> None:
    """Raise `UserError` where some of the variables *needed* are missing. It shows the others, or those of *shown*."""
    if missing := [name for name in needed if not environ.get(name)]:
        given = ", ".join(f"{name}={environ[name]}" for name in shown or needed if name not in missing)
        raise UserError(f"environment: {given} without {', '.join(missing)}: {fix}")


def _from_mpi(environ: Mapping[str, str]) -> Identity | None:
    """One rank per process of Open MPI's mpirun, or of mpiexec.hydra, which does not number its runs."""
    if any(environ.get(name) for name in OPEN_MPI):
        launcher, names, flag, run = "open mpi", OPEN_MPI, "mpirun -x MASTER_ADDR=HOST", environ.get("PMIX_NAMESPACE", "")
    elif environ.get("MPI_LOCALRANKID"):  # Slurm sets PMI_RANK too, but no local rank
        launcher, names, flag, run = "mpich", HYDRA, "mpiexec -genv MASTER_ADDR HOST", ""
    else:
        return None
    _complete(environ, names, "start the ranks with mpirun, which sets them all, or unset them to run on one rank")
    rank, world_size, local_rank, local_world_size = (number(environ, name) for name in names)
    found = Identity(rank, world_size, local_rank, local_world_size, launcher).check(names)
    # mpirun's own host is known, and need not be rank 0's; of its addresses any may be the one that others reach.
    fix = (
        f"environment: {names[1]}={world_size} ranks on several hosts ({local_world_size} here) without MASTER_ADDR: "
        f"name the host of rank 0, the first in the list of hosts: {flag}"
    )
    return meeting(found, environ, "", zlib.crc32(run.encode()), fix)


def _from_slurm(environ: Mapping[str, str]) -> Identity | None:
    """One rank per task of an srun.

    In a batch script, and under salloc, Slurm's variables are set too, SLURM_PROCID=0 and SLURM_NTASKS=8 among them, but
    nothing has started the other tasks: a program there is the only rank. srun alone sets SLURM_STEP_*, and
    SLURM_STEP_NUM_TASKS counts what it started where SLURM_NTASKS may still be the whole job's. A shell that salloc opens is a
    step of its own, by number.
    """
    step = environ.get("SLURM_STEP_ID", "")
    if not step or not environ.get("SLURM_STEP_NUM_TASKS") or number(environ, "SLURM_STEP_ID") >= FIRST_OWN_STEP:
        return None
    needed = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE")
    fix = "start the ranks with srun, which sets them all, or unset SLURM_STEP_ID to run on one rank"
    _complete(environ, needed, fix, shown=["SLURM_STEP_ID"])
    each = list(islice(tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"]), 1 << 20))
    node = number(environ, "SLURM_NODEID")
    if node >= len(each):
        raise UserError(
            f"environment: SLURM_NODEID={node} is not among the {len(each)} hosts of SLURM_STEP_TASKS_PER_NODE="
            f"{environ['SLURM_STEP_TASKS_PER_NODE'][:80]}"
        )
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
    rank, world_size, local_rank = (number(environ, name) for name in names[:3])
    found = Identity(rank, world_size, local_rank, each[node], "slurm").check(names)
    hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    fix = "environment: a step on several hosts without SLURM_STEP_NODELIST: set MASTER_ADDR to the host of rank 0"
    first = LOOPBACK if len(each) == 1 else first_host(hosts) if hosts else ""
    # Steps of a job run side by side; jobs follow each other.
    return meeting(found, environ, first, number(environ, "SLURM_JOB_ID") + 997 * int(step), fix)


def tasks_per_node(text: str) -> Iterator[int]:
    """How many tasks each host has, in order, from Slurm's short form: "2(x3),1" is 2, 2, 2, 1."""
    for part in text.split(","):
        found = re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", part)
        if not found:
            raise UserError(f"environment: SLURM_STEP_TASKS_PER_NODE={text[:80]!r} is not of the form 2(x3),1")
        yield from [int(found[1])] * int(found[2] or 1)


def first_host(text: str) -> str:
    """The first host of a list in Slurm's short form: "n[01-03,7],m2" is n01."""
    # Commas separate hosts, and ranges in brackets.
    host = r"(?:[^\[\],]|\[[^\[\]]*\])+"
    if not re.fullmatch(rf"{host}(,{host})*", text):
        raise UserError(f"environment: SLURM_STEP_NODELIST={text[:80]!r} is not a list of hosts such as n[1-3,7],m2")
    name = re.findall(host, text)[0]
    for ranges in re.findall(r"\[([^\]]*)\]", name):
        if not re.fullmatch(r"[0-9]{1,9}(-[0-9]{1,9})?(,[0-9]{1,9}(-[0-9]{1,9})?)*", ranges):
            raise UserError(f"environment: SLURM_STEP_NODELIST={text[:80]!r}: [{ranges[:40]}] is not a range such as [1-3,7]")
        name = name.replace(f"[{ranges}]", re.split("[-,]", ranges)[0], 1)
    if not is_host(name):
        raise UserError(f"environment: SLURM_STEP_NODELIST={text[:80]!r} does not begin with a host: set MASTER_ADDR")
    return name


def identify(environ: Mapping[str, str]) -> Identity:
    """Read the launcher's environment; without one this process is the only rank."""
    for resolve in RESOLVERS:
        if found := resolve(environ):
            return found
    return Identity(rank=0, world_size=1, local_rank=0, local_world_size=1, launcher="python")


def _from_torch_environment(environ: Mapping[str, str]) -> Identity | None:
    """torchrun, accelerate launch and the deepspeed launcher set these variables; a worker needs all of them."""
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    # MASTER_* alone are often exported in a shell or an image and start nothing.
    if not any(environ.get(name) for name in needed[:3]):
        return None
    fix = "start the ranks with torchrun or accelerate launch, which set them all, or unset them to run on one rank"
    _complete(environ, needed, fix)
    rank, world_size, local_rank = (number(environ, name) for name in needed[:3])
    local_name = "LOCAL_WORLD_SIZE" if environ.get("LOCAL_WORLD_SIZE") else "LOCAL_SIZE"
    local_world_size = number(environ, local_name) if environ.get(local_name) else world_size
    launcher = next((name for key, name in _LAUNCHERS.items() if environ.get(key)), "torch environment")
    place = host(environ, "MASTER_ADDR"), port(environ, "MASTER_PORT")
    return Identity(rank, world_size, local_rank, local_world_size, launcher, *place).check([*needed[:3], local_name])


def _from_pytorchjob(environ: Mapping[str, str]) -> Identity | None:
    """Kubeflow's PyTorchJob (v1) names the rank of a pod, in which one process runs unless torchrun starts more."""
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    # On a machine of one's own the same four are a launch that forgot LOCAL_RANK: every rank would take the first device.
    local = any(environ.get(name) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
    if local or not environ.get("KUBERNETES_SERVICE_HOST") or not all(environ.get(name) for name in needed):
        return None
    each = environ.get("PET_NPROC_PER_NODE", "")
    if each not in ("", "1"):
        raise UserError(
            f"environment: PET_NPROC_PER_NODE={each[:20]} asks for several ranks in a pod: start them with "
            "`torchrun launch/train.py`, which reads it, instead of `python launch/train.py`"
        )
    rank, world_size, place = number(environ, "RANK"), number(environ, "WORLD_SIZE"), host(environ, "MASTER_ADDR")
    return Identity(rank, world_size, 0, 1, "pytorchjob", place, port(environ, "MASTER_PORT")).check(needed[:2])


def _from_sagemaker(environ: Mapping[str, str]) -> Identity | None:
    """SageMaker's torchrun sets torch's variables; without it each instance would train alone and write over the others."""
    try:
        hosts = json.loads(environ.get("SM_HOSTS") or "[]")
    except ValueError:
        raise UserError(f"environment: SM_HOSTS={environ['SM_HOSTS'][:80]!r} is not a list in JSON") from None
    if isinstance(hosts, list) and len(hosts) > 1:
        raise UserError(
            f"environment: SM_HOSTS names {len(hosts)} hosts, and nothing has started ranks on them: "
            "add distributed=Torchrun() to the ModelTrainer, as launch/sagemaker/submit.py does"
        )
    return None


# accelerate starts its ranks through torch's launcher, so its mark is looked for first.
_LAUNCHERS = {"ACCELERATE_MIXED_PRECISION": "accelerate", "TORCHELASTIC_RUN_ID": "torchrun", "LOCAL_SIZE": "deepspeed"}

RESOLVERS: list[Callable[[Mapping[str, str]], Identity | None]] = [
    _from_pytorchjob,
    _from_torch_environment,  # before those that start it: torchrun under srun
    _from_mpi,  # before Slurm, by which mpirun starts its daemons
    _from_slurm,
    _from_sagemaker,
]
"""Tried in order; each knows one launcher's variables and returns None when they are not there."""

_stores: dict[tuple[object, ...], dist.Store] = {}
"""The store at which this rank has met the others: while it is in use its port cannot be had again, so it is kept."""
_meetings = 0
"""At that store."""


def meet(identity: Identity, timeout: timedelta) -> dist.Store:
    """`make_store`, or the store at which the same ranks have met before, with keys that none of them has used."""
    import torch.distributed as dist

    global _meetings
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    others = (identity, os.environ.get("TORCHELASTIC_RUN_ID"), start)
    if others not in _stores or identity.launcher == "python":
        _stores.clear()  # its server ends before another one needs the port
        _stores[others], _meetings = make_store(identity, timeout), 0
    _meetings += 1
    # torchrun's store stays when it starts ranks again, and has the keys of the dead ones.
    return dist.PrefixStore(f"start{start or 0}-meeting{_meetings}", _stores[others])


def make_store(identity: Identity, timeout: timedelta) -> dist.Store:
    """Meet the other ranks: at the launcher's own store where torchrun offers it, else at one that rank 0 serves.

    torch's own listens on every device of the host. This one listens on the address of rank 0 alone, and logs that others can
    reach it where that is not the loopback device.
    """
    import torch.distributed as dist

    if identity.launcher == "python":
        # One rank needs no rendezvous, and so opens no port to others.
        return dist.HashStore()
    if launcher_holds_store():
        store, _, _ = next(dist.rendezvous("env://", identity.rank, identity.world_size, timeout=timeout))
        return store
    return dist.TCPStore(
        identity.address, identity.port, identity.world_size, identity.rank == 0, timeout, wait_for_workers=True,
        master_listen_fd=_listen(identity) if identity.rank == 0 else None,
    )  # fmt: skip


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
