"""Values from a weights file, adapted to the model by timm's own code and checked by ours. Only safetensors is read."""

from __future__ import annotations

from torch import Tensor, nn

from bigvision.config import ModelConfig
from bigvision.errors import UserError
from bigvision.models.adapt import Adapted, Loading
from bigvision.models.exact_init import named_tensors
from bigvision.models.hub import timm_file
from bigvision.models.weights_file import WeightsFile


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
