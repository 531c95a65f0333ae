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
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torchvision.ops import StochasticDepth

from bigvision.config import SPLIT_BACKWARD, Config
from bigvision.errors import UserError

GRAPHS_PER_KIND = 8
"""Graphs that blocks of one kind may need. Four are expected: training and evaluation, each with the whole micro-batch and the
short last one."""

RATES: dict[type[nn.Module], str] = {DropPath: "drop_prob", StochasticDepth: "p", nn.Dropout: "p"}
"""Modules that zero parts of their input at random, and the attribute with their probability."""


def check_compile(config: Config, device: torch.device) -> None:
    """Raises `UserError` for ``parallel.compile: true`` where nothing can be compiled. Needs no model."""
    if config.parallel.compile is True and (missing := _missing(device)):
        raise UserError(f"parallel.compile: true needs {missing}: install it, or use auto or false")


def decide(config: Config, blocks: Sequence[nn.Module], device: torch.device) -> bool:
    """Whether *blocks* are compiled. Nothing is measured, so the answer is the same at each restart."""
    value = config.parallel.compile
    return value if isinstance(value, bool) else why_not(config, blocks, device) is None


def why_not(config: Config, blocks: Sequence[nn.Module], device: torch.device) -> str | None:
    """Why ``parallel.compile: auto`` leaves *blocks* as they are; None where it compiles them."""
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
        _share_rates(group, device)
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


def kinds(blocks: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """*blocks* grouped by code and shapes, whatever their drop rates. timm builds the rate 0 as an `Identity`."""
    found: dict[Hashable, list[nn.Module]] = {}
    for block in blocks:
        key = []
        for path, module in block.named_modules():
            tensors = {**module._parameters, **module._buffers}.items()
            shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors if tensor is not None)
            key.append((path, nn.Identity if type(module) in RATES else type(module), shapes))
        found.setdefault(tuple(key), []).append(block)
    return list(found.values())


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


def _share_rates(group: Sequence[nn.Module], device: torch.device) -> None:
    """Turn the rates that differ between the blocks of a *group* of one kind from constants into inputs of their graph.

    dynamo makes every Python number of a module a constant, so each block would get a graph of its own.
    """
    for peers in zip(*(block.modules() for block in group), strict=True):
        classes = {type(module) for module in peers}
        base, *others = sorted(classes - {nn.Identity}, key=str) or [nn.Identity]
        if base not in RATES or others or any(getattr(module, "inplace", False) for module in peers):
            continue
        rates = [getattr(module, RATES[base], 0.0) for module in peers]
        if len(classes) == len(set(rates)) == 1:
            continue
        example = next(module for module in peers if type(module) is base)
        for module, rate in zip(peers, rates):
            # An Identity takes over the options of its peers.
            vars(module).update({name: value for name, value in vars(example).items() if name not in vars(module)})
            del vars(module)[RATES[base]]
            module.__class__ = WITH_TENSORS[base]
            module.keep, module.divisor = torch.empty((), device=device), torch.empty((), device=device)
            setattr(module, RATES[base], rate)


def _with_tensors(base: type[nn.Module], name: str) -> type[nn.Module]:
    """A subclass of *base* whose compiled code reads the rate from tensors. Eager code and its numbers are those of *base*."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return base.forward(self, x)
        if not self.training:
            return x
        samples = 1 if getattr(self, "mode", "row") == "batch" else x.shape[0]
        shape = x.shape if base is nn.Dropout else (samples, *[1] * (x.ndim - 1))
        mask = torch.rand(shape, device=x.device) < self.keep
        return x * (mask / self.divisor).to(x.dtype)

    def set_rate(self: Any, value: float) -> None:
        self.rate, keep = value, 1.0 - value
        self.keep.fill_(keep)
        self.divisor.fill_(keep if keep > 0 and getattr(self, "scale_by_keep", True) else 1.0)

    rate = property(lambda self: self.rate, set_rate)
    return type(f"{base.__name__}WithTensors", (base,), {"forward": forward, name: rate})


WITH_TENSORS = {base: _with_tensors(base, name) for base, name in RATES.items()}
