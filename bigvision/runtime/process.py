"""This rank while it runs: its device, its process group and the mesh of stages, replicas and shards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from bigvision.errors import UserError
from bigvision.runtime.environment import Identity, announced
from bigvision.runtime.identity import identify
from bigvision.runtime.rendezvous import meet


@dataclass(frozen=True)
class Runtime:
    """What a rank knows about itself once the process group stands."""

    identity: Identity
    device: torch.device
    mesh: DeviceMesh
    """(stage, replicate, shard), over all ranks; one stage but for pipelines."""
    data_group: dist.ProcessGroup | None = None
    """The data-parallel ranks of this rank's stage; None is all ranks."""

    @property
    def rank(self) -> int:
        return self.identity.rank

    @property
    def world_size(self) -> int:
        return self.identity.world_size

    @property
    def stage(self) -> int:
        """This rank's place in its pipeline."""
        return self.rank // self.data_ranks

    @property
    def data_rank(self) -> int:
        """Which part of each batch this rank's pipeline takes."""
        return self.rank % self.data_ranks

    @property
    def data_ranks(self) -> int:
        """Into how many parts a batch is cut."""
        return self.world_size // self.pipeline_ranks

    @cached_property
    def pipeline_ranks(self) -> int:
        """Ranks in a pipeline; 1 where there is none."""
        return self.mesh["stage"].size()

    @cached_property
    def shard(self) -> tuple[int, int]:
        """(which shard of its replica this rank holds, how many there are)."""
        return self.mesh.get_local_rank("shard"), self.mesh["shard"].size()

    @cached_property
    def replica(self) -> tuple[int, int]:
        """(which replica this rank is part of, how many there are)."""
        return self.mesh.get_local_rank("replicate"), self.mesh["replicate"].size()

    @property
    def is_main(self) -> bool:
        """Only this rank prints and writes what is written once."""
        return self.rank == 0


@contextmanager
def start(
    device: str = "auto", replicas: int = 1, stages: int | None = 1, timeout: timedelta = timedelta(minutes=30)
) -> Iterator[Runtime]:
    """Join the other ranks, and leave them at the end.

    Args:
        device: "auto", "cpu" or "cuda".
        replicas: full copies of the model; the mesh is (stages, replicas, ranks / stages / replicas).
        stages: ranks in a pipeline; None is all of them.
        timeout: how long a rank waits for the others in one collective.

    Raises:
        UserError: half-set environment, more ranks than devices, ranks that stages or replicas do not divide.
    """
    identity = identify(os.environ)
    with announced(identity), _join(identity, device, replicas, stages, timeout) as runtime:
        yield runtime


@contextmanager
def _join(identity: Identity, device: str, replicas: int, stages: int | None, timeout: timedelta) -> Iterator[Runtime]:
    chosen = choose_device(device, identity)
    stages = stages or identity.world_size
    if identity.world_size % stages:
        raise UserError(
            f"parallel.stages: {stages} does not divide the {identity.world_size} ranks: start a multiple of {stages} ranks"
        )
    if identity.world_size // stages % replicas:
        ranks = f"{identity.world_size} ranks" if stages == 1 else f"{identity.world_size // stages} ranks of a stage"
        raise UserError(f"parallel.replicas: {replicas} does not divide the {ranks}")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        # Convolution algorithms picked by timing differ from run to run, and with them the bits of a resumed run.
        torch.backends.cudnn.benchmark = False
    owned = not dist.is_initialized()
    if owned:
        _init_process_group(identity, chosen, timeout)
    try:
        shares = identity.world_size // stages
        shape = (stages, replicas, shares // replicas)
        mesh = init_device_mesh(chosen.type, shape, mesh_dim_names=("stage", "replicate", "shard"))
        alike = init_device_mesh(chosen.type, (stages, shares), mesh_dim_names=("stage", "data")) if stages > 1 else None
        yield Runtime(identity, chosen, mesh, alike["data"].get_group() if alike is not None else None)
    finally:
        if owned:
            dist.destroy_process_group()


def choose_device(device: str, identity: Identity) -> torch.device:
    """The device of this rank.

    Raises:
        UserError: CUDA was asked for and is not there, or there are more ranks on this host than devices.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("parallel.device: cuda, but torch sees no CUDA device here: use cpu or auto")
    if identity.local_world_size > torch.cuda.device_count():
        raise UserError(
            f"{identity.local_world_size} ranks on a host with {torch.cuda.device_count()} CUDA devices: "
            "start as many ranks as devices, or use parallel.device cpu"
            + (" (with srun --gpus-per-task a rank sees one alone: ask for --gpus-per-node)" * (identity.launcher == "slurm"))
        )
    return torch.device("cuda", identity.local_rank)


def _init_process_group(identity: Identity, device: torch.device, timeout: timedelta) -> None:
    # Metadata (errors, checksums) travels over gloo also where tensors travel over NCCL.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    bound = device if device.type == "cuda" else None
    dist.init_process_group(
        backend,
        store=meet(identity, timeout),
        rank=identity.rank,
        world_size=identity.world_size,
        timeout=timeout,
        device_id=bound,
    )
