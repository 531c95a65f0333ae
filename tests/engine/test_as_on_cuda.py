"""What CUDA does and the CPU hides: autocast's answers, steps that do not wait for the device, and what they exchange."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bigvision.engine.step import REQUESTS
from tests.distributed import run_ranks
from tests.recipes import recipe, run

LONG = pytest.mark.long


def run_as_on_cuda(plain: dict[str, Any]) -> list[float]:
    """Train where ``torch.is_autocast_enabled()``, asked for no device, answers for the device that computes."""
    answer = torch.is_autocast_enabled
    with patch.object(torch, "is_autocast_enabled", lambda device="cpu": answer(device)):
        return run(plain)


@pytest.mark.parametrize(
    ("strategy", "precision"),
    [
        ("zero2", "bf16"),
        *(pytest.param(f"zero{n}", kind, marks=LONG) for n in (1, 2, 3) for kind in ("bf16", "fp16", "amp_bf16")),
    ],
)  # fmt: skip
def test_deepspeed_is_not_entered_under_autocast(tmp_path: Path, strategy: str, precision: str) -> None:
    """DeepSpeed switches off an autocast under which it is entered, which on CUDA it notices."""
    short: dict[str, Any] = {"train": {"steps": 3, "micro_batch": 6}}
    reference = run_ranks(run, 2, recipe(tmp_path / "fsdp", parallel={"strategy": "fsdp", "precision": precision}, **short))[0]
    plain = recipe(tmp_path / strategy, parallel={"strategy": strategy, "precision": precision}, **short)
    losses = run_ranks(run_as_on_cuda, 2, plain)[0]
    assert losses == pytest.approx(reference, rel=2e-2) and all(map(math.isfinite, losses))


class Watch(TorchDispatchMode):
    """Counts operations that wait for a device, and collectives by name and type."""

    WAITS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.sent: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = func.name().split("::")
        name = name.partition(".")[0]
        if space == "aten" and name in self.WAITS:
            self.waits[name] += 1
        if space == "c10d":
            tensor = next((leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)), None)
            self.sent[name, str(tensor.dtype if tensor is not None else None)] += 1
        return func(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    """Counts what copies to the host, by name, type and shape; of tensors on the CPU a dispatch mode sees little of it."""

    TO_THE_HOST = ("item", "tolist", "numpy", "cpu", "__array__", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str, tuple[int, ...]]] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.TO_THE_HOST and args[0].dtype != torch.uint8:  # images, which the loader has
            self.found[name, str(args[0].dtype), tuple(args[0].shape)] += 1
        return func(*args, **(kwargs or {}))


def watch_steps(plain: dict[str, Any], first: int, steps: int) -> tuple[dict[Any, int], ...]:
    """Train; return what *steps* steps in a row, from *first* on, wait for, send and copy, with all that is between them."""
    from bigvision.engine import Engine

    train_step, watch, copies, stack = Engine.train_step, Watch(), Copies(), ExitStack()

    def watched(self: Any, batch: Any) -> Any:
        if self.step == first:
            stack.enter_context(watch)
            stack.enter_context(copies)
        if self.step == first + steps:
            stack.close()
        return train_step(self, batch)

    with patch.object(Engine, "train_step", watched):
        run(plain)
    return dict(watch.waits), dict(watch.sent), dict(copies.found)


RECORD = 4 + len(REQUESTS)
"""Numbers of a step's record."""


TRAFFIC = {"allreduce_", "_allgather_base_", "_reduce_scatter_base_", "allgather_into_tensor_coalesced_", "send", "recv_"}
MATRICES = ("alltoall_base_", "torch.bfloat16")  # Muon's


@pytest.mark.parametrize(
    ("strategy", "ranks", "more"),
    [
        ("ddp", 2, {}), ("fsdp", 3, {}), ("fsdp", 3, {"optim": "muon"}), ("pipeline", 2, {}),
        *(pytest.param(*layout, marks=LONG) for layout in (
            ("fsdp", 4, {"replicas": 2}), ("pipeline", 4, {"stages": 2}), ("fsdp", 2, {"precision": "fp16"}),
            ("ddp", 2, {"optim": "muon"}),
        )),
    ],
)  # fmt: skip
@pytest.mark.parametrize("model", ["vit", pytest.param("resnet", marks=LONG)])
def test_a_step_does_not_wait(tmp_path: Path, model: str, strategy: str, ranks: int, more: dict[str, Any]) -> None:
    train = {"steps": 9, "global_batch": 24, "micro_batch": 6}
    name, parallel = more.get("optim", "adamw"), {key: value for key, value in more.items() if key != "optim"}
    plain = recipe(
        tmp_path, model, train=train, parallel={"strategy": strategy, **parallel}, ema={"decay": 0.99}, optim={"name": name},
        monitor={"progress": True, "every": 1000}, data={"augment": False},  # which draws on the CPU, in this process
    )  # fmt: skip
    for waits, sent, copies in run_ranks(watch_steps, ranks, plain, 2, 5):
        assert waits == {}
        assert copies.keys() == {("tolist", "torch.float64", (RECORD,))}, "the record's alone, which has arrived"
        assert sent.pop(("allreduce_", "torch.float64")) == 5, "one decision for all ranks in each step"
        assert sent.pop(MATRICES, 0) == (10 if name == "muon" and strategy == "fsdp" else 0), "there and back"
        labels = sent.pop(("broadcast_", "torch.uint8"), 0)
        assert labels == (5 if strategy == "pipeline" else 0)
        assert all(name in TRAFFIC and kind in ("torch.float32", "torch.float16") for name, kind in sent), sent


def test_the_watch_sees_waits_and_copies() -> None:
    with Watch() as watch, Copies() as copies:
        bool(torch.ones(1).sum() > 0)
        torch.ones(2).tolist()
    assert watch.waits and copies.found.keys() == {("__bool__", "torch.bool", ()), ("tolist", "torch.float32", (2,))}


def graphs_of_a_run(plain: dict[str, Any]) -> int:
    """Train with compiled blocks, whose graphs run as they are; return how many there are."""
    compiled, graphs = torch.compile, []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    with patch.object(torch, "compile", lambda function, **options: compiled(function, backend=counting, dynamic=False)):
        run(plain)
    return len(graphs)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=LONG)])
def test_equal_blocks_share_graphs_in_a_run(tmp_path: Path, precision: str) -> None:
    """Twelve blocks whose drop rates and weights differ: a graph for training, one for its short last micro-batch, two for
    evaluation (whose last batch is short)."""
    train = {"steps": 2, "global_batch": 8, "micro_batch": 5}
    plain = recipe(tmp_path, parallel={"compile": True, "precision": precision}, train=train)
    plain["model"] = plain["model"] | {
        "drop_path": 0.2,
        "options": {"patch_size": 8, "depth": 12, "embed_dim": 24, "num_heads": 3},
    }
    (graphs,) = run_ranks(graphs_of_a_run, 1, plain)
    assert 3 <= graphs <= 4
