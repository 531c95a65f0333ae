"""What a model predicts for images: a row for each, in their order, whatever the number of ranks and the strategy."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import bigvision
from bigvision.config import load_config
from bigvision.engine import Engine
from bigvision.errors import UserError
from bigvision.launchers.evaluate import predict_subject
from bigvision.runtime import start
from bigvision.tasks import Classify, Task
from bigvision.training.build import build_model
from bigvision.training.prediction import Prediction
from bigvision.training.tables import open_table
from tests.cli.test_mistakes import refused
from tests.distributed import run_ranks
from tests.recipes import recipe, run
from tests.training.test_evaluation import images

NAMES = ["<script>alert(1)</script>", "a, b", "cut\nhere", '=1+"2"']
"""Names of classes that a table, a shell or a page may take for something else."""
COUNT = 11


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images in folders, one of which is torn, and one is a text."""
    root = tmp_path_factory.mktemp("pictures")
    images(root, {f"{'ab'[number % 2]}/{number}, x.png": None for number in range(COUNT)})
    (root / "a" / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    (root / "notes.txt").write_text("none")
    return root


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a model of the `NAMES`."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "classes.json").write_text(json.dumps(NAMES))
    np.savez(folder / "data.npz", images=np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8),
             labels=np.arange(24) % len(NAMES))  # fmt: skip
    data = {"train": f"arrays:{folder}/data.npz", "val": f"arrays:{folder}/data.npz", "classes": f"{folder}/classes.json"}
    run_ranks(run, 1, recipe(folder / "out", "small", data=data, train={"steps": 2}))
    return folder / "out" / "step-00000002"


def predicted(step: str, source: str, out: str, keys: dict[str, Any]) -> list[dict[str, Any]]:
    return bigvision.predict(step, source, out=out or None, top_k=2, **keys)


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def test_a_row_for_each_image_in_every_format(tmp_path: Path, step: Path, pictures: Path) -> None:
    rows = bigvision.predict(step, pictures, top_k=2)
    assert list(rows[0]) == ["sample", "prediction", "probability", "prediction2", "probability2", "error"]
    assert [row["sample"] for row in rows] == sorted(row["sample"] for row in rows) and len(rows) == COUNT + 1
    (torn,) = [row for row in rows if row["error"] is not None]
    assert torn["sample"] == "a/torn.jpg" and torn["prediction"] is None
    assert {row["prediction"] for row in rows if row is not torn} <= set(NAMES)
    assert all(row["probability"] >= row["probability2"] > 0 for row in rows if row is not torn)
    for name in ("rows.csv", "rows.json", "rows.jsonl"):
        assert bigvision.predict(step, pictures, out=tmp_path / name, top_k=2) == []
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == rows
    written = rows_of(tmp_path / "rows.csv")
    assert [row["sample"] for row in written] == [row["sample"] for row in rows]
    assert [row["prediction"] or None for row in written] == [row["prediction"] for row in rows]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.csv", "rows.json", "rows.jsonl"], "nothing else is left"


def test_tables_keep_names_as_they_are(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    scores = torch.eye(len(NAMES)).softmax(1)
    rows = [{"sample": str(n)} | row | {"error": None} for n, row in enumerate(Classify().predict(scores, NAMES, top=4))]
    for name in ("t.csv", "t.parquet", "t.json", "t.jsonl"):
        table = open_table(tmp_path / name)
        table.write(rows[:1])
        table.write(rows[1:])
        table.finish()
    assert [row["prediction"] for row in rows_of(tmp_path / "t.csv")] == NAMES
    assert parquet.read_table(tmp_path / "t.parquet").to_pylist() == rows
    assert json.loads((tmp_path / "t.json").read_text()) == rows
    table = open_table(tmp_path / "t.json")
    table.discard()
    assert json.loads((tmp_path / "t.json").read_text()) == rows and len(list(tmp_path.iterdir())) == 4
    for name in ("none.csv", "none.json", "none.parquet"):
        open_table(tmp_path / name).finish()
    assert json.loads((tmp_path / "none.json").read_text()) == []


def test_predictions_are_those_of_timm(step: Path, pictures: Path) -> None:
    """Opened by timm, the checkpoint gives the same probabilities to the same pixels."""
    import timm

    from bigvision.data import normalize, transform

    model = timm.create_model(f"local-dir:{step}", pretrained=True).eval()
    data = timm.data.resolve_model_data_config(model)
    change = transform("photo", 32, train=False, crop_pct=data["crop_pct"], interpolation=data["interpolation"])
    rows = bigvision.predict(step, pictures / "b")
    for row in rows:
        pixels, _ = change((pictures / "b" / row["sample"]).read_bytes(), None)
        with torch.no_grad():
            scores = model(normalize(pixels[None], data["mean"], data["std"])).softmax(1)[0]
        assert row["prediction"] == NAMES[int(scores.argmax())] and row["probability"] == pytest.approx(
            float(scores.max()), 1e-4
        )
    flipped = bigvision.predict(step, pictures / "b", tta="flip")
    assert [row["probability"] for row in flipped] != [row["probability"] for row in rows]


LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("ranks", "keys"),
    [
        pytest.param(3, {}, id="ddp 3"),
        pytest.param(2, {"parallel.strategy": "pipeline"}, id="pipeline 2"),
        pytest.param(2, {}, id="ddp 2", marks=LONG),
        pytest.param(3, {"parallel.strategy": "fsdp"}, id="fsdp 3", marks=LONG),
        pytest.param(4, {"parallel.strategy": "fsdp", "parallel.replicas": 2}, id="hybrid 2x2", marks=LONG),
        pytest.param(2, {"parallel.strategy": "zero3"}, id="zero3 2", marks=LONG),
        pytest.param(4, {"parallel.strategy": "pipeline", "parallel.stages": 2}, id="sharded stages", marks=LONG),
    ],
)
def test_rows_do_not_depend_on_the_ranks(tmp_path: Path, step: Path, pictures: Path, ranks: int, keys: dict[str, Any]) -> None:
    small = {"train.micro_batch": 2}  # several batches on each rank, the last of them short
    run_ranks(predicted, 1, str(step), str(pictures), str(tmp_path / "one.csv"), small)
    run_ranks(predicted, ranks, str(step), str(pictures), str(tmp_path / "several.csv"), small | keys)
    one, several = rows_of(tmp_path / "one.csv"), rows_of(tmp_path / "several.csv")
    assert len(one) == COUNT + 1
    for row, other in zip(one, several, strict=True):
        numbers = [float(each.pop(name) or 0) for each in (row, other) for name in ("probability", "probability2")]
        assert row == other and numbers[:2] == pytest.approx(numbers[2:], rel=1e-5)
    if not keys:
        assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "several.csv").read_bytes()


class Halves(Task):
    """Predicts a mask of an image's brighter half."""

    target, cuttable = "mask", True

    def predict(self, scores: Any, classes: Any, top: int = 1) -> list[dict[str, Any]]:
        return [{"prediction": torch.full((4, 6), int(score.argmax()), dtype=torch.int32)} for score in scores]

    def draw(self, image: torch.Tensor, row: Any) -> torch.Tensor:
        return image.clone().fill_(int(row["prediction"][0, 0]))


def test_masks_are_files_beside_the_table(tmp_path: Path, step: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigvision.launchers.evaluate.build_task", lambda config: Halves())
    monkeypatch.setattr("bigvision.training.evaluation.build_task", lambda config: Halves())
    bigvision.predict(step, pictures, out=tmp_path / "masks")
    rows = rows_of(tmp_path / "masks" / "predictions.csv")
    files = {str(path.relative_to(tmp_path / "masks")) for path in (tmp_path / "masks").rglob("*.png")}
    assert files == {row["prediction"] for row in rows if not row["error"]} and len(files) == COUNT
    with Image.open(tmp_path / "masks" / rows[0]["prediction"]) as image:
        assert image.size == (6, 4) and image.mode == "L"
    write_again = Prediction(str(pictures), tmp_path / "masks", draw=tmp_path / "drawn")
    predict_subject(str(step), [], write_again, False, print)
    assert {str(path.relative_to(tmp_path / "drawn")) for path in (tmp_path / "drawn").rglob("*.png")} == files
    with Image.open(tmp_path / "drawn" / rows[0]["prediction"]) as image:
        assert image.size == (32, 32) and image.mode == "RGB"
    # Of two images whose names differ in their ending alone each has a file.
    images(tmp_path / "alike", {"x.png": None, "x.webp": None})
    bigvision.predict(step, tmp_path / "alike", out=tmp_path / "alike masks")
    assert {path.name for path in (tmp_path / "alike masks").glob("*.png")} == {"x.png.png", "x.webp.png"}
    with pytest.raises(UserError, match="masks are predicted: name a folder"):
        bigvision.predict(step, pictures, out=tmp_path / "x.csv")


def test_an_evaluation_has_no_memory_for_an_optimizer(tmp_path: Path) -> None:
    for trains in (True, False):
        with start("cpu", 1, 1) as runtime:
            config = load_config(recipe(tmp_path, "small"))
            engine, _, _ = build_model(config, 10, runtime, steps=1, say=print, restored=True, trains=trains)
            groups = {fragment.group for fragment in engine.fragments()}
            assert groups == ({"model", "optimizer"} if trains else {"model"}) and isinstance(engine, Engine)
            engine.close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["predict: name a model and images", "--out FILE"]),
        (["STEP", "PICTURES"], ["--out: name the file"]),
        (["STEP", "PICTURES", "--out", "x.xlsx"], ["--out: 'x.xlsx'", ".csv, .json, .jsonl, .parquet"]),
        (["STEP", "PICTURES", "--out", "x.csv", "--top-k", "0"], ["--top-k: '0'", "from 1 on"]),
        (["STEP", "PICTURES", "--out", "x.csv", "--tta", "ten-crop"], ["--tta: 'ten-crop'", "none or flip"]),
        (["STEP", "PICTURES", "--out", "x.csv", "--draw", "y"], ["--draw: Classify has nothing to draw"]),
        (["STEP", "PICTURES", "--out", "x.csv", "--ema"], ["--ema:", "has no averaged weights"]),
        (["STEP", "PICTURES/nowhere", "--out", "x.csv"], ["predict: no file or folder", "nowhere"]),
        (["STEP", "PICTURES/notes.txt/..", "--out", "x.csv"], ["predict:"]),
        (["nothing", "PICTURES", "--out", "x.csv"], ["predict: nothing is not a step folder of a run, and not a timm model"]),
        (["STEP", "EMPTY", "--out", "x.csv"], ["predict:", "holds no images"]),
    ],
)
def test_what_it_cannot_do(tmp_path: Path, step: Path, pictures: Path, arguments: list[str], words: list[str]) -> None:
    (tmp_path / "empty").mkdir()
    for name, path in (("STEP", step), ("PICTURES", pictures), ("EMPTY", tmp_path / "empty")):
        arguments = [argument.replace(name, str(path)) for argument in arguments]
    refused(["predict", *arguments], *words)
