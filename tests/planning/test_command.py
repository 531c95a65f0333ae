"""`bigvision plan`: its table, its JSON, and one line for each mistake."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bigvision.cli import main
from bigvision.errors import Exit

SMALL = ["--model.name", "test_vit", "--model.image_size", "32", "--model.num_classes", "4", "--train.global_batch", "16"]


def test_a_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *SMALL, "--parallel.compile", "false", "--hardware", "2xH200", "--json"]) == Exit.DONE
    found = json.loads(capsys.readouterr().out)
    assert {row["strategy"] for row in found["rows"]} >= {"ddp", "fsdp", "zero2"} and found["hardware"]["name"] == "2xH200"
    speeds = [row["time"]["images_per_second"] for row in found["rows"]]
    peaks = [row["memory"]["peak"] for row in found["rows"]]
    assert speeds == sorted(speeds, reverse=True) and all(peak > 0 for peak in peaks)


@pytest.mark.long
def test_a_plan_from_python_is_that_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    import bigvision

    assert main(["plan", *SMALL, "--hardware", "2xH200", "--json"]) == Exit.DONE
    peaks = [row["memory"]["peak"] for row in json.loads(capsys.readouterr().out)["rows"]]
    given = {"model.image_size": 32, "model.num_classes": 4, "train.global_batch": 16}
    same = bigvision.plan(model="test_vit", hardware="2xH200", **given)
    assert [row.memory.peak for row in same.rows] == peaks


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--hardware", "8xH20"], ["H20", "H200"]),
        (["--hardware", "8xH200", "--hardware", "cpu"], ["--hardware", "name one"]),
        (["--hardware"], ["--hardware", "a value is missing"]),
        (["--hardware", "3xH200"], ["train.global_batch: 16", "3 data-parallel ranks", "15 or 18"]),
        (["--hardware", "8xH200", "--parallel.replicas", "3"], ["parallel.replicas: 3", "8 ranks"]),
        (["--hardware", "8xH200", "--train.micro_batch", "large"], ["train.micro_batch: large", "auto"]),
        (["--calibrate", "--json"], ["--calibrate", "--json"]),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    others = [] if "--calibrate" in arguments else SMALL
    assert main(["plan", *others, *arguments]) == Exit.MISTAKE
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words), line


@pytest.mark.long
def test_what_fits_nowhere_says_what_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = tmp_path / "tiny.yaml"
    tiny.write_text(
        "device: {name: tiny, memory: 100MB, flops: {bf16: 1.0e+12, fp32: 1.0e+12}, bandwidth: 1.0e+10}\nranks: 2\n"
    )
    assert main(["plan", *SMALL, "--hardware", str(tiny)]) == Exit.MISTAKE
    shown = capsys.readouterr()
    assert "nothing fits" in shown.out and "GiB on rank" in shown.out
    assert shown.err.startswith("error: nothing fits on 2xtiny: ") and shown.err.count("\n") == 1


@pytest.mark.long
@pytest.mark.parametrize(("ranks", "seconds"), [(1024, 20), (16384, 40)])
def test_thousands_of_ranks_are_planned_in_seconds(ranks: int, seconds: float) -> None:
    asked = ["--model.name", "vit_7b_patch16_dinov3", "--train.global_batch", str(ranks), "--hardware", f"{ranks // 8}x8xH200"]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "bigvision.cli", "plan", *asked, "--json"], capture_output=True, text=True, check=True
    )
    took = time.monotonic() - began
    found = json.loads(done.stdout)
    assert found["hardware"]["ranks"] == ranks and {"fsdp", "pipeline"} <= {row["strategy"] for row in found["rows"]}
    assert took < seconds
