"""The same recipe under each launcher gives the same losses, and no launcher makes ranks exchange pickled objects."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import free_port, run_ranks
from tests.launch.commands import BIN, TORCHRUN, deepspeed, start
from tests.launch.hosts import DEVICE, ENVIRONMENT, Host, hosts  # noqa: F401
from tests.launch.plain import without_objects
from tests.recipes import losses, recipe, run, write_recipe

TRAIN = "launch/train.py"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The twenty losses of two ranks without a launcher."""
    return run_ranks(run, 2, recipe(tmp_path_factory.mktemp("reference")))[0]


def together(commands: list[list[str]], **environment: str) -> list[str]:
    """Run commands side by side, as on several hosts; all have to succeed. Returns what they printed."""
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda command: start(command, 300, **environment), commands))
    assert [one.returncode for one in done] == [0] * len(done), [one.stdout + one.stderr for one in done]
    return [one.stdout for one in done]


def mpirun(ranks: int) -> list[str]:
    if not shutil.which("mpirun"):
        pytest.skip("Open MPI: there is no mpirun on PATH (Debian: openmpi-bin)")
    return ["mpirun", *["--allow-run-as-root"] * (os.geteuid() == 0), "--oversubscribe", "--bind-to", "none", "-n", str(ranks)]


def static(arguments: list[str]) -> list[list[str]]:
    """Two agents, each told its place."""
    meet = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    return [[str(BIN / "torchrun"), *meet, "--node-rank", node, *arguments] for node in ("0", "1")]


def elastic(arguments: list[str]) -> list[list[str]]:
    """Two agents that find their places themselves, of which one would do."""
    meet = ["--nnodes", "1:2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "test", "--max-restarts", "3"]
    meet += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1"]
    # The first waits this long for the second.
    return [[str(BIN / "torchrun"), *meet, "--rdzv-conf", "last_call_timeout=120", *arguments]] * 2


def accelerate(arguments: list[str]) -> list[list[str]]:
    return [[str(BIN / "accelerate"), "launch", "--config_file", "launch/accelerate/fsdp_cpu.yaml", *arguments]]


LAUNCHERS: dict[str, Callable[[list[str]], list[list[str]]]] = {
    "mpirun": lambda arguments: [[*mpirun(2), sys.executable, *arguments]],
    "torchrun on two nodes": static,
    "torchrun": lambda arguments: [[*TORCHRUN, "--nproc-per-node", "2", *arguments]],
    "torchrun, elastic": elastic,
    "deepspeed": lambda arguments: [deepspeed("--num_gpus", "2", *arguments)],
    "accelerate": accelerate,
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] * (name != "mpirun")) for name in LAUNCHERS])
def test_the_same_losses(name: str, tmp_path: Path, reference: list[float]) -> None:
    said = together(LAUNCHERS[name]([TRAIN, write_recipe(tmp_path)]))
    if name == "accelerate":
        # Its CPU ranks are FSDP's, which adds in another order.
        assert losses(tmp_path / "out") == pytest.approx(reference, rel=1e-5)
        reference = run_ranks(run, 2, recipe(tmp_path / "fsdp", parallel={"strategy": "fsdp"}))[0]
    assert losses(tmp_path / "out") == reference
    assert sum(text.count("checkpoint  ") for text in said) == 1, "one rank speaks"


@pytest.mark.long
@pytest.mark.parametrize("script", ["one_host", "elastic"])
def test_scripts_of_torchrun(script: str, tmp_path: Path, reference: list[float]) -> None:
    command = [f"launch/torchrun/{script}.sh", write_recipe(tmp_path)]
    if script == "one_host":
        together([command], RANKS="2")
    else:
        together([command] * 2, RANKS="1", NODES="2", ENDPOINT=f"localhost:{free_port()}")
    assert losses(tmp_path / "out") == reference


@pytest.mark.long
def test_the_same_losses_on_two_hosts(hosts: tuple[Host, Host], tmp_path: Path, reference: list[float]) -> None:  # noqa: F811
    """Each in a network of its own, which reaches the other by one cable."""
    meet = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", hosts[0].address, "--master-port", "29500"]
    rest = [TRAIN, write_recipe(tmp_path)]
    torchrun = [str(BIN / "torchrun"), *meet, "--node-rank"]
    commands = [host.command([*torchrun, str(node), "--local-addr", host.address, *rest]) for node, host in enumerate(hosts)]
    together(commands, **ENVIRONMENT)
    assert losses(tmp_path / "out") == reference


@pytest.mark.long
def test_mpirun_on_two_hosts(hosts: tuple[Host, Host], tmp_path: Path, reference: list[float]) -> None:  # noqa: F811
    """The store is open to the network then, and is said to be; without the host of rank 0 nothing begins."""
    ssh = tmp_path / "ssh.sh"
    ssh.write_text(f'#!/bin/sh\nshift\nexec ip netns exec {hosts[1].name} sh -c "$*"\n')
    ssh.chmod(0o755)
    reach = ["--mca", "plm_rsh_agent", str(ssh), "--mca", "oob_tcp_if_include", DEVICE]
    reach += ["-H", ",".join(f"{host.address}:1" for host in hosts)]
    rest = [sys.executable, TRAIN, write_recipe(tmp_path)]
    done = start(hosts[0].command([*mpirun(2), *reach, *rest]), 300, **ENVIRONMENT)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and said and "mpirun -x MASTER_ADDR=HOST" in said[0], done.stderr
    exported = ["-x", f"MASTER_ADDR={hosts[0].address}", *(word for name in ENVIRONMENT for word in ("-x", name))]
    done = start(hosts[0].command([*mpirun(2), *reach, *exported, *rest]), 300, **ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"warning: the ranks meet at {hosts[0].address} port ") == 1
    assert losses(tmp_path / "out") == reference


STRATEGIES = {
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
    "zero1": {"strategy": "zero1"},
    "zero2": {"strategy": "zero2"},
    "zero3": {"strategy": "zero3"},
    "pipeline": {"strategy": "pipeline", "stages": 2, "microbatches": 4},
}


def run_without_objects(plain: dict[str, Any]) -> None:
    """Train, go on and evaluate, where an object pickled for other ranks, or read from them, would be an error."""
    from bigvision.cli import main

    with without_objects():
        run(plain)
        again = run(plain | {"train": plain["train"] | {"steps": 4}})
        assert len(again) == 4, "went on"
        assert main(["eval", f"{plain['out']}/step-00000004"]) == 0


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] * (name != "fsdp")) for name in STRATEGIES])
def test_no_strategy_exchanges_pickled_objects(name: str, tmp_path: Path) -> None:
    parallel = STRATEGIES[name] | {"precision": "fp32", "device": "cpu"}
    run_ranks(run_without_objects, 2, recipe(tmp_path / "out", parallel=parallel, train={"steps": 2, "micro_batch": 6}))


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
@pytest.mark.parametrize("name", [name for name in LAUNCHERS if name != "accelerate"])
def test_no_launcher_makes_ranks_exchange_pickled_objects(name: str, strategy: str, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, parallel={"strategy": strategy}, train={"steps": 2})
    together(LAUNCHERS[name](["tests/launch/plain.py", path]))
    assert len(losses(tmp_path / "out")) == 2
