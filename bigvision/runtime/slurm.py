"""This process's place in a Slurm step, from what srun sets; nothing is asked of Slurm's own programs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice, product

from bigvision.errors import UserError
from bigvision.runtime.environment import Identity, is_host, meeting_point, number, place

FIRST_OWN_STEP = 0xFFFFFFF0
"""Steps from here on are Slurm's own: a batch script, an interactive shell. Programs in them are not started by srun."""


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
    if missing := [name for name in needed if not environ.get(name)]:
        raise UserError(
            f"environment: SLURM_STEP_ID={step} without {', '.join(missing)}: start the ranks with srun, which sets them all, "
            "or unset SLURM_STEP_ID to run on one rank"
        )
    each = list(islice(tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"]), 1 << 20))
    node = number(environ, "SLURM_NODEID")
    if node >= len(each):
        raise UserError(
            f"environment: SLURM_NODEID={node} is not among the {len(each)} hosts of SLURM_STEP_TASKS_PER_NODE="
            f"{environ['SLURM_STEP_TASKS_PER_NODE'][:80]}"
        )
    found = place(
        "slurm",
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
        (
            number(environ, "SLURM_PROCID"),
            number(environ, "SLURM_STEP_NUM_TASKS", least=1),
            number(environ, "SLURM_LOCALID"),
            each[node],
        ),
    )
    hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    address, port = meeting_point(
        environ,
        alone=len(each) == 1,
        first=first_host(hosts) if hosts and len(each) > 1 else "",
        # Steps of a job run side by side; jobs follow each other.
        number_of_run=number(environ, "SLURM_JOB_ID") + 997 * int(step),
        mend="environment: a step on several hosts without SLURM_STEP_NODELIST: set MASTER_ADDR to the host of rank 0",
    )
    return replace(found, address=address, port=port)


def tasks_per_node(text: str) -> Iterator[int]:
    """How many tasks each host has, in order, from Slurm's short form: "2(x3),1" is 2, 2, 2, 1.

    Raises:
        UserError: it is not of that form.
    """
    for part in text.split(","):
        found = re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", part)
        if not found:
            raise UserError(f"environment: SLURM_STEP_TASKS_PER_NODE={text[:80]!r} is not of the form 2(x3),1")
        for _ in range(int(found[2] or 1)):
            yield int(found[1])


def first_host(text: str) -> str:
    """The first host of a list in Slurm's short form: "n[01-03,7],m2" is n01.

    Raises:
        UserError: it is not of that form, or its first host has a name that no host can have.
    """
    name = next(hosts(text), "")
    if not is_host(name):
        raise UserError(f"environment: SLURM_STEP_NODELIST={text[:80]!r} does not begin with a host: set MASTER_ADDR")
    return name


def hosts(text: str) -> Iterator[str]:
    """The hosts of a list in Slurm's short form, in order: "n[01-03,7],m2" is n01, n02, n03, n7, m2.

    Raises:
        UserError: it is not of that form.
    """
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
