"""What an evaluation says beyond its metrics, in the run folder and from the command, with names of any letters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bigvision.errors import UserError
from bigvision.launchers import evaluate
from tests.data.test_several import image
from tests.distributed import run_ranks
from tests.recipes import recipe, run

NAMES = ["<script>alert(1)</script>", "a, b", "new\nline"]


def files(folder: Path, target: str) -> str:
    """Training data, and 7 samples for validation, which divide over no number of ranks."""
    random = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 7)):
        columns: dict[str, Any] = {
            "label": {"one": [NAMES[number % 3] for number in range(count)]},
            "labels": {"tags": [[name for name in NAMES if random.random() < 0.6] for _ in range(count)]},
            "numbers": {"age, years": random.normal(50, 20, count), "<b>": random.normal(0, 1, count)},
        }[target]
        folder.mkdir(exist_ok=True)
        pq.write_table(pa.table({"image": [image(9 * n) for n in range(count)], **columns}), folder / f"{split}.parquet")
    return f"parquet:{folder}" + {"label": "?label=one", "labels": "?label=tags", "numbers": "?label=<b>"}[target]


def evaluated(arguments: list[str]) -> dict[str, float]:
    return evaluate.run(arguments, lambda line: None)


@pytest.mark.parametrize(
    ("name", "target", "more"),
    [("classify", "label", "confusion"), ("multilabel", "labels", "classes"), ("regress", "numbers", "numbers")],
)
def test_reports_of_a_run_and_of_the_command(tmp_path: Path, name: str, target: str, more: str) -> None:
    spec = files(tmp_path / "data", target)
    plain = recipe(
        tmp_path / "out", "small", data={"train": spec, "val": spec, "workers": 0}, task={"name": name}, train={"steps": 3}
    )
    run_ranks(run, 2, plain)
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert report["step"] == 3 and report["samples"] == 72 and report[more]
    step = tmp_path / "out" / "step-00000003"
    card = json.loads((step / "config.json").read_text())
    expected = ["<b>"] if target == "numbers" else sorted(NAMES)
    assert card["label_names"] == expected and ("mean" in card.get("task", {})) == (target == "numbers")
    named = report["numbers"] if target == "numbers" else report["classes"]
    assert [one.get("class", one.get("number")) for one in named] == expected
    if target == "label":
        assert np.array(report["confusion"]).sum() == 7 and [one["samples"] for one in report["classes"]] == [3, 2, 2]
    # The training data may be gone.
    (tmp_path / "data" / "train.parquet").unlink()
    metrics = run_ranks(evaluated, 3, [str(step), "--report", str(tmp_path / "report.json")])[0]
    assert metrics == pytest.approx(report["metrics"], rel=1e-5)
    written = json.loads((tmp_path / "report.json").read_text())
    assert written.pop("metrics") == metrics
    assert str(written.keys()) == str({key: 0 for key in report if key not in ("step", "samples", "metrics")}.keys())
    if target == "label":
        assert written["confusion"] == report["confusion"] and written["classes"] == report["classes"]


def test_a_report_that_cannot_be_written() -> None:
    from bigvision.training import write_report

    with pytest.raises(UserError, match=r"^/nowhere/report.json: the report cannot be written: No such file"):
        write_report(Path("/nowhere/report.json"), {})
