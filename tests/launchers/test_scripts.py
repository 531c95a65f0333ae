"""Programs of a user's, run as they would be: scripts without a guard, a notebook; and every way in which they end."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

import bigvision
from bigvision.tasks import Classify
from tests.distributed import run_ranks
from tests.launchers.programs import ended, small, start, wait_for
from tests.recipes import lines, losses, run

PLAIN = """
import bigvision
print("main runs")
result = bigvision.train("recipe.yaml", data="synthetic:53x32", devices=2)
print("done", result.step, result.checkpoint, sorted(result.metrics), len(result.history))
"""

WRONG = """
import bigvision
try:
    bigvision.train("recipe.yaml", devices=2, out="wrong", train={"global_batch": 23})
except bigvision.UserError as error:
    print("error", error)
"""

OWN = """
import random, torch, bigvision
print("main runs")

class Pets:
    classes = ["cat", "dog", "elk"]
    def __init__(self, length):
        self.targets = [index % 3 for index in range(length)]
        self.change = lambda pixels: pixels.roll(1)
    def __len__(self):
        return len(self.targets)
    def __getitem__(self, index):
        pixels = torch.randint(0, 256, (3, 40, 36), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        return self.change(pixels), self.targets[index]

torch.set_num_threads(4)
(torch.rand(800, 800, requires_grad=True) @ torch.rand(800, 800)).softmax(1).sum().backward()
one = bigvision.train("recipe.yaml", Pets(40), Pets(7), out="one")
steps = 4 if len(one.history) == 5 else 0
two = bigvision.train("recipe.yaml", Pets(40), Pets(7), out="two", devices=2)
print("done", steps, two.step, len(two.history))
"""


@pytest.mark.long
def test_a_script_without_a_guard(tmp_path: Path) -> None:
    """Twenty steps on two interpreters, with data workers: the losses of ranks that a launcher starts, and one run of main."""
    plain = small(Path("out"), train={"steps": 20}, data={"workers": 1, "val": "digits"})
    code, said, errors = ended(start(tmp_path, PLAIN, **plain), tmp_path)
    assert code == 0, errors
    folder, metrics = "out/step-00000020", str(sorted(Classify.metrics))
    assert f"done 20 {folder} {metrics} 21" in said and said.count("main runs") == 1
    expected = small(tmp_path / "launched", train={"steps": 20}, data={"workers": 0})
    assert losses(tmp_path / "out") == run_ranks(run, 2, expected)[0]
    assert len(lines(tmp_path / "out")) == 21


@pytest.mark.long
def test_a_mistake_that_only_ranks_can_see_is_raised_in_the_script(tmp_path: Path) -> None:
    code, said, errors = ended(start(tmp_path, WRONG, **small(Path("out"))), tmp_path)
    assert code == 0, errors
    assert said == "error train.global_batch: 23 cannot be divided among 2 data-parallel ranks: use 22 or 24\n"


@pytest.mark.long
def test_a_script_without_a_guard_with_a_dataset_of_its_own(tmp_path: Path) -> None:
    """Which no other interpreter could have: workers and ranks are forked, after much work in several threads."""
    code, said, errors = ended(start(tmp_path, OWN, **small(Path("out"), data={"workers": 2})), tmp_path)
    assert code == 0, errors
    assert "done 4 4 5" in said and said.count("main runs") == 1
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


LONG = """
import sys, bigvision
try:
    result = bigvision.train("recipe.yaml", devices=2, **({"callbacks": [lambda event: None]} if FORKED else {}))
except bigvision.Stopped as stopped:
    print("stopped", stopped.name, (stopped.checkpoint / "manifest.json").exists())
except KeyboardInterrupt:
    print("interrupted")
"""


OTHERS = [(False, signal.SIGTERM), (True, signal.SIGKILL)]


@pytest.mark.parametrize(
    ("forked", "number"), [(True, signal.SIGINT), *(pytest.param(*one, marks=pytest.mark.long) for one in OTHERS)]
)
def test_a_signal_to_the_caller_stops_the_ranks(tmp_path: Path, forked: bool, number: signal.Signals) -> None:
    """And leaves no process and no damaged checkpoint behind."""
    source = LONG.replace("FORKED", str(forked))
    recipe = small(Path("out"), train={"steps": 100000}, checkpoint={"every": 5}, data={"workers": 1})
    program = start(tmp_path, source, **recipe)
    wait_for(tmp_path / "out/metrics.jsonl", '"step": 20', program)
    os.kill(program.pid, number)
    code, said, errors = ended(program, tmp_path)
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == 0 and "stopped SIG" in said and "True" in said, errors
    assert sorted((tmp_path / "out").glob("step-*")) and not list((tmp_path / "out").glob("*.tmp-*"))
    resumed = small(tmp_path / "out", train={"steps": max(line["step"] for line in lines(tmp_path / "out")) + 1})
    bigvision.train(resumed)


CELLS = [
    """
import torch, bigvision
class Pets:
    classes = ["cat", "dog", "elk"]
    def __init__(self, length):
        self.targets = [index % 3 for index in range(length)]
    def __len__(self):
        return len(self.targets)
    def __getitem__(self, index):
        return torch.full((3, 36, 36), index, dtype=torch.uint8), self.targets[index]
class Net(torch.nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(torch.nn.Conv2d(3, 4, 8, 8), torch.nn.Flatten(), torch.nn.Linear(64, num_classes))
with torch.no_grad():
    (torch.rand(500, 500) @ torch.rand(500, 500)).softmax(1)
""",
    """
def tell(event):
    print("event", event.kind, event.step)
result = bigvision.train(
    {"out": "own", "parallel": {"precision": "fp32", "strategy": "fsdp"}, "train": {"steps": 3, "global_batch": 8},
     "data": {"workers": 1}, "monitor": {"every": 1, "progress": False}},
    Pets(40), Pets(7), model=Net, image_size=32, devices=2, callbacks=[tell])
print("own", result.step, len(result.history))
""",
    """
result = bigvision.train("recipe.yaml", devices=2, train={"steps": 2}, out="plain")
print("plain", result.step, len(result.history))
""",
]


@pytest.mark.long
def test_a_notebook(tmp_path: Path) -> None:
    """A real kernel: objects of its cells reach forked ranks and data workers, and what they print is shown."""
    import nbclient
    import nbformat

    (tmp_path / "recipe.yaml").write_text(json.dumps(small(Path("out"))))
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    kernel = tmp_path / "kernels/here"
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "here", "language": "python"}))
    before = os.environ.get("JUPYTER_PATH")
    os.environ["JUPYTER_PATH"] = str(tmp_path)
    try:
        nbclient.NotebookClient(
            book, timeout=600, kernel_name="here", resources={"metadata": {"path": str(tmp_path)}}
        ).execute()
    finally:
        os.environ.pop("JUPYTER_PATH")
        if before is not None:
            os.environ["JUPYTER_PATH"] = before
    said = ["".join(output.get("text", "") for output in cell.outputs) for cell in book.cells]
    assert "own 3 4" in said[1] and "event step 1" in said[1] and "event end 3" in said[1]
    assert "plain 2 3" in said[2]
