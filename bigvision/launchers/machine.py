"""What `bigvision doctor` looks at on a machine: versions, devices, links, compilers, memory and limits.

A check is a generator of `Line`. Packages that may be broken are imported inside of the checks, so that one of them shows as a
line and does not hide the others.
"""

from __future__ import annotations

import importlib
import itertools
import os
import platform
import re
import resource
import shutil
import subprocess
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from bigvision.config import Config
from bigvision.errors import UserError, one_line
from bigvision.models.float8 import check_float8
from bigvision.runtime.process import choose_device, lacks_shared_memory
from bigvision.runtime.rendezvous import Identity

State = Literal["ok", "warning", "error"]


class Line(NamedTuple):
    """What a check found, and what to do."""

    state: State
    text: str


Lines = Iterator[Line]
ok, warning, error = partial(Line, "ok"), partial(Line, "warning"), partial(Line, "error")

SYS, DEV, PROC = Path("/sys"), Path("/dev"), Path("/proc")
SHOWN = ("torch", "torchvision", "timm", "deepspeed", "accelerate", "safetensors", "numpy")
"""Packages whose versions are printed."""
BUILT_FOR_EACH_OTHER = {"torch", "torchvision"}
"""Packages with compiled code, of which each release fits one of the other."""
FILES_OF_RANK, FILES_OF_WORKER, FILES_OF_PEER = 128, 8, 4
"""Open files of a rank by itself (some 40 were counted), for each data worker (4 were), and for each other rank: rank 0 may
serve the store to all."""
SEMAPHORES = 1 << 20
"""Bytes of /dev/shm that the semaphores of data workers need at most."""
USED = 0.1
"""Share of a device's memory that may be in use before the run."""


@dataclass(frozen=True)
class Here:
    """This rank, and what it is to run."""

    config: Config
    identity: Identity
    device: torch.device | None
    """None where the rank gets no device: `devices` reports why."""

    @property
    def first(self) -> bool:
        """Whether this rank looks at what all ranks of its host share."""
        return self.identity.local_rank == 0

    @property
    def on_cuda(self) -> bool:
        return self.device is not None and self.device.type == "cuda"


# Versions.


def versions(here: Here) -> Lines:
    """Whether packages are as new as this project needs, fit each other and can be imported."""
    found = {name: version for name in SHOWN if (version := installed(name))}
    cuda = f" (CUDA {torch.version.cuda})" if torch.version.cuda else " (without CUDA)"
    texts = [f"{name} {version}{cuda if name == 'torch' else ''}" for name, version in found.items()]
    yield ok(f"Python {platform.python_version()}, {', '.join(texts)}")
    yield from mismatches()
    builds = {"torch": torch.__version__}
    for name in ("torchvision", "timm"):
        try:
            builds[name] = importlib.import_module(name).__version__
        except Exception as failure:
            yield error(f"{name} cannot be imported ({one_line(failure)}): install a release that fits torch")
    ours, theirs = (builds.get(name, "").partition("+")[2] for name in ("torch", "torchvision"))
    if ours and theirs and ours[:-1] != theirs[:-1]:  # cu130 and cu132 fit
        yield warning(f"torch is built for {ours}, torchvision for {theirs}: install both from the same index")


def mismatches() -> Lines:
    """A line for each installed package that is not what this project, or a package that it uses, asks for."""
    from packaging.requirements import Requirement

    for owner in ("bigvision", *SHOWN):
        for text in required_by(owner):
            needed = Requirement(text)
            version = installed(needed.name)
            extra = needed.marker is not None and not needed.marker.evaluate({"extra": ""})
            # What an extra asks for counts where it is installed.
            if (extra and (owner != "bigvision" or version is None)) or not (version or owner == "bigvision"):
                continue
            fix = f"pip install '{needed.name}{needed.specifier}'"
            if version is None:
                yield error(f"{needed.name} is not installed, which {owner} needs: {fix}")
            elif not needed.specifier.contains(version, prereleases=True):
                firm = (owner == "bigvision" and not extra) or {owner, needed.name} == BUILT_FOR_EACH_OTHER
                kind = error if firm else warning
                yield kind(
                    f"{needed.name} {version} does not fit {owner} {installed(owner) or ''}, which needs "
                    f"{needed.name}{needed.specifier}: {fix}"
                )


def required_by(name: str) -> list[str]:
    """What the package *name* requires, as pip writes it; of this project also where it is run without being installed."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.requires(name) or []
    project = Path(__file__).parents[2] / "pyproject.toml"
    if name != "bigvision" or not project.exists():
        return []
    return list(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"])


def installed(name: str) -> str | None:
    """The version of a package; None where it is not installed."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


# Devices and what is between them.


def devices(here: Here) -> Lines:
    """Which device this rank gets, and whether it computes."""
    if not torch.cuda.is_available():
        if here.config.parallel.device != "cpu" and (why := hidden_gpus()):
            yield Line("error" if here.config.parallel.device == "cuda" else "warning", why)
        yield ok(f"no CUDA device; {processor()}")
    device = choose_device(here.config.parallel.device, here.identity)
    if device.type == "cpu":
        if torch.cuda.is_available():
            yield ok(f"parallel.device: cpu leaves {torch.cuda.device_count()} CUDA devices unused; {processor()}")
        return
    found = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    cuda: Any = torch.cuda  # whose module nccl pyright does not see
    driver = nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0] or "unknown"
    nccl = ".".join(map(str, cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
    yield ok(
        f"{found.name}, {total / 1e9:.1f} GB, compute capability {found.major}.{found.minor}; driver {driver}, CUDA "
        f"{torch.version.cuda}, NCCL {nccl}"
    )
    if free < (1 - USED) * total:
        yield warning(
            f"{device}: {(total - free) / 1e9:.1f} of {total / 1e9:.1f} GB are in use already: end the processes that "
            "nvidia-smi lists, or choose other devices with CUDA_VISIBLE_DEVICES"
        )
    if not has_kernels(found.major, found.minor, torch.cuda.get_arch_list()):
        yield error(
            f"torch {torch.__version__} has no kernels for compute capability {found.major}.{found.minor} (it has "
            f"{', '.join(torch.cuda.get_arch_list())}): install a build of torch that has"
        )
        return
    if here.config.parallel.precision == "fp8":
        try:
            check_float8(device)
        except UserError as refused:
            yield error(str(refused))
    if found.major < 8 and here.config.parallel.precision in ("bf16", "amp_bf16"):
        asked = f"parallel.precision: {here.config.parallel.precision}"
        yield warning(f"{asked}, but {found.name} computes bf16 slowly: use fp16 or fp32")
    one = torch.ones(256, 256, device=device)
    if not bool(((one @ one) == 256).all()):
        yield error(f"{device}: a matrix product is wrong: take this device out of use")
    if here.first:
        yield from _devices_of_the_host()


def _devices_of_the_host() -> Lines:
    names = Counter(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
    if len(names) > 1:
        kinds = ", ".join(f"{count} {name}" for name, count in names.items())
        yield warning(f"devices of this host differ ({kinds}): the slowest sets the pace; choose with CUDA_VISIBLE_DEVICES")
    query = "--query-gpu=index,ecc.errors.uncorrected.volatile.total"
    for line in nvidia_smi(query, "--format=csv,noheader,nounits").splitlines():
        number, _, errors = line.partition(", ")
        if errors.isdecimal() and int(errors):  # "[N/A]" where the device has no ECC
            yield warning(f"GPU {number} has {errors} uncorrected memory errors: reset it, and replace it if they come back")


def hidden_gpus() -> str:
    """Why torch sees no CUDA device on a host that has some; "" where it has none."""
    if not (PROC / "driver/nvidia/version").exists() and not list(DEV.glob("nvidia[0-9]*")):
        return ""
    if torch.version.cuda is None:
        return f"this host has NVIDIA GPUs, but torch {torch.__version__} is built without CUDA: install a build with it"
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None and visible.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides the GPUs of this host: unset it"
    reason = "no reason given"
    try:
        torch.cuda.init()
    except Exception as failure:
        reason = one_line(failure)
    return (
        f"this host has NVIDIA GPUs, but CUDA {torch.version.cuda} of torch does not start ({reason}): update the driver, or "
        "install a build of torch for an earlier CUDA; a container needs --gpus all"
    )


def has_kernels(major: int, minor: int, built: Iterable[str]) -> bool:
    """Whether code *built* for these architectures ("sm_90", "compute_90") runs on a device of a compute capability."""
    for name in built:
        kind, _, number = name.rstrip("af").partition("_")
        if not number.isdecimal():
            continue
        its = divmod(int(number), 10)
        # Machine code runs on devices of its major version, PTX is compiled for all later ones.
        if its <= (major, minor) and (kind == "compute" or its[0] == major):
            return True
    return False


def processor() -> str:
    """The processor's name, and how many cores the host has."""
    found = None
    with suppress(OSError):
        found = re.search(r"^model name\s*: (.*)$", (PROC / "cpuinfo").read_text(), re.M)
    return f"{found[1] if found else platform.machine()}, {os.cpu_count()} cores"


def nvidia_smi(*arguments: str) -> str:
    """What nvidia-smi prints; "" where it is not there or does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()
    return ""


def links(here: Here) -> Lines:
    """What connects the devices that this host's ranks use."""
    count = here.identity.local_world_size
    if not (here.on_cuda and here.first) or count == 1:
        return
    pairs = list(itertools.combinations(range(count), 2))
    kinds = Counter(topology(nvidia_smi("topo", "-m")).values())
    connected = ", ".join(f"{kind} between {number} pairs" for kind, number in kinds.most_common())
    blocked = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    reached = f"{len(pairs) - len(blocked)} of {len(pairs)} pairs with peer access"
    yield ok(f"{count} devices, {reached}; {connected or 'nvidia-smi shows no topology'}")
    if blocked:
        more = f" (and {len(blocked) - 1} more pairs)" if len(blocked) > 1 else ""
        yield warning(
            f"devices {blocked[0][0]} and {blocked[0][1]}{more} cannot reach each other's memory, and exchange through the "
            "host's: GeForce cards never can; others need ACS switched off in the BIOS, and the IOMMU in passthrough mode"
        )
    without = sum(number for kind, number in kinds.items() if not kind.startswith("NV"))
    if 0 < without < kinds.total() / 2:
        yield warning(
            f"{without} pairs of GPUs have no NVLink though others do: choose devices that have it with CUDA_VISIBLE_DEVICES, "
            "or look for a bridge that is missing (nvidia-smi nvlink -s)"
        )


def topology(text: str) -> dict[tuple[int, int], str]:
    """What connects each pair of GPUs ("NV18", "PIX", "SYS", ...), from the table that ``nvidia-smi topo -m`` prints."""
    rows = [re.sub(r"\x1b\[[0-9;]*m", "", line).split() for line in text.splitlines()]
    columns = next((row for row in rows if row[:1] == ["GPU0"] and row[1:2] != ["X"]), [])
    gpus = [name for name in columns if re.fullmatch(r"GPU\d+", name)]
    found = {}
    for row in rows:
        if row and row[0] in gpus and row is not columns:
            for name, kind in zip(gpus, row[1:]):
                if gpus.index(name) > gpus.index(row[0]):
                    found[int(row[0][3:]), int(name[3:])] = kind
    return found


# What is compiled.


def compilers(here: Here) -> Lines:
    """Whether `parallel.compile` finds what it needs."""
    from bigvision.engine.parallelize import lacks_for_compile

    asked = here.config.parallel.compile
    if here.device is None:
        return
    if asked is False or (asked == "auto" and not here.on_cuda):
        yield ok(f"parallel.compile: {str(asked).lower()} compiles nothing on {here.device.type}")
    elif (missing := lacks_for_compile(here.device)) is None:
        yield ok(f"parallel.compile: {str(asked).lower()} finds a compiler")
    elif asked is True:
        yield error(f"parallel.compile: true needs {missing}: install it, or use auto or false")
    else:
        yield warning(f"parallel.compile: auto runs blocks eagerly for lack of {missing}: install it for speed")


# Memory and files.


def shared_memory(here: Here) -> Lines:
    """Whether /dev/shm has what NCCL, and the semaphores of data workers, take."""
    try:
        found = os.statvfs("/dev/shm")
    except OSError as failure:
        yield error(f"/dev/shm: {failure.strerror}: mount a tmpfs there, which semaphores of processes need")
        return
    free = found.f_bavail * found.f_frsize
    if free < SEMAPHORES and here.config.data.workers:
        yield error(
            f"/dev/shm has {free >> 10} KB left, and data workers cannot start without semaphores there: remove what is in "
            "it, or use data.workers 0"
        )
    elif here.device and (text := lacks_shared_memory(here.device, here.identity.local_world_size)):
        yield warning(text.removeprefix("warning: "))
    else:
        yield ok(f"/dev/shm has {free / 1e9:.1f} GB left")


def open_files(here: Here) -> Lines:
    """Whether the rank and its data workers may open as many files as they need."""
    data, ranks = here.config.data, here.identity.world_size
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    kept = max(files_kept(data.train), files_kept(data.val))
    rank = FILES_OF_RANK + FILES_OF_WORKER * data.workers + FILES_OF_PEER * (ranks - 1)
    needed = max(rank + (0 if data.workers else kept), FILES_OF_RANK + kept)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        allowed = "any number of" if soft == resource.RLIM_INFINITY else soft
        yield ok(f"a process may open {allowed} files and needs {needed} at most")
        return
    fix = f"run `ulimit -n {needed}` before"
    if hard != resource.RLIM_INFINITY and hard < needed:
        fix = f"the system allows {hard}: raise that in /etc/security/limits.conf, or with docker run --ulimit nofile={needed}"
    why = f"{data.workers} data workers, {ranks} ranks"
    yield error(f"a process may open {soft} files, but one with {why} may need {needed}: {fix}")


def files_kept(spec: str) -> int:
    """How many files of the dataset *spec* a process keeps open, at most."""
    from bigvision.data.sources.arrow import Parquet
    from bigvision.data.sources.shards import OPEN_FILES

    kept = {"webdataset": OPEN_FILES, "parquet": Parquet.most}
    return sum(number for name, number in kept.items() if f"{name}:" in spec)
