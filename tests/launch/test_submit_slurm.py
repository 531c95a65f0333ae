"""`bigvision submit --to slurm` and a real Slurm."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.distributed import run_ranks
from tests.launch.cluster import Cluster, cluster  # noqa: F401
from tests.recipes import losses, recipe, run


def submit(cluster: Cluster, folder: Path, steps: int, *flags: str) -> str:  # noqa: F811
    """Hand a run over from *folder*; returns the number of the job."""
    (folder / "a recipe.yaml").write_text(yaml.safe_dump(recipe(folder / "out", train={"steps": steps})))
    command = [sys.executable, "-m", "bigvision.cli", "submit", "--to", "slurm", "a recipe.yaml", "--nodes", "2"]
    done = subprocess.run(
        [*command, "--time", "30", "--name", "job", *flags],
        cwd=folder,
        env=cluster.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Submitted batch job "), done.stdout
    return done.stdout.split()[-1]


def until(done: Callable[[], bool], folder: Path) -> None:
    end = time.monotonic() + 300
    while not done():
        assert time.monotonic() < end, "".join(log.read_text() for log in folder.glob("*.log"))
        time.sleep(0.1)


def facts(cluster: Cluster, job: str) -> dict[str, str]:  # noqa: F811
    pairs = (word.partition("=") for word in cluster.ask("scontrol", "show", "job", "--oneliner", job).split())
    return {name: value for name, _, value in pairs}


@pytest.mark.long
def test_the_job_trains(cluster: Cluster, tmp_path: Path) -> None:  # noqa: F811
    job = submit(cluster, tmp_path, 3)
    until(lambda: facts(cluster, job)["JobState"] == "COMPLETED", tmp_path)
    assert losses(tmp_path / "out") == run_ranks(run, 2, recipe(tmp_path / "reference", train={"steps": 3}))[0]
    found = facts(cluster, job)
    assert (found["JobName"], found["NumNodes"], found["TimeLimit"]) == ("job", "2", "00:30:00")
    assert "checkpoint  " in (tmp_path / f"job-{job}.log").read_text()


@pytest.mark.long
def test_the_job_is_requeued(cluster: Cluster, tmp_path: Path) -> None:  # noqa: F811
    job = submit(cluster, tmp_path, 120)
    until(lambda: (tmp_path / "out" / "metrics.jsonl").exists() and len(losses(tmp_path / "out")) > 3, tmp_path)
    cluster.ask("scancel", "--signal=USR1", job)
    until(lambda: facts(cluster, job)["JobState"] == "COMPLETED", tmp_path)
    assert facts(cluster, job)["Restarts"] == "1"
    assert losses(tmp_path / "out") == run_ranks(run, 2, recipe(tmp_path / "reference", train={"steps": 120}))[0]


@pytest.mark.long
def test_a_mistake_is_not_requeued(cluster: Cluster, tmp_path: Path) -> None:  # noqa: F811
    """What only the ranks can see: how many of them there are."""
    job = submit(cluster, tmp_path, 3, "--parallel.strategy", "fsdp", "--parallel.replicas", "3")
    until(lambda: facts(cluster, job)["JobState"] == "FAILED", tmp_path)
    assert (facts(cluster, job)["ExitCode"], facts(cluster, job)["Restarts"]) == ("2:0", "0")
    assert "error: parallel.replicas: 3 does not divide the 2 ranks" in (tmp_path / f"job-{job}.log").read_text()
