"""`bigvision doctor`: each check with the fault that it should find, and the whole command on one and two ranks."""

from __future__ import annotations

import errno
import os
import resource
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bigvision import checkpoint
from bigvision.config import Config, load_config
from bigvision.errors import UserError
from bigvision.launchers import doctor, dry_run, machine, placement
from bigvision.launchers.machine import Here
from bigvision.runtime.rendezvous import Identity
from tests.cli.test_mistakes import command
from tests.distributed import run_ranks
from tests.recipes import recipe, run, write, write_recipe

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
TOPOLOGY = """\t\x1b[4mGPU0\tGPU1\tGPU2\tGPU3\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m
GPU0\t X \tNV18\tNV18\t{}\tPIX\t0-47\t0
GPU1\tNV18\t X \tNV18\tNV18\tNODE\t0-47\t0
GPU2\tNV18\tNV18\t X \tNV18\tSYS\t48-95\t1
GPU3\t{}\tNV18\tNV18\t X \tSYS\t48-95\t1
NIC0\tPIX\tNODE\tSYS\tSYS\t X

Legend:
  X    = Self
"""


def here(config: Config | None = None, device: torch.device | None = CPU, **identity: Any) -> Here:
    given = {"rank": 0, "world_size": 1, "local_rank": 0, "local_world_size": 1, "launcher": "python"} | identity
    return Here(config or Config(), Identity(**given), device)


def configured(**sections: Any) -> Config:
    return load_config(sections)


def lines(check: Callable[..., machine.Lines], *arguments: Any) -> list[str]:
    """What a check finds, each line with its state."""
    return [f"{one.state}: {one.text}" for one in doctor.examine("it", lambda: check(*arguments))]


def one(found: list[str], state: str, *words: str) -> str:
    """The only line of *found* with this state, which has these words and says what to do."""
    (line,) = [line for line in found if line.startswith(state)]
    assert all(word in line for word in words), line
    assert state == "ok" or ": " in line.partition(": ")[2], f"it does not say what to do: {line}"
    return line


# The launcher and the network.


@pytest.mark.parametrize(
    ("identity", "environment", "state", "words"),
    [
        ({}, {"SLURM_NTASKS": "8"}, "warning", ["SLURM_NTASKS=8", "srun"]),
        ({"world_size": 2, "local_world_size": 8}, {}, "error", ["8 ranks on this host, but 2", "LOCAL_WORLD_SIZE"]),
        ({}, {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}, "error", ["WORLD_SIZE=1", "mpirun", "unset RANK"]),
        (
            {"world_size": 4, "local_world_size": 4},
            {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_ID": "0"},
            "error",
            ["RANK=0", "SLURM_PROCID=1", "srun", "unset"],
        ),
        ({"world_size": 2, "address": "no-such-host.invalid"}, {}, "error", ["no-such-host.invalid", "name the host"]),
        ({"world_size": 2, "address": "127.0.0.1"}, {}, "error", ["127.0.0.1", "several", "name the host of rank 0"]),
        ({"world_size": 2, "rank": 1, "address": "localhost"}, {}, "error", ["localhost", "several"]),
    ],
)
def test_contradictions_of_launchers(
    identity: dict[str, Any], environment: dict[str, str], state: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    launcher = "python" if "SLURM_NTASKS" in environment else "torch environment"
    given = {"launcher": launcher, "port": 29500, "address": "127.0.0.1"} | identity
    one(lines(placement.launcher, here(**given)), state, *words)


def test_a_launcher_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")  # torchrun under srun, one task for each host
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    identity = {"world_size": 4, "local_world_size": 4, "launcher": "torchrun", "address": "127.0.0.1", "port": 29500}
    assert [line[:2] for line in lines(placement.launcher, here(**identity))] == ["ok"]
    assert [line[:2] for line in lines(placement.launcher, here())] == ["ok"]


@pytest.mark.parametrize("name", ["GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"])
def test_an_interface_that_is_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "eth77")
    one(lines(placement.network, here()), "error", f"{name}=eth77", "lo", "unset it")
    monkeypatch.setenv(name, "lo")
    assert not [line for line in lines(placement.network, here()) if line.startswith("error")]


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("eth", ["eth0", "eth1"]),
        ("=eth", []),
        ("=eth0,lo", ["lo", "eth0"]),
        ("^lo,eth", ["ib0"]),
        ("^=eth0", ["lo", "eth1", "ib0"]),
    ],
)
def test_interfaces_as_nccl_reads_them(asked: str, meant: list[str]) -> None:
    assert placement.matching(asked, ["lo", "eth0", "eth1", "ib0"]) == meant


def test_the_interfaces_of_several_hosts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    several = {"world_size": 4, "local_world_size": 2, "device": CUDA}
    up = {"lo": "127.0.0.1", "docker0": "172.17.0.1", "eth0": "10.0.0.1"}
    monkeypatch.setattr(placement, "interfaces", lambda: up)
    monkeypatch.setattr(placement, "SYS", tmp_path)
    (tmp_path / "class/net/eth0").mkdir(parents=True)
    (tmp_path / "class/net/eth0/speed").write_text("1000\n")
    monkeypatch.setattr(placement.socket, "getaddrinfo", lambda *_: [(2, 1, 6, "", ("127.0.1.1", 0))])
    found = lines(placement.network, here(**several))
    one(found, "error", "loopback" if "loopback" in str(found) else "does not mean an address", "GLOO_SOCKET_IFNAME")
    one(found, "warning", "eth0", "1000 Mbit/s", "NCCL_SOCKET_IFNAME")
    assert "NCCL eth0" in one(found, "ok")
    monkeypatch.setattr(placement.socket, "getaddrinfo", lambda *_: [(2, 1, 6, "", ("10.0.0.1", 0))])
    (tmp_path / "class/infiniband/mlx5_0").mkdir(parents=True)
    assert "gloo takes eth0" in one(lines(placement.network, here(**several)), "ok")
    assert len(lines(placement.network, here(**several))) == 1


def test_real_interfaces() -> None:
    assert placement.interfaces()["lo"] == "127.0.0.1"


def test_variables_that_slow_a_run_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    monkeypatch.setenv("NCCL_P2P_DISABLE", "0")
    one(lines(placement.environment, here(device=CUDA)), "warning", "CUDA_LAUNCH_BLOCKING=1", "unset it")
    assert lines(placement.environment, here()) == []


# Cores.


def facts(host: str = "a", local: int = 2, cores: Any = (0, 1), **more: Any) -> dict[str, Any]:
    usual = {"quota": None, "bound": False, "threads": 1, "workers": 0, "versions": {"torch": "2.14"}}
    return {"host": host, "local": local, "cores": list(cores)} | usual | more


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([facts(threads=2), facts(threads=2)], ["2 ranks on a with 4 threads have 2 cores", "OMP_NUM_THREADS=1"]),
        ([facts(workers=2), facts(workers=2)], ["4 data workers have 2 cores", "data.workers 1"]),
        ([facts(cores=range(64), workers=8, quota=4.0), facts(cores=range(64))], ["8 data workers have 4 cores"]),
        (
            [facts(bound=True, cores=[0]), facts(bound=True, cores=[0])],
            ["ranks 0 and 1 are both bound to cores 0", "--cpu-bind"],
        ),
        ([facts(bound=True, cores=[0, 1, 2, 3]), facts(bound=True, cores=[3, 4])], ["both bound to cores 3:"]),
        ([facts(bound=True, cores=[0, 1, 2, 3]), facts(bound=True, cores=[0, 1, 2, 3])], []),  # those of a container
        ([facts(bound=True, cores=[0]), facts(bound=True, cores=[1])], []),
        ([facts("a", 1, bound=True, cores=[0]), facts("b", 1, bound=True, cores=[0])], []),
    ],
)
def test_cores_of_the_ranks_of_a_host(ranks: list[dict[str, Any]], words: list[str]) -> None:
    found = lines(placement.enough_cores, dict(enumerate(ranks)))
    if words:
        one([line for line in found if words[0] in line], "warning", *words)
    assert words or not found


def test_ranks_that_differ() -> None:
    found = {0: facts(), 1: facts(versions={"torch": "2.13"})}
    one(lines(placement.same_versions, found), "error", "rank 1 on a has torch 2.13, rank 0 2.14", "install the same")
    one(
        lines(placement.ranks_of_hosts, {0: facts(local=1), 1: facts(local=1)}),
        "error",
        "2 ranks are on a",
        "counts 1",
        "LOCAL_",
    )
    assert not lines(placement.ranks_of_hosts, {0: facts(), 1: facts()})


def test_a_rank_far_from_its_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(placement, "SYS", tmp_path)
    properties = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for path, text in (("bus/pci/devices/0000:1b:00.0/numa_node", "1"), ("devices/system/node/node1/cpulist", "8-11,40-43")):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(text + "\n")
    monkeypatch.setattr(placement, "usable_cores", lambda: [0, 1, 2, 5])
    one(lines(placement.cores, here(device=CUDA)), "warning", "0-2, 5", "8-11, 40-43", "--cpunodebind=1")
    monkeypatch.setattr(placement, "usable_cores", lambda: [5, 8])
    one(lines(placement.cores, here(device=CUDA)), "ok")


# Versions and compilers.


@pytest.mark.parametrize(
    ("name", "version", "words"),
    [
        ("timm", "1.0.30", ["timm 1.0.30 does not fit bigvision", "timm>=1.0.31", "pip install 'timm>=1.0.31'"]),
        ("torch", "2.13.0", ["torch 2.13.0 does not fit torchvision", "pip install"]),
        ("deepspeed", None, ["deepspeed is not installed", "pip install 'deepspeed"]),
    ],
)
def test_versions_that_do_not_fit(name: str, version: str | None, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = machine.installed
    monkeypatch.setattr(machine, "installed", lambda asked: version if asked == name else before(asked))
    if name == "torch":
        monkeypatch.setattr(machine, "required_by", lambda owner: ["torch (==2.14.*)"] if owner == "torchvision" else [])
    found = [line for line in lines(machine.mismatches) if line.startswith("error")]
    one(found, "error", *words)


def test_versions_here_fit_and_broken_packages_show(monkeypatch: pytest.MonkeyPatch) -> None:
    found = lines(machine.versions, here())
    assert torch.__version__.partition("+")[0] in found[0] and not [line for line in found if line.startswith("error")], found

    def broken(name: str) -> None:
        raise RuntimeError("PyTorch and torchvision were compiled with\ndifferent CUDA major versions")

    monkeypatch.setattr(machine.importlib, "import_module", broken)
    found = [line for line in lines(machine.versions, here()) if "torchvision cannot be imported" in line]
    assert found and "different CUDA" in found[0] and "\n" not in found[0]

    monkeypatch.setattr(machine.importlib, "import_module", lambda name: SimpleNamespace(__version__="0.29.2+cpu"))
    monkeypatch.setattr(torch, "__version__", "2.14.1+cu130")
    one(lines(machine.versions, here()), "warning", "built for cu130, torchvision for cpu", "same index")


def test_bounds_without_an_installed_project(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise machine.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(machine.metadata, "requires", missing)
    assert any(text.startswith("timm>=") for text in machine.required_by("bigvision")) and machine.required_by("timm") == []


def test_a_compiler_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    asked = configured(parallel={"compile": True})
    one(lines(machine.compilers, here(asked)), "error", "parallel.compile: true needs a C++ compiler", "install it")
    one(lines(machine.compilers, here()), "ok", "auto compiles nothing on cpu")
    monkeypatch.setattr("bigvision.engine.parallelize.lacks_for_compile", lambda device: "Triton")
    one(lines(machine.compilers, here(device=CUDA)), "warning", "Triton", "install it")


# Devices, with what CUDA would answer.


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A host with two H100s, as torch and nvidia-smi describe it; tests change the answers."""
    answers = SimpleNamespace(
        names=["NVIDIA H100 80GB HBM3"] * 2, free=80_000_000_000, capability=(9, 0), archs=["sm_80", "sm_90", "compute_120"],
        peers=True, ecc="0, 0\n1, [N/A]", topology="", product=1.0,
    )  # fmt: skip

    def smi(*arguments: str) -> str:
        return answers.topology if arguments[0] == "topo" else answers.ecc if "ecc" in arguments[0] else "570.86.15"

    def properties(device: object) -> SimpleNamespace:
        return SimpleNamespace(name=answers.names[0], major=answers.capability[0], minor=answers.capability[1])

    ones = torch.ones
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: len(answers.names),
        "get_device_properties": properties,
        "mem_get_info": lambda device: (answers.free, 84_000_000_000),
        "get_arch_list": lambda: answers.archs,
        "get_device_name": lambda number: answers.names[number],
        "can_device_access_peer": lambda one, other: answers.peers,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(*shape) * answers.product)
    monkeypatch.setattr(machine, "nvidia_smi", smi)
    return answers


def test_devices_of_cuda(cuda: SimpleNamespace) -> None:
    it = here(device=CUDA, world_size=2, local_world_size=2)
    found = lines(machine.devices, it)
    assert len(found) == 1 and "H100" in found[0] and "driver 570.86.15" in found[0] and "capability 9.0" in found[0]

    cuda.free = 60_000_000_000
    one(lines(machine.devices, it), "warning", "24.0 of 84.0 GB are in use", "nvidia-smi")
    cuda.free, cuda.names = 80_000_000_000, ["NVIDIA H100 80GB HBM3", "NVIDIA A100"]
    one(lines(machine.devices, it), "warning", "differ", "CUDA_VISIBLE_DEVICES")
    cuda.names, cuda.ecc = ["NVIDIA L4"] * 2, "0, 0\n1, 12"
    one(lines(machine.devices, it), "warning", "GPU 1 has 12 uncorrected", "reset it")
    cuda.ecc, cuda.capability, cuda.archs = "", (7, 5), ["sm_70"]
    one(lines(machine.devices, it), "warning", "bf16 slowly", "fp16")
    cuda.capability = (12, 0)
    one(lines(machine.devices, it), "error", "no kernels for compute capability 12.0", "install a build")
    cuda.archs, cuda.product = ["sm_120"], 1.5
    one(lines(machine.devices, it), "error", "matrix product is wrong", "out of use")
    cuda.product, cuda.names = 1.0, ["NVIDIA H100 80GB HBM3"]
    one(lines(machine.devices, it), "error", "2 ranks on a host with 1 CUDA devices", "start as many ranks as devices")


def test_a_host_whose_gpus_torch_does_not_see(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [line[:2] for line in lines(machine.devices, here())] == ["ok"]
    wanted = configured(parallel={"device": "cuda"})
    one(lines(machine.devices, here(wanted)), "error", "parallel.device: cuda", "use cpu or auto")

    monkeypatch.setattr(machine, "DEV", tmp_path)
    (tmp_path / "nvidia0").touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    one(lines(machine.devices, here()), "warning", "CUDA_VISIBLE_DEVICES=''", "unset it")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")

    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040)")

    monkeypatch.setattr(torch.cuda, "init", too_old)
    one(lines(machine.devices, here()), "warning", "too old (found version 11040)", "update the driver")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert any("built without CUDA" in line for line in lines(machine.devices, here(wanted)) if line.startswith("error"))


def test_links_between_devices(cuda: SimpleNamespace) -> None:
    it = here(device=CUDA, world_size=4, local_world_size=4)
    cuda.topology = TOPOLOGY.format("NV18", "NV18")
    assert "4 devices, 6 of 6 pairs" in one(lines(machine.links, it), "ok", "NV18 between 6 pairs")
    assert machine.topology(cuda.topology)[1, 3] == "NV18" and len(machine.topology(cuda.topology)) == 6
    cuda.topology = TOPOLOGY.format("SYS", "SYS")
    one(lines(machine.links, it), "warning", "1 pairs of GPUs have no NVLink", "bridge")
    cuda.topology, cuda.peers = "", False
    one(lines(machine.links, it), "warning", "devices 0 and 1 (and 5 more pairs)", "GeForce")
    assert lines(machine.links, here()) == [] and lines(machine.links, replace(it, identity=here(local_rank=1).identity)) == []


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((8, 9), ["sm_80", "sm_90"], True),
        ((8, 0), ["sm_86"], False),
        ((10, 3), ["sm_90", "compute_90"], True),
        ((10, 0), ["sm_100a"], True),
        ((12, 0), ["sm_90"], False),
    ],
)
def test_kernels_for_a_device(capability: tuple[int, int], built: list[str], runs: bool) -> None:
    assert machine.has_kernels(*capability, built) == runs


# Memory and files.


def fake_statvfs(free: int, inodes: int = 100) -> Callable[[object], SimpleNamespace]:
    return lambda path: SimpleNamespace(f_bavail=free, f_frsize=1, f_files=100, f_favail=inodes)


def test_shared_memory_that_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    one(lines(machine.shared_memory, here()), "ok", "/dev/shm has")
    several = here(device=CUDA, world_size=8, local_world_size=8)
    monkeypatch.setattr(os, "statvfs", fake_statvfs(64 << 20))
    one(lines(machine.shared_memory, several), "warning", "64 MB left", "512 MB", "--shm-size")
    monkeypatch.setattr(os, "statvfs", fake_statvfs(0))
    one(lines(machine.shared_memory, here()), "error", "0 KB left", "data.workers 0")

    def missing(path: object) -> None:
        raise OSError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(os, "statvfs", missing)
    one(lines(machine.shared_memory, here()), "error", "No such file", "mount a tmpfs")


@pytest.fixture
def few_files() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_few_open_files(few_files: None, monkeypatch: pytest.MonkeyPatch) -> None:
    one(lines(machine.open_files, here()), "ok", "200 files")
    workers = configured(data={"workers": 16})
    one(lines(machine.open_files, here(workers)), "error", "200 files", "16 data workers", "ulimit -n 256")
    one(lines(machine.open_files, here(world_size=640)), "error", "640 ranks", "ulimit -n")
    shards = configured(data={"train": "webdataset:x", "val": "digits", "workers": 1})
    one(lines(machine.open_files, here(shards)), "error", "ulimit -n 256")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (200, 200))
    one(lines(machine.open_files, here(workers)), "error", "the system allows 200", "limits.conf")


# Data and output.


def pictures(folder: Path, classes: dict[str, int]) -> None:
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = np.random.default_rng(index).integers(0, 255, (40, 48, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")


def test_data_that_is_missing_damaged_or_does_not_agree(tmp_path: Path) -> None:
    def look(train: str, val: str) -> list[str]:
        return lines(dry_run.data, here(configured(data={"train": train, "val": val})), [])

    spec = f"imagefolder:{tmp_path}/photos"
    one(look(spec, spec), "error", "data.train", "photos")
    pictures(tmp_path / "photos/train", {"cat": 10, "dog": 10})
    pictures(tmp_path / "photos/val", {"cat": 3, "dog": 3})
    assert [line[:2] for line in look(spec, spec)] == ["ok", "ok"]
    for path in (tmp_path / "photos/val/dog").iterdir():
        path.write_bytes(path.read_bytes()[:60])
    one(look(spec, spec), "warning", "data.val: 3 of 6 samples", "photos/val/dog/", "data.bad_budget")
    for path in (tmp_path / "photos/val/cat").iterdir():
        path.write_bytes(b"no picture")
    one(look(spec, spec), "error", "data.val: 6 of 6")
    pictures(tmp_path / "other", {"cat": 3, "cow": 3})
    one(look(spec, f"imagefolder:{tmp_path}/other"), "error", "data.val", "cow")
    (tmp_path / "empty/dog").mkdir(parents=True)


def test_a_class_without_training_images(tmp_path: Path) -> None:
    classes = tmp_path / "classes.txt"
    classes.write_text("cat\ndog\ncow\n")
    pictures(tmp_path / "train", {"cat": 10, "dog": 10})
    pictures(tmp_path / "val", {"cat": 3, "cow": 3})
    data = {
        "train": f"imagefolder:{tmp_path}/train",
        "val": f"imagefolder:{tmp_path}/val",
        "classes": str(tmp_path / "classes.txt"),
    }
    found = lines(dry_run.data, here(configured(data=data)), [])
    one(found, "warning", "'cow'", "no sample in data.train")


def test_output_that_cannot_be_written_or_has_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    it = here(configured(**recipe(tmp_path / "runs/new", "small")))
    monkeypatch.setattr(dry_run, "BLOCKS", 1)
    found = lines(dry_run.out, it, ["a", "b"])
    assert [line[:2] for line in found] == ["ok", "ok"] and "4 more checkpoints" in found[1] and list(tmp_path.iterdir()) == []

    monkeypatch.setattr(dry_run, "checkpoint_bytes", lambda config, classes: 1_000_000)
    (tmp_path / "runs").write_text("a file")
    one(lines(dry_run.out, it, []), "error", "cannot be written", "--out")
    (tmp_path / "runs").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(dry_run.os, "statvfs", fake_statvfs(9_000_000, inodes=0))
        one(lines(dry_run.out, it, []), "error", "no free inodes", "remove files")
        patched.setattr(dry_run.os, "statvfs", fake_statvfs(3_000_000))
        one(lines(dry_run.out, it, []), "error", "0.003 GB free", "4 more checkpoints", "checkpoint.keep: 3", "free space")
        patched.setattr(dry_run, "written", lambda folder: 1000.0)
        one(lines(dry_run.out, it, []), "warning", "checkpoint.timeout: 600", "faster disk")
    with checkpoint.Lock(tmp_path / "runs/new"):
        one(lines(dry_run.out, it, []), "error", "runs/new", "--out")
    assert lines(dry_run.out, it, [])[0].startswith("ok")


@pytest.mark.parametrize(
    "sections",
    [
        {"ema": {"decay": 0.9}},
        {"model": {"trainable": "head", "frozen_dtype": "bf16"}, "optim": {"name": "sgd"}},
        pytest.param({"model": {"lora": {"rank": 2}}, "ema": {"decay": 0.9}}, marks=pytest.mark.long),
        pytest.param({"model": {"name": "test_resnet", "options": {}}, "ema": {"decay": 0.9}}, marks=pytest.mark.long),
        pytest.param({"optim": {"name": "adafactor"}}, marks=pytest.mark.long),
        pytest.param({"optim": {"name": "muon"}}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_the_size_of_a_checkpoint(sections: dict[str, Any], tmp_path: Path) -> None:
    model = sections.get("model", {})
    plain = recipe(
        tmp_path, "small", **{name: keys for name, keys in sections.items() if name != "model"} | {"train": {"steps": 1}}
    )
    plain["model"] = plain["model"] | model
    run(plain)
    held = 0
    for path in (tmp_path / "step-00000001").glob("*.safetensors"):
        with path.open("rb") as file:
            held += path.stat().st_size - 8 - struct.unpack("<Q", file.read(8))[0]
    assert dry_run.checkpoint_bytes(load_config(plain), 10) == held


# The whole command.


def states(printed: str) -> dict[str, set[str]]:
    """The states of the lines of each check."""
    found: dict[str, set[str]] = {}
    for line in printed.splitlines()[:-1]:
        found.setdefault(line[8:22].strip(), set()).add(line.split()[0])
    return found


def test_the_command_on_one_rank(tmp_path: Path) -> None:
    path = write_recipe(
        tmp_path, train={"steps": 20}, data={"trace": str(tmp_path / "trace.jsonl")}, checkpoint={"resume": "3"}
    )
    before = sorted(tmp_path.rglob("*"))
    ((code, printed, errors),) = run_ranks(command, 1, ["doctor", path])
    found = states(printed)
    assert code == 0, printed + errors
    assert {"recipe", "launcher", "versions", "devices", "data", "out", "dry run"} <= found.keys(), printed
    assert "2 steps of 24 samples: loss 2." in printed and "all-reduce" not in found
    assert printed.endswith(" warnings\n") or printed.endswith(" warning\n")
    assert sorted(tmp_path.rglob("*")) == before, "something is left behind"


def broken(arguments: list[str]) -> tuple[int, str, str]:
    def check(here: Here) -> machine.Lines:
        yield machine.ok("so far")
        raise ZeroDivisionError("by zero")

    before = dict(doctor.CHECKS)
    doctor.CHECKS["devices"] = check
    try:
        return command(arguments)
    finally:
        doctor.CHECKS.clear()
        doctor.CHECKS.update(before)


def test_a_broken_check_and_a_wrong_recipe_hide_nothing(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    ((code, printed, _),) = run_ranks(broken, 1, ["doctor", path])
    found = states(printed)
    assert code == 2 and found["devices"] == {"ok", "error"} and found["cores"], printed
    assert "ZeroDivisionError: by zero" in printed and found["dry run"] == {"warning"}

    ((code, printed, _),) = run_ranks(command, 1, ["doctor", path, "--data.train", f"imagefolder:{tmp_path}/none"])
    found = states(printed)
    assert code == 2 and found["data"] == {"error"} and found["out"] == {"ok"} and found["dry run"] == {"warning"}, printed
    ((code, printed, _),) = run_ranks(command, 1, ["doctor", path, "--train.stpes", "3"])
    found = states(printed)
    assert code == 2 and found["recipe"] == {"error"} and found["versions"] and "data" not in found, printed


def meeting_alone(arguments: list[str]) -> tuple[int, str, str]:
    if os.environ["RANK"] == "1":
        return 0, "", ""
    before, doctor.MEETING = doctor.MEETING, timedelta(seconds=1)
    try:
        return command(arguments)
    finally:
        doctor.MEETING = before


def failing(arguments: list[str]) -> tuple[int, str, str]:
    from bigvision.engine import Engine

    before = Engine.train_step

    def step(self: Engine, batch: Any) -> Any:
        if os.environ["RANK"] == "1":
            raise ValueError("this rank is broken")
        return before(self, batch)

    Engine.train_step = step  # type: ignore[method-assign]
    try:
        return command(arguments)
    finally:
        Engine.train_step = before  # type: ignore[method-assign]


def test_the_command_on_two_ranks(tmp_path: Path) -> None:
    path = write(tmp_path, recipe(tmp_path / "out", "small", parallel={"strategy": "fsdp"}, limits={"grace": 4.0}))
    before = sorted(tmp_path.rglob("*"))
    (code, printed, errors), (other, silent, _) = run_ranks(command, 2, ["doctor", path])
    assert code == other == 0 and silent == "", printed + errors
    assert "all-reduce    ranks 0-1: 16 MB over 2 ranks in " in printed
    assert "dry run       ranks 0-1: 2 steps of 24 samples: loss 2." in printed
    assert "versions      ranks 0-1: Python" in printed and "data          rank 0: " in printed

    refused = ["doctor", path, "--train.global_batch", "25", "--train.micro_batch", "5"]
    results = run_ranks(command, 2, refused)
    assert [code for code, *_ in results] == [2, 2]
    assert "error   dry run       ranks 0-1: train.global_batch: 25" in results[0][1], results
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.long
def test_ranks_that_fail_or_do_not_come(tmp_path: Path) -> None:
    path = write(tmp_path, recipe(tmp_path / "out", "small", limits={"grace": 4.0}))
    before = sorted(tmp_path.rglob("*"))
    results = run_ranks(failing, 2, ["doctor", path])
    assert [code for code, *_ in results] == [2, 2], results
    assert "error   dry run       rank 1: ValueError: this rank is broken" in results[0][1], results
    assert "Traceback" in results[1][2] and "all-reduce" in results[0][1]
    assert sorted(tmp_path.rglob("*")) == before

    (code, printed, _), _ = run_ranks(meeting_alone, 2, ["doctor", path])
    assert code == 2 and "error   ranks " in printed and "start all at once" in printed and "versions" in printed, printed


def test_what_other_ranks_have_not_sent() -> None:
    ranks = doctor.Ranks(Identity(0, 3, 0, 3, "python"), [])
    ranks.meet(timedelta(seconds=5))
    ranks.store.set("1/1", '["theirs"]')
    assert ranks.gather(["mine"], timedelta(seconds=0.2)) == {0: ["mine"], 1: ["theirs"]}
    ranks.main = False
    with pytest.raises(RuntimeError):
        ranks.from_main(None, timedelta(seconds=0.1))


def test_equal_lines_of_ranks_are_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    ranks = doctor.Ranks(Identity(0, 8, 0, 8, "torchrun"), [])
    same, other = doctor.Finding("cores", "ok", "same"), doctor.Finding("cores", "warning", "other: change it")
    ranks.print(
        {0: [same], 1: [same], 2: [same], 4: [same, other], 5: [other]}, [doctor.Finding("versions", "error", "all: fix")]
    )
    assert ranks.end() == 2 and ranks.errors == {"versions"}
    assert capsys.readouterr().out.splitlines() == [
        "ok      cores         ranks 0-2, 4: same",
        "warning cores         ranks 4-5: other: change it",
        "error   versions      all: fix",
        "1 error, 1 warning",
    ]


def test_the_recipe_of_a_command(tmp_path: Path) -> None:
    found: list[doctor.Finding] = []
    assert doctor.read([], found).data.train == "digits" and "digits.yaml" in found[0].text
    with pytest.raises(UserError, match=r"nothing\.yaml"):
        doctor.read([str(tmp_path / "nothing.yaml")], [])
