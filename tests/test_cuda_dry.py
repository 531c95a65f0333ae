"""What needs a GPU, run on the CPU: it would else run for the first time where time on a GPU is paid for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*arguments: str, timeout: float, **environment: str) -> str:
    """Run this Python from the project's folder; returns what it printed."""
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=timeout
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
@pytest.mark.alone
def test_the_tests_of_cuda() -> None:
    printed = run("-m", "pytest", "tests/cuda", "-q", timeout=3600, BIGVISION_CUDA_TESTS_ON="cpu")
    assert " passed" in printed


@pytest.mark.long
@pytest.mark.alone
@pytest.mark.parametrize("part", ["vit_l", "vit_l_zero2", "resnet_50", "resnet_18_graphs", "saves"])
def test_parts_of_the_benchmark(tmp_path: Path, part: str) -> None:
    run("-m", "benchmarks.gpu", "--part", part, "--device", "cpu", "--rounds", "2", "--results", str(tmp_path), timeout=600)
    assert "| side |" in (tmp_path / "gpu_dry_run_on_the_cpu.md").read_text()
