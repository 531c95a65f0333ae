"""``bigvision.train``: a run from one line of Python."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from bigvision import training
from bigvision.data.sources.base import Source
from bigvision.data.sources.custom import MapDataset
from bigvision.errors import UserError
from bigvision.launching.devices import Devices, Placement, place
from bigvision.launching.keywords import Objects, Recipe, configured
from bigvision.models import GivenModel
from bigvision.runtime import identify
from bigvision.training import Callback, Result


def train(
    config: Recipe = None,
    data: str | Source | MapDataset | None = None,
    val: str | Source | MapDataset | None = None,
    *,
    model: str | GivenModel | None = None,
    devices: Devices = None,
    image_size: int | tuple[int, int] | None = None,
    callbacks: Sequence[Callback] = (),
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
            that builds one. Your own returns class scores (B, classes). A mapping is the section ``model``.
        devices: how many ranks to start on this host, one on each CUDA device where there are any; ``[0, 1]``: these CUDA
            devices; ``"cpu"``: one rank on the CPU; ``"auto"``: all CUDA devices, or one rank on the CPU. By default, and
            under a launcher, none are started: this process joins the launcher's ranks, or is the only one.
        image_size: ``model.image_size``, the side of a square input in pixels, or height and width.
        callbacks: functions that rank 0 calls with each `Event`. What one raises ends the run on all ranks.
        max_restarts: how often the ranks that are started here are started again after a fault; they resume.
        keys: any other section of a recipe as a mapping (``optim={"lr": 1e-3}``), ``out``, ``seed``, or dotted keys
            (``**{"optim.lr": 1e-3}``). They go before *config*.

    Returns:
        The last step, its folder, the metrics of the last evaluation and the lines of metrics.jsonl, the same however the ranks
        were started.

    Raises:
        UserError: what was asked for cannot be done; the same words on every rank and in the caller.
        RankFailure: a rank that was started here has failed (a `RuntimeError`); names it and its error.
        Stopped: a signal has stopped the run, and it is saved; names the checkpoint.
    """
    made, objects = configured("bigvision.train", config, model, data, val, image_size, keys)
    made, placement = place(devices, made, identify(os.environ))
    if max_restarts < 0 or (max_restarts and placement is None):
        raise UserError(
            f"max_restarts: {max_restarts}, but no ranks are started here: give devices, 2 or more, or leave it out"
        )

    def work() -> Result:
        return training.train(made, objects.data, objects.val, model=objects.model, callbacks=callbacks)

    if placement is None:
        return work()
    if dist.is_initialized():
        raise UserError("devices: this process is in a process group already: leave devices out to train on its ranks")
    if objects.none and not callbacks:
        from bigvision.launching.ranks import fresh_ranks

        return fresh_ranks(made.to_dict(), placement.ranks, placement.environment, max_restarts)
    return _forked(work, objects, placement, max_restarts, made.out)


def _forked(work: Any, objects: Objects, placement: Placement, max_restarts: int, out: str) -> Result:
    """Objects reach other processes only by a fork: they may be closures, open files, classes of a notebook."""
    from bigvision.launching.forked import check_parent
    from bigvision.launching.ranks import forked_ranks

    check_parent(placement.cuda)
    return forked_ranks(work, placement.ranks, placement.cuda, placement.environment, max_restarts, out)
