"""``bigvision report`` and ``bigvision compare``: the page of a run written again, and one page of several runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bigvision.errors import Exit, UserError
from bigvision.launchers.commands import take
from bigvision.redact import redacted

USAGE = """usage: bigvision report RUN [--out FILE]
       bigvision compare RUN RUN ... [--out FILE]

report writes the page of a run's folder again, by default RUN/report.html; compare lays the curves of several runs over each
other and lists what their configurations have differently, by default in compare.html."""


def run(command: str, arguments: Sequence[str]) -> int:
    """Write the page and name it; returns the exit code."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE)
        return Exit.DONE if arguments else Exit.MISTAKE
    given, names = take(arguments, ["--out"])
    if unknown := [name for name in names if name.startswith("-")]:
        raise UserError(f"{command}: unknown option {unknown[0]}: it has --out FILE")
    if command == "report" and len(names) != 1:
        raise UserError(f"report: {len(names)} runs are named: name one, or use bigvision compare")
    if command == "compare" and len(names) < 2:
        raise UserError(f"compare: {len(names)} runs are named: name two or more, or use bigvision report")
    folders = [str(Path(name).expanduser().resolve()) for name in names]
    if twice := [name for name, folder in zip(names, folders) if folders.count(folder) > 1]:
        raise UserError(f"{command}: {twice[-1]} is named twice: name each run once")

    from bigvision.monitor.report import NAME, open_run, write_page

    runs = [open_run(command, name, len(names)) for name in names]
    labels = _labels(folders)
    for one, label in zip(runs, labels):
        one["name"] = label
    usual = Path(names[0]).expanduser() / NAME if command == "report" else Path("compare.html")
    path = Path(given[-1][1]).expanduser() if given else usual
    write_page(command, path, runs, " and ".join(labels) if len(labels) < 4 else f"{len(labels)} runs")
    print(path)
    return Exit.DONE


def _labels(folders: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that differ from each other."""
    parts, length = [Path(folder).parts for folder in folders], 1
    while len({part[-length:] for part in parts}) < len(parts) and length < max(map(len, parts)):
        length += 1
    return [redacted("/".join(part[-length:]).lstrip("/"), strict=True) for part in parts]
