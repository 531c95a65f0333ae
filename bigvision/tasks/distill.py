"""Distillation: a student learns from the labels and from a frozen teacher."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigvision.config import Config
from bigvision.errors import UserError
from bigvision.samples import seed_from
from bigvision.tasks.classify import Classify

Kind = Literal["logits", "tokens", "features"]


class Distill(Classify):
    """Classification whose loss is (1 - weight) times its own and weight times the distance from the teacher.

    The distance is, for "logits", the Kullback-Leibler divergence of the teacher's softened probabilities, times the squared
    temperature (Hinton et al. 2015); for "tokens" 1 - cosine of the last feature maps at each place, and for "features" that of
    the pooled features. A teacher of another width is brought to the student's by a fixed orthogonal map, so nothing but the
    student is trained, and it stays timm's model.
    """

    def __init__(self, teacher: str, kind: Kind, weight: float, temperature: float, *own: Any) -> None:
        """Args: *own*: of `Classify`."""
        super().__init__(*own)
        self.teacher, self.kind, self.share, self.temperature = teacher, kind, weight, temperature
        self.map: Tensor | None = None

    def model(self, config: Config) -> Callable[..., nn.Module] | None:
        return None if self.kind == "logits" else self._returning(Student)

    def teacher_model(self) -> Callable[..., nn.Module] | None:
        return None if self.kind == "logits" else self._returning(FeaturesOnly)

    def _returning(self, mixin: type[nn.Module]) -> Callable[..., nn.Module]:
        def create(name: str, **arguments: Any) -> nn.Module:
            model: Any = timm.create_model(name, **arguments)
            if self.kind == "tokens":
                # A module, so that a trace of the model has it as one call.
                model.feature_map = FeatureMap(getattr(model, "num_prefix_tokens", 0), model.num_features)
            # timm's model with another forward: names, configuration and copies stay as they are.
            model.__class__ = type(type(model).__name__, (mixin, type(model)), {})
            return model

        return create

    def loss_with_teacher(self, outputs: Any, targets: Any, told: Tensor, scale: Tensor | float) -> Tensor:
        if self.kind == "logits":
            logits, distance = outputs, self._divergence(outputs, told)
        else:
            logits, mine = outputs
            distance = self._angle(mine, told)
        return (1 - self.share) * self.loss(logits, targets) + self.share * scale * distance

    def _divergence(self, outputs: Tensor, told: Tensor) -> Tensor:
        mine, theirs = ((logits.float() / self.temperature).log_softmax(1) for logits in (outputs, told))
        return self.temperature**2 * F.kl_div(mine, theirs, reduction="sum", log_target=True)

    def _angle(self, mine: Tensor, told: Tensor) -> Tensor:
        """The sum over samples of 1 - cosine, the mean over places of feature maps; *mine* and *told* are (B, width, ...)."""
        mine, told = mine.float(), told.float()
        if told.shape[1] != mine.shape[1]:
            told = torch.einsum("bt...,ts->bs...", told, self._to_width(told, mine.shape[1]))
        if told.shape[2:] != mine.shape[2:]:
            told = F.interpolate(told, mine.shape[2:], mode="bilinear", antialias=True)
        return (1 - F.cosine_similarity(mine, told, dim=1)).reshape(len(mine), -1).mean(1).sum()

    def _to_width(self, told: Tensor, width: int) -> Tensor:
        """An orthogonal map (teacher's width, *width*), the same in every run."""
        if self.map is None:
            generator = torch.Generator().manual_seed(seed_from("distill", told.shape[1], width) % 2**63)
            self.map = nn.init.orthogonal_(torch.empty(told.shape[1], width), generator=generator).to(told.device)
        return self.map


class FeatureMap(nn.Module):
    """What ``forward_features`` returns, as (B, channels, height, width)."""

    def __init__(self, prefix: int, channels: int) -> None:
        """Args: *prefix*: tokens that stand for no place, before the others."""
        super().__init__()
        self.prefix, self.channels = prefix, channels

    def forward(self, inner: Tensor, images: Tensor) -> Tensor:
        if inner.ndim == 4:
            return inner if inner.shape[1] == self.channels else inner.permute(0, 3, 1, 2)
        height, width = images.shape[-2:]
        count = inner.shape[1] - self.prefix
        rows = max(1, round(math.sqrt(count * height / width)))
        if inner.ndim != 3 or count % rows:
            raise UserError(
                f"task.distill: tokens needs a feature map, but a model returns {tuple(inner.shape)}: use features or logits"
            )
        return inner[:, self.prefix :].unflatten(1, (rows, count // rows)).permute(0, 3, 1, 2)


class FeaturesOnly(nn.Module):
    """Before a timm class: its model returns what distillation compares."""

    forward_features: Any  # timm's
    forward_head: Any
    feature_map: Any

    def forward(self, images: Tensor) -> Any:
        return self.compared(images, self.forward_features(images))

    def compared(self, images: Tensor, inner: Tensor) -> Tensor:
        return self.feature_map(inner, images) if hasattr(self, "feature_map") else self.forward_head(inner, pre_logits=True)


class Student(FeaturesOnly):
    """Before a timm class: in training, its model returns the class scores and what distillation compares."""

    def forward(self, images: Tensor) -> Any:
        inner = self.forward_features(images)
        outputs = self.forward_head(inner)
        return (outputs, self.compared(images, inner)) if self.training else outputs
