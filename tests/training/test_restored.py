"""A run that resumes draws no first values: only what a checkpoint does not contain is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_ranks
from tests.recipes import losses, recipe, run
from tests.training.test_resume_strategies import evaluated


def draws(function: Any, *args: Any) -> int:
    """How many random operations of the model's constructor are replayed while *function* runs."""
    from bigvision.models.exact_init import trace as module

    inner, count = module._execute, 0

    def counted(trace: Any, op: Any, storages: Any) -> None:
        nonlocal count
        count += op.random
        inner(trace, op, storages)

    module._execute = counted
    try:
        function(*args)
    finally:
        module._execute = inner
    return count


@pytest.mark.parametrize(
    ("strategy", "model"),
    [
        ("fsdp", "swin"),  # has non-persistent buffers
        pytest.param("pipeline", "vit", marks=pytest.mark.long),
        *(pytest.param(name, "swin", marks=pytest.mark.long) for name in ("ddp", "zero1", "zero2", "zero3", "pipeline")),
    ],
)
def test_nothing_is_drawn_for_a_run_that_resumes(tmp_path: Path, strategy: str, model: str) -> None:
    def plain(name: str, steps: int, **checkpoint: Any) -> dict[str, Any]:
        train = {"steps": steps, "micro_batch": 6}
        optim = {"schedule": "constant"}
        return recipe(tmp_path / name, model, parallel={"strategy": strategy}, train=train, optim=optim, checkpoint=checkpoint)

    assert min(run_ranks(draws, 2, run, plain("first", 4, every=2, keep=9))) > 0
    saved = str(tmp_path / "first" / "step-00000002")
    assert run_ranks(draws, 2, run, plain("second", 4, resume=saved)) == [0, 0]
    assert losses(tmp_path / "second") == losses(tmp_path / "first")[2:]
    assert run_ranks(draws, 2, evaluated, saved, plain("first", 4)) == [0, 0]


def values_before_a_restore(plain: dict[str, Any]) -> tuple[bool, list[str]]:
    """Whether all that checkpoints have is NaN or 0, and which of the other buffers differ from a fresh build's."""
    import torch

    from bigvision import load_config
    from bigvision.runtime import start
    from bigvision.training.build import build_model

    with start("cpu") as runtime:
        config = load_config(plain)
        fresh, restored = (
            build_model(config, 10, runtime, steps=1, say=print, restored=flag)[0] for flag in (False, True)
        )  # fmt: skip
        saved = {fragment.name: fragment.values for fragment in restored.fragments() if fragment.group == "model"}
        empty = all(bool(v.isnan().all()) if v.is_floating_point() else not v.any() for v in saved.values())
        expected = dict(fresh.module.named_buffers())  # type: ignore[attr-defined]
        others = {name: buffer for name, buffer in restored.module.named_buffers() if name not in saved}  # type: ignore[attr-defined]
        assert others
        return empty, [name for name, buffer in others.items() if not torch.equal(buffer, expected[name])]


def test_what_no_checkpoint_has_is_computed_and_the_rest_is_no_number(tmp_path: Path) -> None:
    assert run_ranks(values_before_a_restore, 1, recipe(tmp_path, "swin")) == [(True, [])]
