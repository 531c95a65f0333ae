"""Small runs on the device under test.

``BIGVISION_CUDA_TESTS_ON=cpu`` runs these tests on the CPU. That shows nothing of CUDA: it is for the tests' own code, which
would else run for the first time on a machine with a GPU. Tests of what only CUDA does then check that the CPU does not.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.recipes import recipe, run

SWITCH = "BIGVISION_CUDA_TESTS_ON"
DATA_PARALLEL = ("ddp", "fsdp")
ZERO = ("zero1", "zero2", "zero3")
STRATEGIES = (*DATA_PARALLEL, *ZERO)
"""Those that one rank can run."""


def on_cpu() -> bool:
    """Whether the tests were asked to run on the CPU."""
    return os.environ.get(SWITCH) == "cpu"


def cuda_devices() -> int:
    """How many there are; four gloo ranks stand for four devices where the tests run on the CPU."""
    return 4 if on_cpu() else torch.cuda.device_count()


def device() -> str:
    return "cpu" if on_cpu() else "cuda"


def parallel(strategy: str = "ddp", precision: str = "fp32", **more: Any) -> dict[str, Any]:
    """The section `parallel` on the device under test; eager, since compiling takes longer than all else of a small run."""
    return {"strategy": strategy, "precision": precision, "device": device(), "compile": False, **more}


def plain(out: Path, model: str = "vit", **sections: dict[str, Any]) -> dict[str, Any]:
    """:func:`tests.recipes.recipe` on the device under test."""
    return recipe(out, model, **sections | {"parallel": parallel(**sections.get("parallel", {}))})


def installed(strategy: str) -> bool:
    """Whether what *strategy* is made of is there."""
    return not strategy.startswith("zero") or importlib.util.find_spec("deepspeed") is not None


def marks_of(strategy: str) -> list[pytest.MarkDecorator]:
    """A skip for ZeRO where DeepSpeed is not installed."""
    return [pytest.mark.skipif(not installed(strategy), reason=f"{strategy} needs deepspeed")]


def compiler() -> pytest.MarkDecorator:
    """A skip where there is no C++ compiler, which CPU Adam needs, and torch.compile on the CPU."""
    return pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler: there is no c++ on PATH")


def synchronize() -> None:
    """Wait for the device."""
    if not on_cpu():
        torch.cuda.synchronize()


def peak_of(made: dict[str, Any]) -> int:
    """Train; the most bytes that were allocated on the device meanwhile, without what earlier runs have left; 0 on the CPU."""
    gc.collect()
    if not on_cpu():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    run(made)
    return 0 if on_cpu() else torch.cuda.max_memory_allocated()
