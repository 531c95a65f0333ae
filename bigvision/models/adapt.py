"""timm's adaptation of weights to a model (renaming, resampling, channels, classifier), with the values left in the file.

The adaptation runs on meta tensors and is recorded, as constructors are (exact_init). A tensor that it passes on, whole or
cut along its first dimension, is then a run of the file and can be read run by run; one that it computes is computed when
it is asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from safetensors import safe_open
from timm.models import _builder, clean_state_dict
from torch import Tensor, nn

from bigvision.errors import UserError
from bigvision.models.exact_init import NotRecordable, Recording, ReplayDiffers, View, named_tensors
from bigvision.models.exact_init.record import record
from bigvision.models.exact_init.replay import replay
from bigvision.models.weights_file import WeightsFile

Loading = dict[str, Any]
"""The keyword arguments with which timm would have loaded weights: its model card, filter and class count."""


@contextmanager
def capture() -> Iterator[Loading]:
    """Let timm build pretrained models without loading anything, and keep what it would have loaded with."""
    loading: Loading = {}
    load: Callable[..., None] = _builder.load_pretrained

    def keep(model: nn.Module, **arguments: Any) -> None:
        loading.update(arguments)

    _builder.load_pretrained = keep
    try:
        yield loading
    finally:
        _builder.load_pretrained = load


class Adapted:
    """What timm makes of a file for a model. Values are read and computed when they are asked for."""

    likes: dict[str, Tensor]
    """A tensor of each value's shape, by timm's name."""
    left_out: str = ""
    """A layer of the file that the model does not have, and does without."""
    note: str | None = None
    """Why the adaptation could not be recorded. What it computes is then held, and the rest mapped from the file."""

    def __init__(self, file: WeightsFile, module: nn.Module, loading: Loading) -> None:
        """Adapt *file* to *module* (on meta, left as it is).

        Raises:
            UserError: timm cannot, or the file cannot be read.
        """
        self._file = file
        self._windows: dict[str, tuple[str, int]] = {}  # the tensor in the file and the first element
        self._views: dict[str, View] = {}  # what is computed, in `_recording`
        self._held: dict[str, Tensor] = {}
        self._recording: Recording | None = None
        try:
            self._record(module, loading)
        except UserError:
            raise
        except Exception as error:
            self._windows, self._views, self._recording = {}, {}, None
            try:
                self.likes = self._held = _mapped(file, module, loading)
            except Exception as plain_error:
                what = f"does not fit this model ({_first_line(plain_error)})"
                raise file.mistake(what, "check model.name and model.options") from plain_error
            self.note = f"timm's adaptation of {file.source} was run on the whole file, not recorded: {_first_line(error)}"
        self.take({name: name for name in self.likes}, {name: like.dtype for name, like in self.likes.items()})

    def take(self, sources: dict[str, str], dtypes: dict[str, torch.dtype]) -> None:
        """Keep, under each name in *sources*, the value that timm gave the name there, converted to its type in *dtypes*."""
        self._sources, self._dtypes = sources, dtypes

    def runs(self) -> list[str]:
        """The names whose values lie in the file as they are, for `read`; in the file's order."""
        found = [name for name, source in self._sources.items() if source in self._windows]
        places = self._file.places

        def place(name: str) -> tuple[str, int]:
            tensor, _ = self._windows[self._sources[name]]
            return places[tensor].file, places[tensor].offset

        return sorted(found, key=place)

    def read(self, name: str, start: int, values: Tensor) -> None:
        """Fill the 1-D *values* with the elements of one of `runs` from *start* on, and read nothing else.

        Raises:
            UserError: the file cannot be read.
        """
        tensor, first = self._windows[self._sources[name]]
        self._file.read(tensor, first + start, values)

    def tensors(self, seed: int, names: Set[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield ``(name, value)`` for each of *names* (None: all) that has one; what is computed, storage by storage.

        Raises:
            UserError: the file cannot be read.
        """
        computed: dict[int, list[str]] = {}
        for name, source in self._sources.items():
            if names is not None and name not in names:
                continue
            if source in self._windows:
                value = torch.empty(self.likes[source].shape, dtype=self._dtypes[name], device="cpu")
                self.read(name, 0, value.view(-1))
                yield name, value
                del value
            elif source in self._views:
                computed.setdefault(self._views[source].storage, []).append(name)
            else:
                yield name, self._finished(name, self._held[source])
        values = replay(self._recording, seed, list(computed)) if self._recording is not None else iter(())
        while computed:
            try:
                storage, content = next(values)
            except ReplayDiffers:
                held = _mapped(self._file, self._twin, self._loading)
                for name in [name for group in computed.values() for name in group]:
                    yield name, self._finished(name, held[self._sources[name]])
                return
            for name in computed.pop(storage):
                yield name, self._finished(name, self._views[self._sources[name]].on(content))
            del content

    def _finished(self, name: str, value: Tensor) -> Tensor:
        return value.to(self._dtypes[name]).contiguous()

    def _record(self, module: nn.Module, loading: Loading) -> None:
        """Adapt meta tensors; raises whatever timm raises, and `NotRecordable`."""
        file, stored = self._file, {}
        metas = {name: torch.empty(place.shape, dtype=file.dtype(name), device="meta") for name, place in file.places.items()}
        owned = set()
        with record() as recorder:
            for name, tensor in named_tensors(module):
                if recorder.view(tensor) is None:  # filters look at the model's shapes; values it has none yet
                    owned.add(recorder.source(tensor, partial(_no_value, name)).storage)
            for name, meta in metas.items():
                stored[recorder.source(meta, partial(file.whole, name)).storage] = name
            self.likes = _load(module, loading, metas)
        self._recording = recorder.recording
        for name, like in self.likes.items():
            if like.device.type == "cpu":
                self._held[name] = like  # computed from values that Python looked at
                continue
            if (view := recorder.view(like)) is None:
                raise NotRecordable(f"{name} is of unknown origin")
            recorder.check_filled(view)
            reads = {storage for step in self._recording.slice(view.storage) for storage in self._recording.ops[step].reads}
            if view.storage in self._recording.unset or not owned.isdisjoint(reads | {view.storage}):
                raise NotRecordable(f"{name} is left without a value")
            unchanged = view.storage in stored and len(self._recording.writers[view.storage]) == 1
            if unchanged and like.is_contiguous() and like.dtype == file.dtype(stored[view.storage]):
                self._windows[name] = (stored[view.storage], view.offset)
            else:
                self._views[name] = view
        if self._views:
            # Whether a replay is exact shows only when it runs, when the module may have been sharded.
            self._twin, self._loading = copy.deepcopy(module), loading


def _load(module: nn.Module, loading: Loading, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Let timm adapt *state* and catch what it would load into *module*."""
    caught: dict[str, Tensor] = {}

    def catch(state_dict: dict[str, Tensor], strict: bool = True) -> Any:
        caught.update(state_dict)
        return nn.modules.module._IncompatibleKeys([], [])

    card = {**loading["pretrained_cfg"], "source": "", "state_dict": clean_state_dict(state)}
    module.load_state_dict = catch  # type: ignore[method-assign]
    try:
        with torch.no_grad():
            _builder.load_pretrained(module, **{**loading, "pretrained_cfg": card})
    finally:
        del module.load_state_dict
    return caught


def _mapped(file: WeightsFile, module: nn.Module, loading: Loading) -> dict[str, Tensor]:
    """What timm makes of the file's tensors, mapped into memory."""
    state: dict[str, Tensor] = {}
    for shard in sorted({place.file for place in file.places.values()}):
        with safe_open(file.folder / shard, "pt") as opened:
            state |= {
                name: opened.get_tensor(file.stored.get(name, name))
                for name, place in file.places.items()
                if place.file == shard
            }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # should it draw, all ranks must draw the same
        return _load(module, loading, state)


def _no_value(name: str) -> Tensor:
    raise NotRecordable(f"the value of the model's own {name} is asked for")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
