"""``bigvision submit``: a run made into a job for this machine, Slurm or Kubernetes, and handed over."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bigvision.config import Config, resolve
from bigvision.errors import Exit, UserError, either
from bigvision.launchers.commands import take, whole

RESTARTS = 100
"""How often a run is started again by default. It ends itself where that leads nowhere (`faults`): this is for
what keeps it from beginning at all."""
SIGNAL_SECONDS = 120
"""How long before its time is over the run is asked to save and stop."""
LEFT_SECONDS = 60
"""How long a rank may run on when another has ended. Not at once: the ranks would be stopped by a signal before they ended with
exit codes of their own, and a mistake looked like a run that is to go on."""
GPUS = {"gres", "gpus", "gpus-per-node"}
"""The options that ask for GPUs."""
BODY = """
{program}
code=$?

# A mistake stays one. All else, as a run that a signal stopped and saved (75), goes on from its newest checkpoint.
if [ "$code" -ne 0 ] && [ "$code" -ne {mistake} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ]; then
    # Slurm ends this script while it puts the job back; an exit before that would be the job's end.
    scontrol requeue "$SLURM_JOB_ID" && sleep 600
fi
exit "$code"
"""
RUNTIME = "bigvision"
"""The runtime of launch/kubeflow/runtime.yaml, which decides when a job is started again."""
POD_GRACE_SECONDS = 60
"""From SIGTERM to SIGKILL: a run saves and stops within ten seconds and one step."""
RECIPE = "/etc/bigvision/recipe.yaml"
USAGE = """usage: bigvision submit --to local|slurm|k8s RECIPE.yaml [--dry-run] [options] [--section.key value ...]

  --to local              start the ranks here and wait for them
  --to slurm              hand a script to sbatch, on its standard input
  --to k8s                hand a TrainJob of Kubeflow Trainer to kubectl apply, on its standard input
  --dry-run               print what would be handed over, and do nothing
  --nodes N               hosts; 1 without it
  --ranks-per-node N      ranks on each, one for each GPU unless parallel.device is cpu; 1 without it
  --name NAME             of the job: a-z, 0-9 and -, at most 50; without it made from the recipe's name
  --restarts N            (local, slurm) how often it is started again, from its newest checkpoint, when it did not end or was
                          stopped; 100 without it
  --time D-HH:MM:SS       (slurm, k8s) the longest it may take, also HH:MM:SS or minutes
  --cpus-per-task N       (slurm) CPUs of each rank; without it one, and one for each of data.workers
  --mem SIZE              (slurm) memory of each node, such as 64G; also --mem-per-cpu, --mem-per-gpu
  --partition NAME        (slurm) where it may run; also --account, --qos, --constraint, --reservation, --nodelist, --exclude
  --gres GRES             (slurm) in the place of a GPU for each rank, such as gpu:h100:8; also --gpus, --gpus-per-node
  --sbatch OPTION         (slurm) any other option of sbatch, such as --sbatch --exclusive --sbatch --mail-type=END
  --image IMAGE           (k8s, needed) the container's image, which has bigvision in it
  --claim CLAIM:/PATH     (k8s) a volume claim and where the container sees it; `out` has to be on one, or a restart begins anew
  --section.key value     the flags of bigvision train; with the recipe they are checked before anything is handed over"""

NAMES = r"[A-Za-z0-9_][A-Za-z0-9_.@-]*(,[A-Za-z0-9_][A-Za-z0-9_.@-]*)*"
HOSTS = r"[A-Za-z0-9_][A-Za-z0-9_.,\[\]-]*"
SIZE, COUNT = r"[0-9]{1,9}[KMGT]?", r"([A-Za-z][A-Za-z0-9_.-]*:)?[1-9][0-9]{0,5}"
SLURM = {
    "--partition": (NAMES, "names of partitions, such as gpu,long"),
    "--account": (NAMES, "the name of an account"),
    "--qos": (NAMES, "the name of a quality of service"),
    "--mem": (SIZE, "a size, such as 64G, or 0 for all"),
    "--mem-per-cpu": (SIZE, "a size, such as 4G"),
    "--mem-per-gpu": (SIZE, "a size, such as 64G"),
    "--gres": (r"[A-Za-z0-9_]+(:[A-Za-z0-9_.-]+){0,2}(,[A-Za-z0-9_]+(:[A-Za-z0-9_.-]+){0,2})*", "such as gpu:h100:8"),
    "--gpus": (COUNT, "a number, such as 8 or h100:8"),
    "--gpus-per-node": (COUNT, "a number, such as 8 or h100:8"),
    "--constraint": (r"[A-Za-z0-9_(\[][A-Za-z0-9_.,&|*()\[\]-]*", "features of nodes, such as h100&ib"),
    "--reservation": (NAMES, "the name of a reservation"),
    "--nodelist": (HOSTS, "hosts, such as node[1-4]"),
    "--exclude": (HOSTS, "hosts, such as node[1-4]"),
}
"""Options of sbatch that are passed on, with what they may look like and words for that."""
FORMS = {
    "--name": (
        r"[a-z]([-a-z0-9]{0,48}[a-z0-9])?",
        "a-z, 0-9 and -, begin with a letter, end with no -, and have at most 50 characters",
    ),
    **SLURM,
    "--image": (
        r"[a-z0-9][A-Za-z0-9._/-]*(:[0-9]+/[A-Za-z0-9._/-]+)?(:[A-Za-z0-9_.-]+)?(@sha256:[0-9a-f]{64})?",
        "the name of an image, such as registry.example/bigvision:0.1",
    ),
    "--claim": (r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?:(/[A-Za-z0-9_-][A-Za-z0-9._-]*)+", "CLAIM:/PATH, such as runs:/runs"),
}  # fmt: skip
"""The same for every option that is a text."""
ONE_OF = (("--mem", "--mem-per-cpu", "--mem-per-gpu"), ("--gres", "--gpus", "--gpus-per-node"))
SBATCH = r"--([a-z][a-z0-9-]{0,40})(?:=([A-Za-z0-9_.,:;@%+/()\[\]&|*=-]{1,300}))?"
TAKEN = {
    **dict.fromkeys(("job-name", "nodes", "time", *(option[2:] for option in SLURM)), "it has a flag of its own"),
    **dict.fromkeys(("ntasks", "ntasks-per-node", "ntasks-per-gpu", "ntasks-per-core"), "use --ranks-per-node"),
    "cpus-per-task": "it has a flag of its own",
    "cpus-per-gpu": "use --cpus-per-task",
    "gpus-per-task": "each rank has to see all GPUs of its host: use --gpus-per-node",
    **dict.fromkeys(("signal", "requeue", "no-requeue", "open-mode"), "a run could not save and go on"),
    **dict.fromkeys(("array", "wrap", "wait", "test-only", "parsable", "chdir"), "it changes what is run"),
}
"""Options of sbatch that --sbatch cannot set, and why."""

ONLY_FOR = {
    "--restarts": ("local", "slurm"),
    "--time": ("slurm", "k8s"),
    "--cpus-per-task": ("slurm",),
    **dict.fromkeys(SLURM, ("slurm",)),
    "--sbatch": ("slurm",),
    "--image": ("k8s",),
    "--claim": ("k8s",),
}
OPTIONS = ("--to", "--nodes", "--ranks-per-node", "--name", *ONLY_FOR)

TIME = r"(?:(\d{1,3})-)?(\d{1,7})(?::([0-5]\d))?(?::([0-5]\d))?"


@dataclass(frozen=True)
class Job:
    """A recipe and where it is to run. Every text in it has been checked by `read_job`."""

    name: str
    recipe: Path
    """Absolute."""
    flags: tuple[str, ...]
    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    """0 where the ranks compute on the CPU."""
    restarts: int
    """How often it may be started again."""
    seconds: int | None
    """The longest that it may take."""
    cpus_per_rank: int
    """For the rank itself and its data workers."""
    directives: tuple[tuple[str, str], ...]
    """More options of sbatch, by their long names; "" for one without a value."""
    image: str | None
    claim: tuple[str, str] | None
    """A volume claim and the folder where the container sees it."""


def _command(job: Job) -> list[str]:
    """What runs the job on this machine."""
    counts = ["--ranks", str(job.ranks_per_node), "--restarts", str(job.restarts)]
    return [sys.executable, "-m", "bigvision.cli", "train", str(job.recipe), *counts, *job.flags]


def script(job: Job) -> str:
    """The script: srun starts a rank for each task, and a run that did not get to its end is put into the queue again."""
    days, rest = divmod(job.seconds or 0, 86400)
    options = {
        "job-name": job.name, "nodes": job.nodes, "ntasks-per-node": job.ranks_per_node, "cpus-per-task": job.cpus_per_rank,
        "gpus-per-node": None if GPUS & {name for name, _ in job.directives} else job.gpus_per_node or None,
        "time": None if job.seconds is None else f"{days}-{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}",
        "output": f"{job.name}-%j.log",
        "signal": f"USR1@{SIGNAL_SECONDS}",  # to the ranks, not to this script
    }  # fmt: skip
    lines = ["#!/bin/bash"]
    options |= dict(job.directives)
    lines += [f"#SBATCH --{name}={value}".removesuffix("=") for name, value in options.items() if value is not None]
    lines += ["#SBATCH --requeue", "#SBATCH --open-mode=append"]
    # Since Slurm 22.05 srun does not take --cpus-per-task over from the job: ranks would share one core with their workers.
    srun = ["srun", "--kill-on-bad-exit=0", f"--wait={LEFT_SECONDS}", f"--cpus-per-task={job.cpus_per_rank}"]
    program = [sys.executable, "-m", "bigvision.cli", "train", str(job.recipe), *job.flags]
    body = BODY.format(program=shlex.join([*srun, *program]), mistake=int(Exit.MISTAKE), restarts=job.restarts)
    return "\n".join(lines) + "\n" + body


def config_map(job: Job) -> dict[str, Any]:
    """The recipe, which need not be in the image."""
    return {
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"{job.name}-recipe"},
        "data": {"recipe.yaml": job.recipe.read_text(encoding="utf-8")},
    }  # fmt: skip


def train_job(job: Job) -> dict[str, Any]:
    """The job: torchrun on each node, which gets the others from the runtime by PET_*."""
    # Kubernetes takes $(NAME) for a variable of the container, and $$ for the sign itself.
    flags = [flag.replace("$", "$$") for flag in job.flags]
    program = ["python", "-m", "bigvision.launchers.torchrun", "-m", "bigvision.cli", "train", RECIPE, *flags]
    volumes: list[dict[str, Any]] = [{"name": "recipe", "configMap": {"name": f"{job.name}-recipe"}}]
    mounts: list[dict[str, Any]] = [{"name": "recipe", "mountPath": RECIPE.rpartition("/")[0], "readOnly": True}]
    if job.claim:
        volumes.append({"name": "claim", "persistentVolumeClaim": {"claimName": job.claim[0]}})
        mounts.append({"name": "claim", "mountPath": job.claim[1]})
    trainer: dict[str, Any] = {
        "image": job.image, "command": program, "numNodes": job.nodes, "numProcPerNode": job.ranks_per_node,
    }  # fmt: skip
    if job.gpus_per_node:
        trainer["resourcesPerNode"] = {"limits": {"nvidia.com/gpu": str(job.gpus_per_node)}}
    pod = {
        "terminationGracePeriodSeconds": POD_GRACE_SECONDS, "volumes": volumes,
        "containers": [{"name": "node", "volumeMounts": mounts}],
    }  # fmt: skip
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


TARGETS: dict[str, tuple[str, ...]] = {"local": (), "slurm": ("sbatch",), "k8s": ("kubectl", "apply", "-f", "-")}
"""Where a job can go, and the program that takes it on its standard input; none for this machine."""


def render(to: str, job: Job) -> str:
    """What is handed over, as text."""
    if to == "local":
        return shlex.join(_command(job)) + "\n"
    return script(job) if to == "slurm" else yaml.safe_dump_all([config_map(job), train_job(job)], sort_keys=False)


def run(arguments: Sequence[str]) -> int:
    """``bigvision submit --to local|slurm|k8s RECIPE.yaml ...``; returns the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return Exit.DONE
    to, job = read_job([argument for argument in arguments if argument != "--dry-run"])
    if "--dry-run" in arguments:
        print(render(to, job), end="")
        return Exit.DONE
    if to == "local":
        sys.stdout.flush()
        os.execv(sys.executable, _command(job))
    # The words of the scheduler's program go to the user.
    name, *flags = TARGETS[to]
    if (program := shutil.which(name)) is None:
        raise UserError(f"submit: {name} is not on PATH: submit where the scheduler is, or look with --dry-run")
    done = subprocess.run([program, *flags], input=render(to, job), text=True, check=False)
    if done.returncode:
        raise UserError(f"submit: {shlex.join(TARGETS[to])} refused the job (exit code {done.returncode}), see above")
    return Exit.DONE


def read_job(arguments: Sequence[str]) -> tuple[str, Job]:
    """Check everything that can be checked here, as ``bigvision train`` would; returns the target and the job."""
    options, rest = take(arguments, OPTIONS)
    given = dict(options)
    to = given.get("--to", "")
    if to not in TARGETS:
        raise UserError(f"--to: {to!r} must be {either(list(TARGETS))}")
    if not rest or rest[0].startswith("-"):
        raise UserError("submit: name a recipe: bigvision submit --to local recipes/digits.yaml")
    for option, targets in ONLY_FOR.items():
        if option in given and to not in targets:
            raise UserError(f"{option}: {given[option]} is for --to {either(targets)}, not {to}: drop it")
    for argument in rest:
        # A line of its own in a script could be read as a directive; nothing of ours needs one.
        if not argument.isprintable():
            raise UserError(f"submit: {argument!r} has characters that cannot be printed: rename it, or write it otherwise")
    recipe, flags = rest[0], rest[1:]
    config, _ = resolve(recipe, flags, prog="bigvision submit --to TARGET RECIPE")
    more = [value for option, value in options if option == "--sbatch"]
    return to, _job(to, Path(recipe), flags, config, given, more)


def _job(to: str, recipe: Path, flags: list[str], config: Config, given: dict[str, str], more: list[str]) -> Job:
    given = {
        "--nodes": "1", "--ranks-per-node": "1", "--restarts": str(RESTARTS), "--name": _name_of(recipe),
        "--cpus-per-task": str(1 + config.data.workers), **given,
    }  # fmt: skip
    nodes, ranks = (whole(option, given[option]) for option in ("--nodes", "--ranks-per-node"))
    name = given["--name"]
    if to == "local" and nodes > 1:
        raise UserError(f"--nodes: {nodes} are more than this machine: use --to slurm or k8s, or --ranks-per-node")
    for option, (pattern, words) in FORMS.items():
        if option in given and not re.fullmatch(pattern, given[option], re.ASCII):
            raise UserError(f"{option}: {given[option]!r} must be {words}")
    for options in ONE_OF:
        if len(several := [option for option in options if option in given]) > 1:
            raise UserError(f"{several[0]} and {several[1]} ask for the same: drop one of the two")
    if to == "k8s" and "--image" not in given:
        raise UserError("--image: missing: name the container's image, such as --image registry.example/bigvision:0.1")
    claim, _, mount = given.get("--claim", "").partition(":")
    if mount and not Path(config.out).is_relative_to(mount):
        raise UserError(f"out: {config.out} is not on the volume of --claim {given['--claim']}: use --out {mount}/{name}")
    return Job(
        name=name, recipe=recipe.absolute(), flags=tuple(flags), nodes=nodes, ranks_per_node=ranks,
        gpus_per_node=0 if config.parallel.device == "cpu" else ranks, image=given.get("--image"),
        restarts=whole("--restarts", given["--restarts"], lowest=0),
        seconds=_seconds(given["--time"]) if "--time" in given else None,
        cpus_per_rank=whole("--cpus-per-task", given["--cpus-per-task"]),
        directives=(*((option[2:], given[option]) for option in SLURM if option in given), *map(_directive, more)),
        claim=(claim, mount) if claim else None,
    )  # fmt: skip


def _directive(text: str) -> tuple[str, str]:
    """The name and the value of an option of sbatch."""
    found = re.fullmatch(SBATCH, text, re.ASCII)
    if found is None:
        raise UserError(f"--sbatch: {text!r} must be a long option of sbatch without spaces, such as --sbatch --exclusive")
    if why := TAKEN.get(found[1]):
        raise UserError(f"--sbatch: {text}: {why}")
    return found[1], found[2] or ""


def _name_of(recipe: Path) -> str:
    name = re.sub(r"[^a-z0-9]+", "-", recipe.stem.lower()).strip("-")[:40].strip("-")
    return name if name[:1].isalpha() else f"run-{name}".strip("-")


def _seconds(text: str) -> int:
    """All of Slurm's spellings: minutes, minutes:seconds, hours:minutes:seconds, and days-hours with or without the rest."""
    total = 0
    if found := re.fullmatch(TIME, text, re.ASCII):
        days, *parts = found.groups()
        given = [int(part) for part in parts if part is not None]
        if days is None and len(given) < 3:
            given = [0, *given]
        hours, minutes, seconds = (*given, 0, 0)[:3]
        total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    if not total:
        raise UserError(f"--time: {text!r} must be minutes, HH:MM:SS, D-HH or D-HH:MM:SS")
    return total
