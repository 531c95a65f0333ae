"""One rank has no memory for its micro-batch: the next start has half of it on all ranks, and the numbers stay."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from bigvision.errors import Exit, lacks_memory
from tests.distributed import run_ranks
from tests.launch.commands import TORCHRUN, start
from tests.recipes import losses, recipe, run, write
from tests.training.test_starts import noted
from tests.training.test_stopping import ended, train

ERROR = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 2.00 GiB"


def plain(out: Path, model: str = "vit", **sections: dict[str, Any]) -> dict[str, Any]:
    """Eight steps, a checkpoint at the third and sixth."""
    changed = {
        "train": {"steps": 8, "global_batch": 48, "micro_batch": 12, "eval_every": 4},
        "checkpoint": {"every": 3},
        "optim": {"schedule": "constant"},
    }
    return recipe(out, model, **{name: changed.get(name, {}) | sections.get(name, {}) for name in {*changed, *sections}})


def starve(rank: int, limits: dict[int, int], where: str) -> None:
    """Let this rank have little memory from now on, if it is *rank*.

    Args:
        limits: step → the largest micro-batch that its memory holds from that step on.
        where: "forward", "backward", "evaluate".
    """
    from bigvision.engine import Engine

    if os.environ.get("RANK", "0") != str(rank):
        return
    train_step, eval_step, now = Engine.train_step, Engine.eval_step, ["", 0]

    def training(self: Any, batch: Any) -> Any:
        now[:] = ["train", self.step]
        return train_step(self, batch)

    def evaluating(self: Any, batch: Any) -> Any:
        now[:] = ["evaluate", self.step]
        return eval_step(self, batch)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError(ERROR)

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)) or now[0] != ("evaluate" if where == "evaluate" else "train"):
            return
        most = [limit for at, limit in limits.items() if now[1] >= at]
        (images,) = inputs
        if most and len(images) > most[-1]:
            if where == "backward" and images.requires_grad:
                images.register_hook(fail)
            elif where != "backward":
                fail()

    Engine.train_step, Engine.eval_step = training, evaluating  # type: ignore[method-assign]
    register_module_forward_pre_hook(before)


def train_starved(path: str, rank: int, limits: dict[int, int], where: str) -> None:
    """The command."""
    starve(rank, limits, where)
    train(path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return run_ranks(run, 1, plain(tmp_path_factory.mktemp("alone")))[0]


def micro_batches(out: Path, last: int) -> tuple[int, int]:
    """As run.yaml and the last checkpoint's progress.json have it."""
    progress = json.loads((out / f"step-{last:08}" / "progress.json").read_text())
    return yaml.safe_load((out / "run.yaml").read_text())["train"]["micro_batch"], progress["config"]["train"]["micro_batch"]


@pytest.mark.parametrize(
    ("ranks", "parallel", "where", "first"),
    [
        (1, {"strategy": "ddp"}, "forward", 4),
        pytest.param(3, {"strategy": "fsdp"}, "backward", 4, marks=pytest.mark.long),
        pytest.param(2, {"strategy": "ddp"}, "evaluate", 4, marks=pytest.mark.long),
        pytest.param(3, {"strategy": "ddp"}, "forward", 1, marks=pytest.mark.long),
        pytest.param(2, {"strategy": "zero3"}, "forward", 4, marks=pytest.mark.long),
        pytest.param(3, {"strategy": "zero2"}, "backward", 4, marks=pytest.mark.long),
        pytest.param(2, {"strategy": "pipeline"}, "forward", 4, marks=pytest.mark.long),
        pytest.param(4, {"strategy": "fsdp", "replicas": 2}, "forward", 4, marks=pytest.mark.long),
        pytest.param(4, {"strategy": "pipeline", "stages": 2}, "backward", 4, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_the_next_start_goes_on(
    tmp_path: Path, undisturbed: list[float], ranks: int, parallel: dict[str, Any], where: str, first: int
) -> None:
    """The last rank starves from step *first* on."""
    out = tmp_path / "out"
    path = write(tmp_path, plain(out, parallel=parallel))
    assert ended(train_starved, ranks, path, ranks - 1, {first: 6}, where) == [Exit.FAULT] * ranks
    assert noted(out, "micro_batch") == [6] and noted(out, "crash") == [first] and noted(out, "rank") == [ranks - 1]
    (error,) = noted(out, "error")
    place = f"stage 1 on rank {ranks - 1}, beside stage 0 on rank" if parallel["strategy"] == "pipeline" else "CUDA"
    assert error.startswith(f"OutOfMemoryError: {place}") and "CUDA out of memory" in error
    assert "train.micro_batch 6 instead of 12" in error
    assert ended(train_starved, ranks, path, ranks - 1, {first: 6}, where) == [Exit.DONE] * ranks
    assert noted(out, "step") == [0, 3 if first >= 3 else 0]
    assert losses(out) == pytest.approx(undisturbed, rel=1e-5)
    assert micro_batches(out, 8) == (6, 6)
    # Another configuration says its own micro-batch.
    changed = write(tmp_path, plain(out, parallel=parallel, train={"steps": 9}))
    assert ended(train, ranks, changed) == [Exit.DONE] * ranks and micro_batches(out, 9) == (12, 12)


@pytest.mark.long
def test_torchrun_starts_it_again_twice(tmp_path: Path, undisturbed: list[float]) -> None:
    """12, 6, 3: each time at the same step, which is not taken for the same crash."""
    program = tmp_path / "starving.py"
    program.write_text(
        "import sys\nfrom tests.training.test_out_of_memory import train_starved\n"
        "if __name__ == '__main__':\n    train_starved(sys.argv[1], 1, {4: 3}, 'forward')\n"
    )
    out = tmp_path / "out"
    path = write(tmp_path, plain(out, faults={"same_crash": 1}))
    command = [*TORCHRUN, "--nproc-per-node", "2", "--max-restarts", "3", "--rdzv-endpoint", str(tmp_path / "meet")]
    done = start([*command, str(program), path], PYTHONPATH=os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]))
    assert done.returncode == 0, done.stderr
    assert noted(out, "micro_batch") == [6, 3] and noted(out, "start") == [1, 2, 3]
    assert losses(out) == pytest.approx(undisturbed, rel=1e-5)


FILE = json.dumps({"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 4})


@pytest.mark.parametrize(
    ("model", "sections", "fix"),
    [
        ("vit", {"faults": {"out_of_memory": "stop"}}, "faults.out_of_memory: stop"),
        ("vit", {"train": {"micro_batch": 1}}, "train.micro_batch: 1 cannot be halved"),
        ("resnet", {}, "batch normalisation"),
        ("vit", {"task": {"mixup": 0.8}, "train": {"micro_batch": 2}}, "task.mixup"),
        ("vit", {"parallel": {"strategy": "zero2", "deepspeed": "zero.json"}}, "gradient_accumulation_steps"),
    ],
    ids=["stop", "one", "batch norm", "pairs", "file"],
)
def test_where_it_is_not_allowed_the_error_stands(
    tmp_path: Path, model: str, sections: dict[str, dict[str, Any]], fix: str
) -> None:
    (tmp_path / "zero.json").write_text(FILE)
    if "deepspeed" in sections.get("parallel", {}):
        sections = {"parallel": {"strategy": "zero2", "deepspeed": str(tmp_path / "zero.json")}}
    found = run_ranks(error_of, 1, plain(tmp_path / "out", model, **sections))[0]
    assert found.startswith("OutOfMemoryError: CUDA out of memory") and fix in found
    assert noted(tmp_path / "out", "micro_batch") == []


def error_of(made: dict[str, Any]) -> str:
    from bigvision.engine import Engine

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError(ERROR)

    before = Engine._passes
    Engine._passes = fail  # type: ignore[assignment]
    try:
        run(made)
    except torch.OutOfMemoryError as error:
        return f"OutOfMemoryError: {error}"
    finally:
        Engine._passes = before  # type: ignore[method-assign]
    return ""


@pytest.mark.long
def test_the_largest_micro_batch_that_fits_a_schedule(tmp_path: Path) -> None:
    """Half of 9 is 5, which does not divide the 18 samples of a step."""
    sections = {"train": {"global_batch": 18, "micro_batch": None}, "parallel": {"strategy": "pipeline", "microbatches": 2}}
    sections["parallel"]["schedule"] = "interleaved"
    out = tmp_path / "out"
    path = write(tmp_path, plain(out, **sections))
    assert ended(train_starved, 2, path, 0, {1: 6}, "forward") == [Exit.FAULT] * 2
    assert noted(out, "micro_batch") == [3]
    assert ended(train, 2, path) == [Exit.DONE] * 2 and micro_batches(out, 8) == (3, 3)


SEARCH = "\nSearch for `cudaError' in https://docs.nvidia.com for more information.\nCUDA kernel errors might be asynchronous."
LACKS = [
    torch.OutOfMemoryError(ERROR),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    RuntimeError("CUDA error: out of memory" + SEARCH),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("std::bad_alloc"),
]
FAULTS = [
    ValueError("out of memory"),
    RuntimeError("DataLoader worker (pid 7) is killed: out of memory"),
    RuntimeError("CUDA error: an illegal memory access was encountered" + SEARCH),
    RuntimeError("CUDA error: device-side assert triggered" + SEARCH),
    RuntimeError("CUDA error: uncorrectable ECC error encountered" + SEARCH),
    RuntimeError("CUDA error: unspecified launch failure" + SEARCH),
    RuntimeError("CUDA error: too many resources requested for launch" + SEARCH),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    torch.distributed.DistBackendError(
        "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error\nncclUnhandledCudaError: Call to CUDA function failed.\n"
        "Last error:\nCuda failure 2 'out of memory'"
    ),
    RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
]


def chain(first: BaseException, then: BaseException) -> BaseException:
    """*then*, raised while *first* was handled."""
    then.__context__ = first
    return then


def test_what_is_a_lack_of_memory() -> None:
    assert [str(error) for error in LACKS if not lacks_memory(error)] == []
    assert [str(error) for error in FAULTS if lacks_memory(error)] == []
    memory, access, nccl = LACKS[0], FAULTS[2], FAULTS[-2]
    assert lacks_memory(chain(memory, KeyError("whatever came after it")))
    assert not lacks_memory(chain(access, torch.OutOfMemoryError(ERROR))), "after a fault allocations fail too"
    assert lacks_memory(chain(torch.OutOfMemoryError(ERROR), nccl)), "a rank without memory leaves its collectives"
    first, second = ValueError(), KeyError()
    first.__context__, second.__context__ = second, first
    assert not lacks_memory(first), "and comes to an end"
