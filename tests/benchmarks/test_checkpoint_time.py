"""The measurement of checkpoints: what it counts, and that it comes to figures of every side."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.checkpoint_report import Measured, Report, Stall
from benchmarks.checkpoint_time import measure, once, options, read
from benchmarks.checkpoint_torch import Side
from benchmarks.resources import Cost, cost, make_durable, make_empty, size_of
from bigvision.runtime import start
from tests.distributed import run_ranks, start_ranks

TINY = ["--model", "vit_tiny_patch16_224", "--options", "{patch_size: 56, depth: 2, embed_dim: 24, num_heads: 3}"]


def spent(seconds: float, **counts: Any) -> Cost:
    return Cost(seconds, counts.pop("durable", seconds), 0, counts.pop("stored", 0), 0, counts.pop("memory", None))


def side(saves: list[float], loads: dict[str, list[float]], size: int = 1000) -> Measured:
    # The machine is twice as slow in every second round.
    costs = {"save": saves} | loads
    drifted = {act: [spent(t * (1 + n % 2), stored=1003) for n, t in enumerate(times)] for act, times in costs.items()}
    return Measured(size, {act: spent(9.0, memory=7 * 10**6) for act in costs}, drifted)


def made_up() -> Report:
    own = side([1.0] * 4, {"bigvision": [0.5] * 4, "raw read": [0.5] * 4, "raw read, direct": [0.4] * 4}, size=1004)
    first = {
        "bigvision": own,
        "torch.save per rank": side([2.0] * 4, {"torch.load per rank": [0.7] * 4}),
        "dd of zeros": side([0.5] * 4, {}),
        "dd of noise": side([0.9] * 4, {}),
    }
    slower = side([10.0] * 4, {"bigvision": [5.0] * 4})
    second = {"bigvision": slower, "other": side([16.0] * 4, {"other": [5.5] * 4})}
    waited = [spent(0.11 * n, durable=2.0) for n in (1, 2, 3)]
    stall = Stall(10**8, spent(1.0, memory=3 * 10**8), waited, [spent(0.1 * n) for n in (1, 2, 3)])
    return Report("Made up", 1000, [first, second], stall, 4, {"ranks": 2})


def test_targets_are_ratios_of_times_in_the_same_rounds(tmp_path: Path) -> None:
    report = made_up()
    found = {target.what: target for target in report.targets()}
    figures = {what: round(target.figure, 6) for what, target in found.items()}
    assert figures == {
        # Not the fastest in seconds, but of the smallest ratio to ours beside it.
        "durable save: other over bigvision": 1.6,
        "durable save: dd of zeros over bigvision": 0.5,
        "durable save: dd of noise over bigvision": 0.9,
        "verified load: bigvision over raw read, direct": 1.25,
        "bytes of the files over the state's": 1.004,
        "bytes written to the disk over the state's": 1.003,
        "memory of a save": 7,
        "memory of a load": 7,
        "background save: stall over a copy in memory": 1.1,
        "memory of a background save beyond the copy": 200,
    }
    assert [what for what, target in found.items() if not target.met] == [
        "durable save: dd of zeros over bigvision",
        "verified load: bigvision over raw read, direct",
    ]
    assert found["durable save: other over bigvision"].interval == pytest.approx((1.6, 1.6))
    report.write(tmp_path / "found")
    saved = json.loads((tmp_path / "found.json").read_text())
    assert [line["name"] for line in saved["saves"]] == [
        "bigvision", "torch.save per rank", "dd of zeros", "dd of noise", "other",
    ]  # fmt: skip
    assert saved["targets"][0]["met"] is True and saved["groups"][1]["other"]["costs"]["save"][1]["seconds"] == 32
    text = (tmp_path / "found.md").read_text()
    assert "| durable save: other over bigvision | 1.600 | 1.600 to 1.600 | at least 1.5 | yes |" in text
    assert "| memory of a save | 7 MB |  | at most 256 MB | yes |" in text


def spend_on_rank(out: Path) -> tuple[Cost, Cost]:
    with start("cpu") as runtime:
        make_empty(out)
        kept = []

        def write() -> None:
            with (out / f"{runtime.rank}").open("wb", buffering=0) as file:
                for _ in range(3):
                    file.seek(0)
                    file.write(b"1" * 1_000_000)

        def hold() -> None:
            kept.append(torch.ones(16 << 20))
            kept.clear()

        return cost(write, lambda: make_durable(out)), cost(hold, watched=True)


@pytest.mark.long
def test_bytes_and_memory_are_counted(tmp_path: Path) -> None:
    for wrote, held_much in run_ranks(spend_on_rank, 2, tmp_path / "out"):
        assert 6_000_000 <= wrote.passed < 6_100_000, "of both ranks together"
        assert wrote.stored < 3_000_000, "what is overwritten in memory reaches the disk once"
        assert wrote.memory is None and 0 < wrote.seconds < wrote.durable
        assert held_much.memory is not None and 60e6 < held_much.memory < 80e6, "64 MiB on each rank, given back before the end"


def forget_on_rank(out: Path) -> str:
    with start("cpu"):
        values = torch.arange(5.0)

        def save(folder: Path) -> None:
            (folder / "file").write_bytes(b"")

        forgetful = Side("forgetful", save, lambda: [values], {"forgetful": lambda folder: None})
        once(forgetful, out)
        with pytest.raises(AssertionError, match="forgetful did not bring back what was saved"):
            once(forgetful, out, watched=True)
    return "found"


def test_a_load_that_brings_nothing_back_is_found(tmp_path: Path) -> None:
    assert run_ranks(forget_on_rank, 2, tmp_path / "out") == ["found"] * 2


def read_on_rank(folder: Path) -> list[int]:
    with start("cpu"):
        # `rchar`: what read calls returned, from the disk or not.
        return [_returned(partial(read, direct, folder)) for direct in (False, True)]


def _returned(act: Callable[[], object]) -> int:
    def count() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = count()
    act()
    return count() - before


def test_a_raw_read_takes_every_byte_once(tmp_path: Path) -> None:
    for name, size in (("a", 40_000_000), ("b", 12_345), ("c", 1), ("d", 0)):
        (tmp_path / name).write_bytes(b"1" * size)
    for found in zip(*run_ranks(read_on_rank, 2, tmp_path)):
        # The counter's own file is read too; a buffered read ends with its rank's part, or the file.
        assert size_of(tmp_path) <= sum(found) < size_of(tmp_path) + 10_000


def measure_on_rank(asked: list[str]) -> None:
    with start("cpu") as runtime:
        measure(options().parse_args(asked), runtime)


@pytest.mark.long
def test_every_side_comes_to_figures(tmp_path: Path) -> None:
    out, results = tmp_path / "out", tmp_path / "results"
    asked = [*TINY, "--rounds", "2", "--out", str(out), "--results", str(results)]
    ranks = start_ranks(measure_on_rank, 2, asked)
    try:
        for rank in ranks:
            rank.join(600)
            assert rank.exitcode == 0
    finally:
        for rank in ranks:
            rank.kill()
    found = json.loads((results / "checkpoint_time_cpu_2_ranks.json").read_text())
    assert [line["name"] for line in found["saves"]] == [
        "bigvision", "torch.save on rank 0", "torch.save per rank", "torch.distributed.checkpoint",
        "torch.distributed.checkpoint, safetensors", "dd of zeros, direct", "dd of zeros", "dd of noise, direct", "dd of noise",
        "accelerate save_state (ddp)", "deepspeed save_checkpoint (zero3)",
    ]  # fmt: skip
    assert [line["name"] for line in found["loads"]] == [
        "bigvision", "bigvision, not verified", "raw read", "raw read, direct", "torch.load on rank 0", "torch.load per rank",
        "torch.distributed.checkpoint", "torch.distributed.checkpoint, safetensors", "accelerate load_state (ddp)",
        "deepspeed load_checkpoint (zero3)",
    ]  # fmt: skip
    assert len(found["targets"]) == 10 and all(math.isfinite(target["figure"]) for target in found["targets"])
    assert len(found["groups"]) == 3 and len(found["stall"]["saves"]) == 2
    for group in found["groups"]:
        for measured in group.values():
            assert measured["size"] >= found["state"], "each holds the whole state"
            for costs in measured["costs"].values():
                assert len(costs) == 2 and all(0 < one["seconds"] <= one["durable"] for one in costs)
            assert all(one["memory"] is not None for one in measured["watched"].values())
    assert list(out.iterdir()) == [], "nothing is left on the disk"
    assert (results / "checkpoint_time_cpu_2_ranks.md").read_text().count("| bigvision |") == 2
