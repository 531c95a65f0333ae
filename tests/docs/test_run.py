"""Every command and every Python block of the documents runs, in the order in which they stand, each document in a copy of the
project of its own. What needs a cluster, GPUs or several hosts has ``<!-- not run: REASON -->`` before it.
"""

from __future__ import annotations

import io
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bigvision.cli import main
from tests.docs.blocks import DOCUMENTS, ROOT, Block, blocks, commands

SHORTER = (
    (r"vit_\w+_patch16_224\.\w+", "test_vit.r160_in1k"),
    (r"vit_\w+_patch16_224", "test_vit"),
    (r"convnext_atto", "test_convnext"),
    (r"--train\.epochs \d+", "--train.steps 2 --train.eval_every 1"),
    (r"--train\.global_batch \d+", "--train.global_batch 8"),
    (r'"(epochs|steps)": \d+', '"steps": 2'),
    (r"epochs: \d+", "steps: 2"),
    (r"(global_batch): \d+", r"\1: 16"),
    (r"(micro_batch): \d+", r"\1: 4"),
    (r"(--nproc-per-node|--num_gpus|--workers|num_workers=|workers:)( ?)[48]", r"\1\g<2>2"),
    (r"step-000(00337|00023)", "step-00000002"),
    (r"step-00000315", "step-00000001"),
    (r"^make (?!train)", "make -n "),
    (r"^(bigvision checkpoint diff .*)$", r"\1 || test $? = 1"),
    (r"(?<!-)\bdeepspeed (?=--|launch)", "deepspeed --master_port $(free_port) "),
)
"""What makes seconds of the hours of a user's command, in the documents and in the recipes: (pattern, replacement)."""

RECIPE = """
model: {name: test_vit, image_size: 32}
data: {train: digits, val: digits, workers: 0}
parallel: {strategy: ddp, precision: fp32}
train: {steps: 2, global_batch: 16}
"""


def shortened(text: str) -> str:
    for pattern, replacement in SHORTER:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    while "$(free_port)" in text:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            text = text.replace("$(free_port)", str(free.getsockname()[1]), 1)
    return text


def runs(block: Block) -> bool:
    return block.language in ("sh", "python") and block.reason is None


def user_files(folder: Path) -> None:
    """What users have beside a checkout: images of two classes, tables of their tags and numbers, a recipe."""
    random = np.random.default_rng(0)
    for number, name in enumerate(("cat", "dog")):
        (folder / "pets" / name).mkdir(parents=True)
        for index in range(30):
            pixels = random.integers(0, 120, (72, 96 + index % 2, 3)) + 80 * number
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "pets" / name / f"{index}.jpg")
    rows = [(f"pets/{name}/{index}.jpg", name, index) for name in ("cat", "dog") for index in range(30)]
    tags = [f"{path},{name};{'odd' if index % 2 else 'even'}" for path, name, index in rows]
    scans = [f"{path},{index}.5,{70 + index}" for path, _, index in rows]
    (folder / "tags.csv").write_text("\n".join(["path,tags", *tags]))
    (folder / "scans.csv").write_text("\n".join(["path,age,weight", *scans]))
    (folder / "recipe.yaml").write_text(RECIPE)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights of ``test_vit`` in the place of downloaded ones, in the form of a hub's cache and as a pickle."""
    import timm
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("weights")
    snapshot = folder / "hub/models--timm--test_vit.r160_in1k/snapshots/0123456789012345678901234567890123456789"
    snapshot.mkdir(parents=True)
    state = timm.create_model("test_vit").state_dict()
    save_file(state, snapshot / "model.safetensors")
    torch.save(state, folder / "model.pth")
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs/main").write_text(snapshot.name)
    return folder


def checkout(folder: Path) -> None:
    """A copy of the project's files, as a clone has them, with short recipes and an environment that is installed."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for recipe in (folder / "recipes").iterdir():
        recipe.write_text(shortened(recipe.read_text()) + "checkpoint: {every: 1}\n")
    venv, installed = folder / ".venv", Path(sys.prefix)
    venv.mkdir()
    for name in ("bin", "lib"):
        (venv / name).symlink_to(installed / name)
    shutil.copy(installed / "pyvenv.cfg", venv)
    (venv / "installed").touch()


@pytest.mark.long
@pytest.mark.parametrize(
    "document",
    [document for document in DOCUMENTS if any(map(runs, blocks(document)))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_block_of_a_document_runs(document: Path, tmp_path: Path, weights: Path) -> None:
    checkout(tmp_path)
    user_files(tmp_path)
    shutil.copy(weights / "model.pth", tmp_path)
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_CACHE": str(weights / "hub"),
        "HF_HUB_OFFLINE": "1",
    }
    for number, block in enumerate(blocks(document)):
        text = shortened(block.text)
        if block.language == "yaml" and (name := re.match(r"# (\S+\.yaml)\n", text)):
            (tmp_path / name[1]).write_text(text, encoding="utf-8")
        if not runs(block):
            continue
        script = tmp_path / f"block{number}.{block.language}"
        script.write_text(text, encoding="utf-8")
        program = ["bash", "-euo", "pipefail"] if block.language == "sh" else [sys.executable]
        done = subprocess.run(
            [*program, script.name], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=3000
        )
        assert done.returncode == 0, f"{block}:\n{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_the_first_commands_of_readme_print_what_it_shows(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of "Fine-tune on your images", in this process: the lines are those of the document, but for the numbers."""
    import huggingface_hub

    file = next(weights.glob("hub/*/snapshots/*/model.safetensors"))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **keys: str(file))
    monkeypatch.chdir(tmp_path)
    user_files(tmp_path)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first, last = (readme[: readme.index(title)].count("\n") for title in ("## Fine-tune on your images", "## On 8 GPUs"))
    section = [block for block in blocks(ROOT / "README.md") if first < block.line <= last]
    with redirect_stdout(io.StringIO()) as printed:
        for block in section:
            if block.language == "sh":
                for words in commands(shortened(block.text)):
                    if words[0] == "bigvision":
                        assert main(words[1:]) == 0
            elif block.language == "python":
                (tmp_path / "block.py").write_text(shortened(block.text))
                runpy.run_path(str(tmp_path / "block.py"))
    shown = [line for block in section if block.language == "text" for line in block.text.splitlines()]
    assert len(shown) > 5
    for line in shown:
        words = [re.sub(r"\d[\d.]*", r"[\\d.]+", re.escape(word)).replace(r"\.\.\.", ".*") for word in line.split()]
        pattern = " +".join(words)
        assert re.search(f"^{pattern}$", printed.getvalue(), re.MULTILINE), f"not printed: {line}\n{printed.getvalue()}"
    assert "['cat', 'dog']" in printed.getvalue()
