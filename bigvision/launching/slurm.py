"""A job as a script for sbatch."""

from __future__ import annotations

import shlex
import sys

from bigvision.errors import Exit
from bigvision.launching.job import Job

SIGNAL_SECONDS = 120
"""How long before its time is over the run is asked to save and stop."""
LEFT_SECONDS = 60
"""How long a rank may run on when another has ended. Not at once: the ranks would be stopped by a signal before they ended with
exit codes of their own, and a mistake looked like a run that is to go on."""


GPUS = {"gres", "gpus", "gpus-per-node"}
"""The options that ask for GPUs."""


def script(job: Job) -> str:
    """The script: srun starts a rank for each task, and a run that did not get to its end is put into the queue again."""
    options = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": job.ranks_per_node,
        "cpus-per-task": job.cpus_per_rank,
        "gpus-per-node": None if GPUS & {name for name, _ in job.directives} else job.gpus_per_node or None,
        "time": None if job.seconds is None else _time(job.seconds),
        "output": f"{job.name}-%j.log",
        # To the ranks, not to this script.
        "signal": f"USR1@{SIGNAL_SECONDS}",
    }
    lines = ["#!/bin/bash"]
    options |= dict(job.directives)
    lines += [f"#SBATCH --{name}={value}".removesuffix("=") for name, value in options.items() if value is not None]
    lines += ["#SBATCH --requeue", "#SBATCH --open-mode=append"]
    # Since Slurm 22.05 srun does not take --cpus-per-task over from the job: ranks would share one core with their workers.
    srun = ["srun", "--kill-on-bad-exit=0", f"--wait={LEFT_SECONDS}", f"--cpus-per-task={job.cpus_per_rank}"]
    program = [sys.executable, "-m", "bigvision.cli", "train", str(job.recipe), *job.flags]
    return (
        "\n".join(lines)
        + "\n"
        + BODY.format(
            program=shlex.join([*srun, *program]),
            mistake=int(Exit.MISTAKE),
            restarts=job.restarts,
        )
    )


BODY = """
{program}
code=$?

# A mistake stays one. All else, as a run that a signal stopped and saved (75), goes on from its newest checkpoint.
if [ "$code" -ne 0 ] && [ "$code" -ne {mistake} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ]; then
    # Slurm ends this script while it puts the job back; an exit before that would be the job's end.
    scontrol requeue "$SLURM_JOB_ID" && sleep 600
fi
exit "$code"
"""


def _time(seconds: int) -> str:
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}-{hours:02}:{minutes:02}:{seconds:02}"
