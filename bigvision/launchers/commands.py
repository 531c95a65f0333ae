"""A command's recipe beside its own flags, and ``bigvision eval``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import timm
import timm.data

from bigvision import checkpoint, training
from bigvision.config import Config, resolve
from bigvision.data import Source, open_source
from bigvision.errors import UserError, nearest
from bigvision.launchers.accelerate import overrides
from bigvision.models import check_model
from bigvision.models.arguments import check_name, current_name
from bigvision.models.weights_file import MARK
from bigvision.runtime import Watchdog, all_or_none, collective_timeout, start, warn_of_shared_memory
from bigvision.tasks import build_task
from bigvision.training.build import build_model
from bigvision.training.data import BadSamples, Data, open_on_all
from bigvision.training.trainer import evaluate

SUBJECT = ("--model.name", "--data.train", "--data.val")
"""The flags that say what is trained: a run that has one of them is not that of the digits."""
PROG = "bigvision eval STEP_FOLDER|MODEL [--ema]"
Say = Callable[[str], None]


def take_recipe(arguments: Sequence[str]) -> tuple[str | None, list[str], str | None]:
    """The recipe of a command, its flags, and a line that reports what is taken where no recipe is named.

    Without arguments, or with flags that leave open what is trained, that is the recipe of the digits. A flag that names a
    model or data makes it another run: it starts from the defaults of every key, not from values that were chosen for digits.
    """
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], list(arguments[1:]), None
    if named := [flag for argument in arguments if (flag := argument.partition("=")[0]) in SUBJECT]:
        note = f"recipe: none, since {named[0]} is given: the default of each key, the model's image size"
        return None, list(arguments), note
    recipe = default_recipe()
    return str(recipe), list(arguments), f"recipe: {recipe}"


def default_recipe() -> Path:
    """The recipe that trains when none is named."""
    package = Path(__file__).parents[1]
    beside_source = package.parent / "recipes" / "digits.yaml"
    return beside_source if beside_source.exists() else package / "recipes" / "digits.yaml"


def take(arguments: Sequence[str], names: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Take ``--name value`` and ``--name=value`` of *names* out of *arguments*; returns each (name, value), and the others."""
    given: list[tuple[str, str]] = []
    rest: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        name, equals, value = argument.partition("=")
        if name not in names:
            rest.append(argument)
            continue
        value = value if equals else next(waiting, "")
        if not value:
            raise UserError(f"{name}: a value is missing: write {name} VALUE")
        given.append((name, value))
    return given, rest


def whole(name: str, text: str, lowest: int = 1) -> int:
    """*text* as a whole number from *lowest* on."""
    # Not str.isdigit: int() takes the digits of every script, and a job's script would keep them.
    if not (text.isascii() and text.isdecimal()) or len(text) > 9 or int(text) < lowest:
        raise UserError(f"{name}: {text!r} must be a whole number from {lowest} on")
    return int(text)


def run(arguments: list[str], say: Say) -> dict[str, float]:
    """``STEP_FOLDER [--ema] [--section.key value ...]``, or a timm name, whose pretrained weights are evaluated.

    ``--ema`` takes the averaged weights of a step folder.
    """
    if not arguments or arguments[0].startswith("-"):
        if {"-h", "--help"} & set(arguments):
            resolve(None, ["--help"], prog=PROG)
        raise UserError(
            "eval: name a step folder or a timm model: bigvision eval checkpoints/digits/step-00000100, "
            "or bigvision eval resnet18.a1_in1k --data.val imagefolder:PATH"
        )
    subject, flags, ema = arguments[0], [flag for flag in arguments[1:] if flag != "--ema"], "--ema" in arguments
    folder = Path(subject).expanduser()
    hub = subject.startswith(("hf-hub:", "hf_hub:", "local-dir:"))  # `check_name` refuses those
    if not folder.is_dir() and (hub or timm.is_model(current_name(subject)[0].partition(".")[0])):
        check_name(current_name(subject)[0])
        if ema:
            raise UserError(f"--ema: {subject} is a timm model, and has no averaged weights of a run: leave --ema out")
        named = {flag.partition("=")[0] for flag in flags}
        if not {"--data.val", "-h", "--help"} & named:
            raise UserError(f"eval: {subject} on which images? Name them: --data.val imagefolder:PATH")
        # Its own weights and image size, unless flags name others.
        pretrained = not {"--model.weights", "--model.pretrained"} & named
        recipe = {"model": {"name": subject, "pretrained": pretrained}, "out": "unused"}
        return evaluate_model(resolve(recipe, flags, overrides(os.environ, say), prog=PROG, say=say)[0], say)
    try:
        saved = json.loads((folder / "progress.json").read_bytes())["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if steps := checkpoint.steps_in(folder):
            newest = folder / checkpoint.folder_name(steps[0])
            raise UserError(f"eval: {subject} is the folder of a run: name one of its steps, such as {newest}") from None
        hint = f": {error}" if folder.exists() else nearest(subject.lower(), timm.list_models())
        raise UserError(f"eval: {subject} is not a step folder of a run, and not a timm model{hint}") from None
    if isinstance(saved, dict) and isinstance(saved.get("parallel"), dict):
        # The file may be gone, and what it decided is saved; it counts again where a flag names it.
        saved["parallel"]["deepspeed"] = None
    config, _ = resolve(saved, flags, overrides(os.environ, say), prog=PROG, say=say)
    return training.evaluate_checkpoint(folder, config, say, ema)


def evaluate_model(config: Config, say: Say = lambda text: None) -> dict[str, float]:
    """Return the metrics of the model that *config* names, with its first weights, on all of ``data.val``. Run on every rank.

    `UserError` where the model, its weights and the data do not fit together.
    """
    parallel = replace(config.parallel, strategy="ddp", replicas=1, offload="none", deepspeed=None)
    config = replace(config, parallel=parallel)
    with (
        Watchdog(config.limits) as watch,
        start(parallel.device, 1, 1, collective_timeout(config.limits)) as runtime,
        watch.naming(),
    ):
        warn_of_shared_memory(runtime, say)
        all_or_none(lambda: check_model(config.model))
        task = all_or_none(lambda: build_task(config.task))
        val, outputs = open_on_all(partial(_open, config), runtime)
        total = -(-config.train.global_batch // runtime.world_size) * runtime.world_size
        model, train = replace(config.model, num_classes=outputs), replace(config.train, global_batch=total)
        config = replace(config, model=model, train=train)
        data = Data(val, val, BadSamples(config.data.bad_budget, {"train": len(val), "val": len(val)}), task)
        engine, plan, _ = build_model(config, len(val.classes), runtime, steps=1, say=say, channels=val.channels, trains=False)
        with closing(engine):
            metrics = evaluate(config, engine, data, plan, runtime, watch)
            assert metrics is not None
            return metrics


def _open(config: Config, first: bool) -> tuple[Source, int]:
    """The images with labels in the order of the model's outputs, and how many of these there are."""

    def opened(classes: list[str] | None = None) -> Source:
        return open_source(
            config.data.val, "val", key="data.val", root=config.data.root, first=first, shared=False, classes=classes,
            class_file=config.data.classes,
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


def _saved_classes(weights: str | None) -> list[str] | None:
    """The classes in the config.json beside *weights*, where a run or an export wrote it."""
    if weights is None:
        return None
    path = Path(weights.partition(MARK)[0]).expanduser()
    try:
        found = json.loads((path if path.is_dir() else path.parent).joinpath("config.json").read_bytes())["label_names"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, list) and found and all(isinstance(name, str) for name in found) else None
