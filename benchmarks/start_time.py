"""How long from the command to the first step, from a crash to the next step, and to an accuracy, beside its peers' programs?

The sides are programs that train a ConvNeXt-atto on the digits on one rank with all cores: ``bigvision train``, and those of
`digits_loops.py`. They take turns, in an order that is balanced over the rounds; a peer comes a second time, as a control. A
time is from the start of a process, or from its end by SIGKILL, to a line on its standard output.

    start: to the first step, and from a SIGKILL, once the first epoch is saved, to the next step. bigvision has --restarts: its
        rank is killed, and started again by its parent, which has imported everything. The peers have nothing like it: they
        are killed whole, and their command is run again at once, as by a launcher that loses no time
    accuracy: to the first evaluation of at least 97 %, in a run of eight epochs. Where a copy of timm's train.py is named
        (--timm-train), that program is a side too, and beside it bigvision with what it can do as well: the images as PNG
        files, and random crops in the place of shifts and turns
    train: images/s of ``make train`` (two ranks, the recipe's strategy), beside another checkout of this project (--other)

Run it with ``make bench``, beside Fabric where the extra ``bench`` is installed; it writes
``benchmarks/results/start_time_cpu_PART.{json,md}``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median
from subprocess import PIPE, STDOUT
from typing import Any

import numpy as np
import torch
from torchvision.io import write_png

from benchmarks.checkpoint_report import Target
from benchmarks.digits_loops import BATCH, CLIP, DECAY, LR, MODEL, SIZE, WARMUP
from benchmarks.harness import machine, summarize, turn

ROOT = Path(__file__).parent.parent
OWN, PEERS = "bigvision", ("accelerate", "fabric", "timm")
GOAL = 97.0
"""Percent of the validation images."""
FIRST, ACCURACY = re.compile(r"^step \d+ of \d+"), re.compile(r"accuracy +([\d.]+)%")
TIMM, OWN_CROPS = "timm's train.py", "bigvision, timm's crops"
OF_TIMM = re.compile(r"Test: +\[ *(?:\d+)/(?:\d+)\].*Acc@1: +[\d.]+ +\( *([\d.]+)\)")
"""Its lines of the first and the last batch of an evaluation, each with the accuracy so far."""
CROPS = (0.8, 1.0)
"""The share of an image that a random crop of timm's has."""
LIMIT = 120.0
"""Seconds that a program may take to its next line."""
RESTARTS = ["--restarts", "3"]


class Program:
    """A training program in a process group of its own, and the time of each of its lines."""

    def __init__(self, command: list[str], environment: Mapping[str, str] = {}, errors: int = PIPE) -> None:
        """Args: *errors*: STDOUT for a program whose lines are on its standard error."""
        self.begun = time.perf_counter()
        self.process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, stdout=PIPE,
            stderr=errors, text=True, process_group=0,
        )  # fmt: skip

    def wait_for(self, pattern: re.Pattern[str]) -> tuple[float, re.Match[str]]:
        """(seconds since the start, the match) of the next line that *pattern* matches."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if (found := pattern.search(line)) is not None:
                return time.perf_counter() - self.begun, found
        said = self.process.stderr.read() if self.process.stderr is not None else ""
        raise RuntimeError(f"{self.process.args}: ended without a line like {pattern.pattern}: {said}")

    def kill_rank(self) -> float:
        """End the one rank that the program has forked, as a crash does; returns when."""
        line = Path(f"/proc/{self.process.pid}/cmdline").read_bytes()
        children = [
            pid for path in Path(f"/proc/{self.process.pid}/task").glob("*/children") for pid in path.read_text().split()
        ]
        # Beside it is the resource tracker of multiprocessing, with a command line of its own.
        (rank,) = [int(pid) for pid in children if Path(f"/proc/{pid}/cmdline").read_bytes() == line]
        when = time.perf_counter()
        os.kill(rank, signal.SIGKILL)
        return when

    def kill(self) -> float:
        """End it and its workers as a crash does; returns when."""
        when = time.perf_counter()
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return when


def commands(asked: argparse.Namespace, folder: Path, epochs: int) -> dict[str, list[str]]:
    """Each side's command, without its output folder, which comes last."""
    ours = [sys.executable, str(ROOT / "launch/train.py"), "--parallel.strategy", "ddp", "--train.epochs", str(epochs), "--out"]
    sides = {OWN: ours}
    for peer in PEERS:
        if peer != "fabric" or importlib.util.find_spec("lightning_fabric") is not None:
            program = [str(ROOT / "benchmarks/digits_loops.py"), peer, "--data", str(folder / "digits.npz")]
            sides[peer] = [sys.executable, *program, "--epochs", str(epochs), "--out"]
    return sides


def write_digits(path: Path) -> None:
    """bigvision's digits as a file of arrays, which peers read faster than scikit-learn."""
    from bigvision.data import open_source

    arrays = {}
    for split in ("train", "val"):
        source = open_source("digits", split, shared=False)
        samples = [source.read(index) for index in range(len(source))]
        images = torch.stack([torch.as_tensor(sample.image).expand(3, -1, -1) for sample in samples])
        arrays |= {f"{split}_images": images.numpy(), f"{split}_labels": np.array([sample.target for sample in samples])}
    np.savez(path, **arrays)


def write_files(arrays: Path, folder: Path) -> None:
    """The digits of `write_digits` as PNG files in a folder for each class."""
    found = np.load(arrays)
    for split in ("train", "val"):
        for number, (image, label) in enumerate(zip(found[f"{split}_images"], found[f"{split}_labels"])):
            (folder / split / str(label)).mkdir(parents=True, exist_ok=True)
            write_png(torch.from_numpy(image), str(folder / split / str(label) / f"{number:04}.png"))


def command_of_timm(program: Path, folder: Path, epochs: int) -> list[str]:
    """timm's train.py with the digits' recipe, without the name of its experiment, which comes last."""
    options = {
        "model": MODEL, "num-classes": 10, "img-size": SIZE, "crop-pct": 1.0, "batch-size": BATCH, "opt": "adamw", "lr": LR,
        "weight-decay": DECAY, "epochs": epochs, "warmup-epochs": round(WARMUP * epochs), "warmup-lr": 0, "min-lr": 0,
        "clip-grad": CLIP, "workers": 1, "device": "cpu", "hflip": 0, "color-jitter": 0, "train-split": "train",
        "val-split": "val", "output": folder,
    }  # fmt: skip
    listed = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    crops = ["--scale", *map(str, CROPS), "--train-interpolation", "bicubic"]
    return [sys.executable, str(program), str(folder / "files"), *listed, *crops, "--sched-on-updates", "--experiment"]


def command_of_crops(ours: list[str], folder: Path) -> list[str]:
    """bigvision's command *ours* with the images and the crops of `command_of_timm`."""
    data = {"train": f"imagefolder:{folder}/files/train", "val": f"imagefolder:{folder}/files/val", "hflip": 0}
    data["crop_scale"] = list(CROPS)
    keys = [text for key, value in data.items() for text in (f"--data.{key}", str(value))]
    return [*ours[:2], str(ROOT / "recipes/digits.yaml"), *keys, *ours[2:]]


def starts(asked: argparse.Namespace, folder: Path) -> dict[str, dict[str, list[float]]]:
    """Seconds to the first step and from a crash to the next step, of each side and round."""
    sides = commands(asked, folder, 15)
    sides[OWN] = [*sides[OWN][:-1], *RESTARTS, sides[OWN][-1]]
    sides |= {f"{PEERS[0]} (again)": sides[PEERS[0]]}
    times: dict[str, dict[str, list[float]]] = {what: {name: [] for name in sides} for what in ("first step", "after a crash")}
    for number in range(asked.rounds):
        for name in turn(list(sides), number):
            command = [*sides[name], str(folder / f"start-{name.replace(' ', '')}-{number}")]
            program = Program(command)
            first, _ = program.wait_for(FIRST)
            program.wait_for(ACCURACY)
            time.sleep(1.0)  # bigvision's checkpoint is written behind the line, and some steps are taken
            if name == OWN:
                killed = program.kill_rank()
            else:
                killed = program.kill()
                program = Program(command)
            program.wait_for(FIRST)
            after = time.perf_counter() - killed
            program.kill()
            times["first step"][name].append(first)
            times["after a crash"][name].append(after)
            print(f"round {number}: {name}: {first:.2f} s to the first step, {after:.2f} s after a crash", flush=True)
    return times


def accuracies(asked: argparse.Namespace, folder: Path) -> dict[str, dict[str, list[float]]]:
    """Seconds to `GOAL`, and to the end of the process, of each side and round."""
    sides = {name: command for name, command in commands(asked, folder, asked.epochs).items() if name != "accelerate"}
    sides |= {"timm (again)": sides["timm"]}
    if asked.timm_train is not None:
        write_files(folder / "digits.npz", folder / "files")
        sides[TIMM] = command_of_timm(asked.timm_train, folder, asked.epochs)
        sides[OWN_CROPS] = command_of_crops(sides[OWN], folder)
    sides = {name: command for name, command in sides.items() if name in (asked.sides or sides)}
    times: dict[str, dict[str, list[float]]] = {what: {name: [] for name in sides} for what in ("accuracy", "whole run")}
    for number in range(asked.rounds):
        for name in turn(list(sides), number):
            out = str(folder / f"accuracy-{name.replace(' ', '')}-{number}")
            is_timm = name == TIMM
            program = Program([*sides[name], Path(out).name if is_timm else out], errors=STDOUT if is_timm else PIPE)
            reached, last = None, 0.0
            for _ in range(asked.epochs):
                for _ in range(2 if is_timm else 1):
                    seconds, found = program.wait_for(OF_TIMM if is_timm else ACCURACY)
                last = float(found[1])
                if reached is None and last >= GOAL:
                    reached = seconds
            program.process.communicate(timeout=LIMIT)
            times["whole run"][name].append(time.perf_counter() - program.begun)
            # What has not come to the goal by its last epoch would have taken longer than this.
            times["accuracy"][name].append(reached or times["whole run"][name][-1])
            print(f"round {number}: {name}: {times['accuracy'][name][-1]:.1f} s, {last:.2f} % in the end", flush=True)
    return times


def training(asked: argparse.Namespace, folder: Path) -> dict[str, dict[str, list[float]]]:
    """Seconds for an image of ``make train`` here and in the checkout ``--other``, from the second line of metrics.jsonl on."""
    sides = {OWN: ROOT, "other": asked.other, "other (again)": asked.other}
    times: dict[str, dict[str, list[float]]] = {
        "images": {name: [] for name in sides},
        "whole run": {name: [] for name in sides},
    }
    for number in range(asked.rounds):
        for name in turn(list(sides), number):
            root, out = sides[name], folder / f"train-{name.replace(' ', '')}-{number}"
            begun = time.perf_counter()
            subprocess.run(
                ["make", "-C", str(root), "-o", ".venv/installed", "train", f"ARGS=--out {out} --train.epochs {asked.epochs}"],
                env={**os.environ, "PYTHONPATH": str(root)}, check=True, capture_output=True,
            )  # fmt: skip
            times["whole run"][name].append(time.perf_counter() - begun)
            lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            speeds = [line["images_per_second"] for line in lines if "images_per_second" in line][1:]
            times["images"][name].append(1 / median(speeds))
            print(f"round {number}: {name}: {median(speeds):.0f} images/s, {times['whole run'][name][-1]:.1f} s", flush=True)
    return times


TARGETS: dict[str, list[tuple[str, str, str, float]]] = {
    "start": [("first step", peer, "command to first step", 0.9) for peer in PEERS[:2]]
    + [("after a crash", peer, "crash to next step", 0.6) for peer in PEERS[:2]],
    "accuracy": [("accuracy", peer, f"time to {GOAL:g} %", 0.8) for peer in ("timm", TIMM, "fabric")],
    "train": [("images", "other", "make train's time for an image", 1 / 1.25)],
}
"""Of each part: (which times, the peer, what is compared, at most so much of the peer's)."""


def table(part: str, times: dict[str, dict[str, list[float]]], facts: dict[str, Any]) -> tuple[str, list[Target]]:
    """The figures as Markdown, and the targets."""
    targets, rows = [], []
    for which, peer, what, limit in TARGETS[part]:
        own = OWN_CROPS if peer == TIMM else OWN
        if {own, peer} <= times[which].keys():
            line = summarize(own, times[which][own], times[which][peer])
            targets.append(Target(f"{what}: {own} over {peer}", line.ratio, line.interval, limit, True))
    rows += ["| target | found | 95 % interval | wanted | met |", "|---|---:|---:|---:|---|", *(one.row() for one in targets)]
    for which, sides in times.items():
        baseline = next(peer for _, peer, _, _ in TARGETS[part] if peer in sides)
        rows += ["", f"| {which} | s (quartiles) | over {baseline} | 95 % interval |", "|---|---:|---:|---:|"]
        for name, taken in sides.items():
            line = summarize(name, taken, sides[baseline])
            low, high = (1e-3 * one for one in line.quartiles)
            between = f"{line.interval[0]:.3f} to {line.interval[1]:.3f}"
            rows.append(f"| {name} | {median(taken):.4g} ({low:.4g} to {high:.4g}) | {line.ratio:.3f} | {between} |")
    of = ", ".join(f"{key} {value}" for key, value in facts.items())
    rounds = len(next(iter(next(iter(times.values())).values())))
    return "\n".join([f"## {part}", "", *rows, "", f"{rounds} rounds; {of}.", ""]), targets


MEASURES = {"start": starts, "accuracy": accuracies, "train": training}


def main() -> int:
    """Measure the parts that are asked for; returns 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--part", choices=tuple(MEASURES), action="append", help="by default start and accuracy")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=8, help="of the runs to an accuracy and of make train")
    parser.add_argument("--sides", nargs="+", metavar="SIDE", help="of accuracy, by default all; one of them a peer")
    parser.add_argument("--other", type=Path, help="another checkout, for train")
    parser.add_argument("--timm-train", type=Path, metavar="FILE", help="timm's train.py, which its package lacks")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    asked = parser.parse_args()
    if "train" in (asked.part or ()) and asked.other is None:
        parser.error("--part train: name the checkout that it is compared with, --other FOLDER")
    missed = False
    for part in asked.part or ("start", "accuracy"):
        with tempfile.TemporaryDirectory() as folder:
            write_digits(Path(folder, "digits.npz"))
            times = MEASURES[part](asked, Path(folder))
        facts = machine(torch.device("cpu"))
        text, targets = table(part, times, facts)
        missed |= any(not target.met for target in targets)
        print(text)
        stem = asked.results / f"start_time_cpu_{part}"
        stem.parent.mkdir(parents=True, exist_ok=True)
        found = {"targets": [asdict(target) | {"met": target.met} for target in targets], "times": times, "facts": facts}
        stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        stem.with_suffix(".md").write_text(text)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
