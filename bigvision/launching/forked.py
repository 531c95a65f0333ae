"""What a process has to be, so that ranks can be forked from it, and what a fork has to put right."""

from __future__ import annotations

import multiprocessing.forkserver
import os
from typing import Any

import torch
import torch.distributed as dist

from bigvision.errors import UserError

MEND = "pass names instead of objects, or start it in a process that has not used CUDA (restart the notebook's kernel)"


def check_parent(cuda: bool) -> None:
    """Raise `UserError` where forks of this process could not train.

    Args:
        cuda: whether the ranks will use it.
    """
    if dist.is_initialized():
        raise UserError("devices: this process is in a process group already: leave devices out to train on its ranks")
    if cuda and torch.cuda.is_initialized():
        raise UserError(f"devices: CUDA is in use in this process, and its forks cannot use it: {MEND}")


def settle(cuda: bool) -> None:
    """Put right what a fork has from its parent. Called first, in each rank.

    Args:
        cuda: whether it will use it.

    Raises:
        UserError: what cannot be put right.
    """
    if cuda and torch.cuda._is_in_bad_fork():
        raise UserError(f"devices: CUDA was asked for its devices before the ranks were forked: {MEND}")
    try:
        torch.ones(1, requires_grad=True).sum().backward()
    except RuntimeError as error:
        if "fork" not in str(error):
            raise
        raise UserError(f"devices: a backward pass has run in this process, which autograd does not survive: {MEND}") from None
    # The server of data workers is the parent's, and can be asked for by no other.
    server: Any = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]
    if (alive := server._forkserver_alive_fd) is not None:
        os.close(alive)
    preload = server._preload_modules
    server.__init__()
    server._preload_modules = preload
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
