"""Removes each fsync, vote, checksum, rename and guard of the checkpoint package in turn, and shows that some test fails then.

``python -m tests.checkpoint.mutations [WORDS ...]`` works on a copy of the project and prints a line for each; with words, only
those whose name holds one of them. Ends with 1 when a mutation survives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "bigvision/checkpoint"
HANGS = 600
"""Seconds after which tests are taken to wait for what never comes, which is a failure too."""


@dataclass(frozen=True)
class Mutation:
    """Text of a file of the package that gives way to another, and the tests of which one has to fail then."""

    name: str
    file: str
    old: str
    new: str
    tests: str


POWER, CRASH, ERRORS = "test_power_loss.py", "test_crashes.py", "test_disk_errors.py"
SAVER, FORMAT, DAMAGE = "test_saver.py", "test_format.py", "test_damage.py test_tampering.py"
LOCK, READING = "test_lock.py", "test_reading.py"

MUTATIONS = [
    Mutation("fsync of chunks", "writer.py", "        os.fsync(self.descriptors[0])", "        pass", POWER),
    Mutation("fsync of headers, documents and manifest", "../disk.py", "        write_at(descriptor, memoryview(data), 0)\n        os.fsync(descriptor)", "        write_at(descriptor, memoryview(data), 0)", POWER),
    Mutation("fsync of the checkpoint's folder", "commit.py", "        disk.sync_folder(unfinished)\n", "", POWER),
    Mutation("fsync after the rename", "../disk.py", "        unfinished.rename(final)\n        sync_folder(final.parent)", "        unfinished.rename(final)", POWER),
    Mutation("fsync before a pruned one is removed", "retention.py", "    sync_folder(folder.parent)\n", "", POWER),
    Mutation("fsync of the names above", "commit.py", "                disk.sync_folder(folder)\n", "                pass\n", POWER),
    Mutation("fsync of folders at all", "../disk.py", "        os.fsync(descriptor)\n    finally:\n        os.close(descriptor)\n\n\ndef make_folder", "        pass\n    finally:\n        os.close(descriptor)\n\n\ndef make_folder", POWER),
    Mutation("the manifest is written first", "commit.py", "        return [_new_file(unfinished, file.name, file.header, file.size) for file in content.files]", "        disk.write_new(unfinished / manifest.NAME, b'{}')\n        return [_new_file(unfinished, file.name, file.header, file.size) for file in content.files]", FORMAT),
    Mutation("rename at the end", "commit.py", "    unfinished = final.with_name(f\"{final.name}.tmp-{secrets.token_hex(4)}\")\n\n    def prepare", "    unfinished = final\n\n    def prepare", CRASH),
    Mutation("moving the old one aside", "../disk.py", "        final.rename(aside)\n", "        shutil.rmtree(final)\n", CRASH),
    Mutation("moving it back at the next start", "commit.py", "                entry.rename(final)", "                disk.remove(entry)", FORMAT),
    Mutation("renaming before removing", "retention.py", "    folder.rename(gone)\n    sync_folder(folder.parent)\n    shutil.rmtree(gone, ignore_errors=True)", "    shutil.rmtree(folder, ignore_errors=True)", f"{CRASH} {POWER}"),
    Mutation("pruning after the commit", "commit.py", "        sizes = {file.name: file.size for file in content.files}", "        prune(out, Retention(0), step - 1)\n        sizes = {file.name: file.size for file in content.files}", f"{CRASH} {ERRORS}"),
    Mutation("only valid ones are counted", "retention.py", "        except Damaged:\n            continue\n", "        except Damaged:\n            found[step] = {}\n", FORMAT),
    Mutation("vote on making files", "commit.py", "all_or_none(prepare, group)", "prepare()", f"{ERRORS} {SAVER}"),
    Mutation("vote on writing", "commit.py", "all_or_none(write, group)", "write()", f"{SAVER} {ERRORS}"),
    Mutation("vote on the commit", "commit.py", "all_or_none(finish, group)", "finish()", f"{ERRORS} {SAVER}"),
    Mutation("the unfinished folder is removed", "commit.py", "            shutil.rmtree(unfinished, ignore_errors=True)\n        if isinstance", "            pass\n        if isinstance", FORMAT),
    Mutation("leftovers are cleared", "commit.py", "                disk.remove(entry)\n    except", "                pass\n    except", FORMAT),
    Mutation("checksums of tensors", "reader.py", "    if check:\n        source.check(view)\n", "", f"{FORMAT} {DAMAGE}"),
    Mutation("checksums of documents and headers", "manifest.py", "    part.check(data)\n", "", DAMAGE),
    Mutation("the manifest's checksum", "manifest.py", "        if text != _text(manifest | {\"checksum\": found}) or found != checksum(_text(manifest)):", "        if False:", DAMAGE),
    Mutation("sizes", "manifest.py", "        if (size := _size(folder / name)) != file[\"size\"]:", "        if (size := _size(folder / name)) < 0:", DAMAGE),
    Mutation("byte ranges that cover the file", "manifest.py", "complete = all(_covered(file) for file in files.values())", "complete = True", DAMAGE),
    Mutation("names are no paths", "manifest.py", "        if not PLAIN.fullmatch(name):", "        if not name:", DAMAGE),
    Mutation("links are not read", "manifest.py", "    if not stat.S_ISREG(status.st_mode):", "    if False:", DAMAGE),
    Mutation("the header's length", "../fragments.py", "(length := int.from_bytes(header[:8], \"little\")) != len(header) - 8", "(length := len(header) - 8) < 0", DAMAGE),
    Mutation("all ranks agree on damage", "resume.py", "    if not all(verdicts):", "    if False:", READING),
    Mutation("the lock", "lock.py", "            fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)", "            pass", LOCK),
    Mutation("the lock within a process", "lock.py", "        _held[self.identity] = self\n", "", LOCK),
    Mutation("the lock is no link", "lock.py", "os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW", "os.O_RDWR | os.O_CREAT", LOCK),
    Mutation("heartbeats", "lock.py", "                os.utime(self.descriptor)\n", "", LOCK),
    Mutation("waiting for a heartbeat", "lock.py", "os.stat(self.path).st_mtime > first", "False", LOCK),
    Mutation("a lock that was taken over", "commit.py", "        check_held(out)\n", "", LOCK),
    Mutation("what was written is read back", "commit.py", "            all_or_none(lambda: _read_back(unfinished, some), group)\n", "", READING),
    Mutation("reading is tried again", "manifest.py", "for pause in (*PAUSES, None):", "for pause in (None,):", READING),
    Mutation("short reads go on", "../disk.py", "        data, offset = data[count:], offset + count", "        break", READING),
    Mutation("files are no links", "../disk.py", "flags | os.O_NOFOLLOW | os.O_CLOEXEC", "flags | os.O_CLOEXEC", f"{DAMAGE} {ERRORS}"),
    Mutation("files are new", "../disk.py", "os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE", "os.O_CREAT | os.O_CLOEXEC, FILE_MODE", f"{DAMAGE} {ERRORS} {SAVER}"),
    Mutation("the copy", "commit.py", "copy = Plan(content.layouts, self.arena.copy(content.chunks))", "copy = content", SAVER),
    Mutation("one save at a time", "commit.py", "        self.wait()\n        content", "        content", SAVER),
    Mutation("errors in the background are asked for", "commit.py", "        return self.saving is not None and self.saving.done() and self.saving.exception() is not None\n", "        return False\n", SAVER),
    Mutation("errors of the owner of a file", "writer.py", "    if failures:\n        raise failures[0]\n", "", SAVER),
]  # fmt: skip


def main(words: list[str]) -> int:
    """Try the mutations whose names hold one of *words*, or all."""
    survivors = []
    for mutation in MUTATIONS:
        if words and not any(word in mutation.name for word in words):
            continue
        begin = time.monotonic()
        caught = killed(mutation)
        print(f"{'caught  ' if caught else 'SURVIVES'} {mutation.name} ({time.monotonic() - begin:.0f} s)", flush=True)
        survivors += [] if caught else [mutation.name]
    return 1 if survivors else 0


def killed(mutation: Mutation) -> bool:
    """Whether a test fails under *mutation*."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("bigvision", "tests", "recipes", "ds_configs", "launch", "benchmarks", "pyproject.toml"):
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy)
        path = copy / PACKAGE / mutation.file
        text = path.read_text(encoding="utf-8")
        assert text.count(mutation.old) == 1, (
            f"{mutation.name}: {mutation.file} holds its text {text.count(mutation.old)} times"
        )
        path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        tests = [os.path.normpath(f"tests/checkpoint/{name}") for name in mutation.tests.split()]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not long", "-p", "no:cacheprovider", *tests]
        environment = os.environ | {"PYTHONPATH": folder}
        try:
            result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=HANGS)
        except subprocess.TimeoutExpired:
            return True
        if result.returncode not in (0, 1):
            raise RuntimeError(f"{mutation.name}: the tests did not run:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
        return result.returncode == 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
