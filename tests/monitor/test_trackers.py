"""Trackers get what metrics.jsonl gets, over restarts too; none of them can hold up or end a run."""

from __future__ import annotations

import json
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import bigvision
from bigvision.config import load_config
from bigvision.monitor import trackers
from tests.recipes import lines, recipe


def plain(out: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    usual: dict[str, Any] = {"train": {"steps": 12, "eval_every": 3}, "checkpoint": {"every": 4}}
    return recipe(out, "small", **{name: usual.get(name, {}) | keys for name, keys in (usual | sections).items()})


def broken(event: bigvision.Event) -> None:
    if event.kind == "step" and event.step == 5:
        raise ZeroDivisionError


def run_and_resume(out: Path, names: list[str]) -> tuple[list[int], list[dict[str, Any]]]:
    """A run that crashes some steps after the checkpoint of step 4, and the start that finishes it.

    Returns the steps that the first one logged, and all lines in the end.
    """
    config = load_config(plain(out, monitor={"trackers": names}))
    with pytest.raises(ZeroDivisionError):
        bigvision.train(config, callbacks=[broken])
    steps = [line["step"] for line in lines(out) if "loss" in line]
    return steps, bigvision.train(config).history


class Kept(bigvision.Tracker):
    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def begin(self, config: dict[str, Any], step: int) -> None:
        self.calls.append(("begin", (config["train"]["steps"], step)))

    def record(self, line: dict[str, Any]) -> None:
        self.calls.append(("record", line))

    def evaluation(self, line: dict[str, Any]) -> None:
        self.calls.append(("evaluation", line))

    def event(self, line: dict[str, Any]) -> None:
        self.calls.append(("event", line))

    def end(self, status: str) -> None:
        self.calls.append(("end", status))


class Failing(Kept):
    def record(self, line: dict[str, Any]) -> None:
        raise ConnectionError(f"no network\nat step {line['step']}")


class Hanging(Kept):
    def record(self, line: dict[str, Any]) -> None:
        threading.Event().wait(60)


def test_own_trackers_get_all_lines_and_cannot_hold_up_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "TO_END", {"finished": 1.0, "stopped": 0.5, "failed": 1.0})
    kept, failing, hanging, whole = Kept(), Failing(), Hanging(), Kept()
    config = load_config(plain(tmp_path))
    with pytest.raises(ZeroDivisionError):
        bigvision.train(config, callbacks=[broken], trackers=[kept, failing, hanging])
    assert [name for name, _ in kept.calls[:7]] == ["begin", *["record"] * 3, "evaluation", "record", "record"]
    assert kept.calls[0] == ("begin", (12, 0)) == failing.calls[0] and kept.calls[-1] == ("end", "failed")
    assert len(failing.calls) == 1
    said = capsys.readouterr().out
    what = "tracker Failing has failed in record and gets nothing more: ConnectionError: no network at step 1"
    assert said.count(what) == 1 and said.count("tracker Hanging did not end in time") == 1
    bigvision.train(config, trackers=[whole])
    assert whole.calls[0] == ("begin", (12, 4)) and whole.calls[-1] == ("end", "finished")
    assert [line for _, line in kept.calls[1:6]] + [line for _, line in whole.calls[1:-1]] == lines(tmp_path)


def test_a_slow_tracker_misses_lines_and_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "WAITING", 2)
    said: list[str] = []
    fed = trackers.Trackers()
    fed.start([Hanging()], said.append)
    for step in range(9):
        fed.put("record", {"step": step})
    assert len(said) == 1 and "tracker Hanging is 2 lines behind" in said[0]


def scalars_of_tensorboard(out: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert events.Tensors("config/text_summary"), "as text"
    return {name: [(scalar.step, scalar.value) for scalar in events.Scalars(name)] for name in events.Tags()["scalars"]}


def scalars_of_mlflow(out: Path) -> dict[str, list[tuple[int, float]]]:
    from mlflow import MlflowClient

    client, id = MlflowClient(), json.loads((out / "trackers.json").read_text())["mlflow"]
    (found,) = client.search_runs([client.get_experiment_by_name("bigvision").experiment_id])
    assert found.info.run_id == id and found.info.status == "FINISHED", "one run, which the restart went on with"
    assert found.data.params["model.name"] == "vit_tiny_patch16_224" and found.data.params["train.steps"] == "12"
    names = found.data.metrics
    return {name: [(one.step, one.value) for one in client.get_metric_history(id, name)] for name in names}


def wandb_records(path: Path) -> Iterator[Any]:
    """Of the file of an offline run: protobufs in LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    data, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        part, at = part + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            part = b""
            yield record


def scalars_of_wandb(out: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    files = sorted(out.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    id = json.loads((out / "trackers.json").read_text())["wandb"]
    assert [path.name for path in files] == [f"run-{id}.wandb"] * 2, "the same run twice"
    for path in files:
        deadline = time.monotonic() + 60  # wandb's own process writes what is left
        while not any(record.HasField("exit") for record in wandb_records(path)) and time.monotonic() < deadline:
            time.sleep(0.1)
        for record in wandb_records(path):
            if record.WhichOneof("record_type") == "run":
                assert (record.run.host, record.run.git.remote_url, record.run.run_id) == ("", "", id)
            assert record.WhichOneof("record_type") not in ("environment", "output", "output_raw", "files")
            row = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            for name, value in row.items():
                if "/" in name:
                    found.setdefault(name, []).append((row["step"], value))
    return found


@pytest.mark.parametrize(
    ("name", "scalars", "twice"),
    [("tensorboard", scalars_of_tensorboard, False), ("mlflow", scalars_of_mlflow, True), ("wandb", scalars_of_wandb, True)],
)
def test_libraries_have_the_values_of_metrics_over_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, scalars: Any, twice: bool
) -> None:
    """Steps come twice: TensorBoard drops the first ones, the others have both, those that count last."""
    pytest.importorskip(name)
    monkeypatch.setattr(trackers, "TO_END", dict.fromkeys(trackers.TO_END, 120.0))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    first, history = run_and_resume(tmp_path / "out", [name])
    found = scalars(tmp_path / "out")
    assert first[-1] > 5 and [step for step, _ in found["train/loss"]] == [*(first if twice else range(1, 5)), *range(5, 13)]
    for mine, theirs in (("loss", "train/loss"), ("lr", "train/lr"), ("val_top1", "val/top1")):
        values = {line["step"]: line[mine] for line in history if mine in line}
        assert dict(found[theirs]) == pytest.approx(values, rel=1e-6), theirs


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the library, which needs an older pillow than the tests."""
    calls: list[tuple[str, Any]] = []
    library = ModuleType("trackio")
    run = SimpleNamespace(log=lambda values, step: calls.append((step, values)))
    library.init = lambda **keys: calls.append(("init", keys)) or run  # type: ignore[attr-defined]
    library.finish = lambda: calls.append(("finish", None))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", library)
    monkeypatch.setattr(trackers, "find_spec", lambda name: SimpleNamespace(origin="trackio.py"))
    _, history = run_and_resume(tmp_path / "out", ["trackio"])
    starts = [keys for name, keys in calls if name == "init"]
    assert starts[0]["name"] == starts[1]["name"] and starts[1]["resume"] == "allow" and calls[-1] == ("finish", None)
    values = {step: values["train/loss"] for step, values in calls if values and "train/loss" in values}
    assert values == {line["step"]: line["loss"] for line in history if "loss" in line}


@pytest.mark.parametrize(
    ("monitor", "given", "said"),
    [
        ({"trackers": ["tensorbord"]}, [], r"monitor\.trackers: unknown tracker 'tensorbord'; did you mean 'tensorboard'"),
        ({"trackers": ["neptune"]}, [], r"unknown tracker 'neptune'; known are tensorboard, wandb, mlflow, trackio"),
        ({"trackers": ["wandb", "wandb"]}, [], r"monitor\.trackers: \[wandb, wandb\] names a tracker twice"),
        ({"trackers": ["trackio"]}, [], r"^monitor\.trackers: trackio is not installed: .*pip install 'bigvision\[trackio\]'$"),
        ({}, [Kept], r"trackers: the class Kept is no tracker: give instances of subclasses of bigvision\.Tracker"),
    ],
)
def test_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, monitor: dict[str, Any], given: list[Any], said: str
) -> None:
    """Before a model is built. A folder named as the library, such as what wandb writes where it runs, is no library."""
    (tmp_path / "trackio").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(bigvision.UserError, match=said):
        bigvision.train(plain(tmp_path / "out", monitor=monitor), trackers=given)
    assert not (tmp_path / "out").exists()
