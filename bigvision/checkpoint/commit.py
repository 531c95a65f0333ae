"""A checkpoint becomes visible whole or not at all, in the foreground or while training goes on."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import astuple
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from bigvision.checkpoint import manifest
from bigvision.checkpoint.disk import (
    FOLDER_MODE,
    ONE_WRITER,
    file_system,
    make_folder,
    open_existing,
    open_new,
    remove,
    replace,
    sync_folder,
    write_new,
)
from bigvision.checkpoint.layout import Plan, index, plan
from bigvision.checkpoint.lock import check_held
from bigvision.checkpoint.manifest import Damaged, Run
from bigvision.checkpoint.retention import Retention, folder_name, prune
from bigvision.checkpoint.writer import Arena, create, write_by_owners, write_document, write_pieces
from bigvision.errors import UserError, lacks_memory
from bigvision.fragments import Fragment
from bigvision.runtime import RankFailure, all_or_none, from_main, gather_json

Writer = Literal["direct", "owner"]
"""Whether every rank writes its bytes into every file, or each file has one rank that does."""
Verify = Literal["sample", "full", "none"]
"""How much of what was written is read back before it becomes a checkpoint and older ones are pruned."""
LOOKS, LOOK_EVERY = 20, 0.25
"""How often a rank looks for what rank 0 has made, and the seconds between."""
SAMPLE = 8
"""Runs that a rank reads back of what another has written; at most 64 MiB."""

_UNFINISHED = re.compile(r"step-\d{8,}\.(tmp|pruned)-[0-9a-f]+")
_ASIDE = re.compile(r"(step-\d{8,})\.aside-[0-9a-f]+")
_TEMPORARY = re.compile(r"\.(latest|run\.yaml|probe)\.[0-9a-f]+")


def prepare_folder(out: Path) -> None:
    """Make *out* ready for a run: it exists, can be written, and holds nothing that a killed run left half done.

    Raises:
        UserError: it cannot be made or written.
    """
    try:
        make_folder(out)
        for folder in out.absolute().parents:
            # Who made it a moment ago, we or a user, did not bring its name to the disk. Not all may be open to us.
            with contextlib.suppress(OSError):
                sync_folder(folder)
        probe = out / f".probe.{secrets.token_hex(4)}"
        os.close(open_new(probe))
        probe.unlink()
        for entry in list(out.iterdir()):
            if match := _ASIDE.fullmatch(entry.name):
                # Stopped between the two renames of a replacement: the old one is the checkpoint.
                if (out / match[1]).exists():
                    remove(entry)
                else:
                    entry.rename(out / match[1])
            elif _UNFINISHED.fullmatch(entry.name) or _TEMPORARY.fullmatch(entry.name):
                remove(entry)
    except OSError as error:
        raise UserError(f"out: {out} cannot be written ({error.strerror}): choose another with --out") from None


def check_shared(out: Path) -> None:
    """Look for a file that rank 0 has just made in *out*. Called on every rank.

    Raises:
        UserError: a rank does not see it: its host has another folder of that name.
    """
    if dist.get_world_size() == 1:
        return
    main = dist.get_rank() == 0
    token = out / from_main(f".probe.{secrets.token_hex(4)}")

    def look() -> None:
        for _ in range(LOOKS):
            if token.exists():
                return
            time.sleep(LOOK_EVERY)  # network file systems show a new name to other hosts a moment later
        raise UserError(
            f"out: {out} of rank {dist.get_rank()} on host {socket.gethostname()} is not the folder that rank 0 has: "
            "name a folder on a file system that all hosts share with --out"
        )

    all_or_none(lambda: os.close(open_new(token)) if main else None)
    try:
        all_or_none(look)
    finally:
        if main:
            token.unlink(missing_ok=True)


def save(
    out: Path, step: int, fragments: Iterable[Fragment], documents: dict[str, Any], shard_size: int, keep: int
) -> Path:  # fmt: skip
    """Write a checkpoint from all ranks and return its folder; afterwards keep only the newest *keep* valid ones.

    Args:
        documents: JSON files by name; "config.json" and "progress.json" are among them.
        shard_size: largest size of a file's data in bytes.

    Raises:
        RankFailure: on every rank, when writing failed on any; the earlier checkpoints are as they were.
    """
    return commit(out, step, plan(list(fragments), shard_size), documents, Retention(keep))


def commit(
    out: Path, step: int, content: Plan, documents: dict[str, Any], retention: Retention,
    writer: Writer = "direct", group: dist.ProcessGroup | None = None, verify: Verify = "sample",
) -> Path:  # fmt: skip
    """Write *content* as the checkpoint of *step*, from all ranks, and return its folder; then prune.

    Args:
        group: all ranks, where another thread speaks at the same time.

    Raises:
        RankFailure: on every rank, when writing or reading back failed on any; the earlier checkpoints are as they were.
    """
    main = dist.get_rank() == 0
    final = out / folder_name(step)
    unfinished = final.with_name(f"{final.name}.tmp-{secrets.token_hex(4)}")

    def prepare() -> list[Run]:
        if not main:
            return []
        check_held(out)
        make_folder(out)
        os.mkdir(unfinished, FOLDER_MODE)
        return [create(unfinished, file) for file in content.files]

    def write() -> list[Run]:
        return write_by_owners(unfinished, content, group) if writer == "owner" else write_pieces(unfinished, content.pieces)

    def publish() -> None:
        if main:
            _finish(unfinished, content, documents, runs)
            if verify != "none":
                written = manifest.read(unfinished)
                _read_back(unfinished, [run for name in written if name.endswith(".json") for run in written[name]])
            _publish(unfinished, final)

    try:
        unfinished = final.with_name(from_main(unfinished.name, group))
        created = all_or_none(prepare, group)
        written = all_or_none(write, group)
        parts = [[Run(*run) for run in part] for part in gather_json([astuple(run) for run in created + written], group)]
        runs = [run for part in parts for run in part]
        if verify != "none":
            # What the next rank wrote, which may be on another host: it shows what the file system hands out.
            other = parts[(dist.get_rank() + 1) % dist.get_world_size()]
            some = other if verify == "full" else other[:: -(-len(other) // SAMPLE) or 1]
            all_or_none(lambda: _read_back(unfinished, some), group)
        all_or_none(publish, group)
    except Exception as error:
        if main:
            shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, RankFailure):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RankFailure(f"{final} is not saved: another rank is gone or does not answer: {reason}") from error
    if main:
        try:
            replace(out / "latest", f"{final.name}\n".encode())
            prune(out, retention, step)
        except OSError as error:
            # The checkpoint is safe; no other rank knows of this, and the run can go on.
            warnings.warn(f"{final} is saved, but clearing up after it failed: {error}", stacklevel=2)
    return final


def _read_back(folder: Path, runs: list[Run]) -> None:
    """Raises: RuntimeError: *runs* that were just written cannot be read, or are not what was written."""
    try:
        for name in {run.file for run in runs}:
            descriptor = open_existing(folder / name, os.O_RDONLY)
            try:
                # From the disk or the server, not from the memory that they were written through.
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
        manifest.verify(folder, runs)
    except (Damaged, OSError) as error:
        raise RuntimeError(f"what was just written cannot be read back: {error}") from error


def _finish(unfinished: Path, content: Plan, documents: dict[str, Any], runs: list[Run]) -> None:
    """Write what makes the files a checkpoint, the manifest last."""
    documents = dict(documents)
    # Only the model's: readers of a folder with two indexes do not know which one is meant.
    if len(content.layouts["model"]) > 1:
        documents["model.safetensors.index.json"] = index(content.layouts["model"])
    sizes = {file.name: file.size for file in content.files}
    for name, document in documents.items():
        run = write_document(unfinished, name, document)
        sizes[name] = run.length
        runs.append(run)
    write_new(unfinished / manifest.NAME, manifest.build(sizes, runs))
    sync_folder(unfinished)


def _publish(unfinished: Path, final: Path) -> None:
    aside = None
    if final.exists():
        # A run resumed at its last step writes that step again.
        aside = final.with_name(f"{final.name}.aside-{secrets.token_hex(4)}")
        final.rename(aside)
    try:
        unfinished.rename(final)
        sync_folder(final.parent)
    except OSError:
        if aside is not None:
            if final.exists():
                final.rename(unfinished)
            aside.rename(final)
        raise
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


class Saver:
    """Saves a run's checkpoints, one at a time; training waits only until this rank has copied what it writes.

    Every rank has one and calls all of its methods.
    """

    def __init__(
        self, out: Path, shard_size: int, retention: Retention, *, background: bool = True,
        writer: Literal["auto"] | Writer = "auto", verify: Verify = "sample", timeout: float = 600.0,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        """Args:
        background: False writes before training goes on, and holds no copy.
        writer: "auto" takes what suits the file system of *out*.
        verify: how much of what was written is read back before older checkpoints are pruned.
        timeout: seconds that a rank waits for the others' answers while a checkpoint is written.
        say: called with one line: which file system *out* is on, where that matters; that there is no memory for the copy.
        """
        self.out, self.shard_size, self.retention, self.say = out, shard_size, retention, say
        self.writer: Writer = self._suitable() if writer == "auto" else writer
        self.verify: Verify = verify
        self.arena = Arena() if background else None
        self.thread: threading.Thread | None = None
        self.failure: Exception | None = None
        # A group of its own: collectives of the background thread must not meet those of training.
        self.group: Any = None
        if dist.get_world_size() > 1:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def save(self, step: int, fragments: Iterable[Fragment], documents: dict[str, Any]) -> None:
        """Begin to save; *fragments* may change as soon as this returns. The save before is waited for.

        Raises:
            RankFailure: the save before failed, or this one if it is not in the background.
        """
        self.wait()
        content = plan(list(fragments), self.shard_size)
        if (copy := self._copied(content)) is None:
            self._commit(step, content, documents)
            self.wait()
        else:
            self.thread = threading.Thread(target=self._commit, args=(step, copy, documents), name="checkpoint")
            self.thread.start()

    @property
    def failed(self) -> bool:
        """Whether a save of this rank has failed in the background. Does not communicate."""
        return self.failure is not None

    def raise_failure(self) -> None:
        """Raise what any rank's save in the background failed with. Called by all ranks, once any of them has `failed`.

        Raises:
            RankFailure: names the first rank that failed and its error; the same on every rank.
        """
        self._join()  # a rank whose save is still under way comes to the same end
        failure, self.failure = self.failure, None
        for text in gather_json(failure and str(failure)):
            if text:
                raise RankFailure(text) from failure

    @property
    def done(self) -> bool:
        """Whether the last save is complete on the disk, as far as this rank knows."""
        return self.failure is None and (self.thread is None or not self.thread.is_alive())

    def wait(self) -> None:
        """Wait until nothing is being saved.

        Raises:
            RankFailure: it failed.
        """
        self._join()
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Wait until nothing is being saved; a failure is no longer reported."""
        self._join()

    def _join(self) -> None:
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def _suitable(self) -> Writer:
        # As rank 0 sees it: all have to do the same.
        found: str = from_main(file_system(self.out))
        writer: Writer = "owner" if found in ONE_WRITER else "direct"
        if found:
            self.say(f"out: {self.out} is on {found}: checkpoint.writer is {writer}")
        return writer

    def _copied(self, content: Plan) -> Plan | None:
        if self.arena is None:
            return None
        try:
            return Plan(content.layouts, self.arena.copy(content.pieces))
        except (MemoryError, RuntimeError) as error:
            if not lacks_memory(error):
                raise
            # The other ranks need not know: this one takes part in the same collectives, before training goes on.
            self.arena = None
            self.say(f"no memory for a copy of the state ({error}): checkpoints are written before training goes on")
            return None

    def _commit(self, step: int, content: Plan, documents: dict[str, Any]) -> None:
        try:
            commit(self.out, step, content, documents, self.retention, self.writer, self.group, self.verify)
        except Exception as error:
            self.failure = error
