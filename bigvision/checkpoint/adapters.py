"""The adapters (LoRA) in a checkpoint: merged into the weights beside them, or alone in peft's layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bigvision.checkpoint.manifest import read_document
from bigvision.checkpoint.reader import Tensors
from bigvision.errors import UserError
from bigvision.fragments import DOWN, UP, Place

PREFIX = "base_model.model."
"""What peft puts before the names of the model that it wraps."""


@dataclass(frozen=True)
class Adapters:
    """Of one checkpoint."""

    tensors: Tensors
    places: dict[str, Place]
    """Of the model's tensors, the adapters among them."""
    layers: list[str]
    """The paths of the layers that have an adapter."""
    alpha: float
    trained: list[str]
    """What was trained beside the adapters."""

    def base(self) -> dict[str, Place]:
        """The places of the model without adapters."""
        return {name: place for name, place in self.places.items() if not name.endswith((DOWN, UP))}

    @property
    def rank(self) -> int:
        return self.places[self.layers[0] + DOWN].shape[0]

    def merged(self, layer: str) -> Iterator[Tensor]:
        """The values of the layer's weight W + alpha / rank B A, flat and in parts, in fp32.

        They are summed in fp64, so that they do not depend on where a part ends.
        """
        place = self.places[f"{layer}.weight"]
        down, up = (self._whole(layer + name).double() for name in (DOWN, UP))
        width, begin = place.shape[1], 0
        for part in self.tensors.parts(place):
            end = begin + len(part)
            first, last = begin // width, -(-end // width)
            added = (up[first:last] @ down).view(-1)[begin - first * width : end - first * width]
            yield (part.double() + self.alpha / self.rank * added).float()
            begin = end

    def alone(self) -> dict[str, Place]:
        """The places of what peft keeps, by its names: adapters, and whole modules that were trained beside them."""
        kept = [name for name in self.places if name.endswith((DOWN, UP))]
        kept += [name for name in self.places if name.rpartition(".")[0] in self._modules()]
        return {PREFIX + name: self.places[name] for name in kept}

    def peft_config(self) -> dict[str, Any]:
        """The content of peft's adapter_config.json."""
        return {
            "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "inference_mode": True, "r": self.rank,
            "lora_alpha": self.alpha, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "use_rslora": False,
            "target_modules": self.layers, "modules_to_save": self._modules() or None,
        }  # fmt: skip

    def _modules(self) -> list[str]:
        """The modules that were trained whole, such as the head. `UserError` where peft has no place for one."""
        found = list(dict.fromkeys(name.rpartition(".")[0] for name in self.trained))
        every = {name.rpartition(".")[0] for name in self.places}
        for name, module in ((name, name.rpartition(".")[0]) for name in self.trained):
            # peft takes every module whose path ends so.
            if not module or module in self.layers or any(other != module and other.endswith(module) for other in every):
                raise UserError(
                    f"--adapter: {name} was trained too, for which peft's layout has no place: leave --adapter out, and the "
                    "adapters are merged into all weights"
                )
        return found

    def _whole(self, name: str) -> Tensor:
        return torch.cat(list(self.tensors.parts(self.places[name]))).view(self.places[name].shape)


def find_adapters(tensors: Tensors, places: dict[str, Place]) -> Adapters | None:
    """The adapters among *places*, the model's tensors in a checkpoint; None where the run had none."""
    layers = [name.removesuffix(DOWN) for name in places if name.endswith(DOWN)]
    if not layers:
        return None
    progress = read_document(tensors.folder, tensors.ranges, "progress.json")
    lora = progress.get("config", {}).get("model", {}).get("lora")
    # A module of the user's may call its own parameters so.
    return Adapters(tensors, places, layers, lora["alpha"], progress["trained"]) if lora else None
