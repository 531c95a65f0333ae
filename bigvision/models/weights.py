"""Values from a weights file, adapted to the model by timm's own code and checked by ours. Only safetensors is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import _builder
from torch import Tensor, nn

from bigvision.config import ModelConfig
from bigvision.errors import UserError
from bigvision.models.check import check_weights_file

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


def read(config: ModelConfig, module: nn.Module, loading: Loading) -> tuple[dict[str, Tensor], list[str]]:
    """The values for `module` (on meta, left as it is) by name, and notes on what starts fresh.

    Tensors are windows on the mapped file where timm's filter leaves them as they are. Raises `UserError` when the file
    and the model do not fit.
    """
    key, source = ("model.weights", config.weights) if config.weights is not None else ("model.pretrained", config.name)
    if not loading:
        raise UserError(f"{key}: timm loads no weights into {config.name}; leave it out")
    card = dict(loading["pretrained_cfg"])
    if config.weights is not None:
        path = Path(source).expanduser()
        # The classes are compared below, with the file and not with the card of timm's own weights.
        card.update(num_classes=loading["num_classes"], label_offset=0)
    else:
        path = _timm_file(config, card)
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{key}: {source} cannot be read ({error}); fetch or write it again") from error
    values = _adapted(key, source, module, {**loading, "pretrained_cfg": {**card, "source": "", "state_dict": state}})
    heads = card.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    return _checked(key, source, config, module, values, heads)


def _adapted(key: str, source: str, module: nn.Module, loading: Loading) -> dict[str, Tensor]:
    """Run timm's adaptation (renaming, resampling, channels, classifier) and catch what it would load."""
    caught: dict[str, Tensor] = {}

    def catch(state_dict: dict[str, Tensor], strict: bool = True):
        caught.update(state_dict)
        return nn.modules.module._IncompatibleKeys([], [])

    module.load_state_dict = catch  # type: ignore[method-assign]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            _builder.load_pretrained(module, **loading)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{key}: {source} does not fit this model ({reason}); check model.name and model.options") from error
    finally:
        del module.load_state_dict
    return caught


def _checked(key: str, source: str, config: ModelConfig, module: nn.Module, values: dict[str, Tensor], heads: tuple[str, ...]):
    expected = module.state_dict()
    notes: list[str] = []

    def is_head(name: str) -> bool:
        return any(name.startswith(f"{head}.") for head in heads)

    fresh = [name for name in expected if is_head(name) and (name not in values or values[name].shape != expected[name].shape)]
    surplus = [name for name in values if is_head(name) and name not in expected]
    for name in fresh:
        if name in values and config.num_classes is not None and config.weights is not None and values[name].dim():
            theirs, ours = values[name].shape[0], expected[name].shape[0]
            raise UserError(
                f"model.num_classes: {ours} does not fit the {theirs} classes of {source}; "
                "set it to null for a fresh classifier, or use the file's number"
            )
    if fresh:
        notes.append(f"the classifier ({fresh[0]}) starts fresh: the classes of {source} are others")
    values = {name: value for name, value in values.items() if name not in fresh and name not in surplus}
    # Files written before torch counted batches lack the counters; torch's own loader lets that pass too.
    missing = [n for n in expected if n not in values and n not in fresh and not n.endswith("num_batches_tracked")]
    unexpected = [name for name in values if name not in expected]
    shaped = [name for name in values if name in expected and values[name].shape != expected[name].shape]
    if missing:
        tied = _tied_names(module)
        missing = [name for name in missing if not any(other in values for other in tied.get(name, ()))]
    for names, what in ((missing, "lacks"), (unexpected, "has, unknown to the model,")):
        if names:
            raise UserError(f"{key}: {source} {what} {names[0]} ({len(names)} such); check model.name and model.options")
    if shaped:
        name = shaped[0]
        raise UserError(
            f"{key}: {name} is {tuple(values[name].shape)} in {source} and {tuple(expected[name].shape)} in the model "
            f"({len(shaped)} such); check model.name, model.image_size and model.options"
        )
    return values, notes


def _tied_names(module: nn.Module) -> dict[str, list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: group for group in names.values() for name in group if len(group) > 1}


def _timm_file(config: ModelConfig, card: dict[str, Any]) -> Path:
    """timm's pretrained weights of this model as a safetensors file, from the cache or the network."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    file = str(Path(card.get("hf_hub_filename") or "model").with_suffix(".safetensors"))
    file = {"open_clip_pytorch_model.safetensors": "open_clip_model.safetensors"}.get(file, file)
    if local := card.get("file"):
        check_weights_file(local)
        return Path(local)
    repository, _, revision = (card.get("hf_hub_id") or "").partition("@")
    # timm's hub repositories hold native files; "hf" marks those in a format of their own.
    if not repository or card.get("custom_load") == "hf":
        raise UserError(
            f"model.pretrained: timm's weights of {config.name} are not published as safetensors; "
            "convert them and set model.weights, or use false"
        )
    try:
        return Path(hf_hub_download(repository, file, revision=revision or None))
    except Exception as error:
        # Not found locally is a kind of not found, and means that nobody could be asked.
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise UserError(
                f"model.pretrained: {repository} has no {file}, only pickled files; convert them and set model.weights"
            ) from error
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"model.pretrained: timm's weights of {config.name} are neither cached nor reachable ({reason}); "
            f"get {file} of {repository} and set model.weights to it, or use false"
        ) from error
