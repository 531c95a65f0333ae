"""Low-rank adapters (LoRA, Hu et al. 2021) beside the linear layers of a model.

A layer with an adapter computes W x + b + (alpha / rank) B A x. W and b keep timm's names (``blocks.0.attn.qkv.weight``);
beside them are ``blocks.0.attn.qkv.lora_A.weight`` and ``...lora_B.weight``, which are peft's names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from bigvision.config import LoraConfig
from bigvision.errors import UserError, nearest_paths
from bigvision.fragments import DOWN
from bigvision.samples import seed_from

PARTS = re.compile(r"att|mhsa|xca|mixer|mlp|ffn|feed_forward")
"""What attention and MLP are called in the paths of timm's and others' models."""
POSITION = {"cpb_mlp", "meta_mlp", "rel_pos", "pos_proj"}
"""What computes the bias of relative positions from coordinates, within attention."""
IN_BLOCK = re.compile(r"(^|[._])\d+\.")
"""In the path of what lies in a member of a container: a pooling head at the end of a model does not."""


class LoraLinear(nn.Linear):
    """A linear layer with an adapter: one of torch's that has changed its class, so that whoever holds it still does."""

    lora_A: nn.Linear
    lora_B: nn.Linear
    scaling: float

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora_B(self.lora_A(x)) * self.scaling


def add_adapters(module: nn.Module, config: LoraConfig, input_shape: tuple[int, int, int]) -> list[str]:
    """Give the linear layers of *module*, on meta, that *config* names adapters, in place; return what the user should know.

    Raises `UserError` for targets that match nothing, or something other than linear layers.
    """
    heads = _classifier(module)
    for parent in module.modules():
        # BEiT's, EVA's and Swin V2's attention else reads the weight of a layer that it does not call.
        if getattr(parent, "qkv_bias_separate", None) is False:
            parent.qkv_bias_separate = True  # type: ignore[assignment]
    linear = {
        path: part
        for path, part in module.named_modules()
        if isinstance(part, nn.Linear) and type(part).forward is nn.Linear.forward and part not in heads
    }
    # In evaluation torch's encoder layer reads the weights of all layers in it, and attention those of its last one always.
    fused = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
    within = tuple(f"{path}." for path, part in module.named_modules() if isinstance(part, fused))
    uncalled = (linear.keys() - _called(module, linear, input_shape)) | {path for path in linear if path.startswith(within)}
    if config.targets is None:
        fits = [path for path in linear if _is_projection(path) and config.rank < min(linear[path].weight.shape)]
        chosen = [path for path in fits if path not in uncalled]
        if not chosen:
            raise UserError(
                f"model.lora.targets: null finds no linear layer wider than the rank, {config.rank}, in attention or an MLP of "
                f"the blocks (convolutions have no adapters): name layers in targets{_some_of(linear)}, or use model.trainable"
            )
        left = [path for path in fits if path in uncalled]
        notes = [f"model.lora: no adapter for {left[0]} ({len(left)} such), which the model does not call"] if left else []
    else:
        chosen, notes = list(dict.fromkeys(path for one in config.targets for path in _matching(module, one, linear))), []
        if found := next((path for path in chosen if path in uncalled), None):
            raise UserError(
                f"model.lora.targets: {found} is not called by the model, which reads its weight in another way: leave it out"
            )
    for path in chosen:
        layer = linear[path]
        options = {"bias": False, "device": "meta", "dtype": layer.weight.dtype}
        layer.__class__ = LoraLinear
        assert isinstance(layer, LoraLinear)
        layer.lora_A = nn.Linear(layer.in_features, config.rank, **options)
        layer.lora_B = nn.Linear(config.rank, layer.out_features, **options)
        layer.scaling = config.alpha / config.rank
    return notes


@dataclass(frozen=True)
class Parameter:
    """A matrix of an adapter."""

    name: str  # where it is tied, the first of its names
    shape: torch.Size

    def first_value(self, seed: int) -> Tensor:
        """As in peft: B is zero, and A uniform after He et al. (2015).

        It depends on *seed* and the name alone, so that every rank and strategy draws the same for whatever it holds.
        """
        value = torch.zeros(self.shape, device="cpu")
        if self.name.endswith(DOWN):
            generator = torch.Generator().manual_seed(seed_from("lora", seed, self.name) % 2**63)
            nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
        return value


def adapters(module: nn.Module) -> dict[str, Parameter]:
    """The adapters' parameters, by each of their names."""
    first = {parameter: name for name, parameter in module.named_parameters()}
    layers = [layer for layer in module.modules() if isinstance(layer, LoraLinear)]
    owned = {matrix for layer in layers for matrix in (layer.lora_A.weight, layer.lora_B.weight)}
    every = module.named_parameters(remove_duplicate=False)
    return {name: Parameter(first[one], one.shape) for name, one in every if one in owned}


def _matching(module: nn.Module, pattern: str, linear: dict[str, nn.Linear]) -> list[str]:
    """The layers of *linear* that *pattern* matches, or that lie in a module that it matches."""
    paths = [path for path, part in module.named_modules() if path and any(True for _ in part.parameters())]
    hits = [path for path in paths if fnmatchcase(path, pattern)]
    if not hits:
        near = nearest_paths(pattern, paths)
        raise UserError(f"model.lora.targets: {pattern!r} matches no module of the model; the nearest names are {near}")
    found: list[str] = []
    for path in hits:
        if any(path.startswith(f"{other}.") for other in hits):
            continue
        inside = [name for name in linear if name == path or name.startswith(f"{path}.")]
        if not inside:
            part = module.get_submodule(path)
            kind = "the classifier, which is trained whole" if part in _classifier(module) else f"a {type(part).__name__}"
            fix = f"name linear layers{_some_of(linear)}" if linear else "the model has no others: use model.trainable"
            raise UserError(
                f"model.lora.targets: {pattern!r} matches {path}, {kind}; adapters are for linear layers (torch's Linear), not "
                f"for convolutions or norms: {fix}"
            )
        found += inside
    return found


def _classifier(module: nn.Module) -> set[nn.Module]:
    """The modules of the model's classifier."""
    if not hasattr(module, "get_classifier"):
        return set()
    heads = module.get_classifier()  # type: ignore[operator]
    return {part for head in (heads if isinstance(heads, (tuple, list)) else (heads,)) for part in head.modules()}


def _called(module: nn.Module, linear: dict[str, nn.Linear], shape: tuple[int, int, int]) -> set[str]:
    """Those of *linear* that a forward of one image calls; all where meta cannot run the model."""
    called = set[str]()
    hooks = [part.register_forward_pre_hook(lambda *_, path=path: called.add(path)) for path, part in linear.items()]
    modes = {part: part.training for part in module.modules()}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            module.eval()(torch.empty(1, *shape, device="meta"))
    except Exception:  # a model of the user's may not run on meta
        return set(linear)
    finally:
        for hook in hooks:
            hook.remove()
        for part, mode in modes.items():
            part.training = mode
    return called


def _is_projection(path: str) -> bool:
    return bool(IN_BLOCK.search(path) and PARTS.search(path)) and POSITION.isdisjoint(path.split("."))


def _some_of(linear: Iterable[str]) -> str:
    names = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path) for path in linear))
    return f", such as {', '.join(names[:3])}" if names else ""
