"""What users start a run with, on one device in the default precision: each command as the documentation has it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cuda.jobs import job
from tests.cuda.runs import DATA_PARALLEL, compiler, device, marks_of, on_cpu
from tests.distributed import free_port
from tests.recipes import losses, recipe

ROOT = Path(__file__).parents[2]
TRAIN = "launch/train.py"
# As modules of this Python: the scripts may not be on PATH.
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file"]
DEEPSPEED = ["-m", "deepspeed.launcher.runner", "--num_gpus", "1"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--dynamo_backend", "no"]


def command(kind: str, folder: Path, recipe_file: str) -> list[str]:
    """The arguments to Python of a launcher *kind*; what follows a "+" is a file of ds_configs."""
    name, _, file = kind.partition("+")
    flags = [TRAIN, recipe_file, *(["--deepspeed", f"ds_configs/{file}.json"] if file else [])]
    if name == "python":
        return flags
    if name == "torchrun":
        return [*TORCHRUN, "--rdzv-endpoint", str(folder / "meet"), "--local-addr", "127.0.0.1", *flags]
    if name == "deepspeed":
        return [*DEEPSPEED, "--master_port", str(free_port()), *flags]
    return [*ACCELERATE, "--mixed_precision", "bf16", *(["--cpu"] if on_cpu() else []), *flags]


COMPILED = () if on_cpu() else ("python", "deepspeed+zero2")
"""Where all is left as it is by default; compiling would take the others longer than all else."""


def launched(folder: Path, kind: str) -> tuple[int, str, list[float]]:
    """Train for six steps with two loading workers; returns the exit code, what was printed, and the losses."""
    made = recipe(folder / "out", data={"workers": 2}, train={"steps": 6, "micro_batch": 8})
    made["parallel"] = {"device": device()} | ({"strategy": "fsdp"} if "+" not in kind else {})
    if kind not in COMPILED:
        made["parallel"]["compile"] = False
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(made))
    done = subprocess.run(
        [sys.executable, *command(kind, folder, str(path))], cwd=ROOT, capture_output=True, text=True, timeout=180,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    out = folder / "out"
    return done.returncode, (done.stdout + done.stderr)[-4000:], losses(out) if (out / "metrics.jsonl").exists() else []


KINDS = [
    pytest.param("python", marks=job(launched, "python")),
    pytest.param("torchrun", marks=job(launched, "torchrun")),
    pytest.param("accelerate", marks=job(launched, "accelerate")),
    *(
        pytest.param(f"deepspeed+{file}", marks=[job(launched, f"deepspeed+{file}", seconds=40), *marks_of("zero2"), *more])
        for file, more in (
            ("zero2", []), ("zero3", []), ("zero3_fp16", []), ("zero2_offload", [compiler()])
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_launcher_trains_in_the_default_precision(results: Callable[..., Any], kind: str) -> None:
    code, printed, found = results(launched, kind)
    assert code == 0, printed
    assert len(found) == 6 and all(1.0 < loss < 4.0 for loss in found)


def from_python(folder: Path, strategy: str) -> list[float]:
    """``bigvision.train`` in this process."""
    import bigvision

    made = recipe(folder / "out", data={"workers": 2}, train={"steps": 6, "micro_batch": 8})
    made["parallel"] = {"device": device(), "strategy": strategy}
    return [line["loss"] for line in bigvision.train(made).history if "loss" in line]


@pytest.mark.parametrize("strategy", [pytest.param(s, marks=job(from_python, s)) for s in DATA_PARALLEL])
def test_bigvision_train(results: Callable[..., Any], strategy: str) -> None:
    found = results(from_python, strategy)
    assert len(found) == 6 and all(1.0 < loss < 4.0 for loss in found)
