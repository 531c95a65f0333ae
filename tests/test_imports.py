"""Imports between packages point one way, heavy packages are imported where they are used, and nothing runs foreign code."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bigvision

ROOT = Path(__file__).parent.parent
FILES = sorted(path for folder in ("bigvision", "launch", "benchmarks") for path in (ROOT / folder).rglob("*.py"))

# A package imports itself and the packages of the lines above its own.
LEVELS = (
    {"__version__", "importing", "disk", "errors", "ranges", "redact", "samples"},
    {"config", "fragments", "muon", "signals"},
    {"runtime", "models", "data", "tasks", "optim"},
    {"pipeline"},
    {"engine", "checkpoint"},
    {"monitor"},
    {"planning"},
    {"training"},
    {"api", "launchers"},
    {"cli", "launching", "__main__"},
)
SIDEWAYS = {("api", "launchers"), ("launchers", "api"), ("__main__", "cli")}  # the only imports inside one line
LEVEL = {package: level for level, packages in enumerate(LEVELS) for package in packages}

HEAVY = {"accelerate", "deepspeed", "mlflow", "nibabel", "pyarrow", "ray", "sklearn", "tensorboard", "torch.utils.tensorboard"}
HEAVY |= {"trackio", "wandb"}
FORBIDDEN = {"cloudpickle", "dill", "eval", "exec", "joblib", "marshal", "os.popen", "os.system", "pickle", "shelve"}
FORBIDDEN |= {"torch.load", "torch.save", "yaml.full_load", "yaml.load", "yaml.unsafe_load"}
# What is measured beside ours has to be called; it writes and reads its own files of the same run.
PEERS = {Path("benchmarks/checkpoint_torch.py"): {"torch.load", "torch.save"}}


def within(name: str, names: set[str]) -> bool:
    """Whether *name* is one of *names* or inside one of them."""
    return any(name == other or name.startswith(other + ".") for other in names)


def imports(tree: ast.AST, path: Path) -> Iterator[tuple[ast.stmt, str, str]]:
    """Each import statement with a full dotted name that it brings in, and the name that the file calls it by."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name, alias.asname or alias.name
        elif isinstance(node, ast.ImportFrom):
            package = path.parts[: len(path.parts) - node.level] if node.level else ()
            module = ".".join((*package, *([node.module] if node.module else [])))
            for alias in node.names:
                yield node, f"{module}.{alias.name}", alias.asname or alias.name


def at_the_top(tree: ast.AST) -> Iterator[ast.stmt]:
    """The statements that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.stmt):
            yield node
        yield from at_the_top(node)


def dotted(node: ast.AST, names: dict[str, str]) -> str:
    """``torch.load`` for the expression ``t.load`` where the file said ``import torch as t``; else ``""``."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value, names)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def loads_only_weights(call: ast.Call, names: dict[str, str]) -> bool:
    """Whether the call is ``torch.load(..., weights_only=True)``, which runs no code of the file."""
    words = {word.arg: word.value for word in call.keywords}
    only = words.get("weights_only")
    return dotted(call.func, names) == "torch.load" and isinstance(only, ast.Constant) and only.value is True


def mistakes(source: str, path: Path) -> list[str]:
    """What is wrong in the file *path* (relative to the repository) with the text *source*."""
    tree, found = ast.parse(source), []
    top = set(at_the_top(tree))
    here = path.with_suffix("").parts[1] if path.parts[0] == "bigvision" else ""
    names: dict[str, str] = {}
    forbidden = FORBIDDEN - PEERS.get(path, set())

    for node, name, called in imports(tree, path):
        names[called] = name
        where = f"{path}:{node.lineno}: "
        if within(name, forbidden):
            found.append(f"{where}imports {name}")
        if here and node in top and within(name, HEAVY):
            found.append(f"{where}imports {name} at the top: import it in the function that uses it")
        if not here or not within(name, {"bigvision"}):
            continue
        there = [*name.split("."), "__init__"][1]
        if here == "__init__":
            if node in top:
                found.append(f"{where}imports {there} at the top: the public names are imported lazily")
        elif here not in LEVEL or there not in LEVEL:
            found.append(f"{where}{here} imports {there}: not both are in LEVELS")
        elif here != there and LEVEL[there] >= LEVEL[here] and (here, there) not in SIDEWAYS:
            found.append(f"{where}{here} may not import {there}")

    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if dotted(node.func, names) in forbidden and not loads_only_weights(node, names):
            found.append(f"{path}:{node.lineno}: calls {dotted(node.func, names)}")
        for word in node.keywords:
            if word.arg in ("shell", "allow_pickle") and not (isinstance(word.value, ast.Constant) and not word.value.value):
                found.append(f"{path}:{node.lineno}: {word.arg}={ast.unparse(word.value)}")
    return found


def test_every_file_keeps_the_rules() -> None:
    assert FILES
    assert [line for path in FILES for line in mistakes(path.read_text(), path.relative_to(ROOT))] == []


@pytest.mark.parametrize(
    ("path", "source", "said"),
    [
        ("bigvision/engine/fsdp.py", "from bigvision.checkpoint import reader", "engine may not import checkpoint"),
        ("bigvision/checkpoint/reader.py", "from bigvision import engine", "checkpoint may not import engine"),
        ("bigvision/pipeline/stages.py", "from bigvision.engine import base", "pipeline may not import engine"),
        ("bigvision/models/blocks.py", "from bigvision.pipeline import cutting", "models may not import pipeline"),
        ("bigvision/data/loader.py", "from ..training import loop", "data may not import training"),
        ("bigvision/data/loader.py", "from .. import models", "data may not import models"),
        ("bigvision/data/__init__.py", "from ..cli import main", "data may not import cli"),
        ("bigvision/config/values.py", "def f():\n    import bigvision.runtime.mesh", "config may not import runtime"),
        ("bigvision/training/loop.py", "from bigvision import train", "training imports train"),
        ("bigvision/tools/x.py", "import bigvision.config", "tools imports config"),
        ("bigvision/__init__.py", "from bigvision.cli import main", "imported lazily"),
        ("bigvision/engine/zero.py", "import deepspeed.comm as dist", "deepspeed.comm at the top"),
        ("bigvision/monitor/board.py", "try:\n    from torch.utils import tensorboard\nexcept ImportError: ...", "at the top"),
        ("bigvision/data/digits.py", "class A:\n    from sklearn import datasets", "sklearn.datasets at the top"),
        ("bigvision/data/x.py", "import pickle", "imports pickle"),
        ("bigvision/data/x.py", "from pickle import loads", "imports pickle.loads"),
        ("bigvision/data/x.py", "import torch as t\nt.load('x')", "calls torch.load"),
        ("bigvision/data/x.py", "import torch\ntorch.load('x', weights_only=False)", "calls torch.load"),
        ("bigvision/data/x.py", "import torch\ntorch.load('x', weights_only=flag)", "calls torch.load"),
        ("bigvision/data/x.py", "from yaml import load", "imports yaml.load"),
        ("bigvision/data/x.py", "import yaml\nyaml.load('x')", "calls yaml.load"),
        ("bigvision/data/x.py", "eval('1')", "calls eval"),
        ("launch/train.py", "import subprocess\nsubprocess.run('ls', shell=True)", "shell=True"),
        ("benchmarks/x.py", "import torch\ntorch.save({}, 'x')", "calls torch.save"),
        ("benchmarks/checkpoint_torch.py", "import pickle", "imports pickle"),
        ("benchmarks/x.py", "import numpy\nnumpy.load('x', allow_pickle=True)", "allow_pickle=True"),
    ],
)
def test_the_checker_sees(path: str, source: str, said: str) -> None:
    found = mistakes(source, Path(path))
    assert len(found) == 1 and said in found[0], found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "bigvision/engine/fsdp.py",
            "from bigvision.models import blocks\nfrom .base import Engine\nfrom ..fragments import Fragment",
        ),
        ("bigvision/cli.py", "from bigvision.launchers import accelerate\nfrom bigvision.errors import UserError"),
        (
            "bigvision/__init__.py",
            "if TYPE_CHECKING:\n    from bigvision.cli import main\ndef f():\n    import bigvision.engine",
        ),
        ("bigvision/engine/zero.py", "def f(model):\n    import deepspeed\n    model.eval()"),
        ("bigvision/models/x.py", "from safetensors.torch import load\nload('x')\nsubprocess.run(['ls'], shell=False)"),
        ("bigvision/models/x.py", "import torch\ntorch.load('x', weights_only=True)"),
        ("benchmarks/peers.py", "import accelerate\nfrom bigvision.engine import base"),
        ("benchmarks/checkpoint_torch.py", "import torch\ntorch.save({}, 'x')"),
    ],
)
def test_the_checker_accepts(path: str, source: str) -> None:
    assert mistakes(source, Path(path)) == []


def test_earlier_names_work_and_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    from bigvision import launchers, training

    with pytest.warns(FutureWarning, match="train_on_rank"):
        assert training.train is training.train_on_rank
    monkeypatch.delitem(sys.modules, "bigvision.launching", raising=False)
    with pytest.warns(FutureWarning, match=r"bigvision\.launchers"):
        assert importlib.import_module("bigvision.launching").__path__ == launchers.__path__


def test_a_deferred_module_runs_when_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "latecomer").mkdir()
    (tmp_path / "latecomer/__init__.py").write_text(
        "import sys\nsys.latecomers = getattr(sys, 'latecomers', 0) + 1\nanswer = 42\n"
    )
    (tmp_path / "latecomer/inside.py").write_text("from latecomer import answer\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "latecomers", 0, raising=False)
    bigvision._defer("latecomer")
    module = importlib.import_module("latecomer")
    # As `inspect` looks through all modules.
    assert module.__file__ == str(tmp_path / "latecomer/__init__.py") and not hasattr(module, "__wrapped__")
    assert vars(sys)["latecomers"] == 0
    bigvision._defer("latecomer")  # imported already: it stays
    assert module.answer == 42 and importlib.import_module("latecomer.inside").answer == 42 and vars(sys)["latecomers"] == 1
    with pytest.raises(AttributeError, match="nothing"):
        _ = module.nothing
    bigvision._defer("no_such_module")
    for name in ("latecomer", "latecomer.inside"):
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.long
def test_a_start_imports_nothing_heavy_that_it_does_not_use() -> None:
    program = "import bigvision.cli, bigvision.training, sys; print(*sys.modules)"
    found = set(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split())
    assert "torch" in found and not {name for name in found if within(name, HEAVY - {"wandb"}) or name == "wandb.sdk"}
