"""Each optimizer under the strategies that it may run with: the same numbers, resumed bit for bit, else refused."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from bigvision import load_config
from bigvision.errors import UserError
from tests.distributed import run_ranks
from tests.engine.test_parity import same_losses
from tests.recipes import digests, losses, recipe, run

RATES = {"lion": 1e-4, "lamb": 5e-3, "adafactor": 1e-3, "muon": 1e-3}
PAIRS = [
    ("lion", [("zero2", 2)]),
    pytest.param("lion", [("fsdp", 3), ("zero1", 2), ("zero3", 2)], marks=pytest.mark.long),
    pytest.param("lamb", [("fsdp", 3)], marks=pytest.mark.long),
    ("adafactor", [("ddp", 2)]),
]


def plain(out: Path, name: str, strategy: str = "ddp", **sections: Any) -> dict[str, Any]:
    return recipe(out, optim={"name": name, "lr": RATES[name]}, parallel={"strategy": strategy}, **sections)


def run_exact(plain: dict[str, Any]) -> list[float]:
    """As :func:`run`, with the products of Muon's iteration in fp32."""
    import torch
    from timm.optim import muon

    rounded = muon.zeropower_via_newtonschulz
    muon.zeropower_via_newtonschulz = functools.partial(rounded, dtype=torch.float32)
    try:
        return run(plain)
    finally:
        muon.zeropower_via_newtonschulz = rounded


@pytest.mark.parametrize(("name", "layouts"), PAIRS)
def test_losses_equal_those_of_one_process(tmp_path: Path, name: str, layouts: list[tuple[str, int]]) -> None:
    reference = run_ranks(run, 1, plain(tmp_path / "reference", name))[0]
    for strategy, ranks in layouts:
        same_losses(reference, run_ranks(run, ranks, plain(tmp_path / strategy, name, strategy))[0])


@pytest.mark.long
def test_muon_differs_by_the_rounding_of_its_bf16_iteration_alone(tmp_path: Path) -> None:
    for function, relative in ((run_exact, 1e-5), (run, 1e-4)):
        one, two = (run_ranks(function, ranks, plain(tmp_path / f"{ranks}-{relative}", "muon"))[0] for ranks in (1, 2))
        same_losses(one, two, relative)


@pytest.mark.parametrize("name", RATES)
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path, name: str) -> None:
    whole = plain(tmp_path / "whole", name, checkpoint={"every": 6}, train={"steps": 12})
    run_ranks(run, 2, whole)
    half = tmp_path / "whole" / "step-00000006"
    run_ranks(run, 2, plain(tmp_path / "on", name, checkpoint={"resume": str(half)}, train={"steps": 12}))
    assert losses(tmp_path / "on") == losses(tmp_path / "whole")[6:]
    assert digests(tmp_path / "on" / "step-00000012") == digests(tmp_path / "whole" / "step-00000012")


def test_lion_changes_its_strategy(tmp_path: Path) -> None:
    resume, written = "never", []
    for number, strategy in enumerate(("fsdp", "zero2", "fsdp")):
        out = tmp_path / f"{number}"
        run_ranks(run, 2, plain(out, "lion", strategy, checkpoint={"resume": resume}, train={"steps": 3}))
        resume = str(out / "step-00000003")
        written.append(digests(Path(resume)))
    assert len(written[0]) >= 2 and written[0] == written[1] == written[2]


@pytest.mark.long
def test_lion_is_offloaded(tmp_path: Path) -> None:
    offloaded = plain(tmp_path / "offloaded", "lion", "zero2")
    offloaded["parallel"]["offload"] = "optimizer"
    same_losses(run_ranks(run, 1, plain(tmp_path / "one", "lion"))[0], run_ranks(run, 2, offloaded)[0])


@pytest.mark.parametrize("name", ["lamb", "adafactor", "muon"])
@pytest.mark.parametrize("strategy", ["fsdp", "zero1", "zero2", "zero3", "pipeline"])
def test_what_needs_whole_tensors_is_refused(name: str, strategy: str) -> None:
    given = {"optim": {"name": name}, "parallel": {"strategy": strategy}}
    if name == "lamb" and strategy in ("fsdp", "pipeline"):
        load_config(given)
        return
    with pytest.raises(UserError) as refusal:
        load_config(given)
    (line,) = str(refusal.value).splitlines()
    piece = "some rows" if strategy in ("fsdp", "pipeline") else "a flat piece"
    fits = "ddp, fsdp or pipeline" if name == "lamb" else "ddp"
    assert line.startswith(f"optim.name: {name} ") and "whole" in line
    assert line.endswith(f"parallel.strategy: {strategy} gives each rank {piece} of them: use {fits}, or adamw")
