"""The tensors of a module: those torch knows (parameters and buffers) and those in plain attributes, and moving them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from bigvision.errors import UserError
from bigvision.models.exact_init.record import Recorder, record
from bigvision.models.exact_init.recording import NotRecordable, Recording, ReplayDiffers, View, replay, value_now

Attribute = tuple[str, tuple[Any, ...], View | Tensor]
"""A tensor that is neither parameter nor buffer: its module's path, the attribute and the keys to it, its value."""
Build = Callable[[dict[str, Any]], nn.Module]
"""From keyword arguments to a module."""
Choose = Callable[[Build], tuple[nn.Module, dict[str, Any]]]
"""Finds the arguments that a `Build` takes, by calling it once or more; returns what it built and the arguments."""


@dataclass
class FirstValues:
    """The values that a normal build gives to the tensors of a module."""

    build: Callable[[], nn.Module]
    """Builds the module normally, with values, from torch's global random numbers; or returns a module that has them."""
    attributes: list[Attribute]
    """Tensors that are neither parameters nor buffers."""
    recording: Recording | None = None
    """None: nothing was recorded, so `build` is called for any value."""
    views: dict[int, list[tuple[str, View]]] = field(default_factory=dict)
    """The names in each storage of the recording."""
    notes: list[str] = field(default_factory=list)
    """What the user should know, one line each."""

    def tensors(self, seed: int, names: Set[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield ``(name, value)`` for *names*, as after ``torch.manual_seed(seed)``. The caller's random state is not touched.

        Only what *names* need is performed: random operations are drawn up to the last one that they need.
        """
        left = set(names)
        if self.recording is not None:
            wanted = [storage for storage, views in self.views.items() if any(name in left for name, _ in views)]
            values = replay(self.recording, seed, wanted)
            try:
                for storage, content in values:
                    for name, view in self.views[storage]:
                        if name in left:
                            left.discard(name)
                            yield name, view.on(content)
                    del content
            except ReplayDiffers as error:
                self.notes.append(f"built the rest normally: {error}")
        if not left:
            return
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(seed)
            twin = self.build()
        for name, tensor in named_tensors(twin):
            if name in left:
                yield name, tensor.detach()

    def set_attributes(self, module: nn.Module, device: torch.device | str) -> None:
        """Give plain tensor attributes of *module* their values on *device*; submodules that it lacks are skipped."""
        set_attributes(module, self.attributes, self.recording, device)


def construct(build: Build, choose: Choose, name: str) -> tuple[nn.Module, dict[str, Any], FirstValues]:
    """Build a module on meta; return it with the arguments that *choose* found and its first values.

    What cannot be recorded is built normally, at the memory of the whole model, and a note says why.

    Args:
        name: what the notes call the model.

    Raises:
        UserError: from *choose* or *build*; whatever else a normal build raises.
    """
    try:
        return _recorded(build, choose, name)
    except UserError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]

    # A normal build can do what the recording could not follow, unless it is the arguments that do not work.
    def normally(arguments: dict[str, Any]) -> nn.Module:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)  # plain attributes are kept from this build: they must be the same on all ranks
            return build(arguments)

    module, arguments = choose(normally)
    attributes = plain_attributes(module, None, {t.untyped_storage()._cdata for _, t in named_tensors(module)})
    values = FirstValues(lambda: build(arguments), attributes)
    values.notes.append(f"{name} was built normally, at the memory of the whole model, not recorded: {reason}")
    to_meta(module, attributes)
    return module, arguments, values


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
    recording, views = recorder.recording, _views(recorder, module)
    attributes = plain_attributes(module, recorder, set(views))
    values = FirstValues(lambda: build(arguments), attributes, recording, views)
    for unset in sorted(name for storage in recording.unset & views.keys() for name, _ in views[storage]):
        values.notes.append(f"{name} leaves {unset} without a value: it starts as zeros")
    to_meta(module, attributes)
    return module, arguments, values


def _views(recorder: Recorder, module: nn.Module) -> dict[int, list[tuple[str, View]]]:
    """The names in each storage."""
    found: dict[int, list[tuple[str, View]]] = {}
    for name, tensor in named_tensors(module):
        if tensor.device.type != "meta":
            with recorder:
                tensor = recorder.constant(tensor.detach())
        view = recorder.view(tensor)
        if view is None:
            raise NotRecordable(f"{name} is of unknown origin")
        recorder.check_filled(view)
        found.setdefault(view.storage, []).append((name, view))
    return found


def _random_state() -> tuple:
    """Where Python's, NumPy's and torch's global generators stand."""
    drawn: Any = numpy.random.get_state(legacy=False)
    mine = {key: value.tobytes() if isinstance(value, numpy.ndarray) else value for key, value in drawn["state"].items()}
    return random.getstate(), mine, torch.get_rng_state().tolist()


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer, persistent or not, under every name that it has."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def plain_attributes(module: nn.Module, recorder: Recorder | None, known: set[int]) -> list[Attribute]:
    """Tensors kept in plain attributes, also inside lists, tuples and dicts, that are not views of parameters or buffers."""

    def walk(value: Any, keys: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
        if isinstance(value, Tensor):
            yield keys, value
        elif isinstance(value, (list, tuple, dict)):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                yield from walk(item, (*keys, key))

    found: list[Attribute] = []
    for path, child in module.named_modules():
        plain = {key: value for key, value in vars(child).items() if key not in ("_parameters", "_buffers", "_modules")}
        for keys, tensor in walk(plain, ()):
            view = recorder.view(tensor) if recorder is not None else None
            if (view.storage if view is not None else tensor.untyped_storage()._cdata) in known:
                continue  # an alias (torch's RNNs keep a list of their parameters), kept up to date by its module
            if view is not None and recorder is not None:
                value_now(recorder.recording, view)
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


def set_attributes(
    module: nn.Module, attributes: list[Attribute], recording: Recording | None, device: torch.device | str
) -> None:
    """Give the `attributes` that `module` has their values on `device`; those of submodules it lacks are passed over."""
    for path, keys, value in attributes:
        try:
            holder = vars(module.get_submodule(path))
        except AttributeError:
            continue
        if isinstance(value, View):
            assert recording is not None
            value = value_now(recording, value)
        _put(holder, keys, value.to(device))


def to_meta(module: nn.Module, attributes: list[Attribute]) -> None:
    """Move what is real to meta in place; what was tied stays tied."""
    moved: dict[int, Tensor] = {}
    for child in module.modules():
        registers: list[Any] = [child._parameters, child._buffers]
        for tensors in registers:
            for key, tensor in tensors.items():
                if tensor is None or tensor.is_meta:
                    continue
                if id(tensor) not in moved:
                    meta = tensor.detach().to("meta")
                    kind = type(tensor)
                    moved[id(tensor)] = kind(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta
                tensors[key] = moved[id(tensor)]
    for path, keys, value in attributes:
        if isinstance(value, Tensor):
            _put(vars(module.get_submodule(path)), keys, value.to("meta"))
