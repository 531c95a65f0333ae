"""Each optimizer under the strategies that it may run with: the same numbers, resumed bit for bit, else refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from bigvision import load_config, muon
from bigvision.config import check_batches
from bigvision.errors import UserError
from tests.distributed import run_ranks
from tests.engine.test_parity import same_losses
from tests.recipes import digests, losses, recipe, run

LONG = pytest.mark.long
RATES = {"adamw": 1e-3, "sgd": 5e-2, "lion": 1e-4, "lamb": 5e-3, "adafactor": 1e-3, "muon": 1e-3}
LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "`ddp`": ("ddp", 2, {}),
    "`fsdp`": ("fsdp", 3, {}),
    "`fsdp`, `replicas` > 1": ("fsdp", 4, {"replicas": 2}),
    "`pipeline`": ("pipeline", 2, {}),
    "`pipeline`, copied stages": ("pipeline", 4, {"stages": 2, "replicas": 2}),
    "`pipeline`, sharded stages": ("pipeline", 4, {"stages": 2}),
    "`zero1`": ("zero1", 2, {}),
    "`zero2`": ("zero2", 2, {}),
    "`zero3`": ("zero3", 2, {}),
    "offloaded": ("zero2", 2, {"offload": "optimizer"}),
}
"""The columns of the table in docs/strategies.md: a strategy, a number of ranks, other keys of `parallel`."""
SHORT = {("adafactor", "`ddp`"), ("adafactor", "`pipeline`"), ("muon", "`fsdp`")}
PAGE = Path(__file__).parents[2] / "docs" / "strategies.md"


def refusal(name: str, layout: str) -> str:
    """Why *name* cannot run in a layout; empty where it can."""
    strategy, ranks, more = LAYOUTS[layout]
    stages = more.get("stages", 2) if strategy == "pipeline" else 1
    try:
        parallel = {"strategy": strategy, **more}
        config = load_config({"optim": {"name": name}, "parallel": parallel, "train": {"global_batch": 24}})
        check_batches(config, ranks // stages, stages)
    except UserError as error:
        return str(error)
    return ""


ADMITTED = [(name, layout) for name in RATES for layout in LAYOUTS if not refusal(name, layout)]
PAIRS = [pytest.param(*pair, marks=[] if pair in SHORT else [LONG]) for pair in ADMITTED]


def made(out: Path, name: str, layout: str = "`ddp`", **sections: Any) -> dict[str, Any]:
    strategy, _, more = LAYOUTS[layout]
    return recipe(out, optim={"name": name, "lr": RATES[name]}, parallel={"strategy": strategy, **more}, **sections)


def run_exact(plain: dict[str, Any]) -> list[float]:
    """As :func:`run`, with the products of Muon's iteration in fp32."""
    with patch.object(muon, "DTYPE", torch.float32):
        return run(plain)


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_losses_equal_those_of_one_process(tmp_path: Path, name: str, layout: str) -> None:
    short = {"train": {"steps": 10}}
    reference = run_ranks(run_exact, 1, made(tmp_path / "reference", name, **short))[0]
    found = run_ranks(run_exact, LAYOUTS[layout][1], made(tmp_path / "other", name, layout, **short))[0]
    assert found == pytest.approx(reference, rel=1e-5) and len(set(reference)) == 10


@LONG
@pytest.mark.parametrize("layout", ["`ddp`", "`fsdp`", "`pipeline`, sharded stages"])
def test_muon_differs_by_the_rounding_of_its_bf16_iteration_alone(tmp_path: Path, layout: str) -> None:
    reference = run_ranks(run, 1, made(tmp_path / "reference", "muon"))[0]
    same_losses(reference, run_ranks(run, LAYOUTS[layout][1], made(tmp_path / "other", "muon", layout))[0], 1e-4)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *((name, "`ddp`") for name in ("lion", "lamb", "adafactor")),
        *(pytest.param(*pair, marks=LONG) for pair in ADMITTED if pair[1] != "`ddp`"),
    ],
)  # fmt: skip
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path, name: str, layout: str) -> None:
    ranks = LAYOUTS[layout][1]
    run_ranks(run, ranks, made(tmp_path / "whole", name, layout, checkpoint={"every": 6}, train={"steps": 12}))
    half = tmp_path / "whole" / "step-00000006"
    run_ranks(run, ranks, made(tmp_path / "on", name, layout, checkpoint={"resume": str(half)}, train={"steps": 12}))
    assert losses(tmp_path / "on") == losses(tmp_path / "whole")[6:]
    assert digests(tmp_path / "on" / "step-00000012") == digests(tmp_path / "whole" / "step-00000012")


@pytest.mark.parametrize(
    ("name", "layouts"),
    [
        pytest.param("lion", ["`fsdp`", "`zero2`"], marks=LONG), ("muon", ["`fsdp`", "`pipeline`"]),
        *(
            pytest.param(name, [layout for other, layout in ADMITTED if other == name and layout != "offloaded"], marks=LONG)
            for name in RATES
        ),
    ],
)  # fmt: skip
def test_every_layout_resumes_every_other_with_the_same_bytes(tmp_path: Path, name: str, layouts: list[str]) -> None:
    resume, written = "never", []
    for number, layout in enumerate((*layouts, layouts[0])):
        out = tmp_path / f"{number}"
        plain = made(out, name, layout, checkpoint={"resume": resume}, train={"steps": 3})
        run_ranks(run, LAYOUTS[layout][1], plain)
        resume = str(out / "step-00000003")
        written.append(digests(Path(resume)))
    assert len(written[0]) >= 2 and all(other == written[0] for other in written)


@pytest.mark.parametrize("name", ["lamb", "adafactor", "muon"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_cannot_run_is_refused_in_one_line(name: str, layout: str) -> None:
    strategy = LAYOUTS[layout][0]
    if not (line := refusal(name, layout)):
        assert strategy in ("ddp", "fsdp", "pipeline")
        return
    assert "\n" not in line and line.startswith(f"optim.name: {name} ") and "whole" in line and line.endswith("or adamw")
    if strategy == "pipeline":
        assert "parallel.replicas: 1 each of the 2 ranks" in line and "use parallel.replicas 2" in line
    else:
        fits = "ddp or pipeline" if name == "adafactor" else "ddp, fsdp or pipeline"
        piece = "some rows" if strategy == "fsdp" else "a flat piece"
        assert f"parallel.strategy: {strategy} gives each rank {piece} of them: use {fits}, or adamw" in line


def test_the_table_in_the_docs_is_what_is_admitted() -> None:
    rows = ["| `optim.name` | " + " | ".join(LAYOUTS) + " |", "|---|" + ":-:|" * len(LAYOUTS)]
    for name in RATES:
        rows.append(f"| `{name}` | " + " | ".join("yes" if (name, layout) in ADMITTED else "no" for layout in LAYOUTS) + " |")
    assert "\n".join(rows) in PAGE.read_text(encoding="utf-8"), "\n".join(rows)
