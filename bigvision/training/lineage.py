"""Which run a folder holds: its data, its classes, where it came from, and what was changed on the way.

Each checkpoint has the data's fingerprints in progress.json (``data``) and the class names in config.json (``label_names``).
``OUT/lineage.json`` has both as they are now, and a history: a line for the first start, for each origin that
``checkpoint.resume`` named, and for each change of the configuration.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bigvision import checkpoint
from bigvision.checkpoint import Checkpoint
from bigvision.config import Config, leaves
from bigvision.data.report import classes_difference, difference, fingerprint
from bigvision.errors import UserError
from bigvision.runtime import Runtime, all_or_none, from_main
from bigvision.training.data import Data

NAME = "lineage.json"
SHOWN = 6
"""Changed keys that a line names; lineage.json has all."""
UNCOMPARED = ("out", "checkpoint.resume", "checkpoint.allow")

Say = Callable[[str], None]


def applied_origin(config: Config, runtime: Runtime, say: Say) -> str:
    """Return what this start resumes: ``checkpoint.resume``, or "auto" where an earlier start has gone to that origin already.

    A named origin (a step, a path, "never") applies once: a launcher gives a restart the same command, and a restart has to go
    on from the newest checkpoint of this run. Another origin than the last one that was named applies again.
    """
    resume, out = config.checkpoint.resume, Path(config.out)

    def decide() -> tuple[str, str]:
        if not runtime.is_main or resume == "auto":
            return resume, ""
        origin = next((line for line in reversed(read_lineage(out).get("history", [])) if "resume" in line), {})
        steps = checkpoint.steps_in(out)
        if origin.get("resume") != resume or (resume != "never" and not steps):
            return resume, ""
        if not resume.isdecimal() and resume != "never" and steps[0] <= origin["step"]:
            return resume, ""  # nothing newer was saved
        if resume.isdecimal():
            again = f"to go back once more, name the folder: --checkpoint.resume {out / checkpoint.folder_name(int(resume))}"
        elif resume != "never" and Path(resume).absolute().parent.resolve() == out.resolve():
            again = f"to go back once more, name the step: --checkpoint.resume {origin['step']}"
        else:
            again = f"to start {'afresh' if resume == 'never' else 'from there'} once more, choose another --out"
        newest = f"goes on from its newest checkpoint, {checkpoint.folder_name(steps[0])}" if steps else "starts afresh"
        since = f"was named on {origin['time']} and applies once"
        return "auto", f"checkpoint.resume: {resume} {since}, so this run {newest}; {again}"

    resume, text = from_main(all_or_none(decide))
    if text:
        say(text)
    return resume


def data_facts(config: Config, data: Data, runtime: Runtime) -> dict[str, Any]:
    """The fingerprints of the training and validation data, on every rank."""

    def describe() -> dict[str, Any] | None:
        if not runtime.is_main:
            return None
        specs = {"train": (data.train, config.data.train), "val": (data.val, config.data.val)}
        return {name: fingerprint(source, spec.startswith("python:")) for name, (source, spec) in specs.items()}

    return from_main(all_or_none(describe))


def check_same_run(found: Checkpoint, facts: dict[str, Any], classes: list[str], allow: str | None, say: Say) -> None:
    """Compare the data and classes with those that *found* was trained on.

    Args:
        facts: see `data_facts`.
        allow: ``checkpoint.allow``.

    Raises:
        UserError: they are others, and *allow* does not name them.
    """
    before, changed = found.progress.get("data"), dict[str, list[str]]()
    if not isinstance(before, dict):
        say(f"{found.folder} does not record its data: they are taken to be the same")
    else:
        for split, now in facts.items():
            if text := difference(before.get(split, {}), now):
                changed.setdefault("data", []).append(f"data.{split} has {text}")
    known = found.card.get("label_names")
    if isinstance(known, list) and (text := classes_difference(known, classes)):
        changed["classes"] = [f"data.train has {text}"]
    allowed = names_in(allow)
    for name in allowed:
        for text in changed.pop(name, []):
            say(f"{text} than {found.folder} was trained on: checkpoint.allow: {allow}")
    if not changed:
        return
    texts = [text for some in changed.values() for text in some]
    flag = ",".join(name for name in ("data", "classes") if name in allowed or name in changed)
    raise UserError(
        f"checkpoint.resume: {found.folder} was trained on something else: {'; '.join(texts)}: choose another --out, "
        f"or go on with --checkpoint.allow {flag}"
    )


def names_in(allow: str | None) -> list[str]:
    """The names in ``checkpoint.allow``."""
    return [name.strip() for name in (allow or "").split(",") if name.strip()]


def record(
    config: Config, facts: dict[str, Any], classes: list[str], found: Checkpoint | None, resume: str, say: Say
) -> None:  # fmt: skip
    """Write ``OUT/lineage.json`` once the run stands where it goes on. Called on rank 0.

    Args:
        found: what was restored.
        resume: what `applied_origin` returned.
    """
    out = Path(config.out)
    history = read_lineage(out).get("history", [])
    changed = _changes(found.progress.get("config"), config) if found else {}
    line: dict[str, Any] = {"step": found.progress["step"] if found else 0}
    if resume != "auto":
        line["resume"] = resume
    if found:
        line["from"] = found.folder.name if found.folder.parent == out else str(found.folder)
    if changed:
        line["changed"] = changed
        named = [f"{key} {_short(old)} -> {_short(new)}" for key, (old, new) in list(changed.items())[:SHOWN]]
        more = f" and {len(changed) - SHOWN} more keys" if len(changed) > SHOWN else ""
        say(f"changed since {found.folder.name if found else ''}: {', '.join(named)}{more}")
    last = {key: value for key, value in history[-1].items() if key != "time"} if history else None
    # A restart before the next checkpoint is the same line again.
    if not history or (("resume" in line or changed) and line != last):
        history.append({"time": time.strftime("%Y-%m-%d %H:%M:%S"), **line})
    content = {"data": facts, "classes": classes, "history": history}
    checkpoint.replace(out / NAME, (json.dumps(content, indent=1) + "\n").encode())


def read_lineage(out: Path) -> dict[str, Any]:
    """What ``OUT/lineage.json`` says; nothing where it is missing, or somebody has edited it beyond recognition."""
    try:
        found = json.loads((out / NAME).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    history = found.get("history") if isinstance(found, dict) else None
    if not isinstance(history, list) or not all(isinstance(line, dict) and "time" in line for line in history):
        return {}
    return found


def _changes(before: Any, config: Config) -> dict[str, tuple[Any, Any]]:
    """The keys that both configurations have and whose values differ, with both values."""
    now, changed = config.to_dict(), {}
    for key, _ in leaves(Config):
        *sections, name = key.split(".")
        old, new = before, now
        for section in sections:
            old, new = old.get(section) if isinstance(old, dict) else None, new[section]
        if key not in UNCOMPARED and isinstance(old, dict) and name in old and old[name] != new[name]:
            changed[key] = (old[name], new[name])
    return changed


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
