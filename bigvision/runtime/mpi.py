"""This process's place among those that mpirun started: Open MPI's, and Hydra's, which MPICH and Intel MPI use.

They only start processes: no MPI library is loaded, the ranks speak gloo and NCCL.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace

from bigvision.errors import UserError
from bigvision.runtime.environment import Identity, meeting_point, number, place

OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
HYDRA = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")


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
    present = [name for name in names if environ.get(name)]
    if not present:
        return None
    if missing := [name for name in names if name not in present]:
        raise UserError(
            f"environment: {', '.join(f'{name}={environ[name]}' for name in present)} without {', '.join(missing)}: "
            "start the ranks with mpirun, which sets them all, or unset them to run on one rank"
        )
    rank, world_size, local_rank, local_world_size = (number(environ, name) for name in names)
    found = place(launcher, names, (rank, world_size, local_rank, local_world_size))
    address, port = meeting_point(
        environ,
        alone=local_world_size == world_size,
        # mpirun's own host is known, and need not be rank 0's; of its addresses any may be the one that others reach.
        first="",
        number_of_run=zlib.crc32(run.encode()),
        mend=f"environment: {names[1]}={world_size} ranks on several hosts ({local_world_size} here) without MASTER_ADDR: "
        f"name the host of rank 0, the first in the list of hosts: {flag}",
    )
    return replace(found, address=address, port=port)
