"""What a run's folder tells the next start: how earlier starts ended, and which data and origin the run has.

``OUT/starts.jsonl``, the restart log, has a line for each start, for each rank's own error, and for each orderly end.

Each checkpoint has the data's fingerprints in progress.json (``data``) and the class names in config.json (``label_names``).
``OUT/lineage.json`` has both as they are now, and a history: a line for the first start, for each origin that
``checkpoint.resume`` named, and for each change of the configuration.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash
import yaml
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from bigvision import checkpoint
from bigvision.checkpoint import Checkpoint
from bigvision.config import Config, check_batches, leaves, micro_batch
from bigvision.config.values import spell
from bigvision.data.report import classes_difference, difference, fingerprint
from bigvision.engine import Engine
from bigvision.errors import Stopped, UserError, lacks_memory, one_line
from bigvision.models import Blueprint
from bigvision.monitor import append_line, read_lines
from bigvision.redact import redacted, without_secrets
from bigvision.runtime import RankFailure, Runtime, all_or_none, from_main
from bigvision.training.data import Data

STARTS = "starts.jsonl"
OF_OTHERS = ("gloo", "NCCL", "Connection")
"""Words of errors that only report the loss of another rank."""
LINEAGE = "lineage.json"
SHOWN = 6
"""Changed keys that a line names; lineage.json has all."""
DECISIVE = (
    "model.name", "model.options", "model.image_size", "model.num_classes", "model.trainable", "model.frozen_dtype",
    "model.lora", "optim.name", "optim.momentum", "optim.betas",
)  # fmt: skip
"""Keys that decide which tensors a checkpoint has, of which shapes and types."""
UNCOMPARED = ("out", "checkpoint.resume", "checkpoint.allow")

Say = Callable[[str], None]


class Starts:
    """The restart log."""

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self.path = Path(config.out) / STARTS
        self.faults, self.runtime = config.faults, runtime
        # Whoever changes the run has reason to hope.
        self.config = xxhash.xxh3_64_hexdigest(json.dumps(config.to_dict(), sort_keys=True).encode())
        self.engine: Engine | None = None
        """Says at which step an error came; None while it is built."""
        self.smaller: int | None = None
        """The micro-batch that the next start should have, after an error for lack of memory."""

    def begin(self, step: int) -> int | None:
        """Log a start that goes on from *step*, on rank 0. A `UserError` where earlier ones failed in the same way too often.

        Returns the micro-batch that starts before this one came to for lack of memory; None where none did.
        """
        starts = self._read()
        last = (starts[-1]["crash"], self.config, None) if starts else ()
        same = _in_a_row(starts, lambda start: (start["crash"], start["config"], start["smaller"]) == last)
        fix = f"fix that, then change the configuration or remove {self.path} to start again"
        if starts and starts[-1]["crash"] is not None and same >= self.faults.same_crash:
            where = "before its first step" if starts[-1]["crash"] < 0 else f"at step {starts[-1]['crash']}"
            raise UserError(
                f"faults.same_crash: {same} starts in a row crashed {where}, the last one with {starts[-1]['error']}: {fix}"
            )
        stuck = _in_a_row(starts, lambda start: (start["step"], start["config"]) == (step, self.config) and not start["ended"])
        if stuck > self.faults.restarts:
            raise UserError(f"faults.restarts: {stuck} starts in a row from step {step} came to no newer checkpoint: {fix}")
        self._write({"start": len(starts) + 1, "step": step, "ranks": self.runtime.world_size, "config": self.config})
        sizes = [start["smaller"] for start in starts if start["config"] == self.config and start["smaller"] is not None]
        return min(sizes, default=None)

    @contextmanager
    def logged(self) -> Iterator[None]:
        """Log how what runs in here ends, on every rank."""
        try:
            yield
        except UserError:
            self._end("mistake")  # not counted as a crash: whoever fixes it has reason to hope
            raise
        except (Stopped, KeyboardInterrupt):
            self._end("stopped")
            raise
        except Exception as error:
            # That another rank is gone or has failed is logged by that rank, if it still can.
            repeats = isinstance(error, (RankFailure, dist.DistError)) or any(mark in str(error) for mark in OF_OTHERS)
            if not repeats and self.path.exists():
                step = self.engine.step if self.engine is not None else -1
                words = redacted(f"{type(error).__name__}: {one_line(error)}")[:500]
                fix = {"micro_batch": self.smaller} if self.smaller is not None else {}
                self._write({"crash": step, "rank": self.runtime.rank, "error": words} | fix)
            raise
        self._end("done")

    def _end(self, how: str) -> None:
        if self.runtime.is_main:
            self._write({"end": how})

    def _write(self, line: dict[str, Any]) -> None:
        append_line(self.path, {"time": time.strftime("%Y-%m-%d %H:%M:%S")} | line)

    def _read(self) -> list[dict[str, Any]]:
        """The starts, each with where it crashed first (-1 while it was built; None: it did not, or nobody could say)."""
        starts: list[dict[str, Any]] = []
        for line in read_lines(self.path):
            try:
                if "start" in line:
                    fresh = {"crash": None, "error": "", "ended": False, "smaller": None}
                    starts.append({"step": line["step"], "config": line["config"]} | fresh)
                elif "crash" in line and starts:
                    if starts[-1]["crash"] is None:
                        starts[-1] |= {"crash": int(line["crash"]), "error": f"rank {line['rank']}: {line['error']}"}
                    if "micro_batch" in line:
                        starts[-1]["smaller"] = int(line["micro_batch"])
                elif "end" in line and starts:
                    starts[-1]["ended"] = True
            except (ValueError, KeyError, TypeError):
                continue  # edited
        return starts


def _in_a_row(starts: list[dict[str, Any]], like: Callable[[dict[str, Any]], bool]) -> int:
    """How many of the last ones are *like* that."""
    return len(list(takewhile(like, reversed(starts))))


@contextmanager
def explain_errors(config: Config, engine: Engine, blueprint: Blueprint, runtime: Runtime, starts: Starts) -> Iterator[None]:
    """Add to this rank's errors what helps: which part of the model it has, and what to do about a lack of memory.

    A rank that runs out of memory in the middle of a pass leaves the others inside collectives, where nothing can be agreed.
    So all ranks end, and the next start reads a smaller micro-batch from the restart log.
    """
    try:
        yield
    except RankFailure:
        raise  # repeats another rank's error
    except Exception as error:
        if isinstance(error, RuntimeError) and engine.place:
            error.args = (f"{engine.place}: {error}",)
        if lacks_memory(error):
            starts.smaller, advice = smaller(config, blueprint, runtime)
            error.args = (f"{one_line(error)}: {advice}",)
            error.again = starts.smaller is not None  # type: ignore[attr-defined]  # for whoever can start the ranks again
        raise


def smaller(config: Config, blueprint: Blueprint, runtime: Runtime) -> tuple[int | None, str]:
    """Half the micro-batch, or the largest below it that the run allows (None: there is none); and advice for the user."""
    size = micro_batch(config, runtime.data_ranks, runtime.pipeline_ranks)
    half = -(-size // 2)
    less = "use parallel.recompute blocks, a strategy that shards more, or more ranks"
    if config.faults.out_of_memory == "stop":
        return None, f"faults.out_of_memory: stop: use halve, or a train.micro_batch below {size}"
    if size == 1:
        return None, f"train.micro_batch: 1 cannot be halved: {less}"
    modules = list(blueprint.module.modules())
    if any(isinstance(module, BatchNorm) or "running_var" in module._buffers for module in modules):
        return None, (
            f"train.micro_batch: {size} is what batch normalisation takes its statistics over, another one trains otherwise: "
            f"choose it yourself, or {less}"
        )
    reasons = []
    for found in range(half, 0, -1):
        if not (reason := refusal(config, found, runtime)):
            return found, f"start again to go on with train.micro_batch {found} instead of {size}"
        reasons.append(reason)
    return None, f"no train.micro_batch below {size} is allowed ({reasons[0]}): {less}"


def refusal(config: Config, size: int, runtime: Runtime) -> str:
    """Why the run cannot have micro-batches of *size* samples; empty where it can."""
    try:
        check_batches(with_micro_batch(config, size), runtime.data_ranks, runtime.pipeline_ranks)
    except UserError as error:
        return str(error)
    return ""


def with_micro_batch(config: Config, size: int) -> Config:
    """*config* with micro-batches of *size* samples."""
    train, parallel = replace(config.train, micro_batch=size), replace(config.parallel, microbatches=None)
    return replace(config, train=train, parallel=parallel)


def earlier_strategy(out: Path, ranks: int) -> str | None:
    """The strategy of a run in *out* on as many *ranks* by a version that had no auto; None where there was none."""
    try:
        before = [line["ranks"] for line in read_lines(out / STARTS) if "start" in line][:-1]
        strategy = yaml.safe_load((out / "run.yaml").read_bytes())["parallel"]["strategy"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None
    return strategy if isinstance(strategy, str) and before[-1:] in ([], [ranks]) else None


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

    Raises `UserError` where they are others and *allow*, ``checkpoint.allow``, does not name them.
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
    allowed = [name.strip() for name in (allow or "").split(",")]
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


def why_other_tensors(found: Checkpoint, config: Config) -> str:
    """Which of the `DECISIVE` keys were others in the run of *found*, which does not fit this one, and what to do."""
    before, now, usual = found.progress.get("config", {}), config.to_dict(), Config().to_dict()
    changed: dict[str, tuple[Any, Any]] = {}
    for section, name in (key.split(".") for key in DECISIVE):
        old = before.get(section, {}).get(name, usual[section][name])  # earlier versions lack some keys
        if old != now[section][name]:
            changed[f"{section}.{name}"] = (old, now[section][name])
    if not changed:
        return ""
    theirs, ours = (", ".join(f"{key}: {spell(pair[side])}" for key, pair in changed.items()) for side in (0, 1))
    weights = f"--model.weights {found.folder}"
    if before.get("model", {}).get("lora"):
        weights = f"those of bigvision export {found.folder} FOLDER (--model.weights FOLDER)"
    return (
        f"its run had {theirs}, this one has {ours}: use the former to go on with it, or begin a new run at its weights with "
        f"{weights} and another --out"
    )


def with_drop_path_mode(config: Config, found: Checkpoint | None) -> Config:
    """*config* with a mode of stochastic depth: where it names none that of the run of *found*, or that of new runs."""
    if config.model.drop_path_mode is not None:
        return config
    mode: Any = "skip"
    if found is not None:
        saved = found.progress.get("config")
        # Earlier versions had masks alone, and no such key.
        mode = (saved if isinstance(saved, dict) else {}).get("model", {}).get("drop_path_mode", "mask")
    return replace(config, model=replace(config.model, drop_path_mode=mode))


def check_same_scale(found: Checkpoint, config: Config) -> None:
    """Raise `UserError` where the adapters of *found* would count more or less in this run than they did in theirs."""
    saved, lora = found.progress.get("config"), config.model.lora
    before = (saved if isinstance(saved, dict) else {}).get("model", {}).get("lora")
    if lora is not None and isinstance(before, dict) and before.get("alpha") != lora.alpha:
        raise UserError(
            f"model.lora.alpha: {lora.alpha:g}, but the adapters of {found.folder} were trained with {before.get('alpha')}: "
            "use that, or another out folder"
        )


def record(
    config: Config, facts: dict[str, Any], classes: list[str], found: Checkpoint | None, resume: str, say: Say
) -> None:  # fmt: skip
    """Write ``OUT/lineage.json`` once *found* was restored; *resume* is what `applied_origin` returned. Called on rank 0."""
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
    checkpoint.replace(out / LINEAGE, (json.dumps(content, indent=1) + "\n").encode())


def read_lineage(out: Path) -> dict[str, Any]:
    """What ``OUT/lineage.json`` says; nothing where it is missing, or somebody has edited it beyond recognition."""
    try:
        found = json.loads((out / LINEAGE).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    history = found.get("history") if isinstance(found, dict) else None
    if not isinstance(history, list) or not all(isinstance(line, dict) and "time" in line for line in history):
        return {}
    return found


def _changes(before: Any, config: Config) -> dict[str, tuple[Any, Any]]:
    """The keys that both configurations have and whose values differ, with both values."""
    now, changed = without_secrets(config.to_dict()), {}
    for key, _ in leaves(Config) if isinstance(before, dict) else ():
        section, _, name = key.rpartition(".")
        old, new = (before.get(section), now[section]) if section else (before, now)
        if key not in UNCOMPARED and isinstance(old, dict) and name in old and old[name] != new[name]:
            changed[key] = (old[name], new[name])
    return changed


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
