"""Ranks on this host: how many and on which devices, their start by torch's elastic agent, and what came of them.

`place` reads what a caller of Python wants; `fresh_ranks` and `forked_ranks` start the ranks, supervise them and return or
raise their `_outcome`. `train_with_restarts` is ``bigvision train --ranks N --restarts N``. What a rank does is in ``rank.py``.
"""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing.forkserver
import os
import re
import signal
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from bigvision.config import Config
from bigvision.data.workers import fork_server
from bigvision.errors import Exit, Stopped, UserError
from bigvision.launchers import rank
from bigvision.runtime import Identity, RankFailure
from bigvision.runtime.process import attributes
from bigvision.runtime.rendezvous import environment, identify
from bigvision.signals import SAVE, SIGNALS
from bigvision.training import Result, read_history, train_on_rank

Devices = int | Sequence[int] | Literal["cpu", "auto"] | None
"""Ranks to start, CUDA devices, "cpu" (one rank), "auto" (all CUDA devices, or one CPU rank), or None: those there are."""
NO_DEVICES = "devices: {!r}: give a number, a list of CUDA devices such as [0, 1], 'cpu' or 'auto'"
FIX = "pass names instead of objects, or start it in a process that has not used CUDA (restart the notebook's kernel)"
GRACE = 600
"""Seconds that ranks have to save and end when they are asked to stop; a second Ctrl-C ends them at once."""
FINAL = {int(Exit.MISTAKE), int(Exit.STOPPED)}
"""Exit codes after which starting the ranks again changes nothing, or is not wanted."""
NOISE = (
    "torch.distributed.elastic.agent.server.api", "torch.distributed.elastic.agent.server.local_elastic_agent",
    "torch.distributed.elastic.multiprocessing.api", "torch.multiprocessing.spawn",
)  # fmt: skip
"""Loggers of the agent, which report an ending that is raised in the caller."""


@dataclass(frozen=True)
class Placement:
    """Ranks that are to be started."""

    ranks: int
    cuda: bool
    environment: Mapping[str, str]
    """What they need beside this process's own."""


def place(devices: Devices, config: Config, here: Identity) -> tuple[Config, Placement | None]:
    """*config* with the device that *devices* means, and the ranks to start; None: this process is one already.

    `UserError` where *devices* is nothing of that kind, contradicts the launcher or ``parallel.device``, or is too many.
    """
    if devices is None:
        return config, None
    listed: list[int] | None = None
    ranks: int | None = None
    if isinstance(devices, str):
        if devices not in ("cpu", "auto"):
            raise UserError(NO_DEVICES.format(devices))
    elif isinstance(devices, int) and not isinstance(devices, bool):
        ranks = devices
    else:
        listed = _ordinals(devices)
        ranks = len(listed)
    wanted = "cpu" if devices == "cpu" else "cuda" if listed is not None else None
    if wanted is not None:
        if config.parallel.device not in ("auto", wanted):
            raise UserError(f"devices: asks for {wanted}, but parallel.device is {config.parallel.device}: drop one of the two")
        config = replace(config, parallel=replace(config.parallel, device=wanted))
    if here.launcher != "python":
        if listed is not None:
            raise UserError(f"devices: {devices}, but {here.launcher} started this rank: let it choose the devices")
        if isinstance(devices, int) and devices != here.world_size:
            raise UserError(f"devices: {devices}, but {here.launcher} started {here.world_size} ranks: leave devices out")
        return config, None
    there = 0 if config.parallel.device == "cpu" else cuda_devices()
    if ranks is None:
        ranks = 1 if devices == "cpu" else max(1, there)
    if ranks < 1:
        raise UserError(f"devices: {devices}: give at least 1")
    if listed is not None and (beyond := [ordinal for ordinal in listed if ordinal >= there]):
        raise UserError(
            f"devices: {beyond[0]}, but torch sees {there} CUDA devices here{': use a number' if not there else ''}"
        )
    if there and ranks > there:
        raise UserError(f"devices: {ranks}, but there are {there} CUDA devices: give fewer, or parallel={{'device': 'cpu'}}")
    if ranks == 1 and listed is None:
        return config, None
    variables = _threads(ranks)
    if listed is not None:
        # As CUDA knows the devices, where this process sees only some.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = [name.strip() for name in visible.split(",")] if visible else [str(ordinal) for ordinal in range(there)]
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(names[ordinal] for ordinal in listed)
    return config, Placement(ranks, bool(there), variables)


def _ordinals(devices: object) -> list[int]:
    found = list(devices) if isinstance(devices, Iterable) else []
    if not found or any(not isinstance(one, int) or isinstance(one, bool) or one < 0 for one in found):
        raise UserError(NO_DEVICES.format(devices))
    if len(set(found)) < len(found):
        raise UserError(f"devices: {devices}: names a device twice")
    return found


def _threads(ranks: int) -> dict[str, str]:
    """What lets so many *ranks* share the cores, where the user has not said how."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {} if os.environ.get("OMP_NUM_THREADS") else {"OMP_NUM_THREADS": str(max(1, cores // ranks))}


def cuda_devices() -> int:
    """How many CUDA devices torch sees. Asked so that forks of this process can still use them."""
    with environment({"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}):
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def train_with_restarts(
    config: Config, origins: Mapping[str, str], began: float, ranks: int | None, max_restarts: int
) -> int:  # fmt: skip
    """``bigvision train`` with ``--ranks`` or ``--restarts``: train on forks of this process; returns the exit code.

    All that a rank needs is imported here, once: a rank that is started again after a crash need not import torch and timm,
    which takes a new interpreter several seconds. This process computes nothing and uses no device, so it can be forked at
    any time. *began* is when it started, see `train_on_rank`.
    """
    option, count = "--restarts" if ranks is None else "--ranks", ranks or 1
    if (launcher := identify(os.environ).launcher) != "python":
        raise UserError(f"{option}: {launcher} started this rank, and its options decide that: leave {option} out")
    there = 0 if config.parallel.device == "cpu" else cuda_devices()
    if there and count > there:
        raise UserError(f"--ranks: {count}, but torch sees {there} CUDA devices here: give fewer, or --parallel.device cpu")
    import timm.optim  # pyright: ignore[reportUnusedImport]  # noqa: F401  # ranks import it when they build the optimizer

    def work() -> Result:
        again = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
        return train_on_rank(config, origins=origins, began=time.monotonic() if again else began)

    def leave(number: int, frame: object) -> None:
        raise SystemExit(Exit.STOPPED)

    # What stops a run stops it in the ranks: this process only passes signals on while there are any (see `_signals`).
    SIGNALS.restore()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, leave)
    variables = {} if count == 1 else _threads(count)  # one rank alone has as many threads as without this process
    try:
        forked_ranks(work, count, bool(there), variables, max_restarts, config.out, config.data.workers > 0)
    except RankFailure as failure:
        _print_failure(failure)
        return Exit.HUNG if failure.hung else Exit.FAULT
    except KeyboardInterrupt:
        return Exit.STOPPED
    finally:
        gc.freeze()  # what was imported is not looked through once more at the end
    return Exit.DONE


def _print_failure(failure: RankFailure, then: str = "") -> None:
    print("\n".join([*getattr(failure, "__notes__", []), f"error: {failure}{then}"]), file=sys.stderr, flush=True)


def fresh_ranks(
    config: Mapping[str, Any], count: int, variables: Mapping[str, str], max_restarts: int, origins: Mapping[str, str]
) -> Result:
    """Train on *count* new interpreters, to which only the plain configuration goes, with the *origins* of its values; see
    `_outcome`."""
    # New interpreters find this package also where it is not installed.
    root, before = str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")
    installed = root in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    found = {} if installed else {"PYTHONPATH": os.pathsep.join([root, *([before] if before else [])])}
    job = {"config": config, "environment": dict(variables), "parent": os.getpid(), "origins": dict(origins)}
    with tempfile.TemporaryDirectory(prefix="bigvision-", ignore_cleanup_errors=True) as folder, environment(found):
        Path(folder, rank.JOB).write_text(json.dumps(job), encoding="utf-8")
        # -P: the working directory is not searched before installed packages.
        command = ("-P", "-m", "bigvision.launchers.rank", folder)
        return _run(Path(folder), count, sys.executable, command, max_restarts, config["out"])


def forked_ranks(
    work: Callable[[], Result], count: int, cuda: bool, variables: Mapping[str, str], max_restarts: int, out: str,
    serves: bool = False,
) -> Result:  # fmt: skip
    """Do *work* on *count* forks of this process, which have all its objects; see `_outcome`.

    *serves*: nothing has run in this process but imports, so that its forks can fork the server of their data workers.
    """
    parent = os.getpid()

    def settled() -> Result:
        settle(cuda, serves)
        return work()

    with tempfile.TemporaryDirectory(prefix="bigvision-", ignore_cleanup_errors=True) as folder:

        def entry() -> None:
            os.environ.update(variables)
            code = rank.serve(Path(folder), settled, parent)
            sys.stdout.flush()
            sys.stderr.flush()
            if code:
                # Not the way out that waits for threads: a rank that failed must not hold up the others.
                os._exit(code)

        return _run(Path(folder), count, entry, (), max_restarts, out)


def check_parent(cuda: bool) -> None:
    """Raise `UserError` where forks of this process are to train on CUDA and could not."""
    if cuda and torch.cuda.is_initialized():
        raise UserError(f"devices: CUDA is in use in this process, and its forks cannot use it: {FIX}")


def settle(cuda: bool, serves: bool = False) -> None:
    """Put right what a fork has from its parent, first of all in it; raise `UserError` for what cannot be put right.

    *serves*: fork a server of data workers from it (see `forked_ranks`).
    """
    if cuda and torch.cuda._is_in_bad_fork():
        raise UserError(f"devices: CUDA was asked for its devices before the ranks were forked: {FIX}")
    # The server of data workers is the parent's, and can be asked for by no other.
    server: Any = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]
    if (alive := server._forkserver_alive_fd) is not None:
        os.close(alive)
    preload = server._preload_modules
    server.__init__()
    server._preload_modules = preload
    if serves:
        fork_server(in_fork=True)  # before autograd has threads
    try:
        torch.ones(1, requires_grad=True).sum().backward()
    except RuntimeError as error:
        if "fork" not in str(error):
            raise
        raise UserError(f"devices: a backward pass has run in this process, which autograd does not survive: {FIX}") from None
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def _run(
    folder: Path, count: int, entry: str | Callable[[], None], arguments: tuple[str, ...], max_restarts: int, out: str
) -> Result:  # fmt: skip
    """Run the agent to its end, in a thread, and return or raise what came of the ranks."""
    # The ranks meet in a private file: the agent's own store would be open to the network.
    place = RendezvousParameters(
        backend="c10d", endpoint=str(folder / "rendezvous"), run_id=folder.name, min_nodes=1, max_nodes=1,
        local_addr="127.0.0.1", store_type="file",
    )  # fmt: skip
    spec = WorkerSpec(
        role="rank", local_world_size=count, entrypoint=entry, args=arguments, rdzv_handler=get_rendezvous_handler(place),
        max_restarts=max_restarts, monitor_interval=0.1, local_addr="127.0.0.1",
    )  # fmt: skip
    logs = folder / "logs"
    logs.mkdir()
    agent = _Agent(spec, DefaultLogsSpecs(log_dir=str(logs)), start_method="fork")
    agent.folder = folder
    ended, found = threading.Event(), list[Any]()
    # A fork that collected what its parent has left, such as the store of a process group, would wait for threads of the
    # parent: what is there now is never collected in it.
    gc.collect()

    def supervise() -> None:
        try:
            found.append(agent.run())
        except SignalException:
            found.append(None)
        except BaseException as error:
            found.append(error)
        finally:
            ended.set()

    # Forked from a thread that has done no arithmetic: OpenMP keeps threads for each thread that used it, and a fork of one of
    # these would wait for them. The thread stays as long as the ranks: they get SIGTERM when it ends.
    thread = threading.Thread(target=supervise, name="bigvision ranks", daemon=True)
    with ExitStack() as stack:
        stack.callback(gc.unfreeze)
        received = stack.enter_context(_signals(agent))
        # Rank 0 serves the store by which the ranks find each other, on the loopback device: the agent's own is open.
        stack.enter_context(environment({"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}))
        for name in NOISE:
            stack.enter_context(attributes(logging.getLogger(name), disabled=True))
        thread.start()
        while True:
            try:
                while not ended.wait(0.2):  # in parts: a signal is handled between them
                    pass
                break
            except KeyboardInterrupt:
                if agent.interrupted:
                    agent.asked = signal.SIGKILL
                    agent.pass_on(signal.SIGKILL)
                agent.asked, agent.interrupted = agent.asked or signal.SIGTERM, True
        thread.join()
    spec.rdzv_handler.shutdown()
    if isinstance(found[0], BaseException):
        raise found[0]
    result: RunResult | None = found[0]
    done = result is not None and result.state == WorkerState.SUCCEEDED
    return _outcome(folder / str(agent.attempt), done, agent.exit_codes(result), agent.interrupted, received, out)


class _Agent(LocalElasticAgent):
    """The agent, which can be asked to stop, and knows which ends of ranks another start fixes, and which ones it does not."""

    folder: Path
    """What the ranks leave behind."""
    interrupted = False
    """By Ctrl-C."""
    asked: signal.Signals | None = None
    """The signal that the ranks are to get; then they have `GRACE` to end."""

    @property
    def attempt(self) -> int:
        return self._worker_group.spec.max_restarts - self._remaining_restarts

    def pass_on(self, number: signal.Signals) -> None:
        """Send the ranks a signal."""
        context = self._pcontext
        for pid in context.pids().values() if context is not None else ():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def exit_codes(self, result: RunResult | None) -> dict[int, int]:
        """Those of the ranks that have ended, as far as they are known."""
        context: Any = self._pcontext
        forked = getattr(getattr(context, "_pc", None), "processes", [])
        codes: dict[int, int | None] = {number: process.exitcode for number, process in enumerate(forked)}
        codes |= {number: handler.proc.poll() for number, handler in getattr(context, "subprocess_handlers", {}).items()}
        codes |= {number: failure.exitcode for number, failure in result.failures.items()} if result is not None else {}
        return {number: code for number, code in codes.items() if code is not None}

    def _start_workers(self, worker_group: Any) -> dict[int, Any]:
        gc.freeze()  # until the last start's end: to look through all that torch has created would delay each of them
        return super()._start_workers(worker_group)  # type: ignore[call-arg]

    def _monitor_workers(self, worker_group: Any) -> RunResult:
        if self.asked is not None:
            raise SignalException("asked to stop", self.asked)
        result = super()._monitor_workers(worker_group)  # type: ignore[call-arg]
        if not result.failures:
            return result
        attempt, allowed, reports = self.attempt, self._remaining_restarts, _reports(self.folder / str(self.attempt))
        if FINAL & {failure.exitcode for failure in result.failures.values()}:
            allowed = 0
        elif any(report["again"] for report in reports):
            allowed += 1
        # Those that were are counted as before.
        self._worker_group.spec.max_restarts, self._remaining_restarts = attempt + allowed, allowed
        if allowed:
            then = f": starting the ranks again ({attempt + 1} of at most {attempt + allowed})"
            _print_failure(_fault(reports, self.exit_codes(result)), then)
        return result

    def _shutdown(self, *args: Any, **kwargs: Any) -> None:
        if self.asked is not None:
            kwargs["timeout"] = GRACE
        super()._shutdown(*args, **kwargs)


@contextmanager
def _signals(agent: _Agent) -> Iterator[list[int]]:
    """While in here, what stops a run stops the ranks, and what saves it is passed on to them. Yields what has stopped them."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may take signals
        return

    def stop(number: int, frame: object) -> None:
        received.append(number)
        agent.asked = agent.asked or (signal.SIGTERM if number == signal.SIGHUP else signal.Signals(number))

    # Ctrl-C is an exception here (see _run).
    handlers: dict[int, Any] = dict.fromkeys((signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP), stop)
    handlers[SAVE] = lambda number, frame: agent.pass_on(signal.Signals(number))
    # What is ignored stays so: nohup ignores SIGHUP.
    handlers = {number: handler for number, handler in handlers.items() if signal.getsignal(number) != signal.SIG_IGN}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _outcome(attempt: Path, done: bool, codes: dict[int, int], interrupted: bool, received: list[int], out: str) -> Result:
    """Return what rank 0 returned, or raise what ended the ranks, of whose last start *attempt* is the folder.

    `UserError` is a mistake, in the rank's words; `Stopped`: a signal, or Ctrl-C, has stopped them, and they have saved;
    KeyboardInterrupt: there was nothing to save yet, or no time; `RankFailure` is a fault, and names the rank and the cause.
    """
    if done:
        result = json.loads((attempt / rank.RESULT).read_text(encoding="utf-8"))
        return Result(result["step"], Path(result["checkpoint"]), result["metrics"], read_history(out), result["reason"])
    reports = _reports(attempt)
    for report in reports:
        if report["kind"] == "mistake":
            raise UserError(report["words"])
    for report in reports:
        if report["kind"] == "stopped":
            raise Stopped(report["name"], report["step"], Path(report["checkpoint"]))
    if interrupted:
        raise KeyboardInterrupt
    if received:
        # The ranks have ended: now the signal takes its course.
        os.kill(os.getpid(), received[0])
    failure = _fault(reports, codes)
    failure.hung = Exit.HUNG in codes.values()
    raise failure


def _reports(attempt: Path) -> list[dict[str, Any]]:
    """What the ranks of a start have left at their end, the first one first."""
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in attempt.glob("rank-*.json")]
    return sorted(reports, key=lambda report: report["time"])


def _fault(reports: list[dict[str, Any]], codes: dict[int, int]) -> RankFailure:
    reported = {report["rank"] for report in reports}
    # A rank that is killed reports nothing; the others only miss it. They themselves are ended by SIGTERM.
    for number, code in sorted(codes.items()):
        if code < 0 and code != -signal.SIGTERM and number not in reported:
            why = ", perhaps for lack of memory" if code == -signal.SIGKILL else ""
            return RankFailure(f"rank {number}: killed by {signal.Signals(-code).name}{why}")
    if reports:
        # All ranks may report what failed on one, and nearly at once.
        about = re.match(r"rank (\d+): ", reports[0]["words"])
        first = next((report for report in reports if about and report["rank"] == int(about[1])), reports[0])
        failure = RankFailure(reports[0]["words"] if about else f"rank {first['rank']}: {first['words']}")
        failure.add_note(f"On rank {first['rank']}:\n{first['traceback']}")
        return failure
    hints = {
        int(Exit.HUNG): " (a limit of `limits` ran out; its stacks are on the error output)",
        int(Exit.STOPPED): " (stopped by a signal before the run began)",
    }
    for number, code in sorted(codes.items()):
        if code:
            return RankFailure(f"rank {number}: ended with exit code {code}{hints.get(code, '')}")
    return RankFailure("the ranks ended without a result")
