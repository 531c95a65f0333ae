"""The door to exact first values: a module on meta, and the values that a normal build gives to its tensors.

The *init trace* is what the constructor did to tensors, in order; a *replay* performs as much of it again as a tensor needs.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from bigvision.errors import UserError
from bigvision.models.exact_init.trace import InitTrace, NotRecordable, Recorder, ReplayDiffers, View, memory_id, record, replay
from bigvision.models.tracing import first_line, named_tensors, plain_attributes

Attribute = tuple[str, tuple[Any, ...], View | Tensor]  # of a module: its path, the attribute and the keys in it, the value
Build = Callable[[dict[str, Any]], nn.Module]  # from keyword arguments to a module
Choose = Callable[[Build], tuple[nn.Module, dict[str, Any]]]  # tries `Build` with arguments until it takes them; returns both


@dataclass
class FirstValues:
    """Tensors by name whose values are computed when they are asked for."""

    build: Callable[[], Iterable[tuple[str, Tensor]]]  # all of them, normally, drawn from torch's global random numbers
    attributes: list[Attribute] = field(default_factory=list)  # tensors that are neither parameters nor buffers
    trace: InitTrace | None = None  # None: nothing was recorded, so `build` is called for any value
    views: dict[str, View] = field(default_factory=dict)  # the tensors in terms of the trace
    notes: list[str] = field(default_factory=list)  # what the user should know, one line each

    def tensors(self, seed: int, names: Set[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield ``(name, value)`` for *names*, as after ``torch.manual_seed(seed)``. The caller's random state is not touched.

        Only what *names* need is performed: random operations are drawn up to the last one that they need.
        """
        left = set(names)
        if self.trace is not None:
            wanted: dict[int, list[str]] = {}
            for name, view in self.views.items():
                if name in left:
                    wanted.setdefault(view.storage, []).append(name)
            try:
                for storage, content in replay(self.trace, seed, wanted):
                    for name in wanted[storage]:
                        left.discard(name)
                        yield name, self.views[name].on(content)
                    del content
            except ReplayDiffers as error:
                self.notes.append(f"built the rest normally: {error}")
        if not left:
            return
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(seed)
            values = self.build()
        for name, tensor in values:
            if name in left:
                yield name, tensor.detach()

    def set_attributes(self, module: nn.Module, device: torch.device | str) -> None:
        """Give plain tensor attributes of *module* their values on *device*; what it lacks is skipped."""
        for path, keys, value in self.attributes:
            try:
                holder = vars(module.get_submodule(path))
            except AttributeError:
                continue
            if keys[0] not in holder:  # a stage has the path, but not this attribute of the module there
                continue
            if isinstance(value, View):
                assert self.trace is not None
                value = self.trace.value_now(value)
            _put(holder, keys, value.to(device))


def construct(build: Build, choose: Choose, name: str) -> tuple[nn.Module, dict[str, Any], FirstValues]:
    """Build a module on meta; return it with the arguments that *choose* found and its first values.

    What cannot be recorded is built normally, at the memory of the whole model, and a note, which calls the model *name*, says
    why. Raises the `UserError` of *choose* or *build*, and whatever else a normal build raises.
    """
    try:
        return _recorded(build, choose, name)
    except UserError:
        raise
    except Exception as error:
        reason = first_line(error)

    # A normal build can do what the trace could not follow, unless it is the arguments that do not work.
    def normally(arguments: dict[str, Any]) -> nn.Module:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)  # plain attributes are kept from this build: they must be the same on all ranks
            return build(arguments)

    module, arguments = choose(normally)
    values = FirstValues(lambda: named_tensors(build(arguments)), _attributes(module))
    values.notes.append(f"{name} was built normally, at the memory of the whole model, not recorded: {reason}")
    _to_meta(module, values.attributes)
    return module, arguments, values


def given(module: nn.Module) -> tuple[nn.Module, FirstValues]:
    """A copy of *module*, which is left as it is, on meta, and its values. `NotRecordable` is one of the errors of copying."""
    memo: dict[int, Any] = {}  # deepcopy takes what it finds in here for the copies
    for _, tensor in named_tensors(module):
        memo.setdefault(id(tensor), _meta_of(tensor))
    twin = copy.deepcopy(module, memo)
    values = FirstValues(lambda: named_tensors(module), _attributes(twin))
    _to_meta(twin, values.attributes)  # what runs the copy on meta would stumble over them
    return twin, values


def computed(
    function: Callable[[dict[str, Tensor]], dict[str, Tensor]], metas: dict[str, Tensor], read: Callable[[str], Tensor],
    unknown: nn.Module, normally: Callable[[], Iterable[tuple[str, Tensor]]],
) -> tuple[dict[str, Tensor], dict[str, tuple[str, int]], FirstValues]:  # fmt: skip
    """Record *function* of the tensors *metas*, whose values *read* gives by name; *normally* does it without recording.

    At the shapes of the module *unknown*, but not at its values, *function* may look. Returns a tensor of each result's shape
    and type; for each that is a run of one of *metas* as it is, the name of that and the first element; and the values of all
    others. Raises `NotRecordable`, and whatever *function* raises.
    """

    def no_value(name: str) -> Tensor:
        raise NotRecordable(f"the value of the model's own {name} is asked for")

    with record() as recorder:
        owned = {
            recorder.source(tensor, partial(no_value, name)).storage
            for name, tensor in named_tensors(unknown)
            if recorder.view(tensor) is None
        }
        stored = {recorder.source(meta, partial(read, name)).storage: name for name, meta in metas.items()}
        likes = function(metas)
    trace = recorder.trace
    views, unchanged = _views(recorder, likes.items()), {}
    values = FirstValues(normally, trace=trace)
    for name, like in likes.items():
        view = views[name]
        reads = {storage for step in trace.slice(view.storage) for storage in trace.ops[step].reads}
        if view.storage in trace.unset or not owned.isdisjoint(reads | {view.storage}):
            raise NotRecordable(f"{name} is left without a value")
        source = stored.get(view.storage)
        untouched = source is not None and len(trace.writers[view.storage]) == 1
        if source is not None and untouched and like.is_contiguous() and like.dtype == metas[source].dtype:
            unchanged[name] = source, view.offset
        else:
            values.views[name] = view
    return likes, unchanged, values


def _recorded(build: Build, choose: Choose, name: str) -> tuple[nn.Module, dict[str, Any], FirstValues]:
    before, torch_state = _random_state(), torch.get_rng_state()
    recorder: Recorder | None = None

    def recorded(arguments: dict[str, Any]) -> nn.Module:
        nonlocal recorder
        with record() as recorder:
            return build(arguments)

    module, arguments = choose(recorded)
    assert recorder is not None
    if _random_state() != before:
        torch.set_rng_state(torch_state)
        raise NotRecordable("it draws random numbers from outside torch's recorded operations")
    trace, views = recorder.trace, _views(recorder, named_tensors(module))
    values = FirstValues(lambda: named_tensors(build(arguments)), _attributes(module, recorder), trace, views)
    unset = sorted(one for one, view in views.items() if view.storage in trace.unset)
    values.notes += [f"{name} leaves {one} without a value: it starts as zeros" for one in unset]
    _to_meta(module, values.attributes)
    return module, arguments, values


def _views(recorder: Recorder, named: Iterable[tuple[str, Tensor]]) -> dict[str, View]:
    found: dict[str, View] = {}
    for name, tensor in named:
        # A real one was made outside of what was recorded, or from values that Python looked at.
        view = recorder.view(tensor if tensor.device.type == "meta" else recorder.constant(tensor.detach()))
        if view is None:
            raise NotRecordable(f"{name} is of unknown origin")
        found[name] = recorder.used(view)
    return found


def _random_state() -> tuple:
    """Where Python's, NumPy's and torch's global generators stand."""
    drawn: Any = numpy.random.get_state(legacy=False)
    mine = {key: value.tobytes() if isinstance(value, numpy.ndarray) else value for key, value in drawn["state"].items()}
    return random.getstate(), mine, torch.get_rng_state().tolist()


def _attributes(module: nn.Module, recorder: Recorder | None = None) -> list[Attribute]:
    """Tensors kept in plain attributes, also inside lists, tuples and dicts, that are not views of parameters or buffers."""

    def walk(value: Any, keys: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
        if isinstance(value, Tensor):
            yield keys, value
        elif isinstance(value, (list, tuple, dict)):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                yield from walk(item, (*keys, key))

    known = {memory_id(tensor) for _, tensor in named_tensors(module) if recorder is None or tensor.is_meta}
    found: list[Attribute] = []
    for path, child in module.named_modules():
        for keys, tensor in walk(plain_attributes(child), ()):
            if memory_id(tensor) in known:
                continue  # an alias (torch's RNNs keep a list of their parameters), kept up to date by its module
            view = recorder.view(tensor) if recorder is not None else None
            if view is not None and recorder is not None:
                recorder.trace.value_now(view)
            elif tensor.device.type == "meta":
                raise NotRecordable(f"attribute {keys[0]} of {path or 'the model'} is of unknown origin")
            found.append((path, keys, view if view is not None else tensor))
    return found


def _put(tree: Any, keys: tuple[Any, ...], value: Tensor) -> Any:
    """`tree` with `value` at `keys`: lists and dicts are changed, tuples made anew."""
    if not keys:
        return value
    item = _put(tree[keys[0]], keys[1:], value)
    if isinstance(tree, tuple):
        items = [*tree[: keys[0]], item, *tree[keys[0] + 1 :]]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    tree[keys[0]] = item
    return tree


def _meta_of(tensor: Tensor) -> Tensor:
    meta = tensor.detach().to("meta")
    return nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta


def _to_meta(module: nn.Module, attributes: list[Attribute]) -> None:
    """Move what is real to meta in place; what was tied stays tied."""
    moved: dict[int, Tensor] = {}
    for child in module.modules():
        registers: list[Any] = [child._parameters, child._buffers]
        for tensors in registers:
            for key, tensor in tensors.items():
                if tensor is not None and not tensor.is_meta:
                    if id(tensor) not in moved:
                        moved[id(tensor)] = _meta_of(tensor)
                    tensors[key] = moved[id(tensor)]
    for path, keys, value in attributes:
        if isinstance(value, Tensor):
            _put(vars(module.get_submodule(path)), keys, value.to("meta"))
