"""Pretrained values: timm's cache, timm's adaptation to the model, and ours check of what fits."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import torch
from safetensors import safe_open
from timm.models import _builder, clean_state_dict
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from bigvision.config import ModelConfig, Size
from bigvision.errors import UserError
from bigvision.fragments import DOWN, UP
from bigvision.models import arguments
from bigvision.models.exact_init import FirstValues, computed
from bigvision.models.tracing import first_line, named_tensors
from bigvision.models.weights_file import WeightsFile, plain_name, shards_of

WITHIN = "encoder.model."  # begins the names of a backbone that a task is built around
OTHERWISE_CALLED = {"open_clip_pytorch_model.safetensors": "open_clip_model.safetensors"}
GRIDS = (VisionTransformer, Eva)  # timm fits their positions from any grid to any other, where it knows the file's image size


class Loading(dict[str, Any]):
    """The arguments with which timm would have loaded weights: model card, filter, class count."""

    module: nn.Module | None = None  # of timm's, into which it would have loaded them
    places: dict[str, list[str]] | None = None  # of each of its tensors the names in what a task built around it
    tensors: Mapping[str, Tensor] = MappingProxyType({})  # its own, as long as nothing is built around it

    def take(self, other: Loading, made: nn.Module) -> None:
        """Take over *other*, of the build that made the module *made*; of several builds the first one's module."""
        self.update(other)
        if self.module is None and other.module is not None and other.module is not made:
            outer: dict[int, list[str]] = {}
            for name, tensor in named_tensors(made):
                outer.setdefault(id(tensor), []).append(name)
            self.module, self.places = other.module, {name: outer.get(id(one), []) for name, one in other.tensors.items()}


def timm_file(name: str, card: dict[str, Any]) -> str:
    """timm's weights of the model *name*, whose card is *card*: a safetensors file, or an index with its shards beside it.

    Raises `UserError` when they are not published as safetensors, or neither cached nor reachable.
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
        # Not found locally is a kind of not found, and means that nobody could be asked.
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise UserError(
                f"model.pretrained: {repository} has no {file}, only pickled files; fetch one, "
                f"convert it (bigvision convert {pickled} {file}) and set model.weights"
            ) from error
        raise UserError(
            f"model.pretrained: timm's weights of {name} are neither cached nor reachable ({first_line(error)}); "
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
    loading = Loading()

    def keep(model: nn.Module, **arguments: Any) -> None:
        loading.update(arguments)
        loading.module, loading.tensors = model, model.state_dict(keep_vars=True)

    with patch.object(_builder, "load_pretrained", keep):
        yield loading


class Adapted:
    """What timm makes of a file for a model. Values are read and computed when they are asked for."""

    likes: dict[str, Tensor]  # a tensor of each value's shape, by timm's name
    left_out: str = ""  # a layer of the file that the model does not have, and does without
    note: str | None = None  # why it is not recorded: what it computes is then held, the rest mapped from the file

    def __init__(self, file: WeightsFile, module: nn.Module, loading: Loading) -> None:
        """Adapt *file* to *module* (on meta, left as it is); `UserError` when timm cannot, or the file cannot be read."""
        self._file = file
        metas = {name: torch.empty(place.shape, dtype=file.dtype(name), device="meta") for name, place in file.places.items()}
        try:
            twin = copy.deepcopy(module)  # whether a replay is exact shows only when it runs: the module may be sharded by then
            normally = lambda: _mapped(file, twin, loading).items()  # noqa: E731
            adapted = computed(partial(_load, module, loading), metas, file.whole, module, normally)
            self.likes, self._unchanged, self._values = adapted
        except UserError:
            raise
        except Exception as error:
            try:
                self.likes = held = _mapped(file, module, loading)
            except Exception as plain_error:
                what = f"does not fit this model ({first_line(plain_error)})"
                fix = "check model.name, model.image_size and model.options, and keep its config.json beside it"
                raise file.mistake(what, fix) from plain_error
            self._unchanged, self._values = {}, FirstValues(held.items)
            self.note = f"timm's adaptation of {file.source} was run on the whole file, not recorded: {first_line(error)}"
        self.take({name: name for name in self.likes}, {name: like.dtype for name, like in self.likes.items()})

    def take(self, sources: dict[str, str], dtypes: dict[str, torch.dtype]) -> None:
        """Keep, under each name in *sources*, the value that timm gave the name there, converted to its type in *dtypes*."""
        self._sources, self._dtypes = sources, dtypes

    def runs(self) -> list[str]:
        """The names whose values lie in the file as they are, for `read`; in the file's order."""

        def place(name: str) -> tuple[str, int]:
            tensor, _ = self._unchanged[self._sources[name]]
            return self._file.places[tensor].file, self._file.places[tensor].offset

        return sorted((name for name, source in self._sources.items() if source in self._unchanged), key=place)

    def read(self, name: str, start: int, values: Tensor) -> None:
        """Fill the 1-D *values* with the elements of one of `runs` from *start* on, and read nothing else."""
        tensor, first = self._unchanged[self._sources[name]]
        self._file.read(tensor, first + start, values)

    def tensors(self, seed: int, names: Set[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield ``(name, value)`` for each of *names* that has one; what is computed, storage by storage."""
        wanted: dict[str, list[str]] = {}
        for name, source in self._sources.items():
            if name not in names:
                continue
            if source in self._unchanged:
                value = torch.empty(self.likes[source].shape, dtype=self._dtypes[name], device="cpu")
                self.read(name, 0, value.view(-1))
                yield name, value
                del value
            else:
                wanted.setdefault(source, []).append(name)
        for source, value in self._values.tensors(seed, set(wanted)):
            for name in wanted[source]:
                yield name, value.to(self._dtypes[name]).contiguous()
            del value


def _load(module: nn.Module, loading: Loading, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Let timm adapt *state* and catch what it would load into *module*."""
    caught: dict[str, Tensor] = {}

    def catch(state_dict: dict[str, Tensor], strict: bool = True) -> Any:
        caught.update(state_dict)
        return nn.modules.module._IncompatibleKeys([], [])

    card = {**loading["pretrained_cfg"], "source": "", "state_dict": clean_state_dict(state)}
    trained_at = {"img_size": tuple(card["input_size"][1:])} if card.get("input_size") else {}
    with torch.no_grad(), patch.multiple(module, load_state_dict=catch, pretrained_model_args=trained_at, create=True):
        _builder.load_pretrained(module, **{**loading, "pretrained_cfg": card})
    return caught


def _mapped(file: WeightsFile, module: nn.Module, loading: Loading) -> dict[str, Tensor]:
    """What timm makes of the file's tensors, mapped into memory."""
    state: dict[str, Tensor] = {}
    for shard in sorted({place.file for place in file.places.values()}):
        with safe_open(file.folder / shard, "pt") as opened:
            names = [name for name, place in file.places.items() if place.file == shard]
            state |= {name: opened.get_tensor(file.stored.get(name, name)) for name in names}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # should it draw, all ranks must draw the same
        return _load(module, loading, state)


def read(config: ModelConfig, module: nn.Module, loading: Loading) -> tuple[Adapted, list[str]]:
    """The values for `module` (on meta, left as it is) by name, and notes on what starts fresh and what costs memory.

    Of the file only headers are read now. Raises `UserError` when it and the model do not fit.
    """
    key = "model.pretrained" if config.weights is None else "model.weights"
    if not loading:
        raise UserError(f"{key}: timm loads no weights into {config.name}; leave it out")
    file = None if config.weights is None else WeightsFile(config.weights, key)
    timms = module if loading.module is None else loading.module
    if file is not None and loading.places and any(plain_name(name).startswith(WITHIN) for name in file.places):
        # Of a model that the same task was built around.
        loading = Loading(
            loading | {"pretrained_cfg": module.pretrained_cfg, "num_classes": module.num_classes, "filter_fn": None}
        )
        timms = module
    card = dict(loading["pretrained_cfg"])
    heads = classifier_layers(card)
    tensors = dict(named_tensors(module))
    places = loading.places or {name: [name] for name in module.state_dict()}
    expected = {name: tensors[found[0]] for name, found in places.items() if found}
    if file is not None:
        # The classes are compared below, with the file and not with the card of timm's own weights.
        card.update(num_classes=loading["num_classes"], label_offset=0)
        if (size := file.trained_at()) is not None:
            own = arguments.image_size(config) or tuple(card["input_size"][1:])
            _check_grid(file, config, timms, size, own)
            card["input_size"] = (3, *size)
        # A classifier may start fresh, and files written before torch counted batches lack the counters.
        names = [name for name in places if not name.endswith("num_batches_tracked")]
        fitted = file.fit([name for name in names if not name.startswith(heads)])
    else:
        fitted = None
        file = WeightsFile(timm_file(config.name, card), key)
    values = Adapted(file, timms, Loading({**loading, "pretrained_cfg": card}))
    fresh = _check(file, config, timms, values, heads, expected, places)
    why = "the classes of {} are others" if fresh and fresh[0] in (*values.likes, *file.places) else "{} has none"
    notes = [f"the classifier ({fresh[0]}) starts fresh: {why.format(file.source)}"] if fresh else []
    if values.left_out:
        notes.append(f"{values.left_out} of {file.source}, a classifier by its shape, is left out")
    return values, [note for note in (fitted, *notes, values.note) if note]


def classifier_layers(card: Mapping[str, Any]) -> tuple[str, ...]:
    """With what the names of the classifier's tensors begin, by timm's *card* of the model."""
    layers = card.get("classifier") or ()
    return tuple(f"{layer}." for layer in ((layers,) if isinstance(layers, str) else layers))


def _check_grid(file: WeightsFile, config: ModelConfig, module: nn.Module, size: Size, own: Size) -> None:
    """Raise `UserError` where *file*, trained at *size*, has positions on a grid that timm cannot fit to a model of size *own*.

    timm takes positions to lie on a square, but for `GRIDS`, and leaves them where there are as many as the model has.
    """
    if size == own or (size[0] == size[1] and own[0] == own[1]) or isinstance(module, GRIDS):
        return
    if names := arguments.sized_tensors(config, size):
        raise UserError(
            f"{file.key}: {file.source} was trained at {size[0]} x {size[1]} pixels, and timm cannot fit its {names[0]} to "
            f"{own[0]} x {own[1]}; use model.image_size: [{size[0]}, {size[1]}]"
        )


def _check(
    file: WeightsFile, config: ModelConfig, module: nn.Module, values: Adapted, heads: tuple[str, ...],
    expected: dict[str, Tensor], places: dict[str, list[str]],
) -> list[str]:  # fmt: skip
    """Leave in *values* what the model takes, and return the names that start fresh; the classifier's begin with *heads*.

    *expected* are the tensors that need values, by timm's names; *places* has the names in the model of all that timm knows,
    none for those that the model does without.
    """
    given = values.likes
    shapes = {name: like.shape for name, like in given.items()}
    fresh = [name for name, ours in expected.items() if name.startswith(heads) and shapes.get(name) != ours.shape]
    for name in fresh:
        if name in given and config.num_classes is not None and config.weights is not None and given[name].dim():
            theirs, ours = given[name].shape[0], expected[name].shape[0]
            raise UserError(
                f"model.num_classes: {ours} does not fit the {theirs} classes of {file.source}; "
                "set it to null for a fresh classifier, or use the file's number"
            )
    # A tied tensor may be in the file under any one of its names.
    tied: dict[int, list[str]] = {}
    for name, tensor in expected.items():
        tied.setdefault(id(tensor), []).append(name)
    sources = {
        name: source
        for names in tied.values()
        for name in names
        if name not in fresh and (source := next((n for n in (name, *names) if n in given), None)) is not None
    }
    # Files written before torch counted batches lack the counters; torch's own loader lets that pass too.
    missing = [n for n in expected if n not in sources and n not in fresh and not n.endswith("num_batches_tracked")]
    unexpected = [name for name in given if name not in places and not name.startswith(heads)]
    if not missing and (other := _renamed_head(module, fresh, {name: given[name] for name in unexpected})):
        values.left_out, unexpected = other, []
    for names, what in ((missing, "lacks"), (unexpected, "has, unknown to the model,")):
        if names:
            fix = "check model.name and model.options"
            if names[0].endswith((DOWN, UP)):
                fix = "merge the adapters of that run into its weights first (bigvision export STEP_FOLDER FILE_OR_FOLDER)"
            raise file.mistake(f"{what} {names[0]} ({len(names)} such)", fix)
    if shaped := [name for name, source in sources.items() if shapes[source] != expected[name].shape]:
        theirs, ours = tuple(shapes[sources[shaped[0]]]), tuple(expected[shaped[0]].shape)
        raise UserError(
            f"{file.key}: {shaped[0]} is {theirs} in {file.source} and {ours} in the model ({len(shaped)} such); "
            "check model.name, model.image_size and model.options"
        )
    taken = {place: name for name in sources for place in places[name]}
    values.take({p: sources[name] for p, name in taken.items()}, {p: expected[name].dtype for p, name in taken.items()})
    return fresh


def _renamed_head(module: nn.Module, fresh: list[str], others: dict[str, Tensor]) -> str:
    """The linear layer that *others* are, with as many inputs as the model's classifier, all of which starts fresh.

    It is the classifier of a program that calls it otherwise. "" where *others* are more, as of a deeper model.
    """
    layers = {name.rpartition(".")[0] for name in others}
    layer, shapes = next(iter(layers), ""), {name.rpartition(".")[2]: like.shape for name, like in others.items()}
    heads = [name for name in fresh if name.endswith(".weight")]
    if len(layers) != 1 or len(heads) != 1 or layer.partition(".")[0] in dict(module.named_children()):
        return ""
    weight, inputs = shapes.get("weight", ()), module.state_dict()[heads[0]].shape[1:]
    fits = len(weight) == 2 and weight[1:] == inputs and shapes.keys() <= {"weight", "bias"}
    return layer if fits else ""
