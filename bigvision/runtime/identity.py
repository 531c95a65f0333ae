"""This process's place among the ranks, read from the launcher's environment (`identify`, `RESOLVERS`).

All functions raise UserError, with the variable and the fix, where a value has the wrong form or contradicts others, and where
a launcher's variables are there in part.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import islice, product

from bigvision.errors import UserError

LOOPBACK = "127.0.0.1"
OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
HYDRA = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
FIRST_OWN_STEP = 0xFFFFFFF0
"""Steps from here on are Slurm's own: a batch script, an interactive shell. Programs in them are not started by srun."""


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


def place(launcher: str, names: tuple[str, str, str, str], values: tuple[int, int, int, int]) -> Identity:
    """An identity without an address, once its numbers fit together.

    Args:
        names: what the launcher calls rank, world size, local rank and local world size.
    """
    rank, world_size, local_rank, local_world_size = values
    if not 0 <= rank < world_size:
        raise UserError(f"environment: {names[0]}={rank} must be from 0 to {names[1]}-1 ({names[1]}={world_size})")
    if not 0 <= local_rank < local_world_size:
        raise UserError(f"environment: {names[2]}={local_rank} must be from 0 to {names[3]}-1 ({local_world_size} ranks here)")
    return Identity(rank, world_size, local_rank, local_world_size, launcher)


def meeting_point(environ: Mapping[str, str], alone: bool, first: str, number_of_run: int, fix: str) -> tuple[str, int]:
    """Where the ranks of a launcher that does not say it meet: MASTER_ADDR and MASTER_PORT where the user has set them.

    Args:
        alone: all ranks are on this host, and need nobody from outside.
        first: the host of rank 0, as far as the launcher tells.
        number_of_run: the same for all ranks of a run and another for the next run; makes the port.
        fix: what to do where nothing tells the host of rank 0.
    """
    address = host(environ, "MASTER_ADDR") if environ.get("MASTER_ADDR") else LOOPBACK if alone else first
    if not address:
        raise UserError(fix)
    if environ.get("MASTER_PORT"):
        return address, port(environ, "MASTER_PORT")
    # Below the ports that systems give to clients (from 32768) and Kubernetes to services (from 30000).
    return address, 15000 + number_of_run % 15000


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


def from_open_mpi(environ: Mapping[str, str]) -> Identity | None:
    """One rank per process of Open MPI's mpirun."""
    return _from_variables(environ, "open mpi", OPEN_MPI, "mpirun -x MASTER_ADDR=HOST", environ.get("PMIX_NAMESPACE", ""))


def from_hydra(environ: Mapping[str, str]) -> Identity | None:
    """One rank per process of mpiexec.hydra, which does not number its runs. Slurm sets PMI_RANK too, but no local rank."""
    if not environ.get("MPI_LOCALRANKID"):
        return None
    return _from_variables(environ, "mpich", HYDRA, "mpiexec -genv MASTER_ADDR HOST", "")


def _from_variables(
    environ: Mapping[str, str], launcher: str, names: tuple[str, str, str, str], flag: str, run: str
) -> Identity | None:
    if not any(environ.get(name) for name in names):
        return None
    _complete(environ, names, "start the ranks with mpirun, which sets them all, or unset them to run on one rank")
    rank, world_size, local_rank, local_world_size = (number(environ, name) for name in names)
    found = place(launcher, names, (rank, world_size, local_rank, local_world_size))
    address, port = meeting_point(
        environ,
        alone=local_world_size == world_size,
        # mpirun's own host is known, and need not be rank 0's; of its addresses any may be the one that others reach.
        first="",
        number_of_run=zlib.crc32(run.encode()),
        fix=f"environment: {names[1]}={world_size} ranks on several hosts ({local_world_size} here) without MASTER_ADDR: "
        f"name the host of rank 0, the first in the list of hosts: {flag}",
    )
    return replace(found, address=address, port=port)


def from_step(environ: Mapping[str, str]) -> Identity | None:
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
    rank, local_rank = number(environ, names[0]), number(environ, names[2])
    found = place("slurm", names, (rank, number(environ, names[1], least=1), local_rank, each[node]))
    hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    address, port = meeting_point(
        environ,
        alone=len(each) == 1,
        first=first_host(hosts) if hosts and len(each) > 1 else "",
        # Steps of a job run side by side; jobs follow each other.
        number_of_run=number(environ, "SLURM_JOB_ID") + 997 * int(step),
        fix="environment: a step on several hosts without SLURM_STEP_NODELIST: set MASTER_ADDR to the host of rank 0",
    )
    return replace(found, address=address, port=port)


def tasks_per_node(text: str) -> Iterator[int]:
    """How many tasks each host has, in order, from Slurm's short form: "2(x3),1" is 2, 2, 2, 1."""
    for part in text.split(","):
        found = re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", part)
        if not found:
            raise UserError(f"environment: SLURM_STEP_TASKS_PER_NODE={text[:80]!r} is not of the form 2(x3),1")
        for _ in range(int(found[2] or 1)):
            yield int(found[1])


def first_host(text: str) -> str:
    """The first host of a list in Slurm's short form: "n[01-03,7],m2" is n01."""
    name = next(hosts(text), "")
    if not is_host(name):
        raise UserError(f"environment: SLURM_STEP_NODELIST={text[:80]!r} does not begin with a host: set MASTER_ADDR")
    return name


def hosts(text: str) -> Iterator[str]:
    """The hosts of a list in Slurm's short form, in order: "n[01-03,7],m2" is n01, n02, n03, n7, m2."""
    # Commas separate hosts, and ranges in brackets.
    if not re.fullmatch(r"([^\[\],]|\[[^\[\]]*\])+(,([^\[\],]|\[[^\[\]]*\])+)*", text):
        raise UserError(f"environment: SLURM_STEP_NODELIST={text[:80]!r} is not a list of hosts such as n[1-3,7],m2")
    for name in re.findall(r"(?:[^\[\],]|\[[^\[\]]*\])+", text):
        pieces = re.split(r"\[([^\]]*)\]", name)  # text and ranges in turn
        for chosen in product(*(list(_range(piece, text)) if odd % 2 else [piece] for odd, piece in enumerate(pieces))):
            yield "".join(chosen)


def _range(ranges: str, text: str) -> Iterator[str]:
    for part in ranges.split(","):
        found = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part)
        if not found:
            raise UserError(f"environment: SLURM_STEP_NODELIST={text[:80]!r}: [{ranges[:40]}] is not a range such as [1-3,7]")
        first, last = int(found[1]), int(found[2] or found[1])
        # The first number's zeros are the names' too. A range of millions is no list of hosts.
        for value in islice(range(first, last + 1), 1 << 16):
            yield str(value).zfill(len(found[1]))


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
    found = place(launcher, (*needed[:3], local_name), (rank, world_size, local_rank, local_world_size))
    return replace(found, address=host(environ, "MASTER_ADDR"), port=port(environ, "MASTER_PORT"))


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
    found = place("pytorchjob", (*needed[:2], "", ""), (number(environ, "RANK"), number(environ, "WORLD_SIZE"), 0, 1))
    return replace(found, address=host(environ, "MASTER_ADDR"), port=port(environ, "MASTER_PORT"))


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
    from_open_mpi,  # before Slurm, by which mpirun starts its daemons
    from_hydra,
    from_step,
    _from_sagemaker,
]
"""Tried in order; each knows one launcher's variables and returns None when they are not there."""
