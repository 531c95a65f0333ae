"""Passes that run as CUDA graphs, here as an imitation of them: not a byte of a run depends on it."""

from __future__ import annotations

import io
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigvision
from bigvision.config import load_config
from bigvision.engine import check_engine
from bigvision.errors import UserError
from bigvision.runtime import start
from bigvision.tasks import Classify
from tests.distributed import RankError, run_ranks
from tests.graphs import Graph, Imitation, on_the_cpu
from tests.recipes import MODELS, digests, recipe, run

LONG = pytest.mark.long
DROPS = {"drop_rate": 0.1, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1}


def graphed(plain: dict[str, Any]) -> tuple[list[float], list[int]]:
    """The losses of a run on this rank, and how often each graph was launched."""
    with on_the_cpu() as found:
        losses = run(plain)
    return losses, [graph.launches for one in found for graph in one.graphs]


def options(model: str, **more: Any) -> dict[str, Any]:
    return {"options": MODELS[model].get("options", {}) | more}


# Of 28 samples in micro-batches of 8: the first writes gradients, two and a short one add to them.
PLAIN = {"train": {"steps": 4, "global_batch": 28, "micro_batch": 8}, "optim": {"warmup": 1, "clip": 0.5}}
MIX = {"mixup": 0.8, "cutmix": 1.0}
SKIP = {"drop_path": 0.4, "drop_path_schedule": "constant", "drop_path_mode": "skip"}
MASK = {"drop_path": 0.4, "drop_path_mode": "mask"}
TEACHER = MODELS["vit"]
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # model, keys of the model, other keys
    "vit, skip": (
        "vit", SKIP | options("vit", **DROPS), {"task": MIX, "parallel": {"precision": "bf16"}, "ema": {"decay": 0.9}},
    ),
    "vit, mask": ("vit", MASK | options("vit", **DROPS), {"task": MIX, "parallel": {"precision": "amp_bf16"}}),
    "resnet": ("resnet", {}, {"task": MIX, "ema": {"decay": 0.9}}),
    "resnet, bf16": ("resnet", {}, {"parallel": {"precision": "bf16", "channels_last": "always"}}),
    "resnet, momentum": ("resnet", {}, {"optim": {"name": "sgd", "warmup": 0}}),
    "frozen": ("vit", {"trainable": "last:1", "frozen_dtype": "bf16"}, {"parallel": {"precision": "bf16"}}),
    "frozen norms": ("resnet", {"trainable": "head"}, {}),
    "lora": ("vit", {"lora": {"rank": 2}} | options("vit", **DROPS), {"parallel": {"precision": "amp_bf16"}}),
    "weights": ("vit", {}, {"task": MIX | {"class_weights": [0.1, 2.0, 0.5, 1.0, 0.0, 3.0, 1.0, 1.0, 0.25, 1.0]}}),
    "more outputs": (
        "small", {"num_classes": 12}, {"task": {"class_weights": [0.1, 2.0, 0.5, 1.0, 0.0, 3.0, 1.0, 1.0, 0.25, 1.0]}},
    ),
    "fp16": ("vit", options("vit", **DROPS), {"parallel": {"precision": "fp16"}}),
    "muon": ("small", {}, {"optim": {"name": "muon", "warmup": 0}}),
    "sizes": (
        "vit", {}, {
            "train": {"steps": 6, "global_batch": 28, "micro_batch": 8}, "task": MIX,
            "data": {"resize_schedule": [{"until": 0.34, "image_size": 16}, {"until": 0.7, "image_size": [24, 40]}]},
        },
    ),
    "swin": ("swin", SKIP, {"parallel": {"precision": "bf16"}}),
    "convnext": ("convnext", SKIP, {"parallel": {"precision": "bf16", "channels_last": "always"}}),
    "efficientnet": ("efficientnet", MASK, {}),
}  # fmt: skip
ESSENTIAL = ("vit, skip", "resnet")


def made(out: Path, name: str, **parallel: Any) -> dict[str, Any]:
    model, keys, sections = RUNS[name]
    sections = PLAIN | sections
    plain = recipe(out, model, **sections | {"parallel": sections.get("parallel", {}) | parallel})
    return plain | {"model": plain["model"] | keys}


@pytest.mark.parametrize("name", [name if name in ESSENTIAL else pytest.param(name, marks=LONG) for name in RUNS])
def test_a_run_has_the_same_bytes(tmp_path: Path, name: str) -> None:
    eager = made(tmp_path / "eager", name)
    reference = run_ranks(run, 1, eager)[0]
    losses, launches = run_ranks(graphed, 1, made(tmp_path / "graphs", name, cuda_graphs=True))[0]
    assert losses == reference and len(set(losses)) == len(losses)
    step = f"step-{eager['train']['steps']:08}"
    assert digests(tmp_path / "graphs" / step) == digests(tmp_path / "eager" / step)
    # First, second and third, short.
    assert launches == ([2, 4, 2] * 3 if name == "sizes" else [4, 8, 4])


@LONG
def test_a_student_has_the_same_bytes(tmp_path: Path) -> None:
    """The teacher's passes are captured too, and what the task makes of its first outputs is not in a graph's memory."""
    teacher = recipe(tmp_path / "teacher", train={"steps": 1, "micro_batch": None}) | {"model": MODELS["pyramid"]}
    run_ranks(run, 1, teacher)
    weights = [0.1, 2.0, 0.5, 1.0, 0.0, 3.0, 1.0, 1.0, 0.25, 1.0]
    learned = {"teacher": str(tmp_path / "teacher" / "step-00000001"), "distill": "tokens", "class_weights": weights}
    found = []
    for graphs in (False, True):
        out = tmp_path / str(graphs)
        plain = recipe(out, "small", **PLAIN | {"task": learned}, parallel={"cuda_graphs": graphs})
        found.append((run_ranks(graphed, 1, plain)[0][0], digests(out / "step-00000004")))
    assert found[0] == found[1]


def killed(plain: dict[str, Any]) -> None:
    """Die between two micro-batches of the fourth step, when the second step is saved."""
    launch, saved = Graph.launch, Path(plain["out"]) / "step-00000002"

    def die(self: Graph) -> None:
        if self.launches == 6:  # that of the second and third micro-batch
            for _ in range(2000):
                if saved.exists():
                    break
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        launch(self)

    Graph.launch = die  # type: ignore[method-assign]
    graphed(plain)


@LONG
def test_a_killed_run_resumes_with_the_same_bytes(tmp_path: Path) -> None:
    """Also without graphs where it had some."""
    plain = made(tmp_path / "whole", "vit, skip", cuda_graphs=True) | {"checkpoint": {"every": 2, "keep": 9}}
    whole, _ = run_ranks(graphed, 1, plain)[0]
    plain["out"] = str(tmp_path / "graphs")
    with pytest.raises(RankError, match="the process died"):
        run_ranks(killed, 1, plain)
    shutil.copytree(tmp_path / "graphs", tmp_path / "eager")
    for graphs, launches in ((True, [2, 4, 2]), (False, [])):
        plain["out"] = str(tmp_path / ("graphs" if graphs else "eager"))
        plain["parallel"]["cuda_graphs"] = graphs
        losses, found = run_ranks(graphed, 1, plain)[0]
        assert losses[-2:] == whole[2:] and found == launches
        assert digests(Path(plain["out"]) / "step-00000004") == digests(tmp_path / "whole" / "step-00000004")


# What else may happen in a step.


def engine_of(folder: Path, model: nn.Module, graphs: bool = True, micro_batch: int | None = None) -> bigvision.Engine:
    made = recipe(folder, parallel={"cuda_graphs": graphs}, train={"micro_batch": micro_batch}, optim={"warmup": 0})
    del made["model"]
    return bigvision.Engine(made, model=model, num_classes=10, image_size=32, steps=20, global_batch=8)


def images_of(side: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, side, side, generator=draw), torch.randint(0, 10, (8,), generator=draw)


class Pooled(nn.Module):
    """Takes images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.first(images)).relu().mean((2, 3)))


def steps_of(folder: Path, graphs: bool, sides: list[int], not_finite: int | None = None) -> dict[str, Any]:
    """Steps of images of these *sides*, of which one has a sample that is not finite."""
    with on_the_cpu() as found, redirect_stderr(io.StringIO()) as warned:
        torch.manual_seed(0)
        with engine_of(folder, Pooled(), graphs) as engine:
            results = []
            for step, side in enumerate(sides):
                images, labels = images_of(side, step)
                if step == not_finite:
                    images[3, 0, 0, 0] = torch.inf
                results.append(engine.train_step(images, labels))
            numbers = [(result.loss.item(), result.skipped, list(result.offending)) for result in results]
            state = {fragment.name: fragment.values.clone() for fragment in engine.engine.fragments()}
    launches = [graph.launches for one in found for graph in one.graphs]
    return {"numbers": numbers, "state": state, "launches": launches, "warned": warned.getvalue()}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    alike = one["state"].keys() == other["state"].keys()
    return alike and all(torch.equal(value, other["state"][name]) for name, value in one["state"].items())


def test_a_step_that_is_not_finite_is_skipped_and_explained(tmp_path: Path) -> None:
    found, reference = (run_ranks(steps_of, 1, tmp_path, graphs, [16] * 4, 1)[0] for graphs in (True, False))
    assert [skipped for _, skipped, _ in found["numbers"]] == [False, True, False, False]
    assert found["numbers"][2:] == reference["numbers"][2:] and found["numbers"][1][2] == reference["numbers"][1][2] != []
    assert same(found, reference) and found["launches"] == [4] and reference["launches"] == []


def test_more_shapes_than_get_graphs(tmp_path: Path) -> None:
    sides = [8, 9, 10, 11, 12, 13, 12, 8, 13, 9]
    found, reference = (run_ranks(steps_of, 1, tmp_path, graphs, sides)[0] for graphs in (True, False))
    assert found["numbers"] == reference["numbers"] and same(found, reference)
    assert found["launches"] == [2, 2, 1, 1]
    assert found["warned"].count("warning: parallel.cuda_graphs: 4 kinds of micro-batches have graphs") == 1


def step_of_both(folder: Path, graphs: bool) -> list[Tensor]:
    """Weights after a step whose first micro-batch has no graph any more, and whose second one has one."""
    torch.manual_seed(0)
    with on_the_cpu() as found, engine_of(folder, Pooled(), graphs, micro_batch=5) as engine:
        engine.train_step(*images_of(16))
        if (held := engine.engine.graphs) is not None:
            held.most = 1
            del held.kinds[next(iter(held.kinds))]
        engine.train_step(*images_of(16, 1))
        assert not graphs or [graph.launches for graph in found[0].graphs] == [1, 2]
        return [fragment.values.clone() for fragment in engine.engine.fragments()]


def test_passes_with_and_without_a_graph_add_up(tmp_path: Path) -> None:
    found, reference = (run_ranks(step_of_both, 1, tmp_path, graphs)[0] for graphs in (True, False))
    assert all(torch.equal(one, other) for one, other in zip(found, reference, strict=True))


# What cannot be captured.


class Asks(Pooled):
    """Waits for the device."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * (2.0 if self.norm.running_mean.sum() > 1e9 else 1.0)  # type: ignore[union-attr]


class Cumulative(Pooled):
    """The average of its running statistics is over a number that the host reads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8, momentum=None)


class Replaces(Pooled):
    """Keeps what a graph has computed."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(10))

    def forward(self, images: Tensor) -> Tensor:
        outputs = super().forward(images)
        if type(outputs) is Tensor and not outputs.is_meta:  # else it is traced
            self.mean = outputs.detach().mean(0)
        return outputs


def refusal(folder: Path, kind: type[nn.Module]) -> str:
    with on_the_cpu(), engine_of(folder, kind()) as engine, pytest.raises(UserError) as error:
        engine.train_step(*images_of(16))
    return str(error.value)


@pytest.mark.parametrize(
    ("kind", "words"), [(Asks, "not permitted"), (Cumulative, "not permitted"), (Replaces, "Replaces replaces its buffer mean")]
)
def test_models_that_cannot_be_captured(tmp_path: Path, kind: type[nn.Module], words: str) -> None:
    said = run_ranks(refusal, 1, tmp_path, kind)[0]
    assert said.startswith("parallel.cuda_graphs: true, but the passes of ") and words in said and said.endswith(": use false")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"strategy": "fsdp"}, "needs parallel.strategy ddp, not fsdp"),
        ({"strategy": "zero2"}, "needs parallel.strategy ddp, not zero2"),
        ({"strategy": "pipeline"}, "needs parallel.strategy ddp, not pipeline"),
        ({"strategy": "auto", "stages": 2}, "parallel.cuda_graphs: true, parallel.stages: 2"),
        ({"recompute": "blocks"}, "excludes parallel.recompute: blocks: use none"),
        ({"recompute": "auto", "strategy": "auto"}, "excludes parallel.recompute: auto: use none"),
        ({"offload": "activations"}, "excludes parallel.offload: activations: use none"),
        ({"precision": "fp8"}, "excludes parallel.precision: fp8"),
    ],
)
def test_settings_that_contradict_graphs(tmp_path: Path, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        load_config(recipe(tmp_path, parallel={"cuda_graphs": True} | keys))
    assert "\n" not in str(error.value)


def refused_by_the_engine(config: Any) -> str:
    with start("cpu") as runtime, pytest.raises(UserError) as error:
        check_engine(config, runtime, Classify())
    return str(error.value)


def refused_on_ranks(config: Any) -> str:
    with on_the_cpu():
        return refused_by_the_engine(config)


def test_where_graphs_are_refused(tmp_path: Path) -> None:
    config = load_config(recipe(tmp_path, parallel={"cuda_graphs": True}))
    assert run_ranks(refused_by_the_engine, 1, config)[0].startswith("parallel.cuda_graphs: true needs CUDA")
    assert "parallel.cuda_graphs: true is for one rank, but there are 2: use false" in run_ranks(refused_on_ranks, 2, config)[0]


# The imitation: what is wrong shows.


def captured(work: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
    return Imitation(torch.device("cpu")).capture(work)


def test_a_capture_executes_nothing() -> None:
    weights, drawn = torch.ones(3), torch.get_rng_state()
    result, launch = captured(lambda: weights.add_(1) * torch.rand(3))
    assert torch.equal(weights, torch.ones(3)) and torch.equal(torch.get_rng_state(), drawn) and result.isnan().all()
    launch()
    torch.set_rng_state(drawn)
    assert torch.equal(weights, torch.full((3,), 2.0)) and torch.equal(result, 2 * torch.rand(3))


def test_numbers_of_python_and_replaced_tensors_are_those_of_the_capture() -> None:
    state: dict[str, Any] = {"factor": 2.0, "tensor": torch.ones(3)}
    result, launch = captured(lambda: state["tensor"] * state["factor"])
    state["factor"], before = 3.0, state["tensor"]
    launch()
    assert torch.equal(result, torch.full((3,), 2.0))
    state["tensor"] = torch.zeros(3)
    before.fill_(5.0)
    launch()
    assert torch.equal(result, torch.full((3,), 10.0))


def test_memory_that_was_not_returned_is_lost() -> None:
    kept: list[Tensor] = []
    result, launch = captured(lambda: (kept.append(torch.ones(3) + 1), kept[0] * 2)[1])
    launch()
    assert torch.equal(result, torch.full((3,), 4.0)) and kept[0].isnan().all()
