"""Steps whose numbers are not finite are skipped, on all ranks, as if their batch had never come."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from bigvision.engine import Engine
from bigvision.engine.engine import finite_samples
from bigvision.engine.zero import ZeroEngine
from tests.distributed import run_ranks
from tests.recipes import digests, lines, losses, recipe
from tests.training.planted import planted, run_planted, run_without, scalars

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp": (3, {"strategy": "ddp"}),
    "fsdp": (3, {"strategy": "fsdp"}),
    "hybrid": (4, {"strategy": "fsdp", "replicas": 2}),
    "zero1": (2, {"strategy": "zero1"}),
    "zero2": (2, {"strategy": "zero2"}),
    "zero3": (3, {"strategy": "zero3"}),
    "pipeline": (2, {"strategy": "pipeline"}),
    "pipeline-fsdp": (4, {"strategy": "pipeline", "stages": 2}),
    "zbv": (2, {"strategy": "pipeline", "schedule": "zbv"}),
}
STEPS, AT = 5, 2


def some(names: str, *long: str) -> list[Any]:
    """Layouts, those of *long* only in the long matrix."""
    return [*names.split(), *(pytest.param(name, marks=pytest.mark.long) for name in long)]


def check(tmp_path: Path, layout: str, kind: str, model: str = "vit", **sections: Any) -> None:
    """A run with a spoiled sample is one that never had the batch, to the last bit."""
    ranks, parallel = LAYOUTS[layout]
    train = {"steps": STEPS, "micro_batch": 4} | sections.pop("train", {})

    def plain(name: str) -> dict[str, Any]:
        made = parallel | sections.get("parallel", {})
        return recipe(tmp_path / name, model, **sections | {"parallel": made, "train": train})

    found = run_ranks(run_planted, ranks, plain("spoiled"), kind, [AT], 0)
    run_ranks(run_without, ranks, plain("without"), [AT])
    spoiled, without = tmp_path / "spoiled", tmp_path / "without"
    assert [error for _, error in found] == [""] * ranks
    last = f"step-{STEPS:08}"
    assert digests(spoiled / last) == digests(without / last)
    assert scalars(spoiled / last) == scalars(without / last)
    assert scalars(spoiled / last)["skipped"] == 1 and scalars(spoiled / last)["optimizer_steps"] in (STEPS - 1, None)
    steps = [line for line in lines(spoiled) if "loss" in line]
    assert [line["step"] for line in steps if line.get("skipped")] == [AT + 1]
    values = losses(spoiled), losses(without)
    assert values[0][:AT] + values[0][AT + 1 :] == values[1][:AT] + values[1][AT + 1 :]
    assert None not in values[0][AT + 1 :] and len(values[0]) == STEPS
    assert steps[AT]["lr"] == steps[AT + 1]["lr"], "the next step takes the rate that this one did not use"
    told = next(line for line in lines(spoiled) if "not_finite" in line)
    if kind == "image" and model == "vit":
        (rank, ids), *more = told["not_finite"].items()
        # Of the first data-parallel rank: where its pipeline has the last stage.
        # The batch goes over the end of an epoch, and may have it twice.
        assert not more and set(ids) == set(found[0][0]) and int(rank) == {"pipeline": 1, "pipeline-fsdp": 2}.get(layout, 0)


@pytest.mark.parametrize("layout", some("ddp pipeline", "fsdp", "hybrid", "zero1", "zero2", "zero3", "pipeline-fsdp", "zbv"))
def test_a_sample_that_is_not_finite_was_never_there(tmp_path: Path, layout: str) -> None:
    check(tmp_path, layout, "image")


@pytest.mark.parametrize("layout", some("zero2", "ddp", "fsdp", "zero1", "zero3", "pipeline"))
def test_nothing_of_it_stays_in_running_statistics(tmp_path: Path, layout: str) -> None:
    check(tmp_path, layout, "image", "resnet")


@pytest.mark.parametrize("layout", some("zero2", "ddp", "pipeline"))
def test_a_loss_alone_that_is_not_finite(tmp_path: Path, layout: str) -> None:
    check(tmp_path, layout, "loss")


@pytest.mark.parametrize("layout", some("zero2", "ddp", "zero3"))
def test_a_gradient_alone_that_is_not_finite(tmp_path: Path, layout: str) -> None:
    check(tmp_path, layout, "gradient", parallel={"precision": "bf16"})


@pytest.mark.parametrize("layout", some("zero1", "fsdp"))
def test_a_variance_alone_that_is_not_finite(tmp_path: Path, layout: str) -> None:
    check(tmp_path, layout, "large", "resnet")
    saved = load_file(tmp_path / "spoiled" / f"step-{STEPS:08}" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())
    told = next(line for line in lines(tmp_path / "spoiled") if "not_finite" in line)
    assert told["not_finite"] == {}, "every loss was finite: what is planted does not test what it should"


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "kind", "precision"), [("resnet", "image", "bf16"), ("vit", "loss", "fp32"), ("vit", "gradient", "bf16")]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_strategy_every_way(tmp_path: Path, layout: str, model: str, kind: str, precision: str) -> None:
    check(tmp_path, layout, kind, model, parallel={"precision": precision})


@pytest.mark.long
@pytest.mark.parametrize(("layout", "offload"), [("zero2", "optimizer"), ("zero3", "all")])
def test_a_sample_that_is_not_finite_was_never_there_with_offload(tmp_path: Path, layout: str, offload: str) -> None:
    check(tmp_path, layout, "image", parallel={"offload": offload})


@pytest.mark.parametrize("layout", some("ddp", "pipeline", "zero1"))
def test_too_many_in_a_row_end_the_run(tmp_path: Path, layout: str) -> None:
    ranks, parallel = LAYOUTS[layout]
    plain = recipe(tmp_path, parallel=parallel, train={"steps": 9}, faults={"nonfinite": 2}, checkpoint={"every": 3})
    found = run_ranks(run_planted, ranks, plain, "image", [1, 3, 4, 5, 6], 0)
    ids = found[0][0]
    assert len(ids) == 4, "one alone, then three in a row"
    assert len({error for _, error in found}) == 1
    where = f"the loss is not finite on rank {ranks - 1 if layout == 'pipeline' else 0} (samples {ids[-1]})"
    assert f"step 6: {where}; 3 steps in a row" in found[0][1] and "faults.nonfinite allows 2" in found[0][1]
    assert not (tmp_path / "step-00000006").exists() and (tmp_path / "step-00000003").exists()
    # So that it is not started again for ever (faults.same_crash).
    starts = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert [line["crash"] for line in starts if "crash" in line] == [6] * ranks


def test_a_restart_counts_on(tmp_path: Path) -> None:
    """Of three skipped steps in a row the third comes after a restart, and ends the run."""
    for steps, error in ((5, ""), (9, "step 6: the loss is not finite on rank 1")):
        plain = recipe(tmp_path, train={"steps": steps}, faults={"nonfinite": 2})
        found = run_ranks(run_planted, 2, plain, "image", [3, 4, 5], 1)
        assert all(said.startswith(error) and bool(said) == bool(error) for _, said in found)


def test_through_batchnorm_the_whole_micro_batch_is_named(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    plain = recipe(
        tmp_path, "resnet", train={"steps": 2, "micro_batch": 6}, faults={"nonfinite": 0}, data={"trace": str(trace)}
    )  # fmt: skip
    run_ranks(run_planted, 2, plain, "image", [0], 1)
    told = next(line for line in lines(tmp_path) if "not_finite" in line)
    drawn = [json.loads(line) for line in trace.read_text().splitlines()]
    ids = next(line["ids"] for line in drawn if line["rank"] == 1 and line["step"] == 1)
    assert told["not_finite"] == {"1": ids[:6]}


def leave(recipe_path: str) -> tuple[Any, str]:
    from bigvision.cli import main

    with contextlib.redirect_stderr(io.StringIO()) as said, planted("image", [2]):
        return main(["train", recipe_path]), said.getvalue()


@pytest.mark.long
def test_every_rank_leaves_with_the_code_of_a_fault(tmp_path: Path) -> None:
    plain = recipe(tmp_path / "out", parallel={"strategy": "fsdp"}, faults={"nonfinite": 0})
    (tmp_path / "recipe.yaml").write_text(json.dumps(plain))
    for rank, (code, said) in enumerate(run_ranks(leave, 3, str(tmp_path / "recipe.yaml"))):
        assert code == 1 and f"error: rank {rank}: BadNumbers: step 3: the loss is not finite on rank 0" in said


def run_half(plain: dict[str, Any], scale: float, kind: str, steps: list[int]) -> str:
    """Train in fp16 from this loss scale on; returns the error that ended the run."""

    def scaled(engine: Any, attribute: str) -> Any:
        build = engine._build

        def built(self: Any, *args: Any) -> None:
            build(self, *args)
            if isinstance(self, ZeroEngine):
                self.stepper._scaler().cur_scale = scale
            else:
                self.stepper.scale.scale.fill_(scale)

        return patch.object(engine, attribute, built)

    with scaled(Engine, "_build"), scaled(ZeroEngine, "_build"):
        return run_planted(plain, kind, steps)[1]


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_an_overflow_counts_only_at_the_least_scale(tmp_path: Path, strategy: str) -> None:
    def plain(name: str) -> dict[str, Any]:
        return recipe(
            tmp_path / name, parallel={"strategy": strategy, "precision": "fp16"}, train={"steps": 6}, faults={"nonfinite": 1}
        )  # fmt: skip

    assert run_ranks(run_half, 2, plain("falls"), 2.0**9, "gradient", [1, 2, 3]) == ["", ""]
    left = scalars(tmp_path / "falls" / "step-00000006")
    assert (left["loss_scale"], left["skipped"], left["optimizer_steps"]) == (2.0**6, 3, 3)
    for error in run_ranks(run_half, 2, plain("least"), 2.0, "gradient", [1, 2, 3]):
        assert "step 4: the gradient or a running statistic is not finite" in error
        assert "fp16 overflows even at loss scale 1" in error or strategy == "zero2"
    for error in run_ranks(run_half, 2, plain("loss"), 2.0**9, "loss", [1, 2, 3]):
        assert "step 3: the loss is not finite on rank 0" in error, "no scale fixes a loss"


@dataclass
class Scores:
    """What `finite_samples` finds no tensor in."""

    values: torch.Tensor


NAN = float("nan")


@pytest.mark.parametrize(("outputs", "finite"), [
    (torch.tensor([[1.0, 2.0], [NAN, 0.0], [3.0, 4.0]]), [True, False, True]),
    (torch.tensor([1.0, 2.0, NAN]), [True, True, False]),
    ({"scores": torch.zeros(3, 0), "more": [torch.tensor([[[NAN]], [[1.0]], [[1.0]]])], "text": "a"}, [False, True, True]),
    ((torch.zeros(3, 2), torch.tensor(NAN)), [False, False, False]),  # a loss of the model's own
    ((torch.zeros(3, 2), torch.ones(7, 2)), [True, True, True]),  # not by sample
    (Scores(torch.tensor([NAN])), [True, True, True]),
    (None, [True, True, True]),
])  # fmt: skip
def test_the_finite_samples_of_outputs_of_any_form(outputs: Any, finite: list[bool]) -> None:
    assert finite_samples(outputs, 3, torch.device("cpu")).tolist() == finite
