"""What the page of a run is made of: curves, a size that has a limit, texts without secrets; mistakes in its commands."""

from __future__ import annotations

import base64
import io
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

from bigvision import checkpoint
from bigvision.cli import main
from bigvision.config import Config
from bigvision.data import Batch
from bigvision.monitor.curves import RAW, Curves
from bigvision.monitor.examples import Examples
from bigvision.monitor.report import CLASSES, RunFolder, page
from bigvision.monitor.reporter import Reporter, grouped
from bigvision.redact import redacted, without_secrets
from bigvision.tasks import Task
from tests.distributed import run_ranks
from tests.recipes import recipe, run

MOST = 2_000_000
"""Bytes of a page."""


def write_records(path: Path, steps: int, fields: int = 12) -> np.ndarray:
    """Records of a run of *steps*, with *fields* of random numbers; returns those of the first."""
    values = np.random.default_rng(0).standard_normal((steps, fields)) * 1e-3
    names = ["loss", *(f"field_{number}" for number in range(1, fields))]
    with path.open("w") as file:
        for step, row in enumerate(values.tolist(), start=1):
            file.write(json.dumps({"step": step, "samples": step * 256} | dict(zip(names, row))) + "\n")
    return values[:, 0]


def test_curves_are_read_on_and_keep_the_extremes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    steps = 2 * RAW + 100
    values = write_records(path, steps, fields=2)
    content = path.read_bytes()
    whole, growing = Curves(path), Curves(tmp_path / "growing.jsonl")
    whole.update()
    growing.update()  # a file that is not there yet
    for end in (1000, 100_001, len(content) - 7, len(content)):
        growing.path.write_bytes(b"") if not growing.path.exists() else None
        with growing.path.open("ab") as file:
            file.write(content[growing.path.stat().st_size : end])  # in the middle of a line
        growing.update()
    x, y = whole.series["loss"].points(1000)
    assert growing.series["loss"].points(1000) == (x, y), "it does not matter when the file was read"
    assert len(x) <= 1000 and x == sorted(x) and (x[0], x[-1]) == (1, steps)
    assert all(values[step - 1] == value for step, value in zip(x, y)), "no value is made up"
    width = 1
    while len({step // width for step in range(1, steps + 1)}) > 499:
        width *= 2
    kept = dict(zip(x, y))
    for begin in range(0, steps, width):
        inside = [values[step - 1] for step in range(max(1, begin), min(begin + width, steps + 1))]
        found = [value for step, value in kept.items() if begin <= step < begin + width]
        assert (min(inside), max(inside)) == (min(found), max(found))
    # A rollback puts a shorter file in its place; a kill leaves half a line, which the next start ends.
    checkpoint.replace(growing.path, content[:300] + b'\n[1]\n{"step": 9, "loss": 5.0}\n{"step": 10, "lo')
    growing.update()
    assert growing.series["loss"].y[-1] == 5.0 and growing.step == 9 and growing.lines < 10


def full_of_everything(out: Path, steps: int, fields: int) -> dict[str, Any]:
    """The data of a run folder in which everything is as large as it may be."""
    write_records(out / "metrics.jsonl", steps, fields)
    with (out / "metrics.jsonl").open("a") as file:
        for step in range(1, 1500):
            for event in ({"not_finite": {"0": list(range(50))}}, {"spike": {"loss": 1.0}}, {"rolled_back": {"from_step": 1}}):
                file.write(json.dumps({"step": step} | event) + "\n")
            file.write(json.dumps({"step": step, "val_loss": 0.1 / step, "val_top1": 0.123456789012345}) + "\n")
    classes = [{"class": f"{number} " + "x" * 300, "samples": 50, "top1": number / 1e4} for number in range(5000)]
    (out / "evaluation.json").write_text(json.dumps({"step": steps, "metrics": {"loss": 0.1}, "classes": classes}))
    image = "data:image/jpeg;base64," + "A" * 12_000
    images = [{"sample": n, "image": image, "drawn": image, "target": image, "facts": {}} for n in range(8)]
    (out / "examples.json").write_text(json.dumps({"step": steps, "images": images}))
    with (out / "starts.jsonl").open("w") as file:
        for start in range(1, 300):
            file.write(json.dumps({"time": "now", "start": start, "step": start, "ranks": 16384}) + "\n")
            file.write(json.dumps({"time": "now", "crash": start, "rank": 1, "error": "x" * 500}) + "\n")
    ranks = grouped([[rank % 2, rank, rank * 7, 0] for rank in range(16_384)])
    facts = {
        "layout": {"strategy": "fsdp", "mesh": {}, "ranks": ranks, "stages": []},
        "memory": grouped([[n] for n in range(16_384)]),
    }
    (out / "report.json").write_text(json.dumps(facts))
    return RunFolder(out).data()


def test_a_page_stays_small_whatever_a_run_has(tmp_path: Path) -> None:
    data = full_of_everything(tmp_path, RAW + 100, fields=24)
    assert data["step"] == RAW + 100 and len(data["evaluation"]["classes"]) == CLASSES
    assert data["evaluation"]["classes"][0]["class"].startswith("0 "), "the worst"
    assert data["counts"]["skipped"] == 1499 and 200 <= sum(one["kind"] == "skipped" for one in data["events"]) <= 400
    assert MOST / 4 < len(page([data], "x")) < MOST and len(page([data] * 2, "x")) > MOST / 4


@pytest.mark.long
def test_a_page_of_a_run_of_a_million_steps_stays_small(tmp_path: Path) -> None:
    data = full_of_everything(tmp_path, 1_000_000, fields=12)
    assert data["step"] == 1_000_000 and data["series"]["loss"]["count"] == 1_000_000
    assert len(page([data], "x")) < MOST


@pytest.mark.parametrize(
    "text, shown",
    [
        ("https://alice:hunter22@host:8080/x?a=1&token=abcdef#b", "https://***@host:8080/x?a=1&token=***#b"),
        (
            "s3://key:p@ss@bucket/x and http://b/?X-Amz-Signature=123&z=2",
            "s3://***@bucket/x and http://b/?X-Amz-Signature=***&z=2",
        ),
        ("Authorization: Bearer abc.def-ghi", "Authorization: Bearer ***"),
        ("the token hf_abcdefghijklmnopqrst is wrong", "the token *** is wrong"),
        ("WANDB_API_KEY=abcdefgh1234, password: 'hunter22'", "WANDB_API_KEY=***, password: '***'"),
        ("error with plain-secret-value inside", "error with *** inside"),
        (
            "imagefolder:/home/alice/photos + 0.5*parquet:/scratch/alice/x",
            "imagefolder:~/photos + 0.5*parquet:/scratch/$USER/x",
        ),
        ("/home/alice", "~"),
        ("file:///home/alice/x, alice@store:/data, /home/alicette", "file:///home/$USER/x, ***@store:/data, /home/alicette"),
        ("distill: tokens, global_pool: token, class_token", "distill: tokens, global_pool: token, class_token"),
        ("nothing: 3 of 4", "nothing: 3 of 4"),
    ],
)
def test_texts_lose_secrets_and_the_name_of_the_user(text: str, shown: str) -> None:
    environment = {"HOME": "/home/alice", "USER": "alice", "LOGNAME": "alice", "MY_SECRET": "plain-secret-value"}
    with patch.dict(os.environ, environment):
        assert redacted(text) == shown
        assert redacted("/Users/bob/x", strict=True) == "/Users/***/x" and redacted("/Users/bob/x") == "/Users/bob/x"
        tree = {"options": {"api_key": "abc", "depth": 3, "class_token": True}, "list": [text]}
        assert redacted(tree) == {"options": {"api_key": "***", "depth": 3, "class_token": True}, "list": [shown]}
        assert without_secrets("/home/alice/x") == "/home/alice/x"


def test_a_recipe_with_the_home_folder_is_read_as_it_was(tmp_path: Path) -> None:
    """run.yaml has no user's name, and is a recipe still."""
    from bigvision.config import load_config

    with patch.dict(os.environ, {"HOME": "/home/alice", "USER": "alice"}):
        config = load_config({"out": "/scratch/alice/runs", "data": {"root": "/home/alice/data"}})
        saved = redacted(config.to_dict())
        assert (saved["out"], saved["data"]["root"]) == ("/scratch/$USER/runs", "~/data")
        assert load_config(saved) == config


@pytest.mark.parametrize(
    "command, said",
    [
        ("report", "report: 0 runs are named"),
        ("compare RUN", "compare: 1 runs are named: name two or more"),
        ("report RUN RUN", "report: 2 runs are named"),
        ("compare RUN RUN/../run", "is named twice"),
        ("report nowhere", "report: nowhere is not a folder: name the output folder of a run"),
        ("compare RUN EMPTY", "has no records in metrics.jsonl: name the output folder of a run"),
        ("report DAMAGED", "has no records in metrics.jsonl"),
        ("report FOLDERED", "metrics.jsonl cannot be read: Is a directory"),
        ("report RUN/step-00000001", "is a checkpoint, not the folder of a run: name"),
        ("report RUN --out nowhere/x.html", "cannot be written: No such file or directory: name another file with --out"),
        ("report RUN --output x", "report: unknown option --output"),
    ],
)
def test_a_mistake_in_a_command_is_one_line(
    command: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("run/step-00000001", "empty", "damaged", "foldered/metrics.jsonl"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (tmp_path / "damaged/metrics.jsonl").write_bytes(b'{"step": 1\n\x00\xff\n{"step": "one"}\n')
    before = sorted(tmp_path.rglob("*"))
    arguments = re.sub(r"[A-Z]{3,}", lambda match: match[0].lower(), command).split()
    assert main(arguments if len(arguments) > 1 else [*arguments, "--out", "x.html"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error, error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_page_that_cannot_be_written_is_a_warning_once(tmp_path: Path) -> None:
    said: list[str] = []
    runtime: Any = SimpleNamespace(is_main=True)
    monitor: Any = SimpleNamespace(say=said.append, peaks=[])
    made = Reporter(Config(out=str(tmp_path)), runtime, monitor, None)
    made.folder = RunFolder(tmp_path)
    (tmp_path / "report.html").mkdir()
    for _ in range(2):
        made._write()
    assert len(said) == 1 and "report.html cannot be written, and the run goes on" in said[0]
    (tmp_path / "report.html").rmdir()
    made._write()
    assert (tmp_path / "report.html").exists() and len(said) == 1


def test_a_run_without_a_report_writes_none_and_trains_alike(tmp_path: Path) -> None:
    plain = {"train": {"steps": 2, "eval_every": 1, "global_batch": 6, "micro_batch": 6}}
    found = [
        run(recipe(tmp_path / str(report), "small", monitor={"every": 1, "report": report}, **plain))
        for report in (True, False)
    ]
    assert found[0] == found[1]
    names = [{path.name for path in (tmp_path / str(report)).iterdir()} for report in (True, False)]
    assert names[0] - names[1] == {"report.html", "report.json", "examples.json"}


class Masks(Task):
    """Predicts the class 1 in the upper half, and can draw it."""

    target = "mask"

    def predict(self, scores: Any, classes: Any, top: int = 1) -> list[dict[str, Any]]:
        return [{"prediction": score.argmax(0).to(torch.uint8)} for score in scores]

    def draw(self, image: torch.Tensor, row: Any) -> torch.Tensor:
        return torch.where(torch.as_tensor(row["prediction"]).bool(), torch.tensor([255, 0, 0])[:, None, None], image).to(
            torch.uint8
        )


def test_masks_are_drawn_on_a_few_images_of_all_of_the_data(tmp_path: Path) -> None:
    runtime: Any = SimpleNamespace(data_rank=0, is_main=True, pipeline_ranks=1)
    examples = Examples(Masks(), ["sky", "ground"], runtime, count=4, batches=10)
    outputs = torch.zeros(6, 2, 16, 16)
    outputs[:, 1, :8] = 1
    said: list[str] = []
    for number in range(10):
        masks = torch.zeros(6, 16, 16, dtype=torch.long)
        valid = torch.tensor([False, True, True, True, True, True])
        batch = Batch(torch.full((6, 3, 16, 16), 90, dtype=torch.uint8), masks, torch.arange(6) + 6 * number, valid)
        if (also := examples.take(batch)) is not None:
            for part, some in zip(batch.split(4), outputs.split(4)):  # as a pipeline's stage sees it
                also(some, part)
    examples.write(tmp_path, 7, said.append)
    found = json.loads((tmp_path / "examples.json").read_text())
    assert found["step"] == 7 and [one["sample"] for one in found["images"]] == [1, 19, 37, 55] and said == []
    colours = []
    for name in ("image", "drawn", "target"):
        picture = Image.open(io.BytesIO(base64.b64decode(found["images"][0][name].partition(",")[2])))
        colours.append([picture.getpixel((8, 3)), picture.getpixel((8, 12))])
    assert all(abs(value - 90) < 8 for pixel in colours[0] + colours[2] + colours[1][1:] for value in pixel)
    assert colours[1][0][0] > 200 and max(colours[1][0][1:]) < 60


def test_a_task_whose_predictions_fail_is_a_warning(tmp_path: Path) -> None:
    runtime: Any = SimpleNamespace(data_rank=0, is_main=True, pipeline_ranks=1)
    examples, said = Examples(Masks(), [], runtime, count=2, batches=1), []
    batch = Batch(
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 8, 8), torch.arange(2), torch.ones(2, dtype=torch.bool)
    )
    also = examples.take(batch)
    assert also is not None
    also({"boxes": torch.zeros(2, 4)}, batch)
    examples.write(tmp_path, 1, said.append)
    assert len(said) == 1 and said[0].startswith("warning: no images of the evaluation in the report: ")


def report_of(out: str, strategy: str) -> dict[str, Any]:
    plain = recipe(
        Path(out), "small", parallel={"strategy": strategy}, monitor={"every": 1, "report": True}, train={"steps": 2}
    )
    run(plain)
    return {}


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["fsdp", "pipeline", "zero2"])
def test_a_page_of_several_ranks_has_what_each_one_holds(strategy: str, tmp_path: Path) -> None:
    run_ranks(report_of, 2, str(tmp_path), strategy)
    data = RunFolder(tmp_path).data()
    ranks, stages = data["layout"]["ranks"], data["layout"]["stages"]
    assert ranks[-1][1] == 1 and data["memory"][-1][1] == 1 and all(rank[3] and rank[4] for rank in ranks)
    assert len(stages) == (2 if strategy == "pipeline" else 0) and len(data["examples"]["images"]) == 8
    assert [one["facts"]["prediction"] for one in data["examples"]["images"]]
