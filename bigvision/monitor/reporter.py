"""The page of a run while it goes on: what only the running ranks know, and a thread that writes the page again and again."""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from bigvision import checkpoint
from bigvision.config import Config
from bigvision.engine import Engine
from bigvision.errors import one_line
from bigvision.monitor.monitor import Monitor
from bigvision.monitor.report import FACTS, NAME, RunFolder, finite, page
from bigvision.redact import redacted
from bigvision.runtime import Runtime, gather_json

FIRST = 3.0
"""Seconds to the first page; a run that ends before writes it at its end."""
EVERY = 10.0
"""Seconds between two pages, ..."""
SHARE = 50
"""... and at least so many times what the last one took: the interpreter is one for this thread and the steps."""
PATIENCE = 20.0
"""Seconds that the end of a run waits for a page that is being written."""
GROUPS = 256
"""Rows of ranks in the picture: of more, ranks that follow each other share one."""
PACKAGES = ("bigvision", "torch", "torchvision", "timm", "deepspeed", "accelerate", "safetensors", "numpy")
VARIABLES = (
    "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF",
    "NCCL_DEBUG", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_ALGO",
    "NCCL_PROTO", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCHINDUCTOR_FX_GRAPH_CACHE", "SLURM_NNODES", "SLURM_NTASKS",
)  # fmt: skip
"""Variables of the environment that the page may show; all others are left out."""


class Reporter:
    """Writes ``OUT/report.html``. Every rank has one and calls :meth:`begin`; all else happens on rank 0.

    What it raises is never more than a line on the terminal: no page is worth a run.
    """

    def __init__(self, config: Config, runtime: Runtime, monitor: Monitor, origins: Mapping[str, str] | None) -> None:
        """Args: *origins* are where the value of each key came from, where that is known."""
        self.config, self.runtime, self.monitor, self.out = config, runtime, monitor, Path(config.out)
        self.origins = dict(origins or {})
        self.facts: dict[str, Any] = {}
        self.checkpoints: list[tuple[int, str]] = []
        """Those of this start, which may be pruned before a page is written."""
        self.thread: threading.Thread | None = None
        self.ended, self.warned, self.seen = threading.Event(), False, 0

    def begin(self, engine: Engine, steps: int) -> None:
        """Collect what the ranks hold, and start to write. Called on every rank."""
        if not self.config.monitor.report:
            return
        held: Counter[str] = Counter()
        for fragment in engine.fragments():
            held[fragment.group] += fragment.values.numel() * fragment.values.element_size()
        device = self.runtime.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        ranks = gather_json([self.runtime.stage, held["model"], held["optimizer"], held["ema"], name])
        if not self.runtime.is_main:
            return
        before = self._before()
        self.checkpoints = [(int(step), str(when)) for step, when in before.get("checkpoints", [])]
        mesh = {"stages": self.runtime.pipeline_ranks, "replicas": self.runtime.replica[1], "shards": self.runtime.shard[1]}
        strategy = self.config.parallel.strategy
        self.facts = {
            "steps": steps,
            "step": engine.step,
            "config": redacted(engine.config.to_dict()),
            "origins": redacted(self.origins, strict=True) or before.get("origins", {}),
            "environment": self._environment([rank[-1] for rank in ranks]),
            "layout": {
                "strategy": strategy,
                "mesh": mesh,
                "ranks": grouped([rank[:4] for rank in ranks]),
                "stages": stages(engine),
            },
        }
        self.folder = RunFolder(self.out, pause=1.0)
        self.thread = threading.Thread(target=self._keep_writing, name="report", daemon=True)
        self.thread.start()

    def saved(self, step: int) -> None:
        """Take note of a checkpoint that is complete."""
        self.checkpoints.append((step, time.strftime("%Y-%m-%d %H:%M:%S")))

    def close(self) -> None:
        """Write the last page, when the restart log says how the run ended."""
        if self.thread is None:
            return
        self.ended.set()
        self.thread.join(PATIENCE)
        if not self.thread.is_alive():  # else the file system does not answer
            self._write()
            self.folder.curves.close()
        self.thread = None

    def _keep_writing(self) -> None:
        wait = FIRST
        while not self.ended.wait(wait):
            began = time.monotonic()
            if (size := self._size()) != self.seen:  # else no step was logged
                self.seen = size
                self._write()
            wait = max(EVERY, SHARE * (time.monotonic() - began))

    def _size(self) -> int:
        try:
            return (self.out / "metrics.jsonl").stat().st_size
        except OSError:
            return 0

    def _write(self) -> None:
        try:
            peaks = getattr(self.monitor, "peaks", [])
            self.facts["memory"] = grouped([[peak] for peak in peaks]) if peaks else self._before().get("memory")
            self.facts["checkpoints"] = self.checkpoints[-1000:]
            facts = finite(self.facts)
            checkpoint.replace(self.out / FACTS, (json.dumps(facts) + "\n").encode())
            data = self.folder.data(facts)
            checkpoint.replace(self.out / NAME, page([data], data["name"]))
        except Exception as error:
            if not self.warned:
                self.warned = True
                self.monitor.say(f"warning: {self.out / NAME} cannot be written, and the run goes on: {one_line(error)}")

    def _before(self) -> dict[str, Any]:
        """What an earlier start has left in report.json."""
        try:
            found = json.loads((self.out / FACTS).read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _environment(self, devices: Sequence[str]) -> list[tuple[str, str]]:
        identity = self.runtime.identity
        found = [("Python", platform.python_version())]
        for name in PACKAGES:
            try:
                found.append((name, version(name)))
            except PackageNotFoundError:
                continue
        found.append(("system", f"{platform.system()} {platform.release()} {platform.machine()}"))
        found.append(("devices", ", ".join(f"{count} × {name}" for name, count in Counter(devices).items())))
        if torch.version.cuda:
            found.append(("CUDA", torch.version.cuda))
        found.append(("ranks", f"{self.runtime.world_size}, {identity.local_world_size} on this host"))
        found.append(("launcher", identity.launcher))
        found.append(("cores of this host", str(os.cpu_count())))
        return found + [(name, os.environ[name]) for name in VARIABLES if name in os.environ]


def grouped(rows: Sequence[list[Any]]) -> list[list[Any]]:
    """[first rank, last rank, *values] of ranks that follow each other and have the same values; of too many the greatest."""
    found, rank = [], 0
    for values, same in groupby(rows):
        count = len(list(same))
        found.append([rank, rank + count - 1, *values])
        rank += count
    size = -(-len(found) // GROUPS)
    if size > 1:
        parts = [found[begin : begin + size] for begin in range(0, len(found), size)]
        found = [[part[0][0], part[-1][1], *(max(column) for column in list(zip(*part))[2:])] for part in parts]
    return found


def stages(engine: Engine) -> list[dict[str, Any]]:
    """What each stage of a pipeline has; nothing without one."""
    plan: Any = getattr(engine, "plan", None)
    if plan is None:
        return []
    placement: Any = vars(engine)["placement"]
    return [
        {
            "stage": number, "rank": placement.rank_of(number), "blocks": len(blocks),
            "first": blocks[0].path if blocks else "", "last": blocks[-1].path if blocks else "",
            "parameters": cost.parameters, "flops": cost.flops, "sent": cost.sent,
        }
        for number, (blocks, cost) in enumerate(zip(plan.blocks, plan.costs))
    ]  # fmt: skip
