"""A job on this machine: torchrun with a rendezvous that nobody else can reach."""

from __future__ import annotations

import os
import sys
import tempfile

from bigvision.errors import Exit
from bigvision.launching.job import Job


def command(job: Job, rendezvous: str) -> list[str]:
    """The command that starts the ranks.

    Args:
        rendezvous: a file in which they meet, in a folder of nobody else's. torchrun's own way opens a port to the network,
            and unpickles what it reads there.
    """
    return [sys.executable, "-m", "bigvision.launching.torchrun", *_arguments(job, rendezvous)]


def start(job: Job) -> int:
    """Run the job to its end, in this process; returns the exit code of its ranks.

    Ranks that failed are started again, all of them, and go on from the newest checkpoint. torchrun's own restarts do the same
    after a mistake too, and after a signal.
    """
    from bigvision.launching import torchrun

    # torchrun alone would give each rank one thread.
    cores = os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(-(-cores // job.ranks_per_node)))
    for restart in range(job.restarts + 1):
        with tempfile.TemporaryDirectory(prefix="bigvision-") as folder:
            code = torchrun.main(_arguments(job, f"{folder}/rendezvous"))
        if code in (Exit.DONE, Exit.MISTAKE, Exit.STOPPED) or restart == job.restarts:
            break
        print(f"exit code {code}: starting the ranks again ({restart + 1} of at most {job.restarts})", file=sys.stderr)
    return code


def _arguments(job: Job, rendezvous: str) -> list[str]:
    return [
        "--nproc-per-node", str(job.ranks_per_node), "--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file",
        "--rdzv-endpoint", rendezvous, "--local-addr", "127.0.0.1",
        "-m", "bigvision.cli", "train", str(job.recipe), *job.flags,
    ]  # fmt: skip
