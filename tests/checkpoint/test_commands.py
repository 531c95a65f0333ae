"""`bigvision checkpoint list | verify | diff | prune` on real runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bigvision.checkpoint import Lock, steps_in
from bigvision.tasks import Classify
from tests.checkpoint.real import command, contents, flip, refused, train, write
from tests.recipes import lines


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints at steps 2, 4, 6, each evaluated."""
    out = tmp_path_factory.mktemp("run") / "out"
    train(out, 6, 2, parallel={"strategy": "fsdp"}, train={"eval_every": 2}, checkpoint={"every": 2, "keep": 9})
    return out


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return shutil.copytree(run, tmp_path / "copy")


def test_a_list_has_what_the_run_logged(run: Path) -> None:
    code, out, _ = command("checkpoint", "list", run, "--json")
    found = json.loads(out)
    logged = {line["step"]: line for line in lines(run) if "val_loss" in line}
    assert code == 0 and [entry["step"] for entry in found] == [6, 4, 2] and set(logged) == {2, 4, 6}
    for entry in found:
        line = logged[entry["step"]]
        assert entry["folder"] == f"step-{entry['step']:08}" and entry["samples"] == line["samples"]
        assert entry["metrics"] == {name: line[f"val_{name}"] for name in Classify.metrics}
        assert (entry["state"], entry["problem"]) == ("valid", None)
        assert entry["bytes"] == sum(path.stat().st_size for path in (run / entry["folder"]).iterdir())
        assert abs(datetime.fromisoformat(entry["saved"]).timestamp() - (run / entry["folder"]).stat().st_mtime) < 60
    for name in Classify.metrics:
        best = (min if name == "loss" else max)(entry["metrics"][name] for entry in found)
        assert [name in entry["best"] for entry in found] == [entry["metrics"][name] == best for entry in found]
    code, out, _ = command("checkpoint", "list", run)
    rows = [line.split() for line in out.splitlines()]
    assert code == 0 and [row[0] for row in rows] == ["step", "6", "4", "2", "*"] and rows[1][-1] == "valid"
    assert rows[1][1] == "144" and out.count("*") == sum(len(entry["best"]) for entry in found) + 1


def test_a_list_tells_the_damaged_and_the_unfinished(copy: Path) -> None:
    (copy / "step-00000004" / "model.safetensors").write_bytes(b"cut")
    (copy / "step-00000006" / "manifest.json").unlink()
    progress = {"step": 2, "samples": 48, "metrics": {"loss": float("inf"), "top1": 0.5}}
    shutil.rmtree(copy / "step-00000002")
    write(copy, 2, {"model": {"x": torch.ones(3)}}, {"config.json": {}, "progress.json": progress})
    for kind in ("tmp", "pruned", "aside", "left"):
        (copy / f"step-00000008.{kind}-0a0b").mkdir()
    found = {entry["folder"]: entry for entry in json.loads(command("checkpoint", "list", copy, "--json")[1])}
    states = ["unfinished", "left", "unfinished", "unfinished", "damaged", "damaged", "valid"]
    assert [entry["state"] for entry in found.values()] == states
    assert "model.safetensors has 3 bytes" in found["step-00000004"]["problem"]
    assert found["step-00000006"]["problem"] == "manifest.json is missing"
    assert found["step-00000002"]["metrics"] == {"loss": None, "top1": 0.5}, "JSON has no word for what is not finite"
    assert [name for name, entry in found.items() if entry["best"]] == ["step-00000002"], "only valid ones are the best"
    assert found["step-00000002"]["best"] == ["top1"]
    code, out, _ = command("checkpoint", "list", copy)
    assert code == 0 and "damaged: manifest.json is missing" in out and "not finite" in out
    assert "unfinished step-00000008.tmp-0a0b: being written" in out and "left step-00000008.left-0a0b: kept" in out


def test_a_list_of_nothing(tmp_path: Path) -> None:
    assert command("checkpoint", "list", tmp_path) == (0, f"no checkpoints in {tmp_path}\n", "")
    assert json.loads(command("checkpoint", "list", tmp_path, "--json")[1]) == []


def test_every_byte_is_verified(copy: Path) -> None:
    folder = copy / "step-00000004"
    assert command("checkpoint", "verify", folder) == (0, f"{folder}: ok\n", "")
    code, out, _ = command("checkpoint", "verify", copy)
    assert code == 0 and [line.split(": ") for line in out.splitlines()] == [
        [str(copy / f"step-0000000{step}"), "ok"] for step in (6, 4, 2)
    ]
    for path in sorted(folder.iterdir()):
        for at in (0, path.stat().st_size // 2, -1):
            flip(path, at)
            code, out, _ = command("checkpoint", "verify", folder)
            # The manifest has no checksum of its own: another digit in it is said of the file that it belongs to.
            assert code == 1 and out.startswith(f"{folder}: damaged: {'' if path.name == 'manifest.json' else path.name}"), out
            if path.suffix == ".safetensors":
                assert command("checkpoint", "list", copy)[1].count("valid") == 3, "sizes alone do not tell"
            flip(path, at)
    for path in sorted(folder.iterdir()):
        path.rename(folder / "gone")
        code, out, _ = command("checkpoint", "verify", folder)
        assert code == 1 and out == f"{folder}: damaged: {path.name} is missing\n"
        (folder / "gone").rename(path)
    flip(folder / "model.safetensors", 5000)
    flip(folder / "optimizer.safetensors", 5000)
    code, out, _ = command("checkpoint", "verify", copy)
    assert code == 1 and [line.split(": ")[1] for line in out.splitlines()] == ["ok", "damaged", "damaged", "ok"]
    assert "model.safetensors differs" in out and "optimizer.safetensors differs" in out


def test_identical_checkpoints_do_not_differ(copy: Path, run: Path) -> None:
    code, out, _ = command("checkpoint", "diff", run / "step-00000004", copy / "step-00000004")
    assert code == 0
    assert out.splitlines() == ["documents: identical", "model: identical (44 tensors)", "optimizer: identical (88 tensors)"]


def test_a_difference_in_numbers(copy: Path, run: Path) -> None:
    """Against the whole tensors, subtracted at once."""
    a, b = run / "step-00000002", run / "step-00000006"
    code, out, _ = command("checkpoint", "diff", a, b, "--limit", 0)
    rows = [line.split() for line in out.splitlines()]
    assert code == 1 and ["step", "2", "|", "6"] in rows and ["samples", "48", "|", "144"] in rows
    assert ["scalars.optimizer_steps", "2", "|", "6"] in rows and not any(row[0].startswith("config.") for row in rows)
    whole = {path: load_file(path / "model.safetensors") | load_file(path / "optimizer.safetensors") for path in (a, b)}
    numbers = [row for row in rows if "elements," in row]
    assert len(numbers) == len(whole[a])
    for name, differing, _, elements, _, _, largest, _, relative in numbers:
        ours, theirs = (whole[path][name].double() for path in (a, b))
        assert (int(differing), int(elements)) == (int((ours != theirs).sum()), ours.numel())
        assert float(largest.rstrip(",")) == pytest.approx(float((ours - theirs).abs().max()), rel=5e-3)
        assert float(relative) == pytest.approx(float((ours - theirs).norm() / ours.norm()), rel=5e-3)
    start = next(n for n, line in enumerate(out.splitlines()) if line.startswith("model: other values in 44 of 44"))
    listed = [float(row[-1]) for row in rows[start + 1 : start + 45]]
    assert listed == sorted(listed, reverse=True), "the worst first"
    short = command("checkpoint", "diff", a, b, "--limit", 3)[1]
    assert short.count(" elements, ") == 6 and "and 41 more" in short and "and 85 more" in short
    flip(copy / "step-00000006" / "model.safetensors", -1)
    for one in ([b, copy / "step-00000006"], [copy / "step-00000006", b]):
        said = refused("checkpoint", "diff", *one)
        assert f"{copy / 'step-00000006'} is not a valid checkpoint: model.safetensors differs" in said


def test_a_difference_in_tensors(tmp_path: Path) -> None:
    """Names, shapes, types, signs of zero and what is not a number; read in parts that end inside a tensor."""
    from bigvision.checkpoint import diff, reader

    values = torch.linspace(-1, 1, 1000)
    nan = torch.where(values > 0.99, torch.nan, values)
    other = values.clone()
    other[[7, 998]] += torch.tensor([1.0, 2.0])
    counts, flags = torch.tensor([2**40, 2**40 + 1]), torch.tensor([True, False])
    both = {"same": values, "nan": nan, "empty": values[:0]}
    first = {"only": values, "type": values, "shape": values, "far": values, "lost": values, "born": values * 0}
    second = {
        "new": values,
        "type": values.bfloat16(),
        "shape": values.view(10, 100),
        "far": other,
        "lost": nan,
        "born": values,
    }
    first |= {"zero": torch.tensor([0.0]), "count": counts, "flag": flags}
    second |= {"zero": torch.tensor([-0.0]), "count": counts + 1, "flag": flags | True}
    documents = {"config.json": {}, "progress.json": {"step": 1}}
    a, b = (
        write(tmp_path / name, 1, {"model": both | reader, "optimizer": {"x/exp_avg": values}}, documents)
        for name, reader in (("a", first), ("b", second))
    )
    before = reader.PART
    reader.PART = 64
    try:
        found = diff.compare(a, b)
    finally:
        reader.PART = before
    model = found.groups["model"]
    assert found.documents == {} and found.groups["optimizer"].identical and not found.identical
    assert model.only == {"A": ["only  F32[1000]"], "B": ["new  F32[1000]"]}
    assert model.reshaped == ["shape  F32[1000] | F32[10, 100]", "type  F32[1000] | BF16[1000]"]
    changed = {change.name: change for change in model.changed}
    assert list(changed) == ["lost", "born", "flag", "far", "count", "zero"], "the worst first"
    assert (changed["far"].differing, changed["far"].elements) == (2, 1000)
    assert changed["far"].largest == pytest.approx(2) and changed["far"].relative == pytest.approx(
        5**0.5 / values.norm().item()
    )
    assert str(changed["lost"].largest) == "nan" and changed["born"].relative == float("inf")
    assert (changed["count"].differing, changed["count"].largest) == (2, 1) and changed["zero"].largest == 0
    assert model.same == 3
    code, out, _ = command("checkpoint", "diff", a, b)
    assert code == 1 and "only in A\n  only  F32[1000]" in out and "largest nan, relative nan" in out


def test_a_difference_between_runs(run: Path, tmp_path: Path) -> None:
    other = train(tmp_path / "other", 1, model="resnet", optim={"lr": 0.5})
    code, out, _ = command("checkpoint", "diff", run / "step-00000002", other)
    rows = [line.split() for line in out.splitlines()]
    assert code == 1 and ["config.optim.lr", "0.001", "|", "0.5"] in rows
    assert ["config.model.options.depth", "3", "|", "(absent)"] in rows
    assert ["card.architecture", '"vit_tiny_patch16_224"', "|", '"test_resnet"'] in rows
    assert "model: only in A" in out and "optimizer: only in B" in out


def test_pruning_leaves_the_last_valid_ones(copy: Path) -> None:
    for step in (0, 1, 3, 5):
        shutil.copytree(copy / "step-00000002", copy / f"step-0000000{step}")
    flip(copy / "step-00000006" / "optimizer.safetensors", -1)
    flip(copy / "step-00000002" / "model.safetensors", -1)
    (copy / "step-00000003" / "progress.json").unlink()
    (copy / "step-00000007.tmp-0a0b").mkdir()
    before = contents(copy)
    with Lock(copy):
        assert f"{copy} is in use by process" in refused("checkpoint", "prune", copy, "--keep", 2)
        code, would, _ = command("checkpoint", "prune", copy, "--keep", 2, "--dry-run")
    assert code == 0 and contents(copy) == before
    code, out, _ = command("checkpoint", "prune", copy, "--keep", 2)
    kept = [copy / f"step-0000000{step}" for step in (5, 4)]
    assert code == 0 and steps_in(copy) == [6, 5, 4, 3, 2] and (copy / "step-00000007.tmp-0a0b").is_dir()
    gone = ("step-00000000", "step-00000001")
    assert contents(copy) == {name: digest for name, digest in before.items() if not name.startswith(gone)}
    assert out.replace("removed      ", "would remove ").replace("kept      ", "would keep") == would
    removed = [line.split()[1] for line in out.splitlines() if line.startswith("removed")]
    assert removed == [str(copy / f"step-0000000{step}") for step in (1, 0)]
    assert all(f"kept           {folder}\n" in out for folder in kept)
    assert f"left as it is  {copy / 'step-00000006'}: optimizer.safetensors differs" in out
    assert f"left as it is  {copy / 'step-00000002'}: model.safetensors differs" in out
    assert f"left as it is  {copy / 'step-00000003'}: progress.json is missing" in out
    assert "nothing to remove" in command("checkpoint", "prune", copy, "--keep", 2)[1]
    assert "nothing to remove" in command("checkpoint", "prune", copy, "--keep", 9)[1]


def test_pruning_goes_through_no_link(copy: Path, run: Path) -> None:
    shutil.rmtree(copy / "step-00000002")
    (copy / "step-00000002").symlink_to(run / "step-00000002")
    code, out, _ = command("checkpoint", "prune", copy, "--keep", 1)
    assert code == 0 and f"left as it is  {copy / 'step-00000002'}: is a link" in out
    assert steps_in(copy) == [6, 2] and steps_in(run) == [6, 4, 2]


def test_looking_at_a_run_does_not_wait_for_torch(run: Path) -> None:
    code = "import sys; from bigvision.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    for arguments in (["list", run], ["verify", run], ["prune", run, "--keep", "3"]):
        said = subprocess.run([sys.executable, "-c", code, "checkpoint", *map(str, arguments)], capture_output=True, text=True)
        assert said.stdout.endswith("\nFalse\n"), (said.stdout, said.stderr)


def test_a_reader_that_has_seen_enough(run: Path) -> None:
    """As in ``bigvision checkpoint list OUT | head``."""
    code = "import sys; from bigvision.cli import main; sys.exit(main(sys.argv[1:]))"
    program = [sys.executable, "-c", code, "checkpoint", "diff", str(run / "step-00000002"), str(run / "step-00000004")]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 1)


def test_a_mistake_in_a_checkpoint_command_is_one_line_with_the_fix(run: Path, tmp_path: Path) -> None:
    step = run / "step-00000002"
    assert "'lst'; did you mean 'list'?" in refused("checkpoint", "lst")
    assert "no such folder" in refused("checkpoint", "list", tmp_path / "no")
    assert f"name the run's output folder, {run}" in refused("checkpoint", "list", step)
    assert "OUT" in refused("checkpoint", "list")
    assert "'--jsn'; did you mean '--json'?" in refused("checkpoint", "list", run, "--jsn")
    assert "unknown argument 'more'" in refused("checkpoint", "list", run, "more")
    assert "no such folder" in refused("checkpoint", "verify", tmp_path / "no")
    assert "neither a step folder nor" in refused("checkpoint", "verify", tmp_path)
    assert f"{run}: not a step folder: name one, such as {run / 'step-00000006'}" in refused("checkpoint", "diff", run, step)
    assert "not a step folder" in refused("checkpoint", "diff", step, tmp_path / "no")
    assert "B" in refused("checkpoint", "diff", step)
    assert "--limit: -1" in refused("checkpoint", "diff", step, step, "--limit", -1)
    damaged = shutil.copytree(step, tmp_path / "damaged")
    (damaged / "model.safetensors").unlink()
    assert f"{damaged} is not a valid checkpoint: model.safetensors is missing" in refused("checkpoint", "diff", step, damaged)
    assert "--keep" in refused("checkpoint", "prune", run)
    assert "--keep: 0" in refused("checkpoint", "prune", run, "--keep", 0)
    assert "'two'" in refused("checkpoint", "prune", run, "--keep", "two")
    assert "name the run's output folder" in refused("checkpoint", "prune", step, "--keep", 1)
    for arguments in (["checkpoint"], ["checkpoint", "--help"], ["checkpoint", "prune", "--help"], ["export", "--help"]):
        code, out, err = command(*arguments)
        assert (code, err) == (0, "") and out.startswith("usage: bigvision ")
