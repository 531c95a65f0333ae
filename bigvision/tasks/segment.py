"""Semantic segmentation: a class for each pixel."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from types import MethodType
from typing import Any, cast
from unittest.mock import patch

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigvision.config import Config
from bigvision.errors import UserError, how_to_install, one_line
from bigvision.tasks.base import TargetsOf, Task, as_sum

STRIDE = 32
"""Both sides of an image are multiples of it: what decoders halve and double again five times."""


class Segment(Task):
    """Cross-entropy, Dice (Milletari et al. 2016) or their sum; mean intersection over union, pixel accuracy.

    Targets are class ids, whole numbers (B, H, W); a pixel whose id is *ignore* is not counted anywhere. A sample counts by its
    labelled pixels, so that each pixel of the global batch counts the same however samples lie on ranks.

    - ce: the sum of the pixels' losses.
    - dice: of each sample 1 - 2 |P Y| / (|P| + |Y|), the mean over the classes that it has, times its labelled pixels. P are
      the model's probabilities, Y is 1 where the class is. It is a sum over samples, as Dice over a whole batch is not.
    - ce+dice: both.
    """

    target = "mask"
    metrics = ("loss", "miou", "pixel_accuracy")

    def __init__(
        self, decoder: str = "fpn", options: Mapping[str, Any] | None = None, loss: str | None = None, ignore: int = 255
    ) -> None:  # fmt: skip
        """Args: *decoder*, *options*: of segmentation_models_pytorch, and the arguments that it gets."""
        if find_spec("segmentation_models_pytorch") is None:
            raise UserError(f"task.name: segment needs segmentation_models_pytorch; {how_to_install('segment')}")
        self.decoder, self.options, self.ignore = decoder, dict(options or {}), ignore
        self.kinds = (loss or "ce").split("+")
        self.classes = 1

    def prepare(self, classes: Sequence[str], facts: Mapping[str, Any]) -> None:
        self.classes = len(classes)

    def study(self, targets: TargetsOf, classes: Sequence[str], known: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is built around the backbone, for whoever opens the weights."""
        return {"name": "segment", "decoder": self.decoder, "decoder_options": self.options, "ignore": self.ignore}

    # The model.

    def model(self, config: Config) -> Callable[..., nn.Module]:
        size = config.model.image_size
        return partial(surrounded, self.decoder, self.options, (size, size) if isinstance(size, int) else size)

    # Training.

    def weight(self, targets: Tensor) -> Tensor:
        """Return the number of labelled pixels."""
        return (targets != self.ignore).sum()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of the samples' losses. *outputs* are logits, (B, classes, H, W)."""
        return self._losses(outputs, targets).sum()

    def _losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The losses of the samples, fp32 (B,)."""
        outputs, targets = outputs.float(), targets.long()
        labelled = targets != self.ignore
        losses = outputs.new_zeros(len(outputs))
        if "ce" in self.kinds:
            # Not reduced by the operation itself, which on CUDA adds in any order.
            losses = F.cross_entropy(outputs, targets, ignore_index=self.ignore, reduction="none").flatten(1).sum(1)
        if "dice" in self.kinds:
            chances = outputs.softmax(1) * labelled[:, None]
            every = torch.arange(outputs.shape[1], device=outputs.device)
            ours = (targets[:, None] == every[:, None, None]) & labelled[:, None]
            both, predicted, given = ((chances * ours).flatten(2).sum(2), *(one.flatten(2).sum(2) for one in (chances, ours)))
            has = given > 0
            dice = torch.where(has, 1 - 2 * both / (predicted + given).clamp(min=1e-6), 0.0).sum(1) / has.sum(1).clamp(min=1)
            losses = losses + dice * labelled.flatten(1).sum(1)
        return losses

    # Evaluation.

    @property
    def sums(self) -> int:
        return 3 + 3 * self.classes

    def measure(self, outputs: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
        """Return the loss, the labelled pixels and how many of them are right; of each class the pixels that are right, those
        that are labelled with it, and those that the model gives it. But for the loss they are whole numbers, and exact."""
        labelled = (targets != self.ignore) & valid[:, None, None]
        found, nothing = outputs.argmax(1), self.classes  # a head may have more outputs than there are classes
        found, given = (torch.where(labelled & (ids < nothing), ids.long(), nothing).flatten() for ids in (found, targets))
        right = torch.where(given == found, given, nothing)
        counts = [
            torch.zeros(nothing + 1, dtype=torch.int64, device=ids.device).scatter_add_(0, ids, torch.ones_like(ids))[:-1]
            for ids in (right, given, found)
        ]
        loss = as_sum(self._losses(outputs, targets), valid)
        sums = [loss, labelled.sum().double(), counts[0].sum().double()]
        return torch.cat([torch.stack(sums), *(count.double() for count in counts)])

    def _ious(self, sums: Tensor) -> Tensor:
        """Of each class the intersection over union; NaN where no pixel is labelled with it or predicted, and for *ignore*."""
        right, given, found = sums[3:].reshape(3, -1)
        union = given + found - right
        ious = torch.where(union > 0, right / union, math.nan)
        if 0 <= self.ignore < self.classes:
            ious[self.ignore] = math.nan
        return ious

    def compute(self, sums: Tensor, count: float, rows: Tensor | None) -> dict[str, float]:
        """Return means over all labelled pixels, and of the classes that are labelled or predicted anywhere."""
        loss, pixels, right = sums[:3].tolist()
        miou = self._ious(sums).nanmean().item()
        return {"loss": loss / (pixels or math.nan), "miou": miou, "pixel_accuracy": right / (pixels or math.nan)}

    def report(self, sums: Tensor, count: float, rows: Tensor | None, classes: Sequence[str]) -> dict[str, Any]:
        """Return of each class the intersection over union, None where it is nowhere, and the labelled pixels."""
        _, given, _ = sums[3:].reshape(3, -1)
        found = zip(classes, self._ious(sums).tolist(), given.tolist())
        return {"classes": [
            {"class": name, "iou": None if math.isnan(iou) else iou, "pixels": int(pixels)} for name, iou, pixels in found
        ]}  # fmt: skip

    # Prediction.

    def scores(self, outputs: Tensor) -> Tensor:
        """Return the classes' probabilities at each pixel, fp32 (B, classes, H, W)."""
        return outputs[:, : self.classes].float().softmax(1)

    def predict(self, scores: Tensor, classes: Sequence[str], top: int = 1) -> list[dict[str, Any]]:
        """Return the mask of each sample at the size of the model's input, which shows the whole image."""
        masks = scores.argmax(1).to(torch.uint8 if scores.shape[1] <= 256 else torch.int32)
        return [{"prediction": mask} for mask in masks.cpu()]

    def draw(self, image: Tensor, row: Mapping[str, Any]) -> Tensor:
        """Return *image* half covered with the classes' colours; the class 0 stays as it is."""
        mask = torch.as_tensor(row["prediction"]).long()
        if mask.shape != image.shape[1:]:
            mask = F.interpolate(mask[None, None].double(), size=image.shape[1:], mode="nearest-exact")[0, 0].long()
        colours = torch.stack([(mask * factor + 50 * place) % 256 for place, factor in enumerate((97, 151, 211))])
        return torch.where(mask > 0, (image.long() + colours) // 2, image.long()).to(torch.uint8)


def surrounded(
    decoder: str, options: Mapping[str, Any], size: tuple[int, int] | None, name: str, *, pretrained: bool = False,
    num_classes: int = 1, in_chans: int = 3, **arguments: Any,
) -> nn.Module:  # fmt: skip
    """The timm model *name* with a decoder of segmentation_models_pytorch around it, called as ``timm.create_model`` is.

    Its outputs are (B, *num_classes*, H, W). The backbone's tensors begin with ``encoder.model.``; what of it the decoder does
    not use is left out. *size* is that of the images, by default timm's. Raises `UserError`, or what timm raises.
    """
    import segmentation_models_pytorch as smp

    if decoder == "dpt":
        arguments["num_classes"] = 0  # it is built around the whole timm model, whose head is not used
    create, weights = timm.create_model, cast(str, pretrained or None)  # True, for timm's models
    try:
        # Past the library, some of whose own arguments have the names of timm's, and which looks at a model without any first.
        with patch.object(timm, "create_model", lambda name, **others: create(name, **others | arguments)):
            made: Any = smp.create_model(
                decoder, f"tu-{name}", encoder_weights=weights, in_channels=in_chans, classes=num_classes, **options
            )  # fmt: skip
    except ValueError as error:
        fix = "fpn, upernet or unet" if decoder == "dpt" else "dpt, which takes models of one scale, as ViTs are"
        raise UserError(f"task.decoder: {decoder} cannot be built around {name} ({one_line(error)}): use {fix}") from error
    except TypeError as error:
        if wrong := next((key for key in options if f"'{key}'" in str(error)), None):
            raise UserError(f"task.decoder_options.{wrong}: {decoder} takes no such argument: remove it") from error
        raise
    made.requires_divisible_input_shape = False  # checked here, since torch.fx cannot follow it
    backbone = made.encoder.model
    if decoder == "dpt" and hasattr(backbone, "prune_intermediate_layers"):
        backbone.prune_intermediate_layers(made.encoder._output_indices, prune_norm=True, prune_head=True)
    # The whole image is seen in an evaluation, so that a mask of the model's size covers it.
    seen = {"crop_pct": 1.0, "crop_mode": "squash"}
    *_, head = (path for path, part in made.segmentation_head.named_modules() if isinstance(part, nn.Conv2d))
    made.pretrained_cfg = {
        **backbone.pretrained_cfg,
        **seen,
        "num_classes": num_classes,
        "classifier": f"segmentation_head.{head}",
    }
    made.num_classes, made.in_chans, made.num_features = num_classes, in_chans, made.encoder.out_channels[-1]
    made._traits = dict(backbone._traits)  # timm's record of the input size
    made.get_classifier = MethodType(_heads, made)
    for side in size or backbone.pretrained_cfg["input_size"][1:]:
        if side % STRIDE:
            below = max(STRIDE, side - side % STRIDE)
            raise UserError(
                f"model.image_size: {side} is not a multiple of {STRIDE}, which task.decoder: {decoder} needs: use {below} or "
                f"{below + STRIDE}"
            )
    return made


def _heads(made: Any) -> tuple[nn.Module, ...]:
    """What timm's ``get_classifier`` is for: all that is not the backbone."""
    return made.decoder, made.segmentation_head
