"""Pretrained values: timm's cache, timm's adaptation to the model, and ours check of what fits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from timm.models import _builder, clean_state_dict
from torch import Tensor, nn

from bigvision.config import ModelConfig
from bigvision.errors import UserError
from bigvision.models.exact_init import NotRecordable, Recording, ReplayDiffers, View, named_tensors
from bigvision.models.exact_init.record import record
from bigvision.models.exact_init.recording import replay
from bigvision.models.weights_file import WeightsFile, shards_of

OTHERWISE_CALLED = {"open_clip_pytorch_model.safetensors": "open_clip_model.safetensors"}
Loading = dict[str, Any]
"""The keyword arguments with which timm would have loaded weights: its model card, filter and class count."""


def timm_file(name: str, card: dict[str, Any]) -> str:
    """timm's weights of the model *name*, whose card is *card*: a safetensors file, or an index with its shards beside it.

    Raises:
        UserError: they are not published as safetensors, or neither cached nor reachable.
    """
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    pickled = card.get("hf_hub_filename") or "pytorch_model.bin"
    file = str(Path(card.get("hf_hub_filename") or "model").with_suffix(".safetensors"))
    file = OTHERWISE_CALLED.get(file, file)
    if local := card.get("file"):
        return str(local)
    repository, _, revision = (card.get("hf_hub_id") or "").partition("@")
    # timm's hub repositories hold native files; "hf" marks those in a format of their own.
    if not repository or card.get("custom_load") == "hf":
        raise UserError(
            f"model.pretrained: timm's weights of {name} are not published as safetensors; "
            "convert them (bigvision convert IN.pth OUT.safetensors) and set model.weights, or use false"
        )
    try:
        return _download(repository, revision or None, file)
    except UserError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        # Not found locally is a kind of not found, and means that nobody could be asked.
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise UserError(
                f"model.pretrained: {repository} has no {file}, only pickled files; fetch one, "
                f"convert it (bigvision convert {pickled} {file}) and set model.weights"
            ) from error
        raise UserError(
            f"model.pretrained: timm's weights of {name} are neither cached nor reachable ({reason}); "
            f"get {file} of {repository} and set model.weights to it, or use false"
        ) from error


def _download(repository: str, revision: str | None, file: str) -> str:
    """Fetch *file*, or where there is only its index, all shards of that; return the path of the one or the other."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return hf_hub_download(repository, file, revision=revision)
    except EntryNotFoundError as absent:
        try:
            index = hf_hub_download(repository, f"{file}.index.json", revision=revision)
        except EntryNotFoundError:
            raise absent from None
    try:
        shards = sorted(shards_of(Path(index)))
    except ValueError as error:
        raise UserError(f"model.pretrained: {index} of {repository} is not an index of weights ({error}); use false") from error
    for shard in shards:
        hf_hub_download(repository, shard, revision=revision)
    return index


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


def read(config: ModelConfig, module: nn.Module, loading: Loading) -> tuple[Adapted, list[str]]:
    """The values for `module` (on meta, left as it is) by name, and notes on what starts fresh and what costs memory.

    Of the file only headers are read now. Raises `UserError` when it and the model do not fit.
    """
    key = "model.pretrained" if config.weights is None else "model.weights"
    if not loading:
        raise UserError(f"{key}: timm loads no weights into {config.name}; leave it out")
    card = dict(loading["pretrained_cfg"])
    heads = card.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    if config.weights is not None:
        file = WeightsFile(config.weights, key)
        # The classes are compared below, with the file and not with the card of timm's own weights.
        card.update(num_classes=loading["num_classes"], label_offset=0)
        # A classifier may start fresh, and files written before torch counted batches lack the counters.
        names = [name for name in module.state_dict() if not name.endswith("num_batches_tracked")]
        fitted = file.fit([name for name in names if not _is_head(name, heads)])
    else:
        fitted = None
        file = WeightsFile(timm_file(config.name, card), key)
    values = Adapted(file, module, {**loading, "pretrained_cfg": card})
    fresh = _check(file, config, module, values, heads)
    why = "the classes of {} are others" if fresh and fresh[0] in (*values.likes, *file.places) else "{} has none"
    notes = [f"the classifier ({fresh[0]}) starts fresh: {why.format(file.source)}"] if fresh else []
    if values.left_out:
        notes.append(f"{values.left_out} of {file.source}, a classifier by its shape, is left out")
    return values, [note for note in (fitted, *notes, values.note) if note]


def _check(file: WeightsFile, config: ModelConfig, module: nn.Module, values: Adapted, heads: tuple[str, ...]) -> list[str]:
    """Leave in *values* one for each tensor of the model that has one, and return the names that start fresh."""
    expected = module.state_dict()
    tensors = dict(named_tensors(module))
    given = values.likes

    fresh = [
        name for name in expected if _is_head(name, heads) and (name not in given or given[name].shape != expected[name].shape)
    ]
    for name in fresh:
        if name in given and config.num_classes is not None and config.weights is not None and given[name].dim():
            theirs, ours = given[name].shape[0], expected[name].shape[0]
            raise UserError(
                f"model.num_classes: {ours} does not fit the {theirs} classes of {file.source}; "
                "set it to null for a fresh classifier, or use the file's number"
            )
    # A tied tensor may be in the file under any one of its names.
    tied: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        tied.setdefault(id(tensor), []).append(name)
    sources = {
        name: source
        for names in tied.values()
        for name in names
        if name not in fresh and (source := next((n for n in (name, *names) if n in given), None)) is not None
    }
    # Files written before torch counted batches lack the counters; torch's own loader lets that pass too.
    missing = [n for n in expected if n not in sources and n not in fresh and not n.endswith("num_batches_tracked")]
    unexpected = [name for name in given if name not in expected and not _is_head(name, heads)]
    if not missing and (other := _renamed_head(module, fresh, {name: given[name] for name in unexpected})):
        values.left_out, unexpected = other, []
    for names, what in ((missing, "lacks"), (unexpected, "has, unknown to the model,")):
        if names:
            raise file.mistake(f"{what} {names[0]} ({len(names)} such)", "check model.name and model.options")
    shaped = [name for name, source in sources.items() if given[source].shape != tensors[name].shape]
    if shaped:
        name = shaped[0]
        raise UserError(
            f"{file.key}: {name} is {tuple(given[sources[name]].shape)} in {file.source} and {tuple(tensors[name].shape)} in "
            f"the model ({len(shaped)} such); check model.name, model.image_size and model.options"
        )
    values.take(sources, {name: tensors[name].dtype for name in sources})
    return fresh


def _renamed_head(module: nn.Module, fresh: list[str], others: dict[str, Tensor]) -> str:
    """The linear layer that *others* are, with as many inputs as the model's classifier, all of which starts fresh.

    It is the classifier of a program that calls it otherwise. "" where *others* are more, as of a deeper model.
    """
    layers = {name.rpartition(".")[0] for name in others}
    layer, sizes = next(iter(layers), ""), {name.rpartition(".")[2]: tuple(like.shape) for name, like in others.items()}
    heads = [name for name in fresh if name.endswith(".weight")]
    if len(layers) != 1 or len(heads) != 1 or layer.partition(".")[0] in dict(module.named_children()):
        return ""
    weight, inputs = sizes.get("weight", ()), module.state_dict()[heads[0]].shape[1:]
    fits = len(weight) == 2 and weight[1:] == tuple(inputs) and sizes.keys() <= {"weight", "bias"}
    return layer if fits else ""


def _is_head(name: str, heads: tuple[str, ...]) -> bool:
    return any(name.startswith(f"{head}.") for head in heads)
