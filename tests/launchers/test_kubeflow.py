"""The manifests against the published models of Kubeflow Trainer's API.

The models check types, and drop keys that they do not know without a word: a manifest is right when it comes back whole.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from bigvision.errors import Exit
from bigvision.launchers import submit
from bigvision.launchers.submit import read_job, run
from tests.launch.commands import ROOT

MODELS = {
    "ConfigMap": "IoK8sApiCoreV1ConfigMap",
    "TrainJob": "TrainerV1alpha1TrainJob",
    "TrainingRuntime": "TrainerV1alpha1TrainingRuntime",
}
FILES = sorted((ROOT / "launch" / "kubeflow").glob("*.yaml"))


def there_and_back(manifest: dict[str, Any]) -> dict[str, Any]:
    """What the API's models keep of a manifest."""
    # Imported here, not when tests are collected: it takes more than a second.
    models = pytest.importorskip(
        "kubeflow_trainer_api.models", reason="kubeflow_trainer_api is not installed: pip install 'bigvision[dev]'"
    )
    return getattr(models, MODELS[manifest["kind"]]).from_dict(copy.deepcopy(manifest)).to_dict()


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def submitted(*options: str) -> list[dict[str, Any]]:
    image = ["--image", "registry.example/bigvision:0.1"]
    _, job = read_job([str(ROOT / "recipes" / "digits.yaml"), "--to", "k8s", *image, *options])
    return [submit.config_map(job), submit.train_job(job)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_files_come_back_whole(path: Path) -> None:
    assert documents(path)
    for manifest in documents(path):
        assert there_and_back(manifest) == manifest


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--nodes", "4", "--ranks-per-node", "8", "--time", "2-00:00:00", "--claim", "runs:/runs", "--out", "/runs/digits"],
        ["--parallel.device", "cpu", "--train.steps", "3"],
    ],
    ids=["plain", "all options", "cpu"],
)
def test_what_submit_hands_over_comes_back_whole(options: list[str]) -> None:
    for manifest in submitted(*options):
        assert there_and_back(manifest) == manifest


def test_the_example_is_what_its_first_line_makes(capsys: pytest.CaptureFixture[str]) -> None:
    example = (ROOT / "launch" / "kubeflow" / "trainjob.yaml").read_text()
    comment = "".join(line[1:].rstrip("\\") for line in example.splitlines() if line.startswith("#"))
    _, command, *arguments = comment.split()
    assert command == "submit"
    arguments[arguments.index("recipes/digits.yaml")] = str(ROOT / "recipes" / "digits.yaml")
    assert run(arguments) == 0
    assert example.endswith(capsys.readouterr().out)


def branches(tree: Any) -> list[dict[str, Any]]:
    """Every mapping in a manifest whose keys the API names."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    # These hold names of the user's own.
    found = [branch for key, value in inside if key not in ("labels", "limits", "data", "torch") for branch in branches(value)]
    return [tree, *found] if isinstance(tree, dict) else found


@pytest.mark.parametrize(
    "manifest", [*submitted(), *documents(ROOT / "launch" / "kubeflow" / "runtime.yaml")], ids=lambda manifest: manifest["kind"]
)
def test_a_key_that_the_api_does_not_have_is_found_wherever_it_is(manifest: dict[str, Any]) -> None:
    places = len(branches(manifest))
    assert places >= 2
    for place in range(places):
        planted = copy.deepcopy(manifest)
        branches(planted)[place]["restartPolicies"] = "Never"
        assert there_and_back(planted) != planted, branches(planted)[place]


def test_a_wrong_type_is_found() -> None:
    _, job = submitted()
    job["spec"]["trainer"]["numNodes"] = "two"
    with pytest.raises(ValueError, match="numNodes"):
        there_and_back(job)


def test_the_runtime_restarts_all_but_mistakes() -> None:
    (runtime,) = documents(ROOT / "launch" / "kubeflow" / "runtime.yaml")
    assert runtime["metadata"]["name"] == submit.RUNTIME
    jobs = runtime["spec"]["template"]["spec"]
    assert jobs["failurePolicy"]["maxRestarts"] == 100
    (node,) = jobs["replicatedJobs"]
    spec = node["template"]["spec"]
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [int(Exit.MISTAKE)]
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] == submit.POD_GRACE_SECONDS
