"""The page of a run in a browser: it shows what the run's files have, fits a telephone, goes dark and obeys keys."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from bigvision import train
from bigvision.cli import main
from bigvision.training import Event
from tests.data.photo_files import write_photos
from tests.monitor.browser import Browser, find_browser
from tests.recipes import lines, recipe
from tests.training.planted import planted

NAMES = ("<script>", "a&amp;b", "<img src=x onerror=document.title='hit'>")
SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567", "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyz",
    "HTTPS_PROXY": "http://alice:hunter22@proxy:3128", "USER": "alice", "LOGNAME": "alice",
}  # fmt: skip
CURVE = "charts.find(c => c.title === {title!r}).plot.data"
"""uPlot's own data: [steps, values of one line, ...]."""
COLOURS = "new Set(charts[0].plot.ctx.getImageData(0, 0, charts[0].plot.ctx.canvas.width, 200).data).size"
FRAMES = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
"""Waits until what was changed is drawn."""
ROWS = "[...document.querySelector(`section[aria-label='{}']`).querySelectorAll('tbody tr')]"
CELLS = ROWS + ".map(row => [...row.children].map(cell => cell.textContent))"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    opened = Browser(find_browser())
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run with two restarts, a skipped batch, evaluations, and classes whose names are HTML."""
    home = tmp_path_factory.mktemp("home") / "alice"
    write_photos(home / "photos/train", dict.fromkeys(NAMES, 8), (32, 32))
    write_photos(home / "photos/val", dict.fromkeys(NAMES, 6), (32, 32))
    out = home / "runs/<b>first"
    data = {name: f"imagefolder:{home}/photos/{name}" for name in ("train", "val")}
    plain = recipe(
        out, "small", data=data, train={"steps": 9, "global_batch": 6, "micro_batch": 6, "eval_every": 3},
        checkpoint={"every": 1, "keep": 2}, monitor={"every": 1, "report": True},
    )  # fmt: skip

    def crash_at(step: int) -> Any:
        def crash(event: Event) -> None:
            if event.kind == "step" and event.step == step:
                raise RuntimeError(f"no answer from http://alice:hunter22@store:80/x?token=s3cr3ts3cr3t of {home}/photos")

        return crash

    with patch.dict(os.environ, SECRETS | {"HOME": str(home)}), planted("loss", [4]):
        for step in (2, 6):
            with pytest.raises(RuntimeError):
                train(plain, callbacks=[crash_at(step)])
        train(plain)
        yield out


def test_a_page_shows_what_the_files_of_the_run_have(browser: Browser, told: Path) -> None:
    """Two restarts, a skipped batch, evaluations, and a class that is named <script>."""
    page = told / "report.html"
    browser.open(page)
    records, value = lines(told), browser.value
    for title, name in (("Loss", "loss"), ("Learning rate", "lr"), ("Gradient norm", "grad_norm"), ("top1", "val_top1")):
        expected = {line["step"]: line[name] for line in records if line.get(name) is not None}
        steps, shown, *_ = value(CURVE.format(title=title))
        assert {step: number for step, number in zip(steps, shown) if number is not None} == expected, title
    steps, _, shown = value(CURVE.format(title="Loss"))
    assert dict(zip(steps, shown))[9] == records[-1]["val_loss"]
    assert value(COLOURS) > 10, "the canvas is not empty"
    marks = value("[...document.querySelectorAll('.timeline circle')].map(c => [c.dataset.kind, Number(c.dataset.step)])")
    starts = [json.loads(line) for line in (told / "starts.jsonl").read_text().splitlines()]
    assert sum(kind == "restart" for kind, _ in marks) == 2
    assert [step for kind, step in marks if kind == "restart"] == [line["step"] for line in starts if "start" in line][1:]
    assert sum(kind == "crash" for kind, _ in marks) == 2 and ["skipped", 5] in marks
    assert {step for kind, step in marks if kind == "evaluation"} == {3, 6, 9}
    assert {step for kind, step in marks if kind == "checkpoint"} >= {1, 4, 7, 8, 9}, "also those that were removed"
    classes = json.loads((told / "evaluation.json").read_text())["classes"]
    assert [row[0] for row in value(CELLS.format("Classes"))][: len(NAMES)] == [row["class"] for row in classes]
    assert {row["class"] for row in classes} == set(NAMES)
    assert [row[4] for row in value(CELLS.format("Starts"))][-1] == "finished"
    assert value("[...document.images].map(image => image.complete && image.naturalWidth > 0)") == [True] * 8
    configuration = {row[0]: row[1:] for row in value(CELLS.format("Configuration"))}
    assert configuration["train.steps"] == ["9", "the given mapping"] and "seed" not in configuration
    # Nothing of the run became part of the page's code, and nothing was loaded.
    assert value("document.title") == "<b>first · bigvision" and value("document.querySelectorAll('script').length") == 3
    assert value("document.querySelectorAll('b b, img[src=x]').length") == 0
    assert {url.partition(":")[0] for url in browser.requests} == {"file", "data"} and browser.errors == []
    for name in ("report.html", "run.yaml", "starts.jsonl", "report.json"):
        text = (told / name).read_text()
        found = [secret for secret in ("hunter22", "s3cr3ts3cr3t", "alice", *list(SECRETS.values())[:2]) if secret in text]
        assert not found, (name, found)


def test_a_page_fits_a_telephone_goes_dark_and_obeys_keys(browser: Browser, told: Path) -> None:
    value = browser.value
    browser.open(told / "report.html", width=360, dark=True, phone=True)
    assert value("document.documentElement.scrollWidth") <= 360
    assert value("Math.max(...charts.map(c => c.div.getBoundingClientRect().right))") <= 360
    paper = "getComputedStyle(document.body).backgroundColor"
    assert sum(map(int, re.findall(r"\d+", value(paper))[:3])) < 100
    light = "charts[0].plot.series[1].stroke()"
    dark_line = value(light)
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
    value(FRAMES)
    assert sum(map(int, re.findall(r"\d+", value(paper))[:3])) > 700 and value(light) != dark_line

    for _ in range(10):
        browser.press("Tab")
        if value("document.activeElement === charts[0].div"):
            break
    assert value("document.activeElement === charts[0].div && getComputedStyle(charts[0].div).outlineStyle") == "solid"
    shown = "charts.map(c => [c.plot.scales.x.min, c.plot.scales.x.max])"
    whole = value(shown)
    browser.press("+")
    zoomed = value(shown)
    assert whole[0] == [0, 9] and zoomed == [[2.25, 6.75]] * len(zoomed), "all charts together"
    browser.press("ArrowRight")
    assert value(shown)[0] == pytest.approx([3.15, 7.65])
    assert value("document.querySelectorAll('.timeline circle[data-step=\"9\"]').length") == 0
    browser.press(".")
    loss = next(line["loss"] for line in lines(told) if line["step"] == 4)
    reading = value("document.querySelector('.reading').textContent")
    assert reading.startswith("step 4: loss ") and float(reading.split()[-1]) == pytest.approx(loss, rel=1e-4)
    browser.press("t")
    value(FRAMES)
    cells = "[...charts[0].div.parentNode.querySelectorAll('details tbody tr')].map(r => r.children[0].textContent)"
    assert value(cells) == [str(step) for step in range(1, 10) if step != 5]
    browser.press("0")
    assert value(shown) == whole
    for attribute in ("aria-label", "role", "tabindex"):
        assert value(f"charts.every(c => c.div.hasAttribute('{attribute}'))")


def test_runs_are_laid_over_each_other_and_reports_written_again(
    browser: Browser, told: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(told, other, ignore=shutil.ignore_patterns("step-*", "report.*"))
    plan = {"memory": {"peak": 2**30}, "images_per_second": 123.5, "step_seconds": 0.1}
    (other / "plan.json").write_text(json.dumps(plan))
    facts = json.loads((told / "report.json").read_text())
    (other / "report.json").write_text(json.dumps({"memory": facts["memory"]}))
    parts = {"matrix products": 3.0, "idle": 1.0}
    summary = {
        "steps": [4, 5],
        "step": 4.0,
        "categories": parts,
        "slowest": 0,
        "ranks": {"0": {"step": 4.0, "categories": parts}},
    }
    (other / "profile").mkdir()
    (other / "profile/summary.json").write_text(json.dumps(summary))
    (other / "run.yaml").write_text((other / "run.yaml").read_text().replace("lr: 0.001", "lr: 0.002"))
    page = tmp_path / "both.html"
    assert main(["compare", str(told), str(other), "--out", str(page)]) == 0
    assert capsys.readouterr().out.strip() == str(page)
    browser.open(page)
    labels = browser.value("charts[0].found.map(one => one.label)")
    assert labels == ["<b>first: loss", "<b>first: val_loss", "other: loss", "other: val_loss"]
    first, second = browser.value("[1, 3].map(n => charts[0].plot.data[n])")
    assert first == second and len(first) == 8
    rows = browser.value("[...document.querySelectorAll('section:last-of-type tbody tr')].map(r => r.children[0].textContent)")
    assert rows == ["optim.lr"] and browser.errors == []
    assert browser.value("document.documentElement.scrollWidth <= innerWidth")
    assert main(["report", str(other)]) == 0
    browser.open(other / "report.html")
    assert browser.value("charts.length") > 5 and browser.errors == []
    rows = browser.value(CELLS.replace("'{}'", '"{}"').format("Where a step's time went"))
    assert rows[0] == ["matrix products", "3", "75.0 %", "3", "75.0 %"] and rows[-1][0] == "a step"
    assert browser.value("charts.find(c => c.title === 'Images per second').found.map(one => one.label)")[1] == "plan"
    assert "% of plan" in browser.value("document.querySelector('.bar').textContent")
