"""A bit that flips in one copy is found, and named, before anything is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from bigvision import checkpoint
from bigvision.training.saving import Corruption, checksum, digests
from tests.distributed import run_ranks
from tests.recipes import losses, recipe, run


def run_flipped(plain: dict[str, Any], rank: int, name: str, step: int, computing: bool = False) -> str:
    """Train; before *step* (from 0) one bit flips on one rank in the tensor *name*. Returns the error that ended the run.

    Args:
        computing: after the step, in the copy that computes.
    """
    from bigvision.engine import Engine

    train_step = Engine.train_step

    def flip(self: Any) -> None:
        tensors = self.copies() if computing else self.fragments()
        found = [f for f in tensors if f.name == name and (f.group == "computing") == computing]
        assert len(found) == 1
        found[0].values.view(torch.uint8)[3] ^= 4

    def flipped(self: Any, batch: Any) -> Any:
        mine = self.step == step and self.runtime.rank == rank
        if mine and not computing:
            flip(self)
        result = train_step(self, batch)
        if mine and computing:
            flip(self)
        return result

    with patch.object(Engine, "train_step", flipped):
        try:
            run(plain)
        except Corruption as error:
            return str(error)
    return ""


WEIGHT = "blocks.1.attn.qkv.weight"
CASES: list[Any] = [
    ("ddp", 3, {"strategy": "ddp"}, "vit", 2, WEIGHT, f"model {WEIGHT} on rank 2, unlike on 0, 1"),
    ("moment", 3, {"strategy": "ddp"}, "vit", 0, f"{WEIGHT}/exp_avg", f"optimizer {WEIGHT}/exp_avg on rank 0, unlike on 1, 2"),
    ("whole", 3, {"strategy": "fsdp"}, "resnet", 1, "bn1.weight", "model bn1.weight on rank 1, unlike on 0, 2"),
    ("hybrid", 4, {"strategy": "fsdp", "replicas": 2}, "vit", 3, WEIGHT,
     f"model {WEIGHT}[3456:6912] on ranks 1, 3, either of which may be wrong"),
    ("stages", 4, {"strategy": "pipeline", "stages": 2, "replicas": 2}, "vit", 2, "head.bias",
     "model head.bias on ranks 2, 3, either"),
]  # fmt: skip


QUICK = {"whole"}
CASES = [pytest.param(*one, marks=[pytest.mark.long] * (one[0] not in QUICK)) for one in CASES]


@pytest.mark.parametrize(("case", "ranks", "parallel", "model", "rank", "name", "said"), CASES, ids=lambda case: str(case)[:9])
def test_a_flipped_bit_is_found(
    tmp_path: Path, case: str, ranks: int, parallel: dict[str, Any], model: str, rank: int, name: str, said: str
) -> None:
    plain = recipe(
        tmp_path, model, parallel=parallel, train={"steps": 6}, checkpoint={"every": 1, "keep": 9}, faults={"digest_every": 1}
    )  # fmt: skip
    errors = run_ranks(run_flipped, ranks, plain, rank, name, 3)
    assert len(set(errors)) == 1 and "found after step 4" in errors[0], errors
    assert said in errors[0]
    assert checkpoint.steps_in(tmp_path) == [3, 2, 1]


@pytest.mark.long
@pytest.mark.parametrize(("strategy", "name"), [("zero2", WEIGHT), pytest.param("zero3", "norm.bias", marks=pytest.mark.long)])
def test_a_copy_that_computes(tmp_path: Path, strategy: str, name: str) -> None:
    plain = recipe(
        tmp_path, parallel={"strategy": strategy, "precision": "bf16"}, train={"steps": 4}, faults={"digest_every": 2}
    )  # fmt: skip
    errors = run_ranks(run_flipped, 3, plain, 1, name, 1, True)
    assert all(f"computing {name} on rank 1, unlike on 0, 2" in error for error in errors), errors


@pytest.mark.long
def test_nothing_is_saved_without_a_comparison(tmp_path: Path) -> None:
    plain = recipe(tmp_path, train={"steps": 6}, checkpoint={"every": 2}, faults={"digest_every": 100})
    errors = run_ranks(run_flipped, 3, plain, 1, WEIGHT, 2)
    assert all("found after step 4" in error and "on rank 1" in error for error in errors)
    assert checkpoint.steps_in(tmp_path) == [2]


@pytest.mark.long
def test_comparing_copies_never_stops_a_sound_run(tmp_path: Path) -> None:
    """Running statistics differ between two saves; comparing changes nothing."""
    for name, ranks, parallel, model in (
        ("ddp", 3, {"strategy": "ddp"}, "resnet"),
        ("zero3", 2, {"strategy": "zero3"}, "efficientnet"),
        ("hybrid", 4, {"strategy": "fsdp", "replicas": 2}, "resnet"),
    ):
        sections: dict[str, Any] = {
            "parallel": parallel,
            "train": {"steps": 4, "micro_batch": None},
            "checkpoint": {"every": 2},
        }
        run_ranks(run, ranks, recipe(tmp_path / name, model, faults={"digest_every": 1}, **sections))
        if name == "ddp":
            run_ranks(run, ranks, recipe(tmp_path / "without", model, **sections))
            assert losses(tmp_path / name) == losses(tmp_path / "without")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool])
def test_the_checksum_of_a_device_sees_every_bit(dtype: torch.dtype) -> None:
    drawn = torch.Generator().manual_seed(0)
    values = torch.randint(0, 2, (321,), generator=drawn).to(dtype)
    if dtype.is_floating_point:
        values = torch.randn(321, generator=drawn).to(dtype)
    whole = int(checksum(values))
    raw = values.view(torch.uint8)
    for place in (0, 1, 160, 320):
        for bit in range(8 * values.element_size()):
            flipped = raw.clone()
            flipped[place * values.element_size() + bit // 8] ^= 1 << bit % 8
            assert int(checksum(flipped.view(dtype))) != whole
    swapped = values.clone()
    swapped[0], swapped[160] = values[160].item() + 1, values[0].item()
    assert int(checksum(swapped)) != whole


def test_the_checksum_does_not_depend_on_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(1000)
    whole = int(checksum(values))
    monkeypatch.setattr("bigvision.fragments.PIECE", 7)
    assert int(checksum(values)) == whole
    assert len(set(digests([values, values + 1, values[:0]]))) == 3
