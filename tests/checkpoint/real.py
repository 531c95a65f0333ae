"""Real checkpoints for tests of the commands, and the command line in this process."""

from __future__ import annotations

import contextlib
import hashlib
import io
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from bigvision import checkpoint
from bigvision.cli import main
from bigvision.fragments import Fragment
from bigvision.runtime import start
from tests.checkpoint.test_format import save
from tests.distributed import run_ranks
from tests.recipes import recipe, run


def command(*arguments: object) -> tuple[int, str, str]:
    """Return the exit code, standard output and standard error of ``bigvision ARGUMENTS``."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


def refused(*arguments: object) -> str:
    """The one line with which ``bigvision ARGUMENTS`` is refused."""
    code, out, err = command(*arguments)
    assert (code, out) == (2, ""), (code, out, err)
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


def train(out: Path, steps: int, ranks: int = 1, model: str = "vit", **sections: dict[str, Any]) -> Path:
    """Train *steps* steps and return the last step folder."""
    sections["train"] = {"steps": steps, "micro_batch": None} | sections.get("train", {})
    run_ranks(run, ranks, recipe(out, model, **sections))
    return out / checkpoint.folder_name(steps)


def write(out: Path, step: int, groups: dict[str, dict[str, Tensor]], documents: dict[str, Any]) -> Path:
    """Write a checkpoint of these tensors and return its folder."""
    out.mkdir(parents=True, exist_ok=True)
    for group, tensors in groups.items():
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, out / f"{group}.safetensors")
    run_ranks(_write_on_rank, 1, out, step, list(groups), documents)
    for group in groups:
        (out / f"{group}.safetensors").unlink()
    return out / checkpoint.folder_name(step)


def _write_on_rank(out: Path, step: int, groups: list[str], documents: dict[str, Any]) -> None:
    fragments = [
        Fragment(group, name, tuple(tensor.shape), 0, tensor.reshape(-1), (0, 1))
        for group in groups
        for name, tensor in load_file(out / f"{group}.safetensors").items()
    ]
    with start("cpu"):
        save(out, step, fragments, documents, 10**9, 9)


def flip(path: Path, at: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file under *folder* but the lock, which names its last owner."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
