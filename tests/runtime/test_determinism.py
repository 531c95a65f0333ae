"""``train.deterministic``: torch's switches, the operations that have no such form, and what is never chosen by timing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

import bigvision
import bigvision.training.evaluation as evaluation
from bigvision.config import load_config
from bigvision.errors import UserError
from bigvision.runtime import RankFailure, deterministic, operations_named, process, start
from bigvision.runtime.process import WORKSPACE
from tests.distributed import run_ranks, start_ranks
from tests.recipes import digests, losses, recipe, run


def settings() -> list[Any]:
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return [
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        inductor.deterministic,
        torch.utils.deterministic.fill_uninitialized_memory,
        cudnn.deterministic,
        cudnn.benchmark,
        cuda.mem_efficient_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    ]


ON = [True, False, True, False, True, False, False, False]


def test_settings_are_as_before_at_the_end() -> None:
    before = settings()
    with deterministic(False):
        assert settings() == before
    with pytest.raises(KeyError), deterministic(True, "cpu"):
        assert settings() == ON
        raise KeyError
    assert settings() == before
    # Two engines of one process need not end in the reverse order.
    first, second = deterministic(True, "cpu"), deterministic(True, "cpu")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert settings() == ON
    second.__exit__(None, None, None)
    assert settings() == before


def test_what_the_user_had_set_comes_back() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = True
    before = settings()
    try:
        with deterministic(True, "cpu"):
            assert settings() == ON
        assert settings() == before != ON
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False


def test_the_workspace_of_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there is a CUDA device."""
    started = [False]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: started[0])
    monkeypatch.delenv(WORKSPACE, raising=False)
    with deterministic(True, "cpu"):
        assert WORKSPACE not in os.environ
    with deterministic(True):
        assert os.environ[WORKSPACE] == ":4096:8"
    assert WORKSPACE not in os.environ
    with deterministic(True):
        started[0] = True
    assert os.environ[WORKSPACE] == ":4096:8", "it says how CUDA was started"
    with deterministic(True):
        pass
    before = settings()
    for value, found in (None, "CUDA was started in this process without"), (":0:0", "CUBLAS_WORKSPACE_CONFIG is ':0:0'"):
        monkeypatch.delenv(WORKSPACE) if value is None else monkeypatch.setenv(WORKSPACE, value)
        with pytest.raises(UserError, match=f"train.deterministic: true, but {found}"), deterministic(True, "cuda"):
            pass
        assert settings() == before
    monkeypatch.setenv(WORKSPACE, ":16:8")
    with deterministic(True, "cuda"):
        assert os.environ[WORKSPACE] == ":16:8"


def put() -> None:
    """torch has no deterministic form of it on any device."""
    torch.zeros(4).put_(torch.tensor([0, 1]), torch.ones(2))


class PutInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        return images.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        put()
        return grad


LINE = "train.deterministic: true, but the operation put_ has no deterministic form"


def test_the_operation_is_named() -> None:
    put()
    with pytest.raises(UserError, match=LINE), deterministic(True, "cpu"):
        put()
    with pytest.raises(UserError, match=LINE), deterministic(True, "cpu"):
        PutInBackward.apply(torch.ones(3, requires_grad=True)).sum().backward()
    with pytest.raises(UserError, match="operation max_unpooling2d_forward_out has"), deterministic(True, "cpu"):
        nn.MaxUnpool2d(2)(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.int64))
    words = "rank 3 failed: RuntimeError: stage 1 on rank 3: put_ does not have a deterministic implementation, but you set"
    with pytest.raises(UserError, match=LINE), operations_named():
        raise RankFailure(words)
    with pytest.raises(UserError, match=LINE), operations_named():
        raise RuntimeError("in a compiled block") from RuntimeError(words)
    with pytest.raises(RuntimeError, match="something else"), operations_named():
        raise RuntimeError("something else")


def test_an_evaluation_is_deterministic_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, seen, before = recipe(tmp_path, train={"steps": 1, "deterministic": True}), [], settings()
    with bigvision.Engine(plain, num_classes=10) as engine:
        folder = engine.save()
    monkeypatch.setattr(evaluation, "evaluate", lambda *given, **more: seen.append(settings()) or put())
    with pytest.raises(UserError, match=LINE):
        evaluation.evaluate_checkpoint(folder, load_config(plain))
    assert seen == [ON] and settings() == before


def train_with_put(folder: Path, plain: dict[str, Any], where: str) -> None:
    """Train with an operation that has no deterministic form; leave the error's words in *folder*.

    Args:
        where: "forward" on all ranks, as where a model is traced, or "backward" on the last one alone.
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        if isinstance(module, nn.LayerNorm) and module.training and where == "forward":
            put()
        if isinstance(module, nn.LayerNorm) and module.training and where == "backward" and rank == ranks - 1:
            return (PutInBackward.apply(inputs[0]),)
        return None

    register_module_forward_pre_hook(before)
    try:
        run(plain)
    except Exception as error:
        (folder / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize(
    ("ranks", "parallel", "where"),
    [
        (1, {"strategy": "ddp"}, "forward"),
        (2, {"strategy": "pipeline"}, "backward"),
        pytest.param(2, {"strategy": "pipeline", "schedule": "interleaved"}, "forward", marks=pytest.mark.long),
        pytest.param(2, {"strategy": "pipeline", "schedule": "zbv"}, "backward", marks=pytest.mark.long),
        pytest.param(2, {"strategy": "fsdp", "recompute": "blocks"}, "backward", marks=pytest.mark.long),
        pytest.param(2, {"strategy": "zero2"}, "backward", marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_run_ends_with_one_line_on_every_rank(tmp_path: Path, ranks: int, parallel: dict[str, Any], where: str) -> None:
    """Also on a rank that does not have the operation, but waits for one that has."""
    train: dict[str, Any] = {"steps": 2, "micro_batch": None, "deterministic": True}
    processes = start_ranks(train_with_put, ranks, tmp_path, recipe(tmp_path / "out", train=train, parallel=parallel), where)
    for started in processes:
        started.join(120)
        started.kill()
    found = [path.read_text() for path in sorted(tmp_path.glob("*.txt"))]
    assert len(found) == ranks and all(words.startswith(f"UserError: {LINE}") and "\n" not in words for words in found), found


class Puts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))

    def forward(self, images: Tensor) -> Tensor:
        return PutInBackward.apply(self.body(images))  # type: ignore[no-any-return]


def loop_of_ones_own() -> list[str]:
    before, found = settings(), []
    for wanted in (True, False):
        keys: dict[str, Any] = {"parallel.precision": "fp32", "parallel.strategy": "ddp", "parallel.device": "cpu"}
        keys |= {"train.deterministic": wanted}
        engine = bigvision.Engine(model=Puts(), num_classes=2, steps=2, global_batch=4, image_size=8, **keys)
        with engine:
            assert settings() == (ON if wanted else before)
            try:
                engine.train_step(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]))
                found.append("trained")
            except UserError as error:
                found.append(str(error))
        assert settings() == before
    return found


def test_a_loop_of_ones_own_gets_the_line_too() -> None:
    ((refused, trained),) = run_ranks(loop_of_ones_own, 1)
    assert refused.startswith(LINE) and trained == "trained"


@pytest.mark.parametrize("model", ["vit", pytest.param("resnet", marks=pytest.mark.long)])
def test_two_runs_are_equal_bit_for_bit(tmp_path: Path, model: str) -> None:
    """On the CPU they are so in either way, and each way gives the same numbers for these models."""
    found = []
    for number, wanted in enumerate((True, True, False)):
        out = tmp_path / str(number)
        run_ranks(run, 2, recipe(out, model, train={"steps": 4, "deterministic": wanted}))
        found.append((losses(out), {name: sum for name, sum in digests(out / "step-00000004").items() if name[-5:] != ".json"}))
    assert len(found[0][0]) == 4 and found[0] == found[1] == found[2]


# What would be chosen by timing, and is not.


def test_convolutions_are_never_chosen_by_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, up to where the process group is made."""

    class Reached(Exception):
        pass

    def reached(*arguments: Any, **options: Any) -> None:
        raise Reached

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(process, "choose_device", lambda *arguments: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(process.dist, "init_process_group", reached)
    with pytest.raises(Reached), start("cuda"):
        pass
    assert torch.backends.cudnn.benchmark is False


def compile_and_listen(plain: dict[str, Any]) -> list[Any]:
    asked: list[Any] = []

    def compiled(function: Any, **options: Any) -> Any:
        asked.append(sorted(options.keys() - {"dynamic", "fullgraph"}))
        tuned = inductor.max_autotune, inductor.max_autotune_gemm, inductor.coordinate_descent_tuning
        asked.append(any(tuned))
        return function

    before, torch.compile = torch.compile, compiled  # type: ignore[assignment]
    try:
        run(plain)
    finally:
        torch.compile = before  # type: ignore[assignment]
    return asked


def test_compiled_code_is_not_tuned_by_timing(tmp_path: Path) -> None:
    plain = recipe(tmp_path, train={"steps": 1}, parallel={"compile": True})
    asked = run_ranks(compile_and_listen, 1, plain)[0]
    assert asked and asked == [[], False] * (len(asked) // 2)
