"""All tests, a file at a time: ``make test-all`` takes hours, may be stopped, and goes on with the files that have not passed.

The outcome of each file is kept in ``build/tests``, under a digest of the Python version and of the files that tests read, so
that a change begins anew. Two files run side by side, then one by one those that need the machine to themselves.

    python -m tests.parts [FOLDER OR FILE ...] [-- ARGUMENTS OF PYTEST]
"""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import needs_the_machine

ROOT = Path(__file__).parent.parent
SIDE_BY_SIDE = 2
READ = (".ci", "benchmarks", "bigvision", "docs", "ds_configs", "launch", "recipes", "tests")
"""The folders that tests read, beside the files of the project's own folder."""
PASSED = (0, 5)
"""Exit codes of pytest: 5 is that nothing was selected."""


@dataclass
class Record:
    """The outcomes of parts, ``{"code": 0, "seconds": 12.5}`` each, in a file that every outcome is written to at once."""

    folder: Path
    key: str
    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.exists():
            self.outcomes = json.loads(self.path.read_text())

    @property
    def path(self) -> Path:
        return self.folder / f"{self.key}.json"

    def log(self, part: str) -> Path:
        """What pytest printed about *part*."""
        return self.folder / "logs" / f"{part.replace('/', '.')}.txt"

    def passed(self, part: str) -> bool:
        return part in self.outcomes and self.outcomes[part]["code"] in PASSED

    def put(self, part: str, code: int, seconds: float) -> None:
        self.outcomes[part] = {"code": code, "seconds": round(seconds, 1)}
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.outcomes, indent=1))
        new.replace(self.path)

    def summary(self, parts: list[str]) -> str:
        """What has passed, what has failed and what is left of *parts*, with the time that each took."""
        failed = [part for part in parts if part in self.outcomes and not self.passed(part)]
        left = [part for part in parts if part not in self.outcomes]
        lines = []
        for title, some in (
            ("passed", [part for part in parts if self.passed(part)]), ("failed", failed), ("left", left),
        ):  # fmt: skip
            seconds = sum(self.outcomes[part]["seconds"] for part in some if part in self.outcomes)
            lines.append(f"{title}: {len(some)} parts" + f", {seconds / 60:.1f} minutes" * (title != "left"))
            for part in some:
                time_spent = f"{self.outcomes[part]['seconds']:9.1f} s  " if part in self.outcomes else "  "
                lines.append(time_spent + part + f"  ({self.log(part)})" * (title == "failed"))
        return "\n".join(lines)


def digest(root: Path, arguments: list[str]) -> str:
    """Of all that decides what a part's outcome is."""
    total = hashlib.sha256(repr((sys.version, arguments)).encode())
    files = [path for path in root.iterdir() if path.is_file()]
    files += [path for name in READ for path in (root / name).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    for path in sorted(files):
        total.update(repr((str(path.relative_to(root)), hashlib.sha256(path.read_bytes()).hexdigest())).encode())
    return total.hexdigest()[:12]


def find(root: Path, named: list[str]) -> list[str]:
    """The test files below the *named* folders and files, as paths from *root*."""
    found = []
    for name in named or ["tests"]:
        path = root / name
        found += [path] if path.is_file() else sorted(path.rglob("test_*.py"))
    return [str(path.relative_to(root)) for path in dict.fromkeys(found)]


def run(parts: list[str], side_by_side: int, arguments: list[str], root: Path, record: Record) -> None:
    """Run pytest on each part; when this is interrupted, those that run are ended and count as left."""
    waiting, running = list(parts), dict[subprocess.Popen[bytes], tuple[str, float]]()
    try:
        while waiting or running:
            while waiting and len(running) < side_by_side:
                part = waiting.pop(0)
                with record.log(part).open("wb") as log:
                    command = [sys.executable, "-m", "pytest", part, *arguments]
                    process = subprocess.Popen(command, cwd=root, stdout=log, stderr=subprocess.STDOUT)
                running[process] = part, time.monotonic()
            time.sleep(0.1)
            for process in [process for process in running if process.poll() is not None]:
                part, start = running.pop(process)
                record.put(part, process.returncode, time.monotonic() - start)
                outcome = "passed" if record.passed(part) else f"FAILED, see {record.log(part)}"
                print(f"{time.monotonic() - start:9.1f} s  {part}  {outcome}", flush=True)
    finally:
        for process in running:
            process.send_signal(signal.SIGINT)  # pytest then ends the programs that its tests have started
        for process in running:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Run what is left of the named parts, or of all; returns 0 where all of them have passed, now or earlier."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parts, for_pytest = find(root, arguments[:split]), arguments[split + 1 :]
    if not parts:
        print(f"error: no tests in {' '.join(arguments[:split])}", file=sys.stderr)
        return 2
    record = Record(root / "build" / "tests", digest(root, for_pytest))
    (record.folder / "logs").mkdir(parents=True, exist_ok=True)
    left = [part for part in parts if not record.passed(part)]
    left.sort(key=record.outcomes.__contains__)  # what has failed comes last
    print(f"{len(left)} of {len(parts)} parts to run; outcomes in {record.path}", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    code = 130
    try:
        for alone in (False, True):
            some = [part for part in left if needs_the_machine(root / part) == alone]
            run(some, 1 if alone else SIDE_BY_SIDE, for_pytest, root, record)
        code = 0 if all(map(record.passed, parts)) else 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on with what is left", flush=True)
    print(record.summary(parts), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
