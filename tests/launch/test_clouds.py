"""What SageMaker and SkyPilot run on their machines, run on this one."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from tests.distributed import free_port, run_ranks
from tests.launch.commands import BIN, ROOT
from tests.launch.test_same_losses import together
from tests.recipes import losses, recipe, run, write_recipe


def module(path: str) -> ModuleType:
    """A program of launch/, which is no package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def sagemaker_flags(recipe_path: str, flags: list[str]) -> list[str]:
    """The arguments that SageMaker's driver makes of the hyperparameters of ``submit.py``."""
    hyperparameters = module("launch/sagemaker/submit.py").hyperparameters(recipe_path, flags)
    return [word for name, value in hyperparameters.items() for word in (f"--{name}", value)]


def test_sagemaker_arguments() -> None:
    entry = module("launch/sagemaker/train.py")
    given = sagemaker_flags("a.yaml", ["--train.steps", "20", "--parallel.strategy=zero2"])
    assert entry.arguments(given) == [
        "a.yaml", "--train.steps", "20", "--parallel.strategy", "zero2", "--out", "/opt/ml/checkpoints",
    ]  # fmt: skip
    assert entry.arguments(["--out=/fsx/run"]) == ["--out=/fsx/run"]
    with pytest.raises(SystemExit, match="in pairs"):
        sagemaker_flags("a.yaml", ["--progress"])


@pytest.mark.long
def test_sagemaker_driver(tmp_path: Path) -> None:
    """Two instances under the command of its torchrun driver, of sagemaker 3."""
    flags = sagemaker_flags(write_recipe(tmp_path), ["--train.steps", "3", "--out", str(tmp_path / "out")])
    meet = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    command = [str(BIN / "torchrun"), *meet]
    together([[*command, f"--node_rank={node}", "launch/sagemaker/train.py", *flags] for node in (0, 1)])
    assert losses(tmp_path / "out") == run_ranks(run, 2, recipe(tmp_path / "reference", train={"steps": 3}))[0]


@pytest.mark.long
def test_skypilot_run_section(tmp_path: Path) -> None:
    """As on two nodes; only the port is another, since other runs may share this machine."""
    text = yaml.safe_load((ROOT / "launch/skypilot/train.yaml").read_text())["run"]
    script = re.sub("29500", str(free_port()), text)
    assert script != text
    commands = [["env", f"SKYPILOT_NODE_RANK={node}", "bash", "-c", script] for node in (0, 1)]
    together(
        commands,
        SKYPILOT_NUM_NODES="2", SKYPILOT_NUM_GPUS_PER_NODE="1", SKYPILOT_NODE_IPS="127.0.0.1\n127.0.0.1",
        RECIPE=write_recipe(tmp_path, train={"steps": 3}), OUT=str(tmp_path / "out"),
    )  # fmt: skip
    assert losses(tmp_path / "out") == run_ranks(run, 2, recipe(tmp_path / "reference", train={"steps": 3}))[0]
