"""How many ranks, on which devices, and what a process must be so that ranks can be forked from it."""

from __future__ import annotations

import multiprocessing.forkserver
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist

from bigvision.config import Config
from bigvision.errors import UserError
from bigvision.runtime import Identity

Devices = int | Sequence[int] | Literal["cpu", "auto"] | None
"""Ranks to start, CUDA devices, "cpu" (one rank), "auto" (all CUDA devices, or one CPU rank), or None: those there are."""
FIX = "pass names instead of objects, or start it in a process that has not used CUDA (restart the notebook's kernel)"


@dataclass(frozen=True)
class Placement:
    """Ranks that are to be started."""

    ranks: int
    cuda: bool
    environment: Mapping[str, str]
    """What they need beside this process's own."""


def place(devices: Devices, config: Config, here: Identity) -> tuple[Config, Placement | None]:
    """*config* with the device that *devices* means, and the ranks to start; None: this process is one already.

    Raises:
        UserError: *devices* is nothing of that kind, contradicts the launcher or ``parallel.device``, or there are not as many.
    """
    if devices is None:
        return config, None
    if isinstance(devices, str):
        if devices not in ("cpu", "auto"):
            raise UserError(f"devices: {devices!r}: give a number, a list of CUDA devices such as [0, 1], 'cpu' or 'auto'")
        listed = None
        ranks = None if devices == "auto" else 1
    elif isinstance(devices, int) and not isinstance(devices, bool):
        listed, ranks = None, devices
    else:
        listed = _ordinals(devices)
        ranks = len(listed)
    wanted = "cpu" if devices == "cpu" else "cuda" if listed is not None else None
    if wanted is not None:
        config = _on(config, wanted)
    if here.launcher != "python":
        if listed is not None:
            raise UserError(f"devices: {devices}, but {here.launcher} started this rank: let it choose the devices")
        if isinstance(devices, int) and devices != here.world_size:
            raise UserError(f"devices: {devices}, but {here.launcher} started {here.world_size} ranks: leave devices out")
        return config, None
    there = 0 if config.parallel.device == "cpu" else cuda_devices()
    if ranks is None:
        ranks = max(1, there)
    if ranks < 1:
        raise UserError(f"devices: {devices}: give at least 1")
    if listed is not None and (beyond := [ordinal for ordinal in listed if ordinal >= there]):
        raise UserError(
            f"devices: {beyond[0]}, but torch sees {there} CUDA devices here{': use a number' if not there else ''}"
        )
    if there and ranks > there:
        raise UserError(f"devices: {ranks}, but there are {there} CUDA devices: give fewer, or parallel={{'device': 'cpu'}}")
    if ranks == 1 and listed is None:
        return config, None
    environment = {} if os.environ.get("OMP_NUM_THREADS") else {"OMP_NUM_THREADS": str(max(1, cores() // ranks))}
    if listed is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(_names(listed))
    return config, Placement(ranks, bool(there), environment)


def cuda_devices() -> int:
    """How many CUDA devices torch sees. Asked so that forks of this process can still use them."""
    key = "PYTORCH_NVML_BASED_CUDA_CHECK"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _on(config: Config, device: Literal["cpu", "cuda"]) -> Config:
    if config.parallel.device not in ("auto", device):
        raise UserError(f"devices: asks for {device}, but parallel.device is {config.parallel.device}: drop one of the two")
    return replace(config, parallel=replace(config.parallel, device=device))


def _ordinals(devices: object) -> list[int]:
    found = list(devices) if isinstance(devices, Iterable) else []
    if not found or any(not isinstance(one, int) or isinstance(one, bool) or one < 0 for one in found):
        raise UserError(f"devices: {devices!r}: give a number, a list of CUDA devices such as [0, 1], 'cpu' or 'auto'")
    if len(set(found)) < len(found):
        raise UserError(f"devices: {devices}: names a device twice")
    return found


def _names(ordinals: list[int]) -> list[str]:
    """The devices as CUDA knows them, where this process sees only some."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in visible.split(",")] if visible else None
    return [names[ordinal] if names else str(ordinal) for ordinal in ordinals]


def check_parent(cuda: bool) -> None:
    """Raise `UserError` where forks of this process could not train.

    Args:
        cuda: whether the ranks will use it.
    """
    if dist.is_initialized():
        raise UserError("devices: this process is in a process group already: leave devices out to train on its ranks")
    if cuda and torch.cuda.is_initialized():
        raise UserError(f"devices: CUDA is in use in this process, and its forks cannot use it: {FIX}")


def settle(cuda: bool) -> None:
    """Put right what a fork has from its parent. Called first, in each rank.

    Args:
        cuda: whether it will use it.

    Raises:
        UserError: what cannot be put right.
    """
    if cuda and torch.cuda._is_in_bad_fork():
        raise UserError(f"devices: CUDA was asked for its devices before the ranks were forked: {FIX}")
    try:
        torch.ones(1, requires_grad=True).sum().backward()
    except RuntimeError as error:
        if "fork" not in str(error):
            raise
        raise UserError(f"devices: a backward pass has run in this process, which autograd does not survive: {FIX}") from None
    # The server of data workers is the parent's, and can be asked for by no other.
    server: Any = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]
    if (alive := server._forkserver_alive_fd) is not None:
        os.close(alive)
    preload = server._preload_modules
    server.__init__()
    server._preload_modules = preload
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
