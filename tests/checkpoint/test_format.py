"""The bytes on the disk, without any model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, safe_open

from bigvision import checkpoint
from bigvision.checkpoint import Retention
from bigvision.checkpoint.commit import commit
from bigvision.checkpoint.writer import plan
from bigvision.errors import UserError
from bigvision.fragments import Fragment
from bigvision.runtime import start
from tests.distributed import run_ranks
from tests.recipes import digests

SHAPES = {
    "norm.weight": (7,),
    "scale": (),
    "patch.weight": (5, 3, 2, 2),
    "blocks.10.weight": (9, 4),
    "blocks.9.weight": (2, 4),
    "count": (),
    "empty": (0, 3),
}
DOCUMENTS = {"config.json": {"architecture": "made"}, "progress.json": {"step": 3, "scalars": {}}}


def whole_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    tensors["count"] = torch.tensor(2**40 + 3)
    return tensors


def make_fragments(rank: int, ranks: int, how: str, tensors: dict[str, torch.Tensor]) -> list[Fragment]:
    """Cut *tensors* as a strategy would: whole copies, rows, or flat runs that end in the middle of a row."""
    fragments = []
    for group in ("model", "optimizer"):
        for name, tensor in tensors.items():
            flat = tensor.clone().reshape(-1)
            start, end, copy = 0, flat.numel(), (rank, ranks)
            if how == "flat":
                step = -(-flat.numel() // ranks)
                start, end, copy = min(rank * step, flat.numel()), min((rank + 1) * step, flat.numel()), (0, 1)
            elif how == "rows" and tensor.ndim:
                row = math.prod(tensor.shape[1:])
                step = -(-tensor.shape[0] // ranks)
                start, end = (min(r * step, tensor.shape[0]) * row for r in (rank, rank + 1))
                copy = (0, 1)
            name_there = name if group == "model" else f"{name}/exp_avg"
            fragments.append(Fragment(group, name_there, tuple(tensor.shape), start, flat[start:end].clone(), copy))
    return fragments


def save(
    out: Path, step: int, fragments: list[Fragment], documents: dict[str, Any], shard_size: int, keep: int
) -> None:  # fmt: skip
    """Write a checkpoint from all ranks; afterwards keep only the newest *keep* valid ones."""
    commit(out, step, plan(fragments, shard_size), documents, Retention(keep))


def save_on_rank(out: Path, how: str, shard_size: int, step: int = 3, keep: int = 3) -> None:
    with start("cpu") as runtime:
        fragments = make_fragments(runtime.rank, runtime.world_size, how, whole_tensors())
        save(out, step, fragments, dict(DOCUMENTS), shard_size, keep)


def load_on_rank(out: Path, how: str) -> bool:
    with start("cpu") as runtime:
        wanted = make_fragments(runtime.rank, runtime.world_size, how, whole_tensors())
        got = make_fragments(runtime.rank, runtime.world_size, how, {n: t * 0 - 1 for n, t in whole_tensors().items()})
        found = checkpoint.find("auto", out, True, print)
        assert found is not None
        found.restore_or_older(got, print)
        return all(torch.equal(a.values, b.values) for a, b in zip(wanted, got))


@pytest.mark.parametrize("shard_size", [pytest.param(10**9, marks=pytest.mark.long), 200])
def test_bytes_do_not_depend_on_how_tensors_were_spread(tmp_path: Path, shard_size: int) -> None:
    seen = []
    for number, (how, ranks) in enumerate([("whole", 1), ("whole", 2), ("rows", 2), ("rows", 3), ("flat", 3), ("flat", 4)]):
        out = tmp_path / str(number)
        out.mkdir()
        run_ranks(save_on_rank, ranks, out, how, shard_size)
        seen.append(digests(out / "step-00000003"))
        for other, other_ranks in (("whole", 1), ("rows", 4), ("flat", 2)):
            assert all(run_ranks(load_on_rank, other_ranks, out, other))
    assert all(entry == seen[0] for entry in seen)
    assert len(seen[0]) == (2 if shard_size > 1000 else len(seen[0])) and (shard_size > 1000 or len(seen[0]) > 6)


@pytest.mark.parametrize("shard_size", [10**9, 200])
def test_files_are_ordinary_safetensors(tmp_path: Path, shard_size: int) -> None:
    run_ranks(save_on_rank, 2, tmp_path, "rows", shard_size)
    folder = tmp_path / "step-00000003"
    loaded = {}
    for path in folder.glob("model*.safetensors"):
        loaded |= load_file(path)
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        assert path.stat().st_mode & 0o777 == 0o644
    wanted = whole_tensors()
    assert set(loaded) == set(wanted) and all(torch.equal(loaded[name], wanted[name]) for name in wanted)
    if shard_size == 200:
        weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        assert set(weight_map) == set(wanted)
        # Only a tensor that is larger than the limit may make a file larger.
        sizes = [sum(t.nbytes for n, t in wanted.items() if weight_map[n] == f) for f in set(weight_map.values())]
        assert max(sizes) <= max(200, max(t.nbytes for t in wanted.values()))


def test_only_valid_checkpoints_are_kept_and_damage_is_passed_over(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2, 3, 4):
        run_ranks(save_on_rank, 2, tmp_path, "rows", 200, step, 2)
    assert checkpoint.steps_in(tmp_path) == [4, 3]
    victim = sorted((tmp_path / "step-00000004").glob("optimizer-*.safetensors"))[0]
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(bytes(data))
    assert run_ranks(found_on_rank, 2, tmp_path) == [("step-00000003", 1)] * 2
    victim.write_bytes(bytes(data[:-1]))
    run_ranks(save_on_rank, 2, tmp_path, "rows", 200, 5, 2)
    assert checkpoint.steps_in(tmp_path) == [5, 4, 3], "the damaged one is not counted"
    (tmp_path / "step-00000005" / "manifest.json").write_text("{}")
    (tmp_path / "step-00000003" / "progress.json").unlink()
    with pytest.raises(AssertionError, match="none of the 3 checkpoints"):
        run_ranks(found_on_rank, 2, tmp_path)


def found_on_rank(out: Path) -> tuple[str, int]:
    said: list[str] = []
    with start("cpu") as runtime:
        found = checkpoint.find("auto", out, True, said.append)
        assert found is not None
        found = found.restore_or_older(make_fragments(runtime.rank, runtime.world_size, "rows", whole_tensors()), said.append)
    assert all("is damaged" in text for text in said)
    return found.folder.name, len(said)


def never_on_rank(out: Path) -> None:
    with start("cpu"), pytest.raises(UserError, match="already holds"):
        checkpoint.find("never", out, True, print)


def test_never_does_not_mix_with_another_run(tmp_path: Path) -> None:
    run_ranks(save_on_rank, 1, tmp_path, "whole", 10**9)
    run_ranks(never_on_rank, 2, tmp_path)


def failing_save(out: Path, bad_rank: int) -> str:
    with start("cpu") as runtime:
        fragments = make_fragments(runtime.rank, runtime.world_size, "rows", whole_tensors())
        if runtime.rank == bad_rank:
            # A dtype that the rank cannot view as bytes stands for any error while writing.
            fragments[0] = Fragment("model", "unheard of", (4,), 0, torch.zeros(4), (0, 1))
            broken = [f for f in fragments if f.name != "norm.weight"]
            fragments = broken
        try:
            save(out, 9, fragments, dict(DOCUMENTS), 10**9, 3)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "saved"


@pytest.mark.parametrize("bad_rank", [0, 2])
def test_an_error_on_one_rank_is_every_ranks_and_leaves_the_older_checkpoint(tmp_path: Path, bad_rank: int) -> None:
    run_ranks(save_on_rank, 3, tmp_path, "rows", 10**9)
    before = digests(tmp_path / "step-00000003")
    said = run_ranks(failing_save, 3, tmp_path, bad_rank)
    assert len(set(said)) == 1 and said[0].startswith("RankFailure: rank"), said
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-00000003"]
    assert digests(tmp_path / "step-00000003") == before


def test_leftovers_of_a_killed_run_are_cleared(tmp_path: Path) -> None:
    run_ranks(save_on_rank, 1, tmp_path, "whole", 10**9)
    (tmp_path / "step-00000004.tmp-0a0b").mkdir()
    (tmp_path / "step-00000001.pruned-0a0b").mkdir()
    (tmp_path / "step-00000005.left-0a0b").mkdir()
    (tmp_path / ".lineage.json.0a0b").touch()
    (tmp_path / "step-00000003").rename(tmp_path / "step-00000003.aside-0a0b")
    checkpoint.prepare_folder(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000003", "step-00000005.left-0a0b"]
    assert all(run_ranks(load_on_rank, 2, tmp_path, "rows"))
