"""bigvision from Python: `train` runs a recipe, `Engine` is for a loop of the user's own.

In come a recipe (a path, a mapping, a `Config` or nothing), keywords that override it, and names or objects for model and data.
Out come a `Result`, or an engine that takes steps, evaluates, saves and resumes. Both start with `configured`, which makes one
`Config` of all that. `train` starts ranks if ``devices`` asks for them (`bigvision.launchers`) and calls
`bigvision.training.train_on_rank`; `Engine` wraps the engine of `bigvision.engine` and the `Saver` of `bigvision.checkpoint`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from bigvision import checkpoint, training
from bigvision.config import Config, DataConfig, resolve, without_auto
from bigvision.config.resolve import flatten
from bigvision.config.values import AUTO, leaves
from bigvision.data import Batch, StepBatch
from bigvision.data.sources.base import Source
from bigvision.data.sources.custom import MapDataset
from bigvision.engine import Metrics, StepResult, check_engine
from bigvision.errors import UserError, either, nearest
from bigvision.launchers.ranks import Devices, check_parent, forked_ranks, fresh_ranks, place
from bigvision.models import GivenModel, check_model, given_name
from bigvision.monitor import Tracker
from bigvision.planning.start import Planner, with_mesh
from bigvision.runtime import all_or_none, deterministic, from_main, identify, operations_named, start, warn_of_shared_memory
from bigvision.tasks import Task, build_task, task_name
from bigvision.training import Callback, Result
from bigvision.training.build import build_model, take_folder, with_model, with_task, without_weights
from bigvision.training.data import name_of_data, open_data, prepare_task
from bigvision.training.run_folder import (
    check_same_run,
    check_same_scale,
    data_facts,
    why_other_tensors,
    with_drop_path_mode,
)
from bigvision.training.saving import new_saver, progress_of

if TYPE_CHECKING:
    from bigvision.planning.choice import Plan

Recipe = str | Path | Mapping[str, Any] | Config | None
"""The path of a YAML file, a mapping like one, a configuration, or None for the defaults."""
SECTIONS = tuple(field.name for field in fields(Config))
ARGUMENTS = ("model", "data", "val", "task", "devices", "image_size", "callbacks", "trackers", "max_restarts")


@dataclass(frozen=True)
class Objects:
    """What the caller has, in the place of names."""

    model: Any = None
    """A module, or a function that builds one."""
    data: Any = None
    val: Any = None
    """Datasets; both or none."""
    task: Any = None
    data_named: bool = False
    """Whether the caller or the recipe has said what is trained on."""
    origins: Mapping[str, str] = field(default_factory=dict)
    """Where the value of each key came from, where that is known."""

    @property
    def none(self) -> bool:
        return all(given is None for given in (self.model, self.data, self.val, self.task))


def configured(
    caller: str, recipe: Recipe, model: Any, data: Any, val: Any, task: Any,
    image_size: int | tuple[int, int] | None, keys: Mapping[str, Any],
) -> tuple[Config, Objects]:  # fmt: skip
    """The configuration that is asked for, keywords before the recipe, and the objects.

    *caller* is for messages. *model*, *data*, *val* and *task* are names, sections as mappings, or objects; *keys* are sections
    as mappings, and dotted keys. `UserError` for unknown keywords, with the nearest right one, for what cannot be together, and
    for all that a configuration can have wrong.
    """
    kinds = dict(leaves(Config))
    for name in keys:
        if name not in SECTIONS and name not in kinds:
            sections = [section for section, _, key in (known.rpartition(".") for known in kinds) if key == name]
            places = [f"{section}={{{name!r}: ...}}" for section in sections]
            hint = f"; did you mean {either(places)}?" if places else nearest(name, [*SECTIONS, *ARGUMENTS, *kinds])
            raise UserError(f"{caller}: unknown keyword {name!r}{hint}")
    given = flatten(keys, kinds, caller)
    objects = {}
    names = {"model": "model.name", "data": "data.train", "val": "data.val", "task": "task.name"}
    for (name, key), value in zip(names.items(), (model, data, val, task)):
        if isinstance(value, Mapping) and name in SECTIONS:
            given |= flatten({name: value}, kinds, caller)
        elif isinstance(value, str):
            given[key] = value
        elif value is not None:
            objects[name] = value
    if isinstance(data, str) and val is None and "data.val" not in given:
        given["data.val"] = data
    if image_size is not None:
        given["model.image_size"] = image_size
    if "data" in objects and val is None:
        raise UserError(f"val: {caller} got a dataset in data, but none to validate on: give val, a dataset or a name")
    if "val" in objects and "data" not in objects:
        raise UserError(f"data: {caller} got a dataset in val, but none to train on: give both")
    if "data" in objects and "val" not in objects:
        objects["val"] = given.pop("data.val")
    for name, key in (("data", "data.train"), ("val", "data.val")):
        if name in objects:
            given[key] = name_of_data(objects[name])
    if "model" in objects:
        given["model.name"] = given_name(objects["model"])
    if "task" in objects:
        if not isinstance(objects["task"], Task):
            raise UserError(f"task: {type(objects['task']).__name__} is no task: give a name, or a bigvision.tasks.Task")
        given["task.name"] = task_name(objects["task"])
    if isinstance(recipe, Config):
        if not given and recipe.out != AUTO:
            return recipe, Objects(data_named=recipe.data.train != DataConfig.train)
        recipe = recipe.to_dict()
    if recipe is not None and not isinstance(recipe, (str, Path, Mapping)):
        raise UserError(f"{caller}: {type(recipe).__name__} is no recipe: give a path, a mapping or a Config")
    keywords = {key: (str(value) if isinstance(value, Path) else value, f"{caller}(...)") for key, value in given.items()}
    notes: list[str] = []
    config, origins = resolve(recipe, keywords=keywords, say=notes.append)
    if notes and identify(os.environ).rank == 0:
        print("\n".join(notes))
    return config, Objects(**objects, data_named=origins["data.train"] != "default", origins=origins)


class Engine:
    """A model under a strategy, ready for steps. Every rank makes one and calls the same methods in the same order.

    ::

        with bigvision.Engine("recipe.yaml", model=net, num_classes=10, steps=1000) as engine:
            for images, labels in loader:
                loss = engine.train_step(images, labels).loss
            engine.save()

    It joins the launcher's ranks, or is the only one. It owns the micro-batches, precision, clipping, optimizer and schedule;
    data, evaluation and when to save are yours. Several engines of a process share its process group, on one device; each has
    its own strategy, and all ranks make and use them in the same order.
    """

    def __init__(
        self,
        config: Recipe = None,
        *,
        model: str | GivenModel | None = None,
        num_classes: int | None = None,
        steps: int | None = None,
        global_batch: int | None = None,
        image_size: int | tuple[int, int] | None = None,
        data: str | Source | MapDataset | None = None,
        val: str | Source | MapDataset | None = None,
        task: str | Mapping[str, Any] | Task | None = None,
        resume: bool | str | Path = False,
        **keys: Any,
    ) -> None:
        """Build and shard the model.

        Args:
            config: a recipe's path, a mapping like one, a `Config`, or nothing: the defaults.
            model: a timm name, a module of your own, or a function that builds one; as in `bigvision.train`.
            num_classes: ``model.num_classes``; not needed with a module of your own.
            steps: ``train.steps``, of the whole loop: the learning rate's schedule.
            global_batch: ``train.global_batch``, samples of a step over all ranks.
            image_size: ``model.image_size``, the side of a square, or height and width.
            data, val: what the loop trains and validates on, as in `bigvision.train`. It is not fed to the loop: checkpoints
                record it, with its class names, and :meth:`resume` compares it. So it is where the recipe names data.
            task: as in `bigvision.train`.
            resume: True, or a folder: take over a checkpoint as :meth:`resume` does, without computing first values or
                reading pretrained weights before.
            keys: sections and dotted keys, as in `bigvision.train`.

        Raises:
            UserError: what was asked for cannot be done; the same on every rank.
        """
        ours = {"model.num_classes": num_classes, "train.steps": steps, "train.global_batch": global_batch}
        keys |= {key: value for key, value in ours.items() if value is not None}
        made, objects = configured("bigvision.Engine", config, model, data, val, task, image_size, keys)
        if made.train.steps is None:
            raise UserError("train.steps: bigvision.Engine needs the number of steps for the learning rate: give steps=...")
        if made.model.num_classes is None and not isinstance(objects.model, torch.nn.Module):
            raise UserError("model.num_classes: bigvision.Engine does not see the data: give num_classes=...")
        self.config = with_task(with_model(made, objects.model), objects.task)
        self._out = Path(self.config.out)
        self._stack = ExitStack()
        try:
            self._build(objects, resume)
        except BaseException:
            self._stack.close()
            raise

    def _build(self, objects: Objects, resume: bool | str | Path) -> None:
        asked = without_auto(self.config)
        parallel, steps, model = asked.parallel, self.config.train.steps or 0, objects.model
        self._stack.enter_context(deterministic(self.config.train.deterministic, parallel.device))
        self.runtime = self._stack.enter_context(start(parallel.device, parallel.replicas, parallel.pipeline_ranks))
        self.rank, self.world_size, self.device = self.runtime.rank, self.runtime.world_size, self.runtime.device
        self.is_main = self.runtime.is_main
        """Whether this is rank 0, which prints and writes."""
        self._task: Task = all_or_none(lambda: build_task(self.config.task, objects.task))
        all_or_none(lambda: check_engine(asked, self.runtime, self._task))
        warn_of_shared_memory(self.runtime, self._say)
        self._facts: dict[str, Any] | None = None
        """The fingerprints of the data, where they are known."""
        self._classes: list[str] = []
        self._about: dict[str, Any] = {}
        """What the task has to know of the training data."""
        if objects.data_named:
            self._take_data(objects)
        if not self._classes and (outputs := self.config.model.num_classes) is not None:
            all_or_none(lambda: self._task.prepare([str(label) for label in range(outputs)], {}))
        planner = Planner(self.runtime, self._say, model, objects.task, self.config.model.num_classes)
        self.config, self._keep_choice = planner.settle(self.config)
        self.runtime = self._stack.enter_context(with_mesh(self.config, self.runtime))
        found = self._find(None if resume is True else resume) if resume else None
        self._asked_mode = self.config.model.drop_path_mode
        self.config = with_drop_path_mode(self.config, found)
        config = self.config if found is None else without_weights(self.config)
        all_or_none(lambda: check_model(config.model, model))
        channels = self.config.model.options.get("in_chans", getattr(model, "in_chans", 3))
        self.engine, blueprint, self._card = build_model(
            config, config.model.num_classes or 1, self.runtime, steps, self._say, channels, model, found is not None,
            task=self._task, classes=self._classes,
        )  # fmt: skip
        if self._classes:
            self._card["label_names"] = self._classes
        if self._about:
            self._card["task"] = self._about
        self._stack.callback(self.engine.close)
        self._savers: dict[Path, checkpoint.Saver] = {}
        self._holds_averages = False
        """Whether the averaged weights are in the place of the weights."""
        height, width = blueprint.image_size
        self.image_size: int | tuple[int, int] = height if height == width else (height, width)
        """The side of a square, or height and width."""
        self.mean, self.std = blueprint.mean, blueprint.std
        """What uint8 images in 0..1 are normalised with, per channel."""
        if found is not None:
            self._restore(found)

    @property
    def step(self) -> int:
        """Steps taken."""
        return self.engine.step

    def train_step(self, images: Tensor | Batch | StepBatch, labels: Tensor | None = None) -> StepResult:
        """Take one optimizer step on this rank's part of the global batch.

        Args:
            images: (B, C, H, W), B being ``train.global_batch`` / data-parallel ranks: uint8, which are normalised on the
                device, or floating-point numbers, which are taken as they are. Or a whole `bigvision.data.Batch`.
            labels: int64 (B,); for other tasks what their loss takes, such as several numbers, (B, ...).

        Returns:
            The loss and gradient norm over all ranks, as 0-D tensors on the device.

        Raises:
            UserError: another number of samples than ``train.global_batch`` says; or ``train.deterministic`` and an operation
                without a deterministic form.
        """
        self._check_weights()
        batch = _batch(images, labels, self._task)
        expected = self.config.train.global_batch
        if len(batch) * self.runtime.data_ranks != expected:
            raise UserError(
                f"train.global_batch: {expected}, but {self.runtime.data_ranks} data-parallel ranks got {len(batch)} samples "
                f"each: give global_batch={len(batch) * self.runtime.data_ranks}, and batches that are all of one size"
            )
        with operations_named():
            return self.engine.train_step(batch)

    def eval_step(self, images: Tensor | Batch, labels: Tensor | None = None) -> Metrics:
        """Measure this rank's samples, as many on each rank. Add up what is returned, and ask it for its ``means()``."""
        self.engine.synchronize()
        with operations_named():
            return self.engine.eval_step(_batch(images, labels, self._task).whole())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Evaluate with the averaged weights: ``with engine.averaged(): engine.eval_step(...)``. Called on every rank.

        The weights are back afterwards, bit for bit; until then, and after an error inside, the engine only evaluates.

        Raises:
            UserError: this engine keeps no average: ``ema.decay`` is null.
        """
        self._check_weights()
        if self.engine.ema is None:
            raise UserError("ema.decay: null keeps no average of the weights: give one, such as ema={'decay': 0.9999}")
        self._holds_averages = True
        with self.engine.averaged():
            yield
        self._holds_averages = False

    def save(self, out: str | Path | None = None, metrics: dict[str, float] | None = None) -> Path:
        """Save a checkpoint in the folder *out* (the configuration's by default), and return its step folder.

        It is what a run saves: `bigvision.train` and :meth:`resume` go on from it, on any number of ranks.

        From the first save on until :meth:`close` the folder is locked: no other run or engine can write there.

        Args:
            metrics: numbers to be kept with it.

        Raises:
            UserError: another run or engine writes in the folder, or it cannot be written.
            RankFailure: it could not be written; the same on every rank.
        """
        self._check_weights()
        folder, keep = Path(out or self.config.out), self.config.checkpoint
        if folder not in self._savers:
            take_folder(folder, self.runtime, self._stack, self._say)
            all_or_none(lambda: self._keep_choice(folder))
            self._savers[folder] = new_saver(folder, replace(keep, keep_best=None, background=False), self._say)
        self._out = folder
        self.engine.synchronize()
        evaluated = self.step if metrics else None
        progress = progress_of(self.engine, replace(self.config, out=str(folder)), metrics or {}, evaluated)
        if self._facts is not None:
            progress["data"] = self._facts
        documents = {"config.json": self._card, "progress.json": progress}
        self._savers[folder].save(self.step, self.engine.fragments(), documents)
        return folder / checkpoint.folder_name(self.step)

    def resume(self, folder: str | Path | None = None) -> int:
        """Take over a checkpoint's whole state, and return its step; 0 where there is none.

        Where it is known before the engine is made, ``Engine(..., resume=True)`` spares the first values.

        Args:
            folder: a step folder, or the folder that was given to :meth:`save`, of which it takes the newest. By default what
                ``checkpoint.resume`` means, "auto" being the newest in the folder of the last :meth:`save`, else in ``out``.

        Raises:
            UserError: it is not valid, of another model, or was trained on other data or classes than this engine was given
                and ``checkpoint.allow`` does not name them.
        """
        self._check_weights()
        if (found := self._find(folder)) is not None:
            self._restore(found)
        return self.step

    def _check_weights(self) -> None:
        if self._holds_averages:
            raise UserError("bigvision.Engine: it holds the averaged weights: leave the block of averaged() first")

    def _take_data(self, objects: Objects) -> None:
        """Record the data that the caller or the recipe names. What the recipe names need not be there: nothing reads it."""
        given = None if objects.data is None else (objects.data, objects.val)
        try:
            data = open_data(self.config, self.runtime, self._task, given)
            outputs, needed = self.config.model.num_classes, data.outputs
            if outputs is not None and needed is not None and outputs < needed:
                raise UserError(f"model.num_classes: {outputs}, but data.train has {needed} classes")
        except UserError as error:
            if given is not None:
                raise
            self._say(f"checkpoints do not record the data: {error}")
            return
        self._about = prepare_task(self.config, data, self.runtime, {})
        self._facts, self._classes = data_facts(self.config, data, self.runtime), list(data.train.classes)

    def _find(self, folder: str | Path | None) -> checkpoint.Checkpoint | None:
        verify = self.config.checkpoint.verify
        if folder is None:
            found = checkpoint.find(self.config.checkpoint.resume, self._out, verify, self._say)
        elif from_main(checkpoint.is_step_folder(Path(folder))):
            found = checkpoint.open_checkpoint(Path(folder), verify, "checkpoint.resume")
        else:
            found = checkpoint.find("auto", Path(folder), verify, self._say)
        if found is not None:
            self._accept(found)
        return found

    def _accept(self, found: checkpoint.Checkpoint) -> None:
        if self._facts is not None:
            check_same_run(found, self._facts, self._classes, self.config.checkpoint.allow, self._say)

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        check_same_scale(found, self.config)
        why = partial(why_other_tensors, config=self.config)
        found = found.restore_or_older(list(self.engine.fragments()), self._say, self._accept, why)
        self.engine.restored(found.progress["scalars"])
        if self.engine.branches is not None:
            asked = replace(self.config, model=replace(self.config.model, drop_path_mode=self._asked_mode))
            self.config = with_drop_path_mode(asked, found)
            self.engine.branches.masks = self.config.model.drop_path_mode == "mask"
        if self._facts is None:
            # Nobody has said that they are others.
            self._facts = found.progress.get("data")
            self._card |= {name: names for name, names in found.card.items() if name == "label_names"}
        if about := found.card.get("task"):
            self._card["task"] = about
            self._task.prepare(self._card.get("label_names", []), about)

    def close(self) -> None:
        """Release the model. The last engine of a process that closes leaves the other ranks."""
        self._stack.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # With the error: after it NCCL's groups are aborted, not destroyed.
        self._stack.__exit__(kind, error, trace)

    def _say(self, text: str) -> None:
        if self.is_main:
            print(text)


def _batch(images: Tensor | Batch | StepBatch, labels: Tensor | None, task: Task) -> Batch | StepBatch:
    if isinstance(images, Batch | StepBatch):
        return images
    single = task.target == "label" and (labels is None or labels.ndim != 2)
    if labels is None or images.ndim != 4 or labels.shape[:1] != images.shape[:1] or (single and labels.ndim != 1):
        got = f"{tuple(images.shape)} and {None if labels is None else tuple(labels.shape)}"
        wanted = "int64 labels (B,)" if task.target == "label" else "targets (B, ...)"
        raise UserError(f"images, labels: got {got}: give images (B, C, H, W) and {wanted}")
    count = len(labels)
    return Batch(images, labels.long() if single else labels, torch.arange(count), torch.ones(count, dtype=torch.bool))


def predict(
    model: str | Path, images: str | Path | Source | MapDataset, *, out: str | Path | None = None, top_k: int = 1,
    tta: str = "none", ema: bool = False, **keys: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """Predict images, on this process or on the launcher's ranks, and return a row for each, in their order.

    ``bigvision.predict("runs/pets/step-00000023", "photos", top_k=3)``

    Args:
        model: a step folder of a run, or a timm name, which is taken with its pretrained weights.
        images: a folder of images in any layout, an image, a dataset's name as in ``data.val``, or a dataset of your own.
        out: a table (.csv, .json, .jsonl, .parquet), or a folder for masks. Then the rows are there, and none are returned.
        top_k: how many choices a row has, with their probabilities.
        tta: "flip" averages over an image and its mirror image.
        ema: take the averaged weights of the checkpoint.
        keys: dotted keys that go before those of the run, such as ``**{"parallel.device": "cpu"}``.

    Returns:
        On rank 0 rows of ``sample``, ``prediction``, what the task adds, and ``error``: why an image could not be read.

    Raises:
        UserError: what was asked for cannot be done; the same on every rank.
    """
    from bigvision.launchers.evaluate import predict_subject  # timm's names, which `train` does without
    from bigvision.training.prediction import Prediction

    asked = Prediction(images, None if out is None else Path(out).expanduser(), top_k, tta)
    # A call shows nothing unless it is asked to.
    flags = [part for name, value in ({"monitor.progress": "false"} | keys).items() for part in (f"--{name}", str(value))]
    return predict_subject(str(model), flags, asked, ema, lambda line: None)


def plan(
    config: Recipe = None, hardware: str | Path | None = None, *, model: str | GivenModel | None = None,
    task: str | Mapping[str, Any] | Task | None = None, image_size: int | tuple[int, int] | None = None, **keys: Any,
) -> Plan:  # fmt: skip
    """Look at every layout of a run on some devices, which need not be here: what fits, and how fast it is predicted to be.

    ``bigvision.plan(model="vit_giant_patch14_dinov2", hardware="8xRTX4090", train={"global_batch": 256}).rows[0].values``

    Args:
        config: a recipe's path, a mapping like one, a `Config`, or nothing: the defaults. Its data are not looked for.
        hardware: ``8xH200``, ``16x8xH100`` (hosts x devices), ``cpu``, or a YAML file that describes one's own; by default the
            devices of this machine.
        model, task, image_size, keys: as in :func:`train`.

    Returns:
        ``rows`` of what fits, the fastest first, each with its keys, memory and time; ``refusals``, each with the reason and
        the smallest change that would make it fit; and ``advice`` where nothing fits.

    Raises:
        UserError: an unknown device, a model that cannot be built, or a mesh that the number of devices does not allow.
    """
    from bigvision.planning.choice import plan as plan_layouts  # `train` does without
    from bigvision.planning.command import here
    from bigvision.planning.hardware import parse_hardware

    made, objects = configured("bigvision.plan", config, model, None, None, task, image_size, keys)
    made = with_task(with_model(made, objects.model), objects.task)
    devices = here(made) if hardware is None else parse_hardware(str(hardware))
    return plan_layouts(made, devices, model=objects.model, task=objects.task, outputs=made.model.num_classes)


def train(
    config: Recipe = None,
    data: str | Source | MapDataset | None = None,
    val: str | Source | MapDataset | None = None,
    *,
    model: str | GivenModel | None = None,
    task: str | Task | None = None,
    devices: Devices = None,
    image_size: int | tuple[int, int] | None = None,
    callbacks: Sequence[Callback] = (),
    trackers: Sequence[Tracker] = (),
    max_restarts: int = 0,
    **keys: Any,
) -> Result:
    """Train a model, evaluate it, and save it; resume where the output folder has a checkpoint.

    ``bigvision.train("recipes/digits.yaml", devices=2, train={"steps": 20}, optim={"lr": 1e-3})``

    Args:
        config: a recipe's path, a mapping like one, a `Config`, or nothing: the defaults.
        data: a dataset's name, or a map-style dataset of your own (see `bigvision.data.MapStyle`), in the place of
            ``data.train``. A mapping is the section ``data``.
        val: the same for ``data.val``; by default it is *data*'s name. A dataset in *data* needs a *val*.
        model: a timm name, a module of your own, whose values are the first ones and which is left as it is, or a function
            that builds one. Your own returns what the task takes, class scores (B, classes) by default. A mapping is the
            section ``model``.
        task: a task's name, or your own `bigvision.tasks.Task`. A mapping is the section ``task``.
        devices: how many ranks to start on this host, one on each CUDA device where there are any; ``[0, 1]``: these CUDA
            devices; ``"cpu"``: one rank on the CPU; ``"auto"``: all CUDA devices, or one rank on the CPU. By default, and
            under a launcher, none are started: this process joins the launcher's ranks, or is the only one.
        image_size: ``model.image_size``, the side of a square input in pixels, or height and width.
        callbacks: functions that rank 0 calls with each `Event`. What one raises ends the run on all ranks; one that returns
            `bigvision.STOP` ends it well: evaluated and saved.
        trackers: your own, each a `bigvision.Tracker`, which get the run's records on rank 0, beside ``monitor.trackers``.
        max_restarts: how often the ranks that are started here are started again after a fault; they resume.
        keys: any other section of a recipe as a mapping (``optim={"lr": 1e-3}``), ``out``, ``seed``, or dotted keys
            (``**{"optim.lr": 1e-3}``). They go before *config*.

    Returns:
        The last step, its folder, the metrics of the last evaluation, the lines of metrics.jsonl, and why the run ended early
        if it did; the same however the ranks were started.

    Raises:
        UserError: what was asked for cannot be done; the same words on every rank and in the caller.
        RankFailure: a rank that was started here has failed (a `RuntimeError`); names it and its error.
        Stopped: a signal has stopped the run, and it is saved; names the checkpoint.
    """
    made, objects = configured("bigvision.train", config, model, data, val, task, image_size, keys)
    made, placement = place(devices, made, identify(os.environ))
    if max_restarts < 0 or (max_restarts and placement is None):
        raise UserError(
            f"max_restarts: {max_restarts}, but no ranks are started here: give devices, 2 or more, or leave it out"
        )

    def work() -> Result:
        return training.train_on_rank(
            made, objects.data, objects.val, model=objects.model, task=objects.task, callbacks=callbacks, trackers=trackers,
            origins=objects.origins,
        )  # fmt: skip

    if placement is None:
        return work()
    if dist.is_initialized():
        raise UserError("devices: this process is in a process group already: leave devices out to train on its ranks")
    if objects.none and not callbacks and not trackers:
        return fresh_ranks(made.to_dict(), placement.ranks, placement.environment, max_restarts, objects.origins)
    # Objects reach other processes only by a fork: they may be closures, open files, classes of a notebook.
    check_parent(placement.cuda)
    return forked_ranks(work, placement.ranks, placement.cuda, placement.environment, max_restarts, made.out)
