"""The tensors of a module: those torch knows (parameters and buffers) and those in plain attributes, and moving them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bigvision.models.exact_init.record import Recorder
from bigvision.models.exact_init.recording import NotRecordable, Recording, View
from bigvision.models.exact_init.replay import value_now

Attribute = tuple[str, tuple[Any, ...], View | Tensor]
"""A tensor that is neither parameter nor buffer: its module's path, the attribute and the keys to it, its value."""


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
