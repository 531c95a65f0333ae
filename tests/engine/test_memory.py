"""What a rank holds while its model is built."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from bigvision.config import load_config
from bigvision.engine.parallelize import units_of
from bigvision.errors import UserError
from tests.distributed import run_ranks
from tests.recipes import recipe


def peak_while_building(plain: dict[str, Any]) -> dict[str, int]:
    """Bytes resident at most while the engine is built over what was resident before, with the sizes to compare."""
    from bigvision.config import load_config
    from bigvision.runtime import start
    from bigvision.training.build import build_model

    with start("cpu") as runtime:
        config = load_config(plain)
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        before = resident("VmRSS")
        engine, _, _ = build_model(config, 10, runtime, steps=1, say=print)
        fragments = [fragment for fragment in engine.fragments()]
        model = [fragment for fragment in fragments if fragment.group == "model"]
        return {
            "peak": resident("VmHWM") - before,
            "share": sum(fragment.values.nbytes for fragment in fragments),
            "gradients": sum(fragment.values.nbytes for fragment in model),
            "whole": sum(math.prod(fragment.shape) * fragment.values.element_size() for fragment in model),
            "largest": max(math.prod(fragment.shape) * fragment.values.element_size() for fragment in model),
        }


def resident(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def test_a_rank_never_holds_more_than_its_share_and_a_few_tensors(tmp_path: Path) -> None:
    """86 M parameters over four ranks: a whole copy anywhere would be 0.34 GB more than what is allowed here."""
    plain = recipe(tmp_path, parallel={"strategy": "fsdp"})
    plain["model"] = {"name": "vit_base_patch16_224"}
    for found in run_ranks(peak_while_building, 4, plain):
        # The optimizer's state is made by a step on gradients of zeros; drawing a tensor takes up to three more of its size.
        allowed = found["share"] + found["gradients"] + 3.5 * found["largest"] + 64 * 2**20
        assert found["peak"] < allowed, found
        assert found["share"] + found["gradients"] + found["whole"] > allowed, "the bound would let a whole copy pass"


def test_small_blocks_are_gathered_together_up_to_a_size() -> None:
    """Blocks of 1, 3, 3, 1, 9 and 1 MB."""
    sizes = (1, 3, 3, 1, 9, 1)

    def units(device: str, **parallel: Any) -> list[list[int]]:
        config = load_config({"parallel": {"strategy": "fsdp"} | parallel})
        return [[sizes[place] for place in unit] for unit in units_of([250_000 * size for size in sizes], config, device)]

    each = [[1], [3], [3], [1], [9], [1]]
    assert units("cpu") == [[1, 3, 3, 1], [9], [1]], "one that is larger is a unit of its own"
    assert units("cpu", unit_size="4MB") == [[1, 3], [3, 1], [9], [1]]
    assert units("cpu", unit_size="1GB") == units("cuda", unit_size="1GB") == [[1, 3, 3, 1, 9, 1]]
    assert units("cuda") == units("cpu", unit_size="block") == units("cpu", strategy="pipeline") == each
    for wrong in ("blocks", "0MB"):
        with pytest.raises(UserError, match=r"parallel\.unit_size"):
            load_config({"parallel": {"unit_size": wrong}})
