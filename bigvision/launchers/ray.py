"""The run of every launcher with Ray's workers as its ranks: ``bigvision ray`` and ``launch/ray/train.py``."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bigvision.config import Config, load_config, resolve
from bigvision.errors import Stopped, UserError, how_to_install, one_line
from bigvision.launchers.commands import take, take_recipe, whole
from bigvision.launchers.submit import RESTARTS
from bigvision.runtime import RankFailure
from bigvision.signals import SIGNALS, listening
from bigvision.training import Result, train_on_rank

POLL_SECONDS = 0.5
"""Between two looks at what the driver was asked for."""
STORE_BYTES = 100 * 2**20
"""Ray's object store on this machine alone: the ranks put nothing there, they talk through their process group."""
USAGE = """usage: bigvision ray [RECIPE.yaml] [--workers N] [--cpus N] [--max-failures N] [--address A] [--section.key V ...]

  --workers N        Ray workers, a rank each; MIN:MAX goes on with fewer while a lost node is not replaced.
                     Without it one for each GPU of the cluster, or one on the CPU
  --cpus N           CPUs that Ray sets aside for each worker, and its threads; 1 without it
  --max-failures N   how often Ray starts the ranks again after one died; 100 without it
  --address A        a running cluster, HOST:PORT or auto; without it (and without RAY_ADDRESS) Ray runs on this machine
                     alone and listens on its loopback interface
  --section.key      the flags of bigvision train; parallel.device decides whether each worker gets a GPU"""


@dataclass(frozen=True)
class Ask:
    """What Ray is asked for; see `USAGE`."""

    workers: tuple[int, int] | None = None
    """The least and the most; None is one for each GPU."""
    cpus: int = 1
    max_failures: int = RESTARTS
    address: str | None = None


def run(arguments: Sequence[str]) -> int:
    """``bigvision ray [RECIPE.yaml] [--workers N] ... [--section.key value ...]``."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    ask, rest = read_ask(arguments)
    recipe, flags, note = take_recipe(rest)
    notes = [note] if note else []
    config, origins = resolve(recipe, flags, prog="bigvision ray", say=notes.append)
    print("\n".join(notes), end="\n" if notes else "")
    result = train(config, ask, origins)
    # What the ranks print comes with Ray's marks, and perhaps late.
    print(f"checkpoint  {result.checkpoint}")
    print("  ".join([f"step {result.step}", *(f"{name} {value:.4f}" for name, value in result.metrics.items())]))
    return 0


def read_ask(arguments: Sequence[str]) -> tuple[Ask, list[str]]:
    """Take Ray's flags out of *arguments*; returns what they ask for, and the others."""
    found, rest = take(arguments, ("--workers", "--cpus", "--max-failures", "--address"))
    given, workers = dict(found), None
    if text := given.get("--workers"):
        least, colon, most = text.partition(":")
        workers = whole("--workers", least), whole("--workers", most if colon else least)
        if workers[0] > workers[1]:
            raise UserError(f"--workers: {text} must be MIN:MAX, the smaller first")
    failures = whole("--max-failures", given.get("--max-failures", str(RESTARTS)), lowest=0)
    address = given.get("--address")
    if address and not re.fullmatch(r"auto|[A-Za-z0-9][A-Za-z0-9.-]*:[0-9]{1,5}", address):
        raise UserError(f"--address: {address!r} must be HOST:PORT or auto")
    return Ask(workers, whole("--cpus", given.get("--cpus", "1")), failures, address), rest


def train(config: Config, ask: Ask | None = None, origins: Mapping[str, str] | None = None) -> Result:
    """Train with *config* on Ray's workers and return what the run left. Called on one process, the driver.

    A session that was begun with ``ray.init`` is used; else one is begun and ended here. *origins*: where the value of each key
    came from, for the report (see `bigvision.config.resolve`).

    Raises:
        UserError: what was asked for cannot be done; the ranks are not started again.
        Stopped: a signal came to the driver or to any rank, and the run was saved.
        RankFailure: ranks died more often than they are started again; names one of them and its error.
    """
    ask = ask or Ask()
    config = replace(config, out=str(Path(config.out).absolute()))
    ray = import_ray(ask)
    with listening(), session(ray, ask):
        requests = ray.remote(num_cpus=0)(Requests).remote()
        left = _fit(_trainer(config, ask, origins, ray.cluster_resources(), requests), requests)
    folder = Path(left["checkpoint"])
    if "stopped" in left:
        raise Stopped(left["stopped"], left["step"], folder)
    return Result(left["step"], folder, left["metrics"], reason=left["reason"])


def import_ray(ask: Ask) -> Any:
    """Ray, with what it reads from the environment when it is imported."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A rank stays in the folder from which the run was started, as under every launcher.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    if not ask.address and not os.environ.get("RAY_ADDRESS"):
        # Ray takes an address that others can reach also for a machine of its own, but for this switch.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
        import ray.train.torch
    except ImportError as error:
        raise UserError(f"bigvision ray needs Ray ({one_line(error)}); {how_to_install('ray')}") from None
    return ray


@contextmanager
def session(ray: Any, ask: Ask) -> Iterator[None]:
    """A session of Ray's in here, and the process's own answers to signals."""
    if ray.is_initialized():
        yield
        return
    answers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    address = ask.address or os.environ.get("RAY_ADDRESS")
    # Ranks on the CPU may be more than its cores, as under every launcher.
    most = (ask.workers or (1, 1))[1] * ask.cpus
    own: dict[str, Any] = {
        "num_cpus": max(most, os.cpu_count() or 1), "include_dashboard": False, "object_store_memory": STORE_BYTES,
        # One of Ray's actors asks the dashboard each second, and warns each second that there is none.
        "logging_config": ray.LoggingConfig(log_level="ERROR"),
    }  # fmt: skip
    try:
        ray.init(address=address or "local", **({} if address else own))
    except ConnectionError as error:
        raise UserError(f"--address: no cluster of Ray's answers at {address}: {one_line(error)}") from None
    if not address and not (at := ray.util.get_node_ip_address()).startswith("127."):
        print(f"warning: Ray listens on {at}, where others may reach it: it was imported before bigvision", file=sys.stderr)
    try:
        if threading.current_thread() is threading.main_thread():
            for number, answer in answers.items():
                signal.signal(number, answer)
        yield
    finally:
        ray.shutdown()


def _trainer(
    config: Config, ask: Ask, origins: Mapping[str, str] | None, has: dict[str, float], requests: Any
) -> Any:  # fmt: skip
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    gpus = int(has.get("GPU", 0))
    on_gpus = config.parallel.device == "cuda" or (config.parallel.device == "auto" and gpus > 0)
    least, most = ask.workers or ((gpus or 1, gpus or 1) if on_gpus else (1, 1))
    each = {"CPU": ask.cpus} | ({"GPU": 1} if on_gpus else {})
    for kind, count in each.items():
        if least * count > has.get(kind, 0):
            raise UserError(
                f"--workers: {least} need {least * count} {kind}s, but the cluster has {int(has.get(kind, 0))}: "
                f"start fewer{', or use --parallel.device cpu' if kind == 'GPU' else ', or use a smaller --cpus'}"
            )
    return TorchTrainer(
        rank,
        train_loop_config={
            "config": config.to_dict(), "origins": dict(origins or {}), "folder": str(Path.cwd()), "requests": requests
        },
        torch_config=ranks(),
        scaling_config=ScalingConfig(
            num_workers=least if least == most else (least, most), use_gpu=on_gpus, resources_per_worker=each
        ),
        run_config=RunConfig(
            name="ray", storage_path=config.out, callbacks=[_no_restart_after_a_mistake()],
            # Starts that come to nothing, as while a node is missing, are counted apart; Ray's own choice is no bound.
            failure_config=FailureConfig(max_failures=ask.max_failures, controller_failure_limit=ask.max_failures),
        ),
    )  # fmt: skip


def _fit(trainer: Any, requests: Any) -> dict[str, Any]:
    """Run to the end and return what rank 0 returned; signals are passed on to the ranks meanwhile."""
    from ray.train import TrainingFailedError

    left: list[Any] = []

    def work() -> None:
        try:
            left.append(trainer.fit().return_value)
        except BaseException as error:
            left.append(error)

    # Not in the main thread: Ray would take Ctrl-C for itself there, and end the run without a save.
    thread = threading.Thread(target=work, name="ray", daemon=True)
    thread.start()
    stop = ""
    SIGNALS.stop_at_once(False)
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        save, SIGNALS.save = SIGNALS.save, False
        if save or SIGNALS.stop != stop:
            stop = SIGNALS.stop
            requests.add.remote(stop, save)
    error = left[0]
    if not isinstance(error, BaseException):
        return left[0]
    if not isinstance(error, TrainingFailedError):
        raise error
    cause = getattr(error, "controller_failure", None)
    if isinstance(cause, UserError):
        raise cause from None
    if failures := getattr(error, "worker_failures", {}):
        number, failure = min(failures.items())
        raise RankFailure(f"rank {number}: {type(failure).__name__}: {one_line(failure)}") from None
    raise RuntimeError(one_line(cause or error)) from None


def _no_restart_after_a_mistake() -> Any:
    from ray.train import UserCallback

    class FailFast(UserCallback):
        """Ray starts the ranks again after any error of theirs, but not after one of its controller's."""

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for error in worker_exceptions.values():
                if isinstance(error, UserError):
                    raise error

    return FailFast()


class Requests:
    """The signal that asked the driver to stop, and how many saves were asked for; the ranks poll it. An actor of Ray's."""

    def __init__(self) -> None:
        self.stop, self.saves = "", 0

    def add(self, stop: str, save: bool) -> None:
        self.stop = self.stop or stop
        self.saves += save

    def read(self) -> tuple[str, int]:
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
    SIGNALS.stop_at_once(False)


def rank(settings: dict[str, Any]) -> dict[str, Any]:
    """What a worker does; returns what the driver has to know of the run."""
    if Path(settings["folder"]).is_dir():
        os.chdir(settings["folder"])
    threading.Thread(target=_poll, args=(settings["requests"],), name="requests", daemon=True).start()
    try:
        result = train_on_rank(load_config(settings["config"]), origins=settings["origins"])
    except Stopped as stopped:
        # Not an error: Ray would start the ranks again.
        return {"stopped": stopped.name, "step": stopped.step, "checkpoint": str(stopped.checkpoint)}
    return {"step": result.step, "checkpoint": str(result.checkpoint), "metrics": result.metrics, "reason": result.reason}


def _poll(requests: Any) -> None:
    """Take what the driver was asked for as this rank's own, until the worker ends or the driver is gone."""
    import ray
    from ray.exceptions import RayError

    before = 0
    while True:
        try:
            stop, saves = ray.get(requests.read.remote())
        except RayError:
            return
        SIGNALS.stop = SIGNALS.stop or stop
        SIGNALS.save, before = SIGNALS.save or saves > before, saves
        time.sleep(POLL_SECONDS)
