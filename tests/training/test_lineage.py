"""Which run a folder holds: the data and classes of its checkpoints, where it came from, and what of it is kept as the best."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import timm
import torch
from PIL import Image

from bigvision import UserError, checkpoint, load_config
from bigvision.checkpoint import Checkpoint
from bigvision.data import MapStyle, Source, open_source
from bigvision.data.report import SIZES, classes_difference, difference, fingerprint
from bigvision.data.sources.arrays import Synthetic
from bigvision.training import read_history
from bigvision.training.run_folder import check_same_run, read_lineage
from tests.distributed import run_ranks
from tests.recipes import recipe

CLASSES = ("cat", "dog", "emu")


def make_images(folder: Path, each: int = 4) -> Path:
    """Image folders train/ and val/ of three classes; no two images are alike."""
    for split in ("train", "val"):
        for number, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for image in range(each):
                Image.new("RGB", (40, 36 + image), (80 * number, 20 * image, 0)).save(folder / split / name / f"{image}.png")
    return folder


# Fingerprints.


def of(folder: Path) -> dict[str, Any]:
    return fingerprint(open_source(f"imagefolder:{folder}", "train"))


def test_the_fingerprint_of_files(tmp_path: Path) -> None:
    before = of(make_images(tmp_path / "a"))
    assert before["samples"] == 12 and {"names", "labels", "sizes"} < before.keys()
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere" / "b", copy_function=shutil.copy)
    os.utime(tmp_path / "elsewhere" / "b" / "train" / "cat" / "0.png", (1, 1))
    assert of(tmp_path / "elsewhere" / "b") == before and str(tmp_path) not in json.dumps(before)

    def changed(change: Any) -> str:
        folder = tmp_path / "changed"
        shutil.copytree(tmp_path / "a", folder)
        change(folder / "train")
        found = difference(before, of(folder))
        shutil.rmtree(folder)
        return found

    assert changed(lambda folder: (folder / "cat" / "1.png").unlink()) == "11 samples instead of 12"
    assert changed(lambda folder: (folder / "cat" / "3.png").rename(folder / "cat" / "9.png")) == "samples of other names"
    moved = changed(lambda folder: (folder / "cat" / "3.png").rename(folder / "dog" / "00.png"))
    assert moved.startswith("samples of other names, other labels")
    larger = lambda folder: Image.effect_noise((64, 64), 9).save(folder / "emu" / "3.png")  # noqa: E731
    assert changed(larger) == "files of other sizes"


class Many(Synthetic):
    """A source that counts what is asked of it."""

    asked = 0

    def size(self, index: int) -> int:
        self.asked += 1
        return index


def test_the_fingerprint_of_other_sources() -> None:
    many = Many(5000, 8)
    assert "sizes" in fingerprint(many) and many.asked == SIZES
    assert fingerprint(Synthetic(30, 8)) != fingerprint(Synthetic(31, 8))
    assert difference(fingerprint(many), fingerprint(Synthetic(5000, 8))) == "", "only what both record is compared"

    class Images:
        classes = CLASSES

        def __len__(self) -> int:
            return 7

        def __getitem__(self, index: int) -> Any:
            raise AssertionError("nothing is read")

    assert fingerprint(MapStyle(Images()), python=True) == {"samples": 7}
    order: Source = Synthetic(30, 8)
    before = fingerprint(order)
    order.classes = list(reversed(order.classes))
    order.label = lambda index, label=order.label: len(order.classes) - 1 - label(index)  # type: ignore[method-assign]
    assert fingerprint(order) == before, "another order of classes changes no label"


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (["cat", "dog", "emu"], ""),
        (["cat", "emu", "dog"], "the classes in another order (class 1 is 'emu', not 'dog')"),
        (["cat", "dog", "fox"], "other classes (class 2 is 'fox', not 'emu')"),
        (["cat", "dog"], "2 classes instead of 3"),
    ],
)
def test_other_classes_and_what_allows_them(now: list[str], said: str, tmp_path: Path) -> None:
    assert classes_difference(list(CLASSES), now) == said
    facts = {"train": {"samples": 3, "labels": "a"}, "val": {"samples": 2}}
    card = {"label_names": list(CLASSES)}
    found = Checkpoint(SimpleNamespace(folder=tmp_path), {"step": 3, "data": facts}, card, True, "auto")  # type: ignore[arg-type]
    told: list[str] = []
    other = facts | {"train": {"samples": 4, "labels": "a"}}
    texts = {"data": "data.train has 4 samples instead of 3", "classes": said or "classes instead"}
    for data, allow in (
        (facts, ""),
        (facts, "data"),
        (facts, "classes"),
        (other, ""),
        (other, "classes"),
        (other, "classes, data"),
    ):
        changed = {"data": data is other, "classes": bool(said)}
        open_ones = [name for name in changed if changed[name] and name not in allow]
        if not open_ones:
            check_same_run(found, data, now, allow or None, told.append)
            continue
        with pytest.raises(UserError) as refused:
            check_same_run(found, data, now, allow or None, told.append)
        words, flag = str(refused.value), [name for name in changed if name in allow or name in open_ones]
        assert words.endswith(f"--checkpoint.allow {','.join(flag)}") and "\n" not in words
        assert all((text in words) == (name in open_ones) for name, text in texts.items())
    told.clear()
    check_same_run(replace(found, progress={"step": 3}, card={}), other, now, None, told.append)
    assert len(told) == 1 and "does not record its data" in told[0]


# Runs.


def go(*plains: dict[str, Any]) -> list[tuple[str, str]]:
    """Train as each of *plains* says: what rank 0 printed, and the user's mistake."""
    from bigvision import train

    found = []
    for plain in plains:
        mistake = ""
        with contextlib.redirect_stdout(io.StringIO()) as said:
            try:
                train(load_config(plain))
            except UserError as error:
                mistake = str(error)
        found.append((said.getvalue(), mistake))
    return found


def with_keys(plain: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    return plain | {name: plain.get(name, {}) | keys for name, keys in sections.items()}


def evaluate_without_training_data(step: Path, missing: str) -> dict[str, float]:
    from bigvision.training import evaluate_checkpoint

    saved = json.loads((step / "progress.json").read_text())["config"]
    config = load_config(saved)
    return evaluate_checkpoint(step, replace(config, data=replace(config.data, train=missing)))


def test_a_run_on_other_data_is_refused_and_on_a_copy_it_goes_on(tmp_path: Path) -> None:
    images = make_images(tmp_path / "pets")
    shutil.copytree(images, copy := tmp_path / "copy")
    shutil.copytree(images, fewer := tmp_path / "fewer")
    (fewer / "train" / "dog" / "2.png").unlink()
    out = tmp_path / "out"

    def on(folder: Path, steps: int, **more: Any) -> dict[str, Any]:
        data = {"train": f"imagefolder:{folder}", "val": f"imagefolder:{folder}", "workers": 0, "augment": False}
        return with_keys(
            recipe(out, data=data, train={"steps": steps, "global_batch": 4, "micro_batch": None}, optim={"lr": 1e-3 * steps}),
            **more,
        )

    (first, _), (second, _), (_, refused), (_, wrong), (allowed, _), (_, longer) = run_ranks(
        go, 1, on(images, 1), on(copy, 2), on(fewer, 3), on(fewer, 3, checkpoint={"allow": "classes"}),
        on(fewer, 3, checkpoint={"allow": "data"}), on(fewer, 2),
    )[0]  # fmt: skip
    assert "resuming" not in first and "step 1 of 2" in second and "changed since step-00000001: " in second
    assert "optim.lr 0.001 -> 0.002" in second
    for text, flag in ((refused, "data"), (wrong, "data,classes")):
        assert "step-00000002 was trained on something else: data.train has 11 samples instead of 12" in text
        assert text.endswith(f"--checkpoint.allow {flag}")
    assert "step 2 of 3" in allowed and "data.train has 11 samples" in allowed
    assert f"would end at step 2, but out: {out} holds a run that is at step 3" in longer and "--out" in longer

    lineage, last = read_lineage(out), out / "step-00000003"
    assert lineage["classes"] == list(CLASSES) and lineage["data"]["train"]["samples"] == 11
    assert [line["step"] for line in lineage["history"]] == [0, 1, 2]
    assert lineage["history"][1]["changed"]["optim.lr"] == [0.001, 0.002]
    assert json.loads((last / "progress.json").read_text())["data"] == lineage["data"]
    assert json.loads((last / "config.json").read_text())["label_names"] == list(CLASSES)
    model = timm.create_model(f"local-dir:{last}", pretrained=True)
    assert model.pretrained_cfg["label_names"] == list(CLASSES)  # type: ignore[index]
    # The val folder alone gives the labels of the checkpoint, also without one of the classes.
    shutil.rmtree(fewer / "train")
    shutil.rmtree(fewer / "val" / "cat")
    assert set(run_ranks(evaluate_without_training_data, 1, last, f"imagefolder:{tmp_path / 'gone'}")[0]) >= {"loss", "top1"}


def test_an_older_checkpoint_is_compared_too(tmp_path: Path) -> None:
    """The newest is of the same data and damaged; the one before it is of others."""
    plain = recipe(tmp_path / "out", train={"steps": 1})
    other = with_keys(plain, data={"train": "synthetic:40x32"}, train={"steps": 2}, checkpoint={"allow": "data"})
    again = with_keys(other, checkpoint={"allow": None}, train={"steps": 3})
    run_ranks(go, 1, plain, other)
    weights = tmp_path / "out" / "step-00000002" / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    (said, refused), (allowed, mistake) = run_ranks(go, 1, again, with_keys(again, checkpoint={"allow": "data"}))[0]
    assert "step-00000002 is damaged" in said and "resuming" not in said
    assert "step-00000001 was trained on something else: data.train has 40 samples instead of 53" in refused
    assert not mistake and "step-00000001, step 1 of 3" in allowed


def test_a_named_origin_applies_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    plain = recipe(out, train={"steps": 3}, checkpoint={"every": 1, "keep": 9})

    def named(resume: Any, steps: int, into: Path = out) -> dict[str, Any]:
        return with_keys(plain, checkpoint={"resume": str(resume)}, train={"steps": steps}) | {"out": str(into)}

    step, other, fresh = out / "step-00000001", tmp_path / "other", tmp_path / "fresh"
    said = run_ranks(
        go, 1, plain, named(1, 3), named(1, 4), named(step, 3), named(step, 4), named(1, 2),
        named(step, 2, other), named(step, 3, other), named("never", 1, fresh), named("never", 2, fresh),
        named("never", 3, out),
    )[0]  # fmt: skip
    texts = [text for text, _ in said]
    assert "step 1 of 3" in texts[1] and texts[1].count("kept as step-0000000") == 2
    assert "step 3 of 4" in texts[2] and "kept as" not in texts[2], "the same command goes on"
    assert "1 was named on" in texts[2] and f"--checkpoint.resume {step}" in texts[2]
    assert "step 1 of 3" in texts[3] and "kept as" in texts[3], "named otherwise it goes back once more"
    assert "step 3 of 4" in texts[4] and "name the step: --checkpoint.resume 1" in texts[4]
    assert "step 1 of 2" in texts[5]
    assert "step 1 of 2" in texts[6] and "step 2 of 3" in texts[7] and "choose another --out" in texts[7]
    assert "resuming" not in texts[8] and "step 1 of 2" in texts[9] and "starts" not in texts[9]
    assert [mistake for _, mistake in said[:10]] == [""] * 10
    assert "checkpoint.resume: never" in said[10][1], "what another command left is not gone on with"
    assert [line["resume"] for line in read_lineage(out)["history"] if "resume" in line] == ["1", str(step), "1"]


# The best one.


def run_with_metrics(plain: dict[str, Any], values: dict[int, float], stops: int) -> list[int]:
    """Train to step *stops*, then to the end; the evaluation of each step gives top1 of *values*."""
    from bigvision.training import train_on_rank, trainer

    def evaluate(config: Any, engine: Any, *rest: Any) -> dict[str, float]:
        return {"loss": 1.0, "top1": values.get(engine.step, 0.0), "top5": 1.0}

    before, trainer.evaluate = trainer.evaluate, evaluate  # type: ignore[assignment]
    try:
        for steps in (stops, plain["train"]["steps"]):
            train_on_rank(load_config(with_keys(plain, train={"steps": steps})))
    finally:
        trainer.evaluate = before
    return checkpoint.steps_in(Path(plain["out"]))


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({3: 0.5, 6: 0.4}, [8, 3]),  # nothing is saved by `every` at the best one
        ({3: 0.5, 6: 0.5}, [8, 3]),  # the first of equal ones
        ({3: math.nan, 6: 0.2}, [8, 6]),
        ({3: 0.2, 5: 0.7, 6: 0.6}, [8, 5]),  # the last step before a restart
        ({3: 0.2, 6: 0.6, 8: 0.9}, [8]),
    ],
)
def test_the_best_is_what_was_evaluated(tmp_path: Path, values: dict[int, float], kept: list[int]) -> None:
    plain = recipe(
        tmp_path, train={"steps": 8, "eval_every": 3}, checkpoint={"every": 2, "keep": 1, "keep_best": "top1"},
    )  # fmt: skip
    assert run_ranks(run_with_metrics, 1, plain, values, 5)[0] == kept
    for step in kept:
        progress = json.loads((tmp_path / f"step-0000000{step}" / "progress.json").read_text())
        assert progress["evaluated"] == step and progress["metrics"]["top1"] == values.get(step, 0.0)
    from bigvision.checkpoint.commands import run_checkpoint

    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert run_checkpoint(["prune", str(tmp_path), "--keep", "1"]) == 0
    assert checkpoint.steps_in(tmp_path) == kept and ("(the best top1)" in said.getvalue())


def test_the_lines_of_a_run_that_was_killed_are_read(tmp_path: Path) -> None:
    assert read_history(str(tmp_path)) == []
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2, "lo\n\xff\n7\n{"step": 3}\n{"st')
    assert read_history(str(tmp_path)) == [{"step": 1}, {"step": 3}]


# A loop of one's own.


def save_in_turns(plain: dict[str, Any], folder: str) -> list[Any]:
    import bigvision

    keys = {"num_classes": 10, "steps": 3}
    found: list[Any] = []
    batch = torch.rand(24, 3, 32, 32), torch.randint(10, (24,))
    with bigvision.Engine(plain, **keys) as engine, bigvision.Engine(plain, **keys) as other:
        engine.train_step(*batch)
        unfinished = Path(folder) / "step-00000009.tmp-0a0b0c0d"
        engine.save(folder)
        unfinished.mkdir()  # as another thread or run that is writing has it
        engine.train_step(*batch)
        engine.save(folder)
        found.append(unfinished.is_dir())
        try:
            other.save(folder)
        except bigvision.UserError as error:
            found.append(str(error))
        found.append(engine.resume())
    with bigvision.Engine(plain, **keys) as engine:
        found += [engine.resume(), engine.resume(folder), engine.resume(Path(folder) / "step-00000001")]
        engine.save(folder)
    return found


def save_and_resume(plain: dict[str, Any]) -> list[Any]:
    """What engines with and without a word about their data record, accept and print."""
    from bigvision.runtime import process

    with patch.object(process, "lacks_shared_memory", lambda device, ranks: "warning: /dev/shm is small"):
        return saved_and_resumed(plain)


def saved_and_resumed(plain: dict[str, Any]) -> list[Any]:
    import bigvision

    keys, found = {"num_classes": 10, "steps": 3}, list[Any]()
    silent = {name: section for name, section in plain.items() if name != "data"}
    first = Path(plain["out"]) / "step-00000000"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        with bigvision.Engine(plain, **keys) as engine:
            engine.save()
            found.append(recorded(first))
        with bigvision.Engine(silent | {"out": plain["out"] + "-silent"}, **keys) as engine:
            found.append(recorded(engine.save()))
            engine.resume(first)
            found.append(recorded(engine.save()))
    for more in (
        {"data": "synthetic:40x32"},
        {"data": "synthetic:40x32", "checkpoint.allow": "data"},
        {"data": Names(), "val": Names()},
        {"data": Names(3), "val": Names(3), "checkpoint.allow": "data"},
        {"data.train": "imagefolder:/nowhere"},
    ):
        with contextlib.redirect_stdout(io.StringIO()) as told:
            try:
                with bigvision.Engine(plain, **keys, **more, resume=first) as engine:
                    found.append(engine._facts and engine._facts["train"]["samples"])
            except bigvision.UserError as error:
                found.append(str(error))
        said.write(told.getvalue())
    return [*found, said.getvalue()]


class Names:
    """A dataset of one's own; with other classes than synthetic data has."""

    def __init__(self, count: int = 10) -> None:
        self.classes = [f"{number}" for number in range(count)]

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(3, 32, 32, dtype=torch.uint8), index % len(self.classes)


def recorded(step: Path) -> tuple[Any, Any]:
    data = json.loads((step / "progress.json").read_text()).get("data")
    return data and data["train"]["samples"], json.loads((step / "config.json").read_text()).get("label_names")


def test_engines_record_the_data_that_they_know(tmp_path: Path) -> None:
    plain, ten = recipe(tmp_path / "out", train={"micro_batch": None}), [str(number) for number in range(10)]
    known, silent, carried, other, allowed, given, classes, gone, said = run_ranks(save_and_resume, 1, plain)[0]
    assert (known, silent, carried) == ((53, ten), (None, None), (53, ten))
    assert "data.train has 40 samples instead of 53" in other and other.endswith("--checkpoint.allow data")
    assert allowed == 40 and "data.train has 7 samples instead of 53" in given
    assert "3 classes instead of 10" in classes and classes.endswith("--checkpoint.allow data,classes")
    assert gone == 53 and "checkpoints do not record the data: data.train" in said, "a recipe may name what is not there"
    assert said.count("warning: /dev/shm is small") == 7


def test_engines_lock_what_they_save_in_and_resume_from_it(tmp_path: Path) -> None:
    mine = str(tmp_path / "mine")
    plain = recipe(tmp_path / "out", train={"micro_batch": None})
    kept, refused, *steps = run_ranks(save_in_turns, 1, plain, mine)[0]
    assert kept and f"{mine} is in use by process" in refused and steps == [2, 0, 2, 1]
