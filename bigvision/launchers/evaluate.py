"""``bigvision eval`` and ``bigvision predict``: of a step folder, or of a timm model with its own weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import timm.data

from bigvision import checkpoint, training
from bigvision.config import Config, resolve
from bigvision.data import Source, open_source
from bigvision.data.labels import Target, read_classes
from bigvision.errors import UserError, nearest
from bigvision.launchers.accelerate import overrides
from bigvision.launchers.commands import take, whole
from bigvision.models.arguments import check_name, current_name
from bigvision.models.weights_file import MARK
from bigvision.runtime import Runtime, identify
from bigvision.tasks import Task, build_task
from bigvision.training.data import BadSamples, Data, open_data, open_on_all
from bigvision.training.evaluation import first_weights, restored
from bigvision.training.prediction import Prediction, open_unlabelled, predict

PROG = "bigvision eval STEP_FOLDER|MODEL [--ema] [--report FILE]"
PREDICT_PROG = "bigvision predict STEP_FOLDER|MODEL IMAGES --out FILE [--top-k K] [--tta flip] [--draw FOLDER] [--ema]"
Say = Callable[[str], None]


def run(arguments: list[str], say: Say) -> dict[str, float]:
    """``STEP_FOLDER [--ema] [--report FILE] [--section.key value ...]``, or a timm name, whose pretrained weights are taken.

    ``--ema`` takes the averaged weights of a step folder. ``--report`` writes what the task says beyond the metrics.
    """
    files, arguments = take(arguments, ("--report",))
    report: dict[str, Any] = {}
    if not arguments or arguments[0].startswith("-"):
        if {"-h", "--help"} & set(arguments):
            resolve(None, ["--help"], prog=PROG)
        raise UserError(
            "eval: name a step folder or a timm model: bigvision eval checkpoints/digits/step-00000100, "
            "or bigvision eval resnet18.a1_in1k --data.val imagefolder:PATH"
        )
    subject, flags, ema = arguments[0], [flag for flag in arguments[1:] if flag != "--ema"], "--ema" in arguments
    folder = find_subject("eval", subject, ema)
    config = subject_config(folder, subject, flags, PROG, say)
    key = "--data.val" if build_task(config.task).learns else "--data.train"
    if folder is None and key not in {flag.partition("=")[0] for flag in flags}:
        raise UserError(f"eval: {subject} on which images? Name them: {key} imagefolder:PATH")
    metrics = (
        evaluate_model(config, say, report)
        if folder is None
        else training.evaluate_checkpoint(folder, config, say, ema, report)
    )
    if files and identify(os.environ).rank == 0:
        training.write_report(Path(files[-1][1]).expanduser(), report)
    return metrics


def run_predict(arguments: list[str], say: Say) -> None:
    """``STEP_FOLDER|MODEL SOURCE --out FILE [--top-k K] [--tta flip] [--ema] [--section.key value ...]``."""
    if {"-h", "--help"} & set(arguments):
        resolve(None, ["--help"], prog=PREDICT_PROG)
    own, rest = take(arguments, ("--out", "--top-k", "--tta", "--draw"))
    given, flags = dict(own), [flag for flag in rest if flag != "--ema"]
    if len(flags) < 2 or flags[0].startswith("-") or flags[1].startswith("-"):
        raise UserError(f"predict: name a model and images: {PREDICT_PROG}")
    if "--out" not in given:
        raise UserError("--out: name the file for the predictions, such as --out predictions.csv")
    top = whole("--top-k", given["--top-k"]) if "--top-k" in given else 1
    draw = Path(given["--draw"]).expanduser() if "--draw" in given else None
    asked = Prediction(flags[1], Path(given["--out"]).expanduser(), top, given.get("--tta", "none"), draw)
    predict_subject(flags[0], flags[2:], asked, "--ema" in rest, say)


def predict_subject(subject: str, flags: list[str], asked: Prediction, ema: bool, say: Say) -> list[dict[str, Any]]:
    """The rows that the model *subject* predicts, on rank 0, unless they go to a file. Run on every rank."""
    folder = find_subject("predict", subject, ema)
    config = subject_config(folder, subject, flags, PREDICT_PROG, say)
    asked.check(build_task(config.task))

    def open_it(config: Config, runtime: Runtime, task: Task, classes: list[str] | None = None) -> Data:
        return open_unlabelled(asked, config, task, runtime, classes or [])

    def open_named(config: Config, runtime: Runtime, task: Task) -> tuple[Data, int | None]:
        classes, outputs = _output_names(config) if task.learns else ([], None)
        if classes:
            task.prepare(classes, _saved_card(config.model.weights).get("task", {}))
        return open_it(config, runtime, task, classes), outputs

    with restored(folder, config, open_it, say, ema) if folder else first_weights(config, open_named, say) as ready:
        return predict(ready, asked, say)


def find_subject(command: str, subject: str, ema: bool) -> Path | None:
    """The step folder *subject*, or None where it is a timm model; `UserError` where it is neither."""
    folder = Path(subject).expanduser()
    hub = subject.startswith(("hf-hub:", "hf_hub:", "local-dir:"))  # `check_name` refuses those
    if not folder.is_dir() and (hub or timm.is_model(current_name(subject)[0].partition(".")[0])):
        check_name(current_name(subject)[0])
        if ema:
            raise UserError(f"--ema: {subject} is a timm model, and has no averaged weights of a run: leave --ema out")
        return None
    try:
        json.loads((folder / "progress.json").read_bytes())["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if steps := checkpoint.steps_in(folder):
            newest = folder / checkpoint.folder_name(steps[0])
            raise UserError(f"{command}: {subject} is the folder of a run: name one of its steps, such as {newest}") from None
        hint = f": {error}" if folder.exists() else nearest(subject.lower(), timm.list_models())
        raise UserError(f"{command}: {subject} is not a step folder of a run, and not a timm model{hint}") from None
    return folder


def subject_config(folder: Path | None, subject: str, flags: list[str], prog: str, say: Say) -> Config:
    """The configuration of the run that saved *folder*, or of the timm model *subject*, with *flags* before it."""
    if folder is None:
        # Its own weights and image size, unless flags name others.
        named = {flag.partition("=")[0] for flag in flags}
        pretrained = not {"--model.weights", "--model.pretrained"} & named
        saved: Any = {"model": {"name": subject, "pretrained": pretrained}, "out": "unused"}
    else:
        saved = json.loads((folder / "progress.json").read_bytes())["config"]
        if isinstance(saved, dict) and isinstance(saved.get("parallel"), dict):
            # The file may be gone, and what it decided is saved; it counts again where a flag names it.
            saved["parallel"]["deepspeed"] = None
        if isinstance(saved, dict) and any(flag.partition("=")[0] == "--task.name" for flag in flags):
            saved["task"] = {}  # another task has a use for other keys
    return resolve(saved, flags, overrides(os.environ, say), prog=prog, say=say)[0]


def evaluate_model(
    config: Config, say: Say = lambda text: None, report: dict[str, Any] | None = None
) -> dict[str, float]:  # fmt: skip
    """Return the metrics of the model that *config* names, with its first weights, on all of ``data.val``. Run on every rank.
    *report* gets what the task says beyond them.

    `UserError` where the model, its weights and the data do not fit together.
    """

    def open_it(config: Config, runtime: Runtime, task: Task) -> tuple[Data, int | None]:
        if not task.learns:
            return open_data(config, runtime, task), None
        val, outputs = open_on_all(partial(_open, config, target=task.target), runtime)
        task.prepare(val.classes, _saved_card(config.model.weights).get("task", {}))
        return Data(val, val, BadSamples(config.data.bad_budget, {"train": len(val), "val": len(val)}), task), outputs

    with first_weights(config, open_it, say) as ready:
        return ready.evaluate(report)


def _open(config: Config, first: bool, target: Target = "label") -> tuple[Source, int]:
    """The images with labels in the order of the model's outputs, and how many of these there are."""

    def opened(classes: list[str] | None = None) -> Source:
        return open_source(
            config.data.val, "val", key="data.val", root=config.data.root, first=first, shared=False, classes=classes,
            class_file=config.data.classes, target=target, ignore=config.task.ignore,
        )  # fmt: skip

    model = config.model
    if config.data.classes is None and (saved := _saved_classes(model.weights)):
        return opened(saved), model.num_classes or len(saved)
    card, val = timm.models.get_pretrained_cfg(current_name(model.name)[0]), opened()
    theirs = card.num_classes if card is not None and model.pretrained else None
    outputs = model.num_classes or theirs or len(val.classes)
    if len(val.classes) <= outputs and config.data.classes is not None:
        return val, outputs
    subset = timm.data.infer_imagenet_subset({"num_classes": outputs}) if theirs == outputs else None
    synsets = timm.data.ImageNetInfo(subset).label_names() if subset else []
    if set(val.classes) <= set(synsets):
        return val if val.classes == synsets else opened(synsets), outputs
    numbers = [str(number) for number in range(outputs)]
    if sorted(val.classes) == sorted(numbers):
        return val if val.classes == numbers else opened(numbers), outputs  # folders are sorted as texts
    # Words in the order of their letters are not in the synsets' order; those of the Hub's ImageNet are.
    if len(val.classes) == outputs and (not synsets or val.classes != sorted(val.classes)):
        return val, outputs
    unknown = next((name for name in val.classes if name not in synsets), None)
    example = f" ({unknown!r} is none of {synsets[0]!r}, {synsets[1]!r}, ...)" if synsets and unknown is not None else ""
    raise UserError(
        f"data.val: {len(val.classes)} classes, but {model.name} has {outputs} outputs{example}: name images with the model's "
        "classes, or a file with them, in the order of the outputs, in data.classes"
    )


def _output_names(config: Config) -> tuple[list[str], int]:
    """What the outputs of the model that *config* names stand for, where that is known, and how many there are."""
    model = config.model
    if config.data.classes is not None:
        names = read_classes(config.data.classes, "data.classes")
        return names, model.num_classes or len(names)
    if saved := _saved_classes(model.weights):
        return saved, model.num_classes or len(saved)
    card = timm.models.get_pretrained_cfg(current_name(model.name)[0])
    outputs = model.num_classes or (card.num_classes if card is not None else 0)
    if not outputs:
        raise UserError(f"predict: {model.name} has no outputs of its own: give model.num_classes, and model.weights")
    subset = timm.data.infer_imagenet_subset({"num_classes": outputs}) if model.pretrained else None
    info = timm.data.ImageNetInfo(subset) if subset else None
    return ([info.index_to_description(index) for index in range(outputs)] if info else []), outputs


def _saved_classes(weights: str | None) -> list[str] | None:
    """The classes in the config.json beside *weights*."""
    found = _saved_card(weights).get("label_names")
    return found if isinstance(found, list) and found and all(isinstance(name, str) for name in found) else None


def _saved_card(weights: str | None) -> dict[str, Any]:
    """The config.json beside *weights*, where a run or an export wrote it."""
    if weights is None:
        return {}
    path = Path(weights.partition(MARK)[0]).expanduser()
    try:
        found = json.loads((path if path.is_dir() else path.parent).joinpath("config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
