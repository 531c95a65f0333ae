"""The command line: training, evaluation, and what is done with weights and checkpoints."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
import traceback

from bigvision import importing
from bigvision.errors import Exit, Stopped, UserError, nearest
from bigvision.redact import without_secrets
from bigvision.signals import listening

USAGE = """usage: bigvision COMMAND ...

  train [RECIPE.yaml] [--section.key value ...]   train; without a recipe, the handwritten digits
    --ranks N --restarts N                        on N ranks of this host; start them again after a crash, at most N times
  plan [RECIPE.yaml] [--hardware 8xH200] [--section.key value ...]
                                                  print what fits, how fast it would be, and what would make the rest fit
  ray [RECIPE.yaml] [--workers N] ...             train on Ray's workers
  submit --to local|slurm|k8s RECIPE.yaml ...     hand a run to this machine, to Slurm or to Kubernetes
  eval STEP_FOLDER [--ema] [--report FILE] [--section.key value ...]
                                                  print a checkpoint's validation metrics, or its average's; the report has
                                                  those of each class, a confusion matrix, ...
  eval MODEL --data.val DATASET ...               print those of a timm model with its pretrained weights
  predict STEP_FOLDER|MODEL IMAGES --out FILE     write what a model predicts for a folder of images or a dataset
  convert IN.pth OUT.safetensors                  rewrite pickled weights, for model.weights
  export STEP_FOLDER OUT [--format timm|hf|onnx]  write a checkpoint's weights for other tools, and run them
  doctor [RECIPE.yaml] [--section.key value ...]  look for what would keep a run from training, or slow it down
  recipe from-timm ARGS.yaml [--ranks N] [--out FILE]  turn the options of timm's train.py into a recipe
  checkpoint list|verify|diff|prune ...           look at checkpoints, check, compare and remove them
  report RUN [--out FILE]                         write the page of a run's folder again
  compare RUN RUN ... [--out FILE]                lay the curves of several runs over each other on one page

--resume X is another spelling of --checkpoint.resume X; --deepspeed FILE and --deepspeed_config FILE are others of
--parallel.deepspeed FILE. train, doctor, eval and predict run under every launcher of docs/launching.md.
More: bigvision COMMAND --help. Versions, for a report: bigvision --version."""

COMMANDS = (
    "train", "plan", "doctor", "eval", "predict", "ray", "submit", "convert", "export", "recipe", "checkpoint", "report",
    "compare",
)  # fmt: skip
GRACE = 5.0
"""Seconds that a silent rank leaves to the one that reports a mistake."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code, an `Exit`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # The deepspeed launcher puts its flag in front: --local_rank=0 train ...
    command, *rest = _without_local_rank(arguments) or ["--help"]
    try:
        if command in ("-h", "--help"):
            print(USAGE)
            return Exit.DONE
        if command == "--version":
            print(_versions())
            return Exit.DONE
        if command not in COMMANDS:
            raise UserError(f"unknown command {command!r}{nearest(command, COMMANDS)}; the commands are {', '.join(COMMANDS)}")
        return run(command, rest)
    except UserError as error:
        if _rank(local=True) == 0:  # every rank makes the same mistake; one per host reports it
            print(f"error: {without_secrets(str(error))}", file=sys.stderr)
        else:
            # A launcher ends all ranks when one leaves, also the one that has not come to say why.
            time.sleep(GRACE)
        return Exit.MISTAKE
    except Stopped as stopped:
        if _rank() == 0:
            print(stopped, file=sys.stderr)
        return Exit.STOPPED
    except Exception as error:
        traceback.print_exc()
        print(f"error: rank {_rank()}: {type(error).__name__}: {error}", file=sys.stderr)
        return Exit.FAULT


def run(command: str, arguments: list[str]) -> int:
    """Run one of `COMMANDS` and return its exit code. What it needs is imported here: torch takes seconds."""
    if command == "train":
        with listening():
            return _train(arguments)
    if command == "plan":
        return _plan(_with_our_spelling(arguments))
    if command == "ray":
        with listening():
            from bigvision.launchers import ray

            return ray.run(_with_our_spelling(arguments))
    if command == "submit":
        from bigvision.launchers import submit

        return submit.run(_with_our_spelling(arguments))
    if command == "eval":
        from bigvision.launchers import evaluate

        main_rank = _rank() == 0
        metrics = evaluate.run(_with_our_spelling(arguments), lambda line: print(line, file=sys.stderr) if main_rank else None)
        if main_rank:
            print(json.dumps(metrics))
        return Exit.DONE
    if command == "predict":
        from bigvision.launchers import evaluate as prediction

        main_rank = _rank() == 0
        prediction.run_predict(_with_our_spelling(arguments), lambda line: print(line, file=sys.stderr) if main_rank else None)
        return Exit.DONE
    if command == "convert":
        from bigvision.models import convert

        return convert.run(arguments)
    if command in ("report", "compare"):
        from bigvision.launchers import compare

        return compare.run(command, arguments)
    if command == "doctor":
        with listening():
            from bigvision.launchers import doctor

            return doctor.run(_with_our_spelling(arguments))
    if command == "recipe":
        from bigvision.launchers import from_timm

        return from_timm.run(arguments)
    from bigvision.checkpoint import commands

    return commands.run_export(arguments) if command == "export" else commands.run_checkpoint(arguments)


def _train(arguments: list[str]) -> int:
    """``bigvision train [RECIPE.yaml] [--ranks N] [--restarts N] [--print-config] [--section.key value ...]``."""
    began = time.monotonic()
    from bigvision.config import describe, resolve
    from bigvision.launchers.accelerate import overrides
    from bigvision.launchers.commands import take, take_recipe, whole

    print_only = "--print-config" in arguments
    arguments = [argument for argument in _with_our_spelling(arguments) if argument != "--print-config"]
    named, arguments = take(arguments, ("--ranks", "--restarts"))
    counts = {name: whole(name, text, lowest=int(name == "--ranks")) for name, text in named}
    recipe, flags, note = take_recipe(arguments)
    notes = [note] if note else []
    config, origins = resolve(recipe, flags, overrides(os.environ, notes.append), say=notes.append)
    if _rank() == 0:
        for line in notes:
            print(f"# {line}" if print_only else line)
    if print_only:
        if _rank() == 0:
            print(describe(config, origins))
        return Exit.DONE
    if counts:
        from bigvision.launchers import ranks

        return ranks.train_with_restarts(config, origins, began, counts.get("--ranks"), counts.get("--restarts", 0))
    from bigvision.data.workers import fork_server
    from bigvision.training import train_on_rank

    if config.data.workers:
        fork_server()
    train_on_rank(config, began=began, origins=origins)
    return Exit.DONE


PLAN_USAGE = """usage: bigvision plan [RECIPE.yaml] [--section.key value ...] [--hardware HARDWARE] [--json]
       bigvision plan --calibrate

Print which strategies fit, ranked by the images/s that are predicted for them, and what would make the others fit.
Nothing is trained, and the devices need not be here.

  --hardware HARDWARE   8xH200, 16x8xH100 (hosts x devices), cpu, or a YAML file that describes your own; by default the
                        devices of this machine
  --calibrate           measure the machine at hand, and keep it for later plans
  --json                everything that was found, for programs"""


def _plan(arguments: list[str]) -> int:
    """``bigvision plan``."""
    from bigvision.launchers.commands import take, take_recipe

    if any(argument in ("-h", "--help") for argument in arguments):
        print(PLAN_USAGE)
        return Exit.DONE
    named, rest = take(arguments, ("--hardware",))
    if len(named) > 1:
        raise UserError(f"--hardware: {named[0][1]} and {named[1][1]}: name one")
    as_json, calibrates = "--json" in rest, "--calibrate" in rest
    rest = [argument for argument in rest if argument not in ("--json", "--calibrate")]
    if calibrates:
        if named or rest or as_json:
            other = ("--hardware" if named else "--json", *rest)[-1]
            raise UserError(f"--calibrate: it measures this machine, and has no use for {other}: leave that out")
        from bigvision.planning import calibrate

        return calibrate.run()
    recipe, flags, note = take_recipe(rest)
    with importing():
        from bigvision.planning import command
    return command.run(recipe, flags, named[0][1] if named else None, as_json, [note] if note else [])


def _versions() -> str:
    """One line with the versions that a report of a fault needs; nothing heavy is imported for it."""
    from importlib.metadata import PackageNotFoundError, version

    from bigvision import __version__

    found = [f"Python {platform.python_version()}"]
    for name in ("torch", "torchvision", "timm", "deepspeed", "accelerate", "safetensors"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return f"bigvision {__version__} ({', '.join(found)}; {platform.platform()})"


def _rank(local: bool = False) -> int:
    """This process's rank, or its rank on this host; 0 where it does not know."""
    from bigvision.runtime.rendezvous import identify

    try:
        here = identify(os.environ)
        return here.local_rank if local else here.rank
    except UserError:
        return 0


def _without_local_rank(arguments: list[str]) -> list[str]:
    # Launchers append it, in either spelling; the environment says the same.
    joined = [argument for argument in arguments if not re.fullmatch(r"--local[-_]rank=-?\d+", argument)]
    while at := next((n for n, argument in enumerate(joined, start=1) if argument in ("--local_rank", "--local-rank")), 0):
        del joined[at - 1 : at + 1]
    return joined


def _with_our_spelling(arguments: list[str]) -> list[str]:
    """``--resume`` and DeepSpeed's flags for its file in our words. Its bare ``--deepspeed`` beside the other says no more."""
    named = any(re.match(r"--deepspeed[-_]config(=|\Z)", argument) for argument in arguments)
    kept = []
    for argument, following in zip(arguments, [*arguments[1:], "--"]):
        if not (named and argument == "--deepspeed" and following.startswith("-")):
            argument = re.sub(r"\A--deepspeed([-_]config)?(?==|\Z)", "--parallel.deepspeed", argument)
            kept.append(re.sub(r"\A--resume(?==|\Z)", "--checkpoint.resume", argument))
    return kept


if __name__ == "__main__":
    sys.exit(main())
