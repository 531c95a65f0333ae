"""A real Slurm: ranks that srun starts, programs that it did not start, and the batch script that goes on by itself."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed import run_ranks
from tests.launch.cluster import Cluster, cluster  # noqa: F401
from tests.launch.test_exit_codes import CODES, table
from tests.recipes import lines, losses, recipe, run, write_recipe

SCRIPT = "launch/slurm/train.sbatch"


def who(said: str) -> list[str]:
    return sorted(line for line in said.splitlines() if line.startswith(("slurm ", "python ", "torchrun ")))


def test_who_is_a_rank(cluster: Cluster, tmp_path: Path) -> None:  # noqa: F811
    program = [sys.executable, cluster.who]
    said = cluster.ask("srun", "-N2", "-n3", "--distribution=block", *program)
    assert who(said) == ["slurm 0 3 0 2 127.0.0.1", "slurm 1 3 1 2 127.0.0.1", "slurm 2 3 0 1 127.0.0.1"]
    alone = "python 0 1 0 1 "
    assert who(cluster.ask("salloc", "-N2", "-n2", *program)) == [alone]
    assert who(cluster.ask("salloc", "-N2", "-n2")) == [alone], "the shell that salloc opens"
    script = tmp_path / "batch.sh"
    script.write_text(f"#!/bin/sh\n{' '.join(program)}\nsrun {' '.join(program)}\n")
    cluster.ask("sbatch", "--wait", "-N2", "-n2", "-o", str(tmp_path / "log"), str(script))
    assert who((tmp_path / "log").read_text()) == [alone, "slurm 0 2 0 1 127.0.0.1", "slurm 1 2 0 1 127.0.0.1"]


def test_the_same_losses_under_srun(cluster: Cluster, tmp_path: Path) -> None:  # noqa: F811
    cluster.ask("srun", "-N2", "-n2", sys.executable, "launch/train.py", write_recipe(tmp_path))
    assert losses(tmp_path / "out") == run_ranks(run, 2, recipe(tmp_path / "reference"))[0]


@pytest.mark.long
def test_a_stopped_run_is_requeued_and_goes_on(cluster: Cluster, tmp_path: Path) -> None:  # noqa: F811
    """The signal that ``--signal=USR1@120`` sends two minutes before the end comes in the middle of the run."""
    steps = 120
    out = tmp_path / "out"
    job = submit(cluster, tmp_path, ["-N2", "--ntasks-per-node=1"], [write_recipe(tmp_path, train={"steps": steps})])
    wait(lambda: (out / "metrics.jsonl").exists() and len(losses(out)) >= 3, "the first steps")
    cluster.ask("scancel", "--signal=USR1", job)
    wait(lambda: state(cluster, job) == "COMPLETED", "the end of the job", lambda: log(tmp_path))
    said = log(tmp_path)
    assert "stopped and saved: requeued, restart 1" in said and "resuming from" in said, said
    assert fields(cluster, job)["Restarts"] == "1"
    assert [line["step"] for line in lines(out) if "loss" in line] == list(range(1, steps + 1))
    assert losses(out) == run_ranks(run, 2, recipe(tmp_path / "reference", train={"steps": steps}))[0]


@pytest.mark.long
def test_a_mistake_is_not_requeued(cluster: Cluster, tmp_path: Path) -> None:  # noqa: F811
    """Arguments reach the program as they are: no shell reads them a second time."""
    argument = f"$(touch {tmp_path}/injected); 'a b'"
    job = submit(cluster, tmp_path, ["-N1", "-n2"], [argument])
    wait(lambda: state(cluster, job) == "FAILED", "the end of the job", lambda: log(tmp_path))
    assert fields(cluster, job)["ExitCode"] == "2:0" and fields(cluster, job)["Restarts"] == "0"
    said = [line for line in log(tmp_path).splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and argument in said[0] and not (tmp_path / "injected").exists()


def test_exit_codes_of_srun(cluster: Cluster) -> None:  # noqa: F811
    for code, said in zip(CODES, table()["srun"]):
        assert cluster.start(["srun", "-N2", "-n2", "sh", "-c", f"exit {code}"]).returncode == said


@pytest.mark.long
def test_the_signal_before_the_time_limit_comes_to_the_ranks(cluster: Cluster, tmp_path: Path) -> None:  # noqa: F811
    """The first time the job is stopped, the second time it ends by itself. Slurm counts a job's time in minutes."""
    program = tmp_path / "patient.sh"
    program.write_text(
        '#!/bin/sh\n[ -e "$0.runs" ] && exit 0\ntrap \'exit 75\' USR1\ntouch "$0.runs"\nwhile :; do sleep 0.1; done\n'
    )
    program.chmod(0o755)
    job = submit(cluster, tmp_path, ["-N2", "-n2", "--time=1", "--signal=USR1@50"], [], PYTHON=str(program))
    wait(lambda: state(cluster, job) == "COMPLETED", "the end of the job", lambda: log(tmp_path))
    assert fields(cluster, job)["Restarts"] == "1" and "stopped and saved: requeued, restart 1" in log(tmp_path)


@pytest.mark.long
def test_requeues_are_bounded_and_a_cancelled_job_stays_cancelled(cluster: Cluster, tmp_path: Path) -> None:  # noqa: F811
    fault = tmp_path / "fault.sh"
    fault.write_text("#!/bin/sh\nexit 1\n")
    fault.chmod(0o755)
    job = submit(cluster, tmp_path, ["-n1"], [], PYTHON=str(fault), BIGVISION_REQUEUES="2")
    wait(lambda: state(cluster, job) == "FAILED", "the end of the job", lambda: log(tmp_path))
    assert fields(cluster, job)["Restarts"] == "2"
    assert re.findall("restart [0-9]|most", log(tmp_path)) == ["restart 1", "restart 2", "most"]

    patient = tmp_path / "patient.sh"
    patient.write_text("#!/bin/sh\ntrap 'exit 75' TERM USR1\ntouch \"$0.runs\"\nwhile :; do sleep 0.1; done\n")
    patient.chmod(0o755)
    job = submit(cluster, tmp_path, ["-n1"], [], PYTHON=str(patient))
    wait(lambda: (tmp_path / "patient.sh.runs").exists(), "the job to run")
    cluster.ask("scancel", job)
    wait(lambda: state(cluster, job) == "CANCELLED", "the end of the job", lambda: log(tmp_path))
    time.sleep(8)  # longer than a requeued job waits
    assert state(cluster, job) == "CANCELLED"


def submit(cluster: Cluster, folder: Path, flags: list[str], arguments: list[str], **environment: str) -> str:  # noqa: F811
    command = ["sbatch", "--parsable", "-o", str(folder / "log"), *flags, SCRIPT, *arguments]
    done = cluster.start(command, 60, **{"PYTHON": sys.executable} | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def log(folder: Path) -> str:
    return (folder / "log").read_text() if (folder / "log").exists() else ""


def fields(cluster: Cluster, job: str) -> dict[str, str]:  # noqa: F811
    return dict(re.findall(r"(\w+)=(\S*)", cluster.ask("scontrol", "show", "job", job)))


def state(cluster: Cluster, job: str) -> str:  # noqa: F811
    return fields(cluster, job)["JobState"]


def wait(done: Callable[[], bool], what: str, said: Callable[[], str] = str, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"waited for {what}: {said()}"
        time.sleep(0.1)
