"""A job as a script for sbatch."""

from __future__ import annotations

import shlex
import sys

from bigvision.errors import Exit
from bigvision.launching.job import Job

GRACE_SECONDS = 120
"""How long before its time is over the run is asked to save and stop."""


def script(job: Job) -> str:
    """The script: srun starts a rank for each task, and what a signal stopped is put into the queue again."""
    options = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": job.ranks_per_node,
        "gpus-per-node": job.gpus_per_node or None,
        "partition": job.partition,
        "time": None if job.seconds is None else _time(job.seconds),
        "output": f"{job.name}-%j.log",
        # To the ranks, not to this script.
        "signal": f"USR1@{GRACE_SECONDS}",
    }
    lines = ["#!/bin/bash"]
    lines += [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    lines += ["#SBATCH --requeue", "#SBATCH --open-mode=append"]
    program = [sys.executable, "-m", "bigvision.cli", "train", str(job.recipe), *job.flags]
    return "\n".join(lines) + BODY.format(
        program=shlex.join(["srun", "--kill-on-bad-exit=1", *program]), stopped=int(Exit.STOPPED), restarts=job.restarts
    )


BODY = """

# The ranks answer signals; this script only waits for them.
trap : TERM USR1
{program}
code=$?

# Stopped by a signal and saved: the next start goes on from there.
if [ "$code" -eq {stopped} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def _time(seconds: int) -> str:
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}-{hours:02}:{minutes:02}:{seconds:02}"
