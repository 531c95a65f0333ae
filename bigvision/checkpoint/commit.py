"""How a checkpoint comes to be: whole or not at all, and the earlier ones stay untouched until it is."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import time
import warnings
from collections.abc import Iterable
from dataclasses import astuple
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from bigvision.checkpoint import manifest
from bigvision.checkpoint.disk import (
    FOLDER_MODE,
    make_folder,
    open_existing,
    open_new,
    remove,
    replace,
    sync_folder,
    write_new,
)
from bigvision.checkpoint.layout import index
from bigvision.checkpoint.lock import check_held
from bigvision.checkpoint.manifest import Damaged, Run
from bigvision.checkpoint.pieces import Plan, plan
from bigvision.checkpoint.retention import Retention, folder_name, prune
from bigvision.checkpoint.writer import create, write_by_owners, write_document, write_pieces
from bigvision.errors import UserError
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
