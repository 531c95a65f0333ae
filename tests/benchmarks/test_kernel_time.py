"""The probes of kernels: their sides compute the same, one that does not is found, and a dry run writes its tables."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.kernel_time import PROBES, agreeing, measure


@pytest.mark.parametrize(
    "probe", ["attention_80", *(pytest.param(probe, marks=pytest.mark.long) for probe in ("residual", "loss", "qkv"))]
)
def test_a_probe_runs_here(probe: str, tmp_path: Path) -> None:
    torch.compiler.reset()
    text = measure(probe, "cpu", True, 2, tmp_path)
    assert "Worth it" in text and (tmp_path / f"kernel_time_cpu_{probe}.json").exists()


def test_a_side_that_computes_something_else_is_refused_and_one_that_is_missing_left_out() -> None:
    inputs, sides = PROBES["attention_72"](True, torch.float32, "cpu")
    plain = sides["torch's choice"]

    def missing(*_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel for this head size")

    assert [name for name, _ in agreeing(inputs, sides | {"missing": missing}, 1e-4)] == list(sides)
    assert "padded to 96" in sides
    with pytest.raises(RuntimeError, match="double computes something else"):
        list(agreeing(inputs, sides | {"double": lambda *given: 2 * plain(*given)}, 1e-4))
