"""What runs on Ray's workers: each becomes a rank, and the run is that of every launcher."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from bigvision.config import load_config
from bigvision.errors import Stopped
from bigvision.signals import SIGNALS

POLL_SECONDS = 0.5
"""Between two looks at the bell."""


class Bell:
    """What the driver was asked for by signals; the ranks listen for it. An actor of Ray's."""

    def __init__(self) -> None:
        self.stop, self.saves = "", 0

    def ring(self, stop: str, save: bool) -> None:
        """Ask for a stop, by the name of its signal, or a save."""
        self.stop = self.stop or stop
        self.saves += save

    def heard(self) -> tuple[str, int]:
        """The signal that asked to stop, and how many saves were asked for."""
        return self.stop, self.saves


def ranks() -> Any:
    """How Ray prepares its workers: as ranks that know each other; the process group is bigvision's own, as everywhere."""
    from ray.train.backend import Backend
    from ray.train.torch import TorchConfig

    class Ranks(Backend):
        # Each rank sees all GPUs of its host and takes its own, so that NCCL can reach the others directly.
        share_cuda_visible_devices = True

        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(_become_rank, *worker_group.execute_single(0, _meeting_place))

    class RanksConfig(TorchConfig):
        @property
        def backend_cls(self) -> Any:
            return Ranks

    return RanksConfig()


def _meeting_place() -> tuple[str, int]:
    """The address of this worker, and a port that is free there."""
    import ray.util

    address = ray.util.get_node_ip_address()
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.bind((address, 0))
        return address, probe.getsockname()[1]


def _become_rank(address: str, port: int) -> None:
    """Set what torchrun would have set. Called in the main thread of a worker, the only one that can listen to signals."""
    import ray.train
    from ray.train.torch import get_device

    context, device = ray.train.get_context(), get_device()
    # Ray orders the workers of a host by their GPUs, but does not promise it.
    local = device.index if device.type == "cuda" and device.index is not None else context.get_local_rank()
    values = {
        "RANK": context.get_world_rank(), "WORLD_SIZE": context.get_world_size(), "LOCAL_RANK": local,
        "LOCAL_WORLD_SIZE": context.get_local_world_size(), "MASTER_ADDR": address, "MASTER_PORT": port,
    }  # fmt: skip
    os.environ.update({name: str(value) for name, value in values.items()})
    SIGNALS.listen()
    # The run itself is in another thread: it looks whether there was a signal as soon as it can agree with the others.
    SIGNALS.alone = False


def rank(settings: dict[str, Any]) -> dict[str, Any]:
    """What a worker does; returns what the driver has to know of the run."""
    if Path(settings["folder"]).is_dir():
        os.chdir(settings["folder"])
    threading.Thread(target=_listen, args=(settings["bell"],), name="bell", daemon=True).start()
    from bigvision.training import train as train_here

    try:
        result = train_here(load_config(settings["config"]))
    except Stopped as stopped:
        # Not an error: Ray would start the ranks again.
        return {"stopped": stopped.name, "step": stopped.step, "checkpoint": str(stopped.checkpoint)}
    return {"step": result.step, "checkpoint": str(result.checkpoint), "metrics": result.metrics}


def _listen(bell: Any) -> None:
    """Take for this rank's own what the driver was asked for, until the worker ends or the driver is gone."""
    import ray
    from ray.exceptions import RayError

    before = 0
    while True:
        try:
            stop, saves = ray.get(bell.heard.remote())
        except RayError:
            return
        SIGNALS.stop = SIGNALS.stop or stop
        SIGNALS.save, before = SIGNALS.save or saves > before, saves
        time.sleep(POLL_SECONDS)
