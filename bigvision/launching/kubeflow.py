"""A job as a TrainJob of Kubeflow Trainer v2, with its recipe in a ConfigMap beside it."""

from __future__ import annotations

from typing import Any

import yaml

from bigvision.launching.job import Job

RUNTIME = "bigvision"
"""The runtime of launch/kubeflow/runtime.yaml, which says when a job is started again."""
POD_GRACE_SECONDS = 60
"""From SIGTERM to SIGKILL: a run saves and stops within ten seconds and one step."""
RECIPE = "/etc/bigvision/recipe.yaml"


def manifest(job: Job) -> str:
    """The YAML documents for ``kubectl apply``."""
    return yaml.safe_dump_all([config_map(job), train_job(job)], sort_keys=False)


def config_map(job: Job) -> dict[str, Any]:
    """The recipe, which need not be in the image."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{job.name}-recipe"},
        "data": {"recipe.yaml": job.recipe.read_text(encoding="utf-8")},
    }


def train_job(job: Job) -> dict[str, Any]:
    """The job: torchrun on each node, which the runtime tells of the others by PET_*."""
    # Kubernetes takes $(NAME) for a variable of the container, and $$ for the sign itself.
    flags = [flag.replace("$", "$$") for flag in job.flags]
    program = ["python", "-m", "bigvision.launching.torchrun", "-m", "bigvision.cli", "train", RECIPE, *flags]
    volumes: list[dict[str, Any]] = [{"name": "recipe", "configMap": {"name": f"{job.name}-recipe"}}]
    mounts: list[dict[str, Any]] = [{"name": "recipe", "mountPath": RECIPE.rpartition("/")[0], "readOnly": True}]
    if job.claim:
        volumes.append({"name": "claim", "persistentVolumeClaim": {"claimName": job.claim[0]}})
        mounts.append({"name": "claim", "mountPath": job.claim[1]})
    trainer: dict[str, Any] = {
        "image": job.image,
        "command": program,
        "numNodes": job.nodes,
        "numProcPerNode": job.ranks_per_node,
    }
    if job.gpus_per_node:
        trainer["resourcesPerNode"] = {"limits": {"nvidia.com/gpu": str(job.gpus_per_node)}}
    pod = {
        "terminationGracePeriodSeconds": POD_GRACE_SECONDS,
        "volumes": volumes,
        "containers": [{"name": "node", "volumeMounts": mounts}],
    }
    patch = {"template": {"spec": {"replicatedJobs": [{"name": "node", "template": {"spec": {"template": {"spec": pod}}}}]}}}
    spec: dict[str, Any] = {} if job.seconds is None else {"activeDeadlineSeconds": job.seconds}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": job.name},
        "spec": {
            **spec,
            "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": RUNTIME},
            "trainer": trainer,
            "runtimePatches": [{"manager": "bigvision.dev/submit", "trainingRuntimeSpec": patch}],
        },
    }
