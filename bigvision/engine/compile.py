"""torch.compile per block: when it is on, one graph for all equal blocks, and a cache that survives restarts."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from bigvision.config import SPLIT_BACKWARD, Config
from bigvision.errors import UserError
from bigvision.models import kinds, share_rates

GRAPHS_PER_KIND = 8
"""Graphs that blocks of one kind may need. Four are expected: training and evaluation, each with the whole micro-batch and the
short last one."""


def check_compile(config: Config, device: torch.device) -> None:
    """Raises `UserError` for ``parallel.compile: true`` where nothing can be compiled. Needs no model."""
    if config.parallel.compile is True and (missing := _missing(device)):
        raise UserError(f"parallel.compile: true needs {missing}: install it, or use auto or false")


def why_eager(config: Config, blocks: Sequence[nn.Module], device: torch.device) -> str | None:
    """Why *blocks* are not compiled; None where they are. Nothing is measured, so the answer is the same at each restart."""
    if isinstance(config.parallel.compile, bool):
        return None if config.parallel.compile else "parallel.compile: false"
    parallel, count = config.parallel, len(kinds(blocks))
    if device.type != "cuda":
        return "the device is not CUDA"
    if parallel.schedule in SPLIT_BACKWARD:
        return f"parallel.schedule: {parallel.schedule} takes backward passes apart"
    if parallel.strategy == "zero3":
        return "the hooks of zero3 would cut each block into many small graphs"
    if parallel.recompute == "blocks" and any(isinstance(m, BatchNorm) for block in blocks for m in block.modules()):
        return "parallel.recompute: blocks excludes it for models with BatchNorm"
    if any(isinstance(m, nn.SyncBatchNorm) for block in blocks for m in block.modules()):
        return "SyncBatchNorm exchanges statistics within the blocks"
    if len(blocks) < 2 * count:
        return f"{len(blocks)} blocks of {count} kinds do not repeat enough to be worth {count} graphs"
    return (missing := _missing(device)) and f"it needs {missing}"


def _missing(device: torch.device) -> str | None:
    """What inductor lacks on this machine to compile for *device*."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "Triton (the Python package triton)"
        if torch.cuda.get_device_capability(device) < (7, 0):
            return "a GPU of compute capability 7.0 or newer"
        compilers, what = (os.environ.get("CC"), "gcc", "clang"), "a C compiler (gcc), which Triton calls"
    else:
        default = "clang++" if sys.platform == "darwin" else "g++"
        compilers, what = (os.environ.get("CXX", default),), "a C++ compiler (g++)"
    if not any(name and shutil.which(name) for name in compilers):
        return what
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's header Python.h (the system package python3-dev)"
    return None


def compile_blocks(blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Replace the ``forward`` of each block by a compiled one, in place. Blocks of one kind share their graphs.

    A block that would need more than :data:`GRAPHS_PER_KIND` graphs is reported on stderr and then runs eagerly where none of
    its graphs fits.
    """
    groups = kinds(blocks)
    for group in groups:
        share_rates(group, device)
    _keep_cache()
    dynamo: Any = torch._dynamo.config
    # Counted per code object: stages of different widths share the block's, and under recompute all share checkpoint's.
    dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS_PER_KIND * len(groups))
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, dynamo.recompile_limit)
    # It would split blocks that are larger than DDP's buckets; these are exchanged between the blocks' backward passes anyway.
    dynamo.optimize_ddp = False
    logging.getLogger("torch._dynamo.convert_frame").addFilter(_report_limit)
    for block in blocks:
        # Not dynamic: one slow kernel would serve blocks of all widths.
        block.forward = torch.compile(block.forward, dynamic=False)


def _report_limit(record: logging.LogRecord) -> bool:
    """A filter of dynamo's log: the paragraph on a limit that was hit becomes one line."""
    if not str(record.msg).startswith("torch._dynamo hit config.") or not isinstance(record.args, tuple):
        return True
    _, limit, function, reason, *_ = record.args
    reason = " ".join(str(reason).split("#")[0].split()).partition(": ")[2]
    print(
        f"warning: parallel.compile: {function} has {limit} graphs and runs eagerly where none of them fits (the last differs "
        f"in {reason}): remove what differs, or use parallel.compile: false",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    return False


def _keep_cache() -> None:
    """Keep compiled code in the user's cache folder: torch's default, in /tmp, is often lost with a cluster's job.

    Ranks and runs share the folder: torch names entries by their content and renames them into place. The names lack the
    processor, for which CPU code is compiled (-march=native), so each kind of processor gets a folder of its own.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # torch sets the variable to its default while it is imported.
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", "") not in ("", default_cache_dir()):
        return
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        info = Path("/proc/cpuinfo")
        flags = re.search(r"^(flags|Features)\s*:.*", info.read_text() if info.exists() else "", re.M)
        processor = hashlib.sha256((flags[0] if flags else platform.processor()).encode()).hexdigest()[:8]
        folder = base / "bigvision" / "compile" / f"{platform.machine()}-{processor}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a home that is read-only, or none
        return
    if os.access(folder, os.W_OK):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
