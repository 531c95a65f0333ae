"""Every block of README and of docs: commands and Python are run in the order in which they stand, recipes are read.

What needs a cluster, a GPU or a download has ``<!-- not run: REASON -->`` before it; of it, flags and paths are checked.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from bigvision.config import Config, resolve
from bigvision.config.values import leaves
from tests.docs.blocks import LANGUAGES, Block, blocks, commands

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "launch").rglob("*.md"))]
RUN = ("sh", "python")
KEYS = dict(leaves(Config))

SHORTER = (
    (r"^make train$", "make train ARGS='--train.steps 6 --checkpoint.every 3'"),
    (r"^make (test|install)$", "make -n $1"),
    (r"--train\.epochs \d+", "--train.steps 4"),
    (r'train=\{"epochs": \d+\}', 'train={"steps": 4}'),
    (r"--nproc-per-node [348]", "--nproc-per-node 2"),
    (r"--num_gpus 8", "--num_gpus 2"),
    (r"--model\.pretrained true", "--model.pretrained false"),
    (r"vit_\w+_patch16_224(\.\w+)?", "vit_tiny_patch16_224"),
)
"""What makes a command of a user's a test of seconds: (pattern, replacement)."""


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


ALL = [block for document in DOCUMENTS for block in blocks(document)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_blocks_can_be_read(document: Path) -> None:
    for block in blocks(document):
        assert block.language in LANGUAGES, f"{block}: a block is one of {LANGUAGES}"
        if block.language == "yaml":
            check_recipe(block)
        elif block.language == "python":
            ast.parse(block.text, str(block))
        elif block.language == "sh":
            for command in commands(block.text):
                check_command(block, command)


def check_recipe(block: Block) -> None:
    """Sections of a recipe have keys that exist, with values that they take. A block may show a key several times."""
    for part in re.split(r"\n(?=data: )", block.text) if block.text.count("\ndata: ") else [block.text]:
        found = yaml.safe_load(part)
        assert isinstance(found, dict), str(block)
        resolve(found, [])


def check_command(block: Block, command: str) -> None:
    """The flags of ours in a command exist, and so do the files of this project that it names."""
    words = shlex.split(command)
    for word in words:
        if match := re.fullmatch(r"--([a-z]+\.[a-z_]+)(=.*)?", word):
            assert match[1] in KEYS, f"{block}: {command}: no key {match[1]}"
        if re.match(r"(launch|ds_configs|recipes)/", word):
            assert (ROOT / word).exists(), f"{block}: {command}: no file {word}"


def images(folder: Path, classes: int = 2, each: int = 12) -> None:
    """A folder of small photos, a folder for each class."""
    random = np.random.default_rng(0)
    for number, name in enumerate(["cat", "dog", "fox"][:classes]):
        (folder / name).mkdir(parents=True)
        for index in range(each):
            pixels = random.integers(0, 120, (72, 96, 3)) + 60 * number
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index}.jpg")


def checkout(folder: Path) -> None:
    """A copy of this project's files, as a clone has them, with an environment that is installed."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    venv, installed = folder / ".venv", Path(sys.prefix)
    venv.mkdir()
    for name in ("bin", "lib"):
        (venv / name).symlink_to(installed / name)
    shutil.copy(installed / "pyvenv.cfg", venv)
    (venv / "installed").touch()


def environment(folder: Path) -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PATH": path, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def shortened(text: str) -> str:
    for pattern, replacement in SHORTER:
        text = re.sub(pattern, replacement.replace("$1", r"\1"), text, flags=re.MULTILINE)
    return text


@pytest.mark.long
@pytest.mark.parametrize("document", [d for d in DOCUMENTS if any(b.language in RUN for b in blocks(d))], ids=name_of)
def test_blocks_run(document: Path, tmp_path: Path) -> None:
    checkout(tmp_path)
    images(tmp_path / "pets")
    for number, block in enumerate(blocks(document)):
        if block.language not in RUN or block.reason is not None:
            continue
        text = shortened(block.text)
        script = tmp_path / f"block{number}.{block.language}"
        script.write_text(text, encoding="utf-8")
        program = ["bash", "-euo", "pipefail"] if block.language == "sh" else [sys.executable]
        done = subprocess.run(
            [*program, script.name], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{block}:\n{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
