"""ZeRO under real launchers: DeepSpeed's own, torchrun and accelerate launch, with the files of ds_configs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed import free_port, run_ranks
from tests.launch.commands import BIN, ROOT, TORCHRUN, deepspeed, launch, start
from tests.launch.plain import without_objects
from tests.recipes import lines, losses, recipe, run, write_recipe

FILES = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))
THREE = {"steps": 3}
COMPILES = pytest.mark.skipif(
    not shutil.which("c++"), reason="CPU Adam of parallel.offload needs a C++ compiler, and there is no c++ on PATH"
)


def cases(files: list[str], short: set[str]) -> list[Any]:
    """Files of ds_configs, each with its marks."""
    return [
        pytest.param(name, marks=[COMPILES] * name.endswith("offload") + [pytest.mark.long] * (name not in short))
        for name in files
    ]


def precision(name: str) -> str:
    return next((kind for kind in ("bf16", "fp16") if name.endswith(kind)), "fp32")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Three steps of ddp on two ranks."""
    return run_ranks(run, 2, recipe(tmp_path_factory.mktemp("ddp"), train={"steps": 3}))[0]


def near(reference: list[float]) -> Any:
    return pytest.approx(reference, rel=1e-5)


# Half precision is emulated on the CPU, and a whole run of it takes twenty minutes.
@pytest.mark.parametrize("name", cases([name for name in FILES if precision(name) == "fp32"], set()))
def test_the_launcher_trains_digits_with_every_file(name: str, tmp_path: Path) -> None:
    flags = ["--deepspeed", f"ds_configs/{name}.json", "--out", str(tmp_path)]
    said = launch(deepspeed("--num_gpus", "2", "launch/train.py", *flags), timeout=3600)
    last = lines(tmp_path)[-1]
    assert last["val_top1"] >= 0.97, last
    assert f"checkpoint  {tmp_path}/step-{last['step']:08}" in said
    saved = yaml.safe_load((tmp_path / "run.yaml").read_text())["parallel"]
    assert (saved["strategy"], saved["precision"]) == (name[:5], "fp32")


def run_without_objects(plain: dict[str, Any]) -> list[float]:
    with without_objects():
        return run(plain)


@pytest.mark.parametrize("name", cases(FILES, {"zero3"}))
def test_every_file_takes_the_steps_of_ddp(name: str, tmp_path: Path, reference: list[float]) -> None:
    parallel = {"deepspeed": f"ds_configs/{name}.json", "precision": precision(name)}
    found = run_ranks(run_without_objects, 2, recipe(tmp_path / "out", train={"steps": 3}, parallel=parallel))[0]
    assert found == (near(reference) if precision(name) == "fp32" else pytest.approx(reference, rel=2e-2))


@pytest.mark.long
def test_one_rank_needs_no_launcher(tmp_path: Path, reference: list[float]) -> None:
    launch([sys.executable, "launch/train.py", write_recipe(tmp_path, train=THREE), "--parallel.strategy", "zero3"])
    assert losses(tmp_path / "out") == near(reference)


HOSTS = ["--no_ssh", "--master_addr", "127.0.0.1", "--hostfile"]


@pytest.mark.parametrize(
    "how", ["bare", *(pytest.param(how, marks=pytest.mark.long) for how in ("module", "named slots", "hostfile"))]
)
def test_ways_to_launch(how: str, tmp_path: Path, reference: list[float]) -> None:
    """The number of ranks without flags is the launcher's choice: the GPUs, or the CPU's NUMA nodes."""
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    rest = [write_recipe(tmp_path, train=THREE), "--deepspeed", "ds_configs/zero2.json"]
    flags = {
        "bare": ["launch/train.py"],
        "module": ["--num_nodes", "1", "--num_gpus", "2", "--module", "bigvision.cli", "train"],
        "hostfile": [*HOSTS, str(tmp_path / "hosts"), "--node_rank", "0", "--num_nodes", "1", "launch/train.py"],
        "named slots": [
            *HOSTS, str(tmp_path / "hosts"), "--node_rank", "0", "--include", "localhost:0,1", "--no_local_rank",
            "launch/train.py",
        ],
    }  # fmt: skip
    launch(deepspeed(*flags[how], *rest))
    assert losses(tmp_path / "out") == near(reference)


@pytest.mark.long
def test_two_hosts_without_ssh(tmp_path: Path, reference: list[float]) -> None:
    """Two names for this machine, each with a launcher of its own, as on two hosts."""
    (tmp_path / "hosts").write_text("first slots=1\nsecond slots=1\n")
    rest = [
        *HOSTS,
        str(tmp_path / "hosts"),
        "launch/train.py",
        write_recipe(tmp_path, train=THREE),
        "--deepspeed",
        "ds_configs/zero2.json",
    ]
    port = free_port()
    with ThreadPoolExecutor() as pool:
        commands = [deepspeed("--node_rank", node, *rest, port=port) for node in ("0", "1")]
        said = list(pool.map(launch, commands))
    assert losses(tmp_path / "out") == near(reference)
    assert [text.count("checkpoint  ") for text in said] == [1, 0], "the second host's ranks are not rank 0"


FAULTS: dict[str, tuple[Any, list[str], list[str]]] = {
    "missing": (None, [], ["missing.json", "No such file"]),
    "contradiction": ({"train_batch_size": 7}, [], ["train_batch_size: 7", "train.global_batch: 24"]),
    "malformed": ('{"zero_optimization": ', [], ["not valid JSON", "line 1"]),
    "unknown": ({"zero_optimisation": {}}, [], ["'zero_optimisation'", "zero_optimization"]),
    "elastic": ({"elasticity": {"enabled": True}}, [], ["elasticity", "removed"]),
    "onebit": ({"optimizer": {"type": "OneBitAdam"}}, [], ["OneBitAdam", "removed"]),
    "mics": ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, [], ["mics_shard_size", "removed"]),
    "strategy": ({}, ["--parallel.strategy", "fsdp"], ["zero_optimization.stage: 2", "parallel.strategy: fsdp"]),
}


@pytest.mark.long
@pytest.mark.parametrize("name", FAULTS)
def test_a_mistake_is_one_line_and_exit_code_2(name: str, tmp_path: Path) -> None:
    """The launcher prints lines of its own, ends the other rank and hands on the exit code."""
    content, flags, words = FAULTS[name]
    file = tmp_path / f"{name}.json"
    if content is not None:
        whole = content if isinstance(content, str) else json.dumps({"zero_optimization": {"stage": 2}} | content)
        file.write_text(whole)
    rest = [write_recipe(tmp_path, train=THREE), "--deepspeed", str(file), *flags]
    done = start(deepspeed("--num_gpus", "2", "launch/train.py", *rest))
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(said) == 1 and all(word in said[0] for word in words), done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr and not (tmp_path / "out").exists()


@pytest.mark.long
def test_offload_without_a_compiler(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "launch/train.py",
        write_recipe(tmp_path, train=THREE),
        "--deepspeed",
        "ds_configs/zero2_offload.json",
    ]
    done = start(command, timeout=300, PATH=str(tmp_path), TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    assert done.returncode == 2 and done.stdout == "", done
    assert re.fullmatch(r"error: parallel\.offload: .*not found.*install a C\+\+ compiler.*\n", done.stderr), done.stderr


def shape(text: str) -> str:
    """What was printed, without the numbers."""
    return re.sub(r"[\d.]+", "#", text)


def start_under(strategy: str, folder: Path) -> subprocess.CompletedProcess[str]:
    flags = [write_recipe(folder, train=THREE), "--parallel.strategy", strategy]
    done = start([*TORCHRUN, "--nproc-per-node", "2", "launch/train.py", *flags])
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    return start_under("fsdp", tmp_path_factory.mktemp("fsdp"))


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_torchrun_under_zero_prints_what_it_prints_under_fsdp(
    strategy: str, tmp_path: Path, fsdp: subprocess.CompletedProcess[str], reference: list[float]
) -> None:
    done = start_under(strategy, tmp_path)
    assert shape(done.stderr) == shape(fsdp.stderr)
    assert [line.split()[:1] for line in done.stdout.splitlines()] == [line.split()[:1] for line in fsdp.stdout.splitlines()]
    assert losses(tmp_path / "out") == near(reference)


@pytest.mark.parametrize("how", ["file", "stage"])
@pytest.mark.long
def test_accelerate_launch_trains_under_deepspeed(how: str, tmp_path: Path, reference: list[float]) -> None:
    path = ROOT / "launch/accelerate/deepspeed_zero2_cpu.yaml"
    if how == "stage":
        config = yaml.safe_load(path.read_text()) | {"deepspeed_config": {"zero_stage": 3, "gradient_clipping": 1.0}}
        path = tmp_path / "accelerate.yaml"
        path.write_text(yaml.safe_dump(config))
    launch(
        [
            str(BIN / "accelerate"),
            "launch",
            "--config_file",
            str(path),
            "launch/train.py",
            write_recipe(tmp_path, train=THREE),
        ]
    )
    assert losses(tmp_path / "out") == near(reference)
    saved = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["parallel"]
    assert saved["strategy"] == {"file": "zero2", "stage": "zero3"}[how]
