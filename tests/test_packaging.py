"""The wheel holds what it needs and works outside the checkout; versions, extras and the Dockerfile agree with the project."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

import bigvision
from bigvision.cli import COMMANDS
from bigvision.config.schema import TRACKERS

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_has_types_recipes_and_deepspeed_files_and_no_tests(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("recipes", "ds_configs"):
        assert {f"bigvision/{folder}/{file.name}" for file in (ROOT / folder).iterdir()} <= names
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "bigvision").rglob("*.py")}
    page = {str(file.relative_to(ROOT)) for file in (ROOT / "bigvision/monitor/page").iterdir()}
    assert modules | page | {"bigvision/py.typed"} <= names
    assert {name.partition("/")[0] for name in names} == {"bigvision", f"bigvision-{PROJECT['version']}.dist-info"}


@pytest.mark.long
def test_the_installed_wheel_trains_and_evaluates_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    home, work = tmp_path / "env", tmp_path / "work"
    work.mkdir()
    venv.create(home, symlinks=True, with_pip=False)
    packages = home / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    install = [sys.executable, "-m", "pip", "--python", str(home), "install", "--no-index", "--no-deps", "-q", str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    # .pth files inside this folder, such as that of an editable install of this checkout, are not followed.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

    def call(*arguments: str, program: str = "bigvision") -> str:
        done = subprocess.run(
            [str(home / "bin" / program), *arguments], cwd=work, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    where = Path(call("-c", "import bigvision; print(bigvision.__file__)", program="python").strip()).parent
    assert where == packages / "bigvision"
    assert call("--version").startswith(f"bigvision {PROJECT['version']}")
    assert str(where / "recipes" / "digits.yaml") in call("train", "--train.steps", "3", "--out", "run")
    metrics = json.loads(call("eval", "run/step-00000003"))
    assert 0 <= metrics["top1"] <= 1
    for name in ("zero1", "zero3_offload"):
        printed = call("train", "--parallel.deepspeed", str(where / "ds_configs" / f"{name}.json"), "--print-config")
        assert f"strategy: {name[:5]}" in printed


def test_the_versions_agree() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    assert bigvision.__version__ == PROJECT["version"] == cited
    assert f"## [{cited}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("extra, module", [("parquet", "pyarrow"), ("volumes", "nibabel"), ("ray", "ray")])
def test_an_extra_names_what_the_code_imports_for_it(extra: str, module: str) -> None:
    assert [re.split(r"[\[>]", requirement)[0] for requirement in EXTRAS[extra]] == [module]
    source = "".join(file.read_text() for file in (ROOT / "bigvision").rglob("*.py"))
    assert re.search(rf"^ +import {module}\b", source, re.MULTILINE)
    assert f"how_to_install('{extra}')" in source, "the error for its absence names the extra"


def test_every_extra_that_the_code_names_exists() -> None:
    for file in (ROOT / "bigvision").rglob("*.py"):
        for named in re.findall(r"bigvision\[([a-z,]+)\]", file.read_text()):
            assert set(named.split(",")) <= set(EXTRAS), file
    assert set(TRACKERS) <= set(EXTRAS)


def test_the_versions_in_constraints_satisfy_the_project() -> None:
    from packaging.requirements import Requirement

    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for text in [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]:
        requirement = Requirement(text)
        if requirement.name not in ("bigvision", "trackio"):  # which needs an older pillow than the tests
            assert requirement.specifier.contains(pinned[requirement.name]), text


def dockerfile_problems(text: str, ignored: list[str]) -> list[str]:
    """What is wrong with a Dockerfile, as far as its text and the checkout say."""
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    steps = [(name.upper(), rest.strip()) for name, _, rest in (line.partition(" ") for line in lines)]
    defaults = dict(rest.partition("=")[::2] for name, rest in steps if name == "ARG")
    found = []
    for name, rest in steps:
        if name == "FROM":
            image = re.sub(r"\$\{?(\w+)\}?", lambda match: defaults.get(match[1], ""), rest.split()[0])
            _, _, tag = image.rpartition("/")[2].partition(":")
            if not re.search(r"\d", tag) or "latest" in tag:
                found.append(f"FROM {image}: no pinned tag")
        elif name == "COPY":
            for source in rest.split()[:-1]:
                if not (ROOT / source).exists():
                    found.append(f"COPY {source}: no such file")
                if any(fnmatch(source.strip("/"), pattern) for pattern in ignored):
                    found.append(f"COPY {source}: excluded by .dockerignore")
        elif name == "RUN":
            for extra in re.findall(r"\.\[([\w,]+)\]", rest):
                found += [f"RUN: no extra {part}" for part in extra.split(",") if part not in EXTRAS]
    users = [rest for name, rest in steps if name == "USER"]
    if not users or users[-1].split(":")[0] in ("root", "0"):
        found.append("USER: runs as root")
    commands = [rest for name, rest in steps if name in ("CMD", "ENTRYPOINT")]
    words = (
        json.loads(commands[-1]) if commands and commands[-1].startswith("[") else shlex.split(commands[-1] if commands else "")
    )
    if len(words) < 2 or words[0] not in PROJECT["scripts"] or words[1] not in (*COMMANDS, "--help", "--version"):
        found.append(f"CMD: {words} is no command of this project")
    return found


def test_the_dockerfile_is_right_as_far_as_it_can_be_read() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert dockerfile_problems((ROOT / "Dockerfile").read_text(), ignored) == []


@pytest.mark.parametrize(
    "old, new, problem",
    [
        ("ARG CUDA=13.0.1-devel-ubuntu24.04", "ARG CUDA=latest", "no pinned tag"),
        ("nvidia/cuda:${CUDA}", "nvidia/cuda", "no pinned tag"),
        ("COPY recipes recipes", "COPY recipe recipes", "no such file"),
        ("COPY recipes recipes", "COPY checkpoints recipes", "excluded by .dockerignore"),
        (".[parquet]", ".[parquets]", "no extra parquets"),
        ("USER bigvision\n", "", "runs as root"),
        ('"bigvision", "--help"', '"bigvision", "trian"', "no command"),
    ],
)
def test_what_is_wrong_in_a_dockerfile_is_found(old: str, new: str, problem: str) -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert old in text
    assert problem in "\n".join(dockerfile_problems(text.replace(old, new), (ROOT / ".dockerignore").read_text().split()))


def test_what_the_build_reads_is_copied_into_the_image() -> None:
    """The wheel is built from what the Dockerfile copies: hatchling fails where README or a forced folder is absent."""
    copied = re.findall(r"^COPY (.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    sources = {source for line in copied for source in line.split()}
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {PROJECT["readme"], "pyproject.toml", "constraints.txt", *build["packages"], *build["force-include"]} <= sources


@pytest.mark.parametrize(
    "line, shown",
    [
        ("  Downloading torch-2.14.1-cp312-cp312-manylinux_2_28_x86_64.whl (502.1 MB)\n", "torch 2.14.1, 502.1 MB"),
        ("Downloading https://host/nvidia_cublas-13.1-py3-none-manylinux.whl (1.2 GB)\n", "nvidia_cublas 13.1, 1.2 GB"),
        ("Using cached ray-2.60.0-cp312-cp312-manylinux2014_x86_64.whl (79.3 MB)\n", "ray 2.60.0, 79.3 MB"),
        ("  Downloading rich-15.0.0-py3-none-any.whl.metadata (18 kB)\n", None),
        ("Downloading tyro-1.0.17-py3-none-any.whl (0.2 MB)\n", None),
        ("Installing collected packages: a, b, c\n", "unpacking 3 packages"),
    ],
)
def test_an_installation_shows_the_large_packages(line: str, shown: str | None) -> None:
    import runpy

    assert runpy.run_path(str(ROOT / ".ci" / "install.py"))["shortened"](line) == shown
