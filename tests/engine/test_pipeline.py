"""Pipelines against one process that uses the same micro-batches, under real schedules over gloo."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.cli.test_mistakes import refused
from tests.distributed import run_ranks, start_ranks
from tests.engine.test_parity import same_losses
from tests.launch.test_deepspeed import run_without_objects
from tests.recipes import lines, losses, recipe, run, write_recipe

DEEP: dict[str, dict[str, Any]] = {
    "vit": {"patch_size": 8, "depth": 6, "embed_dim": 48, "num_heads": 3},
    "swin": {"window_size": 4, "embed_dim": 24, "depths": [3, 3], "num_heads": [2, 3]},
    "eva02": {"patch_size": 7, "depth": 5, "embed_dim": 48, "num_heads": 3},
}
"""Options that give a model enough blocks for four stages."""

MODELS = ["vit", "swin", "convnext", "resnet", "efficientnet", "eva02", "coat"]


def pipeline(out: Path, model: str = "vit", **sections: Any) -> dict[str, Any]:
    """A recipe of a run in a pipeline of all ranks; *sections* change single keys."""
    parallel = {"strategy": "pipeline"} | sections.pop("parallel", {})
    return deep(recipe(out, model, parallel=parallel, **sections), model)


def alone(out: Path, model: str = "vit", **sections: Any) -> dict[str, Any]:
    return deep(recipe(out, model, **sections), model)


def deep(made: dict[str, Any], model: str) -> dict[str, Any]:
    return made | {"model": made["model"] | {"options": DEEP.get(model, made["model"].get("options", {}))}}


def check(
    tmp_path: Path, model: str, layouts: list[tuple[int, dict[str, Any]]], micro_batch: int, relative: float = 1e-5
) -> None:
    train = {"micro_batch": micro_batch}
    reference = run_ranks(run, 1, alone(tmp_path / "reference", model, train=train))[0]
    for number, (ranks, parallel) in enumerate(layouts):
        found = run_ranks(run, ranks, pipeline(tmp_path / str(number), model, parallel=parallel, train=train))
        same_losses(reference, found[0], relative)
        # What rank 0 logs is known to it alone; the gradient's norm is the whole model's.
        norms = [line["grad_norm"] for line in lines(tmp_path / str(number)) if "loss" in line]
        assert norms == pytest.approx([line["grad_norm"] for line in lines(tmp_path / "reference") if "loss" in line], rel=1e-4)
        expected = next(line for line in lines(tmp_path / "reference") if "val_loss" in line)
        evaluated = next(line for line in lines(tmp_path / str(number)) if "val_loss" in line)
        assert evaluated["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-4)


ONE_EACH = [(2, {"schedule": "gpipe"}), (2, {"schedule": "1f1b"}), (4, {"schedule": "gpipe"}), (4, {"schedule": "1f1b"})]
SEVERAL = [
    (2, {"schedule": "interleaved"}),
    (2, {"schedule": "zbv"}),
    (2, {"schedule": "dualpipev"}),
]
FOUR_SEVERAL = [(4, {"schedule": name}) for name in ("interleaved", "zbv", "dualpipev")]
MODELS_ONE_EACH = [pytest.param(name, ONE_EACH if name == "vit" else ONE_EACH[1:3], marks=pytest.mark.long) for name in MODELS]


@pytest.mark.parametrize(("model", "layouts"), [("vit", ONE_EACH[3:]), *MODELS_ONE_EACH])
def test_losses_equal_those_of_one_process(tmp_path: Path, model: str, layouts: list[tuple[int, dict[str, Any]]]) -> None:
    """24 samples in micro-batches of 5: the last one is short."""
    check(tmp_path, model, layouts, micro_batch=5)


@pytest.mark.long
@pytest.mark.parametrize("model", MODELS)
def test_every_schedule_of_one_stage_each(tmp_path: Path, model: str) -> None:
    check(tmp_path, model, ONE_EACH, micro_batch=3)


@pytest.mark.long
@pytest.mark.parametrize("model", MODELS)
def test_several_stages_on_each_rank(tmp_path: Path, model: str) -> None:
    check(tmp_path, model, SEVERAL, micro_batch=3)


@pytest.mark.long
def test_several_stages_on_each_of_four_ranks(tmp_path: Path) -> None:
    deeper = DEEP["vit"] | {"depth": 8}
    train = {"micro_batch": 3}
    made = alone(tmp_path / "reference", train=train)
    reference = run_ranks(run, 1, made | {"model": made["model"] | {"options": deeper}})[0]
    for ranks, parallel in FOUR_SEVERAL:
        made = pipeline(tmp_path / parallel["schedule"], parallel=parallel, train=train)
        same_losses(reference, run_ranks(run, ranks, made | {"model": made["model"] | {"options": deeper}})[0])


@pytest.mark.parametrize(
    ("model", "schedule", "micro_batch"),
    [
        *(pytest.param("vit", "interleaved", size, marks=pytest.mark.long) for size in (6, 3)),  # two pieces on a rank
        *(pytest.param(name, "1f1b", 3, marks=pytest.mark.long) for name in ("convnext", "swin", "coat")),
    ],
)
def test_losses_of_sharded_stages_equal_those_of_one_process(
    tmp_path: Path, model: str, schedule: str, micro_batch: int
) -> None:
    """Two stages, each on two ranks: 12 samples to each pipeline."""
    check(tmp_path, model, [(4, {"stages": 2, "schedule": schedule})], micro_batch)


@pytest.mark.long
def test_every_schedule_over_sharded_or_copied_stages(tmp_path: Path) -> None:
    shared = [(4, {"stages": 2, "schedule": name}) for name in ("gpipe", "1f1b", "interleaved")]
    copied = [
        (4, {"stages": 2, "replicas": 2, "schedule": name}) for name in ("gpipe", "1f1b", "interleaved", "zbv", "dualpipev")
    ]
    check(tmp_path, "vit", shared + copied, micro_batch=3)


def test_batch_statistics_of_sharded_stages(tmp_path: Path) -> None:
    """Each pipeline keeps its own running statistics; their mean over the ranks of a stage is saved."""
    for name, ranks, parallel in (("a", 2, {"strategy": "ddp"}), ("b", 4, {"strategy": "pipeline", "stages": 2})):
        plain = recipe(tmp_path / name, "resnet", parallel=parallel, train={"steps": 4, "micro_batch": 6})
        run_ranks(run, ranks, plain)
    first, second = (load_file(tmp_path / name / "step-00000004" / "model.safetensors") for name in "ab")
    means = [key for key in first if "running" in key]
    assert means
    for key in means:
        assert (first[key] - second[key]).norm() <= 1e-4 * first[key].norm(), key


OPTIMIZERS: list[Any] = [{"name": "sgd", "lr": 0.05, "layer_decay": 0.8}]
OPTIMIZERS += [pytest.param({"name": name, "lr": lr}, marks=pytest.mark.long) for name, lr in (("lion", 1e-4), ("lamb", 0.01))]


@pytest.mark.long
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_other_optimizers(tmp_path: Path, optim: dict[str, Any]) -> None:
    reference = run_ranks(run, 1, alone(tmp_path / "reference", optim=optim))[0]
    for ranks, parallel in ((2, {}), (4, {"stages": 2})):
        same_losses(reference, run_ranks(run, ranks, pipeline(tmp_path / str(ranks), optim=optim, parallel=parallel))[0])


@pytest.mark.long
@pytest.mark.parametrize("parallel", [{"recompute": "blocks", "schedule": "zbv"}, {"recompute": "blocks"}, {"compile": True}])
def test_recompute_and_compile_change_no_loss_of_a_pipeline(tmp_path: Path, parallel: dict[str, Any]) -> None:
    train = {"micro_batch": 6}
    reference = run_ranks(run, 1, alone(tmp_path / "reference", train=train))[0]
    same_losses(reference, run_ranks(run, 2, pipeline(tmp_path / "out", train=train, parallel=parallel))[0])


@pytest.mark.long
@pytest.mark.parametrize(("precision", "relative"), [("bf16", 1e-3), ("fp16", 1e-3)])
def test_losses_in_half_precision_are_those_of_fsdp(tmp_path: Path, precision: str, relative: float) -> None:
    train = {"steps": 8}
    shared = {"precision": precision}
    reference = run_ranks(run, 1, alone(tmp_path / "reference", train=train, parallel=shared | {"strategy": "fsdp"}))[0]
    for ranks, more in ((2, {}), (4, {"stages": 2})):
        found = run_ranks(run, ranks, pipeline(tmp_path / str(ranks), train=train, parallel=shared | more))[0]
        assert found == pytest.approx(reference, rel=relative)


@pytest.mark.long
def test_dropout_does_not_depend_on_the_schedule(tmp_path: Path) -> None:
    """It is a function of (seed, step, data-parallel rank, stage, micro-batch), and so the same when a run is repeated."""
    found = []
    for name, schedule in (("a", "gpipe"), ("b", "1f1b"), ("c", "1f1b")):
        made = pipeline(tmp_path / name, parallel={"schedule": schedule}, train={"steps": 5})
        options = made["model"]["options"] | {"proj_drop_rate": 0.2}
        run_ranks(run, 2, made | {"model": made["model"] | {"drop_path": 0.3, "options": options}})
        found.append(losses(tmp_path / name))
    assert found[0] == found[1] == found[2]
    plain = run_ranks(run, 2, pipeline(tmp_path / "plain", train={"steps": 5}))[0]
    assert plain != pytest.approx(found[0], rel=1e-4)


def traffic(plain: dict[str, Any]) -> list[tuple[int, list[int]]]:
    """Run, and note to whom this rank sends tensors of which shape."""
    import torch
    import torch.distributed as dist
    from torch.distributed.pipelining import schedules

    sent: list[tuple[int, list[int]]] = []
    exchange = schedules._batch_p2p

    def noted(ops: Any, desc: str | None = None) -> Any:
        mine = [op for op in ops if op.op is dist.isend]
        if torch.__version__ < "2.14":  # torch 2.11 opens each line with a number
            mine = [op for op in mine if op.tensor.dim()]
        sent.extend((op.peer, list(op.tensor.shape)) for op in mine)
        return exchange(ops, desc)

    schedules._batch_p2p = noted
    try:
        run_without_objects(plain)
    finally:
        schedules._batch_p2p = exchange
    return sent


def test_only_boundary_tensors_travel(tmp_path: Path) -> None:
    """A ViT's tokens: 17 of width 48, forth from the first stage and back as gradients from the second; no object, no label."""
    first, second = run_ranks(traffic, 2, pipeline(tmp_path, train={"steps": 2, "micro_batch": 6}))
    assert first == [(1, [6, 17, 48])] * 8 and second == [(0, [6, 17, 48])] * 8


def test_the_table_is_said_at_start(tmp_path: Path) -> None:
    from tests.training.test_resume import run_and_listen

    (_, said), _ = run_ranks(run_and_listen, 2, pipeline(tmp_path, train={"steps": 1}))
    rows = [line for line in said.splitlines() if "MiB" in line]
    assert "of the slowest" in said and len(rows) == 2 and any("100%" in row for row in rows)


@pytest.mark.parametrize(
    ("ranks", "flags", "words"),
    [
        (2, ["--parallel.strategy", "fsdp", "--parallel.stages", "2"], ["parallel.stages: 2", "strategy pipeline"]),
        (3, ["--parallel.stages", "2"], ["parallel.stages: 2", "3 ranks"]),
        (1, [], ["pipeline needs at least 2 ranks"]),
        (4, ["--parallel.schedule", "interleaved", "--train.micro_batch", "3"], ["8 stages", "vit_tiny", "blocks"]),
        (2, ["--parallel.microbatches", "5"], ["parallel.microbatches: 5", "24 samples", "use 4"]),
        (2, ["--parallel.microbatches", "4"], ["train.micro_batch: 5", "parallel.microbatches: 4"]),
        (2, ["--parallel.schedule", "zbv"], ["train.micro_batch: 5", "zbv"]),
        (2, ["--parallel.schedule", "dualpipev", "--train.micro_batch", "8"], ["3", "dualpipev", "at least 4"]),
        (
            2,
            ["--parallel.schedule", "interleaved", "--parallel.stages_per_rank", "1"],
            ["stages_per_rank: 1", "interleaved", "use 2"],
        ),
        (2, ["--parallel.stages_per_rank", "2"], ["stages_per_rank: 2", "1f1b", "use 1"]),
        (2, ["--model.name", "twins_svt_small", "--model.options", "{}"], ["twins_svt_small", "fsdp"]),
        (4, ["--optim.name", "adafactor", "--parallel.stages", "2"], ["adafactor", "replicas: 1", "replicas 2", "adamw"]),
        (
            4,
            ["--parallel.schedule", "zbv", "--parallel.stages", "2", "--train.micro_batch", "3"],
            ["parallel.replicas: 1", "zbv", "use 2"],
        ),
        (2, ["--parallel.schedule", "2f2b"], ["parallel.schedule", "1f1b"]),
    ],
)
def test_a_pipeline_that_cannot_be_is_refused_in_one_line(
    tmp_path: Path, ranks: int, flags: list[str], words: list[str]
) -> None:
    path = write_recipe(tmp_path, parallel={"strategy": "pipeline"})
    refused(["train", path, *flags], *words, ranks=ranks)
    assert not list(tmp_path.glob("out/step-*"))


def run_and_report(plain: dict[str, Any], path: str) -> None:
    """:func:`run`; an error is written to a file of this rank."""
    import os

    try:
        run(plain)
    except BaseException as error:
        Path(f"{path}-{os.environ['RANK']}").write_text(json.dumps(str(error)))
        raise


@pytest.mark.long
def test_a_rank_that_dies_ends_the_others(tmp_path: Path) -> None:
    plain = pipeline(tmp_path / "out", train={"steps": 10_000})
    processes = start_ranks(run_and_report, 4, plain, str(tmp_path / "said"))
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    assert processes[2].pid is not None
    processes[2].kill()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [1, 1, -signal.SIGKILL, 1]
    said = [json.loads((tmp_path / f"said-{rank}").read_text()) for rank in (1, 3)]
    assert all("stage 2 on rank 2" in words for words in said), said
