"""Ranks that bigvision starts itself, and what other launchers ask for. (The folder ``launch/`` has their entry scripts.)

In come a configuration and a number of ranks, from Python or the command line; out come ranks that run
`bigvision.training.train_on_rank`, and their result or error in the process that started them.

Read ``ranks.py`` first (how many ranks, and their start on this host) and ``rank.py`` (one of them). ``ray.py`` starts them on
Ray, ``submit.py`` hands a job to Slurm or Kubernetes. ``accelerate.py`` and ``torchrun.py`` are for those launchers;
``evaluate.py`` is ``bigvision eval``; ``doctor.py`` is ``bigvision doctor``, with its checks in ``machine.py``,
``placement.py`` and ``dry_run.py``; ``commands.py`` has the arguments that commands share.
"""

from __future__ import annotations
