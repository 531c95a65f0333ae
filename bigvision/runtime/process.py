"""This rank while it runs: its device, process group and mesh, what the ranks agree on, and ``train.deterministic``."""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import json
import os
import platform
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from bigvision.errors import Stopped, UserError, causes
from bigvision.runtime.rendezvous import Identity, announced, identify, meet

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
REPEATING_WORKSPACES = (":4096:8", ":16:8")
"""The sizes of cuBLAS's workspace with which its results repeat; cuBLAS reads the variable when CUDA starts."""
NO_DETERMINISTIC_FORM = re.compile(r"(\w+) does not have a deterministic implementation")
"""In torch's error for such an operation, on every device, also while it compiles one."""

SHARED_PER_RANK = 64 << 20
"""Bytes of /dev/shm that NCCL may take for a rank: some segments of 10 MB. Its manual asks for 1 GB in a container."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3)."""
MALLOC_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")
"""By which a user sets the same for glibc."""

T = TypeVar("T")
GATHERED = 64 << 20
"""Bytes of rows that each rank sends at a time."""
_users = 0
_restore = ExitStack()
ABORTING = 5.0
"""Seconds that NCCL gets to abort its communicators after a fault, and the process to end after that."""


@dataclass(frozen=True)
class Runtime:
    """What a rank knows about itself once the process group stands."""

    identity: Identity
    device: torch.device
    mesh: DeviceMesh
    """(stage, replicate, shard), over all ranks; one stage but for pipelines."""
    data_group: dist.ProcessGroup | None
    """The data-parallel ranks of this rank's stage; None is all ranks."""
    rank: int
    world_size: int
    is_main: bool
    """Only this rank prints and writes what is written once."""
    pipeline_ranks: int
    """Ranks in a pipeline; 1 where there is none."""
    stage: int
    """This rank's place in its pipeline."""
    data_ranks: int
    """Into how many parts a batch is cut."""
    data_rank: int
    """Which part of each batch this rank's pipeline takes."""
    shard: tuple[int, int]
    """(which shard of its replica this rank holds, how many there are)."""
    replica: tuple[int, int]
    """(which replica this rank is part of, how many there are)."""


@dataclass
class _Joined:
    """The ranks that this process has joined, shared by all that call `start` until the last of them leaves."""

    identity: Identity
    device: torch.device
    users: int = 0
    failed: bool = False
    """Whether a fault has ended the work of one of them."""
    meshes: dict[tuple[int, int], tuple[DeviceMesh, dist.ProcessGroup | None]] = field(default_factory=dict)
    """For each (stages, replicas): the mesh, and the data-parallel ranks of this rank's stage."""
    end: ExitStack = field(default_factory=ExitStack)


_joined: _Joined | None = None


def current_identity() -> Identity:
    """This process among the ranks that it has joined; else as the launcher's environment has it (see `identify`)."""
    return _joined.identity if _joined is not None else identify(os.environ)


@contextmanager
def start(
    device: str = "auto", replicas: int = 1, stages: int | None = 1, timeout: timedelta = timedelta(minutes=30)
) -> Iterator[Runtime]:
    """Join the other ranks, and leave them at the end.

    Where this process has joined them already, the process group is shared, and the last one that leaves ends it. After a fault
    NCCL's communicators are aborted: to destroy them would be to wait for ranks that do not come.

    *device* is "auto", "cpu" or "cuda"; *replicas* are full copies of the model, *stages* the ranks in a pipeline, None being
    all of them. The mesh is (stages, replicas, ranks / stages / replicas). *timeout* is how long a rank waits for the
    others in one collective, in all groups that have no timeout of their own.
    """
    global _joined
    joined, runtime = _join(device, replicas, stages, timeout)
    try:
        yield runtime
    except (UserError, Stopped):
        raise  # the same on every rank
    except BaseException:
        joined.failed = True
        raise
    finally:
        joined.users -= 1
        if not joined.users:
            _joined = None
            joined.end.close()


def _join(device: str, replicas: int, stages: int | None, timeout: timedelta) -> tuple[_Joined, Runtime]:
    global _joined
    identity = current_identity()
    with ExitStack() as stack:
        if _joined is None:
            stack.enter_context(announced(identity))
        chosen = choose_device(device, identity)
        stages = stages or identity.world_size
        ranks = identity.world_size
        if ranks % stages:
            raise UserError(f"parallel.stages: {stages} does not divide the {ranks} ranks: start a multiple of {stages} ranks")
        if ranks // stages % replicas:
            of_stage = "" if stages == 1 else " of a stage"
            raise UserError(f"parallel.replicas: {replicas} does not divide the {ranks // stages} ranks{of_stage}")
        joined = _joined or _Joined(identity, chosen)
        if chosen != joined.device:
            raise UserError(
                f"parallel.device: {chosen.type}, but this process has joined the ranks on {joined.device.type}, for another "
                f"Engine or run: use {joined.device.type} for both, or close that one first"
            )
        if _joined is None:
            if chosen.type == "cuda":
                torch.cuda.set_device(chosen)
                # Convolution algorithms picked by timing differ from run to run, and with them the bits of a resumed run.
                torch.backends.cudnn.benchmark = False
            else:
                keep_freed_memory()
            # For groups that are made without a timeout, by `init_device_mesh` and `deepspeed.initialize`. torch's own default
            # for NCCL is 10 minutes, which would run out before a longer `limits.step` names the missing rank.
            timeouts = {"default_pg_timeout": timeout, "default_pg_nccl_timeout": timeout}
            stack.enter_context(attributes(distributed_c10d, **timeouts))
            if not dist.is_initialized():  # Ray's workers have one
                stack.enter_context(_process_group(joined, timeout))
        mesh, data_group = _mesh(joined, stages, replicas, timeout)
        if _joined is None:
            joined.end, _joined = stack.pop_all(), joined
    joined.users += 1
    data_ranks = ranks // stages
    stage, data_rank = divmod(identity.rank, data_ranks)
    return joined, Runtime(
        identity, chosen, mesh, data_group, identity.rank, ranks, identity.rank == 0, stages, stage, data_ranks, data_rank,
        shard=(mesh.get_local_rank("shard"), data_ranks // replicas), replica=(mesh.get_local_rank("replicate"), replicas),
    )  # fmt: skip


def _mesh(
    joined: _Joined, stages: int, replicas: int, timeout: timedelta
) -> tuple[DeviceMesh, dist.ProcessGroup | None]:  # fmt: skip
    """Return the mesh of a layout, and the data-parallel ranks of this rank's stage: None is all ranks."""
    if (stages, replicas) not in joined.meshes:
        kind, data_ranks = joined.device.type, joined.identity.world_size // stages
        shape = (stages, replicas, data_ranks // replicas)
        mesh = init_device_mesh(kind, shape, mesh_dim_names=("stage", "replicate", "shard"))
        flat = init_device_mesh(kind, (stages, data_ranks), mesh_dim_names=("stage", "data")) if stages > 1 else None
        for group in [*mesh.get_all_groups(), *(flat.get_all_groups() if flat is not None else [])]:
            # Beside NCCL torch splits the default group, and gives the gloo half of what it splits off a timeout of 30 minutes.
            if (cpu := torch.device("cpu")) in group._device_types:
                group._get_backend(cpu)._set_default_timeout(timeout)
        joined.meshes[stages, replicas] = mesh, flat["data"].get_group() if flat is not None else None
    return joined.meshes[stages, replicas]


def choose_device(device: str, identity: Identity) -> torch.device:
    """The device of this rank; raises `UserError` where CUDA or devices for all ranks of this host are missing."""
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


def keep_freed_memory() -> None:
    """Let glibc keep the memory that is freed, as torch itself does on CUDA: each step allocates what the one before has freed.

    By default glibc returns large blocks and the free end of its heap to the system; the next step then takes a page fault for
    each 4 KB of its activations and gradients, which was a seventh of a ConvNeXt's step. What the user has set stays.
    """
    if sys.platform != "linux" or any(name in os.environ for name in MALLOC_VARIABLES):
        return
    with suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, -1)  # never
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # larger ones would leave holes in the heap


@contextmanager
def _process_group(joined: _Joined, timeout: timedelta) -> Iterator[None]:
    """Make the process group of all ranks, and end it."""
    identity, on_cuda = joined.identity, joined.device.type == "cuda"
    dist.init_process_group(
        # Metadata (errors, checksums) travels over gloo also where tensors travel over NCCL.
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo", store=meet(identity, timeout), rank=identity.rank,
        world_size=identity.world_size, timeout=timeout, device_id=joined.device if on_cuda else None,
    )  # fmt: skip
    try:
        yield
    except BaseException:
        joined.failed = True
        raise
    finally:
        if joined.failed and uses_nccl():
            _abort_groups()
        else:
            dist.destroy_process_group()


@contextmanager
def attributes(owner: Any, **values: Any) -> Iterator[None]:
    """Set these attributes of *owner* in here, and set them back at the end."""
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def uses_nccl() -> bool:
    """Whether a process group of this process talks over NCCL."""
    return any("nccl" in str(config) for config in list(distributed_c10d._world.pg_backend_config.values()))


def nccl_trace() -> bytes:
    """Return the last collectives that torch's flight recorder has seen over NCCL, as JSON; empty without NCCL."""
    dump: Any = getattr(_distributed_c10d, "_dump_nccl_trace_json", None)
    return dump() if dump is not None and uses_nccl() else b""


def _abort_groups() -> None:
    """Abort all process groups, but wait for it no longer than `ABORTING`: ncclCommAbort may hang as what it ends does."""

    def abort() -> None:
        with suppress(Exception):  # the process ends either way
            distributed_c10d._abort_process_group()

    thread = threading.Thread(target=abort, name="abort", daemon=True)
    thread.start()
    thread.join(ABORTING)
    # The destructors of groups wait again, when the interpreter ends. The code is that of a fault, 1.
    atexit.register(faulthandler.dump_traceback_later, ABORTING, exit=True, file=2)


def gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return every rank's *value*, in the order of the ranks, on every rank.

    *group* has all ranks, where several threads exchange values at a time and each needs a group of its own.
    """
    if dist.get_world_size() == 1:
        return [json.loads(json.dumps(value))]
    text = torch.from_numpy(np.frombuffer(json.dumps(value).encode(), dtype=np.uint8).copy())
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([text.numel()]), group)
    longest = max(int(size) for size in sizes)
    texts = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(texts, torch.nn.functional.pad(text, (0, longest - text.numel())), group)
    return [json.loads(bytes(text[: int(size)].numpy()).decode()) for text, size in zip(texts, sizes)]


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all ranks one behind the other, on every rank. *rows*, (N, columns), are float64 on the CPU.

    Ranks may have different numbers of rows, also none and then no columns.
    """
    if dist.get_world_size() == 1:
        return rows
    shapes = gather_json(list(rows.shape))
    columns, longest = max(shape[1] for shape in shapes), max(shape[0] for shape in shapes)
    mine = rows.new_zeros(longest, columns)
    mine[: len(rows), : rows.shape[1]] = rows
    found: list[list[Tensor]] = [[] for _ in shapes]
    step = max(1, GATHERED // (8 * max(1, columns)))
    for begin in range(0, longest, step):
        part = mine[begin : begin + step]
        parts = [torch.empty_like(part) for _ in shapes]
        dist.all_gather(parts, part)
        for of_rank, received, (count, _) in zip(found, parts, shapes):
            of_rank.append(received[: max(0, count - begin)])
    return torch.cat([part for of_rank in found for part in of_rank]) if longest else mine


def from_main(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Return rank 0's *value* on every rank."""
    return gather_json(value if dist.get_rank() == 0 else None, group)[0]


class RankFailure(RuntimeError):
    """Another rank could not do its part; names the rank and its error."""

    hung = False
    """Whether a limit of `limits` ran out on a rank."""


def all_or_none(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Do *work* on every rank; when it fails on any, raise the same error on all, so that none waits for another.

    It is the first failing rank's `UserError`, in its words; any other error is a `RankFailure`, which names that rank too.
    """
    failure: Exception | None = None
    result: T | None = None
    report = None
    try:
        result = work()
    except Exception as error:
        failure = error
        words = str(error) if isinstance(error, (UserError, RankFailure)) else f"{type(error).__name__}: {error}"
        report = [isinstance(error, UserError), words]
    for rank, other in enumerate(gather_json(report, group)):
        if other is not None:
            mistake, words = other
            raise (UserError(words) if mistake else RankFailure(f"rank {rank}: {words}")) from failure
    return result  # type: ignore[return-value]


def warn_of_shared_memory(runtime: Runtime, say: Callable[[str], None]) -> None:
    """Call *say* with each host's `lacks_shared_memory`. Called on every rank."""
    found = gather_json(lacks_shared_memory(runtime.device, runtime.identity.local_world_size))
    for text in dict.fromkeys(filter(None, found)):
        say(text)


def lacks_shared_memory(device: torch.device, ranks: int) -> str | None:
    """A warning where /dev/shm is small for NCCL between *ranks* of this host; None where it is not needed or large enough."""
    if device.type != "cuda" or ranks == 1 or os.environ.get("NCCL_SHM_DISABLE") == "1":
        return None
    with suppress(OSError):
        found = os.statvfs("/dev/shm")
        free, needed = found.f_bavail * found.f_frsize, ranks * SHARED_PER_RANK
        if free < needed:
            return (
                f"warning: /dev/shm of {platform.node()} has {free >> 20} MB left, but NCCL between {ranks} ranks of a host "
                f"may need {needed >> 20} MB: start the container with --shm-size=1g (Kubernetes: mount an emptyDir of medium "
                "Memory there)"
            )
    return None


@contextmanager
def deterministic(enabled: bool, device: str = "auto") -> Iterator[None]:
    """Make torch deterministic in this process; restore its settings at the end. Without *enabled* it changes nothing.

    Enter it before the process group is created and before CUDA is used: NCCL and cuBLAS read then what it sets. Several uses
    may overlap; the last one to end restores the settings. *device* is ``parallel.device``.

    `UserError` where cuBLAS was started, or is to be started, in a way that does not repeat; or an operation inside has no
    deterministic form, on this rank or on another.
    """
    global _users
    if not enabled:
        yield
        return
    if _users == 0:
        with ExitStack() as stack:
            _set_workspace(stack, device)
            _set_torch(stack)
            _restore.push(stack.pop_all())
    _users += 1
    try:
        with operations_named():
            yield
    finally:
        _users -= 1
        if _users == 0:
            _restore.close()


@contextmanager
def operations_named() -> Iterator[None]:
    """Turn torch's error about an operation without a deterministic form into a `UserError` that names the operation.

    Also where it is the cause of another error, or another rank has reported it.
    """
    try:
        yield
    except (RuntimeError, UserError) as error:  # a trace that meets such an operation ends with a UserError
        for cause in causes(error):
            if found := NO_DETERMINISTIC_FORM.search(str(cause)):
                raise UserError(
                    f"train.deterministic: true, but the operation {found[1]} has no deterministic form on this device: "
                    "use a model without it, or train.deterministic: false"
                ) from error
        raise


def _set_workspace(stack: ExitStack, device: str) -> None:
    given = os.environ.get(WORKSPACE)
    if device == "cpu" or not torch.cuda.is_available() or given in REPEATING_WORKSPACES:
        return
    if given is not None:
        raise UserError(
            f"train.deterministic: true, but {WORKSPACE} is {given!r}, with which cuBLAS does not repeat: "
            f"unset it, or set it to {REPEATING_WORKSPACES[0]}"
        )
    if torch.cuda.is_initialized():
        raise UserError(
            f"train.deterministic: true, but CUDA was started in this process without {WORKSPACE}: "
            f"set it to {REPEATING_WORKSPACES[0]} before, or start a fresh process"
        )
    os.environ[WORKSPACE] = REPEATING_WORKSPACES[0]

    def unset() -> None:
        if not torch.cuda.is_initialized():  # else the variable continues to show how CUDA was started
            del os.environ[WORKSPACE]

    stack.callback(unset)


def _set_torch(stack: ExitStack) -> None:
    import torch._inductor.config as inductor

    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    # Set back in reverse: this one after use_deterministic_algorithms, which sets inductor's switch too.
    stack.enter_context(attributes(inductor, deterministic=inductor.deterministic))
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    stack.callback(lambda: torch.use_deterministic_algorithms(before[0], warn_only=before[1]))
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory would cost a pass over it; nothing here reads memory before it is written.
    stack.enter_context(attributes(torch.utils.deterministic, fill_uninitialized_memory=False))
    stack.enter_context(attributes(cudnn, deterministic=True, benchmark=False))
    # What is left for attention: the flash kernels in bf16 and fp16, which have a deterministic form, and matrix products. The
    # backward pass of the memory-efficient kernels, which fp32 takes otherwise, and cuDNN's are not known to repeat.
    for name in ("mem_efficient", "cudnn"):
        switch = getattr(cuda, f"enable_{name}_sdp")
        stack.callback(switch, getattr(cuda, f"{name}_sdp_enabled")())
        switch(False)
