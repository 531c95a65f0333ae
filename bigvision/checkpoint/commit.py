"""How a checkpoint comes to be: whole or not at all, and the earlier ones stay untouched until it is."""

from __future__ import annotations

import os
import secrets
import shutil
import warnings
from collections.abc import Iterable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch.distributed as dist

from bigvision.checkpoint import manifest
from bigvision.checkpoint.folders import ASIDE, UNFINISHED, folder_name, remove, steps_in
from bigvision.checkpoint.layout import index, lay_out, specs
from bigvision.checkpoint.manifest import Damaged, Run
from bigvision.checkpoint.writer import MODE, create, sync_folder, write_document, write_fragments
from bigvision.errors import UserError
from bigvision.fragments import Fragment
from bigvision.runtime import all_or_none, from_main, gather_json


def prepare_folder(out: Path) -> None:
    """Make *out* ready for a run: it exists, can be written, and holds nothing that a killed run left half done.

    Raises:
        UserError: it cannot be made or written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".probe-{secrets.token_hex(4)}"
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, MODE))
        probe.unlink()
    except OSError as error:
        raise UserError(f"out: {out} cannot be written ({error.strerror}): choose another with --out") from None
    for entry in list(out.iterdir()):
        if match := ASIDE.fullmatch(entry.name):
            # Killed between the two renames of a replacement: the old one is the checkpoint.
            if (out / match[1]).exists():
                shutil.rmtree(entry)
            else:
                entry.rename(out / match[1])
        elif UNFINISHED.fullmatch(entry.name):
            shutil.rmtree(entry)


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
    fragments = list(fragments)
    main = dist.get_rank() == 0
    final = out / folder_name(step)
    unfinished = out / from_main(f"{final.name}.tmp-{secrets.token_hex(4)}")
    groups = sorted({fragment.group for fragment in fragments})
    layouts = {group: lay_out(group, specs(fragments, group), shard_size) for group in groups}

    def prepare() -> list[Run]:
        if not main:
            return []
        unfinished.mkdir()
        return [create(unfinished, file) for files in layouts.values() for file in files]

    def write() -> list[Run]:
        runs = []
        for group, files in layouts.items():
            runs += write_fragments(unfinished, files, (f for f in fragments if f.group == group))
        return runs

    def commit() -> None:
        if main:
            contents = dict(documents)
            # Only the model's: readers of a folder with two indexes do not know which one is meant.
            if len(layouts["model"]) > 1:
                contents["model.safetensors.index.json"] = index(layouts["model"])
            sizes = {file.name: file.size for files in layouts.values() for file in files}
            for name, content in contents.items():
                run = write_document(unfinished, name, content)
                sizes[name] = run.length
                runs.append(run)
            write_document(unfinished, manifest.NAME, manifest.build(sizes, runs))
            sync_folder(unfinished)
            _publish(unfinished, final)

    try:
        created = all_or_none(prepare)
        written = all_or_none(write)
        runs = [Run(*run) for part in gather_json([astuple(run) for run in created + written]) for run in part]
        all_or_none(commit)
    except Exception:
        if main:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if main:
        try:
            _write_hint(out, final.name)
            prune(out, keep, step)
        except OSError as error:
            # The checkpoint is safe; no other rank knows of this, and the run can go on.
            warnings.warn(f"{final} is saved, but clearing up after it failed: {error}", stacklevel=2)
    return final


def prune(out: Path, keep: int, newest: int) -> None:
    """Remove all but the last *keep* valid checkpoints up to step *newest*, which was just written.

    Damaged ones are neither counted nor removed, and so are later ones: a run that fell back past them will replace them.
    """
    valid = []
    for step in steps_in(out):
        if step > newest:
            continue
        try:
            manifest.read(out / folder_name(step))
            valid.append(step)
        except Damaged:
            continue
    for step in valid[keep:]:
        remove(out / folder_name(step))


def _publish(unfinished: Path, final: Path) -> None:
    aside = None
    if final.exists():
        # A run resumed at its last step writes that step again.
        aside = final.with_name(f"{final.name}.aside-{secrets.token_hex(4)}")
        final.rename(aside)
    try:
        unfinished.rename(final)
    except OSError:
        if aside is not None:
            aside.rename(final)
        raise
    sync_folder(final.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def _write_hint(out: Path, name: str) -> None:
    temporary = out / f".latest-{secrets.token_hex(4)}"
    temporary.write_text(name + "\n", encoding="utf-8")
    temporary.replace(out / "latest")
