"""A checkpoint becomes visible whole or not at all, in the foreground or while training goes on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from bigvision import disk
from bigvision.checkpoint import manifest
from bigvision.checkpoint.lock import check_held
from bigvision.checkpoint.manifest import ByteRange, Damaged, checksum
from bigvision.checkpoint.retention import OTHER, Retention, folder_name, prune
from bigvision.checkpoint.writer import Arena, Plan, index, plan, write_by_owners, write_chunks
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
"""Byte ranges that a rank reads back of what another has written; at most 64 MiB."""

_TEMPORARY = re.compile(r"\.(latest|run\.yaml|lineage\.json|evaluation\.json|metrics\.jsonl|trackers\.json|probe)\.[0-9a-f]+")
"""What :func:`bigvision.disk.replace` and the probes leave when they are killed."""


def prepare_folder(out: Path) -> None:
    """Make *out* exist, without anything that a killed run left half done; `UserError` where it cannot be made or written."""
    try:
        disk.make_folder(out)
        for folder in out.absolute().parents:
            # Who made it a moment ago, we or a user, did not bring its name to the disk. Not all may be open to us.
            with contextlib.suppress(OSError):
                disk.sync_folder(folder)
        probe = out / f".probe.{secrets.token_hex(4)}"
        os.close(disk.open_new(probe))
        probe.unlink()
        for entry in list(out.iterdir()):
            other = OTHER.fullmatch(entry.name)
            kind = other[2] if other else "temporary" if _TEMPORARY.fullmatch(entry.name) else "left"
            final = out / entry.name.partition(".")[0]
            if kind == "aside" and not final.exists():
                # Stopped between the two renames of a replacement: the old one is the checkpoint.
                entry.rename(final)
            elif kind != "left":
                disk.remove(entry)
    except OSError as error:
        raise UserError(f"out: {out} cannot be written ({error.strerror}): choose another with --out") from None


def check_shared(out: Path) -> None:
    """Raise `UserError` on every rank where one does not see a file that rank 0 made: its host has another folder *out*."""
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

    all_or_none(lambda: os.close(disk.open_new(token)) if main else None)
    try:
        all_or_none(look)
    finally:
        if main:
            token.unlink(missing_ok=True)


def commit(
    out: Path, step: int, content: Plan, documents: dict[str, Any], retention: Retention,
    writer: Writer = "direct", group: dist.ProcessGroup | None = None, verify: Verify = "sample",
) -> Path:  # fmt: skip
    """Write *content* as the checkpoint of *step*, from all ranks, and return its folder; then prune.

    *group* has all ranks, where another thread speaks at the same time. When writing or reading back fails on any rank, all
    raise `RankFailure`, and the earlier checkpoints are as they were.
    """
    main = dist.get_rank() == 0
    final = out / folder_name(step)
    unfinished = final.with_name(f"{final.name}.tmp-{secrets.token_hex(4)}")

    def prepare() -> list[ByteRange]:
        if not main:
            return []
        check_held(out)
        disk.make_folder(out)
        os.mkdir(unfinished, disk.FOLDER_MODE)
        return [_new_file(unfinished, file.name, file.header, file.size) for file in content.files]

    def write() -> list[ByteRange]:
        return write_by_owners(unfinished, content, group) if writer == "owner" else write_chunks(unfinished, content.chunks)

    def finish() -> None:
        if not main:
            return
        # An index for the model only: readers of a folder with two indexes do not know which one is meant.
        model = content.layouts["model"]
        indexes = {"model.safetensors.index.json": index(model)} if len(model) > 1 else {}
        texts = {name: (json.dumps(found, indent=2) + "\n").encode() for name, found in (documents | indexes).items()}
        added = [_new_file(unfinished, name, text) for name, text in texts.items()]
        sizes = {file.name: file.size for file in content.files} | {name: len(text) for name, text in texts.items()}
        ranges = [part for parts in [*written, added] for part in parts]
        # What makes the files a checkpoint comes last.
        disk.write_new(unfinished / manifest.NAME, manifest.build(sizes, ranges))
        disk.sync_folder(unfinished)
        if verify != "none":
            manifest.read(unfinished)
            _read_back(unfinished, added)
        disk.publish(unfinished, final)

    try:
        unfinished = final.with_name(from_main(unfinished.name, group))
        headers = all_or_none(prepare, group)
        chunks = all_or_none(write, group)
        gathered = gather_json([astuple(part) for part in headers + chunks], group)
        written = [[ByteRange(*part) for part in parts] for parts in gathered]
        if verify != "none":
            # What the next rank wrote, which may be on another host: it shows what the file system hands out.
            other = written[(dist.get_rank() + 1) % dist.get_world_size()]
            some = other if verify == "full" else other[:: -(-len(other) // SAMPLE) or 1]
            all_or_none(lambda: _read_back(unfinished, some), group)
        all_or_none(finish, group)
    except Exception as error:
        if main:
            shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, RankFailure):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RankFailure(f"{final} is not saved: another rank is gone or does not answer: {reason}") from error
    if main:
        try:
            disk.replace(out / "latest", f"{final.name}\n".encode())
            prune(out, retention, step)
        except OSError as error:
            # The checkpoint is safe; no other rank knows of this, and the run can go on.
            warnings.warn(f"{final} is saved, but clearing up after it failed: {error}", stacklevel=2)
    return final


def _new_file(folder: Path, name: str, data: bytes, size: int = 0) -> ByteRange:
    disk.write_new(folder / name, data, size)
    return ByteRange(name, 0, len(data), checksum(data))


def _read_back(folder: Path, ranges: list[ByteRange]) -> None:
    """Raises: RuntimeError: *ranges* that were just written cannot be read, or are not what was written."""
    try:
        for name in {part.file for part in ranges}:
            with os.fdopen(disk.open_existing(folder / name, os.O_RDONLY), "rb") as file:
                # From the disk or the server, not from the memory that they were written through.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        manifest.verify(folder, ranges)
    except (Damaged, OSError) as error:
        raise RuntimeError(f"what was just written cannot be read back: {error}") from error


class Saver:
    """Saves a run's checkpoints, one at a time; training waits only until this rank has copied what it writes.

    Every rank has one and calls all of its methods.
    """

    def __init__(
        self, out: Path, shard_size: int, retention: Retention, *, background: bool = True,
        writer: Literal["auto"] | Writer = "auto", verify: Verify = "sample", timeout: float = 600.0,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        """Not in the *background*, it writes before training goes on, and holds no copy. *writer* "auto" takes what suits the
        file system of *out*. *verify* is how much of what was written is read back before older checkpoints are pruned.
        *timeout* is the seconds that a rank waits for the others' answers while a checkpoint is written. *say* gets a line:
        which file system *out* is on, where that matters; that there is no memory for the copy.
        """
        self.out, self.shard_size, self.retention, self.say = out, shard_size, retention, say
        self.writer: Writer = self._suitable() if writer == "auto" else writer
        self.verify: Verify = verify
        self.arena = Arena() if background else None
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.saving: Future[Path] | None = None
        # A group of its own: collectives of the background thread must not meet those of training.
        self.group: Any = None
        if dist.get_world_size() > 1:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def save(self, step: int, fragments: Iterable[Fragment], documents: dict[str, Any]) -> None:
        """Begin to save; *fragments* may change as soon as this returns. The save before is waited for.

        `RankFailure` where the save before failed, or this one if it is not in the background.
        """
        self.wait()
        content = plan(list(fragments), self.shard_size)
        copy: Plan | None = None
        if self.arena is not None:
            try:
                copy = Plan(content.layouts, self.arena.copy(content.chunks))
            except (MemoryError, RuntimeError) as error:
                if not lacks_memory(error):
                    raise
                # The other ranks need not know: this one takes part in the same collectives, before training goes on.
                self.arena = None
                self.say(f"no memory for a copy of the state ({error}): checkpoints are written before training goes on")
        rest = documents, self.retention, self.writer, self.group, self.verify
        if copy is None:
            commit(self.out, step, content, *rest)
        else:
            self.saving = self.thread.submit(commit, self.out, step, copy, *rest)

    @property
    def done(self) -> bool:
        """Whether the last save is complete on the disk, as far as this rank knows."""
        return self.saving is None or (self.saving.done() and not self.failed)

    @property
    def failed(self) -> bool:
        """Whether a save of this rank has failed in the background. Does not communicate."""
        return self.saving is not None and self.saving.done() and self.saving.exception() is not None

    def wait(self) -> None:
        """Wait until nothing is being saved; a `RankFailure` of the last save is raised."""
        saving, self.saving = self.saving, None
        if saving is not None:
            saving.result()

    def raise_failure(self) -> None:
        """Raise the `RankFailure` of a save in the background: it names the first rank that failed and its error.

        Called by all ranks, once any of them has `failed`; the same error on every rank.
        """
        saving, self.saving = self.saving, None
        # A rank whose save is still under way comes to the same end.
        failure = saving and saving.exception()
        for text in gather_json(failure and str(failure)):
            if text:
                raise RankFailure(text) from failure

    def close(self) -> None:
        """Wait until nothing is being saved; a failure is not raised."""
        self.thread.shutdown()

    def _suitable(self) -> Writer:
        # As rank 0 sees it: all have to do the same.
        found: str = from_main(disk.file_system(self.out))
        writer: Writer = "owner" if found in disk.ONE_WRITER else "direct"
        if found:
            self.say(f"out: {self.out} is on {found}: checkpoint.writer is {writer}")
        return writer
