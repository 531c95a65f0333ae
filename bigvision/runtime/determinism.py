"""``train.deterministic``: operations that give the same bits each time, or an error that names the operation."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from bigvision.errors import UserError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
REPEATING_WORKSPACES = (":4096:8", ":16:8")
"""The sizes of cuBLAS's workspace with which its results repeat; cuBLAS reads the variable when CUDA starts."""
NO_DETERMINISTIC_FORM = re.compile(r"(\w+) does not have a deterministic implementation")
"""What torch says of such an operation, on every device, also while it compiles one."""

_users = 0
_restore = ExitStack()


@contextmanager
def deterministic(enabled: bool, device: str = "auto") -> Iterator[None]:
    """Make torch deterministic in this process; restore its settings at the end. Without *enabled* it changes nothing.

    Enter it before the process group is created and before CUDA is used: NCCL and cuBLAS read then what it sets. Several uses
    may overlap; the last one to end restores the settings.

    Args:
        device: ``parallel.device``.

    Raises:
        UserError: cuBLAS was started, or is to be started, in a way that does not repeat; or an operation inside has no
            deterministic form, on this rank or on another.
    """
    if not enabled:
        yield
        return
    global _users
    if _users == 0:
        with ExitStack() as stack:
            _set_workspace(stack, device)
            _set_torch(stack)
            _restore.push(stack.pop_all())
    _users += 1
    try:
        with operations_named():
            yield
    finally:
        _users -= 1
        if _users == 0:
            _restore.close()


@contextmanager
def operations_named() -> Iterator[None]:
    """Turn torch's error about an operation without a deterministic form into one line that names the operation.

    Raises:
        UserError: in the place of such an error, also where it is the cause of another error or another rank has reported it.
    """
    try:
        yield
    except (RuntimeError, UserError) as error:  # a trace that meets such an operation ends with a UserError
        cause: BaseException | None = error
        seen: set[int] = set()
        while cause is not None and id(cause) not in seen:
            seen.add(id(cause))
            if found := NO_DETERMINISTIC_FORM.search(str(cause)):
                raise UserError(
                    f"train.deterministic: true, but the operation {found[1]} has no deterministic form on this device: "
                    "use a model without it, or train.deterministic: false"
                ) from error
            cause = cause.__cause__ or cause.__context__
        raise


def _set_workspace(stack: ExitStack, device: str) -> None:
    given = os.environ.get(WORKSPACE)
    if device == "cpu" or not torch.cuda.is_available() or given in REPEATING_WORKSPACES:
        return
    if given is not None:
        raise UserError(
            f"train.deterministic: true, but {WORKSPACE} is {given!r}, with which cuBLAS does not repeat: "
            f"unset it, or set it to {REPEATING_WORKSPACES[0]}"
        )
    if torch.cuda.is_initialized():
        raise UserError(
            f"train.deterministic: true, but CUDA was started in this process without {WORKSPACE}: "
            f"set it to {REPEATING_WORKSPACES[0]} before, or start a fresh process"
        )
    os.environ[WORKSPACE] = REPEATING_WORKSPACES[0]
    stack.callback(_unset_workspace)


def _unset_workspace() -> None:
    if not torch.cuda.is_initialized():  # else the variable goes on saying how CUDA was started
        del os.environ[WORKSPACE]


def _set_torch(stack: ExitStack) -> None:
    import torch._inductor.config as inductor

    cuda = torch.backends.cuda
    # Callbacks run in reverse: this one comes after use_deterministic_algorithms, which sets inductor's switch too.
    stack.callback(setattr, inductor, "deterministic", inductor.deterministic)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    stack.callback(lambda: torch.use_deterministic_algorithms(before[0], warn_only=before[1]))
    torch.use_deterministic_algorithms(True)
    for owner, name, value in (
        # Filling fresh memory would cost a pass over it; nothing here reads memory before it is written.
        (torch.utils.deterministic, "fill_uninitialized_memory", False),
        (torch.backends.cudnn, "deterministic", True),
        (torch.backends.cudnn, "benchmark", False),
    ):
        stack.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)
    # What is left for attention: the flash kernels in bf16 and fp16, which have a deterministic form, and matrix products. The
    # backward pass of the memory-efficient kernels, which fp32 takes otherwise, and cuDNN's are not known to repeat.
    for switch, is_on in (
        (cuda.enable_mem_efficient_sdp, cuda.mem_efficient_sdp_enabled),
        (cuda.enable_cudnn_sdp, cuda.cudnn_sdp_enabled),
    ):
        stack.callback(switch, is_on())
        switch(False)
