"""What `bigvision doctor` looks at around a rank: the launcher's variables, network interfaces and cores; and what only several
ranks show, from the `facts` of each."""

from __future__ import annotations

import fcntl
import ipaddress
import itertools
import os
import platform
import socket
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch

from bigvision.errors import either
from bigvision.launchers.machine import SHOWN, SYS, Here, Lines, error, installed, ok, warning
from bigvision.runtime.rendezvous import FIRST_OWN_STEP, Identity

SLOWER = {
    "CUDA_LAUNCH_BLOCKING": "each kernel is waited for",
    "NCCL_P2P_DISABLE": "GPUs exchange through host memory",
    "NCCL_SHM_DISABLE": "GPUs without peer access exchange through the network",
    "NCCL_IB_DISABLE": "hosts exchange over sockets, also where there is InfiniBand",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "each tensor is allocated by the driver",
}
"""Variables that make a run on CUDA slower where they are 1, and how."""
LAUNCHED = (
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("mpiexec", "PMI_RANK", "PMI_SIZE"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)
"""The variables in which launchers count the ranks that they have started."""
SIOCGIFADDR = 0x8915
"""The request of ioctl(2) for an interface's IPv4 address."""
Facts = Mapping[int, Mapping[str, Any]]
"""What each rank sends of itself."""
SLOW_NETWORK = 10_000
"""Mbit/s below which an interface between hosts is too slow for gradients."""


# The launcher.


def launcher(here: Here) -> Lines:
    """Whether the launcher's variables fit together, and rank 0 can be found."""
    identity, environ = here.identity, os.environ
    if identity.launcher == "python":
        yield ok("no launcher: one rank")
        if (tasks := environ.get("SLURM_NTASKS", "")).isdecimal() and int(tasks) > 1:
            yield warning(f"SLURM_NTASKS={tasks}, but this process is the only rank: start it with srun")
        return
    yield ok(f"{identity.launcher}: {identity.world_size} ranks, {identity.local_world_size} on this host")
    if identity.local_world_size > identity.world_size:
        yield error(
            f"{identity.local_world_size} ranks on this host, but {identity.world_size} in all: correct LOCAL_WORLD_SIZE or "
            "WORLD_SIZE, or start with torchrun, which sets both"
        )
    for program, rank, size in LAUNCHED if identity.launcher == "torch environment" else ():
        theirs = environ.get(rank, ""), environ.get(size, "")
        started = all(text.isdecimal() for text in theirs) and int(theirs[1]) > 1
        if program == "srun":
            step = environ.get("SLURM_STEP_ID", "")
            started = started and step.isdecimal() and int(step) < FIRST_OWN_STEP
        if started and (int(theirs[0]), int(theirs[1])) != (identity.rank, identity.world_size):
            yield error(
                f"RANK={identity.rank} and WORLD_SIZE={identity.world_size} contradict {rank}={theirs[0]} and "
                f"{size}={theirs[1]} of {program}: unset RANK, WORLD_SIZE and LOCAL_RANK, which some script has exported"
            )
    if identity.world_size > 1:
        yield from _meeting_point(identity)


def _meeting_point(identity: Identity) -> Lines:
    try:
        found = {str(place[0]).partition("%")[0] for *_, place in socket.getaddrinfo(identity.address, identity.port)}
    except OSError as failure:
        yield error(f"MASTER_ADDR={identity.address} means no address here ({failure.strerror}): name the host of rank 0")
        return
    # On the host of rank 0, its own name may mean the loopback device; the other hosts have to reach it.
    elsewhere = identity.rank >= identity.local_world_size or _is_loopback(identity.address)
    if elsewhere and identity.world_size > identity.local_world_size and all(map(_is_loopback, found)):
        yield error(
            f"MASTER_ADDR={identity.address} means each host itself, but the ranks are on several: name the host of rank 0 by "
            "an address that all of them reach"
        )


def _is_loopback(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).is_loopback
    except ValueError:
        return False


def environment(here: Here) -> Lines:
    """Variables that make a run slower."""
    for name, why in SLOWER.items() if here.on_cuda else ():
        if os.environ.get(name, "0") not in ("", "0"):
            yield warning(f"{name}={os.environ[name]}: {why}: unset it, unless you look for a fault")


# The network.


def network(here: Here) -> Lines:
    """Which interfaces there are, and which of them gloo and NCCL take."""
    up, identity = interfaces(), here.identity
    asked = {name: os.environ.get(name, "") for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    meant = {"GLOO_SOCKET_IFNAME": [name for name in up if name == asked["GLOO_SOCKET_IFNAME"]]}
    meant["NCCL_SOCKET_IFNAME"] = matching(asked["NCCL_SOCKET_IFNAME"], up)
    for name, value in asked.items():
        if value and not meant[name]:
            there = ", ".join(up) or "none"
            yield error(f"{name}={value} names no interface that is up here ({there}): name one of these, or unset it")
    gloo, nccl = asked["GLOO_SOCKET_IFNAME"] or interface_of_host(up), interface_of_nccl(up)
    yield ok(f"interfaces {', '.join(up) or 'none'}; gloo takes {gloo or 'none'}, NCCL {nccl or 'none'}")
    if identity.world_size == identity.local_world_size:
        return
    if gloo is None or _is_loopback(up.get(gloo, "")):
        yield error(
            f"the name of this host ({platform.node()}) does not mean an address in a network, so that gloo finds no other "
            "host: set GLOO_SOCKET_IFNAME to the interface between the hosts"
        )
    if here.on_cuda and 0 < (speed := _speed(nccl)) < SLOW_NETWORK and not list(SYS.glob("class/infiniband/*")):
        yield warning(
            f"{nccl} has {speed} Mbit/s and there is no InfiniBand, so that steps wait for gradients: name a faster interface "
            "in NCCL_SOCKET_IFNAME, or exchange less often (a larger train.global_batch, parallel.scatter last)"
        )


def interfaces() -> dict[str, str]:
    """The interfaces that are up, by name, with their IPv4 addresses ("" without)."""
    found = {}
    for _, name in socket.if_nameindex():
        state = "unknown"  # as of the loopback device
        with suppress(OSError):
            state = (SYS / "class/net" / name / "operstate").read_text().strip()
        if state == "down":
            continue
        found[name] = ""
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def matching(asked: str, up: Iterable[str]) -> list[str]:
    """Those of the interfaces *up* that ``NCCL_SOCKET_IFNAME`` means: prefixes, "=" before exact names, "^" before others."""
    excluded, exact = asked.startswith("^"), asked.lstrip("^").startswith("=")
    names = [name for name in asked.lstrip("^=").split(",") if name]
    return [one for one in up if any(one == name if exact else one.startswith(name) for name in names) != excluded]


def interface_of_nccl(up: Mapping[str, str]) -> str | None:
    """The interface that NCCL takes for its start: what the variable means, else InfiniBand's, else any but Docker's."""
    with_address = [name for name, address in up.items() if address]
    if asked := os.environ.get("NCCL_SOCKET_IFNAME"):
        return next(iter(matching(asked, with_address)), None)
    usual = [name for name in with_address if not name.startswith(("docker", "lo", "virbr"))]
    order = [*(name for name in with_address if name.startswith("ib")), *usual, *with_address]
    return next(iter(order), None)


def interface_of_host(up: Mapping[str, str]) -> str | None:
    """The interface that the host's name means, which gloo takes."""
    try:
        addresses = {str(place[0]) for *_, place in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    except OSError:
        return None
    if all(map(_is_loopback, addresses)):  # 127.0.1.1 is no interface's own address
        return next((name for name, address in up.items() if _is_loopback(address)), None)
    return next((name for name, address in up.items() if address in addresses), None)


def _speed(name: str | None) -> int:
    """Mbit/s of an interface; 0 where it does not tell."""
    with suppress(OSError, ValueError):
        return int((SYS / "class/net" / (name or "") / "speed").read_text())
    return 0


# Cores.


def cores(here: Here) -> Lines:
    """On which cores this rank runs, with how many threads and data workers."""
    mine, quota = usable_cores(), core_quota()
    limit = "" if quota is None else f", {quota:g} at a time in this container"
    threads = os.environ.get("OMP_NUM_THREADS") or "not set"
    yield ok(
        f"cores {ranges(mine)}{limit}; {torch.get_num_threads()} threads (OMP_NUM_THREADS: {threads}), "
        f"{here.config.data.workers} data workers"
    )
    if here.device is not None and here.on_cuda and (text := far_from_device(here.device)):
        yield warning(text)


def usable_cores() -> list[int]:
    """The numbers of the cores on which this process may run."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def core_quota() -> float | None:
    """How many cores a container's control group allows at a time; None where it sets no limit."""
    with suppress(OSError, ValueError):
        quota, period = (SYS / "fs/cgroup/cpu.max").read_text().split()
        return int(quota) / int(period)  # "max" without a limit
    return None


def far_from_device(device: torch.device) -> str:
    """A warning where this rank is bound to cores of another NUMA node than the device's; "" where it is not."""
    found: Any = torch.cuda.get_device_properties(device)
    with suppress(OSError, ValueError, AttributeError):
        bus = f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
        node = int((SYS / "bus/pci/devices" / bus / "numa_node").read_text())
        near = listed((SYS / f"devices/system/node/node{node}/cpulist").read_text().strip())
        if not near & set(usable_cores()):
            return (
                f"this rank is bound to cores {ranges(usable_cores())}, but its device is near cores {ranges(sorted(near))} "
                f"(NUMA node {node}): bind it to those (numactl --cpunodebind={node}, srun --gpu-bind=closest), or to none"
            )
    return ""


def listed(text: str) -> set[int]:
    """The numbers in a list such as "0-3,8"."""
    ends = [part.split("-") for part in text.split(",") if part]
    return {number for end in ends for number in range(int(end[0]), int(end[-1]) + 1)}


def ranges(numbers: Iterable[int]) -> str:
    """Sorted *numbers* as "0-3, 8"."""
    parts: list[tuple[int, int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1] = (parts[-1][0], number)
        else:
            parts.append((number, number))
    return ", ".join(str(begin) if begin == end else f"{begin}-{end}" for begin, end in parts)


# Several ranks.


def facts(here: Here) -> dict[str, Any]:
    """What of this rank is compared with the others, as JSON."""
    return {
        "host": platform.node(), "local": here.identity.local_world_size, "cores": usable_cores(), "quota": core_quota(),
        "bound": len(usable_cores()) < (os.cpu_count() or 1), "threads": 0 if here.on_cuda else torch.get_num_threads(),
        "workers": here.config.data.workers,
        "versions": {"Python": platform.python_version()} | {name: installed(name) for name in SHOWN},
    }  # fmt: skip


def same_versions(found: Facts) -> Lines:
    """Whether all ranks have the same packages."""
    first = min(found)
    for rank, its in found.items():
        for name, version in its["versions"].items():
            if version != (usual := found[first]["versions"][name]):
                yield error(
                    f"rank {rank} on {its['host']} has {name} {version}, rank {first} {usual}: install the same on all hosts"
                )


def ranks_of_hosts(found: Facts) -> Lines:
    """Whether there are as many ranks on each host as their launcher says."""
    for host, there in _by_host(found).items():
        counts = sorted({its["local"] for its in there.values()})
        if counts != [len(there)]:
            yield error(
                f"{len(there)} ranks are on {host}, but their launcher counts {either([str(count) for count in counts])}: set "
                "LOCAL_RANK and LOCAL_WORLD_SIZE for each host, or start with torchrun"
            )


def enough_cores(found: Facts) -> Lines:
    """Whether the ranks of a host have enough cores, and each its own where they are bound to some."""
    for host, there in _by_host(found).items():
        cores = set[int]().union(*(its["cores"] for its in there.values()))
        have = min([float(len(cores)), *(its["quota"] for its in there.values() if its["quota"] is not None)])
        threads, workers = (sum(its[name] for its in there.values()) for name in ("threads", "workers"))
        each, ranks = max(1, int(have / len(there))), f"{len(there)} rank{'s' if len(there) > 1 else ''} on {host}"
        if threads > have:
            yield warning(f"{ranks} with {threads} threads have {have:g} cores: set OMP_NUM_THREADS={each}")
        if workers > have:
            yield warning(
                f"{ranks} with {workers} data workers have {have:g} cores: use data.workers {each}, or give the job more cores "
                "(srun --cpus-per-task, docker run --cpus)"
            )
        # Ranks that share all cores of a job or container are not bound by that.
        alike = Counter(tuple(its["cores"]) for its in there.values())
        bound = [(rank, set(its["cores"])) for rank, its in there.items() if its["bound"]]
        overlaps = [
            (one, other, sorted(its & theirs))
            for (one, its), (other, theirs) in itertools.combinations(bound, 2)
            if its & theirs and (its != theirs or len(its) < alike[tuple(sorted(its))])
        ]
        if overlaps:
            one, other, both = overlaps[0]
            more = f" (and {len(overlaps) - 1} more pairs)" if len(overlaps) > 1 else ""
            yield warning(
                f"ranks {one} and {other}{more} are both bound to cores {ranges(both)}: bind each to its own "
                "(srun --cpu-bind=cores --cpus-per-task N, mpirun --map-by slot:PE=N), or none"
            )


def _by_host(found: Facts) -> dict[str, Facts]:
    hosts: dict[str, dict[int, Any]] = {}
    for rank, its in found.items():
        hosts.setdefault(its["host"], {})[rank] = its
    return {**hosts}
