"""Who am I: this process's place among the ranks, read from the launcher's environment."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace

from bigvision.errors import UserError
from bigvision.runtime import mpi, slurm
from bigvision.runtime.environment import Identity, host, number, place, port


def identify(environ: Mapping[str, str]) -> Identity:
    """Read the launcher's environment; without one this process is the only rank.

    Raises:
        UserError: the environment of a launcher is there in part, or what it says does not fit together.
    """
    for resolve in RESOLVERS:
        if found := resolve(environ):
            return found
    return Identity(rank=0, world_size=1, local_rank=0, local_world_size=1, launcher="python")


def _from_torch_environment(environ: Mapping[str, str]) -> Identity | None:
    """torchrun, accelerate launch and the deepspeed launcher set these variables; a worker needs all of them."""
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    present = [name for name in needed if environ.get(name)]
    # MASTER_* alone are often exported in a shell or an image and start nothing.
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(present):
        return None
    if missing := [name for name in needed if name not in present]:
        raise UserError(
            f"environment: {', '.join(f'{name}={environ[name]}' for name in present)} without {', '.join(missing)}: "
            "start the ranks with torchrun or accelerate launch, which set them all, or unset them to run on one rank"
        )
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
    found = place(
        "pytorchjob", ("RANK", "WORLD_SIZE", "", ""), (number(environ, "RANK"), number(environ, "WORLD_SIZE"), 0, 1)
    )  # fmt: skip
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
    mpi.from_open_mpi,  # before Slurm, by which mpirun starts its daemons
    mpi.from_hydra,
    slurm.from_step,
    _from_sagemaker,
]
"""Tried in order; each knows one launcher's variables and returns None when they are not there."""
