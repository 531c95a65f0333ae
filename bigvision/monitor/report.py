"""The page of a run, or of several: what its folder says, as one HTML file without a server, a network or foreign text as code.

`RunFolder.data` collects what the files of an output folder have; `page` puts it into ``page/page.html`` with the chart library
uPlot. ``page/page.js`` draws. reporter.py writes the page again and again while a run goes on.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import time
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from bigvision import checkpoint
from bigvision.config import Config
from bigvision.config.values import leaves, spell
from bigvision.disk import read_lines
from bigvision.errors import UserError
from bigvision.monitor.curves import Curves, Kind
from bigvision.redact import redacted

NAME = "report.html"
FACTS = "report.json"
"""In the output folder: what the page shows and no other file has (see `Reporter`)."""
EXAMPLES = "examples.json"
"""In the output folder: images of the last evaluation with what was predicted."""
PARTS = Path(__file__).parent / "page"
POINTS = 40_000
"""Points of all curves together, about 28 bytes each, ..."""
OF_ONE = 2_000
"""... and of one curve."""
CLASSES = 1_000
"""Rows of the table of classes: the worst ones."""
LONGEST = 120
"""Characters of a class's name."""
HOW = {"done": "finished", "stopped": "stopped by a signal", "mistake": "ended by a mistake in what was asked for"}


class RunFolder:
    """What the files of an output folder say. They are read again only where they changed."""

    def __init__(self, out: Path, pause: float = 0.0) -> None:
        self.out, self.curves = out, Curves(out / "metrics.jsonl", pause)
        self._configured: tuple[Any, list[list[Any]]] | None = None
        self._read: dict[str, tuple[tuple[int, int], Any]] = {}

    def data(self, facts: dict[str, Any] | None = None, runs: int = 1) -> dict[str, Any]:
        """All that the page of so many *runs* shows of this one. *facts* are what ``report.json`` has.

        An `OSError` where metrics.jsonl cannot be read.
        """
        self.curves.update()
        facts = facts if facts is not None else self._file(FACTS, _json_object)
        assert facts is not None
        starts, kinds = self._file("starts.jsonl", _starts) or [], dict(self.curves.kinds)
        checkpoints = {int(step): when for step, when in facts.get("checkpoints", [])}
        for step in checkpoint.steps_in(self.out):
            checkpoints.setdefault(step, _time_of(self.out / checkpoint.folder_name(step)))
        kinds["checkpoint"] = _kind("checkpoint", ((step, f"saved {when}") for step, when in sorted(checkpoints.items())))
        kinds["restart"] = _kind("restart", ((one["step"], _start_text(one)) for one in starts[1:]))
        kinds["crash"] = _kind("crash", ((one["at"], one["how"]) for one in starts if one["crashed"]))
        most = min(OF_ONE, POINTS // runs // max(1, len(self.curves.series)))
        series = {}
        for name, one in self.curves.series.items():
            x, y = one.points(most)
            series[name] = {"x": x, "y": y, "count": one.count}
        last = starts[-1] if starts else {}
        saved = facts.get("config") or self._file("run.yaml", _yaml_object) or {}
        return {"series": series} | finite(
            {
                "name": redacted(self.out.absolute().name, strict=True),
                "out": redacted(str(self.out), strict=True),
                "written": time.strftime("%Y-%m-%d %H:%M:%S"),
                "state": last.get("how") or "running, or killed",
                "running": not last.get("how"),
                "step": max(self.curves.step, facts.get("step", 0)),
                "steps": facts.get("steps"),
                "events": [event for kind in kinds.values() for event in kind.kept],
                "counts": {name: kind.count for name, kind in kinds.items() if kind.count},
                "starts": starts[-200:],
                "plan": self._file("plan.json", _public_object) or None,
                "choice": self._file("choice.json", _public_object) or None,
                "profile": self._file("profile/summary.json", _profile) or None,
                "layout": facts.get("layout"),
                "memory": facts.get("memory"),
                "evaluation": self._file("evaluation.json", _evaluation),
                "examples": self._file(EXAMPLES, _json_object) or None,
                "config": self._rows(saved, facts.get("origins", {})),
                "environment": redacted(facts.get("environment", []), strict=True),
            }
        )

    def _rows(self, saved: dict[str, Any], origins: dict[str, str]) -> list[list[Any]]:
        """The table of the configuration: made once, since it stays the same while a run goes on."""
        given = (saved, origins)
        if self._configured is None or self._configured[0] != given:
            self._configured = (given, redacted(_config(saved, origins), strict=True))
        return self._configured[1]

    def _file(self, name: str, parse: Callable[[Path], Any]) -> Any:
        """What *parse* makes of a file: again only where it is another than before; {} where it is missing or damaged."""
        path = self.out / name
        try:
            found = path.stat()
            key = (found.st_mtime_ns, found.st_size)
            if name not in self._read or self._read[name][0] != key:
                self._read[name] = (key, parse(path))
            return self._read[name][1]
        except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
            return {}


def _json_object(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_bytes())
    return found if isinstance(found, dict) else {}


def _public_object(path: Path) -> dict[str, Any]:
    return redacted(_json_object(path), strict=True)


def _profile(path: Path) -> dict[str, Any]:
    """Where the time of the profiled steps went: the mean of all ranks, and the slowest one."""
    found = _json_object(path)
    slowest = found.get("ranks", {}).get(str(found.get("slowest")), {})
    kept = {name: found[name] for name in ("steps", "step", "categories", "hidden", "slowest") if name in found}
    return kept | {"slowest_step": slowest.get("step"), "slowest_categories": slowest.get("categories", {})}


def _yaml_object(path: Path) -> dict[str, Any]:
    found = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    return found if isinstance(found, dict) else {}


def _kind(name: str, events: Any) -> Kind:
    found = Kind()
    for step, text in events:
        found.add({"kind": name, "step": step, "text": text})
    return found


def _time_of(folder: Path) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((folder / "manifest.json").stat().st_mtime))
    except OSError:
        return "and removed"


def _starts(path: Path) -> list[dict[str, Any]]:
    """The starts of a run, each with how it ended, "" where nobody could say."""
    starts: list[dict[str, Any]] = []
    for line in read_lines(path):
        if isinstance(line.get("start"), int) and isinstance(line.get("step"), int):
            one = {"start": line["start"], "time": str(line.get("time")), "step": line["step"], "ranks": line.get("ranks")}
            starts.append(one | {"how": "", "crashed": False, "at": line["step"]})
        elif isinstance(line.get("crash"), int) and starts and not starts[-1]["crashed"]:
            smaller = f"; train.micro_batch becomes {line['micro_batch']}" if "micro_batch" in line else ""
            how = f"crashed: rank {line.get('rank')}: {str(line.get('error'))[:400]}{smaller}"
            starts[-1] |= {"how": how, "crashed": True, "at": max(line["crash"], starts[-1]["step"])}
        elif "end" in line and starts and not starts[-1]["crashed"]:
            starts[-1]["how"] = HOW.get(line["end"], str(line["end"]))
    for one, following in pairwise(starts):
        one["how"] = one["how"] or f"ended without a word; start {following['start']} went on from step {following['step']}"
    return redacted(starts, strict=True)


def _start_text(one: dict[str, Any]) -> str:
    return f"start {one['start']} on {one['ranks']} ranks, {one['time']}"


def _evaluation(path: Path) -> dict[str, Any] | None:
    """What the task says of the last evaluation; of many classes the worst."""
    found = _json_object(path)
    if not found:
        return None
    shown: dict[str, Any] = {name: found[name] for name in ("step", "metrics", "confusion", "confused") if name in found}
    classes = [row for row in found.get("classes", []) if isinstance(row, dict)]
    if classes:
        metric = next((name for name in classes[0] if name not in ("class", "samples")), "class")
        if len(classes) > CLASSES:
            known = [row for row in classes if isinstance(row.get(metric), (int, float))]
            classes, shown["of_classes"] = sorted(known, key=lambda row: row[metric])[:CLASSES], len(classes)
        shown["classes"] = [row | {"class": str(row.get("class"))[:LONGEST]} for row in classes]
    if "confused" in shown:
        shown["confused"] = [[str(one)[:LONGEST], str(other)[:LONGEST], number] for one, other, number in shown["confused"]]
    return shown


def _config(saved: dict[str, Any], origins: dict[str, str]) -> list[list[Any]]:
    """[key, value, where it came from, whether it is another than the default] of each key."""
    usual, rows = Config().to_dict(), []
    for key, _ in leaves(Config):
        section, _, name = key.rpartition(".")
        tree, base = (saved.get(section), usual[section]) if section else (saved, usual)
        if isinstance(tree, dict) and name in tree:
            other = tree[name] != base[name]
            rows.append([key, spell(tree[name])[:2000], origins.get(key) or ("set" if other else "default"), other])
    return rows


def page(runs: Sequence[dict[str, Any]], title: str) -> bytes:
    """The HTML of the *runs*, data of `RunFolder`: one is shown whole, several are laid over each other."""
    library, script = _part("uPlot.iife.min.js"), _part("page.js")
    styles = _part("uPlot.min.css") + _part("page.css")
    parts = {
        "title": html.escape(title),
        # Nothing is loaded, and no script runs but these two.
        "policy": f"default-src 'none'; img-src data:; style-src {_hash(styles)}; script-src {_hash(library)} {_hash(script)}",
        "styles": styles,
        "data": _embedded({"runs": list(runs)}),
        "library": library,
        "script": script,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _part("page.html")).encode()


@cache
def _part(name: str) -> str:
    return (PARTS / name).read_text(encoding="utf-8")


@cache
def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _embedded(data: Any) -> str:
    """*data* as JSON inside a script element: nothing in it can end the element."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, default=str)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def finite(value: Any) -> Any:
    """JSON data in which what is not finite is null."""
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def open_run(command: str, name: str, runs: int = 1) -> dict[str, Any]:
    """The data of the run in the folder *name* for a page of so many *runs*, or a `UserError` where it is none."""
    out = Path(name).expanduser()
    hint = "name the output folder of a run, which has metrics.jsonl"
    if not out.is_dir():
        raise UserError(f"{command}: {name} is not a folder: {hint}")
    if checkpoint.is_step_folder(out):
        raise UserError(f"{command}: {name} is a checkpoint, not the folder of a run: name {out.absolute().parent}")
    run = RunFolder(out)
    try:
        data = run.data(runs=runs)
    except OSError as error:
        raise UserError(f"{command}: {name}: {error.filename} cannot be read: {error.strerror}") from error
    finally:
        run.curves.close()
    if not run.curves.lines:
        raise UserError(f"{command}: {name} has no records in metrics.jsonl: {hint}")
    return data


def write_page(command: str, path: Path, runs: Sequence[dict[str, Any]], title: str) -> None:
    """Write the page of the *runs* to *path*, or raise a `UserError`."""
    try:
        checkpoint.replace(path, page(runs, title))
    except OSError as error:
        raise UserError(f"{command}: {path} cannot be written: {error.strerror}: name another file with --out") from error
