"""A run of any strategy on any number of ranks goes on as any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_ranks
from tests.recipes import digests, lines, losses, recipe, run

STRATEGIES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
Layout = tuple[str, int, dict[str, Any]]
"""A name, a number of ranks and the parallel section."""

EVERY: list[Layout] = [(name, ranks, {"strategy": name}) for name in STRATEGIES for ranks in (1, 2, 3, 4)]
EVERY += [("hybrid", 4, {"strategy": "fsdp", "replicas": 2})]
PIPELINES: list[Layout] = [
    ("pipeline", 2, {"strategy": "pipeline"}),
    ("pipeline", 4, {"strategy": "pipeline"}),
    ("pipeline2fsdp2", 4, {"strategy": "pipeline", "stages": 2}),
]
SOME: list[Layout] = [("zero1", 3, {"strategy": "zero1"}), PIPELINES[0]]


def check_pairs(tmp_path: Path, layouts: list[Layout], firsts: list[Layout] | None = None) -> None:
    """Odd shapes, decayed and other parameters, rates per layer, and files so small that there are many.

    With *firsts* only the pairs that start with one of these.
    """

    def plain(name: str, parallel: dict[str, Any], steps: int, **checkpoint: Any) -> dict[str, Any]:
        return recipe(
            tmp_path / name, "convnext", parallel=parallel, optim={"schedule": "constant", "layer_decay": 0.8},
            train={"steps": steps, "micro_batch": None}, checkpoint={"shard_size": "40kB", **checkpoint},
        )  # fmt: skip

    run_ranks(run, 1, plain("alone", {"strategy": "ddp"}, 8))
    for first, ranks, parallel in firsts or layouts:
        name = f"{first}-{ranks}"
        run_ranks(run, ranks, plain(name, parallel, 8, every=3, keep=9))
        whole, saved = losses(tmp_path / name), tmp_path / name / "step-00000003"
        assert whole == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
        written = digests(saved)
        assert sum(file.startswith("model-") for file in written) > 3
        for second, others, otherwise in layouts:
            again, on = (f"{name}-{second}-{others}-{end}" for end in ("again", "on"))
            run_ranks(run, others, plain(again, otherwise, 3, resume=str(saved)))
            run_ranks(run, others, plain(on, otherwise, 8, resume=str(saved)))
            assert digests(tmp_path / again / "step-00000003") == written, f"{name} resumed as {second}-{others}"
            assert losses(tmp_path / on) == pytest.approx(whole[3:], rel=1e-5)
            if (first, ranks) == (second, others):
                assert losses(tmp_path / on) == whole[3:]
                assert digests(tmp_path / on / "step-00000008") == digests(tmp_path / name / "step-00000008")


def evaluated(folder: str, plain: dict[str, Any]) -> dict[str, float]:
    from bigvision import load_config
    from bigvision.training import evaluate_checkpoint

    return evaluate_checkpoint(Path(folder), load_config(plain))


FEW = ("fsdp", "zero1", "pipeline")


@pytest.mark.parametrize("strategies", [FEW, pytest.param((*STRATEGIES, "pipeline"), marks=pytest.mark.long)])
def test_every_strategy_evaluates_a_checkpoint(tmp_path: Path, strategies: tuple[str, ...]) -> None:
    """Only the weights are restored, and they are those that compute."""
    plain = recipe(tmp_path, train={"steps": 3})
    run_ranks(run, 2, plain)
    reached = next(line for line in lines(tmp_path) if "val_loss" in line)
    for strategy in strategies:
        other = plain | {"parallel": plain["parallel"] | {"strategy": strategy}}
        found = run_ranks(evaluated, 3, str(tmp_path / "step-00000003"), other)[0]
        assert found["loss"] == pytest.approx(reached["val_loss"], rel=1e-5) and found["top1"] == reached["val_top1"]


def test_some_strategies_resume_each_other(tmp_path: Path) -> None:
    check_pairs(tmp_path, SOME, SOME[:1])


@pytest.mark.long
@pytest.mark.parametrize("first", [*EVERY, *PIPELINES], ids=lambda first: f"{first[0]}-{first[1]}")
def test_every_strategy_resumes_every_other_on_every_number_of_ranks(tmp_path: Path, first: Layout) -> None:
    check_pairs(tmp_path, [*EVERY, *PIPELINES], [first])


@pytest.mark.long
def test_stages_change_between_runs_with_running_statistics(tmp_path: Path) -> None:
    """BatchNorm under the same micro-batches: two stages, then three, then none, as one run under one process."""

    def plain(name: str, parallel: dict[str, Any], steps: int, **checkpoint: Any) -> dict[str, Any]:
        return recipe(
            tmp_path / name,
            "resnet",
            parallel=parallel,
            train={"steps": steps, "micro_batch": 6},
            optim={"schedule": "constant"},
            checkpoint=checkpoint,
        )

    reference = run_ranks(run, 1, plain("alone", {}, 9))[0]
    found: list[float] = []
    resume: dict[str, Any] = {}
    for ranks, parallel, steps in (
        (2, {"strategy": "pipeline"}, 3),
        (3, {"strategy": "pipeline"}, 6),
        (1, {"strategy": "fsdp"}, 9),
    ):
        found += run_ranks(run, ranks, plain(str(steps), parallel, steps, **resume))[0]
        resume = {"resume": str(tmp_path / str(steps) / f"step-{steps:08}")}
    assert found == pytest.approx(reference, rel=1e-5)
