"""Ranks on this host, started from this process by torch's elastic agent, and what came of them."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import shutil
import signal
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from bigvision.errors import Exit, Stopped, UserError
from bigvision.launchers import rank
from bigvision.launchers.rank import RESULT
from bigvision.runtime import RankFailure
from bigvision.signals import SAVE
from bigvision.training import Result, read_history

GRACE = 600
"""Seconds that ranks have to save and end when they are asked to stop; a second Ctrl-C ends them at once."""
FINAL = {int(Exit.MISTAKE), int(Exit.STOPPED)}
"""Exit codes after which starting the ranks again changes nothing, or is not wanted."""
SHARED = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
NOISE = (
    "torch.distributed.elastic.agent.server.api", "torch.distributed.elastic.agent.server.local_elastic_agent",
    "torch.distributed.elastic.multiprocessing.api", "torch.multiprocessing.spawn",
)  # fmt: skip
"""What the agent logs of an ending, which is raised in the caller."""


def fresh_ranks(config: Mapping[str, Any], count: int, environment: Mapping[str, str], max_restarts: int) -> Result:
    """Train on *count* new interpreters, to which only the plain configuration goes.

    Raises:
        UserError, RankFailure, Stopped, KeyboardInterrupt: see :func:`~bigvision.launchers.ranks.outcome`.
    """
    with _folder() as folder, _importable():
        job = {"config": config, "environment": dict(environment), "parent": os.getpid()}
        (folder / rank.JOB).write_text(json.dumps(job), encoding="utf-8")
        # -P: the working directory is not searched before installed packages.
        command = ("-P", "-m", "bigvision.launchers.rank", str(folder))
        return _run(folder, count, sys.executable, command, max_restarts, config["out"])


def forked_ranks(
    work: Callable[[], Result], count: int, cuda: bool, environment: Mapping[str, str], max_restarts: int, out: str
) -> Result:  # fmt: skip
    """Do *work* on *count* forks of this process, which have all its objects.

    Raises:
        UserError, RankFailure, Stopped, KeyboardInterrupt: see :func:`~bigvision.launchers.ranks.outcome`.
    """
    parent = os.getpid()
    with _folder() as folder:

        def entry() -> None:
            from bigvision.launchers.devices import settle

            os.environ.update(environment)

            def settled() -> Result:
                settle(cuda)
                return work()

            code = rank.serve(folder, settled, parent)
            sys.stdout.flush()
            sys.stderr.flush()
            if code:
                # Not the way out that waits for threads: a rank that failed must not hold up the others.
                os._exit(code)

        return _run(folder, count, entry, (), max_restarts, out)


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
    ended, found = threading.Event(), []

    def supervise() -> None:
        try:
            found.append(agent.run())
        except SignalException:
            found.append(None)
        except BaseException as error:
            found.append(error)
        finally:
            ended.set()

    # Forked from a thread that has done no arithmetic: the threads that OpenMP keeps belong to the one that used them, and a
    # fork of that one would wait for them. The thread stays as long as the ranks, which are told when it ends.
    thread = threading.Thread(target=supervise, name="bigvision ranks", daemon=True)
    with _signals(agent) as received, _quiet(), _own_store():
        thread.start()
        _wait(ended, agent)
        thread.join()
    spec.rdzv_handler.shutdown()
    if isinstance(found[0], BaseException):
        raise found[0]
    result: RunResult | None = found[0]
    done = result is not None and result.state == WorkerState.SUCCEEDED
    return outcome(folder / str(agent.attempt), done, agent.exit_codes(result), agent.interrupted, received, out)


class _Agent(LocalElasticAgent):
    """The agent, which can be asked to stop, and knows which ends of ranks another start fixes, and which ones it does not."""

    folder: Path
    """What the ranks leave behind."""
    interrupted = False
    """By Ctrl-C."""
    asked: signal.Signals | None = None
    """The signal with which the ranks are to be stopped."""

    @property
    def attempt(self) -> int:
        return self._worker_group.spec.max_restarts - self._remaining_restarts

    def stop(self, number: signal.Signals) -> None:
        """Let the ranks get the signal and end within `GRACE`."""
        self.asked = self.asked or number

    def kill(self) -> None:
        """End the ranks now."""
        self.asked = signal.SIGKILL
        self.pass_on(signal.SIGKILL)

    def pass_on(self, number: signal.Signals) -> None:
        """Send the ranks a signal."""
        context = self._pcontext
        for pid in context.pids().values() if context is not None else ():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def exit_codes(self, result: RunResult | None) -> dict[int, int]:
        """Those of the ranks that have ended, as far as they are known."""
        codes: dict[int, int | None] = {}
        context: Any = self._pcontext
        if (forked := getattr(context, "_pc", None)) is not None:
            codes |= {number: process.exitcode for number, process in enumerate(forked.processes)}
        for number, handler in getattr(context, "subprocess_handlers", {}).items():
            codes[number] = handler.proc.poll()
        if result is not None:
            codes |= {number: failure.exitcode for number, failure in result.failures.items()}
        return {number: code for number, code in codes.items() if code is not None}

    def _start_workers(self, worker_group: Any) -> dict[int, Any]:
        # A fork that collected what its parent has left, such as the store of a process group, would wait for threads of the
        # parent: whatever is there now is never collected in it.
        gc.collect()
        gc.freeze()
        try:
            return super()._start_workers(worker_group)  # type: ignore[call-arg]
        finally:
            gc.unfreeze()

    def _monitor_workers(self, worker_group: Any) -> RunResult:
        if self.asked is not None:
            raise SignalException("asked to stop", self.asked)
        result = super()._monitor_workers(worker_group)  # type: ignore[call-arg]
        if FINAL & {failure.exitcode for failure in result.failures.values()}:
            self._allow(0)
        elif result.failures and any(said["again"] for said in last_words(self.folder / str(self.attempt))):
            self._allow(self._remaining_restarts + 1)
        return result

    def _allow(self, restarts: int) -> None:
        """From now on; those that were are counted as before."""
        self._worker_group.spec.max_restarts = self.attempt + restarts
        self._remaining_restarts = restarts

    def _shutdown(self, *args: Any, **kwargs: Any) -> None:
        if self.asked is not None:
            kwargs["timeout"] = GRACE
        super()._shutdown(*args, **kwargs)


def _wait(ended: threading.Event, agent: _Agent) -> None:
    while True:
        try:
            # In pieces: a signal is handled between them.
            while not ended.wait(0.2):
                pass
            return
        except KeyboardInterrupt:
            agent.kill() if agent.interrupted else agent.stop(signal.SIGTERM)
            agent.interrupted = True


@contextmanager
def _signals(agent: _Agent) -> Iterator[list[int]]:
    """While in here, what stops a run stops the ranks, and what saves it is passed on to them.

    Yields what has stopped them.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may take signals
        return

    def stop(number: int, frame: object) -> None:
        received.append(number)
        agent.stop(signal.SIGTERM if number == signal.SIGHUP else signal.Signals(number))

    def pass_on(number: int, frame: object) -> None:
        agent.pass_on(signal.Signals(number))

    # Ctrl-C is an exception here (see _wait).
    handlers = dict.fromkeys((signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP), stop) | {SAVE: pass_on}
    # What is ignored stays so: nohup ignores SIGHUP.
    heard = {number: handler for number, handler in handlers.items() if signal.getsignal(number) != signal.SIG_IGN}
    before = {number: signal.signal(number, handler) for number, handler in heard.items()}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder that only this user can enter."""
    folder = Path(tempfile.mkdtemp(prefix="bigvision-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _importable() -> Iterator[None]:
    """Let new interpreters find this package, also where it is not installed."""
    root = str(Path(__file__).parents[2])
    before = os.environ.get("PYTHONPATH")
    if root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        os.environ["PYTHONPATH"] = os.pathsep.join([root, *([before] if before else [])])
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH", None)
        if before is not None:
            os.environ["PYTHONPATH"] = before


@contextmanager
def _own_store() -> Iterator[None]:
    """Let rank 0 serve the store by which the ranks find each other, on the loopback device: the agent's own is open."""
    before = os.environ.get(SHARED)
    os.environ[SHARED] = "1"
    try:
        yield
    finally:
        del os.environ[SHARED]
        if before is not None:
            os.environ[SHARED] = before


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in NOISE]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, disabled in zip(loggers, before):
            logger.disabled = disabled


def outcome(attempt: Path, done: bool, codes: dict[int, int], interrupted: bool, received: list[int], out: str) -> Result:
    """Return what rank 0 returned, or raise what ended the ranks.

    Args:
        attempt: the folder of their last start, in which each has left what it has to say.
        done: all have ended well.
        codes: their exit codes, as far as they are known.
        interrupted: Ctrl-C has stopped them.
        received: the signals that have.

    Raises:
        UserError: a mistake, with the rank's own words.
        Stopped: a signal, or Ctrl-C, has stopped them, and they have saved.
        KeyboardInterrupt: Ctrl-C has ended them, and there was nothing to save yet, or no time.
        RankFailure: a fault; names the rank and the cause.
    """
    if done:
        result = json.loads((attempt / RESULT).read_text(encoding="utf-8"))
        return Result(result["step"], Path(result["checkpoint"]), result["metrics"], read_history(out))
    said = last_words(attempt)
    for one in said:
        if one["kind"] == "mistake":
            raise UserError(one["words"])
    for one in said:
        if one["kind"] == "stopped":
            raise Stopped(one["name"], one["step"], Path(one["checkpoint"]))
    if interrupted:
        raise KeyboardInterrupt
    if received:
        # As if nothing had held it back: the ranks have ended now.
        os.kill(os.getpid(), received[0])
    raise _fault(said, codes)


def last_words(attempt: Path) -> list[dict[str, Any]]:
    """What the ranks of a start have said at their end, the first one first."""
    said = [json.loads(path.read_text(encoding="utf-8")) for path in attempt.glob("rank-*.json")]
    return sorted(said, key=lambda one: one["time"])


def _fault(said: list[dict[str, Any]], codes: dict[int, int]) -> RankFailure:
    spoke = {one["rank"] for one in said}
    # A rank that is killed says nothing; the others only miss it. They themselves are ended by SIGTERM.
    for number, code in sorted(codes.items()):
        if code < 0 and code != -signal.SIGTERM and number not in spoke:
            want = ", perhaps for lack of memory" if code == -signal.SIGKILL else ""
            return RankFailure(f"rank {number}: killed by {signal.Signals(-code).name}{want}")
    if said:
        # All ranks may say what failed on one, and hardly one after the other.
        about = re.match(r"rank (\d+): ", said[0]["words"])
        first = next((one for one in said if about and one["rank"] == int(about[1])), said[0])
        failure = RankFailure(said[0]["words"] if about else f"rank {first['rank']}: {first['words']}")
        failure.add_note(f"On rank {first['rank']}:\n{first['traceback']}")
        return failure
    for number, code in sorted(codes.items()):
        if code:
            hint = " (a limit of `limits` ran out; its stacks are on the error output)" if code == Exit.HUNG else ""
            hint = " (stopped by a signal before the run began)" if code == Exit.STOPPED else hint
            return RankFailure(f"rank {number}: ended with exit code {code}{hint}")
    return RankFailure("the ranks ended without a result")
